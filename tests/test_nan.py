"""NaN and infinity in inputs, targets and weights pass through as in autograd, and stay in their sample.

Right is what autograd gives for each sample by itself. Curvature is a product of factors, one of which may be zero
where another is not a number: there it may be either, zero or NaN; see docs/limits.md. Never is it a wrong number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N, par
from leftovers import clear, state
from oracle import close, compare, expected, grad
from torch import Tensor, nn

from hookjac import KFAC, HookjacError, extend
from hookjac.kronecker import Kronecker, KroneckerSum

ODD = 1  # the sample that has it
Y, T = torch.tensor([0, 2, 1, 2]), torch.linspace(-1, 1, N * C, dtype=torch.float64).reshape(N, C)
FIRST = ("grad_sample", "grad_sample_norm", "grad_sample_gram", "grad_sq_sum", "grad_var", "jac", "ntk")
CURVED = ("ggn_diag", "ggn_diag_sample", "hess_diag", "hess_diag_sample", "ggn_block", "hess_block")


def attentive() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        return m.o((torch.softmax(q @ k.transpose(1, 2), -1) @ v).mean(1))  # type: ignore[no-any-return]

    return Fn(forward, qkv=nn.Linear(D, 6), o=nn.Linear(2, C))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu": (lambda: nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, C)), (D,)),
    "tanh": (lambda: nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)), (D,)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                                          nn.Linear(2, C)), (2, 3, 3)),
    "norm": (lambda: nn.Sequential(nn.Linear(D, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, C)), (D,)),
    "functional": (lambda: Fn(lambda m, x: m.b(F.relu(m.a(x)) @ m.w), w=par(4, 3), a=nn.Linear(D, 4),
                              b=nn.Linear(3, C)), (D,)),
    "positions": (lambda: Fn(lambda m, x: m.b(torch.tanh(m.a(x))).mean(1), a=nn.Linear(D, 4), b=nn.Linear(4, C)),
                  (3, D)),
    "attention": (attentive, (3, D)),
}  # fmt: skip
STRAIGHT = {"relu", "convolution", "functional"}  # piecewise linear: the Hessian is the Gauss-Newton matrix

Loss = Callable[[Tensor, list[int], Tensor], Tensor]  # of outputs, the numbers of their samples, and targets
LOSSES: dict[str, Loss] = {
    "cross entropy": lambda o, which, t: F.cross_entropy(o, Y[which], reduction="sum") / N,
    "squares": lambda o, which, t: (o - t[which]).square().sum() / (N * C),
}
PLACES = ["input", "target", "first weight", "last bias"]
ALL = list(range(N))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = state()
    yield
    assert state() == before


def broken(place: str, value: float, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets with one entry that is no number; or the model has one."""
    x, t, params = x.clone(), T.clone(), list(model.parameters())
    with torch.no_grad():
        if place == "input":
            x[ODD].view(-1)[0] = value
        elif place == "target":
            t[ODD, 0] = value
        else:
            params[0 if place == "first weight" else -1].view(-1)[0] = value
    return x, t


def by_sample(model: nn.Module, x: Tensor, t: Tensor, loss: Loss) -> dict[str, dict[str, Tensor]]:
    """What autograd gives for each sample alone."""
    found: dict[str, dict[str, Tensor]] = {}
    outs = [model(x[n : n + 1]) for n in ALL]
    for name, p in model.named_parameters():
        g = torch.stack([grad(loss(outs[n], [n], t), p).detach() for n in ALL])
        J = torch.stack([torch.stack([grad(o, p).detach() for o in outs[n][0]]) for n in ALL])  # [N, C, *p]
        G = torch.stack([_gauss_newton(outs[n], J[n].flatten(1), lambda o, n=n: loss(o, [n], t)) for n in ALL])
        rows, each = J.reshape(N * C, -1), g.flatten(1)
        diagonals = G.diagonal(dim1=1, dim2=2).reshape(N, *p.shape)
        found[name] = {
            "grad_sample": g,
            "grad_sample_norm": each.square().sum(1).sqrt(),
            "grad_sample_gram": (each[:, None] * each[None]).sum(2),
            "grad_sq_sum": g.square().sum(0),
            "grad_var": N * g.square().sum(0) - g.sum(0).square(),
            "jac": J,
            "ntk": (rows[:, None] * rows[None]).sum(2).reshape(N, C, N, C),
            "ggn_diag": diagonals.sum(0),
            "ggn_diag_sample": diagonals,
            "ggn_block": G.sum(0),
        }
    return found


