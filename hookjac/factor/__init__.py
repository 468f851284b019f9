"""What one parameter receives from V columns, kept as the pieces it is made of.

Every factor stands for a tensor [V, N, *p], V columns of N samples, and can do with it, without building it where its
structure allows:

dense()           the tensor itself
columns, samples  some of its columns; some of its samples
mix(R)            other columns, made of these by R [N, W, V]
norms()           [V, N]: squared lengths
times(X)          [K, *p] -> [K, V, N]: inner products with K tangents
back(U)           [K, V, N] -> [K, *p]: combinations of the columns
add_gram(out, B)  [N, V, N', V']: inner products with those of another, added to `out`
each_gram(B)      [N, V, V']: those of the same sample; `scaled_gram(S)`, with itself under a diagonal S [*p]
quad(metric)      [*p]: the diagonal of the curvature; `quad_each` [N, *p], its summands
block(metric)     [P, P]: that curvature itself
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hookjac.factor.dense import Dense
from hookjac.factor.lookup import Lookup
from hookjac.factor.metric import quad_block, root
from hookjac.factor.outer import Outer

__all__ = ["Dense", "Factor", "Lookup", "Outer", "add_gram", "each_gram", "paired", "quad_block", "root", "total"]

Factor = Dense | Outer | Lookup


def add_gram(out: Tensor, A: Factor, B: Factor) -> None:  # out [N, V, N', V']
    """Inner products of all columns of two factors of one parameter, added to `out`."""
    if type(A) is type(B):
        A.add_gram(out, B)  # type: ignore[arg-type]
    else:
        Dense(A.dense()).add_gram(out, Dense(B.dense()))


def each_gram(A: Factor, B: Factor) -> Tensor:  # -> [N, V, V']
    """Inner products of the columns of the same sample."""
    if type(A) is type(B):
        return A.each_gram(B)  # type: ignore[arg-type]
    return Dense(A.dense()).each_gram(Dense(B.dense()))


def paired(A: Factor, B: Factor) -> Tensor:  # -> [*p]
    """sum over columns and samples of A * B, entry by entry."""
    if isinstance(A, Lookup) and isinstance(B, Outer) and B.swapped and B.shape is None and B.g.shape[2] == 1:
        # a table that is a weight as well: only the rows that were looked up meet
        here = B.a[A.sample, 0].gather(2, A.row.view(-1, 1, 1).expand(-1, B.a.shape[2], 1))[:, :, 0]  # [M, L]
        met = torch.einsum("ml,vmli->vmi", here, B.g[:, A.sample, 0])
        return A.g.new_zeros(A.rows, A.g.shape[2]).index_add_(0, A.row, (A.g * met).sum(0)).reshape(A.param)
    return (A.dense() * B.dense()).sum((0, 1))


def total(found: Sequence[Factor]) -> Factor:
    """All uses of one parameter, summed before anything is squared: cross terms are part of the answer."""
    first, *others = found
    if not others:
        return first
    if isinstance(first, Outer) and all(isinstance(x, Outer) and x.alike(first) for x in others):
        outers = [x for x in found if isinstance(x, Outer)]
        g, a = torch.cat([x.g for x in outers], 3), torch.cat([x.a for x in outers], 2)
        return Outer(g, a, first.shape, first.swapped)
    if isinstance(first, Lookup) and all(isinstance(x, Lookup) and x.rows == first.rows for x in others):
        lookups = [x for x in found if isinstance(x, Lookup)]
        g = torch.cat([x.g for x in lookups], 1)
        row, sample = torch.cat([x.row for x in lookups]), torch.cat([x.sample for x in lookups])
        return Lookup(g, row, sample, first.N, first.param)
    return Dense(sum((x.dense() for x in others), first.dense()), fresh=True)
