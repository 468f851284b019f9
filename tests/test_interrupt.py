"""Ctrl-C at any point of a block, a walk or a step: nothing of ours is left, and the next step is exact.

CPython looks for signals where a function begins, after calls, and where a loop turns back; so a `KeyboardInterrupt`
is raised at such points of the library's own code, at random ones of each scenario. HOOKJAC_TEST_LONG=n tries n times
as many. One is left out that Python code cannot close: the first instruction of a context manager's `__exit__`. What
was not closed there is closed as its exception is forgotten, with the block's object.
"""

from __future__ import annotations

import gc
import opcode
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N, mlp, par
from leftovers import attributes, clear, state
from oracle import close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hookjac
from hookjac import extend, optim

POINTS = 24 * int(os.environ.get("HOOKJAC_TEST_LONG", "1"))
HOME = str(Path(hookjac.__file__).parent)
_LOOKS = {code for name, code in opcode.opmap.items() if name.startswith(("CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE"))}
_BEGINS = opcode.opmap.get("RESUME", -1)  # not before Python 3.11
Y = torch.tensor([0, 2, 1, 2])


class Interrupter:
    """Counts the points where a signal may be taken notice of, and raises KeyboardInterrupt at one of them."""

    def __init__(self, at: int) -> None:
        self.at, self.seen, self.where = at, 0, ""
        self.error: KeyboardInterrupt | None = None  # held, and the frames with it: nothing may wait for their end

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(HOME):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        code, last = frame.f_code.co_code, -1

        def follow(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal last
            if event == "opcode":
                now = frame.f_lasti
                begins = now >= 2 and code[now - 2] == _BEGINS and frame.f_code.co_name not in ("__exit__", "__del__")
                looks, last = begins or (last >= 0 and code[last] in _LOOKS), now
                self.seen += looks
                if looks and self.seen == self.at:
                    self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return follow

        return follow

    def run(self, act: Callable[[], Any]) -> None:
        tracing = sys.gettrace()  # of a coverage tool, say
        sys.settrace(self)
        try:
            act()
        except KeyboardInterrupt as error:
            self.error = error
        finally:
            sys.settrace(tracing)


class Scenario(NamedTuple):
    """model: all that is looked at. act: what is interrupted. verify: the next steps."""

    model: nn.Module
    act: Callable[[], Any]
    verify: Callable[[], None]


def block(
    build: Callable[[], nn.Module], *asked: Any, hooked: bool = False, after: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Callable[[], Scenario]:  # fmt: skip
    """A block with a backward, and what follows inside it."""

    def make() -> Scenario:
        model, x = build(), torch.randn(N, D)
        for p in model.parameters() if hooked else ():
            p.register_hook(lambda g: None)
        plain = _gradients(model, x)

        def act() -> None:
            with extend(model, *asked, **options) as ext:
                F.cross_entropy(model(x), Y).backward()
                if after is not None:
                    after(ext)

        def verify() -> None:
            _exact(model, x, plain)
            act()
            for p in model.parameters():
                assert all(hasattr(p, q if isinstance(q, str) else q.name) for q in asked)

        return Scenario(model, act, verify)

    return make


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    clear(model)
    F.cross_entropy(model(x), Y).backward()  # reentrant checkpoints forbid autograd.grad
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    clear(model)
    return found


def _exact(model: nn.Module, x: Tensor, plain: list[Tensor]) -> None:
    """A plain backward leaves nothing but gradients; a block's next step is exact."""
    for p, g, wanted in zip(model.parameters(), _gradients(model, x), plain, strict=True):
        close(g, wanted, "gradient")
        assert not vars(p)
    with extend(model, "grad_sample"):
        F.cross_entropy(model(x), Y).backward()
    for p, wanted in zip(model.parameters(), plain, strict=True):
        close(p.grad_sample.sum(0), wanted, "sum of grad_sample")  # type: ignore[attr-defined]
        assert p.grad is not None
        close(p.grad, wanted, "gradient inside a block")
    clear(model)


def _glued() -> nn.Module:
    return Fn(lambda m, x: m.b(F.gelu(m.a(x)) @ m.w), a=nn.Linear(D, 4), w=par(4, 4), b=nn.Linear(4, C))


def _checkpointed(reentrant: bool) -> nn.Module:
    return Fn(lambda m, x: m.b(checkpoint(lambda h: torch.tanh(m.c(h)), m.a(x), use_reentrant=reentrant)),
              a=nn.Linear(D, 4), c=nn.Linear(4, 4), b=nn.Linear(4, C))  # fmt: skip


def _read(ext: Any) -> None:
    for p in ext.model.parameters():
        assert p.jac.shape[2:] == p.shape
        assert p.jac.dtype == p.dtype
        assert p.jac.sum().dim() == 0


def _products(ext: Any) -> None:
    v = torch.randn(ext.hessian.shape[1])
    close(ext.hessian @ v, ext.hessian @ v, "twice")
    ext.ggn @ v


def accumulating(folder: Path) -> Scenario:
    model, batches = mlp(nn.Tanh), [(torch.randn(N, D), Y) for _ in range(3)]
    params = list(model.parameters())
    params[0].ggn_diag = mine = torch.zeros(1)  # type: ignore[attr-defined]
    wanted = hookjac.accumulate(mlp_of(model), F.cross_entropy, batches, "ggn_diag", "kfac")
    path = folder / "run.safetensors"

    def act() -> None:
        hookjac.accumulate(model, F.cross_entropy, batches, "ggn_diag", "kfac", checkpoint=path, every=1)

    def verify() -> None:
        found = hookjac.accumulate(model, F.cross_entropy, batches, "ggn_diag", "kfac", checkpoint=path, every=1)
        for name in dict(model.named_parameters()):
            close(found["ggn_diag"][name], wanted["ggn_diag"][name], "goes on from its checkpoint")
        assert not list(folder.glob("*.part"))
        path.unlink()
        params[0].ggn_diag = mine  # type: ignore[attr-defined]

    return Scenario(model, act, verify)


def mlp_of(model: nn.Module) -> nn.Module:
    found = mlp(nn.Tanh)
    found.load_state_dict(model.state_dict())
    return found


def checking() -> Scenario:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    before = torch.get_rng_state()

    def act() -> None:
        hookjac.check(model, x, lambda out: F.cross_entropy(out, Y), entries=1)

    def verify() -> None:
        assert torch.equal(before, torch.get_rng_state())
        assert hookjac.check(model, x, lambda out: F.cross_entropy(out, Y), entries=1).fine

    return Scenario(model, act, verify)


def stepping(kind: Callable[..., Any], closed: bool, **options: Any) -> Callable[[], Scenario]:
    def make() -> Scenario:
        model, x = mlp(nn.Tanh), torch.randn(N, D)
        optimizer = kind(model, **options)
        plain = _gradients(model, x)
        start = {key: t.clone() for key, t in model.state_dict().items()}

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), Y)
            loss.backward()
            return loss

        def act() -> None:
            if closed:
                optimizer.step(closure)
                return
            with optimizer.block():
                closure()
            optimizer.step()

        def verify() -> None:
            assert all(bool(t.isfinite().all()) for t in model.state_dict().values())
            act()
            assert not any(vars(p) for p in model.parameters())
            model.load_state_dict(start)
            _exact(model, x, plain)

        return Scenario(model, act, verify)

    return make


