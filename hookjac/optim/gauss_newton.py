"""Steps by the whole generalised Gauss-Newton matrix G, never built, but solved with through its kernel.

N samples · V columns of the loss's root, C or fewer · P entries of all parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import hookjac
from hookjac import given
from hookjac.optim.curved import Closure, Curved


class GaussNewton(Curved):
    """Levenberg and Marquardt's method: (G + damping) d = -g, solved exactly in the space of the outputs.

    With W [N V, P] the root of G = Wᵀ W, d = -(g - Wᵀ (W Wᵀ + damping)⁻¹ W g) / damping (Woodbury): one Cholesky of the
    kernel W Wᵀ [N V, N V], and W only as its factors. What rounding spoils at small damping, `refine` corrections
    mend. A step is lr d. Given a closure, one that raises the loss is taken back and tried again under more damping, up
    to `tries` times, and the damping follows how well the quadratic model foretold the loss, down to `least_damping`;
    without one it stays.

    Penalties on the parameters are in g, not in G. Needs a loss that is convex in the outputs. Cost: C backwards, N² V²
    inner products, (N V)³ / 3; and a closure for each try.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1.0,
        damping: float = 1e-2,
        least_damping: float = 1e-8,
        tries: int = 5,
        refine: int = 1,
        output: Any = None,
    ) -> None:
        given.counts(1, tries=tries)
        given.counts(0, refine=refine)
        super().__init__(model, params, {"lr": lr, "damping": damping, "least_damping": least_damping}, output=output)
        self.demand_precision()
        self.tries, self.refine = tries, refine

    single = True

    def demand_options(self, options: dict[str, Any]) -> None:
        super().demand_options(options)
        given.positive(damping=options["damping"], least_damping=options["least_damping"])

    def wanted(self) -> list[hookjac.Quantity]:
        return [hookjac.GGNSqrt(structured=True)]

    def update(self, loss: Tensor | None, closure: Closure | None) -> None:
        found = list(self.moving())
        if len({p.dtype for _, p in found}) > 1:
            raise hookjac.HookjacError("GaussNewton solves for all parameters together, and they are of several dtypes")
        met = {p: p.ggn_sqrt for _, p in found if p.ggn_sqrt.shape[1]}  # type: ignore[attr-defined]
        W = hookjac.Jacobian({str(k): root for k, root in enumerate(met.values())}) if met else None
        g = {p: p.grad.clone() for _, p in found if p.grad is not None}  # a closure puts others in their place
        K = None if W is None else W.gram().reshape(W.shape[0], -1)
        self.demand_finite(K, *g.values())
        for _ in range(self.tries):
            d = self._solved(W, K, g, list(met), self.damping)
            move = {p: group["lr"] * d[p] for group, p in found}
            if loss is None or closure is None:
                for p, t in move.items():
                    p.add_(t)
                return
            bend = 0.0 if W is None else (W @ _flat(move, met)).square().sum()
            slope = sum((g[p] * t).sum() for p, t in move.items())
            if self.attempt(move, float(slope + bend / 2), loss.item(), closure):
                return

    def _solved(
        self,
        W: hookjac.Jacobian | None,
        K: Tensor | None,
        g: dict[nn.Parameter, Tensor],
        met: list[nn.Parameter],
        damping: float,
    ) -> dict[nn.Parameter, Tensor]:
        d = {p: -t / damping for p, t in g.items()}  # all there is where G is zero
        if W is None or K is None:
            return d
        root = torch.linalg.cholesky(K + damping * torch.eye(len(K), dtype=K.dtype, device=K.device))

        def solve(v: Tensor) -> Tensor:
            return (v - W.T @ torch.cholesky_solve((W @ v).unsqueeze(1), root).squeeze(1)) / damping

        right = -_flat(g, met)
        x = solve(right)
        for _ in range(self.refine):
            x = x + solve(right - W.T @ (W @ x) - damping * x)
        for p, t in zip(met, x.split([p.numel() for p in met]), strict=True):
            d[p] = t.view_as(p)
        return d


def _flat(tensors: dict[nn.Parameter, Tensor], params: Iterable[nn.Parameter]) -> Tensor:
    return torch.cat([tensors[p].reshape(-1) for p in params])
