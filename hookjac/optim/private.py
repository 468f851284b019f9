"""Differentially private steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import hookjac
from hookjac.optim.curved import Closure, Curved, demand


class DPSGD(Curved):
    """Stochastic gradient descent on clipped and noised gradients (Abadi et al. 2016).

    A step goes by the sum over samples of g_n min(1, clip / |g_n|), plus Gaussian noise of deviation `noise` clip, over
    `batch_size`, the *expected* size under Poisson sampling. |g_n| is over all parameters of the optimizer.

    step(closure) never holds a gradient for each sample: its backward finds their norms (`grad_sample_norm`), and the
    model is run once more, on the same random numbers, for one gradient of the outputs with each sample's share. The
    closure must call the model once. `with optimizer.block():` and step() materialise `grad_sample` instead.

    loss_reduction: how the loss is made of the samples' losses; what is not their sum or mean (a penalty on the
    parameters: use weight_decay) is refused at the first step with a closure. generator: for the noise, in tests;
    privacy needs noise that nobody can foresee. What epsilon this gives, an accountant knows: those of Opacus take
    `noise` and the sampling rate. `p.grad` is what the step used, noise included.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        batch_size: int,
        lr: float = 0.1,
        clip: float = 1.0,
        noise: float = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        loss_reduction: Literal["mean", "sum"] = "mean",
        generator: torch.Generator | None = None,
    ) -> None:
        demand(lr=lr, noise=noise, momentum=momentum, weight_decay=weight_decay)
        if not (clip > 0 and batch_size > 0):
            raise ValueError(f"clip and batch_size must be positive, got {clip} and {batch_size}")
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
        super().__init__(model, params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.batch_size, self.clip, self.noise = batch_size, clip, noise
        self.loss_reduction, self.generator = loss_reduction, generator
        self._calls: list[_Call] | None = None  # of the model, where a closure runs
        self._checked = False

    def wanted(self) -> list[hookjac.Quantity]:
        if self._calls is None:
            return [hookjac.GradSample(loss_reduction=self.loss_reduction)]
        return [hookjac.GradSampleNorm()]

    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """One step: in two passes with a closure, from `grad_sample` without."""
        if closure is None:
            return super().step()
        self._calls = []
        hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after),
        ]
        try:
            return super().step(closure)
        finally:
            self._calls = None
            for hook in hooks:
                hook.remove()

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self._calls is not None and self.ext is None and torch.is_grad_enabled():
            cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
            kind = next(model.parameters()).device.type
            cast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            self._calls.append(_Call(args, kwargs, torch.get_rng_state(), cuda, cast))

    def _after(self, model: nn.Module, args: Any, out: Any) -> None:
        if self._calls and self.ext is None and torch.is_grad_enabled():
            self._calls[-1].outputs = _leaves(out)
            for t in self._calls[-1].outputs:
                t.retain_grad()

    def update(self, loss: Tensor | None, closure: Closure | None) -> None:
        moving = list(self.moving())
        clipped = self._from_samples() if closure is None else self._from_norms()
        for group, p in moving:
            g = clipped[p]
            if self.noise:
                z = torch.randn(p.shape, generator=self.generator, dtype=p.dtype, device=p.device)
                g = g + self.noise * self.clip * z
            p.grad = g = g / self.batch_size
            if group["weight_decay"]:
                g = g + group["weight_decay"] * p
            if group["momentum"]:
                g = self.state[p].setdefault("velocity", torch.zeros_like(p)).mul_(group["momentum"]).add_(g)
            p.sub_(g, alpha=group["lr"])

    def _shares(self, squares: Iterable[Tensor]) -> Tensor:  # [N] each -> [N]
        norms = torch.stack(list(squares)).sum(0).sqrt()
        return torch.where(norms > self.clip, self.clip / norms, torch.ones_like(norms))

    def _from_samples(self) -> dict[nn.Parameter, Tensor]:
        each = {p: p.grad_sample for _, p in self.moving()}  # type: ignore[attr-defined]
        shares = self._shares(t.flatten(1).square().sum(1) for t in each.values())
        return {p: torch.tensordot(shares, t, 1) for p, t in each.items()}

    def _from_norms(self) -> dict[nn.Parameter, Tensor]:
        if not self._calls or len(self._calls) > 1:
            raise hookjac.HookjacError(
                f"DPSGD.step(closure) expects a closure that calls the model once, and it did {len(self._calls or [])} "
                "times. Make one batch of it, or use `with optimizer.block():` and step()."
            )
        (call,) = self._calls
        params = [p for _, p in self.moving()]
        N = len(params[0].grad_sample_norm)  # type: ignore[attr-defined]
        scale = N if self.loss_reduction == "mean" else 1
        shares = self._shares((p.grad_sample_norm * scale).square() for p in params)  # type: ignore[attr-defined]
        slopes = [torch.zeros_like(t) if t.grad is None else t.grad for t in call.outputs]
        outputs = call.again(self.model)
        if not self._checked:
            whole = torch.autograd.grad(outputs, params, slopes, retain_graph=True, allow_unused=True)
            self._demand_a_sum(params, whole)
        scaled = [g * (scale * shares).to(g.dtype).view(-1, *[1] * (g.dim() - 1)) for g in slopes]
        found = torch.autograd.grad(outputs, params, scaled, allow_unused=True)
        return {p: torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)}

    def _demand_a_sum(self, params: list[nn.Parameter], whole: tuple[Tensor | None, ...]) -> None:
        """All of the loss's gradient comes through the outputs, or there is more to it than the samples' losses."""
        for p, g in zip(params, whole, strict=True):
            assert p.grad is not None
            wanted = torch.zeros_like(p) if g is None else g
            worst = float((p.grad - wanted).abs().max()) if p.numel() else 0.0
            if not worst <= 1e4 * torch.finfo(p.dtype).eps * float(p.grad.abs().max()):
                (name,) = (name for name, q in self.model.named_parameters() if q is p)
                raise hookjac.HookjacError(
                    f"the gradient of {name!r} differs from what comes through the model's outputs (by {worst:.1e}): "
                    "there is a penalty on the parameters in the loss, whose share in a sample's gradient cannot be "
                    "clipped, or the model is not a function of its inputs. Use weight_decay= for the penalty; or "
                    "zero_grad() first, where gradients were left from before."
                )
        self._checked = True


class _Call:
    """One call of the model, and what is needed for the same once more."""

    def __init__(self, args: Any, kwargs: Any, cpu: Tensor, cuda: Tensor | None, cast: tuple[Any, ...]) -> None:
        self.args, self.kwargs, self.cpu, self.cuda, self.cast = args, kwargs, cpu, cuda, cast
        self.outputs: list[Tensor] = []

    def again(self, model: nn.Module) -> list[Tensor]:
        with torch.random.fork_rng(), torch.enable_grad(), torch.autocast(*self.cast):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda)
            return _leaves(model(*self.args, **self.kwargs))


def _leaves(out: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
