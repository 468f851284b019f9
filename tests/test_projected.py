"""Per-sample gradients in random directions, against the directions built one by one and loops over samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import FALLBACK, RULES, C, Case, D, Fn, N, par, random_loss
from oracle import close, expected, trainable
from test_kfac import tied_table
from test_quantities import MODELS
from torch import Tensor, nn

import hookjac
from hookjac import GradSampleProjected, HookjacError
from hookjac.factor import Dense, Factor, Lookup, Outer, Sum, Unfolded
from hookjac.quantity.projected import signs

K = 7


def directions(name: str, p: Tensor, k: int, seed: int = 0) -> Tensor:  # -> [k, *p]
    """By their definition, one at a time."""
    X, Y = (t.double().to(p.device) for t in signs(name, p.shape, k, seed))
    return torch.stack([torch.outer(x, y).reshape(p.shape) for x, y in zip(X, Y, strict=True)]) / k**0.5


def projected(g: Tensor, R: Tensor) -> Tensor:  # [N, *p], [k, *p] -> [N, k]
    return torch.stack([torch.stack([(t * r).sum() for r in R]) for t in g])


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name: str) -> None:
    """Penalties, too: every sample has its share."""
    case = MODELS[name]
    model, x = case.build(), case.inputs()
    penalty = (lambda: case.penalty(model)) if case.penalty else None
    wanted = expected(model, lambda: model(x), random_loss, penalty, hessian=False)
    with hookjac.extend(model, GradSampleProjected(k=K), "grad_sample"):
        (random_loss(model(x)) + (penalty() if penalty else 0.0)).backward()
    for key, p in trainable(model).items():
        close(p.grad_sample_projected, projected(wanted[key]["grad_sample"], directions(key, p, K)), key)  # type: ignore[attr-defined]
        close(p.grad_sample, wanted[key]["grad_sample"], key)  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", [*RULES[22:], *FALLBACK], ids=str)
def test_whatever_there_is(case: Case) -> None:
    """Against grad_sample, which `test_exact` holds to loops on the same models."""
    model, args, kwargs = case.build(), case.inputs(), case.kwargs()
    with hookjac.extend(model, GradSampleProjected(k=K), "grad_sample", output=case.output):
        out = model(*args, **kwargs)
        picked = out if case.output is None else out[case.output] if isinstance(out, dict) else case.output(out)
        random_loss(picked).backward()
    for key, p in trainable(model).items():
        close(p.grad_sample_projected, projected(p.grad_sample, directions(key, p, K)), key)  # type: ignore[attr-defined]


def outer(shape: tuple[int, ...] | None, B: int, L: int, o: int, i: int, swapped: bool = False) -> Outer:
    found = Outer(torch.randn(1, N, B, L, o), torch.randn(N, B, L, i), shape and torch.Size(shape), swapped)
    return found


def unfolded() -> Outer:
    x = torch.randn(N, 4, 5, 5)
    return Outer(
        torch.randn(1, N, 2, 16, 3), Unfolded(x, 2, (4, 4), (2, 2), (1, 1), (0, 0), (1, 1)), torch.Size((6, 2, 2, 2))
    )


def lookup(d: int, *shape: int) -> Lookup:
    rows = torch.Size(shape).numel() // d
    return Lookup(torch.randn(1, 9, d), torch.randint(rows, (9,)), torch.randint(N, (9,)), N, torch.Size(shape))


FACTORS: dict[str, Callable[[], Factor]] = {
    "dense": lambda: Dense(torch.randn(1, N, 3, 5)),
    "dense, tall": lambda: Dense(torch.randn(1, N, 6, 2)),
    "dense, three axes": lambda: Dense(torch.randn(1, N, 3, 2, 2)),
    "dense, no axis": lambda: Dense(torch.randn(1, N)),
    "dense, shared": lambda: Dense(torch.randn(1, 1, 3, 5).expand(1, N, 3, 5)),
    "outer": lambda: outer(None, 1, 1, 3, 5),
    "outer, positions": lambda: outer(None, 1, 4, 30, 50),
    "outer, many positions": lambda: outer(None, 1, 50, 3, 2),
    "outer, swapped": lambda: outer(None, 1, 2, 3, 5, True),
    "outer, groups": lambda: outer((6, 5), 2, 2, 3, 5),
    "outer, groups, swapped": lambda: outer((10, 3), 2, 1, 3, 5, True),
    "outer, of a vector": lambda: outer((5,), 1, 1, 1, 5),
    "outer, of another first axis": lambda: outer((2, 3, 5), 1, 1, 6, 5),
    "patches": unfolded,
    "table": lambda: lookup(3, 5, 3),
    "single entries": lambda: lookup(1, 5, 3),
    "blocks of rows": lambda: lookup(6, 6, 3),
    "sum": lambda: Sum((lookup(3, 5, 3), outer(None, 1, 2, 5, 3), Dense(torch.randn(1, N, 5, 3)))),
}


@pytest.mark.parametrize("chunk", [1, 1 << 22])
@pytest.mark.parametrize("name", FACTORS)
def test_every_kind_of_factor(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("dense", "outer", "lookup", "mixed"):
        monkeypatch.setattr(f"hookjac.factor.{kind}.CHUNK", chunk)
    factor = FACTORS[name]()
    r = factor.param[0] if factor.param else 1
    X, Y = torch.randn(K, r), torch.randn(K, factor.param.numel() // r)
    each = torch.stack([torch.outer(x, y).reshape(factor.param) for x, y in zip(X, Y, strict=True)])
    wanted = projected(factor.dense()[0], each).T.unsqueeze(1)
    close(factor.project(X, Y), wanted, name)
    if isinstance(factor, Outer):
        factor.prepare(entries=True)
        close(factor.project(X, Y), wanted, (name, "prepared"))
        close(factor.samples(slice(0, 0)).project(X, Y), wanted[:, :, :0], (name, "no samples"))


def test_nothing_large_is_built() -> None:
    """With single samples' gradients of 16 million entries, the largest tensor made has a thousandth of that."""
    made = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            made[0] = max(made[0], out.numel() if isinstance(out, Tensor) else 0)
            return out

    factor = outer(None, 1, 2, 4096, 4096)
    X, Y = torch.ones(3, 4096), torch.ones(3, 4096)
    with Watch():
        factor.project(X, Y)
    assert 0 < made[0] <= N * 2 * 4096


