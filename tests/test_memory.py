"""Memory of the last step's result is used again, and never while anybody holds that result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import C, D, Fn, N
from oracle import close
from torch import Tensor, nn

from hookjac import GradSample, engine, extend, memory, passing
from hookjac.testing import random_loss

HOLD: dict[str, Callable[[Tensor], Any]] = {
    "the tensor": lambda t: t,
    "in a list": lambda t: [t],
    "a view": lambda t: t[0, 0],
    "a slice of a split": lambda t: t.split(2)[1],
    "detached": lambda t: t.detach(),
    ".data": lambda t: t.data,
    "its storage": lambda t: t.untyped_storage(),
    "an array": lambda t: t.numpy(),
    "a buffer": lambda t: memoryview(t.numpy()),
    "dlpack": lambda t: torch.utils.dlpack.to_dlpack(t),
    "a graph that saved it": lambda t: torch.ones_like(t).requires_grad_() * t,
    "a parameter": lambda t: nn.Parameter(t),
    "its gradient's owner": lambda t: setattr(par := torch.zeros_like(t).requires_grad_(), "grad", t) or par,
}


def nets() -> dict[str, tuple[nn.Module, Callable[[], Tensor]]]:
    dense = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))
    rows = Fn(lambda m, x: (x @ m.w).tanh() @ m.v, w=nn.Parameter(torch.randn(D, 4)), v=nn.Parameter(torch.randn(4, C)))
    conv = nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv1d(4, 2, 2), nn.Flatten(), nn.Linear(6, C))
    table = Fn(lambda m, i: m.o(m.e(i).tanh()).sum(1), e=nn.Embedding(5, 3), o=nn.Linear(3, C))
    tied = Fn(lambda m, x: m.a(m.a(x).tanh()), a=nn.Linear(D, D))
    mixed = Fn(lambda m, i: (m.e(i).tanh() @ m.e.weight.T).sum(1), e=nn.Embedding(5, 3))
    return {
        "dense": (dense, lambda: torch.randn(N, D)),
        "rows": (rows, lambda: torch.randn(N, D)),
        "convolution": (conv, lambda: torch.randn(N, 2, 5)),
        "table": (table, lambda: torch.randint(5, (N, 3))),
        "tied": (tied, lambda: torch.randn(N, D)),
        "table and weight": (mixed, lambda: torch.randint(5, (N, 3))),
    }


def step(model: nn.Module, x: Tensor, *asked: Any) -> None:
    with extend(model, *(asked or ("grad_sample",))):
        random_loss(model(x)).backward()


def fresh(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By plain loops."""
    out, found = model(x), {}
    for name, p in model.named_parameters():
        rows = [torch.autograd.grad(random_loss_of(out, n), p, retain_graph=True)[0] for n in range(len(out))]
        found[name] = torch.stack(rows)
    return found


def random_loss_of(out: Tensor, n: int) -> Tensor:
    head = out.detach().requires_grad_()
    (slope,) = torch.autograd.grad(random_loss(head), head)
    return (out[n] * slope[n]).sum()


@pytest.mark.parametrize("asked", [("grad_sample",), ("grad_sample", "jac")])
@pytest.mark.parametrize("name", nets())
def test_over_and_over(name: str, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = nets()[name]
    taken: list[bool] = []

    def seen(held: Any, key: Any) -> Tensor | None:
        found = memory.emptied(held, key)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(engine, "emptied", seen)
    monkeypatch.setattr(passing, "emptied", seen)
    for n in range(5):
        x = data()
        taken.clear()
        step(model, x, *asked)
        wanted = fresh(model, x)
        for key, p in model.named_parameters():
            close(p.grad_sample, wanted[key], key)  # type: ignore[attr-defined]
        assert all(taken), "nobody held it"
        assert len(taken) == (n > 0) * len(wanted)


@pytest.mark.parametrize("how", HOLD)
def test_whoever_holds_it_keeps_it(how: str) -> None:
    model, data = nets()["dense"]
    step(model, data())
    before = [p.grad_sample.clone() for p in model.parameters()]  # type: ignore[attr-defined]
    places = [p.grad_sample.data_ptr() for p in model.parameters()]  # type: ignore[attr-defined]
    held = [HOLD[how](p.grad_sample) for p in model.parameters()]  # type: ignore[attr-defined]
    for _ in range(2):
        step(model, data())
        for p, place in zip(model.parameters(), places, strict=True):
            assert p.grad_sample.data_ptr() != place  # type: ignore[attr-defined]
    for kept, was in zip(held, before, strict=True):
        if isinstance(kept, Tensor) and kept.shape == was.shape and how != "its gradient's owner":
            torch.testing.assert_close(kept.detach(), was)


def test_a_new_tensor_each_time_with_nothing_of_the_old_ones() -> None:
    model, data = nets()["dense"]
    step(model, data())
    for p in model.parameters():
        p.grad_sample.marked = True  # type: ignore[attr-defined]
    step(model, data())
    assert not any(hasattr(p.grad_sample, "marked") for p in model.parameters())  # type: ignore[attr-defined]


def test_smaller_and_larger_batches_other_types_and_subsamples() -> None:
    model, _ = nets()["dense"]
    for n, asked in ((6, None), (3, None), (8, None), (8, [1, 0]), (8, None)):
        x = torch.randn(n, D)
        step(model, x, GradSample(subsample=asked))
        wanted = fresh(model, x)
        for key, p in model.named_parameters():
            rows = wanted[key] if asked is None else wanted[key][asked]
            close(p.grad_sample, rows, key)  # type: ignore[attr-defined]
            assert p.grad_sample.is_contiguous()  # type: ignore[attr-defined]
    model.float()
    step(model, torch.randn(4, D).float())
    assert all(p.grad_sample.dtype == torch.float32 for p in model.parameters())  # type: ignore[attr-defined]


def test_nothing_is_kept_once_it_was_deleted() -> None:
    import gc
    import weakref

    model, data = nets()["dense"]
    step(model, data())
    refs = [weakref.ref(p.grad_sample) for p in model.parameters()]  # type: ignore[attr-defined]
    for p in model.parameters():
        del p.grad_sample  # type: ignore[attr-defined]
    gc.collect()
    assert all(ref() is None for ref in refs)
