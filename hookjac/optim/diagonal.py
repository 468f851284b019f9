"""Steps by the diagonal of the curvature."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

import hookjac
from hookjac import given
from hookjac.optim.curved import Closure, Curved


class DiagonalNewton(Curved):
    """Newton's method with a diagonal: a step is lr m / (|h| + damping), entry by entry.

    m and h are moving averages, without bias, of the gradient and of the curvature's diagonal, which is found anew
    every `every` steps; betas: their decays.

    curvature: a quantity of shape [*p]: "hess_diag" (exact), "ggn_diag" (never negative), "ggn_diag_mc", "hesscale",
    "hutchinson", or a record with options. negative: what becomes of negative curvature: "abs", its size (saddle-free
    Newton, Dauphin et al. 2014); "clamp", 0, so that damping alone is left; "still", no step there. clip: the most that
    m / (|h| + damping) may be, entry by entry (after Liu et al. 2023, Sophia); 0: no limit. weight_decay: decoupled.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 0.03,
        betas: tuple[float, float] = (0.9, 0.99),
        damping: float = 1e-3,
        curvature: str | hookjac.Quantity = "ggn_diag",
        negative: Literal["abs", "clamp", "still"] = "abs",
        every: int = 1,
        clip: float = 1.0,
        weight_decay: float = 0.0,
        output: Any = None,
    ) -> None:
        given.choice(("abs", "clamp", "still"), negative=negative)
        given.counts(1, every=every)
        super().__init__(model, params, {
            "lr": lr, "betas": betas, "damping": damping, "weight_decay": weight_decay, "clip": clip, "steps": 0,
        }, output=output)  # fmt: skip
        self.curvature, self.negative, self.every = curvature, negative, every
        (self._name,) = (q.name for q in hookjac.extend(model, curvature).quantities)

    def demand_options(self, options: dict[str, Any]) -> None:
        super().demand_options(options)
        given.positive(damping=options["damping"])  # where the curvature is zero, nothing else is left
        betas = options["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, of the gradient and of the curvature; got {betas!r:.80}")
        given.fractions(**{"the first of betas": betas[0], "the second of betas": betas[1]})

    def wanted(self) -> list[str | hookjac.Quantity]:
        here = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        due = self.param_groups[0]["steps"] % self.every == 0 or any("asked" not in self.state[p] for p in here)
        for p in here if due else ():
            self.state[p]["asked"] = True
        return [self.curvature] if due else []

    def update(self, loss: Tensor | None, closure: Closure | None) -> None:
        results = {p: self._result(p) for _, p in self.moving()}
        self.demand_finite(*results.values(), *(p.grad for p in results))
        for group, p in self.moving():
            assert p.grad is not None
            state, (slow, slower) = self.state[p], group["betas"]
            _average(state, "gradient", p.grad, slow)
            if (found := results[p]) is not None:
                _average(state, "curvature", found, slower)
            if "curvature" not in state:
                continue  # out of the loss's reach when it was asked for: from the next time on
            m, h = _unbiased(state, "gradient", slow), _unbiased(state, "curvature", slower)
            sizes = h.abs() if self.negative == "abs" else h.clamp(min=0)
            step = m / (sizes + group["damping"])
            if self.negative == "still":
                step = torch.where(h < 0, torch.zeros_like(step), step)
            if group["clip"]:
                step = step.clamp(-group["clip"], group["clip"])
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=group["lr"])
        for group in self.param_groups:
            group["steps"] += 1

    def _result(self, p: nn.Parameter) -> Tensor | None:
        if self.ext is None:
            return None
        found = getattr(p, self._name)
        if not isinstance(found, Tensor) or found.shape != p.shape:
            what = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise hookjac.HookjacError(
                f"DiagonalNewton(curvature={self._name!r}): expected a quantity of shape [*p] = {list(p.shape)}, got "
                f"{what}. Use one of the diagonals, such as 'ggn_diag'."
            )
        return found


def _average(state: dict[str, Any], key: str, new: Tensor, decay: float) -> None:
    state.setdefault(key, torch.zeros_like(new)).lerp_(new, 1 - decay)
    state[f"{key}s"] = state.get(f"{key}s", 0) + 1


def _unbiased(state: dict[str, Any], key: str, decay: float) -> Tensor:
    found: Tensor = state[key] / (1 - decay ** state[f"{key}s"])
    return found
