"""Forward hooks that write on the graph: this node is the output of that layer, called with these inputs.

The hooks are PyTorch's global module hooks, filtered by the modules of one model, so that the model itself is
never touched: a copy, a pickle or a `state_dict` taken inside the block carries nothing of ours. Notes live in
the `metadata` of the autograd nodes they speak of and are freed with the graph; the tape holds none of them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from hookjac.called import Calls, Trail, sequence
from hookjac.checkpoints import is_hidden
from hookjac.errors import HookjacError
from hookjac.graph import Edge, edge_of
from hookjac.members import Members
from hookjac.rule import Call, Rule, lookup

Select = str | int | Callable[[Any], Tensor] | None


class Note:
    """What a layer was called with, as the forward hook found it. Cheap: most of it waits for the walk."""

    __slots__ = ("module", "name", "options", "params", "rule", "source", "values", "versions", "x")

    def __init__(self, module: nn.Module, name: str, rule: Rule, x: Tensor) -> None:
        self.module, self.name, self.rule = module, name, rule
        self.x = x.detach()  # x itself may become what is made of it, in place: a cycle
        self.source = edge_of(x) if x.requires_grad else None
        self.params = {key: p for key, p in module._parameters.items() if p is not None}
        self.values = {key: p.detach() for key, p in self.params.items()}
        self.versions = self._version()
        self.options = dict(vars(module))  # as they are now: a slope may be annealed between calls

    def _version(self) -> tuple[int, ...]:
        return (self.x._version, *[t._version for t in self.values.values()])

    @property
    def intact(self) -> bool:
        """False once the input or a weight was modified in place: then only autograd knows whether that matters."""
        return self._version() == self.versions

    @property
    def current(self) -> bool:
        """False once a parameter was moved, cast or given new data."""
        for key, t in self.values.items():
            p = self.params[key]
            if p.data_ptr() != t.data_ptr() or p.dtype != t.dtype or p.shape != t.shape:
                return False
        return True

    def call(self, edge: Edge) -> Call:
        """For the rule, once the walk has found the layer's place in the graph."""
        return Call(
            module=self.module,
            name=self.name,
            rule=self.rule,
            x=self.x,
            source=self.source,
            params={key: p for key, p in self.params.items() if p.requires_grad},
            values=self.values,
            options=SimpleNamespace(**self.options),
            edge=edge,
        )


class Mark:
    """What is known of one tensor of the graph. `note`: a rule's layer made it; `output`: the model returned it;
    `trail`: the calls of modules that it took, if an outermost one returned it."""

    __slots__ = ("__weakref__", "note", "output", "selected", "trail")

    def __init__(self) -> None:
        self.note: Note | None = None
        self.trail: Trail | None = None
        self.output: str | None = None  # how the user reaches it, e.g. "output['logits']"
        self.selected = False