def opening() -> Scenario:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    plain = _gradients(model, x)

    def act() -> None:
        with extend(model, "grad_sample", "kfac", "hutchinson"), extend(model, "jac"):
            pass

    return Scenario(model, act, lambda: _exact(model, x, plain))


SCENARIOS: dict[str, Callable[[], Scenario]] = {
    "opened and closed": opening,
    "gradients, Jacobian, Hessian": block(lambda: mlp(nn.Tanh), "grad_sample", "jac", "hess_diag"),
    "gradients": block(lambda: mlp(nn.ReLU), "grad_sample"),
    "norms, under hooks": block(lambda: mlp(nn.Tanh), "grad_sample_norm", "jac", hooked=True),
    "piecewise linear": block(lambda: mlp(nn.ReLU), "ggn_diag", "hess_diag", "ggn_diag_mc", "kfac"),
    "random, under hooks": block(lambda: mlp(nn.Tanh), "hutchinson", "kfac", "hesscale", hooked=True),
    "the Jacobian, read": block(lambda: mlp(nn.Tanh), "jac", after=_read),
    "products": block(lambda: mlp(nn.Tanh), "ggn_mp", "hess_mp", hooked=True, after=_products),
    "a graph": block(lambda: mlp(nn.Tanh), "jac", "grad_sample", create_graph=True),
    "functional": block(_glued, "grad_sample", "jac", "hess_diag", "ggn_diag"),
    "reentrant": block(lambda: _checkpointed(True), "grad_sample", "jac"),
    "not reentrant": block(lambda: _checkpointed(False), "grad_sample", "hess_diag"),
    "check": checking,
    "KFAC": stepping(optim.KFAC, False, lr=0.1),
    "GaussNewton": stepping(optim.GaussNewton, True),
    "DPSGD": stepping(optim.DPSGD, True, lr=0.1, clip=1.0, noise=1.0, batch_size=N),
    "DiagonalNewton": stepping(optim.DiagonalNewton, False, lr=0.1),
    "NaturalGradient": stepping(optim.NaturalGradient, True, lr=0.1),
}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = state()
    yield
    assert state() == before


def attack(make: Callable[[], Scenario], *, later: bool) -> None:
    def prepared() -> Scenario:
        torch.manual_seed(1)
        scenario = make()
        if later:
            scenario.act()
            clear(scenario.model)
        return scenario

    count = Interrupter(-1)
    count.run(prepared().act)
    gc.collect()
    for at in sorted(random.Random(0).sample(range(1, count.seen + 1), min(POINTS, count.seen))):
        scenario = prepared()
        before, carried = state(), attributes(scenario.model)
        interrupter = Interrupter(at)
        interrupter.run(scenario.act)
        assert state() == before, interrupter.where
        for p in scenario.model.parameters():
            for name in hookjac.quantity.names():
                vars(p).pop(name, None)
        assert attributes(scenario.model) <= carried, interrupter.where
        scenario.verify()


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("name", SCENARIOS)
def test_anywhere(name: str, later: bool) -> None:
    attack(SCENARIOS[name], later=later)


def test_anywhere_in_a_data_set(tmp_path: Path) -> None:
    attack(lambda: accumulating(tmp_path), later=False)
