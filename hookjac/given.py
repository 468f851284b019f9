"""What was given as an argument: looked at where it comes in, and refused by its name."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def flag(**given: Any) -> None:
    """True or False: what is merely true may be a mistake."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {said(value)}")


def counts(least: int, **given: Any) -> None:
    """Integers that are not less."""
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) < _MOST:
            raise ValueError(f"{name} must be {_NUMBERS.get(least, f'an integer from {least} on')}, got {said(value)}")


def numbers(**given: Any) -> None:
    """Finite numbers that are not negative, or tensors of one."""
    for name, value in given.items():
        if not is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number that is not negative, got {said(value)}")


def positive(**given: Any) -> None:
    """Finite numbers above zero, or tensors of one."""
    for name, value in given.items():
        if not is_number(value) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {said(value)}")


def fractions(**given: Any) -> None:
    """Numbers from 0 to below 1."""
    for name, value in given.items():
        if not is_number(value) or not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and less than 1, got {said(value)}")


def is_number(value: Any) -> bool:
    """A real number that PyTorch can calculate with, or a tensor of one that has a value."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype != torch.bool and not (value.is_complex() or value.is_meta)
    if isinstance(value, Integral):
        return not isinstance(value, bool) and abs(int(value)) < _MOST
    return isinstance(value, Real)


def choice(known: tuple[str, ...], **given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, str) or value not in known:
            listed = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
            raise ValueError(f"{name} must be {listed}, got {said(value)}")


def function(optional: bool = False, **given: Any) -> None:
    for name, value in given.items():
        if not callable(value) and not (optional and value is None):
            raise TypeError(f"{name} must be a function{', or None' if optional else ''}; got {said(value)}")


def generator(value: Any) -> None:
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {said(value)}")


def model(who: str, value: Any) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{who} expects a torch.nn.Module, got {said(value)}")


def loss(who: str, value: Any) -> None:
    """What a function of the user's returned: one number, as a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{who} must return the loss as a tensor, got {said(value)}")
    if value.numel() != 1:
        raise ValueError(f"{who} must return the loss as one number, got {said(value)}: take its mean or its sum")


def path(name: str, value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)) or isinstance(os.fspath(value), bytes):
        raise TypeError(f"{name} must be a path, got {said(value)}")
    return Path(value)


def tensor(name: str, value: Any, like: Tensor) -> None:
    """Of the type and on the device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {said(value)}")
    if value.dtype != like.dtype or value.device != like.device:
        raise TypeError(
            f"{name} must be of {like.dtype} on {like.device}, got {value.dtype} on {value.device}; convert it with "
            f"{name}.to({like.dtype}), say"
        )


def real(name: str, value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Real numbers on that device, converted to that type."""
    if value.is_complex() or value.device != device:
        raise TypeError(f"{name} must be real, and on {device}; got {said(value)}")
    return value.to(dtype)


def vectors(value: Any, size: int) -> Tensor:
    """[size] or [size, K] -> [K, size]: what an operator with that many columns is multiplied with."""
    if not isinstance(value, Tensor):
        raise TypeError(f"expected a tensor [{size}] or [{size}, K], got {type(value).__name__}")
    if value.dim() not in (1, 2) or value.shape[0] != size:
        raise ValueError(f"expected a vector [{size}] or vectors [{size}, K], got {tuple(value.shape)}")
    return (value.unsqueeze(1) if value.dim() == 1 else value).T


def sequence(name: str, value: Any, what: str) -> None:
    """A list or a tuple: a tensor would be taken row by row, a text letter by letter."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list or a tuple of {what}, got {said(value)}")


def mapping(name: str, value: Any, kind: type) -> None:
    """Of names to things of that kind; not empty."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of names to {kind.__name__}s, got {said(value)}")
    if not value:
        raise ValueError(f"{name} must have one {kind.__name__} at least, got none")
    for key, one in value.items():
        if not isinstance(one, kind):
            raise TypeError(f"{name} must hold {kind.__name__}s, got {said(one)} for {key!r}")


def said(value: Any) -> str:
    """What was found, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype} on {value.device}"
    if isinstance(value, (int, float, str, bytes, list, tuple)) or value is None:
        return f"{value!r:.80}"
    return f"{type(value).__name__}: {value!r:.80}"


_MOST = 1 << 63  # PyTorch's own limit
_NUMBERS = {0: "an integer that is not negative", 1: "a positive integer"}
