"""Per-sample gradients, Jacobians and curvature on every parameter of a PyTorch model, from one backward.

with hookjac.extend(model):
    loss_function(model(x), y).backward()
# p.grad_sample [N, *p], p.jac [N, *out, *p], p.hess_diag [*p]
"""

from typing import TYPE_CHECKING, Any

from hookjac import distributed as distributed
from hookjac import layers as layers
from hookjac import plot as plot
from hookjac import testing as testing
from hookjac.accumulate import accumulate
from hookjac.apart import demand_apart
from hookjac.check import check
from hookjac.errors import HookjacError
from hookjac.explain import explain
from hookjac.extend import extend
from hookjac.jacobian import Jacobian
from hookjac.kronecker import Kronecker, KroneckerEigen, KroneckerSum
from hookjac.memory import empty_cache
from hookjac.operator import Curvature
from hookjac.quantity import (
    GGNMP,
    KFAC,
    NTK,
    GGNBlock,
    GGNDiag,
    GGNDiagMC,
    GGNDiagSample,
    GGNSqrt,
    GradSample,
    GradSampleGram,
    GradSampleNorm,
    GradSampleProjected,
    GradSqSum,
    GradVar,
    HessBlock,
    HesScale,
    HessDiag,
    HessDiagSample,
    HessMP,
    Hutchinson,
    Jac,
    Quantity,
    Received,
)
from hookjac.quantity.record import Adds
from hookjac.rule import NodeRule, Rule, register
from hookjac.saving import Accumulated, Results, load, save
from hookjac.structured import JacTensor

__version__ = "0.1.0"

__all__ = [
    "GGNMP",
    "KFAC",
    "NTK",
    "Accumulated",
    "Adds",
    "Curvature",
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
    "HookjacError",
    "Hutchinson",
    "Jac",
    "JacTensor",
    "Jacobian",
    "Kronecker",
    "KroneckerEigen",
    "KroneckerSum",
    "NodeRule",
    "Quantity",
    "Received",
    "Results",
    "Rule",
    "accumulate",
    "check",
    "demand_apart",
    "empty_cache",
    "explain",
    "extend",
    "load",
    "register",
    "save",
]

if not TYPE_CHECKING:  # to a type checker every name would be there

    def __getattr__(name: str) -> Any:
        """`hookjac.optim` without an import of its own: it is written on all of the above, so it cannot come before."""
        if name == "optim":
            import importlib

            return importlib.import_module("hookjac.optim")
        raise AttributeError(f"module 'hookjac' has no attribute {name!r}")
