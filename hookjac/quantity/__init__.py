"""The quantities: a record each, by family. Importing this registers their names."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Sequence

from hookjac.quantity.approximate import HesScale, Hutchinson
from hookjac.quantity.curvature import (
    GGNBlock,
    GGNDiag,
    GGNDiagMC,
    GGNDiagSample,
    GGNSqrt,
    HessBlock,
    HessDiag,
    HessDiagSample,
)
from hookjac.quantity.gradient import GradSample, GradSampleGram, GradSampleNorm, GradSqSum, GradVar
from hookjac.quantity.jacobian import NTK, Jac
from hookjac.quantity.kronecker import KFAC
from hookjac.quantity.product import GGNMP, HessMP
from hookjac.quantity.projected import GradSampleProjected
from hookjac.quantity.record import Hessian, Quantity, Received

__all__ = [
    "GGNMP",
    "KFAC",
    "NTK",
    "GGNBlock",
    "GGNDiag",
    "GGNDiagMC",
    "GGNDiagSample",
    "GGNSqrt",
    "GradSample",
    "GradSampleGram",
    "GradSampleNorm",
    "GradSampleProjected",
    "GradSqSum",
    "GradVar",
    "HesScale",
    "HessBlock",
    "HessDiag",
    "HessDiagSample",
    "HessMP",
    "Hutchinson",
    "Jac",
    "Quantity",
    "Received",
    "names",
    "parse",
]

_QUANTITIES: dict[str, Callable[[], Quantity]] = {
    "grad_sample": GradSample,
    "grad_sample_norm": GradSampleNorm,
    "grad_sample_gram": GradSampleGram,
    "grad_sample_projected": GradSampleProjected,
    "grad_sq_sum": GradSqSum,
    "grad_var": GradVar,
    "jac": Jac,
    "ntk": NTK,
    "ggn_diag": GGNDiag,
    "ggn_diag_sample": GGNDiagSample,
    "ggn_diag_mc": GGNDiagMC,
    "ggn_sqrt": GGNSqrt,
    "ggn_block": GGNBlock,
    "hess_diag": HessDiag,
    "hess_diag_sample": HessDiagSample,
    "hess_block": HessBlock,
    "hutchinson": Hutchinson,
    "hesscale": HesScale,
    "kfac": KFAC,
    "ggn_mp": GGNMP,
    "hess_mp": HessMP,
}


def names() -> list[str]:
    return list(_QUANTITIES)


@functools.cache
def _usual(name: str) -> Quantity:
    """The quantity of that name without options: nothing in a record ever changes."""
    return _QUANTITIES[name]()


def parse(asked: Sequence[str | Quantity]) -> list[Quantity]:
    """Names and records to records; the three basic ones if nothing was asked."""
    found: dict[str, Quantity] = {}
    for item in asked or ("grad_sample", "jac", "hess_diag"):
        if isinstance(item, str):
            if item not in _QUANTITIES:
                near = difflib.get_close_matches(item, _QUANTITIES, n=1, cutoff=0.4)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"unknown quantity {item!r}{hint} Known: {', '.join(_QUANTITIES)}.")
            item = _usual(item)
        if not isinstance(item, Quantity):
            hint = f"; call it: {item.__name__}()" if item in _QUANTITIES.values() else ""
            raise TypeError(
                "a quantity is a name or a record such as hookjac.HessDiag(), "
                f"got {type(item).__name__}: {item!r}{hint}"
            )
        if item.name in found:
            raise ValueError(f"quantity {item.name!r} was asked for twice")
        found[item.name] = item
    if len(found) > 1 and len({q.wish for q in found.values() if isinstance(q.wish, Hessian)}) > 1:
        raise ValueError("quantities of the Hessian share one walk: give them the same road and flop_limit")
    return list(found.values())
