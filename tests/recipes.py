"""Random models, losses and requests as plain data: a `Recipe` prints as what can be pasted into a test.

A net carries tensors [N, T, d] from step to step; each step may look back at an earlier one, so that any graph of
layers, glue, sharing and in-place code can come about. `recipes()` draws them for hypothesis, which makes a failing
one small.

N samples · T positions · d features · C outputs.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cases import Fn, par
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import hookjac

Ask = tuple[str, dict[str, Any]]  # a quantity's name and its options; generator= is a seed


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that there is to know of one case.

    steps: names in STEPS, and how far each looks back. given: what the model is called with ("numbers", "ids", or "tied
    ids", whose table is the head's weight as well). head: what becomes of the last tensor. N, T, d, C: sizes.
    loss: a name in LOSSES. penalty: one in PENALTIES. output, used: of a net that returns several tensors, which one is
    selected and which ones the loss uses besides; None: it returns one.
    frozen: numbers of parameters. shared: the last square layer has the first one's weight. asked: quantities.
    way: "extend", "create_graph", or "accumulate". trigger: how the backward is started. later: what is changed before
    each further step. one_block: all steps in one block. dtype: "float64", "float32" or "bfloat16" (by autocast).
    chunk: entries of a temporary.
    """

    steps: tuple[tuple[str, int], ...]
    asked: tuple[Ask, ...]
    loss: str = "random"
    given: str = "numbers"
    head: str = "sum"
    N: int = 2
    T: int = 1
    d: int = 2
    C: int = 2
    penalty: str | None = None
    output: str | None = None
    used: tuple[str, ...] = ()
    frozen: tuple[int, ...] = ()
    shared: bool = False
    way: str = "extend"
    trigger: str = "backward"
    later: tuple[str, ...] = ()
    one_block: bool = False
    dtype: str = "float64"
    chunk: int | None = None
    seed: int = 0


# Steps: parts made of d, and what is done with the model, the last tensor and an earlier one, all [N, T, d] -----------

Step = tuple[Callable[[int], dict[str, Any]], Callable[[Any, Tensor, Tensor], Tensor]]


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    return layer


def _write(h: Tensor, e: Tensor) -> Tensor:
    h[..., 0] = e[..., -1].sin()
    h.mul_(0.7)
    return h


class Cube(torch.autograd.Function):
    """Its backward is its derivative, and can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * g * x * w, (g * x * x).sum((0, 1))


def linear(d: int) -> dict[str, Any]:
    return {"f": nn.Linear(d, d)}


def _lined_up(m: Any, x: Tensor) -> Tensor:
    return m.f(x.transpose(1, 2)).transpose(1, 2)


def _picture(m: Any, x: Tensor) -> Tensor:
    return m.f(x.unsqueeze(1)).mean(1)


def _norm(kind: Callable[[int], nn.Module]) -> Step:
    return lambda d: {"f": kind(d)}, lambda m, x, e: _lined_up(m, x)


def _pointwise(kind: Callable[[], nn.Module]) -> Step:
    return lambda d: {"f": kind()}, lambda m, x, e: m.f(x)


def _after_linear(change: Callable[[Any, Tensor, Tensor], Tensor], **parts: Any) -> Step:
    return lambda d: {**linear(d), **parts}, lambda m, x, e: change(m, m.f(x), e)


def _glue(change: Callable[[Tensor, Tensor], Tensor]) -> Step:
    return lambda d: {}, lambda m, x, e: change(x, e)


def _recurrent(kind: type[nn.Module], ways: int = 1, **options: Any) -> Step:
    return (
        lambda d: {"f": kind(d, d, batch_first=True, bidirectional=ways == 2, **options)},
        lambda m, x, e: m.f(x)[0][..., : x.shape[2]],
    )


def _attends(x: Tensor, e: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(x, e, x, **options)


def _pruned(d: int) -> dict[str, Any]:
    layer = nn.Linear(d, d)
    prune.random_unstructured(layer, "weight", amount=1)
    return {"f": layer}


def _batch_norm(d: int) -> nn.Module:
    layer = nn.BatchNorm1d(d)
    layer.running_mean, layer.running_var = torch.randn(d) / 2, torch.rand(d) + 0.5
    return layer


def _cells(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros_like(x[:, 0])
    found = []
    for t in range(x.shape[1]):
        h = m.f(x[:, t], h)
        found.append(h)
    return torch.stack(found, 1)


def _in_views(h: Tensor, e: Tensor) -> Tensor:
    h += e
    h[..., :1].mul_(2).add_(e[..., :1])
    h.transpose(1, 2)[:, -1].tanh_()
    return h


def _columns(x: Tensor, e: Tensor) -> Tensor:
    parts = list(x.split(1, -1))
    return torch.cat([*parts[1:], parts[0] * e[..., :1]], -1)


def _hyper(m: Any, x: Tensor, e: Tensor) -> Tensor:
    d = x.shape[2]
    return torch.bmm(x, m.f(e.mean(1)).reshape(-1, d, d).tanh())


def _experts(m: Any, x: Tensor, e: Tensor) -> Tensor:
    return torch.einsum("ntd,kde,ntk->nte", x, m.w, torch.softmax(m.f(e), -1)[..., :2])


def _slope(m: Any, x: Tensor) -> Tensor:
    """A net's own derivative in its input, as of an energy or a differential equation."""
    at = x if x.requires_grad else x.detach().requires_grad_()
    (found,) = torch.autograd.grad(m.f(at).sin().sum(), at, create_graph=True)
    return found