def leaves(found: Any, path: str = "output", within: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in what a model returned or was given, with the expression that reaches it."""
    if id(found) in within:
        return  # it contains itself
    within = (*within, id(found))
    if isinstance(found, Tensor):
        yield path, found
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield from leaves(value, f"{path}[{key!r}]", within)
    elif isinstance(found, (list, tuple)):
        for k, value in enumerate(found):
            name = found._fields[k] if hasattr(found, "_fields") else None
            yield from leaves(value, f"{path}.{name}" if name else f"{path}[{k}]", within)
    elif dataclasses.is_dataclass(found) and not isinstance(found, type):
        for entry in dataclasses.fields(found):
            yield from leaves(getattr(found, entry.name, None), f"{path}.{entry.name}", within)


def _inside(output: Any) -> list[Tensor]:
    """All tensors, where it lets itself be looked at: what a layer within returns is the model's own affair."""
    try:
        return [t for _, t in leaves(output)]
    except Exception:
        return []


def select(output: Any, how: Select) -> Tensor:
    """The differentiated tensor of a model's output."""
    if how is None and isinstance(output, Tensor) and output.requires_grad:
        return output
    names = [name for name, _ in leaves(output)]
    if how is None:
        able = [(name, t) for name, t in leaves(output) if t.requires_grad]
        if len(able) > 1:
            raise HookjacError(
                f"the model returned {len(able)} tensors that require grad ({_listed(n for n, _ in able)}) and none "
                "was selected. Say which one to differentiate: hookjac.extend(model, output=<key, index or callable>)."
            )
        if not able:
            raise HookjacError(
                f"the model returned no tensor that requires grad (found: {_listed(names) or type(output).__name__})."
                " Was it called under torch.no_grad() or inference_mode(), or is every parameter frozen?"
            )
        return able[0][1]
    try:
        if callable(how):
            found = how(output)
        elif isinstance(output, Mapping) or not isinstance(how, str):
            if isinstance(output, Tensor):
                raise TypeError("the model returned one tensor; there is nothing to select")
            found = output[how]
        else:
            found = getattr(output, how)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise HookjacError(
            f"output={how!r} finds nothing in what the model returned ({_listed(names) or type(output).__name__}): "
            f"{error}."
        ) from error
    if not isinstance(found, Tensor):
        raise HookjacError(
            f"output={how!r} found a {type(found).__name__}, expected a tensor. The model returned: {_listed(names)}."
        )
    return found


def _listed(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


_INSTALLED: weakref.WeakSet[Tape] = weakref.WeakSet()
_WARY = (nn.modules.batchnorm._BatchNorm, nn.DataParallel)  # may have to be refused before they run
_FAILED: Any = object()  # after an error, torch calls hooks without keyword arguments


class Tape:
    """Notes on the graph of one model, while it is installed."""

    def __init__(self, members: Members, output: Select, *, rules: bool = True) -> None:
        self.model, self.names, self.rules = members.model, members.modules, rules
        self.key = object()  # of our marks among the metadata of nodes, which must not hold the model
        self._wary = any(issubclass(kind, _WARY) for kind in members.kinds)
        self.output = output
        self.calls_without_grad = 0
        self.calls = 0
        self.hooks = 0  # those that we registered since it was installed
        self.given: list[weakref.ref[Tensor]] = []  # what the model was called with
        # what to do before the model runs and after
        self.around: tuple[Callable[[], None], Callable[[], None]] = (lambda: None, lambda: None)
        self._thread = threading.get_ident()  # the model may run in others, too: that is none of our business
        self._handles: list[Any] = []
        self._last: list[Callable[..., Any]] = []
        self._outliving: list[weakref.ref[Mark]] = []
        self._own: list[Callable[..., Any]] = []  # hooks that are about to be registered, or are
        self._calls = Calls()

    def install(self) -> None:
        # a compiler that is at work must call the hooks, not trace them; if it is not loaded, do not load it
        before: Callable[..., Any] = self._before
        after: Callable[..., Any] = self._after
        if "torch._dynamo" in sys.modules:
            before, after = (MethodType(_uncompiled(method), self) for method in (Tape._before, Tape._after))
            if not (self.rules or self._wary):
                before, after = self._untraced(before, self._before), self._untraced(after, self._after)
        self._own = [before, after]
        _INSTALLED.add(self)
        self._handles.append(hooks.register_module_forward_pre_hook(before))
        # after errors too: whatever stepped aside for the forward must come back
        self._handles.append(hooks.register_module_forward_hook(after, with_kwargs=True, always_call=True))

    def _untraced(self, compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, where the layers within are of little interest: a compiler shall not stop at each of them."""
        model = self.model

        def seen(module: nn.Module, *given: Any) -> Any:
            if torch.compiler.is_compiling():
                return compiled(module, *given) if module is model else None
            return plain(module, *given)

        return seen

    def remove(self) -> None:
        """May be done again, if it was interrupted."""
        numbers = {handle.id for handle in self._handles}
        if len(numbers) < len(self._own):  # interrupted between registering and noting
            for table in (hooks._global_forward_pre_hooks, hooks._global_forward_hooks):
                numbers |= {number for number, hook in list(table.items()) if hook in self._own}
        for number in numbers:
            hooks._global_forward_pre_hooks.pop(number, None)
            hooks._global_forward_hooks.pop(number, None)
            hooks._global_forward_hooks_with_kwargs.pop(number, None)
            hooks._global_forward_hooks_always_called.pop(number, None)
        self._forget_the_last()
        for ref in self._outliving:
            if (mark := ref()) is not None:
                mark.note = None
        _INSTALLED.discard(self)
        self._own, self._handles = [], []

    def _forget_the_last(self) -> None:
        """A hook on the model itself, which was to come after all others, and did not if the forward failed."""
        for number, hook in list(self.model._forward_hooks.items()) if self._last else ():
            if hook in self._last:
                self.model._forward_hooks.pop(number, None)
                self.model._forward_hooks_with_kwargs.pop(number, None)
        self._last = []

    def mark(self, edge: Edge) -> Mark | None:
        marks = edge.node.metadata.get(self.key)
        return marks.get(edge.nr) if marks else None

    def _note(self, tensor: Tensor) -> Mark:
        assert tensor.grad_fn is not None
        metadata: Any = tensor.grad_fn.metadata
        marks: dict[int, Mark] = metadata.setdefault(self.key, {})
        nr = tensor.output_nr
        if nr not in marks:
            marks[nr] = Mark()
        return marks[nr]

    def outlived(self, edges: Iterable[Edge]) -> None:
        """The graph at these edges may live longer than the block: it shall not hold layers then, for theirs are the
        parameters that may hold it."""
        marks = [mark for edge in edges if (mark := self.mark(edge)) is not None and mark.note is not None]
        self._outliving = [ref for ref in self._outliving if ref() is not None] + [weakref.ref(m) for m in marks]

    def carry(self, edge: Edge, tensor: Tensor) -> None:
        """Say of `tensor` that it is the same output of the model as the one at `edge`."""
        mark = self.mark(edge)
        if mark is None or not (mark.output or mark.trail):
            return
        note = self._note(tensor)
        if mark.output:
            note.output, note.selected = mark.output, note.selected or mark.selected
        if mark.trail and mark.trail is not note.trail:
            note.trail = mark.trail + (note.trail or [])

    def _before(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        name = self.names.get(module)
        if module is self.model:
            self.around[0]()
            if not (self._calls.begun and _called_within_itself(module)):
                self._calls.anew()
            self._forget_the_last()
            if module._forward_hooks:  # they may change the output, and run after ours: be the last of them

                def see(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                    self._forget_the_last()
                    self._root(args, kwargs, output)

                self._last.append(see)
                module.register_forward_hook(see, with_kwargs=True)
                self.hooks += 1
        if name is None:
            return
        self._calls.begun.append((name, sequence()))
        if not self._wary or not torch.is_grad_enabled():
            return
        if _mixes(module):
            raise mixing_batchnorm(f"layer {name!r} ({type(module).__name__})")
        if isinstance(module, nn.DataParallel):
            raise HookjacError(
                f"layer {name!r} is nn.DataParallel, which runs copies of the model: results would land on the "
                "copies. Use DistributedDataParallel, or extend the wrapped module on one device."
            )

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any = _FAILED) -> None:
        if threading.get_ident() != self._thread:
            return
        root, name = module is self.model, self.names.get(module)
        try:
            if name is not None:
                self._over(name, module, output)
            if output is _FAILED:
                if root:
                    self._forget_the_last()
                return
            if self.rules and name is not None and isinstance(output, Tensor) and output.grad_fn is not None:
                self._layer(module, name, args, kwargs, output)
            if root and not self._last:
                self._root(args, kwargs, output)
        finally:
            if root:
                self.around[1]()

    def _over(self, name: str, module: nn.Module, output: Any) -> None:
        """A call is: note it, and hang all that lie within the outermost on what that returned."""
        calls = self._calls
        begun = calls.begun
        at, first = begun.pop() if begun else ("", -1)
        if at is not name:
            first = calls.end(name)
        if first >= 0 and output is not _FAILED:
            shape = output.shape if isinstance(output, Tensor) else next((t.shape for t in _inside(output)), ())
            calls.over.append((name, type(module).__name__, shape, first, sequence()))
        if begun:
            return
        trail = calls.taken()
        if output is not _FAILED:
            for tensor in [output] if isinstance(output, Tensor) else _inside(output):
                if tensor.grad_fn is not None:
                    mark = self._note(tensor)
                    mark.trail = trail if mark.trail is None else mark.trail + trail

    def _layer(self, module: nn.Module, name: str, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        if len(args) + len(kwargs) != 1:
            return
        (x,) = args or kwargs.values()
        # autocast: the node computes in another precision than the rule would; complex: rules are for real numbers
        if not isinstance(x, Tensor) or x.dtype != output.dtype or x.is_complex():
            return
        rule = lookup(module)
        if rule is None or torch.is_autocast_enabled(x.device.type):
            return
        if next(iter(hooks._global_forward_hooks.values())).__name__ != "_after":
            return  # a global hook of somebody else ran before us: this may not be what the layer made
        mark = self._note(output)
        if mark.note is not None or (x.grad_fn is output.grad_fn and x.output_nr == output.output_nr):
            return  # the layer handed its input on; whoever made the tensor is noted already
        if torch._C._autograd._top_saved_tensors_default_hooks(False) and is_hidden(output.grad_fn):
            return  # a note would keep alive the input that a checkpoint means to throw away
        mark.note = Note(module, name, rule, x)

    def _root(self, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.calls += 1
        if not torch.is_grad_enabled():
            self.calls_without_grad += 1
            return
        chosen = select(output, self.output)
        usual = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].dim() > 0
        inputs = list(args) if usual else [t for _, t in leaves((*args, *kwargs.values())) if t.dim()]
        if self.given:
            self.given = [ref for ref in self.given if ref() is not None]
        self.given += [weakref.ref(t) for t in inputs]
        if chosen.dim() == 0 or chosen.is_complex() or not chosen.requires_grad:
            raise _unfit_output(chosen)
        N = chosen.shape[0]
        if not (inputs and inputs[0].shape[0] == N):
            _demand_batch(chosen, inputs)
        for path, tensor in [("output", chosen)] if output is chosen else leaves(output):
            if tensor.grad_fn is not None and tensor.dim() > 0 and tensor.is_floating_point():
                self._note(tensor).output = path
        if chosen.grad_fn is not None:
            mark = self._note(chosen)
            mark.selected = True
            mark.output = mark.output or "output"


def _called_within_itself(module: nn.Module) -> bool:
    """As trees are. What was begun and not ended may also have been interrupted: only the stack knows."""
    calls, frame = 0, sys._getframe()
    while (above := frame.f_back) is not None:
        frame = above
        calls += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module
    return calls > 1


def _in_a_child() -> None:
    """A process that was forked inside a block (a worker of a DataLoader) is not the block's."""
    for tape in list(_INSTALLED):
        tape.remove()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_child)


def _unfit_output(chosen: Tensor) -> HookjacError:
    if chosen.is_complex():
        return HookjacError(
            f"the model's selected output is complex ({chosen.dtype}): its Jacobian depends on a convention that "
            "hookjac does not choose. Return its real and imaginary parts (torch.view_as_real)."
        )
    if chosen.dim() == 0:
        return HookjacError(
            "the model's selected output is a single number, expected a first axis that counts the samples. "
            "If the model returns its loss, select what the loss is computed from: extend(model, output=...)."
        )
    return HookjacError(
        "the selected output does not require grad: it was computed under torch.no_grad(), detached, or no "
        "trainable parameter takes part in it."
    )


def _demand_batch(chosen: Tensor, inputs: list[Tensor]) -> None:
    """One common first axis that is not N, and N nowhere else either: this is no batch of samples."""
    N = chosen.shape[0]
    if not all(t.is_floating_point() for t in inputs):
        return  # which node belongs to which graph, say
    if len({t.shape[0] for t in inputs}) == 1 and all(N not in t.shape for t in inputs):
        shapes = ", ".join(str(tuple(t.shape)) for t in inputs[:4])
        raise HookjacError(
            f"the model's output has shape {tuple(chosen.shape)}, but no input has an axis of {N} (inputs: "
            f"{shapes}). The first axis of the output must count the samples; add it with unsqueeze(0) for one."
        )


@functools.cache
def _uncompiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The reason is what PyTorch says where a model was compiled with fullgraph=True."""
    why = "hookjac's forward hooks run uncompiled: inside an extend block, compile without fullgraph=True"
    return torch.compiler.disable(hook, reason=why)


def _mixes(module: nn.Module) -> bool:
    """Does it normalise with the statistics of the batch? Scripted, too, when it has a class of another name."""
    scripted = str(getattr(module, "original_name", "")).startswith("BatchNorm")
    if not scripted and not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False
    return module.training or getattr(module, "running_mean", None) is None


def demand_seen(names: Mapping[nn.Module, str], seen: Collection[str]) -> None:
    """Refuse, where a graph has nodes of compiled code, what may mix samples within and was not seen to be called."""
    for module, name in names.items():
        if name not in seen and _mixes(module):
            kind = getattr(module, "original_name", type(module).__name__)
            raise mixing_batchnorm(f"layer {name!r} ({kind}), hidden in compiled code,")


def mixing_batchnorm(where: str) -> HookjacError:
    return HookjacError(
        f"{where} normalises with the statistics of the batch, so that samples interact and per-sample derivatives "
        "are not defined. Call model.eval() (with running statistics), or use GroupNorm, LayerNorm or InstanceNorm."
    )
