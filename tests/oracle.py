"""What hookjac must equal: the plain float64 loops of `hookjac.testing`, and what "equal" means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from hookjac.testing import grad, hessian_diagonal, jacobian, loops, trainable

expected = loops

__all__ = ["RTOL", "close", "compare", "expected", "grad", "hessian_diagonal", "jacobian", "trainable"]

RTOL = 1e-10


def close(found: Tensor, wanted: Tensor, what: Any, rtol: float = RTOL) -> None:
    """Equal to rounding, relative to the largest entry; shapes and dtype too."""
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    assert found.dtype == wanted.dtype, f"{what}: {found.dtype}, expected {wanted.dtype}"
    top = wanted.abs().max().item() if wanted.numel() else 0.0
    error = (found - wanted).abs().max().item() if wanted.numel() else 0.0
    # absolute floor: a value that is zero by cancellation of terms of order one
    assert error <= rtol * top + 1e-13, f"{what}: off by {error:.3e} where the largest entry is {top:.3e}"


def compare(model: nn.Module, wanted: dict[str, dict[str, Tensor]], asked: Iterable[str]) -> None:
    """The results on the parameters of a model, against those of loops."""
    for name, p in trainable(model).items():
        for q in asked:
            close(getattr(p, q), wanted[name][q], (name, q))
