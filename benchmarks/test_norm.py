"""Columns through normalisations: several in one call of the kernel, or one after the other (`hookjac.layers.norm`).

Run with timing: python -m pytest benchmarks/test_norm.py --benchmark-enable
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import ROUNDING
from hookjac.graph import Node, pull
from hookjac.layers import norm

COLUMNS = 10


def through(node: Node, G: Tensor) -> Tensor:
    with torch.no_grad():
        found = pull(node, {0: G}, [0])[0]
    assert found is not None
    return found


@pytest.mark.parametrize("together", [True, False], ids=["together", "one by one"])
@pytest.mark.parametrize("shape", [(16, 32, 64), (16, 16, 32, 32), (16, 64, 8, 8), (2, 8, 8, 8)], ids=str)
def test_columns_through_a_norm(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], together: bool
) -> None:
    torch.set_default_dtype(torch.float32)
    x, scale = torch.randn(shape).requires_grad_(), torch.randn(shape[1] if len(shape) == 4 else shape[-1])
    y = F.group_norm(x, 4, scale) if len(shape) == 4 else F.layer_norm(x, shape[-1:], scale)
    G = torch.randn(COLUMNS, *shape)
    wanted = torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in G])
    if not together:
        monkeypatch.setattr(norm, "_TOGETHER", 0)
    torch.testing.assert_close(through(y.grad_fn, G), wanted, rtol=0, atol=ROUNDING * wanted.abs().max().item())
    benchmark.group = f"{COLUMNS} columns of {shape}"
    benchmark.pedantic(through, (y.grad_fn, G), rounds=20, iterations=3, warmup_rounds=2)
