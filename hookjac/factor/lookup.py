"""Rows looked up in a table: the table's gradient is zero elsewhere, and is never built unless asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hookjac.factor.dense import Dense
from hookjac.factor.metric import CHUNK, quad_rows, root, summed_block, weighed
from hookjac.memory import room


@dataclass(eq=False)
class Lookup:
    """Rows g, each added to one row of a table: what a parameter receives that was looked up.

    M looked-up rows of all samples together. d: what is looked up at once, a row of the parameter or a single entry.
    """

    g: Tensor  # [V, M, d]
    row: Tensor  # [M]
    sample: Tensor  # [M]
    N: int
    param: torch.Size

    @property
    def V(self) -> int:
        return self.g.shape[0]

    @property
    def rows(self) -> int:
        return self.param.numel() // max(1, self.g.shape[2])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.g, self.row, self.sample)

    def map(self, f: Callable[[Tensor], Tensor]) -> Lookup:
        return replace(self, g=f(self.g))

    def columns(self, index: Tensor | slice) -> Lookup:
        return replace(self, g=self.g[index])

    def samples(self, index: Tensor | slice) -> Lookup:
        chosen = torch.arange(self.N, device=self.row.device)[index]
        # a sample may be chosen twice: every pair of a chosen place and a row of that sample
        place, m = (chosen[:, None] == self.sample[None, :]).nonzero(as_tuple=True)
        return replace(self, g=self.g[:, m], row=self.row[m], sample=place, N=len(chosen))

    def dense(self) -> Tensor:  # [V, N, *p]
        V, M, d = self.g.shape
        into = room((self.N * V * self.rows, d), self.g)
        out = self.g.new_zeros(self.N * V * self.rows, d) if into is None else into.zero_()
        column = torch.arange(V, device=self.row.device).unsqueeze(1)
        place = (self.sample * V + column) * self.rows + self.row  # [V, M]
        out = out.index_add_(0, place.reshape(-1), self.g.reshape(V * M, d))
        return out.reshape(self.N, V, *self.param).transpose(0, 1)

    def prepare(self, *, entries: bool) -> None:
        """Nothing is worth building."""

    def sum(self) -> Tensor:
        """[*p]: over samples and columns."""
        g = self.g[0] if self.V == 1 else self.g.sum(0)
        return g.new_zeros(self.rows, g.shape[1]).index_add_(0, self.row, g).reshape(self.param)

    def parted(self) -> bool:
        return False

    def merged(self) -> Lookup:
        """A row that a sample looked up twice is one number: summed before it is squared."""
        places, where = torch.unique(self.sample * self.rows + self.row, return_inverse=True)
        g = self.g.new_zeros(self.V, len(places), self.g.shape[2]).index_add(1, where, self.g)
        return replace(self, g=g, row=places % self.rows, sample=places // self.rows)

    def _quads(self, metric: Tensor, target: Tensor, size: int) -> Tensor:
        """The quadratic forms of the looked-up rows, added up in `size` places."""
        V, d = self.V, self.g.shape[2]
        total = self.g.new_zeros(size, d, dtype=torch.promote_types(self.g.dtype, metric.dtype))
        step = max(1, CHUNK // max(1, V * d))
        for k in range(0, len(self.row), step):
            here = slice(k, k + step)
            total = total.index_add(0, target[here], quad_rows(self.g[:, here], metric[self.sample[here]]))
        return total

    def quad(self, metric: Tensor) -> Tensor:  # -> [*p]
        one = self.merged()
        return one._quads(metric, one.row, self.rows).reshape(self.param)

    def quad_each(self, metric: Tensor) -> Tensor:  # -> [N, *p]
        one = self.merged()
        found = one._quads(metric, one.sample * self.rows + one.row, self.N * self.rows)
        return found.reshape(self.N, *self.param)

    def mix(self, R: Tensor) -> Lookup:
        return replace(self, g=weighed(self.g, R[self.sample]).to(self.g.dtype))

    def norms(self) -> Tensor:  # -> [V, N], squared
        one = self.merged()
        return self.g.new_zeros(self.V, self.N).index_add(1, one.sample, one.g.square().sum(2))

    def lengths(self) -> Tensor:  # -> [V, N]
        return root(self.norms())

    def times(self, X: Tensor) -> Tensor:  # [K, *p] -> [K, V, N]
        table = X.reshape(X.shape[0], self.rows, self.g.shape[2])
        met = torch.einsum("vmd,kmd->kvm", self.g, table[:, self.row])
        return met.new_zeros(X.shape[0], self.V, self.N).index_add(2, self.sample, met)

    def project(self, X: Tensor, Y: Tensor) -> Tensor:  # [K, r], [K, c] -> [K, V, N]
        d, (K, c) = self.g.shape[2], Y.shape
        entry = (self.row * d).unsqueeze(1) + torch.arange(d, device=self.row.device)  # [M, d]: in the parameter
        step = max(1, CHUNK // max(1, (self.V + d) * len(self.row)))
        found = []
        for k in range(0, K, step):
            x, y = X[k : k + step], Y[k : k + step]
            if d == c:
                met = torch.einsum("vmd,kd->kvm", self.g, y) * x[:, self.row].unsqueeze(1)
            else:
                met = torch.einsum("vmd,kmd->kvm", self.g, x[:, entry // c] * y[:, entry % c])
            found.append(met.new_zeros(len(x), self.V, self.N).index_add(2, self.sample, met))
        return torch.cat(found)

    def back(self, U: Tensor) -> Tensor:  # [K, V, N] -> [K, *p]
        g = torch.einsum("kvm,vmd->kmd", U[:, :, self.sample], self.g)
        out = g.new_zeros(U.shape[0], self.rows, self.g.shape[2]).index_add(1, self.row, g)
        return out.reshape(U.shape[0], *self.param)

    def each_gram(self, other: Lookup) -> Tensor:  # -> [N, V, V']
        one, two = self.merged(), other.merged()
        if one.g.shape[1:] != two.g.shape[1:] or not (
            torch.equal(one.row, two.row) and torch.equal(one.sample, two.sample)
        ):
            return Dense(self.dense()).each_gram(Dense(other.dense()))
        met = one.g.transpose(0, 1) @ two.g.permute(1, 2, 0)  # [M, V, V']
        return met.new_zeros(self.N, self.V, other.V).index_add(0, one.sample, met)

    def scaled_gram(self, S: Tensor) -> Tensor:  # S [*p] -> [N, V, V]
        one = self.merged()
        return one.each_gram(replace(one, g=one.g * S.reshape(self.rows, -1)[one.row]))

    def multiplied(self, A: Tensor, B: Tensor) -> Lookup | Dense:
        """By a Kronecker product A (x) B with A [rows] or [1, rows, rows] and B [1, d, d], both symmetric."""
        if A.dim() > 1:
            return self.rotated(A, B)
        return replace(self, g=(self.g @ B[0]) * A[self.row].unsqueeze(1))

    def add_gram(self, out: Tensor, other: Lookup) -> None:  # out [N, V, N', V']
        """Only pairs that looked up the same row meet."""
        d = self.g.shape[2]
        if self.rows != other.rows:
            Dense(self.dense()).add_gram(out, Dense(other.dense()))
            return
        one, two = self.merged(), other.merged()
        step = max(1, CHUNK // max(1, max(self.V * other.V, (self.V + other.V) * d)))
        for here, there in _pairs(one.row, two.row, self.rows, step):
            met = one.g[:, here].transpose(0, 1) @ two.g[:, there].permute(1, 2, 0)  # [pairs, V, V']
            out.transpose(1, 2).index_put_((one.sample[here], two.sample[there]), met, accumulate=True)

    def kron(self, metric: Tensor | None, *, reduce: bool) -> tuple[Tensor, Tensor]:
        """A, of which each lookup touches one diagonal entry: [rows], or with `reduce` (see `Outer.kron`) [rows, rows];
        and B [d, d]."""
        g, sample = self.g, self.sample
        if reduce:
            each = torch.zeros(self.N, self.rows, dtype=g.dtype, device=g.device)
            each = each.index_put((sample, self.row), g.new_ones(len(self.row)), accumulate=True)
            each = each / each.sum(1, keepdim=True).clamp(min=1)
            A = each.T @ each / max(1, self.N)
            g = g.new_zeros(self.V, self.N, g.shape[2]).index_add(1, sample, g)
            return A, summed_block(g, metric)
        A = torch.bincount(self.row, minlength=self.rows).to(g.dtype) / max(1, len(self.row))
        return A, summed_block(g, None if metric is None else metric[sample])

    def rotated(self, Q_A: Tensor | None, Q_B: Tensor) -> Lookup | Dense:
        """In another basis of rows Q_A [1, rows, rows] (None: the same) and of features Q_B [1, d, d]."""
        turned = replace(self, g=self.g.to(Q_B.dtype) @ Q_B[0])
        if Q_A is None:
            return turned
        return Dense(torch.einsum("vnrd,rs->vnsd", turned.dense(), Q_A[0]))

    def block(self, metric: Tensor | None) -> Tensor:  # -> [P, P]
        return summed_block(self.dense().reshape(self.V, self.N, self.param.numel()), metric)


def _pairs(a: Tensor, b: Tensor, rows: int, step: int) -> list[tuple[Tensor, Tensor]]:
    """Indices (k, l) of all pairs with a[k] == b[l], in chunks of about `step`."""
    order = torch.argsort(b)
    count = torch.bincount(b, minlength=rows)
    first = count.cumsum(0) - count
    each = count[a]  # how many partners a[k] has
    found = []
    ends = each.cumsum(0)
    start = 0
    while start < len(a):
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(ends, done + step, right=True)))
        k = torch.arange(start, min(stop, len(a)), device=a.device)
        left = k.repeat_interleave(each[k])
        place = torch.arange(len(left), device=a.device) - (each[k].cumsum(0) - each[k]).repeat_interleave(each[k])
        found.append((left, order[first[a[left]] + place]))
        start = stop
    return found
