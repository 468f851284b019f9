"""Memory for large results. Writing to fresh memory is most of their cost: the system hands out and zeroes pages.

Two ways around that. A result that lies on a parameter when the next backward replaces it is about to be freed: if the
parameter was its only holder, the new one is written over it (a new tensor all the same: some clients mark tensor
objects as used). And where memory must be fresh, Linux is asked for large pages, which it hands out 512 at a time.
Measured for [128, 10, 256, 784] in single precision: 200 ms fresh, 88 with large pages, 63 used again.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
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
        old._use_count(),  # type: ignore[attr-defined]
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


def handed_out(t: Tensor) -> Tensor:
    """A tensor of its own over the same memory: a view would keep its base, and the next step would find that held."""
    if t._base is None or t.requires_grad:
        return t
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(
        t.untyped_storage(), t.storage_offset(), t.shape, t.stride()
    )


_LARGE = 1 << 22  # bytes, from which on large pages pay
_PAGE = 1 << 12
_MADV_HUGEPAGE = 14


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        madvise: Any = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    madvise.argtypes, madvise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return madvise  # type: ignore[no-any-return]


def fresh(shape: Sequence[int], like: Tensor) -> Tensor:
    """[*shape] of memory that was never written to, in large pages where the system has some."""
    t = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    if t.nbytes >= _LARGE and t.device.type == "cpu" and (advise := _advise()) is not None:
        start = -(-t.data_ptr() // _PAGE) * _PAGE
        # advice: where it is not taken, nothing changes
        advise(start, (t.data_ptr() + t.nbytes) // _PAGE * _PAGE - start, _MADV_HUGEPAGE)
    return t


def room(spare: Tensor | None, shape: Sequence[int], like: Tensor, *others: Tensor) -> Tensor | None:
    """[*shape] for `out=`: within `spare` if it is large enough and of the same kind, else fresh.

    None where the result of `like` and `others` shall carry a graph, which no `out=` can.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (like, *others)):
        return None
    size = torch.Size(shape).numel()
    if spare is None or spare.dtype != like.dtype or spare.device != like.device or spare.numel() < size:
        return fresh(shape, like)
    return spare[:size].view(tuple(shape))


# What columns do most, into memory in large pages ------------------------------------------------------------------


def scaled_by(G: Tensor, slope: Tensor) -> Tensor:
    """[V, *t] times [*t]."""
    if G.dtype != slope.dtype or G.shape[1:] != slope.shape:
        return G * slope
    return torch.mul(G, slope, out=room(None, G.shape, G, slope))


def passed(G: Tensor, chosen: Tensor) -> Tensor:
    """[V, *t] where [*t] says so, else zero: chosen, not multiplied, so that an infinite entry left out is no NaN.

    PyTorch's fastest kernel for that is the backward of a threshold (`where` and `masked_fill` take six times as long).
    """
    if not G.is_floating_point() or (torch.is_grad_enabled() and G.requires_grad) or G.shape[1:] != chosen.shape:
        return G.masked_fill(~chosen, 0)
    kernel = torch.ops.aten.threshold_backward.grad_input
    return kernel(G, chosen.to(G.dtype).expand_as(G), 0, grad_input=room(None, G.shape, G))