def test_inner_products_are_those_of_gradients() -> None:
    """Without bias, and within five times the standard deviation of 3 / sqrt(k), as the docstring has it."""
    model, x, k = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C)), torch.randn(N, D), 20_000
    with hookjac.extend(model, GradSampleProjected(k=k), "grad_sample"):
        random_loss(model(x)).backward()
    g = torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], 1)  # type: ignore[attr-defined]
    rows = [p.grad_sample_projected for p in model.parameters()]  # type: ignore[attr-defined]
    size = g.norm(dim=1)
    wanted = (g @ g.T) / (size[:, None] * size)
    assert (wanted.abs() > 0.3).any(), "something to be right about"
    for found in (sum(rows[1:], rows[0]), torch.cat(rows, 1)):
        assert ((found @ found.T) / (size[:, None] * size) - wanted).abs().max() < 5 * 3 / k**0.5
    single = [(r @ r.T - p.grad_sample.flatten(1) @ p.grad_sample.flatten(1).T).abs() / r.square().sum(1).max()  # type: ignore[attr-defined]
              for r, p in zip(rows, model.parameters(), strict=True)]  # fmt: skip
    assert all(t.max() < 5 * 3 / k**0.5 for t in single)


def test_signs_belong_to_name_shape_and_seed() -> None:
    shape = torch.Size((40, 30))
    first = signs("a.weight", shape, 50, 0)
    assert [tuple(t.shape) for t in first] == [(50, 40), (50, 30)]
    assert {int(v) for t in first for v in t.unique()} == {-1, 1}
    assert abs(float(first[0].double().mean())) < 5 / 2000**0.5
    assert all(torch.equal(s, t) for s, t in zip(first, signs("a.weight", shape, 50, 0), strict=True))
    for other in (signs("b.weight", shape, 50, 0), signs("a.weight", shape, 50, 1)):
        for s, t in zip(first, other, strict=True):
            assert abs(float((s.double() * t).mean())) < 5 / 1500**0.5
    torch.manual_seed(5)
    state = torch.get_rng_state()
    signs("a", shape, 3, 0)
    assert torch.equal(torch.get_rng_state(), state), "the user's random numbers are the user's"


