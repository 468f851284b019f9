"""Precisions, memory formats, checkpoints: what models are wrapped in."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N, random_loss
from oracle import compare, expected, trainable
from torch import Tensor, nn
from torch.utils.checkpoint import GraphExecGroup, checkpoint, checkpoint_sequential

from hookjac import HookjacError, extend

ALL = ("grad_sample", "jac", "ggn_diag", "hess_diag")


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, C))


def attentive() -> nn.Module:
    parts = {"t": nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), "o": nn.Linear(4, C)}
    return Fn(lambda m, x: m.o(m.t(x).mean(1)), **parts)


def recurrent() -> nn.Module:
    return Fn(lambda m, x: m.o(m.r(x)[0][:, -1]), r=nn.LSTM(4, 3, batch_first=True), o=nn.Linear(3, C))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C)), (D,)),
    "convolutional": (convolutional, (2, 3, 3)),
    "attentive": (attentive, (3, 4)),
    "recurrent": (recurrent, (3, 4)),
}


def compared(model: nn.Module, x: Tensor, context: Callable[[], Any], tolerance: float) -> None:
    """Against the same model in float64, to what the lower precision allows."""
    reference = copy.deepcopy(model).double()
    wanted = expected(reference, lambda: reference(x.double()), random_loss)
    with extend(model, *ALL):
        with context():
            loss = random_loss(model(x).float())
        loss.backward()
    for name, p in trainable(model).items():
        for q in ALL:
            found, right = getattr(p, q), wanted[name][q]
            assert found.dtype == p.dtype
            floor = max(wanted[other][q].abs().max().item() for other in wanted) * tolerance
            assert (found.double() - right).abs().max() <= tolerance * right.abs().max() + floor, (name, q)


@pytest.mark.parametrize("name", MODELS)
def test_autocast_to_bfloat16(name: str) -> None:
    build, shape = MODELS[name]
    compared(build().float(), torch.randn(N, *shape, dtype=torch.float32),
             lambda: torch.autocast("cpu", torch.bfloat16), 0.06)  # fmt: skip


def inside(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
        return m.c(m.b(m.a(x).tanh()).tanh()).to(x.dtype)  # type: ignore[no-any-return]


@pytest.mark.parametrize("outside", [False, True])
def test_several_precisions_on_the_way(outside: bool) -> None:
    """Autocast within the forward, and a residual stream that stays in the wider precision."""
    pre_norm = Fn(lambda m, x: x + m.b(F.gelu(m.a(m.n(x)))), n=nn.LayerNorm(4), a=nn.Linear(4, 8), b=nn.Linear(8, 4))
    model = pre_norm if outside else Fn(inside, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, C))
    compared(model.float(), torch.randn(N, 4, dtype=torch.float32),
             lambda: torch.autocast("cpu", torch.bfloat16, enabled=outside), 0.06)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float32, 1e-4)])
def test_low_precision_models(name: str, dtype: torch.dtype, tolerance: float) -> None:
    build, shape = MODELS[name]
    compared(build().to(dtype), torch.randn(N, *shape, dtype=dtype), lambda: torch.enable_grad(), tolerance)


@pytest.mark.parametrize("module", [False, True])
def test_channels_last(module: bool) -> None:
    model, x = convolutional(), torch.randn(N, 2, 3, 3)
    wanted = expected(model, lambda: model(x), random_loss)
    if module:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with extend(model, *ALL):
        random_loss(model(x.to(memory_format=torch.channels_last))).backward()
    compare(model, wanted, ALL)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_checkpoints(name: str, reentrant: bool) -> None:
    build, shape = MODELS[name]
    body = build()
    head = nn.Linear(C, C)
    model = Fn(lambda m, x: m.head(checkpoint(m.body, x * m.one, use_reentrant=reentrant).tanh()), body=body, head=head)
    plain = Fn(lambda m, x: m.head(m.body(x * m.one).tanh()), body=body, head=head)
    model.one = plain.one = nn.Parameter(torch.ones(1))
    x = torch.randn(N, *shape)
    wanted = expected(plain, lambda: plain(x), random_loss)
    with extend(model, *ALL):
        random_loss(model(x)).backward()
    compare(model, wanted, ALL)


def test_checkpointed_sequence() -> None:
    body = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)])
    model = Fn(lambda m, x: checkpoint_sequential(m.body, 2, m.a(x), use_reentrant=False), a=nn.Linear(D, 4), body=body)
    plain = Fn(lambda m, x: m.body(m.a(x)), a=model.a, body=body)
    x = torch.randn(N, D)
    wanted = expected(plain, lambda: plain(x), random_loss)
    with extend(model, *ALL):
        random_loss(model(x)).backward()
    compare(model, wanted, ALL)


class Block(nn.Module):
    """Functional, so that nodes with saved tensors do the work; notes how often it runs and what it made."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.w, self.norm, self.noise = nn.Parameter(torch.randn(4, 4)), nn.LayerNorm(4), noise
        self.runs = 0
        self.made: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        h = self.norm(x) @ self.w
        self.made.append(weakref.ref(h))
        return x + F.dropout(F.gelu(h), self.noise)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("asked", [("grad_sample",), ALL])
