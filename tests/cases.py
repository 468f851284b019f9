"""The models every quantity must be exact on: a row each. Small, float64, awkward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from hookjac.testing import random_loss as random_loss

N, D, C = 4, 5, 3

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """build() gives the model, inputs() its arguments; pick selects the output; loss from the picked tensor."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]] = lambda: (torch.randn(N, D),)
    kwargs: Callable[[], dict[str, Any]] = dict
    output: Any = None
    loss: Callable[[Tensor], Tensor] | None = None
    oracle: Callable[[], nn.Module] | None = None  # same function, for loops that PyTorch itself refuses here
    road: str | None = None  # what explain() must say of every parameter
    tags: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return self.name


def mlp(act: Callable[[], nn.Module], *, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(D, 6, bias=bias), act(), nn.Linear(6, 4, bias=bias), act(), nn.Linear(4, C))


class Fn(nn.Module):
    """A model from parts and a function."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self, *args, **kwargs)


def par(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 2)


def _inplace(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h.mul_(0.5)
    h += m.b(torch.tanh(x))
    h.sigmoid_()
    h = h + 0
    h[:, 0] = h[:, 1] * 2
    return m.c(h)


def _recurrent(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros(x.shape[0], 4)
    for _ in range(3):
        h = torch.tanh(m.w(h) + m.u(x))
    return m.o(h)


def _attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    return m.o((torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v).mean(1))


def _time_first(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x.transpose(0, 1)))  # [T, N, d] through a layer
    return m.b(h.sum(0))


def _rows(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x.reshape(-1, x.shape[-1])))  # [N T, d] through a layer
    return m.b(h.reshape(x.shape[0], x.shape[1], -1).sum(1))


def _rows_time_major(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x.transpose(0, 1).reshape(-1, x.shape[-1])))
    return m.b(h.reshape(x.shape[1], x.shape[0], -1).sum(0))


class Slope(torch.autograd.Function):
    """Straight-through: a backward that is not the derivative of the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: float, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.k = k
        return (x * w).round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, Tensor]:
        x, w = ctx.saved_tensors
        return ctx.k * g * w, None, (g * x).sum(0)


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(D, 3)
        self.bias = par(D)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.enc(x)), self.enc.weight.T, self.bias)


def _tied_linears() -> nn.Module:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), a, nn.Tanh(), b, nn.Tanh(), nn.Linear(4, C))


def _reused() -> nn.Module:
    block = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    return nn.Sequential(nn.Linear(D, 4), block, block, nn.Linear(4, C))


def _checkpointed(reentrant: bool) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        h = checkpoint(m.block, h, use_reentrant=reentrant)
        return m.b(h)

    block = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 4), nn.Softplus())
    return Fn(run, a=nn.Linear(D, 4), block=block, b=nn.Linear(4, C))


def _pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))
    prune.random_unstructured(model[0], "weight", amount=0.4)
    return model


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, C))
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model


def _hyper(m: Any, x: Tensor) -> Tensor:
    w = m.g(m.z).reshape(C, D)  # weights made by another net, from no sample at all
    return torch.tanh(F.linear(x, w)) + m.s


class LinearChild(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.sum()


def sequence(T: int = 3, d: int = D) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(N, T, d),)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ELU": lambda: nn.ELU(0.7), "CELU": lambda: nn.CELU(1.3), "SELU": nn.SELU, "GELU": nn.GELU,
    "GELU-tanh": lambda: nn.GELU("tanh"), "Hardshrink": lambda: nn.Hardshrink(0.3), "Hardsigmoid": nn.Hardsigmoid,
    "Hardswish": nn.Hardswish, "Hardtanh": lambda: nn.Hardtanh(-0.4, 0.6), "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "LogSigmoid": nn.LogSigmoid, "Mish": nn.Mish, "ReLU": nn.ReLU, "ReLU6": nn.ReLU6, "Sigmoid": nn.Sigmoid,
    "SiLU": nn.SiLU, "Softplus": lambda: nn.Softplus(2.0, 1.0), "Softshrink": lambda: nn.Softshrink(0.2),
    "Softsign": nn.Softsign, "Tanh": nn.Tanh, "Tanhshrink": nn.Tanhshrink,
    "Threshold": lambda: nn.Threshold(0.1, -0.3), "RReLU": nn.RReLU, "RReLU-eval": lambda: nn.RReLU().eval(),
    "Dropout": lambda: nn.Dropout(0.4), "AlphaDropout": lambda: nn.AlphaDropout(0.4),
    "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.4), "Dropout1d": lambda: nn.Dropout1d(0.4),
    "Identity": nn.Identity, "Dropout-eval": lambda: nn.Dropout(0.4).eval(),
}  # fmt: skip


