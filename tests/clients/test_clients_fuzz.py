"""Every argument of the bridges replaced by what does not belong there: in the manner of `test_fuzz`.

Tensors of a shape or type that the model itself does not take are PyTorch's own affair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laplace import Laplace
from leftovers import attributes
from oracle import close
from test_fuzz import JUNK, Row, flag, integers, missing, nothing, or_none, wrong
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hookjac import HookjacError
from hookjac.clients.laplace import HookjacEF, HookjacGGN, HookjacHessian, functional_variance
from hookjac.clients.opacus import GhostClipping, PrivacyEngine, ghost_clipping, grad_samples

N, D, C = 4, 3, 3


def parts() -> tuple[nn.Module, Tensor, Tensor]:
    return nn.Sequential(nn.Linear(D, 2), nn.Tanh(), nn.Linear(2, C)), torch.randn(N, D), torch.randint(C, (N,))


def places(value: Any) -> bool:
    return value is None or (isinstance(value, Tensor) and value.dtype == torch.int64)


def laplace() -> dict[str, Row]:
    model, x, y = parts()
    la = Laplace(model, "classification", subset_of_weights="all", hessian_structure="diag", backend=HookjacGGN)
    la.fit(DataLoader(TensorDataset(x, y), batch_size=N))
    ggn = HookjacGGN(model, "classification")
    common = {0: nothing, 1: nothing, "last_layer": flag, "subnetwork_indices": places, "sharing": nothing}
    names: dict[int | str, str] = {1: "likelihood"}
    return {
        "HookjacGGN": Row(HookjacGGN, (model, "classification"), {}, common, lambda b: b.full(x, y), names),
        "HookjacGGN, sampled": Row(HookjacGGN, (model, "classification"), {"stochastic": True}, {
            "stochastic": flag, "num_samples": integers(1)}, lambda b: (b.full(x, y), b.diag(x, y), b.kron(x, y, N))),
        "HookjacEF": Row(HookjacEF, (model, "classification"), {}, common, lambda b: b.diag(x, y), names),
        "HookjacHessian": Row(HookjacHessian, (model, "classification"), {}, common, lambda b: b.diag(x, y), names),
        "kron": Row(ggn.kron, (x, y, N), {}, {
            2: integers(1), "kfac_approx": missing, "mc_samples": or_none(integers(1))},
            names={2: "N", "kfac_approx": "sharing", "mc_samples": "samples"}),
        "EF.kron": Row(HookjacEF(model, "classification").kron, (x, y, N), {}, {
            2: integers(1), "kfac_approx": missing}, names={2: "N", "kfac_approx": "sharing"}),
        "selected_output_jacobians": Row(ggn.selected_output_jacobians, (x, y), {}, {1: nothing},
                                         names={1: "outputs"}),
        "functional_variance": Row(functional_variance, (la, x), {}, {0: nothing}),
    }  # fmt: skip


def opacus() -> dict[str, Row]:
    model, x, y = parts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks, private, _ = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=DataLoader(TensorDataset(x, y), batch_size=N),
        noise_multiplier=0.0, max_grad_norm=1.0, poisson_sampling=False, wrap_model=False, grad_sample_mode="no_op",
    )  # fmt: skip
    criterion = nn.CrossEntropyLoss()
    _, fast, _ = ghost_clipping(hooks, private, criterion)

    def walked(block: Any) -> None:
        try:
            with block:
                F.cross_entropy(model(x), y).backward()
        finally:
            for p in model.parameters():
                vars(p).clear()
                p.grad = None

    def clipped(found: Any) -> None:
        block, chosen, loss = found
        with block:
            loss(model(x), y).backward()
        chosen.zero_grad()

    options = {"output": missing, "independent": flag}
    reductions: dict[int | str, Callable[[Any], bool]] = {"loss_reduction": missing, "accumulate": flag}
    return {
        "grad_samples": Row(grad_samples, (model,), {}, {0: nothing, **reductions, **options}, walked),
        "grad_samples of hooks": Row(grad_samples, (hooks,), {}, reductions, walked),
        "ghost_clipping": Row(ghost_clipping, (hooks, private, criterion), {}, {
            0: nothing, 1: nothing, 2: nothing, **options}, clipped),
        "GhostClipping": Row(GhostClipping, (hooks, fast), {}, {0: nothing, 1: nothing, "independent": flag}),
        "PrivacyEngine.validate": Row(
            lambda module: PrivacyEngine().validate(module=module, optimizer=None, data_loader=None), (model,), {},
            {0: nothing}),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [laplace, opacus])
def test_junk_for_every_argument(family: Callable[[], dict[str, Row]]) -> None:
    failed = []
    for name, row in family().items():
        row.use(row.call(*row.args, **row.kwargs))
        for slot in row.accepts:
            failed += [found for value in JUNK if (found := wrong(name, row, slot, value))]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("value", [v for v in JUNK if not isinstance(v, Tensor)], ids=lambda v: f"{v!r:.20}")
def test_inputs_that_are_none(value: Any) -> None:
    model, x, y = parts()
    la = Laplace(model, "classification", subset_of_weights="all", hessian_structure="kron", backend=HookjacGGN)
    la.fit(DataLoader(TensorDataset(x, y), batch_size=N))
    before = attributes(model)
    message = "argument 'input'" if isinstance(value, dict) else r"x must be a tensor \[N, \.\.\.\], or a mapping"
    for ask in (lambda v: functional_variance(la, v), la.backend.jacobians, lambda v: la.backend.diag(v, y)):
        with pytest.raises(TypeError, match=message):
            ask(value)
    assert attributes(model) == before


def test_a_posterior_that_is_not_fitted() -> None:
    model, x, _ = parts()
    for subset, structure in (("all", "kron"), ("last_layer", "diag"), ("last_layer", "kron"), ("last_layer", "full")):
        la = Laplace(model, "classification", subset_of_weights=subset, hessian_structure=structure)
        with pytest.raises(HookjacError, match=r"is not fitted: call la\.fit"):
            functional_variance(la, x)
    for structure in ("diag", "full"):  # all weights: Laplace has the prior there
        la = Laplace(model, "classification", subset_of_weights="all", hessian_structure=structure)
        close(functional_variance(la, x)[1], la.functional_variance(la.backend.jacobians(x)[0]), structure)


def test_places_and_layers_that_are_none() -> None:
    model, x, _ = parts()
    for chosen in (torch.tensor([-1]), torch.tensor([0, 17])):
        with pytest.raises(ValueError, match=r"subnetwork_indices must be from 0 to 16, as .* got"):
            HookjacGGN(model, "classification", subnetwork_indices=chosen)
    with pytest.raises(HookjacError, match="Sequential has no module `last_layer`"):
        HookjacGGN(model, "classification", last_layer=True)
    for outputs in (torch.tensor([0, 1, 2, C]), torch.tensor([-1, 0, 0, 0])):
        with pytest.raises(ValueError, match="outputs must be from 0 to 2, got"):
            HookjacGGN(model, "classification").selected_output_jacobians(x, outputs)
    with pytest.raises(ValueError, match="an output of each sample at least"):
        HookjacGGN(model, "classification").selected_output_jacobians(x, torch.zeros(N, 0, dtype=torch.int64))


def test_a_criterion_of_another_reduction() -> None:
    model, x, y = parts()
    hooks, private, _ = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=0.0, max_grad_norm=1.0,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=N), poisson_sampling=False, wrap_model=False,
        grad_sample_mode="no_op",
    )  # fmt: skip
    with pytest.raises(HookjacError, match="reduction is 'sum', but make_private was told 'mean'"):
        ghost_clipping(hooks, private, nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(TypeError, match="criterion must be a loss module with a `reduction`, got function"):
        ghost_clipping(hooks, private, F.cross_entropy)
