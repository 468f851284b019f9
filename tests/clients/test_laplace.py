"""Laplace's own backends, plain float64 loops, and ours: the same numbers, and ours where theirs have none."""

from __future__ import annotations

import contextlib
import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Fn
from laplace import Laplace, marglik_training
from laplace.curvature import (
    AsdlGGN,
    BackPackGGN,
    CurvlinopsEF,
    CurvlinopsGGN,
    CurvlinopsHessian,
    GGNInterface,
)
from laplace.utils.matrix import Kron
from laplace_models import MODELS, C, D, N
from oracle import close
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, GPT2Config, GPT2ForSequenceClassification

import hookjac
from hookjac import HookjacError
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


def loops(model: nn.Module, x: Tensor, y: Tensor, params: list[Any], *, second: bool = False) -> dict[str, Tensor]:
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
    rows = [torch.cat([grad(g, q).detach().reshape(-1) for q in params]) for g in (first if second else ())]
    return {"J": J, "f": output.detach(), "loss": factor * each.sum().detach(), "GGN": ggn, "EF": factor * ef,
            "Hessian": factor * torch.stack(rows or [first])}  # fmt: skip


def taking_part(model: nn.Module, subset: str) -> list[nn.Parameter]:
    if subset != "last_layer":
        return list(trainable(model).values())
    last = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return list((model.o if hasattr(model, "o") else last[-1]).parameters())  # type: ignore[arg-type, union-attr]


BOTH = ("MLP", "CNN", "layer norm", "embedding tied to the head")  # of the others, less is asked
PLACES = [
    (name, subset, likelihood)
    for subset in ("all", "last_layer", "subnetwork")
    for likelihood in ("classification", "regression")
    for name in MODELS
    if (likelihood == "classification" or name in BOTH) and (subset, name) != ("last_layer", "bare parameters")
]


@pytest.mark.parametrize(("name", "subset", "likelihood"), PLACES)
def test_equal_to_loops(name: str, subset: str, likelihood: str) -> None:
    model, x = model_of(name)
    y = targets(likelihood)
    params = taking_part(model, subset)
    second = name in (*BOTH, "two layers with one weight", "a layer called twice", "positions")
    wanted = loops(model, x, y, params, second=second)
    P = wanted["J"].shape[2]
    at = subnet(P) if subset == "subnetwork" else torch.arange(P)
    flags = [p.requires_grad for p in model.parameters()]
    kinds: list[tuple[Any, str]] = [(HookjacGGN, "GGN"), (HookjacEF, "EF"), (HookjacHessian, "Hessian")]
    for kind, key in kinds if second else kinds[:2]:
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


KINDS = [(name, kind) for kind in (HookjacGGN, HookjacEF) for name in MODELS if kind is HookjacGGN or name in BOTH]


@pytest.mark.parametrize(("name", "kind"), KINDS)
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


def test_a_bias_takes_positions_for_samples_under_sampled_labels_too() -> None:
    model, x = model_of("positions")
    found = HookjacGGN(model, "classification", stochastic=True).kron(x, targets("classification"), N)[1]
    close(found.kfacs[1][0], found.kfacs[0][0], "bias")


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

SUBSETS = [(s, t) for s in ("all", "last_layer", "subnetwork") for t in ("full", "kron", "diag")]
STRUCTURES = [pair for pair in SUBSETS if pair != ("subnetwork", "kron")]  # which Laplace does not have
PREDICTIVES = [(name, *pair) for name in MODELS for pair in STRUCTURES if name in BOTH or pair == ("all", "kron")]


@pytest.mark.parametrize(("name", "subset", "structure"), PREDICTIVES)
def test_the_predictive_without_a_jacobian(name: str, subset: str, structure: str) -> None:
    model, x = model_of(name)
    la = fitted(
        model, x, targets("regression"), subset=subset, structure=structure, prior_precision=0.3, sigma_noise=0.7
    )
    new = MODELS[name][1]()
    f, found = functional_variance(la, new)
    J, wanted = (la.backend.last_layer_jacobians if subset == "last_layer" else la.backend.jacobians)(new)
    close(f, wanted, "f")
    close(found, la.functional_variance(J), "J Σ Jᵀ", 1e-9)