def _gauss_newton(out: Tensor, J: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:  # J [C, P] -> [P, P]
    """Jᵀ H J, where zero times anything is zero."""
    free = out.detach().requires_grad_()
    slope = grad(loss(free), free)[0]
    H = torch.stack([grad(s, free)[0].detach() for s in slope])
    G = torch.zeros(J.shape[1], J.shape[1])
    for a in range(C):
        for b in range(C):
            idle = (J[a] == 0)[:, None] | (J[b] == 0)[None, :]
            G += torch.where(idle, 0.0, J[a][:, None] * H[a, b] * J[b][None, :])
    return G


def right(found: Tensor, wanted: Tensor, what: Any, *, zero_or_nan: bool = False) -> None:
    """Equal where the right number is finite, and not finite where it is not. zero_or_nan: it may be NaN there, too."""
    assert found.shape == wanted.shape, what
    fine = wanted.isfinite()
    assert not bool(found[~fine].isfinite().any()), f"{what}: finite where it should not be"
    if zero_or_nan:
        fine &= found.isfinite()
    close(torch.where(fine, found, 0.0), torch.where(fine, wanted, 0.0), what)


def quantities(model: nn.Module, x: Tensor, t: Tensor, loss: Loss, *asked: str) -> dict[str, dict[str, Tensor]]:
    with extend(model, *asked):
        loss(model(x), ALL, t).backward()
    found = {name: {q: vars(p)[q] for q in asked} for name, p in model.named_parameters()}
    for its in found.values():
        if "jac" in its:
            its["jac"] = its["jac"].to_dense()  # type: ignore[operator]
    clear(model)
    return found


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NETS)
def test_as_autograd_has_it(name: str, place: str, value: float, loss: str) -> None:
    if place == "target" and loss != "squares":
        pytest.skip("classes are integers")
    build, shape = NETS[name]
    model, x, of = build(), torch.randn(N, *shape), LOSSES[loss]
    clean = {key: t.clone() for key, t in model.state_dict().items()}
    sets = [FIRST, CURVED, ("grad_sample",), ("hess_diag",)]
    for later in (False, True):
        if later:  # the structure is known by then
            for asked in sets:
                quantities(model, x, T, of, *asked)
        odd, t = broken(place, value, model, x)
        wanted = by_sample(model, odd, t, of)
        for asked in sets:
            for key, its in quantities(model, odd, t, of, *asked).items():
                for q, found in its.items():
                    what = (key, q, "later" if later else "first")
                    if q in FIRST:
                        right(found, wanted[key][q], what)
                    elif q.startswith("ggn") or name in STRAIGHT:
                        right(found, wanted[key][q.replace("hess", "ggn")], what, zero_or_nan=True)
        model.load_state_dict(clean)  # and the next step is unharmed
        for asked in (("grad_sample", "jac", "ggn_diag"), ("hess_diag",)):
            truth = expected(model, lambda: model(x), lambda o: of(o, ALL, T))
            with extend(model, *asked):
                of(model(x), ALL, T).backward()
            compare(model, truth, asked)
            clear(model)


