"""The Hessian's diagonal is the same wherever its columns are gathered and whichever road they take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N
from oracle import close, expected, trainable
from torch import Tensor, nn

from hookjac import HessDiag, extend, gathering, roads
from hookjac.gathering import Gathering
from hookjac.testing import random_loss

SMOOTH: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "softplus": nn.Softplus, "gelu": nn.GELU}


def dense(*widths: int, act: str = "tanh") -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for i, o in zip((D, *widths), (*widths, C), strict=True):
            layers += [nn.Linear(i, o), SMOOTH[act]()]
        return nn.Sequential(*layers[:-1])

    return build


def _branches(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).tanh()
    return m.c(torch.cat([m.b(h).sigmoid(), h.sin()], 1)) + m.d(h * m.e(h))  # type: ignore[no-any-return]


def _residual(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    for layer in (m.b, m.e):
        h = h + layer(h).tanh()
    return m.d(h)  # type: ignore[no-any-return]


def _softmax(m: Any, x: Tensor) -> Tensor:  # not entry by entry
    return m.d(m.b(m.a(x).softmax(1)).tanh())  # type: ignore[no-any-return]


def _parts() -> dict[str, nn.Module]:
    return {"a": nn.Linear(D, 4), "b": nn.Linear(4, 4), "e": nn.Linear(4, 4), "d": nn.Linear(4, C)}


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "alike": (dense(4, 4, 4), (D,)),
    "narrow and wide": (dense(2, 9, 3, 7, act="softplus"), (D,)),
    "wide and narrow": (dense(11, 2, 6, act="gelu"), (D,)),
    "one wide": (dense(12), (D,)),
    "branches": (lambda: Fn(_branches, **_parts(), c=nn.Linear(8, C)), (D,)),
    "residual": (lambda: Fn(_residual, **_parts()), (D,)),
    "softmax": (lambda: Fn(_softmax, **_parts()), (D,)),
    "positions": (lambda: Fn(lambda m, x: m.d(m.b(m.a(x).tanh()).sin().sum(1)), **_parts()), (2, D)),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 2, 2), nn.Softplus(),
                                          nn.Flatten(), nn.Linear(6, C)), (2, 5)),
}  # fmt: skip


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[gathering._Place], Gathering]]:
    """Every plan, and the places it chose from."""
    found: list[tuple[list[gathering._Place], Gathering]] = []
    real, places = gathering.best, gathering._places
    last: list[list[gathering._Place]] = []

    def seen(*args: Any) -> Gathering:
        out = real(*args)
        found.append((last.pop(), out))
        return out

    def looked(*args: Any) -> list[gathering._Place]:
        last.append(places(*args))
        return last[-1]

    monkeypatch.setattr(gathering, "best", seen)
    monkeypatch.setattr(gathering, "_places", looked)
    return found


def check(name: str, **options: Any) -> None:
    build, shape = NETS[name]
    torch.manual_seed(0)
    model, x = build(), torch.randn(N, *shape)
    wanted = WANTED.setdefault(name, expected(model, lambda: model(x), random_loss))
    with extend(model, HessDiag(**options)):
        random_loss(model(x)).backward()
    for key, p in trainable(model).items():
        close(p.hess_diag, wanted[key]["hess_diag"], (name, key, options))  # type: ignore[attr-defined]


WANTED: dict[str, dict[str, dict[str, Tensor]]] = {}


@pytest.mark.parametrize("road", ["auto", "columns", "features", "entries"])
@pytest.mark.parametrize("name", NETS)
def test_roads(name: str, road: Any, planned: list[Any]) -> None:
    check(name, road=road)
    assert bool(planned) == (road != "entries")


@pytest.mark.parametrize("name", NETS)
def test_every_choice_of_places(name: str, planned: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nowhere, everywhere, at one place, at two: what is cheapest is a matter of time, never of numbers."""
    check(name, road="columns")
    ((places, _),) = planned
    able = [k for k, place in enumerate(places) if place.D]
    assert len(able) >= 2
    chosen = [(), tuple(able), *combinations(able, 1), *list(combinations(able, 2))[:: max(1, len(able) // 3)]]
    taken: list[Any] = []
    for at in chosen:
        monkeypatch.setattr(gathering, "best", lambda *args, at=at: forced(at, taken, *args))
        check(name, road="columns")
    assert taken == chosen


def forced(at: tuple[int, ...], taken: list[Any], *args: Any) -> Gathering:
    plan, edges, active, curves, crossings, diagonal, work = args
    places = gathering._places(plan, edges, active, curves, crossings, diagonal, work)
    taken.append(at)
    return Gathering(frozenset(places[k].key for k in at), 1.0)


@pytest.mark.parametrize("limit", [0, 1, N * 9, N * 16, N * 25, N * 100])
@pytest.mark.parametrize("name", NETS)
def test_no_block_is_too_large(name: str, limit: int, planned: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "BLOCK", limit)
    monkeypatch.setattr(gathering, "_STATION", 0.0)
    monkeypatch.setattr(gathering, "ENTRY", 0.01)
    check(name, road="columns")
    ((places, found),) = planned
    assert found.at <= {place.key for place in places}
    assert all(limit >= N * place.D**2 for place in places if place.key in found.at)


@pytest.mark.parametrize("name", NETS)
def test_what_was_chosen_is_the_cheapest(name: str, planned: list[Any]) -> None:
    """Against all subsets of places, each paid for station by station."""
    check(name, road="columns")
    ((places, found),) = planned
    able = [k for k, place in enumerate(places) if place.D][:10]
    if len(able) < sum(place.D > 0 for place in places):
        pytest.skip("too many places for all of their subsets")
    bills = {at: bill(places, at) for r in range(len(able) + 1) for at in combinations(able, r)}
    cheapest = min(bills.values())
    mine = tuple(k for k, place in enumerate(places) if place.key in found.at)
    assert math.isclose(found.flops, cheapest, rel_tol=1e-12)
    assert math.isclose(bills[mine], cheapest, rel_tol=1e-12)


def bill(places: list[gathering._Place], at: tuple[int, ...]) -> float:
    g = gathering
    groups, paid = [g._Group(C, full=True, shared=True, unit=True)], 0.0
    for k, place in enumerate(places):
        paid += g._STATION
        for group in groups:
            paid += sum(g._weighed(group, o, N) for o in place.weighs)
            paid += group.size * place.work / (N if group.shared and place.linear else 1)
        groups = [g._Group(x.size, x.full, x.shared and place.linear) for x in groups]
        if place.bends:
            groups.append(g._Group(place.bends, place.full, True, True))
        if k in at:
            paid += sum(g._gathered(x, place.D, N) for x in groups)
            groups = [g._Group(place.D, True, True, True)]
    return paid


@pytest.fixture
def dear(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gathering, "_MEMORY", 1.0)
    yield
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["alike", "branches"])
@pytest.mark.usefixtures("dear")
def test_columns_that_would_not_fit(name: str, planned: list[Any]) -> None:
    """Products are left."""
    check(name)
    ((_, found),) = planned
    assert found.flops == math.inf


def test_automatic_choice_takes_every_road(monkeypatch: pytest.MonkeyPatch) -> None:
    """With prices that favour one or the other, numbers stay."""
    taken = set()
    for price in (1e-9, 1e9):
        monkeypatch.setattr(roads, "PRODUCT", price)
        build, shape = NETS["alike"]
        torch.manual_seed(0)
        model, x = build(), torch.randn(N, *shape)
        with extend(model, "hess_diag") as ext:
            random_loss(model(x)).backward()
        taken |= {row["hessian"] for row in ext.explain().to_dict()["parameters"].values()}
        check("alike")
    assert taken == {"features", "columns"}


def test_cross_entropy_on_a_deep_net() -> None:
    """From a softmax's root, which is no unit columns."""
    model, x, y = dense(3, 8, 3, 8, 3)(), torch.randn(N, D), torch.tensor([0, 2, 1, 1])
    loss = lambda o: F.cross_entropy(o, y)
    wanted = expected(model, lambda: model(x), loss)
    for road in ("auto", "columns", "features", "entries"):
        with extend(model, HessDiag(road=road), "ggn_diag"):  # type: ignore[arg-type]
            loss(model(x)).backward()
        for key, p in trainable(model).items():
            close(p.hess_diag, wanted[key]["hess_diag"], (key, road))  # type: ignore[attr-defined]
            close(p.ggn_diag, wanted[key]["ggn_diag"], (key, road))  # type: ignore[attr-defined]


def test_gathered_where_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block at the output has the loss's own Hessian in it, which others still need."""
    model, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C), nn.Tanh()), torch.randn(N, D)
    wanted = expected(model, lambda: model(x), random_loss)
    for at in ((), (0,), (1,), (0, 1), (0, 1, 2)):
        monkeypatch.setattr(gathering, "best", lambda *args, at=at: forced(at, [], *args))
        with extend(model, HessDiag(road="columns"), "ggn_diag", "jac"):
            random_loss(model(x)).backward()
        for key, p in trainable(model).items():
            for q in ("hess_diag", "ggn_diag", "jac"):
                close(getattr(p, q), wanted[key][q], (at, key, q))
