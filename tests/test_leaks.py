"""Thousands of steps leave nothing behind: no memory, no tensor, no hook, no mode, no thread."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, mlp, par
from leftovers import attributes, clear, state
from torch import Tensor, nn

import hookjac
from hookjac import extend, optim

STEPS, WARM = 2000, 300
MB = 1 << 20


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def living() -> tuple[int, int]:
    """How many tensors there are, and how many objects that the collector knows."""
    gc.collect()
    found = gc.get_objects()
    return sum(issubclass(type(o), Tensor) for o in found), len(found)


def bare() -> nn.Module:
    return Fn(lambda m, x: m.c(m.a(x).exp() * m.s), a=nn.Linear(D, 2), s=par(2), c=nn.Linear(2, C))


def batch(step: int) -> tuple[Tensor, Tensor]:
    n = 1 + step % 4
    return torch.randn(n, D), torch.randint(C, (n,))


def short_blocks(model: nn.Module) -> Callable[[int], None]:
    names = ["grad_sample", "jac", "ggn_diag", "hess_diag", "kfac", "ggn_mp", "hutchinson", "grad_var"]

    def step(k: int) -> None:
        x, y = batch(k)
        with extend(model, names[k % len(names)]):
            F.cross_entropy(model(x), y).backward()
        clear(model)

    return step


def failing_blocks(model: nn.Module) -> Callable[[int], None]:
    def step(k: int) -> None:
        x, y = batch(k)
        with contextlib.suppress(hookjac.HookjacError, ZeroDivisionError), extend(model, "grad_sample", "hess_diag"):
            out = model(x)
            if k % 3 == 0:
                raise ZeroDivisionError
            if k % 3 == 1 and len(x) > 1:
                out.std(0).sum().backward()  # mixes samples
            else:
                F.cross_entropy(out, y).backward()
        clear(model)

    return step


def one_block(model: nn.Module) -> Callable[[int], None]:
    block = extend(model, "grad_sample", "ggn_diag")
    block.__enter__()

    def step(k: int) -> None:
        if k < 0:
            block.__exit__()
            return
        x, y = batch(k)
        F.cross_entropy(model(x), y).backward()
        model.zero_grad()

    return step


def training(model: nn.Module) -> Callable[[int], None]:
    optimizer = optim.KFAC(model, lr=1e-3)

    def step(k: int) -> None:
        if k < 0:
            return
        x, y = batch(k)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)

    return step


WAYS: dict[str, Callable[[nn.Module], Callable[[int], None]]] = {
    "short blocks": short_blocks, "failing blocks": failing_blocks, "one block": one_block, "training": training,
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", [lambda: mlp(nn.Tanh), bare], ids=["rules", "nodes"])
def test_thousands_of_steps(way: str, build: Callable[[], Any]) -> None:
    model = build()
    before, own, threads = state(), attributes(model), threading.active_count()
    step = WAYS[way](model)
    steps = STEPS if build is not bare else STEPS // 3
    for k in range(WARM):
        step(k)
    counts, memory = living(), resident()
    for k in range(steps):
        step(k)
    tensors, objects = living()
    assert tensors <= counts[0] + 8, "tensors are left"
    assert objects <= counts[1] + 500, "objects are left"
    assert resident() <= memory + 16 * MB, "memory is left"
    if way == "one block":
        step(-1)
    assert state() == before
    assert threading.active_count() == threads
    del step
    gc.collect()
    clear(model)
    assert attributes(model) == own
