"""Whatever a factor answers is what its dense tensor would: every kind, every shape that layers give them."""

from __future__ import annotations

import pytest
import torch
from oracle import close
from torch import Tensor

from hookjac.factor import Dense, Factor, Lookup, Outer, Sum, add_gram, each_gram, paired, total
from hookjac.factor.metric import summed_block

N = 4


def outer(V: int, B: int, L: int, o: int, i: int, *, swapped: bool = False, shape: tuple[int, ...] = ()) -> Outer:
    return Outer(torch.randn(V, N, B, L, o), torch.randn(N, B, L, i), torch.Size(shape) or None, swapped)


def units(o: int) -> Tensor:
    return torch.eye(o)[:, None, None, None].expand(o, N, 1, 1, o)


def lookup(V: int, M: int, rows: int, *more: int) -> Lookup:
    row, sample = torch.randint(rows, (M,)), torch.randint(N, (M,))
    return Lookup(torch.randn(V, M, *(more or (1,))), row, sample, N, torch.Size((rows, *more)))


FACTORS = {
    "dense": lambda V: Dense(torch.randn(V, N, 3, 2)),
    "dense, one number": lambda V: Dense(torch.randn(V, N)),
    "dense, the same for all": lambda V: Dense(torch.randn(V, 1, 3).expand(V, N, 3)),
    "outer": lambda V: outer(V, 1, 1, 3, 5),
    "outer, swapped": lambda V: outer(V, 1, 1, 3, 5, swapped=True),
    "outer, few positions": lambda V: outer(V, 1, 2, 7, 6),
    "outer, many positions": lambda V: outer(V, 1, 9, 2, 2),
    "outer, groups": lambda V: outer(V, 2, 3, 2, 4, shape=(4, 2, 2)),
    "outer, groups, swapped": lambda V: outer(V, 2, 3, 2, 4, swapped=True, shape=(8, 2)),
    "outer, groups, one position": lambda V: outer(V, 2, 1, 2, 4, shape=(4, 2, 2)),
    "outer, unit columns": lambda V: Outer(units(V), torch.randn(N, 1, 1, 5)),
    "lookup": lambda V: lookup(V, 11, 4, 3),
    "lookup, a large table": lambda V: lookup(V, 9, 50, 2),
    "lookup, single entries": lambda V: lookup(V, 9, 6),
    "lookup, nothing": lambda V: lookup(V, 0, 6, 2),
    "sum": lambda V: total([lookup(V, 7, 5, 3), outer(V, 1, 2, 5, 3), outer(V, 1, 1, 3, 5, swapped=True)]),
}
every = pytest.mark.parametrize("kind", FACTORS)
columns = pytest.mark.parametrize("V", [1, N, 6])


def built(factor: Factor) -> Tensor:  # [V, N, P]
    t = factor.dense()
    assert t.shape == (factor.V, factor.N, *factor.param)
    return t.reshape(factor.V, factor.N, factor.param.numel())


def metrics(V: int) -> list[Tensor]:
    full = torch.randn(N, V, V)
    return [torch.randn(N, V), full + full.transpose(1, 2)]


@every
@columns
def test_what_it_says_is_what_its_tensor_says(kind: str, V: int) -> None:
    factor = FACTORS[kind](V)
    t, shape, P = built(factor), factor.param, factor.param.numel()
    close(factor.norms(), t.square().sum(2), "norms")
    X, U = torch.randn(3, *shape), torch.randn(2, V, N)
    close(factor.times(X), torch.einsum("vnp,kp->kvn", t, X.reshape(3, P)), "times")
    close(factor.back(U), torch.einsum("kvn,vnp->kp", U, t).reshape(2, *shape), "back")
    close(factor.each_gram(factor), torch.einsum("vnp,wnp->nvw", t, t), "each_gram")  # type: ignore[arg-type]
    S = torch.rand(shape)
    close(factor.scaled_gram(S), torch.einsum("vnp,wnp,p->nvw", t, t, S.reshape(P)), "scaled_gram")
    for metric in metrics(V):
        M = torch.diag_embed(metric) if metric.dim() == 2 else metric
        curvature = torch.einsum("vnp,nvw,wnq->npq", t, M, t)
        each = curvature.diagonal(dim1=1, dim2=2)
        close(factor.quad(metric), each.sum(0).reshape(shape), "quad")
        close(factor.quad_each(metric), each.reshape(N, *shape), "quad_each")
        close(factor.block(metric), curvature.sum(0), "block")
        close(summed_block(t, metric), curvature.sum(0), "summed_block")
    close(factor.block(None), torch.einsum("vnp,vnq->pq", t, t), "block without a metric")


