"""Does a model keep its samples apart? Found by trying, not from a graph.

Private training bounds what one sample can do, and clips each sample's gradient to that end. If another sample's output
depends on it, too, the bound is void, however well gradients were clipped; so the gradient of a summand of the loss,
which is defined all the same, will not do. Here other samples are replaced, and a sample's output must stay.

N samples.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from hookjac import given
from hookjac.errors import HookjacError
from hookjac.members import as_it_was
from hookjac.samples import agree
from hookjac.tape import Select, select

# model -> what it was when it was tried: which modules, in training or not, and which output
_TRIED: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()


def _state(model: nn.Module, output: Select) -> Any:
    """What was tried holds for these very objects, not for others at their place in memory when they are gone."""
    which = _weakly(output) if callable(output) else repr(output)
    return tuple((weakref.ref(m), m.training) for m in model.modules()), which


def _weakly(function: Any) -> Any:
    """Known again for as long as it lives; a method by its object. What it refers to (the model) shall not be kept."""
    try:
        return weakref.WeakMethod(function) if hasattr(function, "__self__") else weakref.ref(function)
    except TypeError:
        return function


@contextlib.contextmanager
def demand_apart(model: nn.Module, output: Select = None) -> Iterator[None]:
    """While it is open, a model that mixes samples is refused, with a `HookjacError`, as it is called.

    For private training, where what one sample can do must be bounded: no other sample's output may depend on it. That
    is tried, not proven: the first call on two samples or more (the first axis of inputs and outputs) is run with other
    samples replaced, and each sample's output must stay. Nothing is learnt from equal samples: then the next is tried.

    output: which tensor is meant, as for `extend`. Cost: three forwards, once for each state of the model (training
    or not), with random state and buffers put back after each. Open it before the block of `extend`.
    """
    given.model("demand_apart", model)
    if _state(model, output) in _TRIED.get(model, ()):
        yield
        return

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tried = _TRIED.setdefault(module, set())
        state = _state(module, output)
        if torch.is_grad_enabled() and state not in tried and _apart(module, args, kwargs, output):
            # of outputs that are gone nobody asks again
            tried -= {its for its in tried if isinstance(its[1], weakref.ref) and its[1]() is None}
            tried.add(state)

    handles: list[RemovableHandle] = []
    try:
        handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _apart(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Select) -> bool:
    """Do they? False: these data do not tell."""
    given, spec = tree_flatten((args, kwargs))
    first = _run(model, given, spec, output)
    N = len(first) if first.dim() else 0
    if N < 2:
        return False
    rows = [k for k, t in enumerate(given) if isinstance(t, Tensor) and t.dim() and len(t) == N]
    if not rows:
        raise HookjacError(
            f"cannot tell whether the model keeps its samples apart: its output has {N}, and no tensor that it was "
            "called with has as many rows. If no sample's output depends on another sample, say independent=True, "
            "or leave demand_apart out."
        )
    told = False
    for odd in (0, 1):  # each half once sees the other replaced by a sample of its own
        changed = list(given)
        for k in rows:
            changed[k] = t = given[k].detach().clone()
            t[1 - odd :: 2] = t[odd].clone()
            told = told or not torch.equal(t, given[k])
        if not agree(_run(model, changed, spec, output)[odd::2], first[odd::2]):
            raise HookjacError(
                "the model mixes samples: a sample's output changes when others of its batch are replaced, so that "
                "clipping each sample's gradient keeps nothing private. Take out what works across the batch (a mean "
                "over it, an attention over it). If you know better, say independent=True, or leave demand_apart "
                "out."
            )
    return told


def _run(model: nn.Module, given: list[Any], spec: Any, output: Select) -> Tensor:
    """[N, *out]: what the model gives, as if it had not been called."""
    args, kwargs = tree_unflatten([t.clone() if isinstance(t, Tensor) else t for t in given], spec)
    with as_it_was(model), torch.enable_grad():  # `select` looks for what requires grad
        return select(model.forward(*args, **kwargs), output).detach()
