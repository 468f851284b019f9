"""Columns weighed against each other, and outer products that are built or not: every road against loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn
from oracle import close, expected, trainable
from torch import Tensor, nn

from hookjac import KFAC, GGNDiagMC, extend, gemm
from hookjac.factor import Dense, Outer, gram, share
from hookjac.factor import metric as metric_
from hookjac.factor import outer as outer_
from hookjac.factor.metric import Columns, inner, quad_block, quad_rows, summed_block, uniform

N = 5
EPS = torch.finfo(torch.float32).eps


def symmetric(V: int) -> Tensor:  # [N, V, V], of both signs
    M = torch.randn(N, V, V)
    return M + M.mT


METRICS: dict[str, Callable[[int], Tensor]] = {
    "one number": lambda V: torch.tensor(-1.7).expand(N, V),
    "a number for each": lambda V: torch.randn(N, V),
    "full": symmetric,
    "full, the same for all": lambda V: symmetric(V)[:1].expand(N, V, V),
}
COLUMNS: dict[str, Callable[[int, int], Tensor]] = {
    "their own": lambda V, D: torch.randn(V, N, D),
    "samples first": lambda V, D: torch.randn(N, V, D).transpose(0, 1),
    "shared": lambda V, D: torch.randn(V, 1, D).expand(V, N, D),
    "units": lambda V, D: torch.eye(V).unsqueeze(1).expand(V, N, V),
}


def blocks(A: Tensor, metric: Tensor) -> Tensor:  # -> [N, D, D], in double precision
    """By loops over samples and pairs of columns."""
    A, metric = A.double(), metric.double()
    found = torch.zeros(A.shape[1], A.shape[2], A.shape[2], dtype=torch.float64)
    for n in range(A.shape[1]):
        for v in range(len(A)):
            if metric.dim() == 2:
                found[n] += metric[n, v] * torch.outer(A[v, n], A[v, n])
                continue
            for w in range(len(A)):
                found[n] += metric[n, v, w] * torch.outer(A[v, n], A[w, n])
    return found


def near(found: Tensor, wanted: Tensor, what: Any, terms: int) -> None:
    """To rounding, that of single precision where it was used."""
    assert found.shape == wanted.shape, what
    eps = torch.finfo(found.dtype).eps
    assert (found - wanted).abs().max() <= 4 * eps * terms * (1 + wanted.abs().max()), what


@pytest.fixture(params=["double", "single", "single, one by one"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one: as if every product were faster by oneDNN."""
    if request.param != "double":
        torch.set_default_dtype(torch.float32)
    if request.param == "single, one by one":
        product = torch.ops.mkldnn._linear_pointwise.default
        monkeypatch.setattr(gemm, "_onednn", lambda: product)
        monkeypatch.setattr(gemm, "_WORTH", 1)
        monkeypatch.setattr(gemm, "_EACH", 1)
        assert gemm.faster(1, torch.zeros(1))


