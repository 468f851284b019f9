"""Seeing the backward start: `loss.backward()`, `torch.autograd.backward` and `torch.autograd.grad`."""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from hookjac.errors import HookjacError
from hookjac.switches import Switch, uncast
from hookjac.talkers import SILENT
from hookjac.tape import Tape


@dataclass(frozen=True, slots=True)
class Start:
    """A backward of the user's, about to begin.

    call: lets it run. tensors, weights: what it starts from, and with which cotangents (None: 1). inputs: what it was
    told to serve; None: all. fills: it ends in `.grad` of the leaves. retain: the graph shall live on. creates: it
    makes a graph itself.
    """

    call: Callable[[], Any]
    tensors: Sequence[Tensor]
    weights: Sequence[Tensor | None]
    inputs: Sequence[Any] | None
    fills: bool
    retain: bool
    creates: bool


class Watch(TorchFunctionMode):
    """Sees the three ways to start a backward. Steps aside while the model runs: it would slow every operation."""

    def __init__(self, tape: Tape, backward: Callable[..., Any], keep: bool) -> None:
        super().__init__()
        self._backward, self._keep = weakref.WeakMethod(backward), keep  # no cycle may keep results alive
        self._busy = False  # our own derivatives are under way
        self._running = False  # a backward that we watch is: what it starts itself (a checkpoint) is part of it
        self._retained: list[weakref.ref[Tensor]] = []
        self._kept: list[tuple[Tensor, Tensor | None]] = []  # gradients that we must not touch
        self._silenced: list[tuple[dict[int, Any], dict[int, Any]]] = []  # hooks of parameters, and what they were
        self._blocks = _here()
        self._open = False
        tape.around = (self._aside, self.enter)

    def open(self) -> None:
        stack = _get_current_function_mode_stack()
        if any(isinstance(mode, Watch) and not mode._open for mode in stack):
            # PyTorch takes a mode off while it serves a call; interrupted there, it may put it back too late
            _set_modes([mode for mode in stack if not isinstance(mode, Watch) or mode._open])
        self._open = True
        _RETAINING.take(self)
        self._blocks.append(self)
        self.enter()

    def close(self) -> None:
        """May be done again, if it was interrupted; so may all that it consists of."""
        self._open = False
        if self in self._blocks:
            self._blocks.remove(self)
        _RETAINING.give(self)
        self._leave()

    def enter(self) -> None:
        """On top of the modes, unless among them already. A forward that was interrupted leaves us out."""
        if self not in _get_current_function_mode_stack():
            _push_mode(self)

    def _leave(self) -> None:
        """Off, wherever among the modes we are: blocks may be left in any order."""
        others = [mode for mode in _get_current_function_mode_stack() if mode is not self]
        try:
            _set_modes(others)
        except BaseException:
            _set_modes(others)
            raise

    def _aside(self) -> None:
        if _get_current_function_mode() is self:  # else somebody's mode lies above ours; popping would pop theirs
            _pop_mode()

    @contextlib.contextmanager
    def quiet(self, params: Iterable[Tensor]) -> Iterator[None]:
        """Our own backwards are nobody's business: hooks on parameters and `retain_grad` do not notice them."""
        if self._busy:
            yield
            return
        try:
            self._busy = True
            _working().add(self)
            self._kept = [(t, t.grad) for ref in self._retained if (t := ref()) is not None]
            for hooks in [p._backward_hooks for p in params if p._backward_hooks]:
                self._silenced.append((hooks, dict(hooks)))
                hooks.clear()
            with SILENT.held(), uncast():
                yield
        finally:
            try:
                self._loud()
            except BaseException:
                self._loud()
                raise

    def _loud(self) -> None:
        for hooks, before in self._silenced:
            hooks.update(before)
        for t, grad in self._kept:
            t.grad = grad
        _working().discard(self)
        self._silenced, self._kept, self._busy = [], [], False

    def retained(self) -> bool:
        """Is there a tensor whose `.grad` the user's own backward has to fill?"""
        return any(ref() is not None for ref in self._retained)

    def _unless_busy(self, hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return lambda grad: None if self._busy else hook(grad)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _WATCHED or not self._open:
            return func(*args, **kwargs)
        if func is torch.Tensor.register_hook and not args[0].is_leaf:
            (tensor, hook) = inspect.signature(func).bind(*args, **kwargs).args
            return func(tensor, self._unless_busy(hook))
        if func not in _STARTS or self._running or _working():
            return func(*args, **kwargs)
        if func is torch.Tensor.backward and len(args) == 1 and not self._keep:
            gradient, retain, create, inputs = map(kwargs.get, ("gradient", "retain_graph", "create_graph", "inputs"))
            if gradient is None and inputs is None and not create:  # as it is mostly written
                return self._start(Start(lambda: func(*args, **kwargs), args, (None,), None, True, bool(retain), False))
        start = inspect.signature(func).bind(*args, **kwargs)
        heads, cotangents = _STARTS[func]
        given = start.arguments
        if not isinstance(given.get("inputs"), (Tensor, GradientEdge, dict, NoneType)):
            given["inputs"] = tuple(given["inputs"])  # it may be a generator: we look, and torch looks
        if given.get("is_grads_batched"):
            raise HookjacError(
                "autograd.grad(is_grads_batched=True) inside an extend block is many backwards at once, and hookjac "
                "needs one. Call it outside the block, or ask for jac."
            )
        if self._keep:
            given["retain_graph"] = True
        tensors = _listed(given[heads])
        weights = [None] * len(tensors) if given.get(cotangents) is None else _listed(given[cotangents])
        inputs = None if given.get("inputs") is None else _listed(given["inputs"])
        creates = bool(given.get("create_graph"))
        retain = creates if given.get("retain_graph") is None else bool(given["retain_graph"])
        fills = func is not torch.autograd.grad
        return self._start(
            Start(lambda: func(*start.args, **start.kwargs), tensors, weights, inputs, fills, retain, creates)
        )

    def _start(self, start: Start) -> Any:
        backward, grad = self._backward(), torch.is_grad_enabled()
        if backward is None:
            return start.call()  # whoever opened the block is gone
        try:
            self._running = True
            return backward(start)
        finally:
            try:
                self._over(grad)
            except BaseException:
                self._over(grad)
                raise

    def _over(self, grad: bool) -> None:
        """The backward is. After an interrupt, something in it may not have been put back."""
        self._running = False
        if self._busy:
            self._loud()
        if torch.is_grad_enabled() is not grad:
            torch.set_grad_enabled(grad)


def _set_modes(wanted: list[TorchFunctionMode]) -> None:
    """Modes above ours come off as well, and back on: no other way leads to it."""
    while _get_current_function_mode_stack() != wanted[: len(_get_current_function_mode_stack())]:
        _pop_mode()
    for mode in wanted[len(_get_current_function_mode_stack()) :]:
        _push_mode(mode)


_OPEN = threading.local()


def _here() -> list[Watch]:
    """The watches of this thread's open blocks."""
    if not hasattr(_OPEN, "watches"):
        _OPEN.watches = []
    found: list[Watch] = _OPEN.watches
    return found


def _working() -> set[Watch]:
    """Those, of blocks that are open or not, whose own derivatives are under way in this thread: no backward of the
    user's, to whatever block sees them."""
    if not hasattr(_OPEN, "working"):
        _OPEN.working = set()
    found: set[Watch] = _OPEN.working
    return found


def open_blocks() -> list[Any]:
    """The objects whose backwards are watched in this thread, outermost first."""
    alive: list[Any] = [watch._backward() for watch in _here()]
    return [backward.__self__ for backward in alive if backward is not None]


def _in_a_child() -> None:
    """A process that was forked inside a block (a worker of a DataLoader) is not the block's."""
    for watch in _here():
        watch._open = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_child)

_retain_grad = torch.Tensor.retain_grad


def _retain_grad_seen(tensor: Tensor) -> None:
    """Retain the gradient of a tensor."""
    for watch in _here():
        watch._retained.append(weakref.ref(tensor))
    _retain_grad(tensor)


def _retaining_is_seen() -> Generator[None, None, None]:
    """A mode would see it as well, but not inside the model, where ours steps aside."""
    try:
        torch.Tensor.retain_grad = _retain_grad_seen  # type: ignore[method-assign, assignment]
        yield
    finally:
        del torch.Tensor.retain_grad


_RETAINING = Switch(_retaining_is_seen)


def _listed(found: Any) -> list[Any]:
    if isinstance(found, dict):
        return list(found.values())
    return list(found) if isinstance(found, (list, tuple)) and not isinstance(found, GradientEdge) else [found]


# what starts a backward: the names of its arguments for what it starts from, and with which cotangents
_STARTS: dict[Any, tuple[str, str]] = {
    torch.Tensor.backward: ("self", "gradient"),
    torch.autograd.backward: ("tensors", "grad_tensors"),
    torch.autograd.grad: ("outputs", "grad_outputs"),
}
_WATCHED = {*_STARTS, torch.Tensor.register_hook}
