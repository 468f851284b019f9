"""Thousands of steps leave nothing behind: no memory, no tensor, no hook, no mode, no thread."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import weakref
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
from hookjac import HookjacError, extend, optim
from hookjac.quantity import names

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
        with contextlib.suppress(HookjacError, ZeroDivisionError), extend(model, "grad_sample", "hess_diag"):
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


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "KFAC": lambda model: optim.KFAC(model, lr=1e-3),
    "EKFAC": lambda model: optim.KFAC(model, lr=1e-3, corrected=True),
    "DiagonalNewton": lambda model: optim.DiagonalNewton(model, lr=1e-3),
    "GaussNewton": lambda model: optim.GaussNewton(model, lr=1e-3),
    "NaturalGradient": lambda model: optim.NaturalGradient(
        model, lr=1e-3, damping=1.0, least_damping=1.0
    ),  # labels are noise
    "DPSGD": lambda model: optim.DPSGD(model, lr=1e-3, batch_size=2),
}


def training(make: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Callable[[int], None]]:
    def with_it(model: nn.Module) -> Callable[[int], None]:
        optimizer = make(model)

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

    return with_it


WAYS: dict[str, Callable[[nn.Module], Callable[[int], None]]] = {
    "short blocks": short_blocks, "failing blocks": failing_blocks, "one block": one_block,
    **{name: training(make) for name, make in OPTIMIZERS.items()},
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


def by_block(*asked: str) -> Callable[[nn.Module, Tensor, Tensor], None]:
    def use(model: nn.Module, x: Tensor, y: Tensor) -> None:
        for _ in range(2):
            with extend(model, *asked):
                loss = F.cross_entropy(model(x), y)
                loss.backward(retain_graph=True)
                loss.backward()

    return use


def by_optimizer(kind: Any) -> Callable[[nn.Module, Tensor, Tensor], None]:
    def use(model: nn.Module, x: Tensor, y: Tensor) -> None:
        optimizer = kind(model)
        for _ in range(2):
            optimizer.zero_grad()
            with optimizer.block():
                F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return use


def failing(model: nn.Module, x: Tensor, y: Tensor) -> None:
    with pytest.raises(HookjacError, match="mix"), extend(model, "ggn_mp", "grad_sample"):
        model(x).std(0).sum().backward()


USES: dict[str, Callable[[nn.Module, Tensor, Tensor], object]] = {
    **{name: by_block(name) for name in names()},
    "products and others": by_block("ggn_mp", "kfac", "grad_sample", "hess_mp", "hess_diag"),
    **{name: by_optimizer(make) for name, make in OPTIMIZERS.items()},
    "explain": lambda model, x, y: hookjac.explain(model, x, "ggn_diag", "ggn_mp"),
    "check": lambda model, x, y: hookjac.check(model, x, lambda out: F.cross_entropy(out, y), "ggn_mp"),
    "an error": failing,
}  # fmt: skip


@pytest.mark.parametrize("way", USES)
@pytest.mark.parametrize("build", [lambda: mlp(nn.Tanh), bare], ids=["rules", "nodes"])
def test_a_model_that_was_dropped(way: str, build: Callable[[], Any]) -> None:
    """It, its parameters and their results are gone with the last one who held it."""
    model = build()
    USES[way](model, *batch(3))
    held = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    del model
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)
