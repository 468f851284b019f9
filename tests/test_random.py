"""Random nets that mix rules, glue, sharing and in-place code, against the loops."""

from __future__ import annotations

from typing import Any

import torch
from cases import Fn, random_loss
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oracle import compare, expected
from recipes import FEW_STEPS as STEPS
from test_create_graph import differentiable_jacobian as grad_again
from test_create_graph import slopes, weights
from test_quantities import definitions, hold
from torch import Tensor, nn

from hookjac import HessDiag, extend


class Net(nn.Module):
    """Steps over tensors [N, T, d]; `back` says how far each looks back, `shared` reuses the first linear layer."""

    def __init__(self, names: list[str], back: list[int], d: int, out: int, shared: bool) -> None:
        super().__init__()
        self.names, self.back = names, back
        self.parts = nn.ModuleList(Fn(STEPS[name][1], **STEPS[name][0](d)) for name in names)
        linears = [m.f for m in self.parts if isinstance(getattr(m, "f", None), nn.Linear)]
        linears = [f for f in linears if f.in_features == f.out_features]
        if shared and len(linears) > 1:
            linears[-1].weight = linears[0].weight
        self.head = nn.Linear(d, out)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for part, back in zip(self.parts, self.back, strict=True):
            seen.append(part(seen[-1], seen[max(0, len(seen) - 1 - back)]))
        return self.head(seen[-1]).sum(1)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5),
    back=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    N=st.integers(1, 3),
    T=st.integers(1, 3),
    d=st.integers(2, 3),
    shared=st.booleans(),
    road=st.sampled_from(["auto", "columns", "features"]),
    seed=st.integers(0, 9),
)
def test_random_nets(
    names: list[str], back: list[int], N: int, T: int, d: int, shared: bool, road: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    model, x = Net(names, back[: len(names)], d, 2, shared), torch.randn(N, T, d)
    wanted = expected(model, lambda: model(x), random_loss)
    with extend(model, "grad_sample", "jac", "ggn_diag", HessDiag(road=road)):
        random_loss(model(x)).backward()
    compare(model, wanted, ("grad_sample", "jac", "ggn_diag", "hess_diag"))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5),
    back=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    N=st.integers(1, 3),
    T=st.integers(1, 3),
    d=st.integers(2, 3),
    shared=st.booleans(),
    seed=st.integers(0, 9),
)
def test_random_nets_and_every_quantity(
    names: list[str], back: list[int], N: int, T: int, d: int, shared: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    model, x = Net(names, back[: len(names)], d, 2, shared), torch.randn(N, T, d)
    wanted = definitions(model, x, None)
    asked = list(next(iter(wanted.values())))
    with extend(model, *asked):
        random_loss(model(x)).backward()
    hold(model, wanted, tuple(asked))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5),
    back=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    N=st.integers(1, 3),
    T=st.integers(1, 3),
    d=st.integers(2, 3),
    shared=st.booleans(),
    seed=st.integers(0, 9),
)
# batched kernels of LayerNorm take its statistics for constants
@example(names=["halves", "layer norm", "relu"], back=[0, 2, 0, 1, 3], N=2, T=1, d=2, shared=True, seed=432947)
def test_random_nets_differentiated_again(
    names: list[str], back: list[int], N: int, T: int, d: int, shared: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    model, x = Net(names, back[: len(names)], d, 2, shared), torch.randn(N, T, d, requires_grad=True)
    out = model(x)
    rows = [grad_again(out, p) for p in model.parameters()]
    wanted = slopes(sum((j * weights(j, 2)).sin().sum() for j in rows), model, x)  # type: ignore[arg-type]
    with extend(model, "jac", "grad_sample_norm", create_graph=True):
        random_loss(model(x)).backward()
    found = slopes(sum((p.jac * weights(p.jac, 2)).sin().sum() for p in model.parameters()), model, x)  # type: ignore
    top = max(t.abs().max().item() for t in wanted)
    for f, w in zip(found, wanted, strict=True):
        assert (f - w).abs().max().item() <= 1e-9 * top + 1e-13