def _solved(x: Tensor, e: Tensor) -> Tensor:
    A = torch.eye(x.shape[2]).to(x) + 0.3 * e.mT @ e
    return torch.linalg.solve(A, x.mT).mT


def _patches(x: Tensor) -> Tensor:
    image = F.unfold(x.unsqueeze(1), 3, padding=1)  # [N, 9, T d]
    return (image * torch.linspace(-1, 1, 9).to(x)[:, None]).sum(1).view(x.shape)


def _rows_of(x: Tensor) -> Tensor:
    """Row numbers of a table of four, from the signs of x."""
    return (x[..., 0] > 0).long() + 2 * (x[..., 1] > 0).long()


FEW_STEPS: dict[str, Step] = {
    "linear": (lambda d: {"f": nn.Linear(d, d)}, lambda m, x, e: m.f(x)),
    "tanh": (lambda d: {"f": nn.Tanh()}, lambda m, x, e: m.f(x)),
    "relu": (lambda d: {"f": nn.ReLU()}, lambda m, x, e: m.f(x)),
    "functional gelu": (lambda d: {}, lambda m, x, e: nn.functional.gelu(x)),
    "in-place relu": (lambda d: {"f": nn.Linear(d, d), "r": nn.ReLU(inplace=True)}, lambda m, x, e: m.r(m.f(x))),
    "residual": (lambda d: {"f": nn.Linear(d, d)}, lambda m, x, e: x + torch.sin(m.f(x))),
    "skip": (lambda d: {}, lambda m, x, e: x + e),
    "gate": (lambda d: {"f": nn.Linear(d, d)}, lambda m, x, e: x * torch.sigmoid(m.f(e))),
    "softmax": (lambda d: {}, lambda m, x, e: torch.softmax(x, -1)),
    "layer norm": (lambda d: {"f": nn.LayerNorm(d)}, lambda m, x, e: m.f(x)),
    "scale": (lambda d: {"s": par(d)}, lambda m, x, e: x * m.s),
    "attention": (lambda d: {"f": nn.Linear(d, d)}, lambda m, x, e: torch.softmax(m.f(x) @ e.transpose(1, 2), -1) @ x),
    "reuse": (lambda d: {"f": nn.Linear(d, d)}, lambda m, x, e: m.f(torch.tanh(m.f(x)))),
    "time first": (lambda d: {"f": nn.Linear(d, d)}, lambda m, x, e: m.f(x.transpose(0, 1)).transpose(0, 1)),
    "rows": (lambda d: {"f": nn.Linear(d, d)}, lambda m, x, e: m.f(x.reshape(-1, x.shape[-1])).reshape(x.shape)),
    "permute features": (lambda d: {}, lambda m, x, e: x.flip(-1)),
    "mix time": (lambda d: {}, lambda m, x, e: x.cumsum(1)),
    "slices": (lambda d: {}, lambda m, x, e: torch.cat([x[..., 1:], x[..., :1].exp()], -1)),
    "zero linear": (lambda d: {"f": _zero(nn.Linear(d, d))}, lambda m, x, e: x + m.f(x).sin() * e),
    "halves": (lambda d: {"f": nn.Linear(d, 2 * d)}, lambda m, x, e: torch.mul(*m.f(x).chunk(2, -1))),
    "largest": (lambda d: {}, lambda m, x, e: x * e.max(-1, keepdim=True).values),
    "convolution": (
        lambda d: {"f": nn.Conv1d(d, d, 3, padding=1)},
        lambda m, x, e: m.f(x.transpose(1, 2)).transpose(1, 2),
    ),
    "positions": (lambda d: {"s": par(4, d)}, lambda m, x, e: (x + m.s[: x.shape[1]]).tanh()),
    "functional linear": (lambda d: {"s": par(d, d)}, lambda m, x, e: torch.nn.functional.linear(x, m.s.exp())),
    "product": (lambda d: {"s": par(d, d)}, lambda m, x, e: x @ m.s),
    "in-place slice": (lambda d: {"f": nn.Linear(d, d)}, lambda m, x, e: _write(m.f(x), e)),
}

