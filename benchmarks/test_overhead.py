"""What hookjac.passing and hookjac.deliver take calls and arithmetic to cost when they choose, measured.

Run with timing: python -m pytest benchmarks/test_overhead.py --benchmark-enable
What one node costs is the time over NODES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import hookjac
from benchmarks.measure import ROUNDING
from hookjac import gemm
from hookjac.deliver import deliver
from hookjac.graph import pull
from hookjac.ways import ways

NODES = 100


@pytest.fixture(autouse=True)
def single() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)


def chain(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, list[Any]]:
    """An input, what many small steps make of it, and their nodes from the last to the first."""
    x = torch.randn(8, 8, requires_grad=True)
    out, nodes = x, []
    for _ in range(NODES):
        out = f(out)
        nodes.insert(0, out.grad_fn)
    return x, out, nodes


def down(nodes: list[Any], G: Tensor) -> Tensor:
    with torch.no_grad():
        for node in nodes:
            (found, *_) = pull(node, {0: G})
            assert found is not None
            G = found
    return G


def test_nodes_in_the_engine(benchmark: Any) -> None:
    """`_IN_ENGINE`, and once `_STARTED`: one column through a hundred nodes."""
    x, out, _ = chain(torch.tanh)
    g = torch.ones_like(out)
    benchmark.pedantic(lambda: torch.autograd.grad(out, x, g, retain_graph=True), rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("way", ["closed form", "vmap"])
def test_nodes_of_ours(benchmark: Any, way: str) -> None:
    """`_BY_WAY` and `_BY_VMAP`: three columns through a hundred nodes; of sinc there is no closed form."""
    x, out, nodes = chain(torch.tanh if way == "closed form" else torch.sinc)
    assert (ways(nodes[0]) is None) == (way == "vmap")
    G = torch.randn(3, 8, 8)
    wanted = torch.stack([torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in G])
    torch.testing.assert_close(down(nodes, G), wanted)
    benchmark.pedantic(down, (nodes, G), rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("count", [1, 20])
def test_delivery(benchmark: Any, count: int) -> None:
    """`_DELIVERY` and `_FOR_EACH`: gradients handed to so many parameters."""
    params = [nn.Parameter(torch.zeros(3)) for _ in range(count)]

    def step() -> None:
        for p in params:
            p.grad = None
        deliver(params, [torch.ones(3) for _ in params])

    step()
    assert all(torch.equal(p.grad, torch.ones(3)) for p in params if p.grad is not None)
    benchmark.pedantic(step, rounds=20, iterations=5, warmup_rounds=2)


@pytest.mark.parametrize("what", ["product", "faster product", "convolution", "sum"])
def test_rates(benchmark: Any, what: str) -> None:
    """`_PRODUCT`, `_FASTER` and `_CONVOLVED` in FLOPs, `_ADDED` in entries a microsecond: the extra information."""
    A, B = torch.randn(256, 1024), torch.randn(1024, 256)
    x, w, g = torch.randn(32, 32, 16, 16), torch.randn(64, 32, 3, 3), torch.randn(32, 64, 16, 16)
    many = torch.randn(128, 1 << 15)
    do: dict[str, tuple[Callable[[], Any], float]] = {
        "product": (lambda: torch.mm(A, B), 2.0 * 256 * 1024 * 256),
        "faster product": (lambda: gemm.mm(A, B), 2.0 * 256 * 1024 * 256),
        "convolution": (lambda: torch.nn.grad.conv2d_weight(x, [*w.shape], g, padding=1), 2.0 * 32 * 256 * 288 * 64),
        "sum": (lambda: many.sum(0), float(many.numel())),
    }
    step, amount = do[what]
    benchmark.pedantic(step, rounds=20, iterations=5, warmup_rounds=2)
    if benchmark.enabled:
        benchmark.extra_info["in a microsecond"] = 1e-6 * amount / benchmark.stats.stats.median


@pytest.mark.parametrize("mode", ["aside", "on"])
def test_operations_under_a_mode(benchmark: Any, mode: str) -> None:
    """`Watch` steps aside while the model runs: a mode is asked about every function."""

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    x = torch.randn(8, 8)

    def forward() -> None:
        for _ in range(NODES):
            torch.tanh(x)

    def under() -> None:
        with Mode():
            forward()

    benchmark.pedantic(under if mode == "on" else forward, rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("asked", ["columns", "entries", "ggn_diag", "hesscale"])
def test_roads_of_curvature(benchmark: Any, asked: str) -> None:
    """Products with the Hessian are slower than columns; HesScale is dearer than an exact diagonal it approximates."""
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 5))
    x, y = torch.randn(32, 20), torch.randint(5, (32,))

    def step(quantity: Any) -> None:
        model.zero_grad()
        with hookjac.extend(model, quantity):
            F.cross_entropy(model(x), y).backward()

    quantity = hookjac.HessDiag(road=asked) if asked in ("columns", "entries") else asked
    if asked == "columns":
        step(hookjac.HessDiag(road="entries"))
        wanted = [p.hess_diag for p in model.parameters()]  # type: ignore[attr-defined]
        step(quantity)
        for p, w in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.hess_diag, w, rtol=0, atol=ROUNDING * w.abs().max().item())  # type: ignore[attr-defined]
    benchmark.pedantic(step, (quantity,), rounds=10, warmup_rounds=2)
