"""hess_diag by features where several positions share a weight: rows of a layer's Hessian, none of them held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, par
from largest import Largest
from oracle import close
from torch import Tensor, nn

import hookjac
from hookjac import factor, products, roads


def pictures() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 4, 2, groups=2), nn.GELU(), nn.Flatten(),
        nn.Linear(36, C),
    )  # fmt: skip


def sequences() -> nn.Module:
    """A weight in Linear, in a normalisation, and on the right of a product in functional code."""
    return Fn(
        lambda m, x: m.c((m.norm(m.a(x).tanh()) @ m.w).sigmoid().flatten(1)),
        a=nn.Linear(D, 3), norm=nn.LayerNorm(3), w=par(3, 2), c=nn.Linear(4, C),
    )  # fmt: skip


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "pictures": (pictures, (3, 1, 4, 4)), "sequences": (sequences, (3, 2, D)),
}  # fmt: skip


def hessians(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:  # [N, P, P] of each parameter
    found = {}
    for name, p in model.named_parameters():
        rows = []
        for n in range(len(x)):
            loss = F.cross_entropy(model(x), y, reduction="none")[n] / len(x)
            (g,) = torch.autograd.grad(loss, p, create_graph=True)
            rows.append(torch.stack([torch.autograd.grad(e, p, retain_graph=True)[0].reshape(-1) for e in g.view(-1)]))
        found[name] = torch.stack(rows)
    return found


@pytest.mark.parametrize("chunk", [None, 40, 1])
@pytest.mark.parametrize("net", NETS)
def test_all_that_is_made_of_rows(monkeypatch: pytest.MonkeyPatch, net: str, chunk: int | None) -> None:
    monkeypatch.setattr(roads, "_HELD", 0)
    if chunk is not None:
        monkeypatch.setattr(products, "_CHUNK", chunk)
        monkeypatch.setattr(factor, "CHUNK", chunk)
    made: list[Any] = []
    own = roads.add_up
    monkeypatch.setattr(roads, "add_up", lambda *given: made.append(own(*given)) or made[-1])
    build, shape = NETS[net]
    model, x, y = build(), torch.randn(shape), torch.randint(C, shape[:1])
    asked: list[Any] = [kind(road="features") for kind in (hookjac.HessDiag, hookjac.HessDiagSample, hookjac.HessBlock)]
    with hookjac.extend(model, *asked):
        F.cross_entropy(model(x), y).backward()
    assert made, "nothing went this way"
    wanted = hessians(model, x, y)
    for name, p in model.named_parameters():
        each = wanted[name].diagonal(dim1=1, dim2=2)
        close(p.hess_diag, each.sum(0).view_as(p), name)
        close(p.hess_diag_sample, each.view(len(x), *p.shape), name)
        close(p.hess_block, wanted[name].sum(0), name)
    for some in ([2, 0], [1]):
        with hookjac.extend(model, hookjac.HessDiag(road="features", subsample=some)):
            F.cross_entropy(model(x), y).backward()
        for name, p in model.named_parameters():
            close(p.hess_diag, wanted[name].diagonal(dim1=1, dim2=2)[some].sum(0).view_as(p), name)


def test_a_layers_parameters_share_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roads, "_HELD", 0)
    walks: list[Any] = []
    own = roads.rows
    monkeypatch.setattr(roads, "rows", lambda *given, **more: walks.append(given[1]) or own(*given, **more))
    model, x = pictures(), torch.randn(3, 1, 4, 4)
    with hookjac.extend(model, hookjac.HessDiag(road="features")):
        F.cross_entropy(model(x), torch.randint(C, (3,))).backward()
    assert len(walks) == len(set(walks)) == 2  # the convolutions; the last layer has one position


def test_no_block_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of N D² entries, for the D features of a convolution."""
    N, side = 4, 12
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * side**2, 2))
    features = 4 * side**2
    x, y = torch.randn(N, 1, side, side), torch.randint(2, (N,))
    largest = []
    for held in (0, 1 << 40):
        monkeypatch.setattr(roads, "_HELD", held)
        monkeypatch.setattr(products, "_CHUNK", 1 << 16)
        with hookjac.extend(model, hookjac.HessDiag(road="features")), Largest() as seen:
            F.cross_entropy(model(x), y).backward()
        largest.append((seen.entries, model[0].weight.hess_diag))  # type: ignore[union-attr]
    (small, one), (large, other) = largest
    assert small < N * features**2 / 8
    assert large >= N * features**2
    close(one, other, "the weight")
