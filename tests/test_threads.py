"""Threads: each its own blocks, models and errors. What is promised: a block is its thread's own.

Forwards and backwards of other threads are ordinary, whatever model they are of. HOOKJAC_TEST_LONG=n goes n times as
many rounds.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N, mlp, par
from leftovers import attributes, clear, state
from oracle import close, compare, expected
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import DataLoader, Dataset

import hookjac
from hookjac import HookjacError, extend

ROUNDS = 150 * int(os.environ.get("HOOKJAC_TEST_LONG", "1"))
Y = torch.tensor([0, 2, 1, 2])


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """And threads take turns often, so that they meet in the midst of things."""
    before, interval = state(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)
    assert state() == before


def together(*works: Callable[[], None]) -> None:
    """Each in a thread of its own; what one raises is raised here."""
    failed: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            torch.set_default_dtype(torch.float64)  # of the process, but not to be relied on
            try:
                work()
                assert not _get_current_function_mode_stack()
            except BaseException as error:
                failed.append(error)

        return run

    threads = [threading.Thread(target=guarded(work)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def elsewhere(work: Callable[[], None]) -> None:
    together(work)


def _glued() -> nn.Module:
    return Fn(lambda m, x: m.b(F.gelu(m.a(x)) @ m.w), a=nn.Linear(D, 4), w=par(4, 4), b=nn.Linear(4, C))


ASKED: list[tuple[str, ...]] = [
    ("grad_sample",), ("grad_sample", "jac", "hess_diag"), ("ggn_diag",), ("jac", "ggn_diag"), ("hess_diag",)
]  # fmt: skip


def exact(model: nn.Module, x: Tensor, rounds: int) -> Callable[[], None]:
    """Blocks of one model against loops, with plain steps in between, which must leave nothing."""
    wanted = expected(model, lambda: model(x), lambda o: F.cross_entropy(o, Y))
    plain = {name: its["grad_sample"].sum(0) for name, its in wanted.items()}

    def work() -> None:
        for k in range(rounds):
            asked = ASKED[k % len(ASKED)]
            with extend(model, *asked):
                F.cross_entropy(model(x), Y).backward()
            compare(model, wanted, asked)
            clear(model)
            F.cross_entropy(model(x), Y).backward()
            for name, p in model.named_parameters():
                assert not vars(p), f"a plain backward left {list(vars(p))}"
                assert p.grad is not None
                close(p.grad, plain[name], "gradient")
            clear(model)

    return work


def failing(model: nn.Module, rounds: int) -> Callable[[], None]:
    """Errors of every kind, over and over."""
    x = torch.randn(N, D)

    def mixing() -> None:
        F.mse_loss(model(x), torch.zeros(N, C)).sqrt().backward()

    def unlike() -> None:
        model(torch.randn(N, D + 1))

    def nothing() -> None:
        raise ZeroDivisionError

    def work() -> None:
        for k in range(rounds):
            for step, kind in ((mixing, HookjacError), (unlike, RuntimeError), (nothing, ZeroDivisionError)):
                with pytest.raises(kind), extend(model, *ASKED[k % len(ASKED)]):
                    step()
            assert not any(vars(p) for p in model.parameters())

    return work


def test_each_its_own_model() -> None:
    builds = (lambda: mlp(nn.Tanh), lambda: mlp(nn.ReLU), _glued)
    together(*(exact(build(), torch.randn(N, D), ROUNDS) for build in builds))


def test_copies_of_one_model() -> None:
    model = mlp(nn.Tanh)
    together(*(exact(copy.deepcopy(model), torch.randn(N, D), ROUNDS) for _ in range(3)))


def test_errors_in_one_thread() -> None:
    together(exact(mlp(nn.Tanh), torch.randn(N, D), ROUNDS), failing(mlp(nn.ReLU), ROUNDS // 2),
             exact(_glued(), torch.randn(N, D), ROUNDS))  # fmt: skip


def test_accumulating_and_checking_in_threads() -> None:
    model, batches = mlp(nn.Tanh), [(torch.randn(N, D), Y) for _ in range(2)]
    wanted = hookjac.accumulate(copy.deepcopy(model), F.cross_entropy, batches, "ggn_diag")["ggn_diag"]

    def work() -> None:
        mine = copy.deepcopy(model)
        for _ in range(ROUNDS // 8):
            found = hookjac.accumulate(mine, F.cross_entropy, batches, "ggn_diag")["ggn_diag"]
            for name, t in found.items():
                close(t, wanted[name], name)

    together(work, work, exact(mlp(nn.ReLU), torch.randn(N, D), ROUNDS // 2))


@pytest.mark.parametrize("asked", ASKED)
def test_what_another_thread_does_inside_a_block_is_ordinary(asked: tuple[str, ...]) -> None:
    """With the same model: forward, backward, its own gradients; a normalisation of the batch, even."""
    model, x = nn.Sequential(mlp(nn.Tanh), nn.BatchNorm1d(C, momentum=0.0)).eval(), torch.randn(N, D)
    wanted = expected(model, lambda: model(x), lambda o: F.cross_entropy(o, Y))
    plain = torch.autograd.grad(F.cross_entropy(model(x), Y), list(model.parameters()))

    def other() -> None:
        found = torch.autograd.grad(F.cross_entropy(model(x), Y), list(model.parameters()))
        for g, wanted in zip(found, plain, strict=True):
            assert torch.equal(g, wanted)
        model(x).sum().backward()
        model.zero_grad()
        assert not any(vars(p) for p in model.parameters())

    def training() -> None:
        model.train()
        model(x).sum().backward()
        model.eval()
        other()

    for _ in range(2):
        with extend(model, *asked):
            elsewhere(training)
            loss = F.cross_entropy(model(x), Y)
            before = attributes(model)
            elsewhere(other)
            assert attributes(model) == before
            loss.backward()
        compare(model, wanted, asked)
        clear(model)


def test_a_backward_elsewhere_of_a_forward_here_is_ordinary() -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    plain = torch.autograd.grad(F.cross_entropy(model(x), Y), list(model.parameters()))
    with extend(model):
        loss = F.cross_entropy(model(x), Y)
        elsewhere(lambda: loss.backward())
        for p, g in zip(model.parameters(), plain, strict=True):
            assert p.grad is not None
            assert torch.equal(p.grad, g)
            assert not vars(p)


def test_a_backward_here_of_a_forward_elsewhere() -> None:
    """What was not seen is refused."""
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    losses: list[Tensor] = []
    for asked in ASKED:
        with extend(model, *asked):
            elsewhere(lambda: losses.append(F.cross_entropy(model(x), Y)))
            with pytest.raises(HookjacError, match="in the thread that opened it"):
                losses.pop().backward()


def test_a_block_opened_elsewhere() -> None:
    """It is the thread's that opened it, and whoever closes it closes all of it but the other's own modes."""
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    held: list[Any] = []

    def opening() -> None:
        held.append(extend(model, "grad_sample"))
        held[0].__enter__()
        held[0].__exit__(None, None, None)
        held[0].__enter__()
        F.cross_entropy(model(x), Y).backward()
        held[0].__exit__(None, None, None)

    elsewhere(opening)
    assert hasattr(model[0].weight, "grad_sample")
    clear(model)
    F.cross_entropy(model(x), Y).backward()
    assert not any(vars(p) for p in model.parameters())


class Given(Dataset[Any]):
    """Made by a model in the worker, gradients and all."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.x = model, torch.randn(12, D)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        x = self.x[k : k + 1]
        self.model(x).sum().backward()
        return self.x[k], Y[k % 4]


def test_data_loader_workers() -> None:
    """Forked inside a block, they do as if there were none, and nothing of theirs comes back."""
    torch.manual_seed(3)
    model = mlp(nn.Tanh)
    steps: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
    loader = DataLoader(Given(copy.deepcopy(model)), batch_size=N, num_workers=2)
    with extend(model, "grad_sample", "hess_diag"):
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            steps.append((x, y, {name: p.hess_diag for name, p in model.named_parameters()}))
    clear(model)
    for x, y, found in steps:
        wanted = expected(model, functools.partial(model, x), functools.partial(F.cross_entropy, target=y))
        for name, t in found.items():
            close(t, wanted[name]["hess_diag"], name)
    assert len(steps) == 3
    found = hookjac.accumulate(model, F.cross_entropy, loader, "ggn_diag")
    assert found.batches == 3
