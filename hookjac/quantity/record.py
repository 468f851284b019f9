"""What a quantity is: a name, the columns it asks for, and what it makes of what a parameter receives from them.

V columns · N samples · C entries of one sample's output · p the parameter's shape, P its entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from hookjac import given
from hookjac.errors import HookjacError
from hookjac.factor import Factor, paired
from hookjac.graph import saved
from hookjac.products import Product
from hookjac.streamed import Streamed

Road = Literal["auto", "columns", "features", "entries"]  # how a Hessian is found; see `roads`


# Which columns travel. Quantities with equal wishes share them ---------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """The loss gradient: V = 1."""


@dataclass(frozen=True)
class Output:
    """Unit columns of the selected output: V = C, or those of some of its entries."""

    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class GGN:
    """Unit columns of all outputs that the loss uses, with the loss's Hessian in them as metric."""


@dataclass(frozen=True)
class Sampled:
    """Random columns whose second moment is that Hessian, each sample drawing its own: V = samples."""

    samples: int = 1
    generator: torch.Generator | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        given.counts(1, samples=self.samples)
        given.generator(self.generator)


@dataclass(frozen=True)
class Averaged:
    """As GGN, but the curvature is averaged over the samples at every step down (KFRA)."""


@dataclass(frozen=True)
class Diagonal:
    """As Hessian, but only the diagonal of the curvature goes on at every step down (HesScale)."""


@dataclass(frozen=True)
class Probes:
    """No columns: random signs for all parameters together, and their products with the Hessian."""

    samples: int = 1
    generator: torch.Generator | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        given.counts(1, samples=self.samples)
        given.generator(self.generator)


@dataclass(frozen=True)
class Hessian:
    """As GGN, and every bend of the network itself."""

    road: Road = "auto"
    flop_limit: float = math.inf

    def __post_init__(self) -> None:
        given.choice(("auto", "columns", "features", "entries"), road=self.road)
        limit = self.flop_limit
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
            raise ValueError(f"flop_limit must be a positive number of FLOPs, got {given.said(self.flop_limit)}")


@dataclass(frozen=True)
class Graph:
    """No columns: products by double backward, on a graph that is kept alive. curved: "ggn" or "hessian"."""

    curved: Literal["ggn", "hessian"]


Wish = Loss | Output | GGN | Sampled | Averaged | Diagonal | Probes | Hessian | Graph
_WISHES: dict[str, Callable[[], Wish]] = {"loss": Loss, "output": Output, "ggn": GGN, "hessian": Hessian}


