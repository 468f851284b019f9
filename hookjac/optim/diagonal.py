"""Steps by the diagonal of the curvature."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

import hookjac
from hookjac.optim.curved import Closure, Curved, demand


class DiagonalNewton(Curved):
    """Newton's method with a diagonal: a step is lr m / (|h| + damping), entry by entry.

    m and h are moving averages, without bias, of the gradient and of the curvature's diagonal, which is found anew
    every `every` steps.

    curvature: a quantity of shape [*p]: "hess_diag" (exact), "ggn_diag" (never negative), "ggn_diag_mc", "hesscale",
    "hutchinson", or a record with options. negative: what becomes of negative curvature: "abs", its size (saddle-free
    Newton, Dauphin et al. 2014); "clamp", 0, so that damping alone is left; "still", no step there. clip: the most that
    m / (|h| + damping) may be, entry by entry (Liu et al. 2023, Sophia); 0: no limit. weight_decay: decoupled.
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
    ) -> None:
        demand(lr=lr, damping=damping, clip=clip, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least 0 and less than 1, got {betas}")
        if negative not in ("abs", "clamp", "still"):
            raise ValueError(f"negative must be 'abs', 'clamp' or 'still', got {negative!r}")
        if every < 1:
            raise ValueError(f"every must be a positive number of steps, got {every}")
        super().__init__(model, params, {
            "lr": lr, "betas": betas, "damping": damping, "weight_decay": weight_decay, "clip": clip, "steps": 0,
        })  # fmt: skip
        self.curvature, self.negative, self.every = curvature, negative, every
        (self._name,) = (q.name for q in hookjac.extend(model, curvature).quantities)

    def wanted(self) -> list[str | hookjac.Quantity]:
        return [self.curvature] if self.param_groups[0]["steps"] % self.every == 0 else []

    def update(self, loss: Tensor | None, closure: Closure | None) -> None:
        for group, p in self.moving():
            assert p.grad is not None
            state, (slow, slower) = self.state[p], group["betas"]
            _average(state, "gradient", p.grad, slow)
            if (found := getattr(p, self._name, None)) is not None:
                if found.shape != p.shape:
                    raise hookjac.HookjacError(
                        f"DiagonalNewton(curvature={self._name!r}): expected a quantity of shape [*p] = "
                        f"{list(p.shape)}, got {list(found.shape)}. Use one of the diagonals, such as 'ggn_diag'."
                    )
                _average(state, "curvature", found, slower)
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


def _average(state: dict[str, Any], key: str, new: Tensor, decay: float) -> None:
    state.setdefault(key, torch.zeros_like(new)).lerp_(new, 1 - decay)
    state[f"{key}s"] = state.get(f"{key}s", 0) + 1


def _unbiased(state: dict[str, Any], key: str, decay: float) -> Tensor:
    found: Tensor = state[key] / (1 - decay ** state[f"{key}s"])
    return found
