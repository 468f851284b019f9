"""Memory of the last step's result, taken over when nobody holds that result any more.

Writing to fresh memory is most of the cost of a dense result: the system hands out pages one by one and zeroes them.
A result that lies on a parameter when the next backward replaces it is about to be freed; if the parameter was its only
holder, the new one is written over it. It is a new tensor all the same: some clients mark tensor objects as used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _holders(held: dict[Any, Tensor], key: Any) -> tuple[Tensor, tuple[int, ...]]:
    """The tensor, taken out of the dict, and how often it and its memory are referred to: from Python, and from C++
    (a graph that saved it, views, arrays)."""
    old = held.pop(key)
    memory = old.untyped_storage()
    counts = (
        sys.getrefcount(old),
        old._use_count(),
        sys.getrefcount(memory),
        torch._C._storage_Use_Count(memory._cdata),  # type: ignore[attr-defined]
    )
    return old, counts


# of a tensor that nobody holds; what the interpreter itself holds differs between its versions
_NOBODY = _holders({0: torch.empty(1)}, 0)[1]


def emptied(held: dict[Any, Tensor], key: Any) -> Tensor | None:
    """A new tensor [entries] over the memory of held[key], which is gone after; None where somebody else holds it."""
    if type(held.get(key)) is not Tensor:
        held.pop(key, None)
        return None
    old, counts = _holders(held, key)
    if counts != _NOBODY or old.requires_grad or old.is_inference() or not old.is_contiguous():
        return None
    memory = old.untyped_storage()
    if old.device.type == "cpu" and memory.is_shared():
        return None
    size = memory.nbytes() // old.element_size()
    return torch.empty(0, dtype=old.dtype, device=old.device).set_(memory, 0, (size,), (1,))


def room(spare: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor | None:
    """[*shape] within it, for `out=`; None where it is too small or of another kind."""
    size = torch.Size(shape).numel()
    if spare is None or spare.dtype != like.dtype or spare.device != like.device or spare.numel() < size:
        return None
    return spare[:size].view(tuple(shape))
