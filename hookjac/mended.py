"""Nodes whose backward PyTorch differentiates wrongly (seen on torch 2.13), with formulas where it does so rightly.

`torch._weight_norm` keeps the norms that it computed as constants, so that its second derivative lacks what they owe to
v: `gradgradcheck` fails. First derivatives are right, and stay PyTorch's own to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Node = Any
Grads = Sequence[Tensor | None]


def _weight_norm(node: Node) -> Callable[[Grads], list[Tensor | None]]:
    """w = g v / |v|, with the norm over all axes but one."""
    v, g, dim = node._saved_v, node._saved_g, node._saved_dim
    axes = [k for k in range(v.dim()) if k != dim]
    before = v._version, g._version

    def backward(grads: Grads) -> list[Tensor | None]:
        (G,) = grads
        if G is None:
            return [None, None]
        if (v._version, g._version) != before:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"v {tuple(v.shape)} or g {tuple(g.shape)} of a weight norm"
            )
        size = torch.linalg.vector_norm(v, dim=axes, keepdim=True)
        inner = (v * G).sum(axes, keepdim=True) / size
        return [g / size * (G - inner / size * v), inner]

    return backward


# from a node to its backward; what that holds are inputs, for a hook that held its own node would keep it for ever
_FORMULAS: dict[str, Callable[[Node], Callable[[Grads], list[Tensor | None]]]] = {
    "WeightNormInterfaceBackward0": _weight_norm,
}


def formula(node: Node) -> Callable[[Grads], list[Tensor | None]] | None:
    """The node's backward in operations that can be differentiated; None where its own is right."""
    found = _FORMULAS.get(type(node).__name__)
    return None if found is None else found(node)


def mend(node: Node) -> None:
    """Let backwards through this node be differentiated rightly from now on. Plain ones stay as they are."""
    if type(node).__name__ not in _FORMULAS or _MENDED in node.metadata:
        return
    node.metadata[_MENDED] = True
    backward = _FORMULAS[type(node).__name__](node)

    def differentiable(found: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]) -> Any:
        if not torch.is_grad_enabled():
            return None
        return tuple(None if f is None else t for f, t in zip(found, backward(grads), strict=True))

    node.register_hook(differentiable)


_MENDED = "hookjac: mended"
