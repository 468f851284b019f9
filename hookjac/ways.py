"""Closed forms of the way that columns take through one kind of autograd node.

Any node can be called on columns one by one, or batched by vmap (`graph.pull`), and that is exact. But a node computes
what all its inputs get, the weight's gradient for every column included, and vmap has its price. A way says, for one
input, what V columns become. N samples · V columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Way = Callable[[Any, Tensor, torch.Size], Tensor]

_WAYS: dict[str, Mapping[int, Way]] = {}


def way(*nodes: str, into: Mapping[int, Way]) -> None:
    """into: number of an input (as in `next_functions`) -> `(node, G [V, *out], shape of that input) -> [V, *in]`.

    For nodes with one output, and real numbers. What was broadcast may be left as it is: it will be summed.
    """
    for name in nodes:
        if name in _WAYS:
            raise ValueError(f"{name} has a way already")
        _WAYS[name] = into


Join = Callable[[Any, Mapping[int, Tensor], torch.Size], Tensor]

_JOINS: dict[str, Join] = {}


def join(*nodes: str, by: Join) -> None:
    """For nodes of one input and several outputs.

    by: `(node, number of an output -> G [V, *out], shape of the input) -> [V, *in]`; outputs at which nothing arrived
    are missing.
    """
    for name in nodes:
        if name in _JOINS or name in _WAYS:
            raise ValueError(f"{name} has a way already")
        _JOINS[name] = by


def joins(node: Any) -> Join | None:
    return _JOINS.get(type(node).__name__)


def ways(node: Any) -> Mapping[int, Way] | None:
    return _WAYS.get(type(node).__name__)