class PlainHardsigmoid(nn.Module):
    """PyTorch has no second backward for its own, whose slope of 1/6 is rounded to float32."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.hardtanh(x + 3, 0, 6)
        slope = float(torch.tensor(1 / 6, dtype=torch.float32)) * h
        return slope + (h / 6 - slope).detach()


RULES = [
    Case(name, lambda a=act: mlp(a), road="rule",
         oracle=(lambda: mlp(PlainHardsigmoid)) if name == "Hardsigmoid" else None)
    for name, act in ACTIVATIONS.items()
]
RULES += [
    Case("no bias", lambda: mlp(nn.Tanh, bias=False), road="rule"),
    Case("linear only", lambda: nn.Linear(D, C), road="rule"),
    Case("linear on sequences", lambda: nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 2)), sequence(),
         road="rule"),
    Case("flatten", lambda: nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, C)), sequence(),
         road="rule"),
    Case("unflatten", lambda: nn.Sequential(nn.Linear(D, 6), nn.Unflatten(1, (2, 3)), nn.Tanh(), nn.Linear(3, 2)),
         road="rule"),
    Case("wide after narrow", lambda: nn.Sequential(nn.Linear(D, 2), nn.Tanh(), nn.Linear(2, 9), nn.Tanh(),
                                                    nn.Linear(9, C)), road="rule"),
    Case("frozen parts", _frozen, road="rule"),
    Case("tied linears", _tied_linears, road="rule"),
    Case("module called twice", _reused, road="rule"),
    Case("recurrent by hand", lambda: Fn(_recurrent, w=nn.Linear(4, 4), u=nn.Linear(D, 4), o=nn.Linear(4, C)),
         road="rule"),
    Case("time first inside", lambda: Fn(_time_first, a=nn.Linear(D, 4), b=nn.Linear(4, C)), sequence(),
         road="rule"),
    Case("time first, as many steps as samples", lambda: Fn(_time_first, a=nn.Linear(D, 4), b=nn.Linear(4, C)),
         sequence(T=N), road="rule"),
    Case("batch and time merged", lambda: Fn(_rows, a=nn.Linear(D, 4), b=nn.Linear(4, C)), sequence(), road="rule"),
    Case("time and batch merged", lambda: Fn(_rows_time_major, a=nn.Linear(D, 4), b=nn.Linear(4, C)), sequence(),
         road="rule"),
    Case("residual", lambda: Fn(lambda m, x: m.c(m.a(x) + torch.tanh(m.b(torch.tanh(m.a(x))))), a=nn.Linear(D, 4),
                                b=nn.Linear(4, 4), c=nn.Linear(4, C)), road="rule"),
    Case("dense connections", lambda: Fn(lambda m, x: m.b(torch.cat([x, torch.tanh(m.a(x)), m.a(x).sin()], 1)),
                                         a=nn.Linear(D, 4), b=nn.Linear(D + 8, C)), road="rule"),
    Case("siamese", lambda: Fn(lambda m, x: m.b(torch.tanh(m.a(x)) * torch.tanh(m.a(x.flip(1)))), a=nn.Linear(D, 4),
                               b=nn.Linear(4, C)), road="rule"),
    Case("gate", lambda: Fn(lambda m, x: m.b(m.a(x) * torch.sigmoid(m.a(x))), a=nn.Linear(D, 4), b=nn.Linear(4, C)),
         road="rule"),
    Case("silu from one tensor", lambda: Fn(lambda m, x: m.b((h := m.a(x)) * torch.sigmoid(h)), a=nn.Linear(D, 4),
                                            b=nn.Linear(4, C)), road="rule"),
    Case("softmax inside", lambda: Fn(lambda m, x: m.b(torch.softmax(m.a(x), 1)), a=nn.Linear(D, 4),
                                      b=nn.Linear(4, C)), road="rule"),
    Case("attention by hand", lambda: Fn(_attention, qkv=nn.Linear(D, 12), o=nn.Linear(4, C)), sequence(),
         road="rule"),
    Case("in-place everywhere", lambda: Fn(_inplace, a=nn.Linear(D, 4), b=nn.Linear(D, 4), c=nn.Linear(4, C)),
         road="rule"),
    Case("in-place activations", lambda: nn.Sequential(nn.Linear(D, 6), nn.ReLU(inplace=True), nn.Linear(6, 4),
                                                       nn.ELU(inplace=True), nn.Linear(4, C)), road="rule"),
    Case("checkpoint", lambda: _checkpointed(False)),
    Case("checkpoint, reentrant", lambda: _checkpointed(True), road="rule",
         oracle=lambda: _checkpointed(False)),
    Case("several axes of output", lambda: Fn(lambda m, x: m.a(x).reshape(-1, 2, 3), a=nn.Linear(D, 6)), road="rule"),
    Case("one axis of output", lambda: Fn(lambda m, x: m.a(x).squeeze(1), a=nn.Linear(D, 1)), road="rule"),
    Case("keyword call", lambda: Fn(lambda m, *, x: m.a(input=x), a=nn.Linear(D, C)), tuple,
         lambda: {"x": torch.randn(N, D)}, road="rule"),
    Case("dict output", lambda: Fn(lambda m, x: {"h": m.a(x), "y": m.b(m.a(x).tanh())}, a=nn.Linear(D, 4),
                                   b=nn.Linear(4, C)), output="y", road="rule"),
    Case("tuple output", lambda: Fn(lambda m, x: (m.a(x), [m.b(m.a(x).tanh())]), a=nn.Linear(D, 4),
                                    b=nn.Linear(4, C)), output=lambda out: out[1][0], road="rule"),
    Case("max over features", lambda: Fn(lambda m, x: m.b(m.a(x).reshape(-1, 2, 3).max(2).values), a=nn.Linear(D, 6),
                                         b=nn.Linear(2, C)), road="rule"),
]  # fmt: skip

FALLBACK = [
    Case("LayerNorm", lambda: nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, C))),
    Case("LSTM", lambda: Fn(lambda m, x: m.o(m.r(x)[0][:, -1]), r=nn.LSTM(2, 3, batch_first=True), o=nn.Linear(3, C)),
         sequence(3, 2)),
    Case("GRU, time first", lambda: Fn(lambda m, x: m.o(m.r(x.transpose(0, 1))[0][-1]), r=nn.GRU(2, 2),
                                       o=nn.Linear(2, C)), sequence(N, 2)),
    Case("MultiheadAttention", lambda: Fn(lambda m, x: m.o(m.a(x, x, x, need_weights=False)[0].mean(1)),
                                          a=nn.MultiheadAttention(4, 2, batch_first=True), o=nn.Linear(4, 2)),
         sequence(3, 4)),
    Case("transformer layer", lambda: Fn(lambda m, x: m.o(m.t(x).mean(1)),
                                         t=nn.TransformerEncoderLayer(4, 2, 6, 0.2, batch_first=True),
                                         o=nn.Linear(4, 2)), sequence(2, 4)),
    Case("Conv2d", lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)),
         lambda: (torch.randn(N, 1, 4, 4),)),
    Case("BatchNorm in eval mode", lambda: nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Tanh(),
                                                         nn.Linear(4, C)).eval()),
    Case("Embedding", lambda: Fn(lambda m, i: m.o(torch.tanh(m.e(i) + m.p(torch.arange(3)[None])).sum(1)),
                                 e=nn.Embedding(6, 3), p=nn.Embedding(3, 3), o=nn.Linear(3, C)),
         lambda: (torch.tensor([[0, 1, 1], [2, 0, 5], [1, 1, 1], [4, 3, 2]]),)),
    Case("PReLU", lambda: mlp(nn.PReLU)),
    Case("Bilinear", lambda: Fn(lambda m, x: m.b(x, torch.tanh(m.a(x))), a=nn.Linear(D, 2), b=nn.Bilinear(D, 2, 2)),
         road="rule"),
    Case("bare parameters", lambda: Fn(lambda m, x: torch.tanh(x @ m.w + m.b) * torch.exp(m.s), w=par(D, C), b=par(C),
                                       s=par(C))),
    Case("bare parameter between layers", lambda: Fn(lambda m, x: m.b(torch.tanh(m.a(x)) ** 2 * m.s), a=nn.Linear(D, 4),
                                                     s=par(4), b=nn.Linear(4, C))),
    Case("learned token", lambda: Fn(lambda m, x: m.a(torch.cat([m.t.expand(x.shape[0], 2), x], 1)), t=par(1, 2),
                                     a=nn.Linear(D + 2, C))),
    Case("weight norm", lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(D, 4)), nn.Tanh(),
                                              nn.Linear(4, C))),
    Case("pruned", _pruned),
    Case("tied autoencoder", TiedAutoencoder),
    Case("weights from a net", lambda: Fn(_hyper, g=nn.Linear(2, C * D), z=par(2), s=par(C))),
    Case("subclass with its own forward", lambda: nn.Sequential(LinearChild(D, 4), nn.Tanh(), nn.Linear(4, C))),
    Case("weight used functionally too", lambda: Fn(lambda m, x: m.b(torch.tanh(m.a(x))) + F.linear(x, m.a.weight[:C]),
                                                    a=nn.Linear(D, 4), b=nn.Linear(4, C))),
    Case("custom autograd function", lambda: Fn(lambda m, x: m.b(Slope.apply(m.a(x), 0.5, m.w)), a=nn.Linear(D, 4),
                                                w=par(4), b=nn.Linear(4, C)), tags=frozenset({"no oracle hessian"})),
    Case("graph convolution", lambda: Fn(lambda m, x, A: A @ m.b(torch.tanh(A @ m.a(x))), a=nn.Linear(D, 3),
                                         b=nn.Linear(3, 2)),
         lambda: (torch.randn(N, D), torch.softmax(torch.randn(N, N), 1))),
]  # fmt: skip



def images(*shape: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(N, *shape),)


def ids(rows: int, *shape: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randint(rows, (N, *shape)),)


def _conv(layer: Callable[[], nn.Module], *shape: int) -> Case:
    """A convolution above another: its input needs a gradient, its output is curved, and every sample has several."""
    made = layer()
    channels, space = shape[0], len(shape) - 1
    below = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[space]
    name = repr(made).replace("kernel_size=", "")
    return Case(name, lambda: nn.Sequential(below(1, channels, 1), nn.Tanh(), layer(), nn.Sigmoid(), nn.Flatten(2)),
                images(1, *shape[1:]), loss=lambda o: random_loss(o.sum(2)), road="rule")


def _bags(**options: Any) -> Case:
    """EmbeddingBag has no second backward in PyTorch: the oracle sums looked-up rows."""
    index, offsets = torch.tensor([1, 2, 2, 0, 5, 1, 1]), torch.tensor([0, 2, 2, 5])
    weighted, mode = options.pop("weighted", False), options.get("mode", "mean")
    psw = torch.linspace(0.5, 2, len(index), dtype=torch.float64) if weighted else None
    padding = options.get("padding_idx")

    def bag(m: Any, x: Tensor) -> Tensor:
        return m.o(torch.tanh(m.e(index, offsets, per_sample_weights=psw)) * x)

    def rows(m: Any, x: Tensor) -> Tensor:
        found = []
        for start, stop in zip(offsets.tolist(), [*offsets.tolist()[1:], len(index)], strict=True):
            keep = [k for k in range(start, stop) if index[k] != padding]
            t = m.e.weight[index[keep]] * (1 if psw is None else psw[keep, None])
            if not keep:
                found.append(m.e.weight.new_zeros(3))
            else:
                found.append(t.sum(0) if mode == "sum" else t.mean(0) if mode == "mean" else t.max(0).values)
        return m.o(torch.tanh(torch.stack(found)) * x)

    def build(way: Callable[[Any, Tensor], Tensor]) -> Callable[[], nn.Module]:
        return lambda: Fn(way, e=nn.EmbeddingBag(6, 3, **options), o=nn.Linear(3, C))

    name = f"EmbeddingBag {mode}{' weighted' if weighted else ''}{' padded' if padding is not None else ''}"
    return Case(name, build(bag), images(3), oracle=build(rows), road="rule")


class Conv1D(nn.Module):
    """As in GPT-2: a linear layer whose weight is transposed, by addmm."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight, self.bias = par(i, o), par(o)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