def test_the_predictive_builds_no_jacobian_of_layers_with_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_of("MLP")
    options: list[tuple[str, dict[str, Any]]] = [
        ("diag", {}), ("kron", {"damping": True}), ("kron", {"prior_precision": torch.rand(4) + 1})
    ]  # fmt: skip
    for structure, given in options:
        la = fitted(model, x, targets("classification"), structure=structure, **given)
        wanted = la.functional_variance(la.backend.jacobians(x)[0])
        with monkeypatch.context() as none:
            none.setattr(hookjac.factor.Outer, "dense", None)
            none.setattr("hookjac.clients.laplace._dense", None)
            close(functional_variance(la, x)[1], wanted, (structure, given), 1e-9)


def test_rows_are_built_a_few_samples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_of("CNN")
    y = targets("classification")
    la = fitted(model, x, y, structure="full")
    wanted = la.H, functional_variance(la, x)[1]
    monkeypatch.setattr("hookjac.clients.laplace._ROWS", 1)
    again = fitted(model, x, y, structure="full")
    close(again.H, wanted[0], "H")
    close(functional_variance(again, x)[1], wanted[1], "variance")


@pytest.mark.parametrize("backend", [CurvlinopsGGN, BackPackGGN, AsdlGGN])
@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_the_predictive_of_any_backend(backend: Any, structure: str) -> None:
    model, x = model_of("MLP")
    la = fitted(model, x, targets("classification"), backend, structure=structure)
    J = HookjacGGN(model, "classification").jacobians(x)[0]
    close(functional_variance(la, x)[1], la.functional_variance(J), structure, 1e-9)


@pytest.mark.parametrize(("subset", "structure"), [pair for pair in STRUCTURES if pair[0] != "subnetwork"])
def test_backward_through_the_predictive(subset: str, structure: str) -> None:
    model, x = model_of("MLP")
    y, slopes = targets("regression"), []
    for backend in (HookjacGGN, CurvlinopsGGN):
        la = fitted(copy.deepcopy(model), x, y, backend, subset, structure, enable_backprop=True)
        z = x[:3].clone().requires_grad_()
        slopes.append(grad(sum(t.square().sum() for t in la(z)), z).detach())
        if backend is HookjacGGN:
            z = x[:3].clone().requires_grad_()
            slopes.append(grad(sum(t.square().sum() for t in functional_variance(la, z)), z).detach())  # type: ignore
    assert slopes[0].any()
    close(slopes[0], slopes[2], "la(x)")
    close(slopes[1], slopes[2], "functional_variance")


# From end to end --------------------------------------------------------------------------------------------------


def test_fit_tune_and_predict() -> None:
    model, x = model_of("attention")
    y, new = targets("classification"), MODELS["attention"][1]()
    la = fitted(model, x, y)
    before = la.log_marginal_likelihood().item()
    la.optimize_prior_precision(pred_type="glm", method="marglik", n_steps=50)
    assert la.log_marginal_likelihood().item() > before
    prior = torch.tensor([1.5], requires_grad=True)
    slope = grad(la.log_marginal_likelihood(prior), prior)
    with torch.no_grad():
        around = [la.log_marginal_likelihood(torch.tensor([1.5 + h])) for h in (1e-5, -1e-5)]
    close(slope[0].detach(), (around[0] - around[1]) / 2e-5, "slope of the evidence", 1e-6)
    for kind, link in (("glm", "probit"), ("glm", "mc"), ("glm", "bridge"), ("nn", "mc")):
        p = la(new, pred_type=kind, link_approx=link)
        close(p.sum(1), torch.ones(N), (kind, link), 1e-6)
    assert la.sample(5).shape == (5, la.n_params)
    la.optimize_prior_precision(pred_type="glm", method="gridsearch", val_loader=loader(x, y), grid_size=3)
    assert la(new).isfinite().all()


