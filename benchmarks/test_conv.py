"""Columns through a strided convolution whose kernel has one entry, as residual networks have them at every step down.

Run with timing: python -m pytest benchmarks/test_conv.py --benchmark-enable
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import ROUNDING
from hookjac.graph import Node, pull


def ours(node: Node, G: Tensor) -> Tensor:
    with torch.no_grad():
        found = pull(node, {0: G}, [0])[0]
    assert found is not None
    return found


def pytorch(node: Any, G: Tensor) -> Tensor:
    """The data's part of the node's own formula, all columns in one call."""
    g = G.reshape(-1, *G.shape[2:])
    x, w = node._saved_input, node._saved_weight
    like = G.new_empty(len(g), *x.shape[1:])
    found = torch.ops.aten.convolution_backward(
        g, like, w, None, node._saved_stride, [0, 0], [1, 1], False, [0, 0], 1, [True, False, False]
    )[0]
    return found.view(len(G), *x.shape)  # type: ignore[no-any-return]


@pytest.mark.parametrize("road", [ours, pytorch], ids=["hookjac", "PyTorch"])
@pytest.mark.parametrize("sizes", [(16, 32, 64, 16), (16, 16, 32, 32)], ids=str)
def test_strided_kernels_of_one_entry(benchmark: Any, sizes: tuple[int, int, int, int], road: Any) -> None:
    torch.set_default_dtype(torch.float32)
    N, i, o, side = sizes
    y = F.conv2d(torch.randn(N, i, side, side).requires_grad_(), torch.randn(o, i, 1, 1).requires_grad_(), stride=2)
    G = torch.randn(10, *y.shape)
    wanted = pytorch(y.grad_fn, G)
    torch.testing.assert_close(ours(y.grad_fn, G), wanted, rtol=0, atol=ROUNDING * wanted.abs().max().item())
    benchmark.group = f"{N} images of {i} channels and {side} x {side}, {o} out"
    benchmark.pedantic(road, (y.grad_fn, G), rounds=20, iterations=3, warmup_rounds=2)