def test_a_checkpoint_runs_once_for_us_and_once_for_the_user(asked: tuple[str, ...], grouped: bool) -> None:
    body = nn.Sequential(*[Block() for _ in range(5)])
    model = Fn(lambda m, x: m.head(checkpoint(m.body, m.a(x), use_reentrant=False)), a=nn.Linear(D, 4), body=body,
               head=nn.Linear(4, C))  # fmt: skip
    with GraphExecGroup() if grouped else contextlib.nullcontext(), extend(model, *asked):
        random_loss(model(torch.randn(N, D))).backward()
        assert [block.runs for block in body] == [3] * 5


class Sine(nn.Module):
    """Its output is nobody's but the next layer's; notes its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Any]] = []

    def forward(self, x: Tensor) -> Tensor:
        h = x.sin()
        self.made.append(weakref.ref(h.untyped_storage()))
        return h


@pytest.mark.parametrize("more", [(), (3,)])
def test_what_a_checkpoint_throws_away_is_gone(more: tuple[int, ...]) -> None:
    body = nn.Sequential(Sine(), nn.Linear(4, 4), Sine(), nn.Tanh(), Sine(), nn.Linear(4, 4))
    model = Fn(lambda m, x: checkpoint(m.body, m.a(x), use_reentrant=False), a=nn.Linear(D, 4), body=body)
    noting = [layer for layer in body if isinstance(layer, Sine)]
    with extend(model, "grad_sample", "ggn_diag", "hess_diag"):  # jac would hold inputs, as it says
        loss = random_loss(model(torch.randn(N, *more, D)))
        assert [made() for layer in noting for made in layer.made] == [None] * 3
        loss.backward()
        assert all(made() is None for layer in noting for made in layer.made)


@pytest.mark.parametrize("shape", [(D,), (3, D)])
def test_checkpoints_above_a_layer_used_twice(shape: tuple[int, ...]) -> None:
    """Its Hessian goes by products, through tensors that were computed again."""

    def block(m: Any, x: Tensor) -> Tensor:
        return m.o(m.n(x))  # type: ignore[no-any-return]

    parts = {"a": nn.Linear(D, 4), "n": nn.LayerNorm(4), "o": nn.Linear(4, 4)}
    model = Fn(lambda m, x: checkpoint(block, m, checkpoint(block, m, m.a(x), use_reentrant=False),
                                       use_reentrant=False), **parts)  # fmt: skip
    plain = Fn(lambda m, x: block(m, block(m, m.a(x))), **parts)
    x = torch.randn(N, *shape)
    wanted = expected(plain, lambda: plain(x), random_loss)
    with extend(model, *ALL):
        random_loss(model(x)).backward()
    compare(model, wanted, ALL)


def test_a_reentrant_checkpoint_within_another() -> None:
    def inner(m: Any, h: Tensor) -> Tensor:
        return checkpoint(lambda h: m.c(h).tanh(), m.b(h), use_reentrant=True)  # type: ignore[no-any-return]

    parts = {"a": nn.Linear(D, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, C)}
    model = Fn(lambda m, x: checkpoint(inner, m, m.a(x), use_reentrant=False), **parts)
    plain = Fn(lambda m, x: m.c(m.b(m.a(x))).tanh(), **parts)
    x = torch.randn(N, D)
    wanted = expected(plain, lambda: plain(x), random_loss)
    with extend(model, *ALL):
        random_loss(model(x)).backward()
    compare(model, wanted, ALL)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_checkpoints_within_checkpoints(noise: float) -> None:
    blocks = nn.ModuleList([Block(noise) for _ in range(4)])

    def pair(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(second, checkpoint(first, x, use_reentrant=False).tanh(), use_reentrant=False)

    def nested(m: Any, x: Tensor) -> Tensor:
        h = checkpoint(pair, m.blocks[0], m.blocks[1], m.a(x), use_reentrant=False)
        return checkpoint(pair, m.blocks[2], m.blocks[3], h, use_reentrant=False)

    def flat(m: Any, x: Tensor) -> Tensor:
        b = m.blocks
        return b[3](b[2](b[1](b[0](m.a(x)).tanh())).tanh())

    model, plain = (Fn(f, a=nn.Linear(D, 4), blocks=blocks) for f in (nested, flat))
    plain.a = model.a
    x = torch.randn(N, D)

    def run() -> Tensor:
        torch.manual_seed(1)
        return plain(x)  # type: ignore[no-any-return]

    wanted = expected(plain, run, random_loss)
    with extend(model, *ALL):
        torch.manual_seed(1)
        random_loss(model(x)).backward()
    compare(model, wanted, ALL)


def test_one_unbatched_image_is_refused() -> None:
    model = nn.Conv2d(2, 3, 2)
    with pytest.raises(HookjacError, match=r"3 output channels .* unbatched"), extend(model, "grad_sample"):
        F.silu(model(torch.randn(2, 3, 3))).sum().backward()
