"""Memory of tensors that died serves the next ones, and never while anybody holds what lies there."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N
from oracle import close
from torch import Tensor, nn

import hookjac
from hookjac import GradSample, HookjacError, extend, limits, memory, structured
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
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything is large enough for a region."""
    monkeypatch.setattr(memory, "_LARGE", 1)
    yield
    gc.collect()
    hookjac.empty_cache()
    assert memory._POOL.kept == 0


def nets() -> dict[str, tuple[nn.Module, Callable[[], Tensor]]]:
    dense = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))
    rows = Fn(lambda m, x: (x @ m.w).tanh() @ m.v, w=nn.Parameter(torch.randn(D, 4)), v=nn.Parameter(torch.randn(4, C)))
    conv = nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.ReLU(), nn.Conv1d(4, 2, 2), nn.Flatten(), nn.Linear(6, C))
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


def by_loops(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    out, found = model(x), {}
    head = out.detach().requires_grad_()
    (slope,) = torch.autograd.grad(random_loss(head), head)
    for name, p in model.named_parameters():
        rows = [torch.autograd.grad((o * s).sum(), p, retain_graph=True)[0] for o, s in zip(out, slope, strict=True)]
        found[name] = torch.stack(rows)
    return found


@pytest.mark.parametrize("asked", [("grad_sample",), ("grad_sample", "jac", "ggn_diag", "hess_diag")])
@pytest.mark.parametrize("name", nets())
def test_over_and_over(name: str, asked: tuple[str, ...]) -> None:
    model, data = nets()[name]
    mapped = []
    for _ in range(5):
        x = data()
        step(model, x, *asked)
        wanted = by_loops(model, x)
        for key, p in model.named_parameters():
            close(p.grad_sample, wanted[key], key)  # type: ignore[attr-defined]
        mapped.append(memory._POOL.used + memory._POOL.kept)
    assert max(mapped[2:]) <= max(mapped[:2]), "later steps find all they need"
    assert mapped[0] > 0


@pytest.mark.parametrize("how", HOLD)
def test_whoever_holds_it_keeps_it(how: str) -> None:
    model, data = nets()["dense"]
    step(model, data())
    before = [p.grad_sample.clone() for p in model.parameters()]  # type: ignore[attr-defined]
    places = [p.grad_sample.data_ptr() for p in model.parameters()]  # type: ignore[attr-defined]
    held = [HOLD[how](p.grad_sample) for p in model.parameters()]  # type: ignore[attr-defined]
    for _ in range(3):
        step(model, data())
        now = {p.grad_sample.data_ptr() for p in model.parameters()}  # type: ignore[attr-defined]
        assert now.isdisjoint(places)
    for kept, was in zip(held, before, strict=True):
        if isinstance(kept, Tensor) and kept.shape == was.shape:
            torch.testing.assert_close(kept.detach(), was)
    free = memory._POOL.kept
    del kept, held
    gc.collect()
    assert memory._POOL.kept > free


def test_smaller_and_larger_batches_other_types_and_subsamples() -> None:
    model, _ = nets()["dense"]
    for n, asked in ((6, None), (3, None), (8, None), (8, [1, 0]), (8, None)):
        x = torch.randn(n, D)
        step(model, x, GradSample(subsample=asked))
        wanted = by_loops(model, x)
        for key, p in model.named_parameters():
            rows = wanted[key] if asked is None else wanted[key][asked]
            close(p.grad_sample, rows, key)  # type: ignore[attr-defined]
            assert p.grad_sample.is_contiguous()  # type: ignore[attr-defined]
    model.float()
    step(model, torch.randn(4, D).float())
    assert all(p.grad_sample.dtype == torch.float32 for p in model.parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_what_one_does_with_tensors(dtype: torch.dtype) -> None:
    t = memory.fresh((3, 4), torch.empty((), dtype=dtype)).fill_(2)
    assert t.dtype == dtype
    assert t.sum() == 24
    assert t.clone().shape == torch.Size([3, 4])
    assert t.share_memory_().sum() == 24
    assert torch.equal(t.T.contiguous(), t.new_full((4, 3), 2))


def test_what_is_not_used_again_is_returned() -> None:
    model, data = nets()["dense"]
    step(model, data())
    for p in model.parameters():
        del p.grad_sample  # type: ignore[attr-defined]
    gc.collect()
    assert memory._POOL.kept > 0
    other, inputs = nets()["convolution"]
    for _ in range(memory._KEPT_FOR + 2):
        step(other, inputs())
    sizes = {size for size, regions in memory._POOL.free.items() if any(at < memory._POOL.now - 4 for _, at in regions)}
    assert not sizes


def test_what_exceeds_the_limit_is_returned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory._POOL, "limit", memory._POOL.kept)
    t = memory.fresh((1000,), torch.empty(()))
    assert memory._POOL.used >= t.nbytes
    del t
    assert memory._POOL.kept <= memory._POOL.limit


def test_empty_cache_leaves_the_living_alone() -> None:
    model, data = nets()["dense"]
    step(model, data())
    before = [p.grad_sample.clone() for p in model.parameters()]  # type: ignore[attr-defined]
    hookjac.empty_cache()
    for p, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad_sample, was)  # type: ignore[attr-defined]


