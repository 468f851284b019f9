"""Products of a parameter's curvature with vectors. K vectors at once · p the parameter's shape."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hookjac.quantity.record import Graph, Quantity, Received


def _times(got: Received) -> Callable[[Tensor], Tensor]:
    assert got.times is not None
    return got.times


def GGNMP() -> Quantity:
    """`p.ggn_mp`: a function [K, *p] -> [K, *p], products with this parameter's block of the Gauss-Newton matrix.

    Also [*p] -> [*p]. Exact to rounding, matrix-free; penalties are part of it. `ext.ggn @ v` does the same for the
    whole model. It keeps the graph of the backward alive until you `del` it. Units: loss / parameter². Cost: three
    backwards for all K vectors together.
    """
    return Quantity(name="ggn_mp", columns=Graph("ggn"), reduce=_times)


def HessMP() -> Quantity:
    """`p.hess_mp`: a function [K, *p] -> [K, *p], products with this parameter's block of the Hessian.

    Also [*p] -> [*p]. Exact to rounding, matrix-free. `ext.hessian @ v` does the same for the whole model. It keeps the
    graph of the backward alive until you `del` it. Units: loss / parameter². Cost: two backwards for all K vectors
    together.
    """
    return Quantity(name="hess_mp", columns=Graph("hessian"), reduce=_times)
