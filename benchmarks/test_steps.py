"""A step with `extend` against a plain step and against the usual ways, on a small MLP.

Run with timing: python -m pytest benchmarks --benchmark-enable --benchmark-group-by=func
The results are compared before anything is timed. Without `--benchmark-enable` each runs once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from hookjac import extend

N, WIDTH, C = 64, 64, 10
Results = dict[str, Tensor]


@pytest.fixture(params=[nn.ReLU, nn.Tanh], ids=["relu", "tanh"])
def work(request: pytest.FixtureRequest) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    act = request.param
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), act(), nn.Linear(WIDTH, WIDTH), act(), nn.Linear(WIDTH, C))
    return model, torch.randn(N, WIDTH), torch.randint(C, (N,))


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Results:
    F.cross_entropy(model(x), y).backward()
    return {}


def ours(name: str) -> Callable[[nn.Module, Tensor, Tensor], Results]:
    def step(model: nn.Module, x: Tensor, y: Tensor) -> Results:
        with extend(model, name):
            F.cross_entropy(model(x), y).backward()
        return {key: getattr(p, name) for key, p in model.named_parameters()}

    return step


def func_grad_sample(model: nn.Module, x: Tensor, y: Tensor) -> Results:
    params = {key: p.detach() for key, p in model.named_parameters()}

    def loss(params: Results, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x[None],)), y[None], reduction="sum") / N

    return vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)  # type: ignore[no-any-return]


def func_jac(model: nn.Module, x: Tensor, y: Tensor) -> Results:
    params = {key: p.detach() for key, p in model.named_parameters()}

    def one(params: Results, x: Tensor) -> Tensor:
        return functional_call(model, params, (x[None],))[0]  # type: ignore[no-any-return]

    return vmap(jacrev(one), in_dims=(None, 0))(params, x)  # type: ignore[no-any-return]


def func_ggn_diag(model: nn.Module, x: Tensor, y: Tensor) -> Results:
    p = model(x).detach().softmax(1)
    H = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / N  # [N, C, C]
    rows = func_jac(model, x, y)
    return {key: torch.einsum("ncp,ncd,ndp->p", j.flatten(2), H, j.flatten(2)).view_as(j[0, 0])
            for key, j in rows.items()}  # fmt: skip


def products_hess_diag(model: nn.Module, x: Tensor, y: Tensor) -> Results:
    """One product for each entry, the only exact way in plain PyTorch; of the last layer alone, or it takes minutes."""
    last: Any = model[-1]  # type: ignore[index]
    slopes = torch.autograd.grad(F.cross_entropy(model(x), y), list(last.parameters()), create_graph=True)
    found = {}
    for (key, p), slope in zip(last.named_parameters(), slopes, strict=True):
        rows = [torch.autograd.grad(s, p, retain_graph=True)[0].flatten()[k] for k, s in enumerate(slope.flatten())]
        found[f"4.{key}"] = torch.stack(rows).view_as(p)
    return found


STEPS = {
    "plain": (plain, plain),
    "grad_sample": (ours("grad_sample"), func_grad_sample),
    "jac": (ours("jac"), func_jac),
    "ggn_diag": (ours("ggn_diag"), func_ggn_diag),
    "hess_diag": (ours("hess_diag"), products_hess_diag),
}


@pytest.mark.parametrize("who", ["hookjac", "usual way"])
@pytest.mark.parametrize("name", STEPS)
def test_step(benchmark: Any, work: tuple[nn.Sequential, Tensor, Tensor], name: str, who: str) -> None:
    model, x, y = work
    mine, usual = STEPS[name]
    found, wanted = mine(model, x, y), usual(model, x, y)
    for key, right in wanted.items():
        scale = right.abs().max()
        assert (found[key] - right).abs().max() <= 1e-5 * scale, key  # both in float32
    benchmark.group = name
    benchmark(mine if who == "hookjac" else usual, model, x, y)