MORE_STEPS: dict[str, Step] = {
    # entry by entry
    "gelu": _pointwise(nn.GELU), "elu": _pointwise(lambda: nn.ELU(0.7)), "leaky": _pointwise(lambda: nn.LeakyReLU(0.2)),
    "softplus": _pointwise(lambda: nn.Softplus(2.0)), "silu": _pointwise(nn.SiLU), "mish": _pointwise(nn.Mish),
    "hardswish": _pointwise(nn.Hardswish), "hardtanh": _pointwise(lambda: nn.Hardtanh(-0.4, 0.6)),
    "softsign": _pointwise(nn.Softsign), "log sigmoid": _pointwise(nn.LogSigmoid), "selu": _pointwise(nn.SELU),
    "tanhshrink": _pointwise(nn.Tanhshrink), "softshrink": _pointwise(lambda: nn.Softshrink(0.2)),
    "hardshrink": _pointwise(lambda: nn.Hardshrink(0.2)), "celu": _pointwise(lambda: nn.CELU(1.3)),
    "sigmoid": _pointwise(nn.Sigmoid), "relu6": _pointwise(nn.ReLU6), "threshold": _pointwise(
        lambda: nn.Threshold(0.1, -0.3)), "prelu": _pointwise(nn.PReLU),
    "prelu of channels": _norm(nn.PReLU), "dropout": _pointwise(lambda: nn.Dropout(0.3)),
    "alpha dropout": _pointwise(lambda: nn.AlphaDropout(0.3)), "rrelu": _pointwise(nn.RReLU),
    "in-place tanh": _after_linear(lambda m, h, e: torch.tanh_(h)),
    "functional relu in place": _after_linear(lambda m, h, e: F.relu_(h)),
    "square": _glue(lambda x, e: x.square()), "absolute": _glue(lambda x, e: x.abs()),
    # dense
    "no bias": (lambda d: {"f": nn.Linear(d, d, bias=False)}, lambda m, x, e: m.f(x)),
    "bilinear": (lambda d: {"f": nn.Bilinear(d, d, d)}, lambda m, x, e: m.f(x, e)),
    "weight norm": (lambda d: {"f": parametrizations.weight_norm(nn.Linear(d, d))}, lambda m, x, e: m.f(x)),
    "orthogonal": (lambda d: {"f": parametrizations.orthogonal(nn.Linear(d, d))}, lambda m, x, e: m.f(x)),
    "pruned": (_pruned, lambda m, x, e: m.f(x)),
    "einsum": (lambda d: {"w": par(d, d)}, lambda m, x, e: torch.einsum("ntd,de->nte", x, m.w)),
    "experts": (lambda d: {"w": par(2, d, d), "f": nn.Linear(d, 2)}, _experts),
    "lora": (lambda d: {"f": nn.Linear(d, d), "a": nn.Linear(d, 1, bias=False), "b": nn.Linear(1, d, bias=False)},
             lambda m, x, e: m.f(x) + m.b(m.a(x)) * 0.5),
    "merged lora": (lambda d: {"w": par(d, d), "a": par(1, d), "b": par(d, 1)},
                    lambda m, x, e: F.linear(x, m.w + m.b @ m.a)),
    "addmm": (lambda d: {"w": par(d, d), "b": par(d)},
              lambda m, x, e: torch.addmm(m.b, x.reshape(-1, x.shape[2]), m.w, alpha=0.7).view(x.shape)),
    "hyper": (lambda d: {"f": nn.Linear(d, d * d)}, _hyper),
    "generated weight": (lambda d: {"f": nn.Linear(2, d * d), "z": par(2)},
                         lambda m, x, e: F.linear(x, m.f(m.z).reshape(x.shape[2], -1))),
    "bias": (lambda d: {"b": par(d)}, lambda m, x, e: x + m.b),
    "temperature": (lambda d: {"s": nn.Parameter(torch.tensor(0.7))}, lambda m, x, e: x / m.s),
    "gain from a power": (lambda d: {"s": par(d)}, lambda m, x, e: x * (1 + m.s) ** 2),
    "unused": (linear, lambda m, x, e: x),
    "twice": (linear, lambda m, x, e: m.f(x) + m.f(e)),
    "three times": (linear, lambda m, x, e: m.f(torch.tanh(m.f(torch.sin(m.f(x)))))),
    "weight again": (linear, lambda m, x, e: torch.tanh(m.f(x)) @ m.f.weight),
    "detached": (linear, lambda m, x, e: x + m.f(e.detach())),
    "detached gate": (linear, lambda m, x, e: m.f(x) * torch.sigmoid(e).detach()),
    # convolutions and pooling
    "depthwise": (lambda d: {"f": nn.Conv1d(d, d, 3, padding=1, groups=d)}, lambda m, x, e: _lined_up(m, x)),
    "dilated": (lambda d: {"f": nn.Conv1d(d, d, 2, padding=1, dilation=2, bias=False)},
                lambda m, x, e: _lined_up(m, x)),
    "circular": (lambda d: {"f": nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")},
                 lambda m, x, e: m.f(x.flatten(0, 1).unsqueeze(1)).view(x.shape)),
    "replicating": (lambda d: {"f": nn.Conv1d(d, d, 3, padding="same", padding_mode="replicate")},
                    lambda m, x, e: _lined_up(m, x)),
    "picture": (lambda d: {"f": nn.Conv2d(1, 2, 3, padding=1)}, lambda m, x, e: _picture(m, x)),
    "strided": (lambda d: {"f": nn.Conv2d(1, 1, (1, 2), stride=(1, 2), padding=(0, 1))},
                lambda m, x, e: m.f(torch.cat([x, e], 2).unsqueeze(1))[:, 0, :, : x.shape[2]]),
    "transposed": (lambda d: {"f": nn.ConvTranspose1d(d, d, 3, padding=1)}, lambda m, x, e: _lined_up(m, x)),
    "transposed, groups": (lambda d: {"f": nn.ConvTranspose1d(d, d, 1, groups=d)}, lambda m, x, e: _lined_up(m, x)),
    "frames": (lambda d: {"f": nn.Conv1d(1, 2, 3, padding=1)},
               lambda m, x, e: m.f(x.reshape(-1, 1, x.shape[2])).mean(1).view(x.shape)),
    "average pool": (lambda d: {"f": nn.AvgPool1d(3, 1, 1)}, lambda m, x, e: m.f(x)),
    "max pool": (lambda d: {"f": nn.MaxPool1d(3, 1, 1)}, lambda m, x, e: m.f(x)),
    "adaptive pool": (lambda d: {}, lambda m, x, e: F.adaptive_avg_pool1d(x, 1) * e),
    "upsample": (lambda d: {}, lambda m, x, e: F.interpolate(x, scale_factor=2)[..., 1 : 1 + x.shape[2]]),
    # norms
    "rms norm": (lambda d: {"f": nn.RMSNorm(d)}, lambda m, x, e: m.f(x)),
    "group norm": _norm(lambda d: nn.GroupNorm(1, d)),
    "instance norm": (lambda d: {"f": nn.InstanceNorm1d(d, affine=True)},
                      lambda m, x, e: m.f(torch.cat([x, e.sin()], 1).transpose(1, 2)).transpose(1, 2)[:, : x.shape[1]]),
    "batch norm": _norm(_batch_norm),
    "functional norm": (lambda d: {}, lambda m, x, e: F.normalize(x + 0.3, dim=-1)),
    # tables, recurrent nets, attention
    "table": (lambda d: {"f": nn.Embedding(4, d)}, lambda m, x, e: x + m.f(_rows_of(e))),
    "padded table": (lambda d: {"f": nn.Embedding(4, d, padding_idx=1)}, lambda m, x, e: x * m.f(_rows_of(e))),
    "lstm": _recurrent(nn.LSTM), "gru": _recurrent(nn.GRU), "rnn": _recurrent(nn.RNN),
    "lstm both ways": _recurrent(nn.LSTM, 2), "rnn, relu": _recurrent(nn.RNN, nonlinearity="relu"),
    "gru cell": (lambda d: {"f": nn.GRUCell(d, d)}, lambda m, x, e: _cells(m, x)),
    "multihead": (lambda d: {"f": nn.MultiheadAttention(d, 1, batch_first=True)}, lambda m, x, e: m.f(x, e, x)[0]),
    "self-attention": (lambda d: {"f": nn.MultiheadAttention(d, 1, batch_first=True)},
                       lambda m, x, e: m.f(x, x, x, need_weights=False)[0]),
    "scaled dot product": _glue(_attends), "causal": _glue(lambda x, e: _attends(x, e, is_causal=True)),
    "encoder layer": (lambda d: {"f": nn.TransformerEncoderLayer(d, 1, 3, 0.1, batch_first=True)},
                      lambda m, x, e: m.f(x)),
    "encoder layer, norm first": (lambda d: {"f": nn.TransformerEncoderLayer(d, 1, 2, 0.0, "gelu", norm_first=True)},
                                  lambda m, x, e: m.f(x.transpose(0, 1)).transpose(0, 1)),
    # functions of one's own, recomputation
    "cube": (lambda d: {"w": par(d)}, lambda m, x, e: Cube.apply(x, m.w)),
    "checkpoint": (lambda d: {"b": nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Dropout(0.2), nn.Linear(d, d))},
                   lambda m, x, e: x + checkpoint(m.b, x, use_reentrant=False)),
    # glue
    "stack": _glue(lambda x, e: torch.stack([x, e.cos()], 0).mean(0)),
    "columns": _glue(_columns),
    "expand": _glue(lambda x, e: x.mean(1, keepdim=True).expand_as(x) * e),
    "roll": _glue(lambda x, e: x.roll(1, -1) - e),
    "where": _glue(lambda x, e: torch.where(x > 0.1, x.exp(), e)),
    "masked": _glue(lambda x, e: x.masked_fill(e < 0, 0.5)),
    "gather": _glue(lambda x, e: x.gather(2, (e > 0).long())),
    "picked": _glue(lambda x, e: x.index_select(2, torch.arange(x.shape[2]).flip(0))),
    "sorted": _glue(lambda x, e: x.sort(-1).values), "running max": _glue(lambda x, e: x.cummax(-1).values + e),
    "maximum": _glue(lambda x, e: torch.maximum(x, e.sin())), "clamp": _glue(lambda x, e: x.clamp(-0.5, 0.7)),
    "running product": _glue(lambda x, e: (1 + 0.3 * x).cumprod(1)),
    "log-sum-exp": _glue(lambda x, e: x - x.logsumexp(-1, keepdim=True)),
    "variance": _glue(lambda x, e: x * e.var(-1, keepdim=True)),
    "row norms": _glue(lambda x, e: x / (1 + e.norm(dim=-1, keepdim=True))),
    "outer product": _glue(lambda x, e: (x.unsqueeze(3) * e.unsqueeze(2)).sum(3)),
    "divide": _glue(lambda x, e: x / (2 + e.cos())), "power": _glue(lambda x, e: (1.5 + x.sin()) ** e.sin()),
    "fourier": _glue(lambda x, e: torch.fft.fft(x, dim=-1).real + torch.fft.rfft(e, dim=-1).abs().sum(-1, True)),
    "strided view": _glue(lambda x, e: x.as_strided(x.shape, x.stride()) if x.is_contiguous() else x.contiguous()),
    "in-place views": _after_linear(lambda m, h, e: _in_views(h, e)),
    "in-place sum": _after_linear(lambda m, h, e: h.add_(e)),
    "scatter": _after_linear(lambda m, h, e: h.scatter_add(2, (e > 0).long(), e.sin())),
    "own slope": (linear, lambda m, x, e: _slope(m, x)),
    "solve": _glue(_solved), "patches": _glue(lambda x, e: _patches(x)),
    "gated linear unit": _glue(lambda x, e: F.glu(torch.cat([x, e], -1))),
    "reflected": _glue(lambda x, e: F.pad(x, (1, 0), mode="reflect")[..., :-1]),
    "cosine similarity": _glue(lambda x, e: x * F.cosine_similarity(x, e + 0.5, dim=-1).unsqueeze(-1)),
    "local response": _glue(lambda x, e: F.local_response_norm(x.transpose(1, 2), 2).transpose(1, 2)),
    "smooth upsampling": _glue(lambda x, e: F.interpolate(x, x.shape[2] + 2, mode="linear")[..., 1:-1]),
    "error function": _glue(lambda x, e: torch.erf(x) + torch.atan2(x, 2 + e.sin())),
    "triangle": _glue(lambda x, e: torch.tril(x) + torch.triu(e, 1)),
    "products of rows": _glue(lambda x, e: x * (1 + 0.2 * e).prod(-1, keepdim=True)),
    "written rows": _glue(lambda x, e: x.index_copy(2, torch.tensor([0]), e[..., 1:2].sin())),
    "added rows": _glue(lambda x, e: x.index_add(2, torch.tensor([1, 1]), e[..., :2])),
    "windows": _glue(lambda x, e: x.unfold(2, 2, 1).prod(-1).sum(-1, keepdim=True) + e),
    "mapped": (linear, lambda m, x, e: torch.vmap(lambda a, b: torch.tanh(F.linear(a, m.f.weight)) * b)(x, e)),
    "two layers, projected": (lambda d: {"f": nn.LSTM(d, d + 1, 2, batch_first=True, proj_size=d)},
                              lambda m, x, e: m.f(x)[0]),
    "decoder layer": (lambda d: {"f": nn.TransformerDecoderLayer(d, 1, 2, 0.0, batch_first=True)},
                      lambda m, x, e: m.f(x, e)),
    "old weight norm": (lambda d: {"f": nn.utils.weight_norm(nn.Linear(d, d))}, lambda m, x, e: m.f(x)),
    "spectral norm": (lambda d: {"f": parametrizations.spectral_norm(nn.Linear(d, d)).eval()}, lambda m, x, e: m.f(x)),
    "called with a copy": (linear, lambda m, x, e: torch.func.functional_call(
        m.f, {"weight": m.f.weight * 0.5, "bias": m.f.bias}, (x,))),
    "no gradient": _glue(lambda x, e: x + e.detach().sin()),
}  # fmt: skip
STEPS: dict[str, Step] = {**FEW_STEPS, **MORE_STEPS}


