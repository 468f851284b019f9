"""Layers that multiply by a matrix. o/i output/input features, L positions: all axes but samples and features."""

from __future__ import annotations

from torch import Tensor, nn

from hookjac.factor import Dense, Factor, Outer
from hookjac.rule import Call, Rule, register
from hookjac.samples import Layout


def _positions(t: Tensor) -> Tensor:  # [V, N, *positions, d] -> [V, N, L, d], views where possible
    return t.unsqueeze(2) if t.dim() == 3 else t.flatten(2, -2)


def _linear_pull(call: Call, G: Tensor) -> Tensor:  # [V, ..., o] -> [V, ..., i]
    return G @ call.values["weight"]


def _linear_factors(call: Call, G: Tensor, layout: Layout) -> dict[str, Factor]:
    g = _positions(layout.split(G))  # [V, N, L, o]
    found: dict[str, Factor] = {}
    if "weight" in call.params:
        found["weight"] = Outer(g, _positions(layout.split(call.x.unsqueeze(0)))[0])
    if "bias" in call.params:
        found["bias"] = Dense(g[:, :, 0] if g.shape[2] == 1 else g.sum(2))
    return found


def _samples_not_features(call: Call, layout: Layout) -> bool:
    return layout.axis < call.x.dim() - 1


register(
    Rule(
        name="linear",
        modules=(nn.Linear,),
        params=("weight", "bias"),
        pull=_linear_pull,
        factors=_linear_factors,
        fits=_samples_not_features,
        constant=True,
    )
)