@every
@columns
def test_parts_of_it(kind: str, V: int) -> None:
    factor = FACTORS[kind](V)
    t = factor.dense()
    for index in (slice(1, 3), torch.tensor([2, 0, 2])):
        close(factor.samples(index).dense(), t[:, index], "samples")
    some = torch.tensor([V - 1, 0])
    close(factor.columns(some).dense(), t[some], "columns")
    if not isinstance(factor, Sum):
        close(factor.map(lambda x: 2 * x if x.shape[:2] == (V, N) or isinstance(factor, Lookup) else x).dense(),
              2 * t, "map")  # fmt: skip
    else:
        close(factor.map(torch.zeros_like).dense(), 0 * t, "map")


@every
@pytest.mark.parametrize("chunk", [None, 1, 50])
def test_gram(kind: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunk:
        for module in ("dense", "outer", "lookup", "mixed"):
            monkeypatch.setattr(f"hookjac.factor.{module}.CHUNK", chunk)
    for V in (1, 3):
        A, B = FACTORS[kind](V), FACTORS[kind](V if "unit" in kind else 5)
        if V == 3:
            B = B.samples(torch.tensor([1, 3]))  # two batches of different size
        out = torch.randn(A.N, A.V, B.N, B.V)
        wanted = out + torch.einsum("vnp,wmp->nvmw", built(A), built(B))
        add_gram(out, A, B)
        close(out, wanted, "gram")


def test_gram_of_two_kinds() -> None:
    A, B = lookup(2, 7, 4, 3), outer(3, 1, 2, 4, 3)
    out = torch.zeros(N, 2, N, 3)
    add_gram(out, A, B)
    close(out, torch.einsum("vnp,wmp->nvmw", built(A), built(B)), "gram")


@every
def test_sums_and_pairs(kind: str) -> None:
    A, B = FACTORS[kind](3), FACTORS[kind](3)
    close(total([A, B, A]).dense(), 2 * A.dense() + B.dense(), "total")
    close(paired(A, B), (A.dense() * B.dense()).sum((0, 1)), "paired")


def test_a_table_that_is_a_weight_as_well() -> None:
    A, B = lookup(3, 7, 5, 2), outer(3, 1, 4, 2, 5, swapped=True)
    close(paired(A, B), (A.dense() * B.dense()).sum((0, 1)), "paired")
    close(total([A, B]).dense(), A.dense() + B.dense(), "total")


def test_turned_and_padded() -> None:
    for swapped in (False, True):
        A = outer(3, 1, 2, 4, 5, swapped=swapped)
        turned = A.turned()
        assert turned is not None
        close(turned.dense(), A.dense().transpose(2, 3), "turned")
        for axis in (0, 1):
            padded = A.padded(axis, 1, 2)
            assert padded is not None
            wanted = torch.zeros(padded.dense().shape)
            wanted.narrow(2 + axis, 1, A.param[axis]).copy_(A.dense())
            close(padded.dense(), wanted, "padded")
    assert outer(1, 2, 1, 2, 2).turned() is None
    assert outer(1, 2, 1, 2, 2).padded(0, 1, 1) is None


def test_different_kinds_stay_what_they_are() -> None:
    """A table that is a weight as well, used by two layers and looked up twice: three kinds, two of each."""
    uses = [lookup(3, 7, 5, 3), outer(3, 1, 2, 5, 3), lookup(3, 2, 5, 3), outer(3, 1, 1, 3, 5, swapped=True),
            outer(3, 1, 1, 5, 3)]  # fmt: skip
    found = total(uses)
    assert isinstance(found, Sum)
    assert [type(part) for part in found.parts] == [Lookup, Outer, Outer]
    wanted = sum(use.dense() for use in uses)
    close(found.dense(), wanted, "sum")
    close(total([found, uses[0]]).dense(), wanted + uses[0].dense(), "more")
    with_dense = total([*uses, Dense(torch.ones(3, N, 5, 3))])
    assert isinstance(with_dense, Dense)
    close(with_dense.t, wanted + 1, "dense")
    out, other = torch.zeros(N, 3, N, 2), outer(2, 1, 1, 5, 3)
    add_gram(out, found, other)
    close(out, torch.einsum("vnp,wmp->nvmw", built(found), built(other)), "gram of two kinds")
    close(each_gram(found, other), torch.einsum("vnp,wnp->nvw", built(found), built(other)), "each gram of two kinds")
    close(paired(found, outer_like := outer(3, 1, 4, 5, 3)), (wanted * outer_like.dense()).sum((0, 1)), "paired")
