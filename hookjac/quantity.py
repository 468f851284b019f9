"""The quantities: which columns each wants, and what it makes of what a parameter receives.

V columns · N samples · C entries of one sample's output · p the parameter's shape.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hookjac.factor import Dense, Factor, paired

Wanted = Literal["loss", "output", "ggn", "hessian"]
Road = Literal["auto", "columns", "features", "entries"]  # how a Hessian diagonal is found; see `curvature`


@dataclass(frozen=True)
class Received:
    """All that one parameter got from the columns a quantity asked for.

    pieces: for each group of columns the factor and, for curvature, its metric.
    direct: the gradient that reached the parameter through no sample (a penalty); bent: its second derivative's
    diagonal. done: the result itself, where a road other than columns found it. crossed: for a parameter whose uses
    feed each other, pairs whose product, summed over columns and samples, is half of what they add to the diagonal.
    """

    param: Tensor
    N: int
    out_shape: torch.Size
    pieces: Sequence[tuple[Factor, Tensor | None]] = ()
    direct: Tensor | None = None
    bent: Tensor | None = None
    done: Tensor | None = None
    crossed: Sequence[tuple[Factor, Factor]] = ()

    def zeros(self, *lead: int) -> Tensor:
        return torch.zeros((*lead, *self.param.shape), dtype=self.param.dtype, device=self.param.device)


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A name (and attribute), the columns it wants, and how it reduces what a parameter received.

    columns: "loss" (the loss gradient, V = 1), "output" (unit columns of the selected output, V = C), "ggn" (the
    same for all outputs the loss uses, with the loss's Hessian as metric), "hessian" (those and every bend).
    """

    name: str
    columns: Wanted
    reduce: Callable[[Received], Tensor]
    road: Road = "auto"
    flop_limit: float = math.inf

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or hasattr(Tensor, self.name):
            raise ValueError(f"a quantity's name becomes an attribute of parameters; {self.name!r} cannot")

    @property
    def curved(self) -> bool:
        """Does it need second derivatives?"""
        return self.columns in ("ggn", "hessian")


def GradSample(*, loss_reduction: Literal["sum", "mean"] = "sum") -> Quantity:
    """`p.grad_sample` [N, *p]: the gradient of the n-th summand of the loss, exact to rounding.

    It refers to the loss as it was reduced: `p.grad_sample.sum(0) == p.grad`. `loss_reduction="mean"` multiplies by
    N, the scale that Opacus expects under a mean loss. A part of the loss that passes through no sample (an L2
    penalty) is shared equally by the N samples. Units: loss / parameter. Cost: about one backward, and writing
    N times the parameters.
    """
    if loss_reduction not in ("sum", "mean"):
        raise ValueError(f"loss_reduction must be 'sum' or 'mean', got {loss_reduction!r}")

    def reduce(got: Received) -> Tensor:
        out = _own(got.pieces[0][0])[0] if got.pieces else got.zeros(got.N)
        if got.direct is not None:
            out = out + got.direct / got.N
        out = out * got.N if loss_reduction == "mean" else out
        return out.to(got.param.dtype).contiguous()  # autocast works in another

    return Quantity(name="grad_sample", columns="loss", reduce=reduce)


def Jac() -> Quantity:
    """`p.jac` [N, *out, *p]: d output[n] / d p of the model's (selected) output, exact to rounding.

    Independent of the loss. Units: output / parameter. Cost: C backwards, and writing N C times the parameters.
    """

    def reduce(got: Received) -> Tensor:
        if not got.pieces:
            return got.zeros(got.N, *got.out_shape)
        t = _own(got.pieces[0][0]).transpose(0, 1)
        return t.reshape(got.N, *got.out_shape, *got.param.shape).to(got.param.dtype).contiguous()

    return Quantity(name="jac", columns="output", reduce=reduce)


