"""Steps by the whole generalised Gauss-Newton matrix, of which only products with vectors are made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import hookjac
from hookjac import given
from hookjac.optim.curved import Closure, Curved


class NaturalGradient(Curved):
    """(G + damping) d = -g by conjugate gradients on products with G: Hessian-free optimization (Martens 2010).

    G is the generalised Gauss-Newton matrix of the batch, which for cross entropy of logits is the Fisher information,
    so that d is the natural gradient. At most `iterations` products a step; fewer, once the residual is `tolerance` of
    the gradient. They start from `keep` times the last d. A step is lr d. Given a closure, one that raises the loss is
    taken back, and the damping follows how well the quadratic model foretold the loss, down to `least_damping`; without
    one it stays.

    G of a loss that is not convex in the outputs may bend down: iterations end where it does, and the step is the
    gradient's where that is at once. Penalties are part of G. Cost: three backwards for each product; and a closure.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1.0,
        damping: float = 1e-1,
        least_damping: float = 1e-8,
        iterations: int = 20,
        tolerance: float = 1e-3,
        keep: float = 0.9,
        output: Any = None,
    ) -> None:
        given.numbers(tolerance=tolerance, keep=keep)
        given.counts(1, iterations=iterations)
        super().__init__(model, params, {"lr": lr, "damping": damping, "least_damping": least_damping}, output=output)
        self.iterations, self.tolerance, self.keep = iterations, tolerance, keep

    single = True

    def demand_options(self, options: dict[str, Any]) -> None:
        super().demand_options(options)
        given.positive(damping=options["damping"], least_damping=options["least_damping"])

    def wanted(self) -> list[hookjac.Quantity]:
        return [hookjac.GGNMP()]

    def update(self, loss: Tensor | None, closure: Closure | None) -> None:
        assert self.ext is not None
        G, damping = self.ext.ggn, self.damping
        g = self.place({p: p.grad for _, p in self.moving() if p.grad is not None})
        moves = self.place({p: torch.ones_like(p) for _, p in self.moving()})  # the others stay where they are
        start = self.place({p: self.keep * self.state[p]["move"] for _, p in self.moving() if "move" in self.state[p]})
        self.demand_finite(g)
        d = self._conjugate(lambda v: moves * (G @ v) + damping * v, -g, start)
        d = -g / damping if d is None else d
        self.demand_finite(d)
        for p, t in self.take(d).items():
            self.state[p]["move"] = t.clone()
        lr = self.place({p: torch.full_like(p, group["lr"]) for group, p in self.moving()})
        move = self.take(lr * d)
        if loss is None or closure is None:
            for p, t in move.items():
                p.add_(t)
            return
        v = lr * d
        if not self.attempt(move, float(g @ v + v @ (G @ v) / 2), loss.item(), closure):
            for p in move:
                del self.state[p]["move"]

    def _conjugate(self, product: Any, b: Tensor, x: Tensor) -> Tensor | None:
        """None where the matrix bends down along the first direction already."""
        r = b - product(x)
        d, size = r, r @ r
        enough = (self.tolerance * b).square().sum()
        for k in range(self.iterations):
            if size <= enough:
                break
            Ad = product(d)
            bend = d @ Ad
            if not bend > 0:
                return x if k else None
            step = size / bend
            x, r = x + step * d, r - step * Ad
            before, size = size, r @ r
            d = r + size / before * d
        return x