def test_training_by_the_marginal_likelihood() -> None:
    x, y = torch.randn(20, D), targets("classification", 20)
    model = nn.Sequential(nn.Linear(D, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, C))
    la, _, evidence, _ = marglik_training(
        model, loader(x, y), "classification", "kron", HookjacGGN, n_epochs=6, optimizer_kwargs={"lr": 0.01}
    )
    assert evidence[-1] < evidence[0]
    assert isinstance(la.backend, HookjacGGN)


@pytest.mark.parametrize("kind", ["nystrom", "variational"])
def test_posteriors_over_functions(kind: str) -> None:
    model, x = model_of("MLP")
    y, found = targets("classification"), []
    options: dict[str, Any] = {"subsample_size": 6, "n_eigenvalues": 4}
    if kind == "variational":
        options = {"num_inducing": 4, "inducing_locations": x[:4].clone()}
    for backend in (HookjacGGN, CurvlinopsGGN):
        torch.manual_seed(1)
        net = copy.deepcopy(model)
        la = fitted(net, x, y, backend, structure="gp", functional_approximation=kind, **options)
        found.append(la(x).detach())
    close(found[0], found[1], "predictive")


def test_the_gaussian_process_takes_it_after_construction() -> None:
    """Laplace asserts that the backend is one of three; it asks for Jacobians only."""
    model, x = model_of("MLP")
    y = targets("classification")
    with pytest.raises(AssertionError):
        fitted(model, x, y, structure="gp", n_subset=5)
    la = Laplace(model, "classification", subset_of_weights="all", hessian_structure="gp", n_subset=5,
                 backend=CurvlinopsGGN)  # fmt: skip
    la._backend_cls = HookjacGGN
    la.fit(loader(x, y))
    its = fitted(model, x, y, CurvlinopsGGN, structure="gp", n_subset=5)
    assert isinstance(la.backend, HookjacGGN)
    close(la(x), its(x), "predictive")


class Batches(list):
    """What a loader of dicts is to Laplace."""

    def __init__(self, ids: Tensor, y: Tensor) -> None:
        super().__init__({"input_ids": i, "labels": t} for i, t in zip(ids.split(3), y.split(3), strict=True))
        self.dataset = range(len(y))


