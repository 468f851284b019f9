"""Differentially private training with Opacus on per-sample gradients, or on their norms, of ours.

Opacus samples, clips, adds noise and accounts; what it needs of each sample comes from here, for any model. Two ways:
`grad_samples` leaves `p.grad_sample` for its `DPOptimizer`; `ghost_clipping` finds the norms only, and a second
backward, of the losses scaled by them, gives the sum of the clipped gradients: no per-sample gradient is built.

N samples · p the parameter's shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hookjac import given
from hookjac.apart import demand_apart
from hookjac.errors import HookjacError, needed_by
from hookjac.extend import extend
from hookjac.quantity import GradSample, GradSampleNorm, Quantity
from hookjac.tape import Select

with needed_by("hookjac.clients.opacus", "opacus>=1.5"):
    import opacus
    from opacus.grad_sample.gsm_base import AbstractGradSampleHooks
    from opacus.grad_sample.gsm_no_op import GradSampleHooksNoOp
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
    from opacus.validators import ModuleValidator
    from opacus.validators.errors import UnsupportedModuleError

Reduction = Literal["mean", "sum"]

# Under names of our own: `extend` clears results before a backward, and those of earlier batches are to stay; and what
# somebody else's block left on the parameters is not to be taken for this batch's
_GRADIENT, _NORM = "grad_sample_of_batch", "grad_sample_norm_of_batch"

# Opacus would replace these by layers of its own, which its hooks see through
_SERVED = (nn.MultiheadAttention, nn.LSTM, nn.GRU)


class PrivacyEngine(opacus.PrivacyEngine):  # type: ignore[misc]
    """Opacus' engine, without its refusal of attention, LSTM and GRU, which need no replacement here.

    What else it refuses (batch normalisation, a model in eval mode), it refuses still.
    """

    def validate(self, *, module: nn.Module, optimizer: Any, data_loader: Any) -> None:
        """Raise `UnsupportedModuleError` for what cannot be trained privately."""
        if errors := _errors(module):
            raise UnsupportedModuleError(errors)

    def is_compatible(self, *, module: nn.Module, optimizer: Any, data_loader: Any) -> bool:
        """Would `validate` let it pass?"""
        return not _errors(module)


def _errors(module: nn.Module) -> list[Any]:
    given.model("PrivacyEngine", module)
    layers = [m for m in module.modules() if type(m) in _SERVED]
    idle = {str(error) for m in layers for error in ModuleValidator.VALIDATORS[type(m)](m)}
    return [error for error in ModuleValidator.validate(module, strict=False) if str(error) not in idle]


def grad_samples(
    model: nn.Module | GradSampleHooksNoOp,
    *,
    loss_reduction: Reduction | None = None,
    accumulate: bool = False,
    output: Select = None,
    independent: bool = False,
) -> extend:
    """A block in which every `loss.backward()` leaves `p.grad_sample` the way Opacus' `DPOptimizer` reads it.

        with hookjac.clients.opacus.grad_samples(hooks):
            criterion(model(x), y).backward()
        optimizer.step()

    model: what `make_private(..., grad_sample_mode="no_op")` returned first, or the model itself.
    loss_reduction: "mean" or "sum", as the loss is reduced; None: as `make_private` was told, or the mean.
    accumulate: add a batch to those since the last `optimizer.zero_grad()`, as a list; False: refuse a second one. The
        privacy of Poisson sampling does not hold for batches added up so; use Opacus' BatchMemoryManager there.
    output: as in `hookjac.extend`.
    independent: you vouch that no sample's output depends on another sample; False: the first batch is tried, with
        others' samples replaced, and a model that mixes them is refused.

    The block may hold one step or the whole training. Gradients are those of a sample's own loss: under a mean, N
    times its summand. Parameters that the loss does not reach get zeros, an empty batch [0, *p].
    """
    given.flag(accumulate=accumulate)
    module, reduction = _of(model, loss_reduction)

    def collect(params: dict[str, nn.Parameter]) -> None:
        for name, p in params.items():
            held = vars(p)
            fresh, earlier = held.pop(_GRADIENT), held.get("grad_sample")
            if earlier is None:
                held["grad_sample"] = fresh
            elif not accumulate:
                raise ValueError(  # as Opacus does
                    f"parameter {name!r} holds per-sample gradients of an earlier backward. Call optimizer.zero_grad() "
                    "after each step; use Opacus' BatchMemoryManager for batches larger than memory; or, where the "
                    "batches are not drawn by Poisson sampling, grad_samples(..., accumulate=True)."
                )
            else:
                held["grad_sample"] = [*(earlier if isinstance(earlier, list) else [earlier]), fresh]

    quantity = dataclasses.replace(GradSample(loss_reduction=reduction), name=_GRADIENT)
    return _Block(module, quantity, output=output, independent=independent, after=collect)


class _Block(extend):
    """The samples of its model are tried, too."""

    _alone = frozenset({"grad_sample"})

    def __init__(self, model: nn.Module, quantity: str | Quantity, *, independent: bool, **options: Any) -> None:
        given.flag(independent=independent)  # whatever is merely true would leave the trial out
        super().__init__(model, quantity, **options)
        self._independent = independent
        self._tried = contextlib.ExitStack()

    def __enter__(self) -> extend:
        with contextlib.ExitStack() as stack:
            if not self._independent:  # before `extend` counts hooks
                stack.enter_context(demand_apart(self.model, self._output))
            opened = super().__enter__()
            self._tried = stack.pop_all()
        return opened

    def __exit__(self, *exc: Any) -> None:
        with self._tried:
            super().__exit__(*exc)


class GhostClipping:
    """Norms of per-sample gradients, as Opacus' fast gradient clipping asks for them: two backwards, nothing [N, *p].

    Stands where Opacus' own GradSampleModuleFastGradientClipping would: in `DPLossFastGradientClipping`, whose
    `backward()` runs the loss's backward, asks for the clipping coefficients, and runs that of the clipped loss.

        with ghost:
            criterion(model(x), y).backward()
        optimizer.step()

    `ghost_clipping` makes it, and what goes with it, from what `make_private` returned. The block may hold one step or
    the whole training; one backward each step. The bound and the reduction of the loss are those of the optimizer,
    also where a scheduler changes the bound. norms: [N], those of the last batch, of each sample's own loss. They are
    over all trainable parameters of the model, whether the optimizer has them or not.
    """

    def __init__(
        self,
        model: nn.Module | GradSampleHooksNoOp,
        optimizer: DPOptimizerFastGradientClipping,
        *,
        output: Select = None,
        independent: bool = False,
    ) -> None:
        if not (hasattr(optimizer, "max_grad_norm") and hasattr(optimizer, "loss_reduction")):
            raise TypeError(
                f"GhostClipping expects Opacus' DPOptimizerFastGradientClipping, got {type(optimizer).__name__}: use "
                "ghost_clipping, which makes both."
            )
        given.flag(independent=independent)
        self.optimizer = optimizer
        self.model, self.loss_reduction = _of(model, optimizer.loss_reduction)
        self.norms: Tensor | None = None
        self._fresh: dict[str, Tensor] | None = None  # of the backward before, by parameter
        quantity = dataclasses.replace(GradSampleNorm(), name=_NORM)
        self._make = functools.partial(
            _Block, self.model, quantity, output=output, independent=independent, after=self._collect
        )
        self._block: extend | None = None

    def _collect(self, params: dict[str, nn.Parameter]) -> None:
        self._fresh = {name: vars(p).pop(_NORM) for name, p in params.items()}

    def __enter__(self) -> GhostClipping:
        if self._block is not None:
            raise HookjacError("this GhostClipping block is already open")
        self._open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.disable_hooks()

    def _open(self) -> None:
        self._fresh = None
        block = self._make()
        block.__enter__()
        self._block = block

    def get_clipping_coef(self) -> Tensor:
        """[N]: what each sample's loss is multiplied by, so that no gradient is longer than max_grad_norm."""
        if self._fresh is None or self._block is None:
            raise HookjacError(
                "no norms of per-sample gradients: the model was called, or backward() ran, outside the GhostClipping "
                "block. Write `with ghost: criterion(model(x), y).backward()`."
            )
        whole = torch.stack(list(self._fresh.values())).norm(dim=0)
        self._fresh = None
        self.norms = whole * len(whole) if self.loss_reduction == "mean" else whole
        bound: float = self.optimizer.max_grad_norm
        return (bound / (self.norms + 1e-6)).clamp(max=1.0)  # the floor is that of Opacus' DPOptimizer

    def disable_hooks(self) -> None:
        """The backward of the clipped loss is an ordinary one."""
        block, self._block = self._block, None
        if block is not None:
            block.__exit__()

    def enable_hooks(self) -> None:
        """Ready for the next batch; parameters that the loss did not reach have a gradient of zero."""
        for p in self.model.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        if self._block is None:
            self._open()


