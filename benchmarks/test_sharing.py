"""Several quantities asked for together, against each alone and against the sum of them.

Run with timing: python -m pytest benchmarks/test_sharing.py --benchmark-enable
Together they must give what each gives alone; that is compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import ROUNDING
from hookjac import KFAC, Kronecker, extend

ASKED: dict[str, Callable[[], Any]] = {
    "grad_sample_norm": lambda: "grad_sample_norm",
    "ggn_diag": lambda: "ggn_diag",
    "kfac": lambda: KFAC(fisher="exact"),
    "jac": lambda: "jac",
}
WORKLOADS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256),
                                  nn.Tanh(), nn.Linear(256, 10)), (128, 784)),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(16, 32, 3),
                                  nn.ReLU(), nn.Flatten(), nn.Linear(1152, 10)), (16, 3, 32, 32)),
}  # fmt: skip


@pytest.fixture(params=WORKLOADS)
def work(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    build, shape = WORKLOADS[request.param]
    return build(), torch.randn(shape), torch.randint(10, shape[:1])


def step(model: nn.Module, x: Tensor, y: Tensor, names: list[str]) -> dict[str, dict[str, Any]]:
    with extend(model, *(ASKED[name]() for name in names)):
        F.cross_entropy(model(x), y).backward()
    return {name: {key: getattr(p, name) for key, p in model.named_parameters()} for name in names}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Kronecker):
        return same(a.B, b.B) and ((a.A is None and b.A is None) or same(a.A, b.A))
    a, b = a[:2], b[:2]  # of a Jacobian, which stays factors, a few samples will do
    return torch.allclose(a, b, rtol=0, atol=ROUNDING * b.abs().max().item())


@pytest.mark.parametrize("asked", ["plain", *ASKED, "together"])
def test_sharing(work: tuple[nn.Module, Tensor, Tensor], asked: str, benchmark: Any) -> None:
    model, x, y = work
    if asked == "plain":
        benchmark.pedantic(lambda: F.cross_entropy(model(x), y).backward(), rounds=9, warmup_rounds=2)
        return
    names = list(ASKED) if asked == "together" else [asked]
    if asked == "together":
        found = step(model, x, y, names)
        for name in names:
            alone = step(model, x, y, [name])[name]
            assert all(same(found[name][key], value) for key, value in alone.items()), name
    benchmark.pedantic(lambda: step(model, x, y, names), rounds=9, warmup_rounds=2)