class OfDicts(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        return self.model(data["input_ids"])  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", [HookjacGGN, HookjacEF])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_batches_that_are_dicts(structure: str, subset: str, backend: Any) -> None:
    model, ids = model_of("embedding")
    y = targets("classification")
    la = Laplace(OfDicts(model), "classification", subset, structure, backend=backend)
    la.fit(Batches(ids, y))
    plain = fitted(model, ids, y, backend, subset, structure)
    close(dense(la.H), dense(plain.H), "H")
    close(la({"input_ids": ids}), plain(ids), "predictive")
    close(functional_variance(la, {"input_ids": ids})[1], functional_variance(plain, ids)[1], "variance")


class Reward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:  # two of each sample in training, one later
        return self.net(x).squeeze(-1) if x.dim() == 3 else self.net(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_reward_models(structure: str, subset: str) -> None:
    model, x, y = Reward(), torch.randn(N, 2, D), torch.randint(2, (N,))
    la = fitted(model, x, y, subset=subset, structure=structure, likelihood="reward_modeling")
    part: Any = model.net[3] if subset == "last_layer" else model
    params = list(part.parameters())
    new = torch.randn(N, D)
    J = torch.cat([jacobian(model(new), p).reshape(N, 1, -1) for p in params], 2)
    close(la(new)[1], la.functional_variance(J.detach()), "variance", 1e-9)
    if structure != "kron":
        J = torch.cat([jacobian(model(x), p).reshape(N, 2, -1) for p in params], 2).detach()
        p = model(x).detach().softmax(1)
        H = torch.einsum("ncp,ncd,ndq->pq", J, torch.diag_embed(p) - p[:, :, None] * p[:, None], J)
        close(la.H, H if structure == "full" else H.diagonal(), "H")


def test_without_autograd_around_it() -> None:
    model, x = model_of("layer norm")
    la = fitted(model, x, targets("classification"))
    wanted, variance = la(x), functional_variance(la, x)[1]
    with torch.no_grad():
        close(la(x), wanted, "no_grad")
    with torch.inference_mode():
        z = x + 0
        assert z.is_inference()
        close(la(z), wanted, "inference mode")
        close(functional_variance(la, z)[1], variance, "inference mode")
    model, ids = model_of("embedding")
    backend = HookjacGGN(OfDicts(model), "classification")
    with torch.inference_mode():
        J = backend.jacobians({"input_ids": ids + 0, "labels": None})[0]
    close(J, HookjacGGN(model, "classification").jacobians(ids)[0], "a dict in inference mode")


def test_a_frozen_head_takes_part_as_laplace_counts_it() -> None:
    model: Any = model_of("MLP")[0]
    x, y = torch.randn(N, D), targets("classification")
    free = fitted(copy.deepcopy(model), x, y, subset="last_layer", last_layer_name="2")
    model[2].weight.requires_grad_(False)
    la = fitted(model, x, y, subset="last_layer", last_layer_name="2")
    close(la.H.to_matrix(), free.H.to_matrix(), "H")
    assert [p.requires_grad for p in la.model.parameters()] == [True, True, False, True]


class Sentences(nn.Module):
    """What Laplace asks of a model from transformers: logits from the batch, a dict."""

    def __init__(self) -> None:
        super().__init__()
        config = GPT2Config(vocab_size=11, n_positions=4, n_embd=4, n_layer=1, n_head=2, num_labels=C, pad_token_id=0)
        self.model = GPT2ForSequenceClassification(config)

    def forward(self, data: Any) -> Tensor:
        given = {key: t for key, t in data.items() if key != "labels"}
        return self.model(**given).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("subset", "structure"), [("last_layer", "full"), ("last_layer", "kron"), ("all", "diag"),
                                                   ("all", "kron")])  # fmt: skip
def test_a_model_of_transformers(subset: str, structure: str) -> None:
    """Its head is applied to all positions, of which one is picked afterwards: Laplace's own rows do not fit."""
    model = Sentences().eval()
    ids, y = torch.randint(1, 11, (N, 4)), targets("classification")
    batches = Batches(ids, y)
    batches[:] = [BatchEncoding({**b, "attention_mask": torch.ones_like(b["input_ids"])}) for b in batches]
    named = {"last_layer_name": "model.score"} if subset == "last_layer" else {}
    la = Laplace(model, "classification", subset, structure, backend=HookjacGGN, **named)
    la.fit(batches)
    part: Any = model.model.score if subset == "last_layer" else model
    params = [p for p in part.parameters() if p.requires_grad]
    whole = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    J = torch.cat([jacobian(model(whole), p).reshape(N, C, -1) for p in params], 2).detach()
    p = model(whole).detach().softmax(1)
    H = torch.einsum("ncp,ncd,ndq->pq", J, torch.diag_embed(p) - p[:, :, None] * p[:, None], J)
    if structure != "kron":
        close(la.H, H if structure == "full" else H.diagonal(), "H")
    assert len(la.H_facs) == len(params) if structure == "kron" else True
    close(functional_variance(la, whole)[1], la.functional_variance(J), "variance", 1e-9)
    close(la(whole).sum(1), torch.ones(N), "probabilities")


# Errors -----------------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    model, x = model_of("MLP")
    y = targets("classification")
    with pytest.raises(ValueError, match="'classification' or 'regression', got 'reward_modeling'"):
        HookjacGGN(model, "reward_modeling")
    backend = HookjacGGN(model, "classification", subnetwork_indices=subnet(39))
    with pytest.raises(ValueError, match="a subnetwork has no Kronecker factors"):
        backend.kron(x, y, N)
    with pytest.raises(ValueError, match="outputs are given for 2 inputs, the batch has 7"):
        backend.selected_output_jacobians(x, torch.tensor([0, 1]))
    with pytest.raises(NotImplementedError, match="the Hessian has no Kronecker factors"):
        HookjacHessian(model, "classification").kron(x, y, N)
    with pytest.raises(ValueError, match="sharing must be 'expand' or 'reduce', got 'both'"):
        HookjacGGN(model, "classification").kron(x, y, N, kfac_approx="both")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"HookjacGGN expects a torch.nn.Module, got 3"):
        HookjacGGN(3, "classification")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="functional_variance takes a Laplace of structure diag, kron or full, got"):
        functional_variance(object(), x)  # type: ignore[arg-type]
    for p in model.parameters():
        assert not vars(p)
        assert p.requires_grad