@pytest.mark.parametrize("q", ["grad_sample", "jac", "ggn_diag_sample", "hess_diag_sample"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["input", "target"])
@pytest.mark.parametrize("name", NETS)
def test_other_samples_are_unharmed(name: str, place: str, value: float, q: str) -> None:
    build, shape = NETS[name]
    model, x, of = build(), torch.randn(N, *shape), LOSSES["squares"]
    others = [n for n in ALL if n != ODD]
    before = quantities(model, x, T, of, q)
    for _ in range(2):
        for key, its in quantities(model, *broken(place, value, model, x), of, q).items():
            close(its[q][others], before[key][q][others], key)


@pytest.mark.parametrize("asked", [("ggn_sqrt",), ("ggn_diag_mc",), ("ggn_sqrt", "jac")])
def test_a_hessian_that_is_not_a_number_is_its_samples_own(asked: tuple[str, ...]) -> None:
    """Its eigenvectors are asked for, sample by sample."""
    model, x = nn.Linear(D, C), torch.randn(N, D)

    def loss(out: Tensor, which: list[int]) -> Tensor:
        return ((out - 1).square().sum(1) + 1).sqrt()[which].sum()  # a root of a sum: no closed form

    odd = x.clone()
    odd[ODD, 0] = math.nan
    for given in (x, odd, x):
        with extend(model, *asked, "ggn_diag_sample"):
            loss(model(given), ALL).backward()
        p = model.weight
        if "ggn_sqrt" in asked:
            each = p.ggn_sqrt.square().sum(0)  # type: ignore[attr-defined]
            bad = each.isnan().flatten(1).any(1)
            assert bad.tolist() == [given is odd and n == ODD for n in ALL]
            close(each[~bad], p.ggn_diag_sample[~bad], "the others")  # type: ignore[attr-defined]
        else:
            assert bool(p.ggn_diag_mc.isfinite().all()) == (given is x)  # type: ignore[attr-defined]


@pytest.mark.parametrize("q", ["kfac", "ggn_diag_mc", "hutchinson", "hesscale", "grad_sample_projected"])
def test_what_is_estimated_is_not_finite_either(q: str) -> None:
    """And a clean step after it is finite."""
    model, x = NETS["tanh"][0](), torch.randn(N, D)
    for place in ("input", "target", "first weight"):
        clean = {key: t.clone() for key, t in model.state_dict().items()}
        odd, t = broken(place, math.nan, model, x)
        for given, targets, finite in ((odd, t, False), (x, T, True)):
            if finite:
                model.load_state_dict(clean)
            with extend(model, q):
                LOSSES["squares"](model(given), ALL, targets).backward()
            results = [vars(p)[q] for p in model.parameters()]
            tensors = [s for r in results for s in ((r,) if isinstance(r, Tensor) else (r.A, r.B)) if s is not None]
            fine = all(bool(s.isfinite().all()) for s in tensors)
            # the curvature of squares does not depend on the targets
            assert fine == finite or (place == "target" and q in ("kfac", "ggn_diag_mc")), place
            clear(model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical", "kfra"])
def test_eigenvalues_of_factors_that_are_not_finite(fisher: Any, value: float) -> None:
    """They are no numbers, and neither is what is made of them; the other parameters' are. Nothing that LAPACK says."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(D, 4), nn.Sigmoid(), nn.Linear(4, C))
    x, y = torch.randn(N, D), torch.arange(N) % C
    x[ODD, 0] = value
    with extend(model, KFAC(fisher=fisher)):
        F.cross_entropy(model(x), y).backward()
    k = model[0].weight.kfac  # type: ignore[attr-defined]
    assert not k.A.isfinite().all()
    eigen = k.eigen()
    assert eigen.values.isnan().all()
    v = torch.randn(4, D)
    for found in (k.solve(v, 0.1), k.logdet(0.1), eigen @ v, eigen.solve(v, 0.1), eigen.diagonal()):
        assert found.isnan().all()
    with pytest.raises(HookjacError, match="entries that are not finite, so that it has no inverse"):
        k.inverse(0.1)
    with extend(model, KFAC(fisher=fisher, corrected=True)):
        F.cross_entropy(model(x), y).backward()
    assert model[0].weight.kfac.values.isnan().all()  # type: ignore[attr-defined]
    if value == math.inf and fisher in ("exact", "mc"):  # the sigmoid is flat there, and the layer above unharmed
        with extend(model, KFAC(fisher=fisher, corrected=True)):
            F.cross_entropy(model(x), y).backward()
        above = model[2].weight.kfac  # type: ignore[attr-defined]
        assert above.values.isfinite().all()
        assert above.source.A.isfinite().all()


def test_eigenvalues_group_by_group() -> None:
    A, B = torch.eye(3).repeat(2, 1, 1), torch.eye(2).repeat(2, 1, 1)
    A[1, 0, 0] = math.nan
    found = Kronecker(A, B, torch.Size([4, 3])).eigen()
    assert torch.equal(found.values[0], torch.ones(2, 3))
    assert found.values[1].isnan().all()


def test_sums_of_factors_that_are_not_finite() -> None:
    one = Kronecker(torch.eye(3), torch.eye(2), torch.Size([2, 3]))
    bad = Kronecker(torch.diag(torch.tensor([1.0, math.nan, 1.0])), torch.eye(2), torch.Size([2, 3]))
    v = torch.randn(2, 2, 3)
    assert KroneckerSum((one, bad)).solve(v, 0.1).isnan().all()
    assert KroneckerSum((one, bad)).logdet(0.1).isnan()
    for value in (math.nan, math.inf, 1e300):  # the last cannot be squared
        w = v.clone()
        w[0, 0, 0] = value
        found = KroneckerSum((one, one)).solve(w, 0.1)
        assert found[0].isnan().all(), "its own vector has it, and no other"
        torch.testing.assert_close(found[1], v[1] / 2.1)
