"""Matrix products by the faster of the two libraries that PyTorch carries on CPUs.

`torch.mm` in single precision goes to MKL, which uses AVX-512 on Intel's processors only; on others it stays with AVX2,
at half the speed. oneDNN, in the same wheel, uses what there is. Measured on an AMD EPYC with AVX-512, two threads, in
GFLOP/s, MKL against oneDNN: [1280, 256] x [256, 256] 208 and 459, [128, 784] x [784, 256] 195 and 399, [640, 64] x
[64, 64] 180 and 224, [64, 64] x [64, 64] 83 and 38. A left factor that is a transposed view costs oneDNN more: it takes
1.6 times as long as MKL for [640, 64].T x [640, 64], and half as long for [128, 256].T x [128, 784]. Both round as
single precision does. benchmarks/test_gemm.py.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from hookjac.memory import fresh

_WORTH = 1 << 21  # multiplications; below, oneDNN's preparations cost more than it saves
_WIDE = 256  # columns from which it is the faster one for a transposed left factor, too
_PIECE = 1 << 20  # entries of a result that are computed at once
_EACH = 1 << 22  # the same for one matrix of a batch, which MKL does in one call and oneDNN one by one


@functools.cache
def _onednn() -> Any:
    """Its product x @ w.mT for dense tensors, where that is the faster one; else None."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return None
    has = torch.cpu.get_capabilities()
    if not has.get("avx512_f") or "intel" in str(has.get("cpu_name", "intel")).lower():
        return None
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return getattr(packet, "default", None)


def _able(A: Tensor, B: Tensor) -> bool:
    return (
        A.dtype is torch.float32
        and B.dtype is torch.float32
        and _onednn() is not None
        and type(A) in _PLAIN
        and type(B) in _PLAIN
        and A.device.type == B.device.type == "cpu"
        and not (torch.is_grad_enabled() and (A.requires_grad or B.requires_grad))  # it has no derivative
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.get_float32_matmul_precision() == "highest"
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
    )


_PLAIN = {Tensor, torch.nn.Parameter}


def faster(multiplications: float, like: Tensor) -> bool:
    """Is a product of that size faster here than by `torch.mm`?"""
    return multiplications >= _WORTH and _able(like, like)


def mm(A: Tensor, B: Tensor, out: Tensor | None = None) -> Tensor:  # [m, k] @ [k, n]
    """`torch.mm`. `out` is memory that may be used."""
    (m, k), n = A.shape, B.shape[1]
    if m * k * n < _WORTH or (n < _WIDE and k > 1 and A.stride(1) != 1) or not _able(A, B):
        return torch.mm(A, B) if out is None else torch.mm(A, B, out=out)
    product, W = _onednn(), B.mT
    if not (B.is_contiguous() or W.is_contiguous()):
        W = B.contiguous().mT  # for other strides it has a reference implementation only, hundreds of times slower
    if m * n < _PIECE:
        found: Tensor = product(A, W, None, "none", [], "")
        return found
    # it knows no `out`, and to write to fresh memory would take longer than the product: a piece at a time is copied
    out = fresh((m, n), A) if out is None else out
    step = max(1, _PIECE // n)
    for start in range(0, m, step):
        out[start : start + step].copy_(product(A[start : start + step], W, None, "none", [], ""))
    return out


def rows(X: Tensor, W: Tensor, out: Tensor | None = None) -> Tensor:  # [..., k] @ [k, n] -> [..., n]
    """Every row of X times W."""
    if X.dim() == 2:
        return mm(X, W, out)
    k, n = W.shape
    flat = X.reshape(-1, k)
    found = mm(flat, W, None if out is None else out.view(-1, n))
    return found.view(*X.shape[:-1], n)


def left(W: Tensor, X: Tensor) -> Tensor:  # [m, k] @ [N, k, n] -> [N, m, n]
    """W times every matrix of X."""
    N, k, n = X.shape
    m = W.shape[0]
    if m * k * n < _EACH or not _able(W, X):
        return W @ X
    W = W.contiguous()
    out = fresh((N, m, n), X)
    for x, into in zip(X.unbind(0), out.unbind(0), strict=True):
        into.copy_(mm(W, x))
    return out
