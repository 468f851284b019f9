"""What one parameter receives from V columns, kept as the pieces it is made of.

Every factor stands for a tensor [V, N, *p], V columns of N samples, and can do with it, without building it where its
structure allows:

dense()           the tensor itself; after `prepare()` it is kept for all that ask, where that is small enough
columns, samples  some of its columns; some of its samples
mix(R)            other columns, made of these by R [N, W, V], or [N, V] where it only scales them
norms()           [V, N]: squared lengths; `lengths()`, their roots
times(X)          [K, *p] -> [K, V, N]: inner products with K tangents
project(X, Y)     [K, r], [K, c] -> [K, V, N]: inner products with K tangents x yᵀ, p as a matrix [r, c] whose rows are
                  its first axis
back(U)           [K, V, N] -> [K, *p]: combinations of the columns; `sum()`, of all with ones
add_gram(out, B)  [N, V, N', V']: inner products with those of another, added to `out`; `gram(A, B)`, these alone
each_gram(B)      [N, V, V']: those of the same sample; `scaled_gram(S)`, with itself under a diagonal S [*p]
quad(metric)      [*p]: the diagonal of the curvature; `quad_each` [N, *p], its summands
block(metric)     [P, P]: that curvature itself
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hookjac.factor.dense import Dense
from hookjac.factor.lookup import Lookup
from hookjac.factor.metric import CHUNK, Columns, quad_block, root
from hookjac.factor.mixed import Sum
from hookjac.factor.outer import Outer
from hookjac.factor.unfolded import Unfolded, patches
from hookjac.memory import fresh

__all__ = [
    "Dense",
    "Factor",
    "Lookup",
    "Outer",
    "Sum",
    "Unfolded",
    "add_gram",
    "each_gram",
    "gram",
    "paired",
    "patches",
    "quad_block",
    "root",
    "share",
    "side_by_side",
    "total",
]

Factor = Dense | Outer | Lookup | Sum


def add_gram(out: Tensor, A: Factor, B: Factor) -> None:  # out [N, V, N', V']
    """Inner products of all columns of two factors of one parameter, added to `out`."""
    if type(A) is type(B):
        A.add_gram(out, B)  # type: ignore[arg-type]
    else:
        _summed(A).add_gram(out, _summed(B))


def gram(A: Factor, B: Factor) -> Tensor:  # -> [N, V, N', V']
    """Inner products of all columns of two factors of one parameter."""
    known = A.own_gram() if A is B and isinstance(A, (Dense, Outer)) else None
    if known is not None:
        return known
    out = fresh((A.N, A.V, B.N, B.V), A.tensors[0].detach()).zero_()
    add_gram(out, A, B)
    return out


def each_gram(A: Factor, B: Factor) -> Tensor:  # -> [N, V, V']
    """Inner products of the columns of the same sample."""
    if type(A) is type(B):
        return A.each_gram(B)  # type: ignore[arg-type]
    return _summed(A).each_gram(_summed(B))


def _summed(A: Factor) -> Sum:
    return A if isinstance(A, Sum) else Sum((A,))


def paired(A: Factor, B: Factor) -> Tensor:  # -> [*p]
    """sum over columns and samples of A * B, entry by entry."""
    if isinstance(A, Sum):
        return torch.stack([paired(part, B) for part in A.parts]).sum(0)
    if isinstance(A, Lookup) and isinstance(B, Outer) and B.swapped and B.shape is None and B.g.shape[2] == 1:
        # a table that is a weight as well: only the rows that were looked up meet
        here = B.a[A.sample, 0].gather(2, A.row.view(-1, 1, 1).expand(-1, B.a.shape[2], 1))[:, :, 0]  # [M, L]
        met = torch.einsum("ml,vmli->vmi", here, B.g[:, A.sample, 0])
        return A.g.new_zeros(A.rows, A.g.shape[2]).index_add_(0, A.row, (A.g * met).sum(0)).reshape(A.param)
    return functools.reduce(torch.add, ((a * b).sum((0, 1)) for a, b in side_by_side(A, B)))


def side_by_side(A: Factor, B: Factor) -> Iterator[tuple[Tensor, Tensor]]:  # [V, n, *p] each
    """Both built, a few samples at a time: so many as a temporary may hold."""
    step = max(1, CHUNK // max(1, A.V * A.param.numel()))
    if step >= A.N:
        yield A.dense(), B.dense()
        return
    for n in range(0, A.N, step):
        some = slice(n, n + step)
        yield A.samples(some).dense(), B.samples(some).dense()


def share(found: Iterable[Factor], G: Tensor) -> None:
    """Let factors of one layer, made of its columns G [V, N, o] themselves, work out once what they have in common."""
    if G.dim() != 3:
        return
    source = None
    for factor in found:
        if isinstance(factor, Dense) and factor.t is G:
            same = True
        else:
            same = isinstance(factor, Outer) and factor.of_one_position(G)
        if same and isinstance(factor, (Dense, Outer)):
            source = factor.source = source or Columns(G)


def total(found: Sequence[Factor]) -> Factor:
    """All uses of one parameter, summed before anything is squared: cross terms are part of the answer."""
    if len(found) == 1:
        return found[0]
    parts: list[Dense | Outer | Lookup] = []
    for factor in found:
        for part in factor.parts if isinstance(factor, Sum) else (factor,):
            _join(parts, part)
    if len(parts) == 1:
        return parts[0]
    if any(isinstance(part, Dense) for part in parts):  # the memory is spent already
        return Dense(sum((x.dense() for x in parts[1:]), parts[0].dense()), fresh=True)
    return Sum(tuple(parts))


def _join(parts: list[Dense | Outer | Lookup], new: Dense | Outer | Lookup) -> None:
    """Put it beside what has its form, as more positions; else behind the others."""
    for k, old in enumerate(parts):
        if isinstance(old, Outer) and isinstance(new, Outer) and new.alike(old):
            g, a = torch.cat([old.g, new.g], 3), torch.cat([old.a, new.a], 2)
            parts[k] = Outer(g, a, old.shape, old.swapped)
            return
        if isinstance(old, Lookup) and isinstance(new, Lookup) and new.rows == old.rows:
            row, sample = torch.cat([old.row, new.row]), torch.cat([old.sample, new.sample])
            parts[k] = Lookup(torch.cat([old.g, new.g], 1), row, sample, old.N, old.param)
            return
        if isinstance(old, Dense) and isinstance(new, Dense):
            parts[k] = Dense(old.t + new.t, fresh=True)
            return
    parts.append(new)
