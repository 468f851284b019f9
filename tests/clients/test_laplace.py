"""Laplace's own backends, plain float64 loops, and ours: the same numbers, and ours where theirs have none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laplace import Laplace
from laplace.curvature import (
    CurvlinopsEF,
    CurvlinopsGGN,
    CurvlinopsHessian,
    GGNInterface,
)
from laplace_models import MODELS, C, N
from oracle import close
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hookjac
from hookjac.clients.laplace import HookjacEF, HookjacGGN, HookjacHessian, functional_variance
from hookjac.clients.laplace_kron import Blocks
from hookjac.testing import grad, jacobian, trainable

PAGE = Path(__file__).parents[2] / "docs" / "laplace.md"


def subnet(P: int) -> Tensor:
    """In no order, of several parameters, and of some not at all."""
    return torch.tensor([P - 1, 0, P // 2, 3, P - 3])


def targets(likelihood: str, n: int = N) -> Tensor:
    return torch.randn(n, C) if likelihood == "regression" else torch.randint(C, (n,))


def loader(x: Any, y: Tensor, size: int = 3) -> DataLoader:  # uneven batches: 3, 3, 1
    return DataLoader(TensorDataset(x, y), batch_size=size)


def fitted(model: nn.Module, x: Any, y: Tensor, backend: Any = HookjacGGN, subset: str = "all",
           structure: str = "kron", **options: Any) -> Any:  # fmt: skip
    likelihood = options.pop("likelihood", "regression" if y.is_floating_point() else "classification")
    if subset == "subnetwork":
        options["subnetwork_indices"] = subnet(sum(p.numel() for p in trainable(model).values()))
    la = Laplace(model, likelihood, subset_of_weights=subset, hessian_structure=structure, backend=backend, **options)
    la.fit(loader(x, y))
    return la


def dense(H: Any) -> Tensor:
    return H if isinstance(H, Tensor) else H.to_matrix()


def model_of(name: str) -> tuple[nn.Module, Tensor]:
    build, inputs = MODELS[name]
    return build().eval(), inputs()


# Against Laplace's own --------------------------------------------------------------------------------------------

OTHERS: list[tuple[Any, Any, list[tuple[str, str]]]] = [
    (HookjacGGN, CurvlinopsGGN, [(a, b) for a in ("all", "last_layer") for b in ("full", "kron", "diag")]
     + [("subnetwork", "full"), ("subnetwork", "diag")]),
    (HookjacEF, CurvlinopsEF, [("all", "full"), ("all", "kron"), ("all", "diag"), ("last_layer", "full"),
                               ("last_layer", "kron"), ("subnetwork", "full"), ("subnetwork", "diag")]),
    (HookjacHessian, CurvlinopsHessian, [("all", "full"), ("last_layer", "full")]),
]  # fmt: skip
TRIPLES = [(ours, theirs, *pair) for ours, theirs, pairs in OTHERS for pair in pairs]


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
@pytest.mark.parametrize(("ours", "theirs", "subset", "structure"), TRIPLES)
@pytest.mark.parametrize("name", ["MLP", "CNN", "positions"])
def test_equal_to_curvlinops(name: str, ours: Any, theirs: Any, subset: str, structure: str, likelihood: str) -> None:
    model, x = model_of(name)
    y, new = targets(likelihood), MODELS[name][1]()
    options = {"prior_precision": 30.0} if theirs is CurvlinopsHessian else {}  # away from a minimum: make it positive
    mine, its = (fitted(copy.deepcopy(model), x, y, b, subset, structure, **options) for b in (ours, theirs))
    close(dense(mine.H), dense(its.H), "H")
    if structure == "kron":
        for k, (a, b) in enumerate(zip(mine.H_facs.kfacs, its.H_facs.kfacs, strict=True)):
            for s, t in zip(a, b, strict=True):
                close(s, t, (k, "side"))
    close(mine.loss, its.loss, "loss")
    close(mine.log_marginal_likelihood(), its.log_marginal_likelihood(), "evidence")
    for p, q in zip(*((la(new) if likelihood == "regression" else (la(new),)) for la in (mine, its)), strict=True):
        close(p, q, "predictive")


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("name", ["CNN", "positions"])
def test_sharing_reduced(name: str, subset: str) -> None:
    model, x = model_of(name)
    y = targets("classification")
    pair = [
        b(model, "classification").kron(x, y, N=2 * N, kfac_approx="reduce")[1] for b in (HookjacGGN, CurvlinopsGGN)
    ]
    close(pair[0].to_matrix(), pair[1].to_matrix(), "H")
    option = fitted(model, x, y, subset=subset, backend_kwargs={"sharing": "reduce"})
    assert option.backend.sharing == "reduce"


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_sampled_labels_are_those_of_laplace(likelihood: str) -> None:
    model, x = model_of("CNN")
    y, found = targets(likelihood), []
    for kind in (HookjacGGN, GGNInterface):
        backend = kind(model, likelihood, stochastic=True, num_samples=3)
        torch.manual_seed(1)
        found.append((backend.diag(x, y)[1], backend.full(x, y)[1]))
    for s, t in zip(*found, strict=True):
        close(s, t, likelihood)


def test_sampled_factors_are_unbiased() -> None:
    model, x = model_of("MLP")
    y = targets("classification")
    sampled, exact = (HookjacGGN(model, "classification", stochastic=s, num_samples=2) for s in (True, False))
    drawn = torch.stack([sampled.kron(x, y, N)[1].to_matrix() for _ in range(300)])
    wanted = exact.kron(x, y, N)[1].to_matrix()
    assert ((drawn.mean(0) - wanted).abs() <= 5 * drawn.std(0) / 300**0.5 + 1e-12).all()
    assert drawn.std(0).max() > 0
    torch.manual_seed(0)
    one = sampled.kron(x, y, N, mc_samples=1)[1].to_matrix()
    torch.manual_seed(0)
    assert not torch.equal(one, sampled.kron(x, y, N, mc_samples=2)[1].to_matrix())


# Against loops ----------------------------------------------------------------------------------------------------


def loops(model: nn.Module, x: Tensor, y: Tensor, params: list[nn.Parameter]) -> dict[str, Tensor]:
    """[P, P] each, from one derivative at a time; of Laplace's loss, a half of the squared error or cross entropy."""
    output = model(x)
    J = torch.cat([jacobian(output, p).reshape(N, C, -1) for p in params], 2).detach()
    p = output.detach().softmax(1)
    regression = y.is_floating_point()
    each = (
        F.mse_loss(output, y, reduction="none").sum(1) if regression else F.cross_entropy(output, y, reduction="none")
    )
    ggn = torch.zeros(J.shape[2], J.shape[2])
    ef = torch.zeros_like(ggn)
    for n in range(N):
        L = torch.eye(C) if regression else torch.diag(p[n]) - torch.outer(p[n], p[n])
        ggn += J[n].T @ L @ J[n]
        g = torch.cat([grad(each[n], q).detach().reshape(-1) for q in params])
        ef += torch.outer(g, g)
    factor = 0.5 if regression else 1.0
    first = torch.cat([grad(each.sum(), q).reshape(-1) for q in params])
    hessian = torch.stack([torch.cat([grad(g, q).detach().reshape(-1) for q in params]) for g in first])
    return {"J": J, "f": output.detach(), "GGN": ggn, "EF": factor * ef, "Hessian": factor * hessian,
            "loss": factor * each.sum().detach()}  # fmt: skip


