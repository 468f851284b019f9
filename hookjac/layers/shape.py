"""Layers that only move entries about."""

from __future__ import annotations

from torch import Tensor, nn

from hookjac.places import reshaped
from hookjac.rule import Call, linear_map, register, unmoved


def _back(call: Call, G: Tensor) -> Tensor:  # any number of samples: [V, N, *out] -> [V, N, *in]
    return G.reshape(*G.shape[:2], *call.x.shape[1:])


def _keeps_samples(module: nn.Module) -> bool:
    first = module.start_dim if isinstance(module, nn.Flatten) else module.dim
    return isinstance(first, int) and first > 0


register(linear_map("identity", nn.Identity, pull=lambda call, G: G, place=unmoved))
register(
    linear_map(
        "reshape",
        nn.Flatten,
        nn.Unflatten,
        pull=_back,
        claims=_keeps_samples,
        place=lambda call, layout, out: reshaped(layout, out, call.x.shape),
    )
)