def test_threads() -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            torch.set_default_dtype(torch.float64)
            model, data = nets()["dense"]
            for _ in range(20):
                x = data()
                step(model, x)
                for key, g in by_loops(model, x).items():
                    close(model.get_parameter(key).grad_sample, g, key)  # type: ignore[attr-defined]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]


def test_a_result_dies_with_its_last_reference() -> None:
    model, data = nets()["dense"]
    step(model, data())
    refs = [weakref.ref(p.grad_sample) for p in model.parameters()]  # type: ignore[attr-defined]
    for p in model.parameters():
        del p.grad_sample  # type: ignore[attr-defined]
    assert all(ref() is None for ref in refs)


# What cannot fit ---------------------------------------------------------------------------------------------------


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a hundred kilobytes."""
    for module in (limits, structured):
        monkeypatch.setattr(module, "available", lambda device: 1e5)
    monkeypatch.setattr(limits, "_NOTICED", 1)


@pytest.mark.parametrize("asked", ["grad_sample", "ggn_diag_sample", "hess_diag_sample", "ggn_sqrt"])
def test_dense_results_that_cannot_fit(asked: str, little: None) -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, C))
    for _ in range(2):
        with pytest.raises(HookjacError, match=rf"{asked} for 16 samples and 1,363 parameters would take .*'0.weight'"):
            with extend(model, asked):
                F.cross_entropy(model(torch.randn(16, 30)), torch.zeros(16, dtype=torch.long)).backward()
    with extend(model, "grad_sample_norm", "ggn_diag"):
        F.cross_entropy(model(torch.randn(16, 30)), torch.zeros(16, dtype=torch.long)).backward()


def test_a_first_step_that_fits_and_a_later_one_that_does_not(little: None) -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, C))
    for n in (4, 4, 16):
        with extend(model, "grad_sample"):
            loss = F.cross_entropy(model(torch.randn(n, 30)), torch.zeros(n, dtype=torch.long))
            if n == 16:
                with pytest.raises(HookjacError, match="174 kB, and 100 kB are available"):
                    loss.backward()
            else:
                loss.backward()


@pytest.mark.parametrize("asked", ["jac", "ggn_diag", "ntk"])
def test_columns_that_cannot_fit(asked: str, little: None) -> None:
    model = Fn(lambda m, i: m.o(m.e(i).tanh()), e=nn.Embedding(50, 4), o=nn.Linear(4, 50))
    ids = torch.randint(50, (2, 8))
    with pytest.raises(HookjacError, match=rf"{asked} needs 400 columns, one for each entry of a sample's output"):
        with extend(model, asked):
            F.cross_entropy(model(ids).transpose(1, 2), ids).backward()
    with extend(model, hookjac.Jac(outputs=[0, 7]), "ggn_diag_mc"):
        F.cross_entropy(model(ids).transpose(1, 2), ids).backward()


def test_a_jacobian_that_cannot_be_dense(little: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "_NOTICED", 1)
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, C))
    with extend(model, "jac"):
        model(torch.randn(16, 30)).sum().backward()
    jac: Any = model[0].weight.jac
    with pytest.raises(HookjacError, match=r"shape \[16, 3, 40, 30\] would take 461 kB.*p.jac\[:8\]"):
        jac.to_dense()
    assert jac[:2].to_dense().shape == (2, 3, 40, 30)
    assert jac.gram().shape == (16, 3, 16, 3)


def test_the_jacobian_of_a_language_model() -> None:
    """[T, vocabulary] logits on any machine: 1.6 million columns."""
    model = Fn(lambda m, i: m.o(m.e(i)), e=nn.Embedding(50_000, 8), o=nn.Linear(8, 50_000)).float()
    ids = torch.randint(50_000, (1, 32))
    with pytest.raises(HookjacError, match=r"1,600,000 columns"), extend(model, "jac"):
        model(ids).float().logsumexp(2).sum().backward()
    for quantities in (("jac",), ("jac", "hess_mp")):  # by what was learned of the graph; by a walk
        asked = [hookjac.Jac(outputs=[1_599_999, 7]), *quantities[1:]]
        with extend(model, *asked):
            out = model(ids).float()
            out.logsumexp(2).sum().backward(retain_graph=True)
        for row, entry in enumerate((out[0, 31, 49_999], out[0, 0, 7])):
            wanted = torch.autograd.grad(entry, list(model.parameters()), retain_graph=True)
            for p, w in zip(model.parameters(), wanted, strict=True):
                close(p.jac[:, row].to_dense()[0], w, row, 1e-6)
