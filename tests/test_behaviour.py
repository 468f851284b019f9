"""How a block behaves: copies, pickles, modes, empty batches, nesting, threads, memory, optimizers."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N, mlp, par
from oracle import close, compare, expected, trainable
from torch import Tensor, nn

from hookjac import extend
from hookjac.switches import MATH_ATTENTION

Y = torch.tensor([0, 2, 1, 2])
DEFAULT = ("grad_sample", "jac", "hess_diag")


def loops(model: nn.Module, x: Tensor) -> dict[str, dict[str, Tensor]]:
    return expected(model, lambda: model(x), lambda o: F.cross_entropy(o, Y[: len(x)]))


def exact(model: nn.Module, x: Tensor, rtol: float = 1e-10) -> None:
    wanted = loops(model, x)
    for key, p in trainable(model).items():
        for q in DEFAULT:
            close(getattr(p, q), wanted[key][q], (key, q), rtol)


def test_copies_inside_and_after() -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    plain = len(pickle.dumps(model))
    with extend(model):
        loss = F.cross_entropy(model(x), Y)
        twin = copy.deepcopy(model)
        assert len(pickle.dumps(model)) == plain
        keys = list(model.state_dict())
        loss.backward()
        assert list(model.state_dict()) == keys
        buffer = io.BytesIO()
        torch.save(model, buffer)
    copy.deepcopy(model)
    assert all(isinstance(p, nn.Parameter) for p in twin.parameters())
    for module in twin.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    close(loaded(x), model(x), "loaded")
    with extend(twin):
        F.cross_entropy(twin(x), Y).backward()
    exact(twin, x)


def test_train_and_eval_mode() -> None:
    model, x = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, C)), torch.randn(N, D)
    model.eval()
    with extend(model):
        F.cross_entropy(model(x), Y).backward()
    assert not model.training
    exact(model, x)
    model.train()
    state = torch.get_rng_state()
    with extend(model):
        F.cross_entropy(model(x), Y).backward()
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    model(x)
    assert torch.equal(torch.get_rng_state(), after), "the user's random numbers were touched"


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
def test_one_sample(act: type[nn.Module]) -> None:
    model, x = mlp(act), torch.randn(1, D)
    with extend(model):
        F.cross_entropy(model(x), Y[:1]).backward()
    exact(model, x)
    model, x = Fn(lambda m, x: m.c(m.a(x).exp() * m.s), a=nn.Linear(D, 2), s=par(2), c=nn.Linear(2, C)), x
    with extend(model):
        F.cross_entropy(model(x), Y[:1]).backward()
    exact(model, x)


def test_no_sample() -> None:
    model = Fn(lambda m, x: m.c(m.a(x).exp() * m.s), a=nn.Linear(D, 2), s=par(2), c=nn.Linear(2, C))
    with extend(model, "grad_sample", "jac", "ggn_diag", "hess_diag"):
        model(torch.randn(0, D)).square().sum().backward()
    for p in model.parameters():
        assert p.grad_sample.shape == (0, *p.shape)
        assert p.jac.shape == (0, C, *p.shape)
        for q in (p.ggn_diag, p.hess_diag):
            assert torch.equal(q, torch.zeros_like(p))


def test_nested_and_repeated() -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    for _ in range(2):
        with extend(model, "grad_sample"), extend(model, "jac", "hess_diag"):
            F.cross_entropy(model(x), Y).backward()
        exact(model, x)
    with extend(model[0], "grad_sample"), extend(model, "jac", "hess_diag"):  # a part and the whole
        F.cross_entropy(model(x), Y).backward()
    exact(model, x)


def test_several_steps_in_one_block() -> None:
    model = mlp(nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with extend(model):  # the loops run on a copy: a gradient towards these parameters would trigger the block
        for n in (4, 3, 4):
            x = torch.randn(n, D)
            optimizer.zero_grad()
            F.cross_entropy(model(x), Y[:n]).backward()
            wanted = loops(copy.deepcopy(model), x)
            compare(model, wanted, DEFAULT)
            for p in model.parameters():
                close(p.grad_sample.sum(0), p.grad, "sum")
            optimizer.step()


def test_a_switch_may_be_turned_back_on_another_thread() -> None:
    """The block that turned it closes first; the one that turns it back lives on a thread of its own."""
    opened, closed = threading.Event(), threading.Event()
    failures: list[BaseException] = []
    before = torch.backends.cuda.flash_sdp_enabled()

    def work() -> None:
        try:
            with MATH_ATTENTION.held():
                opened.set()
                closed.wait(10)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    with MATH_ATTENTION.held():
        thread.start()
        opened.wait(10)
    assert not torch.backends.cuda.flash_sdp_enabled()
    closed.set()
    thread.join()
    assert not failures, failures[0]
    assert before
    assert torch.backends.cuda.flash_sdp_enabled()


def test_two_threads_with_two_models() -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(15):
                x = torch.randn(N, D, generator=generator, dtype=torch.float64)
                with extend(models[seed]):
                    F.cross_entropy(models[seed](x), Y).backward()
                exact(models[seed], x)
        except BaseException as error:
            failures.append(error)

    models = [mlp(nn.Tanh), mlp(nn.ReLU)]
    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures[0]


def test_no_growth_over_200_steps() -> None:
    """Graphs are freed by reference counting alone: no cycle keeps them for the collector."""
    model = Fn(_with_everything, a=nn.Linear(D, 4), b=nn.Linear(4, 4), c=nn.Linear(4, C), s=par(4))
    x = torch.randn(N, D)

    def step() -> None:
        with extend(model):
            F.cross_entropy(model(x), Y).backward()

    def alive() -> int:
        return sum(issubclass(type(found), Tensor) for found in gc.get_objects())

    for _ in range(3):
        step()
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for _ in range(200):
            step()
        assert alive() <= before + 2
    finally:
        gc.enable()


def _with_everything(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h += m.b(torch.tanh(h * 1))
    return m.c(torch.softmax(h, 1) * m.s)


def test_graphs_of_unused_forwards_are_freed() -> None:
    model, x = Fn(lambda m, x: m.b(m.a(x)), a=nn.Linear(D, D), b=nn.Linear(D, C)), torch.randn(N, D)
    model.a.requires_grad_(False)  # with a trainable weight PyTorch itself makes a cycle here
    gc.disable()
    try:
        with extend(model):
            gone = weakref.ref(model(x))
            residual = x.clone().requires_grad_() * 1
            residual += model.a(residual)  # a layer's input, modified in place by what the layer feeds
            also = weakref.ref(residual)
            del residual
            assert gone() is None
            assert also() is None
    finally:
        gc.enable()


def test_results_are_plain_and_own_their_memory() -> None:
    model = Fn(lambda m, x: m.a(x) + m.b(x) + m.s, a=nn.Linear(D, C), b=nn.Linear(D, C), s=par(C))
    x = torch.randn(N, D)
    with extend(model, "grad_sample", "jac", "ggn_diag", "hess_diag"):
        F.cross_entropy(model(x), Y).backward()
    kept = []
    for p in model.parameters():
        for q in ("grad_sample", "jac", "ggn_diag", "hess_diag"):
            t = p.jac.to_dense() if q == "jac" else getattr(p, q)
            assert type(t) is Tensor
            assert t.is_contiguous()
            assert not t.requires_grad
            assert t.grad_fn is None
            kept.append(t)
    assert len({t.untyped_storage().data_ptr() for t in kept}) == 4 * 5, "two results share memory"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, x = mlp(nn.Tanh).to(dtype), torch.randn(N, D).to(dtype)
    with extend(model):
        F.cross_entropy(model(x), Y).backward()
    reference = copy.deepcopy(model).double()
    wanted = expected(reference, lambda: reference(x.double()), lambda o: F.cross_entropy(o, Y))
    for key, p in trainable(model).items():
        for q in DEFAULT:
            assert getattr(p, q).dtype == dtype
            rounding = 30 * torch.finfo(dtype).eps
            close(getattr(p, q).double(), wanted[key][q], (key, q), rounding)


def test_autocast() -> None:
    torch.set_default_dtype(torch.float32)
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    with extend(model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), Y)
        loss.backward()
    for key, p in trainable(model).items():
        assert p.grad_sample.dtype == torch.float32
        close(p.grad_sample.sum(0), p.grad, key, 2e-2)  # bfloat16 rounds at 8e-3
        assert torch.isfinite(p.hess_diag).all()


def test_user_hooks_on_layers_are_seen() -> None:
    """A forward hook that adds to a layer's output (as adapters do) must not be taken for the layer."""
    model, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)), torch.randn(N, D)
    extra = nn.Linear(D, 4)
    model[0].register_forward_hook(lambda module, args, out: out * 2 + extra(args[0]))
    model[2].register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    with extend(model):
        F.cross_entropy(model(x), Y).backward()
    exact(model, x)