# what nodes hand to a parameter, without a rule for the module
NODES = [
    _conv(lambda: nn.Conv1d(2, 3, 2), 2, 5),
    _conv(lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1, dilation=2), 2, 7),
    _conv(lambda: nn.Conv1d(2, 2, 3, padding="same", padding_mode="reflect"), 2, 5),
    _conv(lambda: nn.Conv1d(2, 2, 2, padding="same"), 2, 5),
    _conv(lambda: nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(0, 1), bias=False), 2, 3, 4),
    _conv(lambda: nn.Conv2d(4, 2, 2, groups=2), 4, 3, 3),
    _conv(lambda: nn.Conv2d(2, 4, 2, groups=2, padding_mode="circular", padding=1), 2, 3, 3),
    _conv(lambda: nn.Conv2d(2, 2, 3, padding="valid", padding_mode="replicate"), 2, 3, 4),
    _conv(lambda: nn.Conv3d(2, 2, 2, stride=(1, 2, 1), dilation=(2, 1, 1)), 2, 3, 3, 2),
    _conv(lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), 2, 3),
    _conv(lambda: nn.ConvTranspose1d(2, 2, 2, dilation=2, bias=False), 2, 3),
    _conv(lambda: nn.ConvTranspose2d(4, 2, 2, groups=2, stride=2), 4, 2, 2),
    _conv(lambda: nn.ConvTranspose2d(2, 4, (1, 2), groups=2), 2, 2, 2),
    _conv(lambda: nn.ConvTranspose3d(2, 1, 2, stride=(1, 2, 1)), 2, 2, 2, 2),
    Case("convolution of frames", lambda: Fn(lambda m, x: m.c(x.flatten(0, 1)).tanh().reshape(N, -1), c=nn.Conv1d(2,
         2, 2)),
         images(2, 2, 3), road="rule"),
    Case("LayerNorm on sequences", lambda: nn.Sequential(nn.Linear(D, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)),
         sequence(2), road="rule"),
    Case("LayerNorm over two axes", lambda: nn.Sequential(nn.Linear(D, 4), nn.Unflatten(1, (2, 2)), nn.LayerNorm((2,
         2)),
                                                          nn.Tanh(), nn.Linear(2, 2)), road="rule"),
    Case("LayerNorm without bias", lambda: nn.Sequential(nn.Linear(D, 4), nn.LayerNorm(4, bias=False), nn.Linear(4, C)),
         road="rule"),
    Case("RMSNorm", lambda: nn.Sequential(nn.Linear(D, 4), nn.RMSNorm(4), nn.Tanh(), nn.Linear(4, C)), road="rule"),
    Case("GroupNorm", lambda: nn.Sequential(nn.Conv1d(1, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(),
                                            nn.Linear(8, 2)), images(1, 3), road="rule"),
    Case("InstanceNorm", lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.InstanceNorm2d(2, affine=True), nn.Tanh(),
                                               nn.Flatten(), nn.Linear(8, 2)), images(1, 3, 3), road="rule"),
    Case("BatchNorm2d in eval mode", lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(),
         nn.Flatten(),
                                                           nn.Linear(8, 2)).eval(), images(1, 3, 3), road="rule"),
    Case("Embedding with padding", lambda: Fn(lambda m, i: m.o(m.e(i).tanh()).sum(1), o=nn.Linear(3, C),
                                              e=nn.Embedding(4, 3, padding_idx=1)), ids(4, 3), road="rule"),
    Case("Embedding by frequency", lambda: Fn(lambda m, i: m.o(m.e(i).tanh()).sum(1), o=nn.Linear(3, C),
                                              e=nn.Embedding(4, 3, scale_grad_by_freq=True)), ids(4, 3)),
    Case("Embedding, time first", lambda: Fn(lambda m, i: m.o(m.e(i.T).tanh()).sum(0), o=nn.Linear(3, C),
                                             e=nn.Embedding(4, 3)), ids(4, 3), road="rule"),
    _bags(mode="sum"), _bags(mode="mean"), _bags(mode="max"), _bags(mode="sum", weighted=True),
    _bags(mode="sum", padding_idx=1), _bags(mode="mean", padding_idx=2), _bags(mode="max", padding_idx=2),
    Case("x @ w", lambda: Fn(lambda m, x: (x @ m.w).tanh() @ m.v, w=par(D, 4), v=par(4, C)), road="rule"),
    Case("x @ w.T on sequences", lambda: Fn(lambda m, x: (x @ m.w.T).tanh() @ m.v.mT, w=par(4, D), v=par(C, 4)),
         sequence(2), road="rule"),
    Case("w @ x", lambda: Fn(lambda m, x: (m.w @ x.T).tanh().T @ m.v, w=par(4, D), v=par(4, C)), road="rule"),
    Case("addmm with factors", lambda: Fn(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.3, alpha=2).tanh(), w=par(D, C),
                                          b=par(C)), road="rule"),
    Case("addmm, weight to the left", lambda: Fn(lambda m, x: torch.addmm(m.b, m.w, x.T, alpha=2).tanh().T, w=par(C, D),
                                                 b=par(C, 1)), road="rule"),
    Case("GPT-2's Conv1D", lambda: Fn(lambda m, x: m.b(m.a(x).tanh()).sum(1), a=Conv1D(D, 4), b=Conv1D(4, C)),
         sequence(2),
         road="rule"),
    Case("experts side by side", lambda: Fn(lambda m, x: torch.einsum("nd,edk->nek", x, m.w).tanh().sum(1), w=par(2,
         D, C)),
         road="rule"),
    Case("one number a sample", lambda: Fn(lambda m, x: (x @ m.v).tanh(), v=par(D)), road="rule"),
    Case("scale, shift, quotient", lambda: Fn(lambda m, x: m.b((m.s * m.a(x) - m.t).tanh() + m.u * 2), a=nn.Linear(D,
         4),
                                              s=nn.Parameter(torch.tensor(0.7)), t=par(4), u=par(1, 1), b=nn.Linear(4,
         C)), road="rule"),
    Case("divided parameter", lambda: Fn(lambda m, x: m.b(m.s / (2 + m.a(x).cos())), a=nn.Linear(D, 4), s=par(4),
                                         b=nn.Linear(4, C)), road="rule"),
    Case("class token", lambda: Fn(lambda m, x: m.b(torch.cat([m.t.expand(N, -1, -1), m.a(x)], 1).softmax(2)).sum(1),
                                   a=nn.Linear(D, 2), t=par(1, 1, 2), b=nn.Linear(2, C)), sequence(2), road="rule"),
    Case("repeated token", lambda: Fn(lambda m, x: m.b((m.t.repeat(N, 2, 1) + m.a(x)).tanh()).sum(1), a=nn.Linear(D, 2),
                                      t=par(1, 2), b=nn.Linear(2, C)), sequence(2), road="rule"),
    Case("positions", lambda: Fn(lambda m, x: m.b((m.a(x) + m.p[None, : x.shape[1]]).tanh()).sum(1), a=nn.Linear(D, 2),
                                 p=par(4, 2), b=nn.Linear(2, C)), sequence(2), road="rule"),
    Case("looked-up positions", lambda: Fn(lambda m, x: m.b((m.a(x) + m.p(torch.arange(2)[None])).tanh()).sum(1),
                                           a=nn.Linear(D, 2), p=nn.Embedding(4, 2), b=nn.Linear(2, C)), sequence(2),
         road="rule"),
    Case("PReLU on channels", lambda: nn.Sequential(nn.Conv1d(1, 2, 2), nn.PReLU(2), nn.Flatten(), nn.Linear(4, C)),
         images(1, 3), road="rule"),
    Case("weight twice in a sum", lambda: Fn(lambda m, x: (F.linear(x, m.w) + F.linear(x.flip(1), m.w)).tanh(),
                                             w=par(C, D)), road="rule"),
    Case("weight in a chain", lambda: Fn(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w), w=par(D, D)),
         road="rule"),
    Case("exponential weight", lambda: Fn(lambda m, x: F.linear(x, m.w.exp()).tanh(), w=par(C, D)), road="rule"),
    Case("low rank", lambda: Fn(lambda m, x: F.linear(x, m.w.detach() + m.u @ m.v).tanh(), w=par(C, D), u=par(C, 1),
                                v=par(1, D)).requires_grad_(True)),
]  # fmt: skip

CASES = RULES + FALLBACK + NODES