class Net(nn.Module):
    """Steps over tensors [N, T, d], and a head."""

    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.recipe = r
        if r.given != "numbers":
            self.table = nn.Embedding(5, r.d)
        self.parts = nn.ModuleList(Fn(STEPS[name][1], **STEPS[name][0](r.d)) for name, _ in r.steps)
        square = [m.f for m in self.parts if type(getattr(m, "f", None)) is nn.Linear and "weight" in m.f._parameters]
        square = [f for f in square if f.in_features == f.out_features == r.d]
        if r.shared and len(square) > 1:
            square[-1].weight = square[0].weight
        if r.given == "tied ids":
            self.head: nn.Module = Fn(lambda m, x: F.linear(x, m.weight), weight=self.table.weight)
        else:
            self.head = nn.Linear(r.d, r.C)
        if r.output is not None:
            self.side = nn.Linear(r.d, 3)

    def headed(self, x: Tensor) -> Tensor:
        kind = self.recipe.head
        if kind == "mean below":
            return self.head(x.mean(1))
        out = self.head(x)
        if kind == "one":
            return out.sum((1, 2))
        return out.sum(1) if kind == "sum" else out.transpose(1, 2) if kind == "channels" else out

    def forward(self, x: Tensor) -> Any:
        seen = [x if self.recipe.given == "numbers" else self.table(x)]
        for part, (_, back) in zip(self.parts, self.recipe.steps, strict=True):
            seen.append(part(seen[-1], seen[max(0, len(seen) - 1 - back)]))
        if self.recipe.output is None:
            return self.headed(seen[-1])
        middle = seen[len(seen) // 2]
        return {"last": self.headed(seen[-1]), "middle": middle, "side": self.side(middle).mean(1)}


# Losses: of an output and targets of its shape; "mean", "sum" or "" say what the batch's size does to it --------------


def _rows(out: Tensor) -> Tensor:
    """[N, C] or [N, C, T]."""
    return out.unsqueeze(1) if out.dim() == 1 else out


def _classes(out: Tensor, y: Tensor) -> Tensor:
    """[N] or [N, T]"""
    out, y = _rows(out), _rows(y)
    return y.argmax(1)


def _entropy(out: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(_rows(out), _classes(out, y), **options)


def _weights(out: Tensor) -> Tensor:
    return torch.linspace(0.5, 2, _rows(out).shape[1]).to(out)


def _some_ignored(out: Tensor, y: Tensor) -> Tensor:
    label = _classes(out, y).clone()
    label.view(-1)[1::3] = -100
    return F.cross_entropy(_rows(out), label, ignore_index=-100)


def _flat_rows(out: Tensor, y: Tensor) -> Tensor:
    out, y = _rows(out), _rows(y)
    return F.cross_entropy(out.reshape(-1, out.shape[-1]), y.reshape(-1, y.shape[-1]).argmax(1))


def _sides(out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return out.flatten(1) if out.dim() > 1 else out.unsqueeze(1), y.flatten(1) if y.dim() > 1 else y.unsqueeze(1)


def _angles(out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """With a one beside them: of one number alone, the angle is zero, and its derivatives are rounding."""
    o, t = _sides(out, y)
    return torch.cat([o, torch.ones_like(o[:, :1])], 1), torch.cat([t, torch.ones_like(t[:, :1])], 1)


def _hinge(out: Tensor, y: Tensor) -> Tensor:
    o, t = _sides(out, y)
    return (1 - o.gather(1, t.argmax(1, keepdim=True)) + o).clamp(min=0).mean()


def _gaussian(out: Tensor, y: Tensor) -> Tensor:
    o, t = _sides(out, y)
    return F.gaussian_nll_loss(o[:, :1], t[:, :1], o[:, -1:].exp())


def _focal(out: Tensor, y: Tensor) -> Tensor:
    nll = F.cross_entropy(_rows(out), _classes(out, y), reduction="none")
    return ((1 - (-nll).exp()) ** 2 * nll).mean()


def _smooth(out: Tensor, y: Tensor) -> Tensor:
    return (y * out).sum() + 0.3 * ((out - y).square() * (1 + y.square())).sum() + 0.1 * (out.sin() * y).sum()


LOSSES: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "random": ("sum", _smooth),
    "cross entropy": ("mean", _entropy),
    "cross entropy, sum": ("sum", lambda o, y: _entropy(o, y, reduction="sum")),
    "cross entropy, weights": ("", lambda o, y: _entropy(o, y, weight=_weights(o))),
    "cross entropy, smoothing": ("mean", lambda o, y: _entropy(o, y, label_smoothing=0.2)),
    "cross entropy, all options": ("", lambda o, y: _entropy(o, y, label_smoothing=0.1, weight=_weights(o))),
    "cross entropy, probabilities": ("mean", lambda o, y: F.cross_entropy(_rows(o), _rows(y).softmax(1))),
    "cross entropy, ignoring": ("", _some_ignored),
    "cross entropy of rows": ("mean", _flat_rows),
    "cross entropy, weighted samples": (
        "", lambda o, y: (F.cross_entropy(_rows(o), _classes(o, y), reduction="none") * _rows(y)[:, 0].abs()).mean()),
    "nll": ("mean", lambda o, y: F.nll_loss(F.log_softmax(_rows(o), 1), _classes(o, y))),
    "softmax and log": ("mean", lambda o, y: -(_rows(o).softmax(1).log() * _rows(y).softmax(1)).sum(1).mean()),
    "logistic": ("mean", lambda o, y: F.binary_cross_entropy_with_logits(o, y.sigmoid())),
    "logistic, weights": ("", lambda o, y: F.binary_cross_entropy_with_logits(
        o, (y > 0).to(o), pos_weight=torch.tensor(1.7).to(o), weight=y.abs())),
    "bce of sigmoid": ("mean", lambda o, y: F.binary_cross_entropy(o.sigmoid(), y.sigmoid())),
    "squares": ("mean", lambda o, y: F.mse_loss(o, y)),
    "half squares, sum": ("sum", lambda o, y: 0.5 * (o - y).square().sum()),
    "squares below one's own": ("mean", lambda o, y: F.mse_loss(o, o.detach())),
    "absolute": ("mean", lambda o, y: F.l1_loss(o, y)),
    "smooth absolute": ("mean", lambda o, y: F.smooth_l1_loss(o, y, beta=0.5)),
    "huber": ("sum", lambda o, y: F.huber_loss(o, y, reduction="sum", delta=0.5)),
    "kl": ("mean", lambda o, y: F.kl_div(_rows(o).log_softmax(1), _rows(y).softmax(1), reduction="batchmean")),
    "poisson": ("mean", lambda o, y: F.poisson_nll_loss(o, y.abs())),
    "gaussian": ("mean", _gaussian),
    "hinge": ("mean", _hinge),
    "squared hinge": ("mean", lambda o, y: (1 - o * y.sign()).clamp(min=0).square().mean()),
    "cosine": ("mean", lambda o, y: F.cosine_embedding_loss(*_angles(o, y), torch.ones(len(o)).to(o))),
    "similarity": ("sum", lambda o, y: F.cosine_similarity(*_angles(o, y)).sum()),
    "soft margin": ("mean", lambda o, y: F.soft_margin_loss(o, y.sign())),
    "linear": ("sum", lambda o, y: (o * y).sum()),
    "mean of all": ("mean", lambda o, y: o.mean()),
    "nothing": ("sum", lambda o, y: (o * 0).sum()),
    "focal": ("mean", _focal),
    "negative entropy": ("mean", lambda o, y: (_rows(o).softmax(1) * _rows(o).log_softmax(1)).sum(1).mean()),
    "root of each": ("mean", lambda o, y: _sides(o, y)[0].square().sum(1).add(1).sqrt().mean()),
    "largest of each": ("mean", lambda o, y: _sides(o, y)[0].max(1).values.square().mean()),
    "log-sum-exp": ("mean", lambda o, y: _sides(o, y)[0].logsumexp(1).mean()),
    "policy gradient": ("mean", lambda o, y: (-F.log_softmax(_rows(o), 1) * y.detach().view_as(_rows(o))).mean()),
    "first sample": ("", lambda o, y: (o[:1] - y[:1]).square().sum()),
    "one entry": ("sum", lambda o, y: _sides(o, y)[0][:, 0].exp().sum()),
    "quartic": ("sum", lambda o, y: ((o - y) ** 4).sum()),
}  # fmt: skip

PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "wave": lambda p: (p.square() * p.cos()).sum(),
    "weight decay": lambda p: 0.1 * p.square().sum(),
    "not diagonal": lambda p: 0.1 * p.sum().sin() * p.square().sum(),
}


def penalty(r: Recipe, model: nn.Module) -> Tensor:
    zero = next(iter(model.parameters())).new_zeros(())
    if r.penalty is None:
        return zero
    return sum((PENALTIES[r.penalty](p) for p in model.parameters() if p.requires_grad), zero)


def data_loss(r: Recipe, out: Any, seed: int, rows: slice = slice(None), whole: int = 0) -> Tensor:
    """The part of the loss that is of outputs. rows: which ones of a batch of `whole` samples these outputs are of."""

    def one(key: str | None) -> Tensor:
        t = out if key is None else out[key]
        t = t.float() if t.dtype == torch.bfloat16 else t
        draw = torch.Generator().manual_seed(seed + len(key or ""))
        y = torch.randn(whole or len(t), *t.shape[1:], generator=draw, dtype=torch.float64)[rows]
        return LOSSES[r.loss][1](t, y.to(t.dtype))

    if r.output is None:
        return one(None)
    return sum((one(key) for key in r.used), one(r.output))


# Building ---------------------------------------------------------------------------------------------------------


def at_rest(net: nn.Module) -> None:
    """What mixes samples, or keeps a state from call to call, in training mode."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d) or type(m).__name__ == "_SpectralNorm":
            m.eval()


def build(r: Recipe) -> Net:
    torch.manual_seed(r.seed)
    net = Net(r).to(torch.float64 if r.dtype == "float64" else torch.float32)
    at_rest(net)
    params = list(net.parameters())
    for k in r.frozen[: len(params) - 1]:
        params[k % len(params)].requires_grad_(False)
    if not any(p.requires_grad for p in params):
        params[0].requires_grad_(True)
    return net


def inputs(r: Recipe, N: int, T: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(1000 + seed)
    if r.given != "numbers":
        return torch.randint(5, (N, T), generator=draw)
    x = torch.randn(N, T, r.d, generator=draw, dtype=torch.float64)
    return x if r.dtype == "float64" else x.float()


MAKERS: dict[str, Callable[..., hookjac.Quantity]] = {
    "grad_sample": hookjac.GradSample, "grad_sample_norm": hookjac.GradSampleNorm,
    "grad_sample_gram": hookjac.GradSampleGram, "grad_sample_projected": hookjac.GradSampleProjected,
    "grad_sq_sum": hookjac.GradSqSum, "grad_var": hookjac.GradVar, "jac": hookjac.Jac, "ntk": hookjac.NTK,
    "ggn_diag": hookjac.GGNDiag, "ggn_diag_sample": hookjac.GGNDiagSample, "ggn_diag_mc": hookjac.GGNDiagMC,
    "ggn_sqrt": hookjac.GGNSqrt, "ggn_block": hookjac.GGNBlock, "hess_diag": hookjac.HessDiag,
    "hess_diag_sample": hookjac.HessDiagSample, "hess_block": hookjac.HessBlock, "hutchinson": hookjac.Hutchinson,
    "hesscale": hookjac.HesScale, "kfac": hookjac.KFAC, "ggn_mp": hookjac.GGNMP, "hess_mp": hookjac.HessMP,
}  # fmt: skip
HESSIANS = ("hess_diag", "hess_diag_sample", "hess_block")
ALL_SAMPLES = ("hutchinson", "hesscale", "ggn_mp", "hess_mp")  # they take no subsample=
FIRST_ORDER = ("grad_sample", "grad_sample_norm", "grad_sample_gram", "grad_sample_projected", "grad_sq_sum",
               "grad_var", "jac", "ntk")  # fmt: skip
ADDING = ("grad_sq_sum", "grad_var", "ggn_diag", "hess_diag", "ggn_block", "hess_block", "kfac")


def records(r: Recipe) -> list[hookjac.Quantity]:
    made = []
    for name, options in r.asked:
        given = dict(options)
        if "generator" in given:
            given["generator"] = torch.Generator().manual_seed(given["generator"])
        made.append(MAKERS[name](**given))
    return made


@contextlib.contextmanager
def chunked(entries: int | None) -> Iterator[None]:
    """Temporaries of at most so many entries, so that tiny models go in several pieces, too."""
    names = ("jacobian", "factor.dense", "factor.outer", "factor.lookup", "factor.mixed", "factor.metric",
             "factor.unfolded", "factor", "products", "roads", "engine", "loss")  # fmt: skip
    undo = []
    for module in [importlib.import_module(f"hookjac.{name}") for name in names]:
        for attribute in ("CHUNK", "_CHUNK", "_HELD"):
            if entries is not None and hasattr(module, attribute):
                undo.append((module, attribute, getattr(module, attribute)))
                setattr(module, attribute, entries)
    try:
        yield
    finally:
        for module, attribute, before in undo:
            setattr(module, attribute, before)


# Drawing ----------------------------------------------------------------------------------------------------------


def seldom(draw: Any, one_in: int) -> bool:
    """False shrinks best."""
    return draw(st.integers(0, one_in - 1)) == one_in - 1


@st.composite
def asks(draw: Any, names: tuple[str, ...], N: int, C: int, plain: bool) -> tuple[Ask, ...]:
    wanted = draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
    road = draw(st.sampled_from(["auto", "auto", "columns", "features", "entries"]))
    found = []
    for name in wanted:
        options: dict[str, Any] = {}
        if name in HESSIANS and road != "auto":
            options["road"] = road
        if name == "grad_sample" and draw(st.booleans()) and not plain:
            options["loss_reduction"] = "mean"
        if name in ("jac", "ntk") and seldom(draw, 3) and not plain:
            options["outputs"] = draw(st.lists(st.integers(0, C - 1), min_size=1, max_size=2, unique=True))
        if name == "grad_sample_projected":
            options |= {"k": draw(st.integers(1, 9)), "seed": draw(st.integers(0, 3))}
        if name == "ggn_sqrt" and draw(st.booleans()):
            options["structured"] = True
        if name in ("ggn_diag_mc", "hutchinson"):
            options |= {"samples": 400, "generator": draw(st.integers(0, 99))}
        if name == "kfac":
            options["fisher"] = draw(
                st.sampled_from(["exact", "empirical"] if plain else ["exact", "empirical", "mc", "kfra"])
            )
            if options["fisher"] == "mc":
                options |= {"samples": 400, "generator": draw(st.integers(0, 99))}
            options["sharing"] = draw(st.sampled_from(["expand", "reduce"]))
            if options["fisher"] in ("exact", "empirical") and draw(st.booleans()) and not plain:
                options["corrected"] = True
        if name not in ALL_SAMPLES and not plain and seldom(draw, 4):
            options["subsample"] = draw(st.lists(st.integers(0, N - 1), min_size=1, max_size=N, unique=True))
        found.append((name, options))
    return tuple(found)


@st.composite
def recipes(draw: Any, longest: int = 6) -> Recipe:
    steps = draw(st.lists(st.tuples(st.sampled_from(ORDERED), st.integers(0, 3)), min_size=1, max_size=longest))
    N, T = draw(st.sampled_from([2, 1, 3, 5])), draw(st.integers(1, 3))
    d, C = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    given = draw(st.sampled_from(["numbers", "numbers", "numbers", "ids", "tied ids"]))
    head = draw(st.sampled_from(["sum", "mean below", "positions", "channels", "one"]))
    C = 5 if given == "tied ids" else C
    several = seldom(draw, 3)
    output = draw(st.sampled_from(["last", "middle", "side"])) if several else None
    used = (
        tuple(draw(st.lists(st.sampled_from(["last", "middle", "side"]), max_size=2, unique=True))) if several else ()
    )
    loss = draw(st.sampled_from(list(LOSSES)))
    way = draw(st.sampled_from(["extend"] * 8 + ["create_graph", "accumulate"]))
    if way == "accumulate" and LOSSES[loss][0] == "":
        way = "extend"
    dtype = draw(st.sampled_from(["float64"] * 12 + ["float32", "float32", "bfloat16"] * (way != "accumulate")))
    names = FIRST_ORDER if way == "create_graph" else tuple(MAKERS)
    names = ADDING if way == "accumulate" else names
    entries = {"middle": T * d, "side": 3}.get(output or "", {"one": 1, "sum": C, "mean below": C}.get(head, T * C))
    asked = draw(asks(names, N, entries, way != "extend"))
    return Recipe(
        steps=tuple(steps),
        asked=asked,
        loss=loss,
        given=given,
        head=head,
        N=N,
        T=T,
        d=d,
        C=C,
        penalty=draw(st.sampled_from(list(PENALTIES))) if seldom(draw, 5) else None,
        output=output,
        used=used,
        frozen=tuple(draw(st.lists(st.integers(0, 20), max_size=4, unique=True))) if seldom(draw, 3) else (),
        shared=seldom(draw, 3),
        way=way,
        trigger=draw(
            st.sampled_from(["backward", "backward", "retain", "autograd.backward", "autograd.grad", "inputs"])
        ),
        later=tuple(
            draw(
                st.lists(
                    st.sampled_from(["data", "size", "longer", "nobody", "eval", "train", "freeze", "thaw"]), max_size=3
                )
            )
        ),
        one_block=draw(st.booleans()),
        dtype=dtype,
        chunk=draw(st.sampled_from([1, 10])) if seldom(draw, 8) else None,
        seed=draw(st.integers(0, 999)),
    )


ORDERED = sorted(STEPS, key=lambda name: (name not in ("linear", "tanh"), name))  # a failing case shrinks to the first
