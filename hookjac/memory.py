"""Memory for large tensors, kept for the next step.

Writing to fresh memory is most of the cost of a dense result: the system hands it out and zeroes it page by page, and
takes it back as soon as the tensor dies. PyTorch has a cache against that for GPUs, and none for CPUs; so large results
and columns on the CPU live in regions of ours, which come back when the tensor over them dies (nobody can still hold
it then) and serve the next of their size. Measured for [128, 10, 256, 784] in single precision: 220 ms fresh, 31 ms
used again. benchmarks/test_memory.py.

What was not used again for some backwards is returned to the system, and what exceeds a quarter of the machine's memory
at once. `empty_cache()` returns all. On other devices, and on systems without `mmap`, PyTorch allocates.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LARGE = 1 << 22  # bytes; below, the C library does not ask the system either (see `_teach_malloc`)
_KEPT_FOR = 3  # backwards without use, after which a region is returned

_able = hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANONYMOUS")


class _Pool:
    """Regions by size. List operations are atomic: a tensor may die in any thread, and while we are at work here."""

    def __init__(self) -> None:
        self.free: dict[int, list[tuple[mmap.mmap, int]]] = {}  # size -> regions, and when they came back
        self.now = 0  # backwards so far
        self.kept = self.used = self.most = 0  # bytes: free, handed out, and the most that ever was
        self.limit = _physical() // 4

    def take(self, size: int) -> mmap.mmap:
        self.used += size
        self.most = max(self.most, self.used)
        try:
            region, _ = self.free[size].pop()
        except (KeyError, IndexError):
            return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.kept -= size
        return region

    def give_back(self, region: mmap.mmap, size: int) -> None:
        self.used -= size
        if self.kept + size <= self.limit:
            self.kept += size
            self.free.setdefault(size, []).append((region, self.now))

    def turn(self, keep: int = _KEPT_FOR) -> None:
        """Another backward begins."""
        if not self.now:
            _teach_malloc()
        self.now += 1
        for size, regions in list(self.free.items()):
            while regions and regions[0][1] < self.now - keep:
                try:
                    regions.pop(0)
                except IndexError:
                    break
                self.kept -= size


def _physical() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _teach_malloc() -> None:
    """Let the C library keep what is freed, up to some 60 MB, as it does once a block of this size was freed.

    Until then it hands freed blocks of more than 128 kB back to the system, and pays for every page of the next one:
    16 times three temporaries of 1 MB took 2.4 ms, and 1 ms afterwards. Nothing is written here, so it costs nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


_POOL = _Pool()
turn = _POOL.turn


def empty_cache() -> None:
    """Return to the system what hookjac keeps of the CPU's memory for later steps (at most a quarter of it).

    Memory of tensors that are alive is not touched. What PyTorch keeps of a GPU's is `torch.cuda.empty_cache()`'s.
    """
    _POOL.turn(keep=-1)


def _size(nbytes: int) -> int:
    """Rounded up by an eighth at most, so that sizes that differ a little share regions."""
    step = max(1 << 12, 1 << max(0, nbytes.bit_length() - 4))
    return -(-nbytes // step) * step


def fresh(shape: Sequence[int], like: Tensor) -> Tensor:
    """[*shape], to be written to."""
    shape = torch.Size(shape)
    nbytes = shape.numel() * like.element_size()
    if not _able or nbytes < _LARGE or like.device.type != "cpu":
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    size = _size(nbytes)
    region = _POOL.take(size)
    holder: Any = (ctypes.c_char * size).from_buffer(region)
    weakref.finalize(holder, _POOL.give_back, region, size).atexit = False
    return torch.frombuffer(holder, dtype=like.dtype, count=shape.numel()).view(shape)


def alike(G: Tensor) -> Tensor:
    """As large as G [V, N, *t], in the same order: where the samples come first in memory, they do here, too."""
    if G.dim() > 2 and G.stride(0) < G.stride(1):
        V, N, *rest = G.shape
        return fresh((N, V, *rest), G).transpose(0, 1)
    return fresh(G.shape, G)


def room(shape: Sequence[int], like: Tensor, *others: Tensor) -> Tensor | None:
    """[*shape] for `out=`; None where the result of `like` and `others` shall carry a graph, which no `out=` can."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (like, *others)):
        return None
    return fresh(shape, like)


def available(device: torch.device) -> float:
    """Bytes that can still be allocated, as far as the system tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return float("inf")
    return min(_in_system(), _in_group()) + _POOL.kept


def _in_system() -> float:
    try:
        with open("/proc/meminfo") as file:
            return next(1024.0 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return float(_physical()) or float("inf")


def _in_group() -> float:
    """What a container may still use."""
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(limit) as most, open(usage) as now:
                return float(most.read()) - float(now.read())
        except (OSError, ValueError):
            continue
    return float("inf")


def said(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"


# What columns do most ----------------------------------------------------------------------------------------------


def scaled_by(G: Tensor, slope: Tensor) -> Tensor:
    """[V, *t] times [*t]."""
    if G.dtype != slope.dtype or G.shape[1:] != slope.shape:
        return G * slope
    if torch.is_grad_enabled() and (G.requires_grad or slope.requires_grad):
        return G * slope
    return torch.mul(G, slope, out=alike(G))


def above_zero(G: Tensor, t: Tensor) -> Tensor:
    """[V, *t] where t is not below or at zero, else zero: chosen, not multiplied, so that an infinite entry left out is
    no NaN. PyTorch's fastest kernel for that is the backward of a threshold (`where` takes ten times as long)."""
    if not G.is_floating_point() or G.dtype != t.dtype or (torch.is_grad_enabled() and G.requires_grad):
        return G.masked_fill(t <= 0, 0)
    kernel = torch.ops.aten.threshold_backward.grad_input
    return kernel(G, t.expand_as(G), 0, grad_input=alike(G))


def passed(G: Tensor, chosen: Tensor) -> Tensor:
    """[V, *t] where [*t] says so, else zero."""
    return above_zero(G, chosen.to(G.dtype)) if G.is_floating_point() else G.masked_fill(~chosen, 0)