def taking_part(model: nn.Module, subset: str) -> list[nn.Parameter]:
    if subset != "last_layer":
        return list(trainable(model).values())
    last = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return list((model.o if hasattr(model, "o") else last[-1]).parameters())  # type: ignore[arg-type, union-attr]


WITH_LAST = [name for name in MODELS if name != "bare parameters"]
PLACES = [
    (name, s) for s in ("all", "last_layer", "subnetwork") for name in (WITH_LAST if s == "last_layer" else MODELS)
]
SECOND = {"nn.MultiheadAttention"}  # PyTorch's fast path has no second derivative for the loops


@pytest.mark.parametrize("likelihood", ["regression", "classification"])
@pytest.mark.parametrize(("name", "subset"), PLACES)
def test_equal_to_loops(name: str, subset: str, likelihood: str) -> None:
    model, x = model_of(name)
    y = targets(likelihood)
    params = taking_part(model, subset)
    wanted = loops(model, x, y, params)
    P = wanted["J"].shape[2]
    at = subnet(P) if subset == "subnetwork" else torch.arange(P)
    flags = [p.requires_grad for p in model.parameters()]
    for kind, key in ((HookjacGGN, "GGN"), (HookjacEF, "EF"), (HookjacHessian, "Hessian")):
        if subset == "last_layer":
            layer = next(m for m in model.modules() if set(m.parameters(recurse=False)) >= set(params))
            object.__setattr__(model, "last_layer", layer)  # as Laplace's own wrapper does
        last, places = subset == "last_layer", subnet(P) if subset == "subnetwork" else None
        backend = kind(model, likelihood, last_layer=last, subnetwork_indices=places)
        loss, H = backend.full(x, y, N=N)
        close(H, wanted[key][at][:, at], (key, "full"))
        close(loss, wanted["loss"], (key, "loss"))
        loss, h = backend.diag(x, y, N=N)
        close(h, wanted[key].diagonal()[at], (key, "diag"))
        close(loss, wanted["loss"], (key, "loss"))
        J, f = backend.last_layer_jacobians(x) if last else backend.jacobians(x)
        close(J, wanted["J"][:, :, at], "J")
        close(f, wanted["f"], "f")
        rows = torch.randint(C, (N, 2))
        close(
            backend.selected_output_jacobians(x, rows)[0], J.gather(1, rows[:, :, None].expand(-1, -1, len(at))), "rows"
        )
        close(backend.selected_output_jacobians(x, rows[:, 0])[0][:, 0], J[torch.arange(N), rows[:, 0]], "a row")
    assert flags == [p.requires_grad for p in model.parameters()]
    for p in model.parameters():
        assert not vars(p), "nothing is left behind"
        assert p.grad is None


