"""What one parameter receives from V columns, kept as the pieces it is made of.

V columns · N samples · L shared positions (time, pixels) · o/i output/input features · p the parameter's shape.

A *metric* says how columns are weighed against each other, separately for each sample: `[N, V]` is diagonal,
`[N, V, V]` is full. The curvature of a network is a sum of groups of columns A with a metric M each, and its
diagonal is `sum_n sum_vw M[n, v, w] A[v, n] * A[w, n]`: here `quad`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 22  # entries of a temporary; a few tens of megabytes


def shared(t: Tensor) -> bool:
    """True for [V, N, ...] that holds one sample's values N times by stride, as unit columns do."""
    return t.dim() > 1 and t.shape[1] > 1 and t.stride(1) == 0


def is_unit(t: Tensor) -> bool:  # [V, N, D]
    """True if column v is the v-th unit vector, for every sample. Costs V², saves a product of V³."""
    V, N, D = t.shape
    if V != D or N == 0 or not (shared(t) or N == 1):
        return False
    return torch.equal(t[:, 0], torch.eye(V, dtype=t.dtype, device=t.device))


def _alike(A: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one type: a trunk in half precision below a head in single has columns and metric of two."""
    if A.dtype == metric.dtype:
        return A, metric
    dtype = torch.promote_types(A.dtype, metric.dtype)
    return A.to(dtype), metric.to(dtype)


def quad_rows(A: Tensor, metric: Tensor) -> Tensor:  # A [V, N, D], metric [N, V] or [N, V, V] -> [N, D]
    """The diagonal of Aᵀ M A for each sample, in the wider of the two precisions."""
    A, metric = _alike(A, metric)
    if is_unit(A):
        return metric if metric.dim() == 2 else metric.diagonal(dim1=1, dim2=2)
    if shared(A):
        W = A[:, 0]  # [V, D]
        if metric.dim() == 2:
            return metric @ W.square()
        return ((metric @ W) * W).sum(1)
    if metric.dim() == 2:
        return torch.einsum("nv,vnd->nd", metric, A.square())
    return torch.einsum("vnd,vnd->nd", A, torch.einsum("nvw,wnd->vnd", metric, A))


def quad_block(A: Tensor, metric: Tensor) -> Tensor:  # A [V, N, D], metric [N, V] or [N, V, V] -> [N, D, D]
    """Aᵀ M A for each sample: the columns' whole curvature at that tensor."""
    A, metric = _alike(A, metric)
    if is_unit(A):
        return torch.diag_embed(metric) if metric.dim() == 2 else metric
    if shared(A):
        W = A[:, 0]
        if metric.dim() == 2:
            return (W.T.unsqueeze(0) * metric.unsqueeze(1)) @ W
        return W.T @ (metric @ W)
    rows = A.transpose(0, 1)  # [N, V, D]
    if metric.dim() == 2:
        return (rows * metric.unsqueeze(2)).transpose(1, 2) @ rows
    return rows.transpose(1, 2) @ (metric @ rows)


@dataclass(frozen=True)
class Dense:
    """The contribution itself, [V, N, *p]. `fresh`: nobody else holds its memory."""

    t: Tensor
    fresh: bool = False

    def dense(self) -> Tensor:
        return self.t

    def parted(self) -> bool:
        """Of unit columns: does each entry receive from one of them only? Then a metric's diagonal is all it needs."""
        return is_unit(self.t.reshape(*self.t.shape[:2], self.t.shape[2:].numel()))

    def quad(self, metric: Tensor) -> Tensor:  # -> [*p]
        V, N = self.t.shape[:2]
        A = self.t[:, :1].reshape(V, 1, -1).expand(V, N, -1) if shared(self.t) else self.t.reshape(V, N, -1)
        step = max(1, _CHUNK // max(1, V * A.shape[2]))
        total = A.new_zeros(A.shape[2], dtype=torch.promote_types(A.dtype, metric.dtype))
        for n in range(0, N, step):
            total += quad_rows(A[:, n : n + step], metric[n : n + step]).sum(0)
        return total.reshape(self.t.shape[2:])


@dataclass(frozen=True)
class Outer:
    """sum over positions of g aᵀ, block by block: what a weight that is multiplied with `a` receives.

    B blocks (the groups of a convolution; else 1). The parameter is [B o, i], or [B i, o] if `swapped`, in memory
    order; `shape` is its own shape where that has other axes.
    """

    g: Tensor  # [V, N, B, L, o]
    a: Tensor  # [N, B, L, i]
    shape: torch.Size | None = None
    swapped: bool = False

    def _fold(self, t: Tensor) -> Tensor:  # [..., B, o, i] -> [..., *p]
        t = t.transpose(-1, -2) if self.swapped else t
        lead = t.shape[:-3]
        return t.flatten(-3, -2) if self.shape is None else t.reshape(*lead, *self.shape)

    def dense(self) -> Tensor:
        """[V, N, *p]; lies in memory with N first, as results are handed out."""
        g, a = self.g.transpose(0, 1), self.a.unsqueeze(1)  # [N, V, B, L, o], [N, 1, B, L, i]
        if g.shape[3] == 1:
            # a broadcast product beats einsum and bmm for plain outer products
            out = g[:, :, :, 0, :, None] * a[:, :, :, 0, None, :]
        else:
            out = g.transpose(3, 4) @ a
        return self._fold(out).transpose(0, 1)

    def parted(self) -> bool:
        return self.g.shape[3] == 1 and is_unit(self.g[:, :, :, 0].flatten(2))

    def quad(self, metric: Tensor) -> Tensor:  # -> [*p]
        V, N, B, L, o = self.g.shape
        i = self.a.shape[3]
        if L == 1:
            rows = quad_rows(self.g[:, :, :, 0].flatten(2), metric).reshape(N, B, o)
            return self._fold(rows.permute(1, 2, 0) @ self.a[:, :, 0].square().transpose(0, 1).to(rows.dtype))
        step = max(1, _CHUNK // max(1, V * B * o * i))
        total: Tensor | None = None
        for n in range(0, N, step):
            part = Outer(self.g[:, n : n + step], self.a[n : n + step], self.shape, self.swapped).dense()
            found = Dense(part).quad(metric[n : n + step])
            total = found if total is None else total + found
        return self._fold(self.a.new_zeros(B, o, i)) if total is None else total

    def alike(self, other: Outer) -> bool:
        """Do both lay the parameter out in the same way, so that positions can be put side by side?"""
        mine, its = self.g, other.g
        return (self.shape, self.swapped, mine.shape[2]) == (other.shape, other.swapped, its.shape[2])

    def turned(self) -> Outer | None:
        """The same for the transposed parameter; None where that is no matrix."""
        return Outer(self.g, self.a, None, not self.swapped) if self.shape is None and self.g.shape[2] == 1 else None


@dataclass(frozen=True)
class Lookup:
    """Rows g, each added to one row of a table: what a parameter receives that was looked up.

    M looked-up rows of all samples together. d: what is looked up at once, a row of the parameter or a single entry.
    """

    g: Tensor  # [V, M, d]
    row: Tensor  # [M]
    sample: Tensor  # [M]
    N: int
    shape: torch.Size  # of the parameter

    @property
    def rows(self) -> int:
        return self.shape.numel() // max(1, self.g.shape[2])

    def dense(self) -> Tensor:  # [V, N, *p]
        V, _, d = self.g.shape
        out = self.g.new_zeros(self.N * self.rows, V, d)
        out.index_add_(0, self.sample * self.rows + self.row, self.g.transpose(0, 1))
        return out.reshape(self.N, self.rows, V, d).permute(2, 0, 1, 3).reshape(V, self.N, *self.shape)

    def parted(self) -> bool:
        return False

    def quad(self, metric: Tensor) -> Tensor:  # -> [*p]
        V, _, d = self.g.shape
        total = self.g.new_zeros(self.rows, d, dtype=torch.promote_types(self.g.dtype, metric.dtype))
        # a row that a sample looked up twice is one number: summed before it is squared
        places, where = torch.unique(self.sample * self.rows + self.row, return_inverse=True)
        g = self.g.new_zeros(V, len(places), d).index_add_(1, where, self.g)
        step = max(1, _CHUNK // max(1, V * d))
        for k in range(0, len(places), step):
            place = places[k : k + step]
            total.index_add_(0, place % self.rows, quad_rows(g[:, k : k + step], metric[place // self.rows]))
        return total.reshape(self.shape)


Factor = Dense | Outer | Lookup


def paired(A: Factor, B: Factor) -> Tensor:  # -> [*p]
    """sum over columns and samples of A * B, entry by entry."""
    if isinstance(A, Lookup) and isinstance(B, Outer) and B.swapped and B.shape is None and B.g.shape[2] == 1:
        # a table that is a weight as well: only the rows that were looked up meet
        here = B.a[A.sample, 0].gather(2, A.row.view(-1, 1, 1).expand(-1, B.a.shape[2], 1))[:, :, 0]  # [M, L]
        met = torch.einsum("ml,vmli->vmi", here, B.g[:, A.sample, 0])
        return A.g.new_zeros(A.rows, A.g.shape[2]).index_add_(0, A.row, (A.g * met).sum(0)).reshape(A.shape)
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
        return Lookup(g, row, sample, first.N, first.shape)
    return Dense(sum((x.dense() for x in others), first.dense()), fresh=True)
