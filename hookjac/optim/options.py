"""Options of optimizers, looked at where they come in."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

_MOST = 1 << 63  # PyTorch's own limit


def numbers(**found: Any) -> None:
    """Finite and not negative; numbers, or tensors of one."""
    for name, value in found.items():
        if not (_is_number(value) and 0 <= value < math.inf):
            raise ValueError(f"{name} must be a number that is not negative, got {value!r:.80}")


def positive(**found: Any) -> None:
    """Finite and above zero."""
    for name, value in found.items():
        if not (_is_number(value) and 0 < value < math.inf):
            raise ValueError(f"{name} must be positive, got {value!r:.80}")


def fractions(**found: Any) -> None:
    """From 0 to below 1."""
    for name, value in found.items():
        if not (_is_number(value) and 0 <= value < 1):
            raise ValueError(f"{name} must be at least 0 and less than 1, got {value!r:.80}")


def counts(least: int, **found: Any) -> None:
    """Integers that are not less."""
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) < _MOST:
            raise ValueError(f"{name} must be an integer from {least} on, got {value!r:.80}")


def flags(**found: Any) -> None:
    """True or False."""
    for name, value in found.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r:.80}")


def one_of(known: tuple[str, ...], **found: Any) -> None:
    """Words that are known."""
    for name, value in found.items():
        if not isinstance(value, str) or value not in known:
            listed = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
            raise ValueError(f"{name} must be {listed}, got {value!r:.80}")


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype != torch.bool and not (value.is_complex() or value.is_meta)
    if isinstance(value, Integral):
        return not isinstance(value, bool) and abs(int(value)) < _MOST
    return isinstance(value, Real)