# What came of them -----------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Received:
    """All that one parameter got from the columns a quantity asked for, of the samples it asked for.

    param: the parameter. N: how many samples the batch has; M: how many were asked for. out_shape: of one sample's
    selected output.
    pieces: for each group of columns the factor [V, M, *p] and, for curvature, its metric.
    direct: products with the second derivative of what reaches the parameter through no sample (a penalty), and
    `direct.head`, its gradient. product: products with the parameter's Hessian, where no columns give it.
    crossed: for a parameter whose uses feed each other, pairs whose product is half of what they add to the Hessian.
    times: products with the parameter's block, [K, *p] -> [K, *p], where those were asked for.
    probed: random signs and their products with the Hessian, [K, *p] each, where those were asked for.
    whole: the sum of the factor over all samples [*p], where that is known.
    noise: how far from zero rounding may have taken an eigenvalue of the metric.
    name: the parameter's in the model.
    """

    param: Tensor
    N: int
    M: int
    out_shape: torch.Size
    pieces: Sequence[tuple[Factor, Tensor | None]] = ()
    direct: Product | None = None
    product: Product | Streamed | None = None
    crossed: Sequence[tuple[Factor, Factor]] = ()
    times: Callable[[Tensor], Tensor] | None = None
    probed: tuple[Tensor, Tensor] | None = None
    whole: Tensor | None = None
    noise: Callable[[], float] = lambda: 0.0
    name: str = ""

    def sum(self) -> Tensor:
        """[*p]: what arrived of one group of columns, summed over the samples."""
        if self.whole is not None and self.M == self.N:
            return self.whole
        return self.zeros() if self.factor is None else self.factor.sum()

    @property
    def factor(self) -> Factor | None:
        """What arrived of the one group of columns that was asked for; None if nothing did."""
        return self.pieces[0][0] if self.pieces else None

    @property
    def share(self) -> float:
        """What these samples have of a penalty, which all samples share equally."""
        return self.M / self.N if self.N else 1.0

    def zeros(self, *lead: int) -> Tensor:
        """[*lead, *p] in the parameter's own precision."""
        return self.numbers(*lead, *self.param.shape)

    def numbers(self, *shape: int) -> Tensor:
        """[*shape] of zeros, in the parameter's own precision."""
        return torch.zeros(shape, dtype=self.param.dtype, device=self.param.device)

    def columns(self) -> Tensor:
        """[V, M, *p]: the one group of columns as a dense tensor; each sample has its share of a penalty."""
        factor = self.factor
        out = self.zeros(1, self.M) if factor is None else factor.dense()
        return out if self.direct is None else out + saved(self.direct.head) / self.N

    def diagonal(self) -> Tensor:
        """[*p]: the diagonal of the curvature."""
        found = [factor.quad(metric) for factor, metric in self.pieces if metric is not None]
        found += [2 * paired(lower, upper) for lower, upper in self.crossed]
        out = sum(found[1:], found[0]) if found else self.zeros()
        return self._with(out, lambda product: product.diagonal(), self.share)

    def diagonals(self) -> Tensor:
        """[M, *p]: the diagonal of each sample's own curvature."""
        found = [factor.quad_each(metric) for factor, metric in self.pieces if metric is not None]
        found += [2 * (lower.dense() * upper.dense()).sum(0) for lower, upper in self.crossed]
        if self.product is not None:
            found.append(self.product.diagonals())
        if self.direct is not None:
            found.append((self.direct.diagonal() / self.N).expand(self.M, *self.param.shape))
        return sum(found[1:], found[0]).contiguous() if found else self.zeros(self.M)

    def block(self) -> Tensor:
        """[P, P]: the curvature itself."""
        P = self.param.numel()
        out = torch.zeros(P, P, dtype=self.param.dtype, device=self.param.device)
        for factor, metric in self.pieces:
            out = out + factor.block(metric)
        for lower, upper in self.crossed:
            A, B = (f.dense().reshape(f.V * f.N, P) for f in (lower, upper))
            out = out + A.T @ B + B.T @ A
        return self._with(out, lambda product: product.matrix(), self.share)

    def _with(self, out: Tensor, what: Callable[[Product | Streamed], Tensor], share: float) -> Tensor:
        if self.product is not None:
            out = out + what(self.product)
        return out if self.direct is None else out + what(self.direct) * share


@dataclass(frozen=True, kw_only=True)
class Adds:
    """How the results of batches make up that of all of them: statistics that are summed.

    powers: for each statistic, the power of the loss in it: 1 if twice the loss doubles it, 0 if it does not depend on
        the loss. By it a mean over a batch becomes a mean over the data. Repeated for more statistics.
    measure: from a `Received` to what is split; None: the quantity's own result.
    split: that, as statistics and a note (JSON) of what else is needed; "empty" in the note: nothing arrived.
    join: from the note, the sums and the number of samples to the result.
    label: options that make results of two such quantities different things.
    """

    powers: tuple[int, ...] = (1,)
    measure: Callable[[Received], Any] | None = None
    split: Callable[[Any], tuple[list[Tensor], dict[str, Any]]] = lambda found: ([found], {})
    join: Callable[[dict[str, Any], list[Tensor], int], Any] = lambda note, sums, N: sums[0]
    label: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.powers, tuple) or not self.powers:
            raise TypeError(
                f"powers must be a tuple of integers, one for each statistic; got {given.said(self.powers)}"
            )
        given.counts(0, **{f"power {k} of powers": power for k, power in enumerate(self.powers)})
        given.function(split=self.split, join=self.join)
        given.function(optional=True, measure=self.measure)
        if not isinstance(self.label, str):
            raise TypeError(f"label must be a text, got {given.said(self.label)}")


