"""What hookjac.memory claims: memory used before against fresh memory, a C library taught against one untaught, and the
kernel of a threshold against a mask.

Run with timing: python -m pytest benchmarks/test_memory.py --benchmark-enable
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hookjac import memory

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def single() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)


@pytest.mark.parametrize("where", ["fresh", "used again"])
def test_large_results(benchmark: Any, where: str) -> None:
    """The Jacobian of a layer with 784 inputs and 256 outputs, for N=128 and 10 outputs of the model: 1 GB."""
    N, V, o, i = (128, 10, 256, 784) if benchmark.enabled else (4, 10, 256, 784)
    g, a = torch.randn(N, V, o, 1), torch.randn(N, 1, 1, i)

    def make() -> Tensor:
        return g * a if where == "fresh" else torch.mul(g, a, out=memory.fresh((N, V, o, i), g))

    wanted = g[1].double() * a[1].double()
    torch.testing.assert_close(make()[1].double(), wanted)
    assert torch.equal(make(), make()), "the second time, in memory that was used"
    benchmark.group = f"[{N}, {V}, {o}, {i}]"
    benchmark.pedantic(lambda: (make(), None)[1], rounds=5, warmup_rounds=2)  # the result dies at once
    memory.empty_cache()


_TEMPORARIES = """
import statistics, sys, time, torch
from hookjac import memory
torch.set_num_threads(1)
x = torch.randn(1 << 18)  # 1 MB
if sys.argv[1] == "taught":
    memory._teach_malloc()
def step():
    start = time.perf_counter()
    for _ in range(16):
        alive = [x + k for k in range(3)]
        del alive
    return 1e3 * (time.perf_counter() - start)
print(statistics.median(step() for _ in range(15)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's habits")
@pytest.mark.parametrize("library", ["untaught", "taught"])
def test_temporaries(benchmark: Any, library: str) -> None:
    """16 times three temporaries of 1 MB, in a process of its own: what its C library learned it does not forget.

    The benchmark's own time is that of the process; the median inside, in ms, is its extra information.
    """
    command = [sys.executable, "-c", _TEMPORARIES, library]
    done = benchmark.pedantic(lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True))
    benchmark.extra_info["ms"] = float(done.stdout)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "threshold": memory.above_zero,
    "where": lambda G, t: torch.where(t > 0, G, 0),
    "masked_fill": lambda G, t: G.masked_fill(t <= 0, 0),
    "product with a mask": lambda G, t: G * (t > 0),
}


@pytest.mark.parametrize("shape", [(10, 128, 256), (10, 32, 64, 16, 16)], ids=["columns of an MLP", "of a CNN"])
@pytest.mark.parametrize("way", WAYS)
def test_relu(benchmark: Any, way: str, shape: tuple[int, ...]) -> None:
    """Ten columns through a ReLU: [V, *t] where t is above zero."""
    G, t = torch.randn(shape), torch.randn(shape[1:])
    assert torch.equal(WAYS[way](G, t), torch.where(t > 0, G, 0))
    benchmark.group = f"columns {list(shape)} through a ReLU"
    benchmark.pedantic(WAYS[way], (G, t), rounds=30, iterations=3, warmup_rounds=3)
