"""Contributions of different kinds to one parameter: a table that is also the weight of the last layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hookjac.factor.dense import Dense
from hookjac.factor.lookup import Lookup
from hookjac.factor.metric import CHUNK, root
from hookjac.factor.outer import Outer


@dataclass(eq=False)
class Sum:
    """Their sum. What is not linear in it is built for a few samples at a time."""

    parts: tuple[Dense | Outer | Lookup, ...]

    @property
    def V(self) -> int:
        return self.parts[0].V

    @property
    def N(self) -> int:
        return self.parts[0].N

    @property
    def param(self) -> torch.Size:
        return self.parts[0].param

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for part in self.parts for t in part.tensors)

    def map(self, f: Callable[[Tensor], Tensor]) -> Sum:
        return Sum(tuple(part.map(f) for part in self.parts))

    def columns(self, index: Tensor | slice) -> Sum:
        return Sum(tuple(part.columns(index) for part in self.parts))

    def samples(self, index: Tensor | slice) -> Sum:
        return Sum(tuple(part.samples(index) for part in self.parts))

    def mix(self, R: Tensor) -> Sum:
        return Sum(tuple(part.mix(R) for part in self.parts))

    def _chunks(self) -> Iterator[tuple[slice, Dense]]:
        step = max(1, CHUNK // max(1, self.V * self.param.numel()))
        for n in range(0, self.N, step):
            here = slice(n, n + step)
            yield here, Dense(self.samples(here).dense(), fresh=True)

    def _zeros(self, *shape: int) -> Tensor:
        return self.parts[0].tensors[0].new_zeros(shape)

    def dense(self) -> Tensor:
        first, *others = self.parts
        return sum((part.dense() for part in others), first.dense())

    def prepare(self, *, entries: bool) -> None:
        """Nothing is kept."""

    def sum(self) -> Tensor:
        """[*p]: over samples and columns."""
        first, *others = self.parts
        return sum((part.sum() for part in others), first.sum())

    def parted(self) -> bool:
        return False

    def quad(self, metric: Tensor) -> Tensor:  # -> [*p]
        return sum((rows.quad(metric[n]) for n, rows in self._chunks()), self._zeros(*self.param))

    def quad_each(self, metric: Tensor) -> Tensor:  # -> [N, *p]
        found = [rows.quad_each(metric[n]) for n, rows in self._chunks()]
        return torch.cat(found) if found else self._zeros(0, *self.param)

    def norms(self) -> Tensor:  # -> [V, N], squared
        found = [rows.norms() for _, rows in self._chunks()]
        return torch.cat(found, 1) if found else self._zeros(self.V, 0)

    def lengths(self) -> Tensor:  # -> [V, N]
        return root(self.norms())

    def times(self, X: Tensor) -> Tensor:  # [K, *p] -> [K, V, N]
        first, *others = self.parts
        return sum((part.times(X) for part in others), first.times(X))

    def project(self, X: Tensor, Y: Tensor) -> Tensor:  # [K, r], [K, c] -> [K, V, N]
        first, *others = self.parts
        return sum((part.project(X, Y) for part in others), first.project(X, Y))

    def back(self, U: Tensor) -> Tensor:  # [K, V, N] -> [K, *p]
        first, *others = self.parts
        return sum((part.back(U) for part in others), first.back(U))

    def each_gram(self, other: Sum) -> Tensor:  # -> [N, V, V']
        found = [rows.each_gram(Dense(other.samples(n).dense())) for n, rows in self._chunks()]
        return torch.cat(found) if found else self._zeros(0, self.V, other.V)

    def scaled_gram(self, S: Tensor) -> Tensor:  # S [*p] -> [N, V, V]
        found = [rows.scaled_gram(S) for _, rows in self._chunks()]
        return torch.cat(found) if found else self._zeros(0, self.V, self.V)

    def add_gram(self, out: Tensor, other: Sum) -> None:  # out [N, V, N', V']
        for n, rows in self._chunks():
            for m, its in other._chunks():
                rows.add_gram(out[n, :, m], its)

    def block(self, metric: Tensor | None) -> Tensor:  # -> [P, P]
        P = self.param.numel()
        found = (rows.block(None if metric is None else metric[n]) for n, rows in self._chunks())
        return sum(found, self._zeros(P, P))
