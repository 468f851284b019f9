"""What these optimizers have in common: steps that ask for more than gradients, and damping that adapts itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import hookjac

Closure = Callable[[], Tensor]


class Curved(torch.optim.Optimizer):
    """An optimizer of a model whose steps ask hookjac for more than gradients.

        loss = optimizer.step(closure)  # the closure: zero_grad, forward, loss, backward; it returns the loss

    or, where nothing has to be evaluated twice:

        with optimizer.block():
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        optimizer.step()

    model: the module that is called. params: its parameters to be trained, or groups of them, as for every optimizer;
    all by default. A closure is called under gradients, and must compute the same each time: the same batch, no noise
    that the optimizer does not rewind. Results of hookjac are taken off the parameters when the step is over.
    """

    def __init__(self, model: nn.Module, params: Iterable[Any] | None, defaults: dict[str, Any]) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{type(self).__name__} expects the model first, got {type(model).__name__}: write "
                f"{type(self).__name__}(model, ...), or (model, groups, ...) for groups of its parameters."
            )
        self.model = model
        super().__init__(model.parameters() if params is None else params, defaults)
        known = {id(p) for p in model.parameters()}
        for group in self.param_groups:
            if any(id(p) not in known for p in group["params"]):
                raise ValueError(f"{type(self).__name__} was given a parameter that is not one of its model's")

    def wanted(self) -> Sequence[str | hookjac.Quantity]:
        """What the coming step needs besides gradients; nothing where it needs nothing."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """How `hookjac.extend` shall be asked, besides."""
        return {}

    def update(self, loss: Tensor | None, closure: Closure | None) -> None:
        """Move the parameters. `self.ext` is the block of this step's backward, if there was one."""
        raise NotImplementedError

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """Around the forward and the backward of the coming step."""
        self.ext: hookjac.extend | None = None
        asked = self.wanted()
        if not asked:
            yield
            return
        ext = hookjac.extend(self.model, *asked, **self.options())
        self._clear(ext)  # of a step that an error ended
        with ext:
            yield
        self.ext = ext

    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """One step. With a closure its backward runs inside `block()`; without, yours has."""
        loss = None
        if closure is not None:
            with torch.enable_grad(), self.block():
                loss = closure()
            loss = loss.detach()
        elif not hasattr(self, "ext"):
            raise hookjac.HookjacError(
                f"{type(self).__name__}.step() found no backward of its own. Run the forward and the backward inside "
                "`with optimizer.block():`, or hand step(closure) a function that runs them."
            )
        try:
            self._demand_results()
            with torch.no_grad():
                self.update(loss, closure)
        finally:
            self._forget()
        return loss

    def _demand_results(self) -> None:
        moving = [p for _, p in self.moving()]
        asked = [] if self.ext is None else [q.name for q in self.ext.quantities]
        if not moving or any(not hasattr(p, name) for p in moving for name in asked):
            raise hookjac.HookjacError(
                f"{type(self).__name__}.step() found no backward of all its parameters in its block. The closure, or "
                "the block, has to run the forward, the loss and loss.backward()."
            )

    def _forget(self) -> None:
        if self.ext is not None:
            self._clear(self.ext)
        del self.ext

    def _clear(self, ext: hookjac.extend) -> None:
        for p in self.model.parameters():
            for q in ext.quantities:
                vars(p).pop(q.name, None)

    # The parameters that move, as one vector ----------------------------------------------------------------------

    def moving(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        """The parameters with a gradient, each with its group."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    yield group, p

    def place(self, tensors: dict[nn.Parameter, Tensor]) -> Tensor:
        """[P]: one vector over all trainable parameters of the model in their order; zeros where there is nothing."""
        every = [p for p in self.model.parameters() if p.requires_grad]
        return torch.cat([tensors[p].reshape(-1) if p in tensors else p.new_zeros(p.numel()) for p in every])

    def take(self, v: Tensor) -> dict[nn.Parameter, Tensor]:
        """The part of every parameter that moves, of a vector [P]."""
        every = [p for p in self.model.parameters() if p.requires_grad]
        parts = dict(zip(every, v.split([p.numel() for p in every]), strict=True))
        return {p: parts[p].view_as(p) for _, p in self.moving()}

    # Levenberg and Marquardt --------------------------------------------------------------------------------------

    def attempt(self, move: dict[nn.Parameter, Tensor], predicted: float, loss: float, closure: Closure) -> bool:
        """Move, look at the loss, adapt the damping. A move that raises the loss is taken back: False."""
        before = {p: p.clone() for p in move}
        for p, d in move.items():
            p.add_(d)
        with torch.enable_grad():
            after = closure().item()
        if after <= loss:  # not so for NaN
            self.adapt((after - loss) / predicted if predicted else 1.0)
            return True
        for p, old in before.items():
            p.copy_(old)
        self.adapt(-1.0, factor=4.0)
        return False

    def adapt(self, ratio: float, factor: float = 1.5) -> None:
        """Less damping where the loss fell as the quadratic model said (ratio 1), more where it did not (Moré 1978)."""
        for group in self.param_groups:
            if ratio > 0.75:
                group["damping"] = max(group["damping"] / factor, group["least_damping"])
            elif not ratio >= 0.25:
                group["damping"] *= factor


def demand_precision(optimizer: Curved) -> None:
    """Factorisations of matrices need more digits than half precision has."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.dtype in (torch.float16, torch.bfloat16):
                raise hookjac.HookjacError(
                    f"{type(optimizer).__name__} was given a parameter in {p.dtype}, too coarse to solve with. Keep "
                    "parameters in float32, and run the forward under torch.autocast."
                )


def demand(**found: float) -> None:
    """Numbers that must not be negative."""
    for name, value in found.items():
        if not value >= 0:
            raise ValueError(f"{name} must be a number that is not negative, got {value!r}")