def test_modes_of_the_user_inside_the_block() -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    with extend(model), torch.device("cpu"):
        out = model(x)
        assert torch.ones(2).device.type == "cpu"
        F.cross_entropy(out, Y).backward()
    exact(model, x)


def test_unused_and_frozen_parameters() -> None:
    model = Fn(lambda m, x: m.a(x), a=nn.Linear(D, C), spare=par(3), frozen=par(2).requires_grad_(False))
    model.frozen.grad_sample = "stale"
    with extend(model, "grad_sample", "jac", "hess_diag") as ext:
        F.cross_entropy(model(torch.randn(N, D)), Y).backward()
    assert torch.equal(model.spare.grad_sample, torch.zeros(N, 3))
    assert torch.equal(model.spare.jac, torch.zeros(N, C, 3))
    assert torch.equal(model.spare.hess_diag, torch.zeros(3))
    assert "not reached" in ext.explain().to_dict()["parameters"]["spare"]["why"]


def test_functional_call_reaches_the_true_leaf() -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model
            self.scale = par(1)

        def forward(self, x: Tensor) -> Tensor:
            weights = {k: v * self.scale for k, v in self.inner.named_parameters()}
            return torch.func.functional_call(self.inner, weights, (x,))

    wrapper = Wrapper()
    with extend(wrapper):
        F.cross_entropy(wrapper(x), Y).backward()
    exact(wrapper, x)


def test_explain_prints_a_row_for_each_parameter() -> None:
    model = Fn(lambda m, x: torch.atan2(m.a(x), m.s) * m.t, a=nn.Linear(D, C), s=par(C), t=par(1))
    with extend(model) as ext:
        model(torch.randn(N, D)).square().sum().backward()
    text = str(ext.explain())
    assert all(name in text for name, _ in model.named_parameters())
    assert ext.explain().to_dict()["parameters"]["s"]["road"] == "masked columns"
    assert (
        ext.explain().to_dict()["parameters"]["t"]["road"]
        == ext.explain().to_dict()["parameters"]["a.weight"]["road"]
        == "rule"
    )