@pytest.mark.parametrize("cached", [None, 1, 150])
@pytest.mark.parametrize("weighed", METRICS)
@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.usefixtures("precision")
def test_weighed_columns(kind: str, weighed: str, cached: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples at once, one by one, and two by two with one left over."""
    if cached is not None:
        monkeypatch.setattr(metric_, "_CACHED", cached)
    for V, size in ((6, 11), (1, 4), (3, 25)):
        A, metric = COLUMNS[kind](V, size), METRICS[weighed](V)
        wanted = blocks(A, metric)
        near(quad_rows(A, metric), wanted.diagonal(dim1=1, dim2=2), "rows", V * V)
        near(quad_block(A, metric), wanted, "block", V * V)
        near(summed_block(A, metric), wanted.sum(0), "sum of blocks", V * V)
        asked = Columns(A)
        for _ in range(2):  # what it remembers is nobody's to change
            near(asked.rows(metric), wanted.diagonal(dim1=1, dim2=2), "rows, shared", V * V)
            near(asked.block(metric).mul_(1), wanted.sum(0), "blocks, shared", V * V)
            other = 2 * metric
            near(asked.rows(other), 2 * wanted.diagonal(dim1=1, dim2=2), "rows of another metric", 2 * V * V)
            asked.block(metric).zero_()
        near(asked.block(None), blocks(A, torch.ones(N, V)).sum(0), "blocks without a metric", V * V)


def test_two_precisions_meet_in_the_wider() -> None:
    A, metric = torch.randn(3, N, 4).float(), symmetric(3)
    for found in (quad_rows(A, metric), quad_block(A, metric), summed_block(A, metric)):
        assert found.dtype == torch.float64
    close(quad_block(A, metric), blocks(A, metric), "block")


def test_what_is_one_number() -> None:
    assert uniform(torch.tensor(2.0).expand(4, 3)) == 2
    assert uniform(torch.ones(4, 3)) is None
    assert uniform(torch.ones(4, 1, 1).expand(4, 3, 3)) is None
    assert uniform(torch.ones(()).expand(0, 3)) is None
    assert uniform(None) is None


# Positions side by side ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [None, 1, 40])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("turned", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.usefixtures("precision")
def test_inner(turned: tuple[bool, bool], large: bool, piece: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """[..., L, d] as it is, and as the transpose of what lies in memory with positions side by side."""
    if piece is not None:
        monkeypatch.setattr(metric_, "_PIECE", piece)
    if large:
        monkeypatch.setattr(metric_, "CHUNK", 1)
    for lead, L in (((3, 2), 4), ((5,), 3), ((), 6), ((4,), 1)):
        X, Y = (
            (torch.randn(*lead, d, L).mT if t else torch.randn(*lead, L, d))
            for d, t in zip((3, 5), turned, strict=True)
        )
        for left, right in ((X, Y), (X, X)):
            for scale in (1.0, -0.25):
                wanted = torch.zeros(left.shape[-1], right.shape[-1], dtype=torch.float64)
                for x, y in zip(left.double().flatten(0, -2), right.double().flatten(0, -2), strict=True):
                    wanted += scale * torch.outer(x, y)
                near(inner(left, right, scale), wanted, (lead, scale), 24)


# Outer products ------------------------------------------------------------------------------------------------------

OUTERS: dict[str, Callable[[int], Outer]] = {
    "one position": lambda V: Outer(torch.randn(V, N, 1, 1, 3), torch.randn(N, 1, 1, 4)),
    "one position, swapped": lambda V: Outer(torch.randn(V, N, 1, 1, 3), torch.randn(N, 1, 1, 4), None, True),
    "one position, shape": lambda V: Outer(torch.randn(V, N, 1, 1, 3), torch.randn(N, 1, 1, 4), torch.Size((3, 2, 2))),
    "few": lambda V: Outer(torch.randn(V, N, 1, 3, 7), torch.randn(N, 1, 3, 4)),
    "few, groups": lambda V: Outer(torch.randn(V, N, 2, 3, 7), torch.randn(N, 2, 3, 4)),
    "few, groups, swapped": lambda V: Outer(torch.randn(V, N, 2, 3, 7), torch.randn(N, 2, 3, 4), None, True),
    "many": lambda V: Outer(torch.randn(V, N, 1, 20, 2), torch.randn(N, 1, 20, 3)),
    "many, swapped": lambda V: Outer(torch.randn(V, N, 1, 20, 2), torch.randn(N, 1, 20, 3), None, True),
    "many, groups, shape": lambda V: Outer(torch.randn(V, N, 2, 20, 2), torch.randn(N, 2, 20, 6),
                                           torch.Size((4, 3, 2))),
    "side by side": lambda V: Outer(torch.randn(V, N, 1, 9, 20).mT, torch.randn(N, 1, 4, 20).mT),
    "side by side, few inputs, groups": lambda V: Outer(torch.randn(V, N, 2, 9, 20).mT, torch.randn(N, 2, 4, 20).mT),
    "side by side, shape": lambda V: Outer(torch.randn(V, N, 1, 9, 20).mT, torch.randn(N, 1, 4, 20).mT,
                                           torch.Size((9, 2, 2))),
    "side by side, swapped": lambda V: Outer(torch.randn(V, N, 1, 9, 20).mT, torch.randn(N, 1, 4, 20).mT, None, True),
    "side by side, swapped, many inputs": lambda V: Outer(torch.randn(V, N, 1, 3, 20).mT, torch.randn(N, 1, 8, 20).mT,
                                                          None, True),
    "side by side, many inputs": lambda V: Outer(torch.randn(V, N, 1, 3, 20).mT, torch.randn(N, 1, 8, 20).mT),
}  # fmt: skip


TURNED = {"side by side", "side by side, few inputs, groups", "side by side, shape"}


def looped(f: Outer) -> Tensor:  # -> [V, N, *p], in double precision
    V, _, B, L, o = f.g.shape
    found = torch.zeros(V, f.N, B, o, f.i, dtype=torch.float64)
    for v in range(V):
        for n in range(f.N):
            for b in range(B):
                for p in range(L):
                    found[v, n, b] += torch.outer(f.g[v, n, b, p].double(), f.a[n, b, p].double())
    return (found.mT if f.swapped else found).reshape(V, f.N, *f.param)


@pytest.mark.parametrize("V", [1, 4])
@pytest.mark.parametrize("kind", OUTERS)
@pytest.mark.usefixtures("precision")
def test_built_and_not(kind: str, V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    turned: list[bool] = []
    real = Outer._build_turned
    monkeypatch.setattr(Outer, "_build_turned", lambda self, out: turned.append(True) or real(self, out))
    f = OUTERS[kind](V)
    t, L = looped(f), f.g.shape[3]
    top = float(t.abs().max())
    near(f.dense() / top, t / top, "dense", L)
    assert bool(turned) == (kind in TURNED)
    for entries in (None, False, True):
        if entries is not None:
            f.prepare(entries=entries)
            assert (f.built is not None) == (L > 1)
        near(f.sum() / top, t.sum((0, 1)) / top, ("sum", entries), V * N * L)
        near(f.norms() / top**2, t.flatten(2).square().sum(2) / top**2, ("norms", entries), L * t[0, 0].numel())
        near(f.lengths() / top, t.flatten(2).norm(dim=2) / top, ("lengths", entries), L * t[0, 0].numel())
        for weighed in METRICS:
            metric = METRICS[weighed](V)
            D2 = blocks(t.flatten(2), metric).diagonal(dim1=1, dim2=2).reshape(N, *f.param)
            near(f.quad(metric) / top**2, D2.sum(0) / top**2, ("quad", weighed, entries), V * V * N * L)
            near(f.quad_each(metric) / top**2, D2 / top**2, ("quad_each", weighed, entries), V * V * L)
        X = torch.randn(2, *f.param)
        near(f.times(X) / top, torch.einsum("vn...,k...->kvn", t, X.double()) / top, "times", 100)


def test_what_is_worth_building(monkeypatch: pytest.MonkeyPatch) -> None:
    f = OUTERS["few"](2)  # 3 positions: (7 + 4) of them against each other, or 7 x 4
    f.prepare(entries=False)
    assert f.built is not None
    for few in (OUTERS["one position"](2), Outer(torch.randn(2, N, 1, 2, 30), torch.randn(N, 1, 2, 30))):
        few.prepare(entries=False)
        assert few.built is None
    few.prepare(entries=True)
    assert few.built is not None
    monkeypatch.setattr(outer_, "CHUNK", 10)
    f = OUTERS["few"](2)
    f.prepare(entries=True)
    assert f.built is None, "too large"
    t = looped(f)
    near(f.quad(METRICS["full"](2)[:0].new_ones(()).expand(N, 2)), t.square().sum((0, 1)), "sum of squares", 40)
    M = symmetric(2)
    near(f.quad(M), blocks(t.flatten(2), M).diagonal(dim1=1, dim2=2).sum(0).reshape(f.param), "quad", 40)


# What weight and bias have in common ---------------------------------------------------------------------------------


def test_who_shares() -> None:
    G, a = torch.randn(3, N, 4), torch.randn(N, 1, 1, 2)
    g = G.view(3, N, 1, 1, 4)
    weight, bias, other = Outer(g, a), Dense(G), Dense(G.clone())
    share([weight, bias, other], G)
    assert weight.source is bias.source is not None
    assert other.source is None
    square = torch.randn(N, N, N)  # all axes alike
    inputs = torch.randn(N, 1, 1, 2)
    for turned in (square.transpose(0, 1), square.transpose(1, 2), square.permute(2, 0, 1)):
        assert not Outer(turned.reshape(N, N, 1, 1, N), inputs).of_one_position(square)
        assert not Outer(turned[:, :, None, None], inputs).of_one_position(square)
    assert Outer(square[:, :, None, None], inputs).of_one_position(square)
    assert not Outer(square[1:, :, None, None], inputs).of_one_position(square)
    assert not Outer(square.clone()[:, :, None, None], inputs).of_one_position(square)
    share([bias := Dense(torch.randn(3, N))], bias.t)
    assert bias.source is None


def _rows(m: Any, x: Tensor) -> Tensor:  # time and batch merged: positions are other samples' rows
    return m.b(m.a(x.transpose(0, 1).reshape(-1, D)).tanh().reshape(x.shape[1], len(x), -1).sum(0))  # type: ignore


def _first(m: Any, x: Tensor) -> Tensor:  # features and samples swapped around a product
    return m.b((m.w @ x[:, 0].T).T.tanh())  # type: ignore[no-any-return]


def _channels(m: Any, x: Tensor) -> Tensor:
    return m.b(m.c(x.mT).tanh().sum(2))  # type: ignore[no-any-return]


SHARING: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Callable[[int], Any]]]] = {
    "one position": (lambda m, x: m.b(m.a(x[:, 0]).tanh()), {"a": lambda o: nn.Linear(D, o)}),
    "positions": (lambda m, x: m.b(m.a(x).tanh().sum(1)), {"a": lambda o: nn.Linear(D, o)}),
    "rows": (_rows, {"a": lambda o: nn.Linear(D, o)}),
    "swapped": (_first, {"w": lambda o: nn.Parameter(torch.randn(o, D) / 2)}),
    "channels": (_channels, {"c": lambda o: nn.Conv1d(D, o, 1)}),
    "by hand": (lambda m, x: m.b((x[:, 0] @ m.w + m.s).tanh()),
                {"w": lambda o: nn.Parameter(torch.randn(D, o) / 2), "s": lambda o: nn.Parameter(torch.randn(o))}),
}  # fmt: skip


@pytest.mark.parametrize("width", [N, C, 6])
@pytest.mark.parametrize("T", [1, N])
@pytest.mark.parametrize("name", SHARING)
def test_several_metrics_at_once(name: str, T: int, width: int) -> None:
    """Exact and random columns, diagonals and Kronecker factors in one block: each has its own, and N may be o."""
    way, parts = SHARING[name]
    model = Fn(way, **{key: make(width) for key, make in parts.items()}, b=nn.Linear(width, C))
    x, y = torch.randn(N, T, D), torch.arange(N) % C
    loss = lambda o: F.cross_entropy(o, y)
    wanted = expected(model, lambda: model(x), loss)
    drawn = []
    for asked in (["ggn_diag", "ggn_diag_sample", KFAC(fisher="exact"), "jac"], ["ggn_diag", "hess_diag"], []):
        with extend(model, *asked, GGNDiagMC(samples=3, generator=torch.Generator().manual_seed(1)), "grad_sample"):
            loss(model(x)).backward()
        drawn.append([p.ggn_diag_mc for p in model.parameters()])  # type: ignore[attr-defined]
        for key, p in trainable(model).items():
            for q in ("grad_sample", *(q for q in asked if q in wanted[key])):
                close(getattr(p, q), wanted[key][q], (key, q))
            if len(asked) == 4:
                close(p.ggn_diag_sample.sum(0), wanted[key]["ggn_diag"], key)  # type: ignore[attr-defined]
        if len(asked) == 4:
            for layer in model.children():
                if name != "rows" and isinstance(layer, nn.Linear) and (layer is model.b or name == "one position"):
                    B: Tensor = layer.weight.kfac.B  # type: ignore[union-attr,assignment]
                    close(B.diagonal(), wanted_bias(wanted, model, layer), "B")
                    close(layer.bias.kfac.B, B, "B of the bias")  # type: ignore[union-attr]
    for others in drawn[1:]:
        for mc, alone in zip(others, drawn[0], strict=True):
            close(mc, alone, "random columns, asked for by themselves")


def wanted_bias(wanted: dict[str, dict[str, Tensor]], model: nn.Module, layer: nn.Module) -> Tensor:
    (key,) = [name for name, m in model.named_modules() if m is layer]
    return wanted[f"{key}.bias"]["ggn_diag"]


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gram_of_what_a_layer_received(shared: bool, graph: bool) -> None:
    """Weight and bias share the products of columns; a graph is there if and only if it was asked for."""
    V, N, o, i = 3, 4, 5, 2
    G = torch.randn(V, 1, o).expand(V, N, o) if shared else torch.randn(V, N, o)
    G = G.detach().requires_grad_(graph)
    a = torch.randn(N, i)
    weight, bias = Outer(G[:, :, None, None], a[:, None, None]), Dense(G)
    share([weight, bias], G)
    assert weight.source is bias.source is not None
    for _ in range(2):
        with torch.no_grad():
            assert not gram(weight, weight).requires_grad
        for factor in (weight, bias):
            found, built = gram(factor, factor), factor.dense()
            assert found.requires_grad == graph
            for n in range(N):
                for m in range(N):
                    for v in range(V):
                        for w in range(V):
                            close(found[n, v, m, w], (built[v, n] * built[w, m]).sum(), (n, m, v, w))
            with torch.no_grad():
                found.zero_()  # the user's own