@pytest.mark.parametrize("shape", [(N,), (N, 2, C)])
def test_outputs_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(D, 1), nn.Flatten(0)) if len(shape) == 1 else nn.Linear(D, C)
    x = torch.randn(N, D) if len(shape) == 1 else torch.randn(N, 2, D)
    with pytest.raises(HookjacError, match=rf"output has shape {re.escape(str(shape))}; Laplace counts"):
        HookjacGGN(model, "regression").diag(x, torch.randn(shape))
    assert all(p.requires_grad and not vars(p) for p in model.parameters())


def test_batch_norm_in_training_is_refused_by_name() -> None:
    model, x = model_of("batch norm")
    model.train()
    with pytest.raises(HookjacError, match="'1'"):
        HookjacGGN(model, "classification").diag(x, targets("classification"))


def test_a_block_that_is_too_large_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of("embedding tied to the head")
    monkeypatch.setattr("hookjac.clients.laplace_kron.LARGEST", 11)
    with pytest.raises(HookjacError, match=r"parameter 'e.weight'.*no one pair of Kronecker factors.*structure='diag'"):
        HookjacGGN(model, "classification").kron(ids, targets("classification"), N)
    monkeypatch.setattr("hookjac.clients.laplace_kron.LARGEST", 2)
    model, x = model_of("MLP")  # for a vector's block Laplace makes room, whatever its size
    assert HookjacGGN(model, "classification").kron(x, targets("classification"), N)[1].kfacs[1][0].shape == (4, 4)


def test_a_batch_of_one_sample_does_not_tell_what_all_samples_share() -> None:
    """Positions are looked up for all samples together, and for one alone as it were its own."""
    build = lambda m, i: m.o(torch.tanh(m.e(i) + m.p(torch.arange(3)[None])).mean(1))
    model, ids, y = Fn(build, e=nn.Embedding(6, 4), p=nn.Embedding(3, 4), o=nn.Linear(4, C)), *words()
    params = list(trainable(model).values())
    P = params[0].numel()
    la = fitted(model, ids, y)  # batches of 3, 3 and 1
    exact = loops(model, ids, y, params)["GGN"][P : P + 12, P : P + 12]
    close(la.H_facs.kfacs[1][0], exact, "positions")
    assert len(la.H_facs.kfacs[0]) == 2
    parts = [HookjacGGN(model, "classification").kron(ids[n], y[n], N)[1] for n in (slice(0, 1), slice(1, N))]
    close((parts[0] + parts[1]).kfacs[1][0], exact, "the one sample first")
    close((0.5 * parts[0] + 0.5 * parts[1]).kfacs[1][0], exact / 2, "scaled")
    with pytest.raises(ValueError, match=r"parameter 1 has factors .* Let the first batch have more than one sample"):
        parts[0] + parts[0] + parts[1]


def words() -> tuple[Tensor, Tensor]:
    return torch.randint(6, (N, 3)), targets("classification")