def test_two_batches_are_projected_alike() -> None:
    model, x = nn.Linear(D, C), torch.randn(2 * N, D)
    found = []
    for part in (x, x[:N], x[N:]):
        with hookjac.extend(model, GradSampleProjected(k=K, seed=3)):
            model(part).square().sum().backward()
        found.append(model.weight.grad_sample_projected)
    close(torch.cat(found[1:]), found[0], "batches")


def test_some_samples() -> None:
    model, x = MODELS["transformer"].build(), MODELS["transformer"].inputs()
    with hookjac.extend(model, GradSampleProjected(k=K, subsample=[2, 0]), "grad_sample"):
        random_loss(model(x)).backward()
    for key, p in trainable(model).items():
        close(p.grad_sample_projected, projected(p.grad_sample[[2, 0]], directions(key, p, K)), key)  # type: ignore[attr-defined]


def test_a_table_that_is_a_weight_as_well() -> None:
    model, ids = tied_table(), torch.randint(C, (N, 3))
    with hookjac.extend(model, GradSampleProjected(k=K), "grad_sample"):
        random_loss(model(ids)).backward()
    p = model.e.weight
    close(p.grad_sample_projected, projected(p.grad_sample, directions("e.weight", p, K)), "tied")


def test_parameters_that_nothing_reaches() -> None:
    model = Fn(lambda m, x: m.a(x), a=nn.Linear(D, C), never=par(3, 2))
    with hookjac.extend(model, GradSampleProjected(k=K)):
        random_loss(model(torch.randn(N, D))).backward()
    assert model.never.grad_sample_projected.shape == (N, K)
    assert model.never.grad_sample_projected.eq(0).all()


def test_inside_a_loss() -> None:
    model, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)), torch.randn(N, D)
    found = []
    for q in (GradSampleProjected(k=K), hookjac.GradSample()):
        model.zero_grad()
        with hookjac.extend(model, q, create_graph=True):
            random_loss(model(x)).backward()
        rows = [p.grad_sample_projected if q.name != "grad_sample" else
                torch.einsum("n...,k...->nk", p.grad_sample, directions(key, p, K))
                for key, p in model.named_parameters()]  # fmt: skip
        model.zero_grad()
        sum((r**3).sum() for r in rows).backward()
        found.append([p.grad.clone() for p in model.parameters()])  # type: ignore[union-attr]
    for a, b in zip(*found, strict=True):
        close(a, b, "through it")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)).to(dtype), torch.randn(N, D, dtype=dtype)
    with hookjac.extend(model, GradSampleProjected(k=K), "grad_sample"):
        model(x).square().sum().backward()
    for key, p in model.named_parameters():
        found, wanted = p.grad_sample_projected, projected(p.grad_sample.double(), directions(key, p, K))
        assert found.dtype == dtype
        assert (found.double() - wanted).abs().max() < 8 * torch.finfo(dtype).eps * p.grad_sample.double().norm()


def test_under_autocast() -> None:
    model, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)).float(), torch.randn(N, D).float()
    with hookjac.extend(model, GradSampleProjected(k=K), "grad_sample"):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        out.float().square().sum().backward()
    for key, p in model.named_parameters():
        assert p.grad_sample_projected.dtype == torch.float32
        wanted = projected(p.grad_sample.double(), directions(key, p, K))
        assert (p.grad_sample_projected.double() - wanted).abs().max() < 0.1 * p.grad_sample.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be a positive integer, got 0"),
        ({"k": 2.5}, r"k must be a positive integer, got 2\.5"),
        ({"k": True}, "k must be a positive integer, got True"),
        ({"seed": -1}, "seed must be an integer that is not negative, got -1"),
        ({"subsample": []}, "expected a list"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradSampleProjected(**options)  # type: ignore[arg-type]


def test_too_many_directions() -> None:
    model = nn.Linear(D, C)
    with pytest.raises(HookjacError, match=r"grad_sample_projected for 4 samples .* Use a smaller k\."):
        with hookjac.extend(model, GradSampleProjected(k=10**13)):
            model(torch.randn(N, D)).sum().backward()
