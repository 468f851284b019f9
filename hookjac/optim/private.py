"""Differentially private steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

import hookjac
from hookjac import given
from hookjac.optim.calls import Call, noting
from hookjac.optim.curved import Closure, Curved


class DPSGD(Curved):
    """Stochastic gradient descent on clipped and noised gradients (Abadi et al. 2016).

    A step goes by the sum over samples of g_n min(1, clip / |g_n|), plus Gaussian noise of deviation `noise` clip on
    every parameter, over `batch_size`, the *expected* size under Poisson sampling. |g_n| is over all of them. lr,
    momentum and weight_decay: as in `torch.optim.SGD`.

    step(closure) never holds a gradient for each sample: its backward finds their norms (`grad_sample_norm`), and the
    model is run once more, on the same random numbers, for one gradient of the outputs with each sample's share. The
    closure calls the model once and returns the loss itself. `with optimizer.block():` and step() materialise
    `grad_sample` instead. One backward a step.

    What privacy rests on, and who sees to it. Refused at every step: a penalty on the parameters (use weight_decay),
    a loss that mixes samples, outputs that were changed in place or that the model does not give again. Tried at the
    first call, as by `hookjac.clients.opacus`: a model that mixes samples; independent=True leaves that out. Yours: the
    first axis of inputs and outputs counts the units whose privacy is meant, and the loss is their "mean" or "sum", as
    loss_reduction says. A denominator that depends on the batch (class weights, ignored targets) is not seen: "sum" has
    none. generator: for the noise, in tests; else nobody must foresee it. What epsilon this gives, an accountant knows:
    those of Opacus take `noise` and the sampling rate. `p.grad` is what the step used, noise included.
    """

    single = True

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
        independent: bool = False,
        generator: torch.Generator | None = None,
        output: Any = None,
    ) -> None:
        given.numbers(noise=noise)
        given.positive(clip=clip, batch_size=batch_size)
        given.choice(("mean", "sum"), loss_reduction=loss_reduction)
        given.flag(independent=independent)
        given.generator(generator)
        super().__init__(model, params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, output=output)
        self.batch_size, self.clip, self.noise, self.generator = batch_size, clip, noise, generator
        self.loss_reduction, self.independent = loss_reduction, independent
        self._calls: list[Call] | None = None  # of the model, where a closure runs

    def wanted(self) -> list[hookjac.Quantity]:
        if self._calls is None:
            return [hookjac.GradSample(loss_reduction=self.loss_reduction)]
        return [hookjac.GradSampleNorm()]

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """Around the forward and the backward of the coming step."""
        none = contextlib.nullcontext()
        # both before `extend` counts hooks
        tried = none if self.independent else hookjac.demand_apart(self.model, self.output)
        noted = none if self._calls is None else noting(self.model, self._calls)
        with tried, noted, super().block():
            yield

    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """One step: in two passes with a closure, from `grad_sample` without."""
        if closure is None:
            return super().step()
        self._calls = []
        try:
            return super().step(closure)
        finally:
            self._calls = None

    def update(self, loss: Tensor | None, closure: Closure | None) -> None:
        clipped = self._from_samples() if closure is None else self._from_norms()
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad:
                    continue
                g = clipped.get(p, torch.zeros_like(p))  # noised all the same: what no sample reached is a secret, too
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
        self.demand_finite(norms)
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
        self._demand_outputs_only(call)
        N = len(params[0].grad_sample_norm)  # type: ignore[attr-defined]
        scale = N if self.loss_reduction == "mean" else 1
        shares = self._shares((p.grad_sample_norm * scale).square() for p in params)  # type: ignore[attr-defined]
        outputs = call.again(self.model)
        slopes = [torch.zeros_like(t) if t.grad is None else t.grad for t in call.outputs]
        scaled = [g * (scale * shares).to(g.dtype).view(-1, *[1] * (g.dim() - 1)) for g in slopes]
        found = torch.autograd.grad(outputs, params, scaled, allow_unused=True)
        return {p: torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)}

    def _demand_outputs_only(self, call: Call) -> None:
        """All of the loss's gradient comes through the outputs as the model gave them."""
        assert self.loss is not None
        if self.loss.grad_fn is None:
            raise hookjac.HookjacError("the closure of DPSGD.step should return the loss itself, not a detached copy")
        names = {id(p): name for name, p in self.model.named_parameters()}
        seen: set[Any] = {*call.nodes, None}
        todo: list[Any] = [self.loss.grad_fn]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if id(leaf := getattr(node, "variable", None)) in names:
                raise hookjac.HookjacError(
                    f"the loss reaches {names[id(leaf)]!r} past the model's outputs (a penalty on the parameters): its "
                    "share in a sample's gradient cannot be clipped. Use weight_decay=."
                )
            todo += [below for below, _ in node.next_functions]
        if any(t._version != version for t, version in zip(call.outputs, call.versions, strict=True)):
            raise hookjac.HookjacError(
                "an output of the model was changed in place after it was given, so that the gradient at it is of "
                "something else. Use the operation that is not in place."
            )
