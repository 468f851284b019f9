"""What hookjac.factor claims of its formulas, each against the other way to the same numbers.

Run with timing: python -m pytest benchmarks/test_factor.py --benchmark-enable
N samples · V columns · L positions · o, i sides of the parameter
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import ROUNDING
from hookjac.factor import Outer, metric
from hookjac.factor.unfolded import Unfolded

Road = Callable[[], Tensor]


@pytest.fixture(autouse=True)
def single() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)


def timed(benchmark: Any, group: str, roads: dict[str, Road], road: str) -> None:
    """All roads agree with the first in single precision; then one is timed."""
    wanted = next(iter(roads.values()))()
    torch.testing.assert_close(roads[road](), wanted, rtol=0, atol=ROUNDING * wanted.abs().max().item())
    benchmark.group = group
    benchmark.pedantic(roads[road], rounds=20, warmup_rounds=3)


@pytest.mark.parametrize("road", ["matrix products", "einsum"])
@pytest.mark.parametrize(("M", "L", "d"), [(32, 1024, 27), (32, 256, 288), (160, 1024, 16), (320, 256, 64)])
def test_second_moments(benchmark: Any, M: int, L: int, d: int, road: str) -> None:
    """`metric.inner`, for the Kronecker factors of convolutions, whose positions lie side by side: patches of two
    layers, and ten columns at the outputs of two."""
    X = torch.randn(M, d, L).mT
    roads: dict[str, Road] = {
        "matrix products": lambda: metric.inner(X, X),
        "einsum": lambda: torch.einsum("nld,nle->de", X, X),
    }
    timed(benchmark, f"second moment of [{M}, {L}, {d}]", roads, road)


@pytest.mark.parametrize("road", ["convolution", "unfolded"])
def test_products_with_patches(benchmark: Any, road: str) -> None:
    """`Unfolded.products`: per-sample gradients of a convolution 32 -> 64 on 16 x 16, N=32."""
    x, g = torch.randn(32, 32, 16, 16), torch.randn(1, 32, 1, 256, 64)

    def seen() -> Unfolded:
        return Unfolded(x, 1, (16, 16), (3, 3), (1, 1), (1, 1), (1, 1))

    def convolved() -> Tensor:
        found = seen().products(g)
        if found is None:
            pytest.skip("PyTorch without oneDNN")
        return found[:, 0, 0]

    roads: dict[str, Road] = {
        "unfolded": lambda: torch.bmm(g[0, :, 0].mT, seen().patches[:, 0]),
        "convolution": convolved,
    }
    timed(benchmark, "products with patches", roads, road)


@pytest.mark.parametrize("road", ["in the cache", "all at once"])
@pytest.mark.parametrize("N", [128, 256])
def test_squares_in_the_cache(benchmark: Any, N: int, road: str) -> None:
    """`metric._CACHED`: squares of ten columns, some samples at a time."""
    A, uniform = torch.randn(10, N, 4096), torch.ones(()).expand(N, 10)
    roads: dict[str, Road] = {
        "in the cache": lambda: metric.quad_rows(A, uniform),
        "all at once": lambda: metric._weighed_squares(A, uniform, uniform[0, 0]),
    }
    timed(benchmark, f"weighed squares of [10, {N}, 4096]", roads, road)


@pytest.mark.parametrize("road", ["one number", "a metric"])
def test_columns_that_weigh_the_same(benchmark: Any, road: str) -> None:
    """Columns of a root, as `Head.columns` prefers them, against unit columns with a full metric."""
    A, M = torch.randn(10, 128, 256), torch.eye(10).repeat(128, 1, 1)
    one = torch.ones(()).expand(128, 10)
    roads: dict[str, Road] = {
        "one number": lambda: metric.quad_rows(A, one),
        "a metric": lambda: metric.quad_rows(A, M),
    }
    timed(benchmark, "quadratic forms of [10, 128, 256]", roads, road)


@pytest.mark.parametrize("road", ["broadcast", "bmm", "einsum"])
def test_outer_products(benchmark: Any, road: str) -> None:
    """`Outer._build` with one position."""
    g, a, into = torch.randn(64, 256), torch.randn(64, 784), torch.empty(64, 256, 784)
    roads: dict[str, Road] = {
        "broadcast": lambda: torch.mul(g[:, :, None], a[:, None, :], out=into),
        "bmm": lambda: torch.bmm(g[:, :, None], a[:, None, :], out=into),
        "einsum": lambda: torch.einsum("no,ni->noi", g, a),
    }
    timed(benchmark, "outer products [64, 256, 784]", roads, road)


@pytest.mark.parametrize("road", ["a product", "added up"])
@pytest.mark.parametrize("L", [4, 16, 64])
def test_sum_of_what_was_built(benchmark: Any, L: int, road: str) -> None:
    """`outer._POSITIONS`: the sum over samples, by a product over all positions or of what is built anyway."""
    g, a = torch.randn(1, 128, 1, L, 128), torch.randn(128, 1, L, 128)
    built = Outer(g, a).dense()
    roads: dict[str, Road] = {"a product": lambda: Outer(g, a).sum(), "added up": lambda: built.flatten(0, 1).sum(0)}
    timed(benchmark, f"sum over samples, {L} positions", roads, road)


@pytest.mark.parametrize("road", ["built", "positions against each other"])
@pytest.mark.parametrize("L", [4, 12, 36, 100])
def test_norms(benchmark: Any, L: int, road: str) -> None:
    """`outer._GRAM`: norms of samples from what is built, or from products of positions, o = i = 64."""
    g, a = torch.randn(1, 32, 1, L, 64), torch.randn(32, 1, L, 64)

    def crossed() -> Tensor:
        gg, aa = g @ g.transpose(3, 4), a @ a.transpose(2, 3)
        return torch.einsum("vnblm,nblm->vn", gg, aa)

    roads: dict[str, Road] = {
        "built": lambda: Outer(g, a).dense().flatten(2).square().sum(2),
        "positions against each other": crossed,
    }
    timed(benchmark, f"norms, {L} positions", roads, road)