def GGNDiag() -> Quantity:
    """`p.ggn_diag` [*p]: the diagonal of the generalised Gauss-Newton matrix, exact to rounding.

    G = sum_n J_nᵀ H_n J_n with J_n the Jacobian of the model's outputs and H_n the Hessian of the reduced loss in
    them; penalties add their own Hessian. What is made of the selected output counts as loss; where the loss goes
    around all outputs, the first layer's output stands for one. For cross entropy of logits it is the Fisher
    information (Schraudolph 2002, Martens 2014). Units: loss / parameter². Cost: C backwards.
    """
    return Quantity(name="ggn_diag", columns="ggn", reduce=_quads)


def HessDiag(*, road: Road = "auto", flop_limit: float = 1e17) -> Quantity:
    """`p.hess_diag` [*p]: the diagonal of the Hessian of the loss that was backpropagated, exact to rounding.

    Not the row sums that `grad(grad(L), p, ones)` gives. road: how to find it; "auto" counts FLOPs and takes the
    cheapest of "columns" (closed forms where there are some), "features" and "entries" (Hessian-vector products,
    one for each output feature of a layer, or each entry of the parameter). A road that cannot serve a parameter
    is replaced by the next that can. flop_limit: the bill is known before anything walks, and one beyond this limit
    is refused (1e17 keeps a CPU busy for months). Units: loss / parameter². Cost: for piecewise-linear nets that of
    `ggn_diag`; else see `explain()`. Long work shows a progress bar where tqdm is installed.
    """
    if road not in ("auto", "columns", "features", "entries"):
        raise ValueError(f"road must be 'auto', 'columns', 'features' or 'entries', got {road!r}")
    if not flop_limit > 0:
        raise ValueError(f"flop_limit must be a positive number of FLOPs, got {flop_limit!r}")
    return Quantity(name="hess_diag", columns="hessian", reduce=_quads, road=road, flop_limit=flop_limit)


def _quads(got: Received) -> Tensor:
    if got.done is not None:
        return got.done
    out = got.zeros()
    for factor, metric in got.pieces:
        assert metric is not None
        out = out + factor.quad(metric)
    for lower, upper in got.crossed:
        out = out + 2 * paired(lower, upper)
    out = out if got.bent is None else out + got.bent
    return out.to(got.param.dtype)


def _own(factor: Factor) -> Tensor:
    """The dense contribution in memory of its own: results must not be views of each other or of the graph."""
    t = factor.dense()
    return t.clone(memory_format=torch.contiguous_format) if isinstance(factor, Dense) and not factor.fresh else t


_QUANTITIES: dict[str, Callable[[], Quantity]] = {
    "grad_sample": GradSample,
    "jac": Jac,
    "ggn_diag": GGNDiag,
    "hess_diag": HessDiag,
}


def names() -> list[str]:
    return list(_QUANTITIES)


def parse(asked: Sequence[str | Quantity]) -> list[Quantity]:
    """Names and records to records; the three basic ones if nothing was asked."""
    found: dict[str, Quantity] = {}
    for item in asked or ("grad_sample", "jac", "hess_diag"):
        if isinstance(item, str):
            if item not in _QUANTITIES:
                near = difflib.get_close_matches(item, _QUANTITIES, n=1, cutoff=0.4)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"unknown quantity {item!r}{hint} Known: {', '.join(_QUANTITIES)}.")
            item = _QUANTITIES[item]()
        if not isinstance(item, Quantity):
            hint = f"; call it: {item.__name__}()" if item in _QUANTITIES.values() else ""
            raise TypeError(
                "a quantity is a name or a record such as hookjac.HessDiag(), "
                f"got {type(item).__name__}: {item!r}{hint}"
            )
        if item.name in found:
            raise ValueError(f"quantity {item.name!r} was asked for twice")
        found[item.name] = item
    ways = {(q.road, q.flop_limit) for q in found.values() if q.columns == "hessian"}
    if len(ways) > 1:
        raise ValueError("quantities of the Hessian share one walk: give them the same road and flop_limit")
    return list(found.values())
