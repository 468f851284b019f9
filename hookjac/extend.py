"""The context manager: hooks on, watch for the backward, results onto the parameters, hooks off."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from hookjac.engine import Results, Walk, empty
from hookjac.errors import HookjacError
from hookjac.explain import Explanation, explain
from hookjac.loss import scalar
from hookjac.plan import make_plan
from hookjac.quantity import Quantity, parse
from hookjac.tape import Select, Tape


class extend:
    """Leave the derivatives that `.grad` throws away on every parameter of a model.

        with hookjac.extend(model, "grad_sample", "hess_diag"):
            loss_function(model(x), y).backward()

    quantities: names or records (`hookjac.HessDiag(road="columns")`); none: grad_sample, jac, hess_diag.
    output: which tensor to differentiate when the model returns several: a key, an index or a callable.

    Any of `loss.backward()`, `torch.autograd.backward` and `torch.autograd.grad` (towards parameters) inside the
    block triggers it, and each replaces the results of the one before. Results are plain attributes of the trainable
    parameters, there as soon as the backward returns, gone when you `del` them. With `inputs=`, only the parameters
    listed get results. The samples are the first axis of the model's output. After the block no hook is left.

    Not seen: gradient hooks that users put on tensors (`register_hook`); they change `.grad`, not our results.
    """

    def __init__(self, model: nn.Module, *quantities: str | Quantity, output: Select = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"extend expects a torch.nn.Module, got {type(model).__name__}: {model!r:.80}")
        if isinstance(model, nn.DataParallel):
            raise HookjacError(
                "extend got an nn.DataParallel, which runs copies of the model: results would land on the copies. "
                "Extend the wrapped module on one device, or use DistributedDataParallel."
            )
        self.model = model
        self.quantities = parse(quantities)
        self._output = output
        self._stack: contextlib.ExitStack | None = None
        self._explanation: Explanation | None = None

    def __enter__(self) -> extend:
        if self._stack is not None:
            raise HookjacError("this extend block is already open; make a new one with hookjac.extend(model, ...)")
        params = _trainable(self.model)
        if not params:
            count = sum(1 for _ in self.model.parameters())
            raise HookjacError(
                f"the model has no trainable parameter ({count} parameters, all with requires_grad=False): there is "
                "nothing to differentiate with respect to."
            )
        for name, p in params.items():
            if p.is_complex():
                raise HookjacError(
                    f"parameter {name!r} is complex ({p.dtype}): its Jacobian and Hessian depend on a convention that "
                    "hookjac does not choose. Use view_as_real, or freeze it."
                )
        self._known = {id(p): name for name, p in params.items()}
        self._held = list(params.values())  # ids stay theirs while we compare them
        with contextlib.ExitStack() as stack:
            tape = Tape(self.model, self._output)
            stack.callback(tape.remove)
            tape.install()
            if any(q.curved for q in self.quantities):
                # fused attention has no second derivative on CPU; the math kernel does
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_Watch(tape, self._backward))
            self._tape = tape
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        stack, self._stack = self._stack, None
        self._held = []
        assert stack is not None
        stack.close()

    def explain(self) -> Explanation:
        """Which road every parameter took in the last backward of this block, and why."""
        if self._explanation is None:
            raise HookjacError("explain() tells of the last backward inside the block; there was none yet")
        return self._explanation

    def _backward(
        self,
        call: Callable[[], Any],
        tensors: Sequence[Tensor],
        weights: Sequence[Tensor | None],
        inputs: Sequence[Any] | None,
    ) -> Any:
        """One backward of the user's: ours first, while the graph is alive; then theirs; results last."""
        params = _trainable(self.model)
        if inputs is not None:
            chosen = {id(t) for t in inputs if isinstance(t, Tensor)}
            listed = {name: p for name, p in params.items() if id(p) in chosen}
            if not listed:
                return call()  # a gradient towards something else, inputs say: not ours
            params = listed
        results = self._results(list(tensors), list(weights), params)
        answer = call()
        for p in params.values():
            for name, value in results[id(p)].items():
                setattr(p, name, value)
        return answer

    def _results(self, tensors: list[Tensor], weights: list[Tensor | None], params: dict[str, nn.Parameter]) -> Results:
        for t in tensors:
            if not t.requires_grad:
                why = "the forward ran under torch.no_grad() or inference_mode()"
                if self._tape.calls == 0:
                    why = "the extended model was not called inside the block"
                elif not self._tape.calls_without_grad:
                    why = "something between the model and the loss detached it"
                raise HookjacError(f"the loss does not require grad: {why}.")
        if self._tape.samples == 0:
            return empty(params, self.quantities, self._tape.out_shape)
        loss = scalar(tensors, weights)
        plan = make_plan(self._tape, loss, params, self._known, {id(p) for p in self.model.parameters()})
        walk = Walk(plan, self.quantities)
        results = walk.run()
        self._explanation = explain(self.model, plan, walk.roads)
        return results


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class _Watch(TorchFunctionMode):
    """Sees the three ways to start a backward. Steps aside while the model runs: it would slow every operation."""

    def __init__(self, tape: Tape, backward: Callable[..., Any]) -> None:
        super().__init__()
        self._backward = backward
        tape.around = (self._aside, self._again)

    def _aside(self) -> bool:
        if _get_current_function_mode() is not self:
            return False  # somebody's mode lies above ours; popping would pop theirs
        super().__exit__(None, None, None)
        return True

    def _again(self) -> None:
        super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        watched = _WATCHED.get(func)
        if watched is None:
            return func(*args, **kwargs)
        tensors, weights, inputs = watched(*args, **kwargs)
        return self._backward(lambda: func(*args, **kwargs), tensors, weights, inputs)


def _listed(found: Any) -> list[Any]:
    return [found] if isinstance(found, Tensor) or not isinstance(found, (list, tuple)) else list(found)


def _method(tensor: Tensor, gradient: Any = None, *a: Any, inputs: Any = None, **k: Any) -> Any:
    inputs = a[2] if len(a) > 2 else inputs
    return [tensor], [gradient], None if inputs is None else _listed(inputs)


def _function(tensors: Any, grad_tensors: Any = None, *a: Any, inputs: Any = None, **k: Any) -> Any:
    heads = _listed(tensors)
    inputs = a[3] if len(a) > 3 else inputs
    weights = [None] * len(heads) if grad_tensors is None else _listed(grad_tensors)
    return heads, weights, None if inputs is None else _listed(inputs)


def _grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *a: Any, **k: Any) -> Any:
    heads = _listed(outputs)
    weights = [None] * len(heads) if grad_outputs is None else _listed(grad_outputs)
    return heads, weights, _listed(inputs)


_WATCHED: dict[Any, Callable[..., Any]] = {
    torch.Tensor.backward: _method,
    torch.autograd.backward: _function,
    torch.autograd.grad: _grad,
}