def test_sums_of_factors() -> None:
    factors: Any = [[torch.eye(6)]], [[torch.zeros(2, 2), torch.zeros(3, 3)]], 3
    block, sides, number = Blocks(factors[0]), Kron(factors[1]), factors[2]
    for total in (block + sides, sides + block):
        assert isinstance(total, Blocks)
        close(total.to_matrix(), torch.eye(6), "zeros give way")
    close((block + block).to_matrix(), 2 * torch.eye(6), "blocks")
    for half in (0.5 * block, block * 0.5):
        assert isinstance(half, Blocks)
        close(half.to_matrix(), torch.eye(6) / 2, "scaled")
    factors[1][0][1] += 1
    factors[1][0][0] += 1
    with pytest.raises(ValueError, match=r"parameter 0 has factors \[\(6, 6\)\] in some batches and .* in others"):
        block + sides
    for other, said in ((number, "int"), (Blocks([]), "a Kron of 0")):
        with pytest.raises(ValueError, match=f"a Kron of 1 parameters cannot be added to {said}"):
            block + other


# The page ---------------------------------------------------------------------------------------------------------


def test_the_page_runs() -> None:
    torch.set_default_dtype(torch.float32)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for snippet in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
            exec(snippet, {"__name__": "page"})
    assert said.getvalue().splitlines()[-1] == "torch.Size([8, 3]) torch.Size([8, 3, 3])"


def cell(name: str, structure: str, backend: Any) -> str:
    """Equal to loops (of two sides: to ours, which are held to their definition above), or what else comes of it."""
    torch.manual_seed(0)
    model, x = model_of(name)
    y = targets("classification")
    if structure == "kron":
        wanted = fitted(copy.deepcopy(model), x, y).H.to_matrix()
    else:
        full = loops(model, x, y, list(trainable(model).values()))["GGN"]
        wanted = full if structure == "full" else full.diagonal()
    try:
        found = dense(fitted(model, x, y, backend, "all", structure).H)
    except Exception:
        return "error"
    same = found.shape == wanted.shape and (found - wanted).abs().max() <= 1e-9 * wanted.abs().max()
    return "yes" if same else "differs"


def test_what_the_page_says_of_curvlinops() -> None:
    model, x = model_of("MLP")
    y = targets("classification")
    its = fitted(model, x, y, CurvlinopsEF, "last_layer", "diag").H
    assert not its.any()
    assert fitted(model, x, y, HookjacEF, "last_layer", "diag").H.all()
    model, ids = model_of("embedding tied to the head")
    apart: Any = copy.deepcopy(model)
    apart.o.weight = nn.Parameter(apart.e.weight.detach().clone())
    head = HookjacGGN(apart, "classification").kron(ids, y, N)[1].kfacs[1]
    found = CurvlinopsGGN(model, "classification").kron(ids, y, N)[1].kfacs[0]
    for s, t in zip(found, head, strict=True):
        close(s, t, "it knows the head only")
    model, x = model_of("a layer called twice")
    (B, A), (b, a) = (k(model, "classification").kron(x, y, N)[1].kfacs[2] for k in (CurvlinopsGGN, HookjacGGN))
    close(B, b, "the output side")
    close(A, 2 * a, "the input side, added up")


def table_rows() -> list[tuple[str, ...]]:
    return re.findall(r"^\| ([^|`]+?) \| (\w+) \| (\w+) \| (\w+) \| (\w+) \| (\w+) \|$", PAGE.read_text(), re.M)[1:]


def test_the_table_of_the_page_says_what_happens() -> None:
    rows = table_rows()
    assert len(rows) >= 20
    for name, structure, *told in rows:
        found = [cell(name, structure, b) for b in (HookjacGGN, CurvlinopsGGN, BackPackGGN, AsdlGGN)]
        assert found == told, (name, structure)


def test_results_of_the_users_own_stay() -> None:
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    asked = ("jac", "grad_sample", "grad_sq_sum", "hess_diag", "ggn_diag")
    with hookjac.extend(model, *asked):
        F.cross_entropy(model(x), y).backward()
    before = {(q, key): getattr(p, q) for q in asked for key, p in model.named_parameters()}
    backend = HookjacGGN(model, "classification")
    backend.jacobians(x)
    backend.diag(x, y)
    HookjacEF(model, "classification").gradients(x, y)
    for (q, key), value in before.items():
        assert getattr(model.get_parameter(key), q) is value, (q, key)
