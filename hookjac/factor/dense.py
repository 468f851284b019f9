"""A contribution that has no structure we know of: the tensor itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hookjac import gemm
from hookjac.factor.metric import CHUNK, Columns, is_unit, quad_rows, root, shared, summed_block, weighed


@dataclass(eq=False)
class Dense:
    """The contribution itself, [V, N, *p]. `fresh`: nobody else holds its memory."""

    t: Tensor
    fresh: bool = False
    source: Columns | None = field(init=False, default=None)  # where t is what arrived at the layer's output itself

    @property
    def V(self) -> int:
        return self.t.shape[0]

    @property
    def N(self) -> int:
        return self.t.shape[1]

    @property
    def param(self) -> torch.Size:
        return self.t.shape[2:]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.t,)

    def map(self, f: Callable[[Tensor], Tensor]) -> Dense:
        return replace(self, t=f(self.t))

    def columns(self, index: Tensor | slice) -> Dense:
        return Dense(self.t[index])

    def samples(self, index: Tensor | slice) -> Dense:
        return Dense(self.t[:, index])

    def _flat(self) -> Tensor:  # [V, N, P], keeping a shared sample axis shared
        V, N, P = self.V, self.N, self.param.numel()
        return self.t[:, :1].reshape(V, 1, P).expand(V, N, P) if shared(self.t) else self.t.reshape(V, N, P)

    def _chunks(self) -> Iterator[slice]:
        step = max(1, CHUNK // max(1, self.V * self.param.numel()))
        return (slice(n, n + step) for n in range(0, self.N, step))

    def dense(self) -> Tensor:
        return self.t

    def prepare(self, *, entries: bool) -> None:
        """It is built."""

    def sum(self) -> Tensor:
        """[*p]: over samples and columns."""
        return self.t[0].sum(0) if self.V == 1 else self.t.flatten(0, 1).sum(0)

    def parted(self) -> bool:
        """Of unit columns: does each entry receive from one of them only? Then a metric's diagonal is all it needs."""
        return is_unit(self._flat())

    def quad(self, metric: Tensor) -> Tensor:  # -> [*p]
        if self.source is not None:
            return self.source.rows(metric).sum(0)
        A = self._flat()
        total = A.new_zeros(A.shape[2], dtype=torch.promote_types(A.dtype, metric.dtype))
        for n in self._chunks():
            total = total + quad_rows(A[:, n], metric[n]).sum(0)
        return total.reshape(self.param)

    def quad_each(self, metric: Tensor) -> Tensor:  # -> [N, *p]
        return quad_rows(self._flat(), metric).reshape(self.N, *self.param)

    def mix(self, R: Tensor) -> Dense:
        return Dense(weighed(self.t, R).to(self.t.dtype), fresh=True)

    def norms(self) -> Tensor:  # -> [V, N], squared
        if torch.is_grad_enabled() and self.t.requires_grad:  # a root has no derivative at zero
            return self._flat().square().sum(2)
        return self.lengths().square()

    def lengths(self) -> Tensor:  # -> [V, N]
        t = self.t if self.t.dim() == 3 and self.t.stride(1) else self._flat()
        if torch.is_grad_enabled() and t.requires_grad:
            return root(t.square().sum(2))
        return torch.linalg.vector_norm(t, dim=2)

    def times(self, X: Tensor) -> Tensor:  # [K, *p] -> [K, V, N]
        return torch.einsum("vnp,kp->kvn", self._flat(), X.reshape(X.shape[0], self.param.numel()))

    def project(self, X: Tensor, Y: Tensor) -> Tensor:  # [K, r], [K, c] -> [K, V, N]
        A = self._flat().reshape(self.V, self.N, X.shape[1], Y.shape[1])
        if X.shape[1] > Y.shape[1]:  # the longer side first: what is left over takes less memory
            A, X, Y = A.mT, Y, X
        step = max(1, CHUNK // max(1, self.V * X.numel()))
        parts = [A.new_zeros(len(X), self.V, 0)]
        for n in range(0, self.N, step):
            parts.append(torch.einsum("vnrk,kr->kvn", A[:, n : n + step] @ Y.T, X))
        return torch.cat(parts, 2)

    def back(self, U: Tensor) -> Tensor:  # [K, V, N] -> [K, *p]
        out = U.reshape(U.shape[0], self.V * self.N) @ self._flat().reshape(self.V * self.N, self.param.numel())
        return out.reshape(U.shape[0], *self.param)

    def each_gram(self, other: Dense) -> Tensor:  # -> [N, V, V']
        return self._flat().transpose(0, 1) @ other._flat().permute(1, 2, 0)

    def scaled_gram(self, S: Tensor) -> Tensor:  # S [*p] -> [N, V, V]
        A = self._flat()
        return (A * S.reshape(-1)).transpose(0, 1) @ A.permute(1, 2, 0)

    def own_gram(self) -> Tensor | None:  # -> [N, V, N, V]
        """`add_gram` with itself, in new memory, where the layer's columns say it; else None."""
        found = None if self.source is None else self.source.gram()
        return None if found is None else found.clone(memory_format=torch.contiguous_format)

    def add_gram(self, out: Tensor, other: Dense) -> None:  # out [N, V, N', V']
        A = self._flat().transpose(0, 1)
        B = A if other is self else other._flat().transpose(0, 1)
        B = B.reshape(other.N * other.V, other.param.numel())
        step = max(1, CHUNK // max(1, self.V * B.shape[0]))
        for n in range(0, self.N, step):
            rows = A[n : n + step]
            part = gemm.mm(rows.reshape(rows.shape[0] * self.V, B.shape[1]), B.T)
            out[n : n + step].add_(part.view(rows.shape[0], self.V, other.N, other.V))

    def block(self, metric: Tensor | None) -> Tensor:  # -> [P, P]
        return summed_block(self._flat(), metric) if self.source is None else self.source.block(metric)
