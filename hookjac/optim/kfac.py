"""Steps by Kronecker-factored curvature."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

import hookjac
from hookjac import given
from hookjac.optim import averages
from hookjac.optim.curved import Closure, Curved


class KFAC(Curved):
    """K-FAC and EKFAC (Martens & Grosse 2015; George et al. 2018).

    A step is d = F⁻¹ g with momentum, F the `Kronecker` of each parameter, a moving average of those of the batches.
    `inverse_every` steps share an inverse, under damping that is split between the two factors (their pi). With
    `corrected` F has the average's eigenvectors, and in that basis a moving average of the exact curvature's diagonal;
    then damping is added to the eigenvalues. weight and bias of a layer are two blocks.

    decay: of the moving averages. fisher, sharing: as for `hookjac.KFAC`. clip: d is scaled so that lr² gᵀ d, about
    twice the divergence that it makes of the output distribution by itself, is at most that (Ba et al. 2017); momentum
    adds such steps up. 0: it is not. Where clip is in force, lr is not. Eigenvalues below zero, of a loss that is not
    convex, count as zero under `corrected`; else such a loss is refused.
    weight_decay: decoupled, as in AdamW. adapt_every: every so many steps the damping follows Levenberg and Marquardt
    (down to `least_damping`), which takes a closure, a product with the Gauss-Newton matrix and one more evaluation; 0:
    it stays.

    A parameter without a pair of factors (none known, or a sum of pairs: a table that is the last layer, too) takes a
    step of Adam instead, of length `other_lr`.

    group: a `torch.distributed` process group, or "world", for a model under DistributedDataParallel, whose losses are
    means over each rank's batch: the factors are then of all ranks' samples together, and each is inverted on one rank.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        damping: float = 1e-2,
        decay: float = 0.95,
        inverse_every: int = 10,
        corrected: bool = False,
        fisher: Literal["mc", "exact", "empirical", "kfra"] = "mc",
        sharing: Literal["expand", "reduce"] = "expand",
        clip: float = 1e-3,
        weight_decay: float = 0.0,
        adapt_every: int = 0,
        least_damping: float = 1e-8,
        other_lr: float = 1e-3,
        group: Any = None,
        output: Any = None,
    ) -> None:
        given.numbers(clip=clip)
        given.fractions(decay=decay)
        given.counts(1, inverse_every=inverse_every)
        given.counts(0, adapt_every=adapt_every)
        given.flag(corrected=corrected)
        if group is not None and (corrected or adapt_every):
            raise ValueError("over a group, KFAC has neither corrected=True nor adapt_every: their parts do not add up")
        super().__init__(model, params, {
            "lr": lr, "momentum": momentum, "damping": damping, "weight_decay": weight_decay, "other_lr": other_lr,
            "least_damping": least_damping, "steps": 0,
        }, output=output)  # fmt: skip
        self.demand_precision()
        self.decay, self.inverse_every, self.adapt_every, self.clip = decay, inverse_every, adapt_every, clip
        self.corrected, self.fisher, self.sharing, self.group = corrected, fisher, sharing, group

        hookjac.extend(model, hookjac.KFAC(fisher=fisher, sharing=sharing), **self.options())  # refuses what cannot be

    def demand_options(self, options: dict[str, Any]) -> None:
        super().demand_options(options)
        given.positive(least_damping=options["least_damping"])
        given.fractions(momentum=options["momentum"])

    def options(self) -> dict[str, Any]:
        return {} if self.group is None else {"group": self.group}

    def wanted(self) -> list[hookjac.Quantity]:
        bases: dict[Tensor | str, hookjac.KroneckerEigen] = {
            p: averages.basis(s) for p, s in self.state.items() if "Q_B" in s and p.requires_grad
        }
        factors = hookjac.KFAC(
            fisher=self.fisher, sharing=self.sharing, corrected=bases if self.corrected else False, otherwise="none"
        )
        return [factors, hookjac.GGNMP()] if self._adapts() else [factors]

    def update(self, loss: Tensor | None, closure: Closure | None) -> None:
        if self._adapts() and closure is None:
            raise hookjac.HookjacError(
                "KFAC(adapt_every=...) has to evaluate the loss after a step: use optimizer.step(closure)."
            )
        for _, p in self.moving():  # all of them, before anything is learnt
            self.demand_finite(p.grad, *averages.factors(p.kfac))  # type: ignore[attr-defined]
        move: dict[nn.Parameter, Tensor] = {}
        factored: list[tuple[dict[str, Any], nn.Parameter]] = []
        for group, p in self.moving():
            assert p.grad is not None
            found = p.kfac  # type: ignore[attr-defined]
            if not averages.factors(found):
                step = group["other_lr"] * averages.adam(self.state[p], p.grad)
                move[p] = -step - group["lr"] * group["weight_decay"] * p
            else:
                averages.learn(self.state[p], found, self.decay)
                if "B" in self.state[p]:  # else it was never reached, and has no gradient
                    factored.append((group, p))
        renew = self.param_groups[0]["steps"] % self.inverse_every == 0
        new = [(group, p) for group, p in factored if renew or not {"Q_B", "B_inverse"} & self.state[p].keys()]
        if self.corrected:
            for _, p in new:
                averages.turn(self.state[p], p.shape)
        else:
            averages.invert([(self.state[p], p.shape, group["damping"]) for group, p in new], self.group)
        directions: list[tuple[dict[str, Any], nn.Parameter, Tensor]] = []
        pulls = 0.0
        for group, p in factored:
            assert p.grad is not None
            directions.append((group, p, averages.solve(self.state[p], p.grad, group["damping"])))
            pulls += group["lr"] ** 2 * float((directions[-1][2] * p.grad).sum())
        scale = min(1.0, math.sqrt(self.clip / pulls)) if self.clip and pulls > 0 else 1.0
        for group, p, d in directions:
            velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
            velocity.mul_(group["momentum"]).add_(d, alpha=scale)
            move[p] = -group["lr"] * (velocity + group["weight_decay"] * p)
        adapts = self._adapts()
        for group in self.param_groups:
            group["steps"] += 1
        if adapts:
            self._try(move, loss, closure)
            return
        for p, step in move.items():
            p.add_(step)

    def _adapts(self) -> bool:
        return self.adapt_every > 0 and (self.param_groups[0]["steps"] + 1) % self.adapt_every == 0

    def _try(self, move: dict[nn.Parameter, Tensor], loss: Tensor | None, closure: Closure | None) -> None:
        assert loss is not None
        assert closure is not None
        assert self.ext is not None
        v = self.place(move)
        g = self.place({p: p.grad for _, p in self.moving() if p.grad is not None})
        if not self.attempt(move, float(g @ v + v @ (self.ext.ggn @ v) / 2), loss.item(), closure):
            for p in move:
                self.state[p].pop("velocity", None)
