"""The two libraries for matrix products that hookjac.gemm chooses between, on the shapes of its docstring.

Run with timing: python -m pytest benchmarks/test_gemm.py --benchmark-enable
Both must agree with a product in double precision before anything is timed. oneDNN's is faster where its CPU has
AVX-512 and is not Intel's; elsewhere hookjac stays with MKL, and these times say whether it should.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hookjac import gemm

SHAPES = [(1280, 256, 256), (128, 784, 256), (640, 64, 64), (64, 64, 64), (128, 128, 128), (160, 128, 64)]
Product = Callable[[Tensor, Tensor], Tensor]


def onednn(A: Tensor, B: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(A, B.mT, None, "none", [], "")  # type: ignore[no-any-return]


LIBRARIES: dict[str, Product] = {"MKL": torch.mm, "oneDNN": onednn, "hookjac": gemm.mm}


@pytest.fixture(autouse=True)
def single() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")


def checked(product: Product, A: Tensor, B: Tensor) -> None:
    wanted, scale = A.double() @ B.double(), (A.double().abs() @ B.double().abs()).max()
    assert (product(A, B) - wanted).abs().max() <= 4 * torch.finfo(torch.float32).eps * scale


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(benchmark: Any, shape: tuple[int, int, int], library: str) -> None:
    """Sizes above and below `gemm._WORTH`, where the preparations of oneDNN cost more than it saves."""
    m, k, n = shape
    A, B = torch.randn(m, k), torch.randn(k, n)
    checked(LIBRARIES[library], A, B)
    benchmark.group = f"[{m}, {k}] x [{k}, {n}]"
    benchmark.pedantic(LIBRARIES[library], (A, B), rounds=30, iterations=20, warmup_rounds=2)
    if benchmark.enabled:
        benchmark.extra_info["GFLOP/s"] = 2e-9 * m * k * n / benchmark.stats.stats.median


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", [(64, 640, 64), (128, 512, 128), (256, 128, 784)], ids=str)
def test_transposed_left_factors(benchmark: Any, shape: tuple[int, int, int], library: str) -> None:
    """As second moments have them: oneDNN lays the factor out anew, which only pays from `gemm._WIDE` columns on."""
    m, k, n = shape
    A, B = torch.randn(k, m).T, torch.randn(k, n)
    checked(LIBRARIES[library], A, B)
    benchmark.group = f"[{k}, {m}].T x [{k}, {n}]"
    benchmark.pedantic(LIBRARIES[library], (A, B), rounds=30, iterations=20, warmup_rounds=2)


@pytest.mark.parametrize("road", ["as it is", "copied"])
def test_strides(benchmark: Any, road: str) -> None:
    """Of neither order, oneDNN has a reference implementation only; `gemm.mm` copies first."""
    A, B = torch.randn(192, 160), torch.randn(320, 192)[::2, ::2]
    product = onednn if road == "as it is" else lambda A, B: onednn(A, B.contiguous())
    checked(product, A, B)
    benchmark.group = "strides of neither order"
    benchmark.pedantic(product, (A, B), rounds=10, warmup_rounds=1)


@pytest.mark.parametrize("road", ["oneDNN", "hookjac"])
def test_large_results(benchmark: Any, road: str) -> None:
    """oneDNN writes to fresh memory; `gemm.mm` computes a piece at a time and copies it to memory used before."""
    A, B = torch.randn(16384, 32), torch.randn(32, 1024)
    checked(LIBRARIES[road], A[:256], B)
    out = torch.empty(16384, 1024)
    product = onednn if road == "oneDNN" else lambda A, B: gemm.mm(A, B, out=out)
    benchmark.group = "a result of 64 MB"
    benchmark.pedantic(product, (A, B), rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("road", ["batched by MKL", "one by one"])
@pytest.mark.parametrize("size", [32, 128, 256])
def test_many_products(benchmark: Any, size: int, road: str) -> None:
    """Below `gemm._EACH`, one call of MKL for a batch beats one of oneDNN for each of its matrices."""
    W, X = torch.randn(size, size), torch.randn(64, size, size)

    def one_by_one() -> Tensor:
        out = torch.empty_like(X)
        for x, into in zip(X, out, strict=True):
            into.copy_(onednn(W, x))
        return out

    product = one_by_one if road == "one by one" else lambda: W @ X
    checked(lambda *_: product(), W, X)
    benchmark.group = f"64 products of [{size}, {size}]"
    benchmark.pedantic(product, rounds=20, warmup_rounds=2)
