"""Layers that act entry by entry: y = f(x). A row each: first derivative, second derivative (none where zero).

At a kink the value is the one that PyTorch's own backward takes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hookjac.rule import Call, elementwise, register

_SQRT_2PI = math.sqrt(2 * math.pi)


def _is(condition: Tensor, x: Tensor) -> Tensor:
    return condition.to(x.dtype)


# Piecewise linear -------------------------------------------------------------------------------------------


# Said as "not outside", for so PyTorch says it: NaN passes.


def _leaky(call: Call) -> Tensor:
    x = call.x
    return torch.where(x > 0, x.new_ones(()), x.new_full((), call.options.negative_slope))


def _hardtanh(call: Call) -> Tensor:
    m = call.options
    return ~((call.x <= m.min_val) | (call.x >= m.max_val))


def _hardshrink(call: Call) -> Tensor:
    return ~((call.x >= -call.options.lambd) & (call.x <= call.options.lambd))


register(elementwise("relu", nn.ReLU, d1=lambda c: ~(c.x <= 0), d2=None))
register(elementwise("leaky relu", nn.LeakyReLU, d1=_leaky, d2=None))
register(elementwise("hardtanh", nn.Hardtanh, nn.ReLU6, d1=_hardtanh, d2=None))
register(elementwise("threshold", nn.Threshold, d1=lambda c: ~(c.x <= c.options.threshold), d2=None))
register(elementwise("shrink", nn.Hardshrink, nn.Softshrink, d1=_hardshrink, d2=None))
# PyTorch's backward has this slope in float32 whatever the input's type; the sum must equal its gradient
_SIXTH = float(torch.tensor(1 / 6, dtype=torch.float32))
register(elementwise("hardsigmoid", nn.Hardsigmoid, d1=lambda c: _is((c.x > -3) & (c.x < 3), c.x) * _SIXTH, d2=None))

# Random slopes: read from the graph as they were drawn ------------------------------------------------------

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
register(elementwise("dropout", *_DROPOUTS, d1=lambda c: c.drawn(), d2=None))
register(elementwise("rrelu", nn.RReLU, d1=lambda c: c.drawn(), d2=None))

# Smooth -----------------------------------------------------------------------------------------------------


def _sigmoid1(call: Call) -> Tensor:
    s = call.x.sigmoid()
    return s * (1 - s)


def _sigmoid2(call: Call) -> Tensor:
    s = call.x.sigmoid()
    return s * (1 - s) * (1 - 2 * s)


def _tanh1(call: Call) -> Tensor:
    return 1 - call.x.tanh().square()


def _tanh2(call: Call) -> Tensor:
    t = call.x.tanh()
    return -2 * t * (1 - t.square())


def _silu1(call: Call) -> Tensor:
    s = call.x.sigmoid()
    return s * (1 + call.x * (1 - s))


def _silu2(call: Call) -> Tensor:
    s = call.x.sigmoid()
    return s * (1 - s) * (2 + call.x * (1 - 2 * s))


def _mish1(call: Call) -> Tensor:
    t, s = nn.functional.softplus(call.x).tanh(), call.x.sigmoid()
    return t + call.x * s * (1 - t.square())


def _mish2(call: Call) -> Tensor:
    t, s = nn.functional.softplus(call.x).tanh(), call.x.sigmoid()
    u = 1 - t.square()  # d tanh(softplus) = u s
    return u * s * (2 + call.x * ((1 - s) - 2 * t * s))


def _gelu1(call: Call) -> Tensor:
    x = call.x
    if call.options.approximate == "tanh":
        t, du, _ = _gelu_tanh(x)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t.square()) * du
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x.square()) / _SQRT_2PI


def _gelu2(call: Call) -> Tensor:
    x = call.x
    if call.options.approximate == "tanh":
        t, du, ddu = _gelu_tanh(x)
        u = 1 - t.square()
        return u * du + 0.5 * x * u * (ddu - 2 * t * du.square())
    return (2 - x.square()) * torch.exp(-0.5 * x.square()) / _SQRT_2PI


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tanh(u), u', u'' for u = sqrt(2/pi) (x + 0.044715 x³)."""
    k, c = math.sqrt(2 / math.pi), 0.044715
    return (k * (x + c * x**3)).tanh(), k * (1 + 3 * c * x.square()), 6 * k * c * x


def _softplus(call: Call) -> tuple[Tensor, Tensor]:
    """Slope of the smooth part, and where softplus has become the identity."""
    m = call.options
    z = call.x * m.beta
    return z.sigmoid(), z > m.threshold


def _softplus1(call: Call) -> Tensor:
    s, straight = _softplus(call)
    return torch.where(straight, torch.ones_like(s), s)


def _softplus2(call: Call) -> Tensor:
    s, straight = _softplus(call)
    return torch.where(straight, torch.zeros_like(s), call.options.beta * s * (1 - s))


def _exponential(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ELU, CELU and SELU are scale * alpha (exp(x / width) - 1) below zero; scale x above."""
    m = call.options
    if isinstance(call.module, nn.SELU):
        alpha, width, scale = 1.6732632423543772848170429916717, 1.0, 1.0507009873554804934193349852946
    elif isinstance(call.module, nn.CELU):
        # PyTorch's backward rounds this alpha to float32, whatever the input's type; the sum must equal its gradient
        alpha, width, scale = m.alpha, float(torch.tensor(m.alpha, dtype=torch.float32)), 1.0
    else:
        alpha, width, scale = m.alpha, 1.0, 1.0
    below = scale * alpha / width * torch.exp(call.x.clamp(max=0) / width)
    return below, below / width, call.x <= 0, torch.full_like(below, scale)


def _exponential1(call: Call) -> Tensor:
    slope, _, below, above = _exponential(call)
    return torch.where(below, slope, above)


def _exponential2(call: Call) -> Tensor:
    _, curve, _, _ = _exponential(call)
    return torch.where(call.x < 0, curve, torch.zeros_like(curve))  # at zero PyTorch takes the other side


def _hardswish1(call: Call) -> Tensor:
    x = call.x
    return torch.where(x <= -3, 0.0, torch.where(x < 3, x / 3 + 0.5, 1.0)).to(x.dtype)


def _softsign2(call: Call) -> Tensor:
    return -2 * call.x.sign() / (1 + call.x.abs()) ** 3


register(elementwise("sigmoid", nn.Sigmoid, d1=_sigmoid1, d2=_sigmoid2))
register(elementwise("tanh", nn.Tanh, d1=_tanh1, d2=_tanh2))
register(elementwise("tanhshrink", nn.Tanhshrink, d1=lambda c: c.x.tanh().square(), d2=lambda c: -_tanh2(c)))
register(elementwise("silu", nn.SiLU, d1=_silu1, d2=_silu2))
register(elementwise("mish", nn.Mish, d1=_mish1, d2=_mish2))
register(elementwise("gelu", nn.GELU, d1=_gelu1, d2=_gelu2))
register(elementwise("softplus", nn.Softplus, d1=_softplus1, d2=_softplus2))
register(elementwise("log sigmoid", nn.LogSigmoid, d1=lambda c: (-c.x).sigmoid(), d2=lambda c: -_sigmoid1(c)))
register(elementwise("softsign", nn.Softsign, d1=lambda c: 1 / (1 + c.x.abs()).square(), d2=_softsign2))
register(elementwise("exponential", nn.ELU, nn.CELU, nn.SELU, d1=_exponential1, d2=_exponential2))
register(elementwise("hardswish", nn.Hardswish, d1=_hardswish1, d2=lambda c: _is((c.x > -3) & (c.x < 3), c.x) / 3))
