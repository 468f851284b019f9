"""What one parameter receives from V columns, kept as the pieces it is made of.

V columns · N samples · L shared positions (time, pixels) · o/i output/input features · p the parameter's shape.

A *metric* says how columns are weighed against each other, separately for each sample: `[N, V]` is diagonal,
`[N, V, V]` is full. The curvature of a network is a sum of groups of columns A with a metric M each, and its
diagonal is `sum_n sum_vw M[n, v, w] A[v, n] * A[w, n]`: here `quad`.
"""

from __future__ import annotations

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


def quad_rows(A: Tensor, metric: Tensor) -> Tensor:  # A [V, N, D], metric [N, V] or [N, V, V] -> [N, D]
    """The diagonal of Aᵀ M A for each sample."""
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

    def quad(self, metric: Tensor) -> Tensor:  # -> [*p]
        V, N = self.t.shape[:2]
        A = self.t[:, :1].reshape(V, 1, -1).expand(V, N, -1) if shared(self.t) else self.t.reshape(V, N, -1)
        step = max(1, _CHUNK // max(1, V * A.shape[2]))
        total = A.new_zeros(A.shape[2])
        for n in range(0, N, step):
            total += quad_rows(A[:, n : n + step], metric[n : n + step]).sum(0)
        return total.reshape(self.t.shape[2:])


@dataclass(frozen=True)
class Outer:
    """sum over positions of g aᵀ: what a weight [o, i] that is multiplied with `a` receives."""

    g: Tensor  # [V, N, L, o]
    a: Tensor  # [N, L, i]

    def dense(self) -> Tensor:
        """[V, N, o, i]; lies in memory with N first, as results are handed out."""
        g = self.g.transpose(0, 1)  # [N, V, L, o]
        if g.shape[2] == 1:
            # a broadcast product beats einsum and bmm for plain outer products
            out = g[:, :, 0, :, None] * self.a[:, None, 0, None, :]
        else:
            out = g.transpose(2, 3) @ self.a.unsqueeze(1)
        return out.transpose(0, 1)

    def quad(self, metric: Tensor) -> Tensor:  # -> [o, i]
        V, N, L, o = self.g.shape
        if L == 1:
            return quad_rows(self.g[:, :, 0], metric).T @ self.a[:, 0].square()
        step = max(1, _CHUNK // max(1, V * o * self.a.shape[2]))
        total = self.a.new_zeros(o, self.a.shape[2])
        for n in range(0, N, step):
            part = Outer(self.g[:, n : n + step], self.a[n : n + step]).dense()
            total += Dense(part).quad(metric[n : n + step])
        return total


Factor = Dense | Outer


def add(x: Factor, y: Factor) -> Factor:
    """Two uses of one parameter, summed before anything is squared: cross terms are part of the answer."""
    if isinstance(x, Outer) and isinstance(y, Outer):
        return Outer(torch.cat([x.g, y.g], 2), torch.cat([x.a, y.a], 1))
    return Dense(x.dense() + y.dense())