@dataclass(frozen=True, kw_only=True, repr=False)
class Quantity:
    """A name (and attribute), the columns it wants, and how it reduces what a parameter received.

    name: where the result goes: `p.<name>`.
    columns: "loss" (the loss gradient, V = 1), "output" (unit columns of the selected output, V = C), "ggn" (the same
        for all outputs the loss uses, with the loss's Hessian as metric), "hessian" (those and every bend); or one of
        the records that these names stand for, with options.
    reduce: from a `Received` to the result.
    subsample: numbers of the samples it is about; None: all.
    full: it needs `Received.block` of the Hessian, not its diagonal only.
    each: what it asks of each sample's gradient, its "norm" or its "entries": where a layer has several positions, and
        it pays, gradients of single samples are built once for all who ask.
    whole: it looks at the sum over the samples, too.
    entries: `(samples, C, P)`: how many entries the result for one parameter has, where these may be too many; what
        cannot fit is refused before anything is allocated. instead: what to ask for then.
    adds: how `accumulate` makes up the result of a data set, and `group=` that of all ranks; None: results of batches
        do not add up.
    single: the result belongs to single samples: with `group=` it stays on their rank.
    opens: told the trainable parameters by their names when a block opens, to look at what it was given for them.
    """

    name: str
    columns: Wish | str
    reduce: Callable[[Received], Any]
    subsample: tuple[int, ...] | None = None
    full: bool = False
    each: Literal["norm", "entries"] | None = None
    whole: bool = False
    entries: Callable[[int, int, int], float] | None = None
    instead: str = ""
    adds: Adds | None = None
    single: bool = False
    opens: Callable[[Mapping[str, Tensor]], None] | None = None
    wish: Wish = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier() or hasattr(Tensor, self.name):
            raise ValueError(f"a quantity's name becomes an attribute of parameters; {self.name!r:.80} cannot")
        if isinstance(self.columns, str) and self.columns in _WISHES:
            object.__setattr__(self, "columns", _WISHES[self.columns]())
        if not isinstance(self.columns, Wish):
            raise ValueError(f"columns must be one of {', '.join(map(repr, _WISHES))}, got {given.said(self.columns)}")
        object.__setattr__(self, "wish", self.columns)
        object.__setattr__(self, "subsample", chosen(self.subsample))
        given.function(reduce=self.reduce)
        given.function(optional=True, entries=self.entries, opens=self.opens)
        given.flag(full=self.full, whole=self.whole, single=self.single)
        if self.each is not None:
            given.choice(("norm", "entries"), each=self.each)
        if self.adds is not None and not isinstance(self.adds, Adds):
            raise TypeError(f"adds must be a hookjac.Adds, or None; got {given.said(self.adds)}")
        if not isinstance(self.instead, str):
            raise TypeError(f"instead must be a text, got {given.said(self.instead)}")

    def __repr__(self) -> str:
        picked = "" if self.subsample is None else f", subsample={list(self.subsample)}"
        return f"Quantity(name={self.name!r}, columns={self.columns}{picked})"

    @property
    def curved(self) -> bool:
        """Does it need second derivatives?"""
        return not isinstance(self.columns, (Loss, Output))


def chosen(samples: Sequence[int] | Tensor | None, what: str = "subsample") -> tuple[int, ...] | None:
    """`subsample=` and `outputs=` as given, as indices."""
    if samples is None:
        return None
    listed: Any = samples.tolist() if hasattr(samples, "tolist") and not getattr(samples, "is_meta", False) else samples
    found = list(listed) if isinstance(listed, (Sequence, range)) and not isinstance(listed, (str, bytes)) else None
    if found and all(isinstance(n, bool) for n in found):
        raise ValueError(f"{what}: expected indices of samples or outputs, got a mask; pass mask.nonzero()[:, 0]")
    if not found or not all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= 0 for n in found):
        raise ValueError(
            f"{what}: expected a list (or a 1-D tensor) of indices of samples or outputs, at least one, counted from 0 "
            f"and not negative; got {samples!r:.80}"
        )
    return tuple(int(n) for n in found)


def demand_samples(q: Quantity, N: int) -> None:
    if q.subsample is not None and max(q.subsample) >= N:
        raise HookjacError(f"{q.name}: sample {max(q.subsample)} was asked for, but the batch has {N} (from 0).")
