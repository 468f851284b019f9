"""Outer products: what a weight receives that is multiplied with a layer's input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hookjac import gemm
from hookjac.factor.dense import Dense
from hookjac.factor.metric import (
    CHUNK,
    Columns,
    inner,
    is_unit,
    quad_rows,
    root,
    shared,
    summed_block,
    uniform,
    weighed,
)
from hookjac.factor.unfolded import Unfolded
from hookjac.memory import room

_GRAM = 2.5  # what a product of positions costs, in those of building; it leaves the sum over samples to be done
_ALONE = 1 << 20  # multiplications from which a sample's products are worth a call of their own
_POSITIONS = 16  # from so many on, adding up what was built is faster than a product over all positions


@dataclass(eq=False)
class Outer:
    """sum over positions of g aᵀ, block by block: what a weight that is multiplied with `a` receives.

    B blocks (the groups of a convolution; else 1). The parameter is [B o, i], or [B i, o] if `swapped`, in memory
    order; `shape` is its own shape where that has other axes.
    """

    g: Tensor  # [V, N, B, L, o]
    inputs: Tensor | Unfolded  # [N, B, L, i]
    shape: torch.Size | None = None
    swapped: bool = False
    built: Tensor | None = field(init=False, default=None)
    source: Columns | None = field(init=False, default=None)  # where g is what arrived at the layer's output itself

    @property
    def V(self) -> int:
        return self.g.shape[0]

    @property
    def N(self) -> int:
        return self.g.shape[1]

    @property
    def param(self) -> torch.Size:
        if self.shape is not None:
            return self.shape
        B, o, i = self.g.shape[2], self.g.shape[4], self.i
        return torch.Size((B * i, o) if self.swapped else (B * o, i))

    @property
    def i(self) -> int:
        return self.inputs.shape[3] if isinstance(self.inputs, Tensor) else self.inputs.features

    @property
    def a(self) -> Tensor:  # [N, B, L, i]
        return self.inputs if isinstance(self.inputs, Tensor) else self.inputs.patches

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.g, self.inputs if isinstance(self.inputs, Tensor) else self.inputs.x)

    def map(self, f: Callable[[Tensor], Tensor]) -> Outer:
        inputs = self.inputs
        return replace(self, g=f(self.g), inputs=f(inputs) if isinstance(inputs, Tensor) else inputs.map(f))

    def columns(self, index: Tensor | slice) -> Outer:
        return replace(self, g=self.g[index])

    def samples(self, index: Tensor | slice) -> Outer:
        inputs = self.inputs
        its = inputs[index] if isinstance(inputs, Tensor) else inputs.samples(index)
        return replace(self, g=self.g[:, index], inputs=its)

    def _fold(self, t: Tensor) -> Tensor:  # [..., B, o, i] -> [..., *p]
        t = t.transpose(-1, -2) if self.swapped else t
        return t.reshape(*t.shape[:-3], *self.param)

    def _unfold(self, t: Tensor) -> Tensor:  # [K, *p] -> [K, B, o, i]
        B, o, i = self.g.shape[2], self.g.shape[4], self.i
        t = t.reshape(t.shape[0], B, *((i, o) if self.swapped else (o, i)))
        return t.transpose(2, 3) if self.swapped else t

    def _chunks(self) -> Iterator[slice]:
        step = max(1, CHUNK // max(1, self.V * self.param.numel()))
        return (slice(n, n + step) for n in range(0, self.N, step))

    def prepare(self, *, entries: bool) -> None:
        """Several things will be asked of single samples' products, norms and sums or every entry: build them once,
        where they are small, and where that is cheaper than positions against each other."""
        _, _, _, L, o = self.g.shape
        if L == 1 or self.built is not None or self.V * self.N * self.param.numel() > CHUNK:
            return
        if entries or _GRAM * L * (o + self.i) >= o * self.i:
            self.built = self._build()

    def dense(self) -> Tensor:
        """[V, N, *p]; lies in memory with N first, as results are handed out."""
        return self._build() if self.built is None else self.built

    def sum(self) -> Tensor:
        """[*p]: over samples and columns."""
        V, N, B, L, o = self.g.shape
        if V == B == L == 1 and self.shape is None:
            g, a = self.g.view(N, o), self.a.view(N, -1)
            return gemm.mm(a.T, g) if self.swapped else gemm.mm(g.T, a)
        if self.built is not None and L >= _POSITIONS:
            return self.built.flatten(0, 1).sum(0)
        g = self.g[0] if V == 1 else self.g.sum(0)
        left, right = (self.a, g) if self.swapped else (g, self.a)
        parts = [inner(s, t) for s, t in zip(left.unbind(1), right.unbind(1), strict=True)]
        return _stacked(parts).reshape(self.param)

    def _build(self) -> Tensor:
        if not isinstance(self.inputs, Tensor) and (made := self.inputs.products(self.g)) is not None:
            return made.reshape(self.N, self.V, *self.param).transpose(0, 1)
        g, a = self.g.transpose(0, 1), self.a.unsqueeze(1)  # [N, V, B, L, o], [N, 1, B, L, i]
        left, right = (a, g) if self.swapped else (g, a)
        N, V, B, L, _ = g.shape
        r, c = left.shape[4], right.shape[4]
        into = room((N, V, B, r, c), g, a)
        if into is not None and L > 1 and right.stride(3) == 1 and c < r and not self.swapped:
            return self._build_turned(into)  # positions lie side by side
        if L == 1:  # a broadcast product beats einsum and bmm for plain outer products
            out = torch.mul(left[:, :, :, 0, :, None], right[:, :, :, 0, None, :], out=into)
        elif V > 1 and B == 1 and into is not None and V * L * r * c >= _ALONE:  # without laying columns out anew
            for mine, its, there in zip(left[:, :, 0].mT, right[:, :, 0], into[:, :, 0], strict=True):
                torch.bmm(mine.expand(V, r, L), its.expand(V, L, c), out=there)
            out = into
        elif V > 1 and B == 1 and not self.swapped:  # all columns at once, the inputs in one copy
            rows = left[:, :, 0].transpose(2, 3).reshape(N, V * r, L)
            out = torch.bmm(rows, a[:, 0, 0], out=None if into is None else into.view(N, V * r, c))
            out = out.view(N, V, B, r, c)
        else:
            out = torch.matmul(left.transpose(3, 4), right, out=into)
        return out.reshape(N, V, *self.param).transpose(0, 1)

    def _build_turned(self, out: Tensor) -> Tensor:  # [N, V, B, o, i], written to
        """The transposed products, a column at a time: MKL does better with the shorter side first, and what a column
        takes stays in the cache."""
        V, N, B, L, o = self.g.shape
        a = self.a.reshape(N * B, L, -1).mT
        for g, into in zip(self.g, out.unbind(1), strict=True):
            into.copy_(torch.bmm(a, g.reshape(N * B, L, o)).view(N, B, -1, o).mT)
        return out.view(N, V, *self.param).transpose(0, 1)

    def parted(self) -> bool:
        return self.g.shape[3] == 1 and is_unit(self.g[:, :, :, 0].flatten(2))

    def quad(self, metric: Tensor) -> Tensor:  # -> [*p]
        _, N, B, L, o = self.g.shape
        if L == 1:
            rows = self._rows(metric).view(N, B, o)
            squares = self.a[:, :, 0].square().to(rows.dtype)
            return self._fold(
                _stacked([gemm.mm(r.T, s) for r, s in zip(rows.unbind(1), squares.unbind(1), strict=True)])
            )
        if self.built is not None:
            return Dense(self.built).quad(metric)
        weight = uniform(metric)
        if weight is not None and self.g.dtype == metric.dtype:
            return self._sum_of_squares() * weight
        total: Tensor | None = None
        for n in self._chunks():
            found = Dense(self.samples(n).dense()).quad(metric[n])
            total = found if total is None else total + found
        return self._fold(self.a.new_zeros(B, o, self.a.shape[3])) if total is None else total

    def _rows(self, metric: Tensor) -> Tensor:  # -> [N, B o], of one position
        if self.source is not None:
            return self.source.rows(metric)
        return quad_rows(self.g[:, :, :, 0].flatten(2), metric).contiguous()

    def _sum_of_squares(self) -> Tensor:  # -> [*p]
        """Over all columns and samples. One column at a time: what is built stays in the cache."""
        total: Tensor | None = None
        step = max(1, (CHUNK >> 2) // max(1, self.param.numel()))
        for n in range(0, self.N, step):
            some = self.samples(slice(n, n + step))
            for v in range(self.V):
                found = some.columns(slice(v, v + 1))._build()[0].square_().sum(0)
                total = found if total is None else total.add_(found)
        return self.g.new_zeros(self.param) if total is None else total

    def quad_each(self, metric: Tensor) -> Tensor:  # -> [N, *p]
        _, N, B, L, o = self.g.shape
        if L == 1:
            rows = self._rows(metric).view(N, B, o)
            return self._fold(rows.unsqueeze(3) * self.a[:, :, 0].square().unsqueeze(2).to(rows.dtype))
        parts = [Dense(self.samples(n).dense()).quad_each(metric[n]) for n in self._chunks()]
        return torch.cat(parts) if parts else self.a.new_zeros(0, *self.param)

    def mix(self, R: Tensor) -> Outer:
        return replace(self, g=weighed(self.g, R).to(self.g.dtype))  # products want both sides in one type

    def norms(self) -> Tensor:  # -> [V, N], squared
        if self.built is not None:
            return Dense(self.built).norms()
        V, _, _, L, o = self.g.shape
        i = self.i
        if L == 1:
            return torch.einsum("vnb,nb->vn", self.g[:, :, :, 0].square().sum(3), self.a[:, :, 0].square().sum(2))
        if L * (V * o + i) < V * o * i:  # positions against each other
            gg = self.g @ self.g.transpose(3, 4)  # [V, N, B, L, L]
            aa = self.a @ self.a.transpose(2, 3)
            return torch.einsum("vnblm,nblm->vn", gg, aa)
        parts = [Dense(self.samples(n).dense()).norms() for n in self._chunks()]
        return torch.cat(parts, 1) if parts else self.g.new_zeros(V, 0)

    def lengths(self) -> Tensor:  # -> [V, N]
        V, N, B, L, _ = self.g.shape
        if self.built is not None:
            return Dense(self.built).lengths()
        if B * L != 1:
            return root(self.norms())
        length = torch.linalg.vector_norm
        return (length(self.g, dim=4) * length(self.a, dim=3)).view(V, N)

    def times(self, X: Tensor) -> Tensor:  # [K, *p] -> [K, V, N]
        met = torch.einsum("kboi,nbli->knblo", self._unfold(X), self.a)
        return torch.einsum("knblo,vnblo->kvn", met, self.g)

    def project(self, X: Tensor, Y: Tensor) -> Tensor:  # [K, r], [K, c] -> [K, V, N]
        (V, N, B, L, o), i, K = self.g.shape, self.i, len(X)
        if self.built is not None:
            return Dense(self.built).project(X, Y)
        apart = float(L * B * K) * (V * o + i)  # both sides by themselves, or what is built of them: the cheaper one
        if X.shape[1] != B * (i if self.swapped else o) or float(V * B * o * i) * (L + K) < apart:
            parts = [Dense(self.samples(n).dense()).project(X, Y) for n in self._chunks()]
            return torch.cat([self.g.new_zeros(K, V, 0), *parts], 2)
        x, y = X.view(K, B, -1), Y.unsqueeze(1).expand(K, B, Y.shape[1])
        (x, y) = (y, x) if self.swapped else (x, y)
        step = max(1, CHUNK // max(1, (V + 1) * B * L * K))
        parts = [self.g.new_zeros(K, V, 0)]
        for n in range(0, N, step):
            met = torch.einsum("vnblo,kbo->vnblk", self.g[:, n : n + step], x)
            parts.append(torch.einsum("vnblk,nblk->kvn", met, torch.einsum("nbli,kbi->nblk", self.a[n : n + step], y)))
        return torch.cat(parts, 2)

    def back(self, U: Tensor) -> Tensor:  # [K, V, N] -> [K, *p]
        V, N, B, L, o = self.g.shape
        if V == 1:
            g = U[:, 0, :, None, None, None] * self.g  # [K, N, B, L, o]
        else:
            g = (U.permute(2, 0, 1) @ self.g.transpose(0, 1).reshape(N, V, B * L * o)).view(N, len(U), B, L, o)
            g = g.transpose(0, 1)
        found = [_stacked([inner(s, t) for s, t in zip(k.unbind(1), self.a.unbind(1), strict=True)]) for k in g]
        return self._fold(torch.stack(found))

    def each_gram(self, other: Outer) -> Tensor:  # -> [N, V, V']
        V, N, _, L, o = self.g.shape
        V2, L2, i = other.V, other.g.shape[3], self.i
        if self.alike(other) and L * L2 * (V * V2 * o + i) <= (L * V + L2 * V2) * o * i + V * V2 * o * i:
            gg = torch.einsum("vnblo,wnbmo->nvwblm", self.g, other.g)
            return torch.einsum("nvwblm,nblm->nvw", gg, torch.einsum("nbli,nbmi->nblm", self.a, other.a))
        parts = [Dense(self.samples(n).dense()).each_gram(Dense(other.samples(n).dense())) for n in self._chunks()]
        return torch.cat(parts) if parts else self.a.new_zeros(N, V, V2)

    def scaled_gram(self, S: Tensor) -> Tensor:  # S [*p] -> [N, V, V]
        if self.g.shape[3] == 1:
            weight = torch.einsum("nbi,boi->nbo", self.a[:, :, 0].square(), self._unfold(S.unsqueeze(0))[0])
            g = self.g[:, :, :, 0]
            return torch.einsum("vnbo,wnbo,nbo->nvw", g, g, weight)
        parts = [Dense(self.samples(n).dense()).scaled_gram(S) for n in self._chunks()]
        return torch.cat(parts) if parts else self.a.new_zeros(0, self.V, self.V)

    def own_gram(self) -> Tensor | None:  # -> [N, V, N, V]
        """`add_gram` with itself, in new memory, where the layer's columns say most of it; else None."""
        gg = None if self.source is None else self.source.gram()
        if gg is None:
            return None
        a = self.a[:, 0, 0]  # [N, i]
        aa = gemm.mm(a, a.T)
        return torch.mul(gg, aa[:, None, :, None], out=room(gg.shape, gg, aa))

    def add_gram(self, out: Tensor, other: Outer) -> None:  # out [N, V, N', V']
        _, N, B, L, o = self.g.shape
        V2, N2, B2, L2, _ = other.g.shape
        i = self.i
        # positions against each other, or the products themselves: whichever is fewer
        pairs = float(N * L) * (N2 * L2) * (self.V * V2 * o + i)
        built = float(N * L * self.V + N2 * L2 * V2 + N * self.V * N2 * V2) * o * i
        if (self.swapped, B) != (other.swapped, B2) or (L * L2 > 1 and built < pairs):
            self._add_built_gram(out, other)
            return
        step = max(1, CHUNK // max(1, self.V * B * L * N2 * V2 * L2))
        both_shared = shared(self.g) and shared(other.g)
        its_g = (other.g[:, :1] if both_shared else other.g).permute(2, 4, 1, 0, 3).flatten(2)  # [B, o, N' V' L']
        its_a = other.a.permute(1, 3, 0, 2).flatten(2)  # [B, i, N' L']
        for start in range(0, N, step):
            here = slice(start, start + step)
            g = self.g[:, :1] if both_shared else self.g[:, here]
            g, a = g.permute(2, 1, 0, 3, 4), self.a[here].transpose(0, 1)  # [B, n, V, L, o], [B, n, L, i]
            gg = _products(g.flatten(1, 3), its_g).view(*g.shape[:4], -1, V2, L2)
            aa = _products(a.flatten(1, 2), its_a).view(*a.shape[:3], N2, L2)
            part = gg * aa[:, :, None, :, :, None, :]  # [B, n, V, L, N', V', L']
            out[here].add_(part[0, :, :, 0, :, :, 0] if B * L * L2 == 1 else part.sum((0, 3, 6)))

    def _add_built_gram(self, out: Tensor, other: Outer) -> None:
        """From the products themselves: of all samples, or of some at a time against some others."""
        if max(self.N * self.V, other.N * other.V) * self.param.numel() <= 4 * CHUNK:
            rows = Dense(self.dense())
            rows.add_gram(out, rows if other is self else Dense(other.dense()))
            return
        for n in self._chunks():
            rows = Dense(self.samples(n).dense())
            for m in other._chunks():
                if other is not self or m.start > n.start:
                    rows.add_gram(out[n, :, m], Dense(other.samples(m).dense()))
                elif m.start == n.start:
                    rows.add_gram(out[n, :, m], rows)
        if other is self:  # the other half
            for n in self._chunks():
                out[n.stop :, :, n] += out[n, :, n.stop :].permute(2, 3, 0, 1)

    def block(self, metric: Tensor | None) -> Tensor:  # -> [P, P]
        total: Tensor | None = None
        for n in self._chunks():
            rows = self.samples(n).dense().flatten(2)
            found = summed_block(rows, None if metric is None else metric[n])
            total = found if total is None else total + found
        P = self.param.numel()
        return self.a.new_zeros(P, P) if total is None else total

    def kron(self, metric: Tensor | None, *, reduce: bool) -> tuple[Tensor, Tensor]:
        """A [B, i, i] and B [B, o, o] of the Kronecker-factored curvature.

        Positions are samples of their own; with `reduce` there is one for each sample, with the mean of their inputs
        and the sum of their columns (Eschenhagen et al. 2023).
        """
        g, a = (self.g.sum(3, keepdim=True), self.a.mean(2, keepdim=True)) if reduce else (self.g, self.a)
        rows = max(1, a.shape[0] * a.shape[2])
        A = _stacked([inner(t, t, 1 / rows) for t in a.unbind(1)])
        if self.source is not None:
            return A, self.source.block(metric).unsqueeze(0)
        weight = uniform(metric)
        if weight is not None and weight.dtype == g.dtype:
            return A, _stacked([inner(t, t).mul_(weight) for t in g.unbind(2)])
        W = weighed(g, metric)
        return A, _stacked([inner(s, t) for s, t in zip(W.unbind(2), g.to(W.dtype).unbind(2), strict=True)])

    def multiplied(self, A: Tensor, B: Tensor) -> Outer:
        """By a Kronecker product B (x) A with A [B, i, i] and B [B, o, o], both symmetric."""
        return self.rotated(A, B)

    def rotated(self, Q_A: Tensor | None, Q_B: Tensor) -> Outer:
        """In another basis of inputs Q_A [B, i, i] and outputs Q_B [B, o, o]."""
        a = self.a.to(Q_B.dtype)
        if Q_A is not None:
            a = torch.einsum("nbli,bij->nblj", a, Q_A)
        return replace(self, g=torch.einsum("vnblo,bop->vnblp", self.g.to(Q_B.dtype), Q_B), inputs=a)

    def of_one_position(self, G: Tensor) -> bool:
        """Are its columns the tensor G [V, N, o] itself? Not so if positions are samples elsewhere, or axes swapped."""
        g = self.g
        if g.shape != (G.shape[0], G.shape[1], 1, 1, G.shape[2]) or g.data_ptr() != G.data_ptr():
            return False
        return (g.stride(0), g.stride(1), g.stride(4)) == G.stride()

    def alike(self, other: Outer) -> bool:
        """Do both lay the parameter out in the same way, so that positions can be put side by side?"""
        mine, its = self.g, other.g
        return (self.shape, self.swapped, mine.shape[2]) == (other.shape, other.swapped, its.shape[2])

    def turned(self) -> Outer | None:
        """The same for the transposed parameter; None where that is no matrix."""
        if self.shape is not None or self.g.shape[2] != 1:
            return None
        return Outer(self.g, self.inputs, None, not self.swapped)

    def padded(self, axis: int, before: int, after: int) -> Outer | None:
        """The same for a parameter of which this one was a slice; None where that is no matrix."""
        if self.shape is not None or self.g.shape[2] != 1:
            return None
        pad = torch.nn.functional.pad
        if (axis == 0) != self.swapped:
            return replace(self, g=pad(self.g, (before, after)))
        return replace(self, inputs=pad(self.a, (before, after)))


def _products(X: Tensor, Y: Tensor) -> Tensor:  # [B, m, k], [B, k, n] -> [B, m, n]
    return _stacked([gemm.mm(x, y) for x, y in zip(X.unbind(0), Y.unbind(0), strict=True)])


def _stacked(parts: list[Tensor]) -> Tensor:
    """Without a copy where there is one."""
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)
