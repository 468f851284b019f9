"""Seeing the backward start: `loss.backward()`, `torch.autograd.backward` and `torch.autograd.grad`."""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from hookjac.errors import HookjacError
from hookjac.switches import Switch
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
        tape.around = (self._aside, self.enter)

    def open(self) -> None:
        _RETAINING.__enter__()
        self._blocks = _here()
        self._blocks.append(self)
        self.enter()

    def close(self) -> None:
        self._blocks.remove(self)
        _RETAINING.__exit__()
        self._leave()

    def enter(self) -> None:
        """On top of the modes, unless among them already. A forward that was interrupted leaves us out."""
        if self not in _get_current_function_mode_stack():
            _push_mode(self)

    def _leave(self) -> None:
        """Off, wherever among the modes we are: blocks may be left in any order."""
        above = []
        while self in _get_current_function_mode_stack():
            while (mode := _pop_mode()) is not self:
                above.append(mode)
        for mode in reversed(above):
            _push_mode(mode)

    def _aside(self) -> None:
        if _get_current_function_mode() is self:  # else somebody's mode lies above ours; popping would pop theirs
            _pop_mode()

    @contextlib.contextmanager
    def quiet(self, model: nn.Module) -> Iterator[None]:
        """Our own backwards are nobody's business: hooks on parameters and `retain_grad` do not notice them."""
        before = [(t, t.grad) for ref in self._retained if (t := ref()) is not None]
        silenced = [(h, dict(h)) for p in model.parameters() if (h := p._backward_hooks)]
        self._busy = True
        try:
            for found, _ in silenced:
                found.clear()
            with SILENT:
                yield
        finally:
            for found, kept in silenced:
                found.update(kept)
            for t, grad in before:
                t.grad = grad
            self._busy = False

    def retained(self) -> bool:
        """Is there a tensor whose `.grad` the user's own backward has to fill?"""
        return any(ref() is not None for ref in self._retained)

    def _unless_busy(self, hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return lambda grad: None if self._busy else hook(grad)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _WATCHED:
            return func(*args, **kwargs)
        if func is torch.Tensor.register_hook and not args[0].is_leaf:
            (tensor, hook) = inspect.signature(func).bind(*args, **kwargs).args
            return func(tensor, self._unless_busy(hook))
        if func not in _STARTS or self._running or self._busy:
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
        self._running = True
        try:
            backward = self._backward()
            assert backward is not None
            return backward(start)
        finally:
            self._running = False


_OPEN = threading.local()


def _here() -> list[Watch]:
    """The watches of this thread's open blocks."""
    if not hasattr(_OPEN, "watches"):
        _OPEN.watches = []
    found: list[Watch] = _OPEN.watches
    return found


def open_blocks() -> list[Any]:
    """The objects whose backwards are watched in this thread, outermost first."""
    alive: list[Any] = [watch._backward() for watch in _here()]
    return [backward.__self__ for backward in alive if backward is not None]


_retain_grad = torch.Tensor.retain_grad


def _retain_grad_seen(tensor: Tensor) -> None:
    """Retain the gradient of a tensor."""
    for watch in _here():
        watch._retained.append(weakref.ref(tensor))
    _retain_grad(tensor)


@contextlib.contextmanager
def _retaining_is_seen() -> Iterator[None]:
    """A mode would see it as well, but not inside the model, where ours steps aside."""
    torch.Tensor.retain_grad = _retain_grad_seen  # type: ignore[method-assign, assignment]
    try:
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
