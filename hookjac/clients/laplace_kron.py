"""Kronecker factors as laplace-torch adds them up: an entry for each parameter, two sides or its whole block.

N samples of the data, M of them in a batch · o/i output/input features · V columns · P entries of a parameter
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hookjac.errors import HookjacError, needed_by
from hookjac.factor import Dense, Factor, Lookup, Outer
from hookjac.kronecker import Kronecker
from hookjac.quantity import KFAC, Quantity, Received

LAPLACE = ("hookjac.clients.laplace", "laplace-torch>=0.3,<0.4")  # who needs it, what to install
with needed_by(*LAPLACE):
    from laplace.utils.matrix import Kron

LARGEST = 1 << 13  # entries of a matrix whose whole block is kept: half a gigabyte in float64
NAME = "laplace_kron"  # the attribute that a walk leaves on parameters

Fisher = Literal["mc", "exact", "empirical"]
Sharing = Literal["expand", "reduce"]


class Blocks(Kron):  # type: ignore[misc]
    """A `Kron` in which a matrix may have its whole block [P, P] where Laplace makes room for two sides.

    Laplace's own starts from zeros of two sides for each matrix, adds pair by pair, and drops what is left over.
    spare: of a batch of one sample, the blocks of parameters with sides. Such a batch does not tell what it looks up
    for its sample from what it looks up for all (positions, say), which has a block in larger batches.
    """

    def __init__(self, kfacs: Any, spare: Mapping[int, Callable[[], Tensor]] | None = None) -> None:
        super().__init__(kfacs)
        self.spare = dict(spare or {})

    def __add__(self, other: Kron) -> Blocks:
        if not isinstance(other, Kron) or len(other) != len(self):
            found = f"a Kron of {len(other)}" if isinstance(other, Kron) else type(other).__name__
            raise ValueError(f"a Kron of {len(self)} parameters cannot be added to {found}")
        return Blocks([self._sum(k, other) for k in range(len(self))])

    __radd__ = __add__

    def _sum(self, k: int, other: Kron) -> list[Tensor]:
        sums: Any = self.kfacs[k], other.kfacs[k]
        mine, its = sums
        if [t.shape for t in mine] == [t.shape for t in its]:
            return [s + t for s, t in zip(mine, its, strict=True)]
        for left, right in ((mine, its), (its, mine)):
            if not any(bool(t.any()) for t in left):  # Laplace's zeros, or of a batch that did not reach it
                return list(right)
        for one, block in ((self, its), (other, mine)):
            if len(block) == 1 and isinstance(one, Blocks) and k in one.spare:
                return [block[0] + one.spare[k]()]
        shapes = [[tuple(t.shape) for t in part] for part in sums]
        raise ValueError(
            f"parameter {k} has factors {shapes[0]} in some batches and {shapes[1]} in others. Let the first batch "
            "have more than one sample, or use hessian_structure='diag'."
        )

    def __mul__(self, scalar: float | Tensor) -> Blocks:
        spare = {k: lambda block=block: scalar * block() for k, block in self.spare.items()}
        return Blocks(super().__mul__(scalar).kfacs, spare)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Entry:
    """What one parameter has, sides or a block; what arrived [V, M, o] of all positions; and see `Blocks.spare`."""

    found: Kronecker | Tensor
    arrived: Tensor | None = None
    spare: Callable[[], Tensor] | None = None

    def scaled(self, M: int, N: int) -> list[Tensor]:
        """The side of the parameter's first axis adds up over batches, the other one becomes a mean over the data."""
        if isinstance(self.found, Tensor):
            return [self.found]
        K = self.found
        if K.A is None:
            return [K.B]
        A = torch.diag(K.A) if K.A.dim() == 1 else K.A
        return [A * M, K.B / N] if K.swapped else [K.B, A * (M / N)]


def entries(fisher: Fisher, samples: int, sharing: Sharing) -> Quantity:
    """`p.laplace_kron`, an `Entry`: the sides that `KFAC` gives, where there is one pair; else the exact block."""
    kfac = KFAC(fisher=fisher, samples=samples, sharing=sharing)

    def reduce(got: Received) -> Entry:
        if not got.pieces:
            return Entry(kfac.reduce(got))
        factor, metric = got.pieces[0]
        if _has_sides(factor, got.param):
            positions = isinstance(factor, Outer) and factor.g.shape[3] > 1 and sharing == "expand"
            arrived = factor.g.sum(3)[:, :, 0] if positions else None  # type: ignore[union-attr]
            spare = functools.partial(factor.block, metric) if got.N == 1 and got.param.numel() <= LARGEST else None
            return Entry(kfac.reduce(got), arrived, spare)
        if got.param.dim() != 1 and got.param.numel() > LARGEST:  # for a vector's block Laplace itself makes room
            raise HookjacError(
                f"a parameter of shape {tuple(got.param.shape)} has no one pair of Kronecker factors (it is used in "
                f"different ways, has groups, or no rule), and its whole block is too large: {LARGEST} entries are the "
                "limit. Freeze it, or use hessian_structure='diag' or subset_of_weights='last_layer'."
            )
        arrived = factor.t if isinstance(factor, Dense) and got.param.dim() == 1 else None
        return Entry(factor.block(metric).to(got.param.dtype), arrived)

    return replace(kfac, name=NAME, reduce=reduce, adds=None)


def _has_sides(factor: Factor, param: Tensor) -> bool:
    """Is it one Kronecker product, with sides where Laplace looks for them: the first axis, and all others?"""
    if isinstance(factor, Outer):
        first = factor.i if factor.swapped else factor.g.shape[4]
        return 2 <= param.dim() <= 4 and factor.g.shape[2] == 1 and first == param.shape[0]
    return isinstance(factor, Lookup) and param.dim() == 2 and factor.g.shape[2] == param.shape[1] > 1


def kron_of(model: nn.Module, params: Sequence[nn.Parameter], M: int, N: int) -> Blocks:
    """From the entries that a walk has left on parameters.

    Under "expand" a layer's bias takes positions for samples, as its weight does; a layer's, that is, which receives
    the same as the weight, summed over positions. Any other bias has its exact block.
    """
    found: dict[int, Entry] = {id(p): getattr(p, NAME) for p in params}
    for module in model.modules():
        weight, bias = (found.get(id(module._parameters.get(name))) for name in ("weight", "bias"))
        if weight is None or bias is None or weight.arrived is None or bias.arrived is None:
            continue
        if _same(weight.arrived, bias.arrived):
            assert isinstance(weight.found, Kronecker)
            found[id(module.bias)] = Entry(weight.found.B)
    ordered = [found[id(p)] for p in params]
    spare = {k: entry.spare for k, entry in enumerate(ordered) if entry.spare is not None}
    return Blocks([entry.scaled(M, N) for entry in ordered], spare)


def _same(s: Tensor, t: Tensor) -> bool:  # to rounding: both were added up, in orders of their own
    return s.shape == t.shape and bool((s - t).abs().max() <= 1e3 * torch.finfo(t.dtype).eps * t.abs().max())
