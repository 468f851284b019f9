"""What these optimizers have in common: steps that ask for more than gradients, and damping that adapts itself."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import hookjac
from hookjac import given

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
    all by default. output: which tensor of what the model returns is meant, as for `hookjac.extend`. A closure is run
    under gradients, and must compute the same each time: the same batch, no noise that the optimizer does not rewind.
    Results of hookjac are taken off the parameters when the step is over, or has failed.
    """

    single = False  # one backward a step; else curvature is that of the last one
    _step_supports_amp_scaling = True  # a GradScaler then tells us of its scale, and we can refuse

    def __init__(
        self, model: nn.Module, params: Iterable[Any] | None, defaults: dict[str, Any], *, output: Any = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{type(self).__name__} expects the model first, got {type(model).__name__}: write "
                f"{type(self).__name__}(model, ...), or (model, groups, ...) for groups of its parameters."
            )
        if params is not None and not isinstance(params, Iterable):
            raise TypeError(
                f"{type(self).__name__} expects parameters or groups of them after the model, got "
                f"{given.said(params)}: all else goes by its name, as in lr=0.1."
            )
        self.demand_options(defaults)
        self.model, self.output = model, output
        self.ext: hookjac.extend | None = None  # the block of the coming step's backward
        self._backwards: int | None = None  # in blocks since the last step; None: there was no block
        super().__init__(model.parameters() if params is None else params, defaults)

    def wanted(self) -> Sequence[str | hookjac.Quantity]:
        """What the coming step needs besides gradients; nothing where it needs nothing."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """How `hookjac.extend` shall be asked, besides."""
        return {}

    def update(self, loss: Tensor | None, closure: Closure | None) -> None:
        """Move the parameters. `self.ext` is the block of this step's backward, if there was one."""
        raise NotImplementedError

    def demand_options(self, options: dict[str, Any]) -> None:
        """Refuse what the options of a group, or the defaults of all groups, cannot be."""
        names = ("lr", "damping", "weight_decay", "clip", "momentum", "other_lr")
        given.numbers(**{name: options[name] for name in names if name in options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for every optimizer; of the model's parameters."""
        super().add_param_group(param_group)
        group, known = self.param_groups[-1], {id(p) for p in self.model.parameters()}
        try:
            if any(id(p) not in known for p in group["params"]):
                raise ValueError(f"{type(self).__name__} was given a parameter that is not one of its model's")
            self._demand_of_groups(group)
            self.demand_options(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _demand_of_groups(self, group: dict[str, Any]) -> None:
        """An option of the whole optimizer would be passed over in a group."""
        name, of_all = type(self).__name__, inspect.signature(type(self)).parameters.keys() - self.defaults.keys()
        if wrong := sorted(of_all & group.keys() - {"params"}):
            raise ValueError(
                f"{name} has one {wrong[0]} for all its parameters, not one for each group. Write "
                f"{name}(model, groups, {wrong[0]}=...)."
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As for every optimizer; blocks so far are of no step."""
        super().zero_grad(set_to_none)
        self._backwards = None if self._backwards is None else 0

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """Around the forward and the backward of the coming step."""
        self._demand_one_step()
        asked = self.wanted()
        ext = (
            hookjac.extend(self.model, *asked, output=self.output, after=self._seen, **self.options())
            if asked
            else None
        )
        self.ext, self._backwards = None, self._backwards or 0
        try:
            with ext or contextlib.nullcontext():
                yield
        except BaseException:
            self._forget(ext)
            raise
        self.ext = ext

    def _demand_one_step(self) -> None:
        """Every rank must take the same step."""
        wrapped = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in self.model.modules())
        if wrapped and not self.options().get("group"):
            raise hookjac.HookjacError(
                f"{type(self).__name__} under DistributedDataParallel would take another step on every rank, by that "
                "rank's curvature. KFAC(model, group='world') adds the ranks up; there is no such form of the others."
            )
        fsdp = sys.modules.get("torch.distributed.fsdp")  # who has not imported it has no such model
        if fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in self.model.modules()):
            raise hookjac.HookjacError(f"{type(self).__name__} cannot take steps of a model under fully_shard.")

    def _seen(self, params: dict[str, nn.Parameter]) -> None:
        assert self._backwards is not None
        self._backwards += 1

    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """One step. With a closure its backward runs inside `block()`; without, yours has."""
        self.loss: Tensor | None = None
        if closure is not None:
            with torch.enable_grad(), self.block():
                self.loss = closure()
        name = type(self).__name__
        try:
            if self._backwards is None:
                raise hookjac.HookjacError(
                    f"{name}.step() found no backward of its own. Run the forward and the backward inside "
                    "`with optimizer.block():`, or hand step(closure) a function that runs them."
                )
            if closure is not None and not isinstance(self.loss, Tensor):
                raise TypeError(f"the closure of {name}.step should return the loss, got {type(self.loss).__name__}")
            scaled = [key for key in ("grad_scale", "found_inf") if vars(self).pop(key, self) is not self]
            if scaled:
                raise hookjac.HookjacError(
                    f"{name} under a GradScaler would see curvature of the scaled loss. Use bfloat16 under autocast, "
                    "which needs no scaler."
                )
            self._demand_results()
            loss = None if self.loss is None else self.loss.detach()
            with torch.no_grad():
                self.update(loss, closure)
            return loss
        finally:
            self._forget(self.ext)

    def _demand_results(self) -> None:
        moving = [p for _, p in self.moving()]
        asked = [] if self.ext is None else [q.name for q in self.ext.quantities]
        if not moving or any(not hasattr(p, name) for p in moving for name in asked):
            raise hookjac.HookjacError(
                f"{type(self).__name__}.step() found no backward of all its parameters in its block. The closure, or "
                "the block, has to run the forward, the loss and loss.backward()."
            )
        if self.single and (self._backwards or 0) > 1:
            raise hookjac.HookjacError(
                f"{type(self).__name__} takes a step by one backward, and there were {self._backwards} since the last: "
                "gradients of all and curvature of the last would not belong together. Make one batch of them."
            )
        sparse = [p for p in moving if p.grad is not None and p.grad.is_sparse]
        if sparse:
            raise hookjac.HookjacError(f"the gradient of {self.name_of(sparse[0])} is sparse: use sparse=False there")

    def _forget(self, ext: hookjac.extend | None) -> None:
        for q in () if ext is None else ext.quantities:
            for p in self.model.parameters():
                vars(p).pop(q.name, None)
        self.ext, self._backwards, self.loss = None, None, None

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_optimizer_", "_zero_grad_", "_warned_")  # of torch, which sets them again
        own = {k: v for k, v in vars(self).items() if not k.startswith(hidden) and k not in ("ext", "loss")}
        return {**own, "ext": None, "_backwards": None}

    # The parameters that move, as one vector ----------------------------------------------------------------------

    def moving(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        """The parameters with a gradient, each with its group."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.requires_grad:
                    yield group, p

    def name_of(self, p: nn.Parameter) -> str:
        """Its name in the model, for errors."""
        return next((repr(name) for name, q in self.model.named_parameters() if q is p), "a parameter")

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

    @property
    def damping(self) -> float:
        """That of all groups; for methods that solve for all parameters together."""
        found = {group["damping"] for group in self.param_groups}
        if len(found) > 1:
            raise hookjac.HookjacError(
                f"{type(self).__name__} solves for all parameters together, with one damping; its groups have {found}"
            )
        return float(found.pop())

    def attempt(self, move: dict[nn.Parameter, Tensor], predicted: float, loss: float, closure: Closure) -> bool:
        """Move, look at the loss, adapt the damping. A move that raises the loss is taken back: False."""
        before = {p: (p.clone(), None if p.grad is None else p.grad.clone()) for p in move}

        def back() -> None:
            for p, (old, gradient) in before.items():
                p.copy_(old)
                p.grad = gradient

        try:
            for p, d in move.items():
                p.add_(d)
            with torch.enable_grad():
                after = float(closure().detach())
        except BaseException:
            back()
            raise
        if after <= loss:  # not so for NaN
            self.adapt((after - loss) / predicted if predicted < 0 else -1.0)
            return True
        back()
        self.adapt(-1.0, factor=4.0)
        return False

    def adapt(self, ratio: float, factor: float = 1.5) -> None:
        """Less damping where the loss fell as the quadratic model said (ratio 1), more where it did not (Moré 1978)."""
        for group in self.param_groups:
            if ratio > 0.75:
                group["damping"] = max(group["damping"] / factor, group["least_damping"])
            elif not ratio >= 0.25:
                group["damping"] *= factor

    # What must not be ---------------------------------------------------------------------------------------------

    def demand_precision(self) -> None:
        """Factorisations of matrices need more digits than half precision has."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype in (torch.float16, torch.bfloat16):
                    raise hookjac.HookjacError(
                        f"{type(self).__name__} was given a parameter in {p.dtype}, too coarse to solve with. Keep "
                        "parameters in float32, and run the forward under torch.autocast."
                    )

    def demand_finite(self, *found: Tensor | None) -> None:
        """A batch with NaN in it would stay in moving averages for ever."""
        if any(t is not None and not bool(torch.isfinite(t).all()) for t in found):
            raise hookjac.HookjacError(
                f"{type(self).__name__}: the curvature or the gradient of this batch is not finite; nothing was moved. "
                "Leave the batch out (zero_grad, and go on), or look for what overflowed."
            )