def ghost_clipping(
    model: nn.Module | GradSampleHooksNoOp,
    optimizer: DPOptimizer,
    criterion: Any,
    *,
    output: Select = None,
    independent: bool = False,
) -> tuple[GhostClipping, DPOptimizerFastGradientClipping, DPLossFastGradientClipping]:
    """The ghost block, optimizer and criterion, from what `make_private(..., grad_sample_mode="no_op")` returned.

    The optimizer is Opacus' own for ghost clipping, with the settings, the noise and the accounting of the one given;
    use it instead. The criterion is Opacus' wrapper of the one given, a loss module with a `reduction`. output and
    independent: as in `grad_samples`.
    """
    if type(optimizer) is not DPOptimizer:
        raise HookjacError(
            "ghost clipping expects the DPOptimizer of make_private(..., clipping='flat', grad_sample_mode='no_op') on "
            f"one device, got {type(optimizer).__name__}. For other ways of clipping, use grad_samples."
        )
    wanted = getattr(criterion, "reduction", None)
    if not callable(criterion) or not isinstance(wanted, str):  # Opacus would write one on whatever it is
        raise TypeError(f"criterion must be a loss module with a `reduction`, got {given.said(criterion)}")
    if wanted != optimizer.loss_reduction:
        raise HookjacError(
            f"the criterion's reduction is {wanted!r}, but make_private was told {optimizer.loss_reduction!r}; they "
            "must agree: give make_private(loss_reduction=...) that of the criterion."
        )
    fast = DPOptimizerFastGradientClipping(
        optimizer.original_optimizer,
        noise_multiplier=optimizer.noise_multiplier,
        max_grad_norm=optimizer.max_grad_norm,
        expected_batch_size=optimizer.expected_batch_size,
        loss_reduction=optimizer.loss_reduction,
        generator=optimizer.generator,
        secure_mode=optimizer.secure_mode,
    )
    fast.attach_step_hook(optimizer.step_hook)
    ghost = GhostClipping(model, fast, output=output, independent=independent)
    return ghost, fast, DPLossFastGradientClipping(ghost, fast, criterion, fast.loss_reduction)


def _of(model: nn.Module | AbstractGradSampleHooks, reduction: Reduction | None) -> tuple[nn.Module, Reduction]:
    """The module to extend, and how its loss is reduced."""
    if reduction is not None:
        given.choice(("mean", "sum"), loss_reduction=reduction)
    if isinstance(model, AbstractGradSampleHooks):
        if not isinstance(model, GradSampleHooksNoOp):
            raise HookjacError(
                f"expected what make_private(..., grad_sample_mode='no_op') returns first, got {type(model).__name__}: "
                "Opacus would compute per-sample gradients, too."
            )
        if reduction not in (None, model.loss_reduction):
            raise HookjacError(
                f"the loss's reduction is {reduction!r} here, but the engine was told {model.loss_reduction!r}; they "
                "must agree."
            )
        # a wrapper calls the model's forward past its hooks: it is what we must watch
        return (model if isinstance(model, nn.Module) else model._module), model.loss_reduction
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module or what make_private returned first, got {type(model).__name__}")
    return model, "mean" if reduction is None else reduction