# biases of layers that are used at several positions, or several times; every other single entry is an exact block
EXPANDED = {
    "CNN": {"0.bias", "2.bias"}, "positions": {"a.bias"}, "conv1d": {"0.bias"}, "batch norm": {"0.bias"},
    "attention": {"e.bias", "q.bias", "p.bias"}, "a layer called twice": {"1.0.bias"},
    "a mean after the last layer": {"a.bias", "o.bias"}, "nn.MultiheadAttention": {"t.out_proj.bias"},
}  # fmt: skip


@pytest.mark.parametrize("kind", [HookjacGGN, HookjacEF])
@pytest.mark.parametrize("name", MODELS)
def test_kronecker_entries(name: str, kind: Any) -> None:
    """Over three batches: sides as `KFAC` defines them, the mean of A and the sum of B; or the exact block."""
    model, x = model_of(name)
    y = targets("classification")
    names, params = list(trainable(model)), list(trainable(model).values())
    la = fitted(model, x, y, kind)
    exact = loops(model, x, y, params)["GGN" if kind is HookjacGGN else "EF"]
    fisher = "exact" if kind is HookjacGGN else "empirical"
    parts = []
    for xs, ys in zip(x.split(3), y.split(3), strict=True):
        with hookjac.extend(model, hookjac.KFAC(fisher=fisher)):  # type: ignore[arg-type]
            F.cross_entropy(model(xs), ys, reduction="sum").backward()
        parts.append([p.kfac for p in params])  # type: ignore[attr-defined]
    assert isinstance(la.H_facs, Blocks)
    assert len(la.H_facs) == len(params)
    start = 0
    for k, (p, entry) in enumerate(zip(params, la.H_facs.kfacs, strict=True)):
        P = p.numel()
        here = exact[start : start + P, start : start + P]
        start += P
        found = Blocks([entry]).to_matrix()  # type: ignore[list-item]
        if len(entry) == 2:
            A = sum(len(xs) * batch[k].A for xs, batch in zip(x.split(3), parts, strict=True)) / N
            first = parts[0][k]
            whole = hookjac.Kronecker(A, sum(batch[k].B for batch in parts), p.shape, first.swapped)
            close(found, whole.to_dense(), (names[k], "sides"))
            assert [len(side) for side in entry] == [p.shape[0], P // p.shape[0]]
        elif names[k] in EXPANDED.get(name, ()):
            close(found, la.H_facs.kfacs[k - 1][0], (names[k], "its weight's side"))
            assert not torch.allclose(found, here)
        else:
            close(found, here, (names[k], "block"))


def test_a_bias_takes_positions_for_samples_only_with_its_weight() -> None:
    """Where the weight has another use, the bias has its own exact block, and not the weight's side."""
    model: Any = nn.Module()
    model.a, model.o = nn.Linear(4, 4), nn.Linear(4, C)
    model.forward = lambda x: model.o(torch.tanh(F.linear(model.a(x), model.a.weight)).mean(1))
    x, y = torch.randn(N, 3, 4), targets("classification")
    backend = HookjacGGN(model, "classification")
    found = backend.kron(x, y, N)[1]
    exact = loops(model, x, y, [model.a.bias])["GGN"]
    close(found.kfacs[1][0], exact, "bias")
    assert not torch.allclose(found.kfacs[0][0], exact)


@pytest.mark.parametrize("name", ["embedding", "bare parameters", "layer norm of images", "CNN"])
def test_data_that_comes_in_two_parts(name: str) -> None:
    model, x = model_of(name)
    y = targets("classification")
    whole = fitted(model, x, y)
    parted = Laplace(model, "classification", subset_of_weights="all", hessian_structure="kron", backend=HookjacGGN)
    parted.fit(loader(x[:3], y[:3]))
    parted.fit(loader(x[3:], y[3:]), override=False)
    close(parted.H.to_matrix(), whole.H.to_matrix(), "H", 1e-9)
    loaded = Laplace(model, "classification", subset_of_weights="all", hessian_structure="kron", backend=HookjacGGN)
    loaded.load_state_dict(whole.state_dict())
    close(loaded.H.to_matrix(), whole.H.to_matrix(), "saved and loaded")
    close(loaded(x), whole(x), "predictive")


# The predictive ---------------------------------------------------------------------------------------------------

ALL = [
    (s, t)
    for s in ("all", "last_layer", "subnetwork")
    for t in ("full", "kron", "diag")
    if (s, t) != ("subnetwork", "kron")
]


@pytest.mark.parametrize(("subset", "structure"), ALL)
@pytest.mark.parametrize("name", MODELS)
def test_the_predictive_without_a_jacobian(name: str, subset: str, structure: str) -> None:
    if name == "bare parameters" and subset == "last_layer":
        return
    model, x = model_of(name)
    la = fitted(
        model, x, targets("regression"), subset=subset, structure=structure, prior_precision=0.3, sigma_noise=0.7
    )
    new = MODELS[name][1]()
    f, found = functional_variance(la, new)
    J, wanted = (la.backend.last_layer_jacobians if subset == "last_layer" else la.backend.jacobians)(new)
    close(f, wanted, "f")
    close(found, la.functional_variance(J), "J Σ Jᵀ", 1e-9)
