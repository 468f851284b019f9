"""The models on which Laplace's backends are compared: small, float64, each with something that one of them minds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import Fn, par
from torch import Tensor, nn
from torch.nn.utils import parametrizations

N, D, C = 7, 5, 3


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))


def cnn() -> nn.Module:
    first = nn.Conv2d(2, 3, 2, padding=1, stride=2)
    return nn.Sequential(first, nn.Tanh(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, C))


def tied_linears() -> nn.Module:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), a, nn.Tanh(), b, nn.Tanh(), nn.Linear(4, C))


def called_twice() -> nn.Module:
    block = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    return nn.Sequential(nn.Linear(D, 4), block, block, nn.Linear(4, C))


def table() -> nn.Module:
    return Fn(lambda m, i: m.o(torch.tanh(m.e(i)).mean(1)), e=nn.Embedding(6, 4), o=nn.Linear(4, C))


def tied_table() -> nn.Module:
    model = Fn(lambda m, i: m.o(torch.tanh(m.e(i)).mean(1)), e=nn.Embedding(C, 4), o=nn.Linear(4, C, bias=False))
    model.o.weight = model.e.weight
    return model


def _attend(m: Any, x: Tensor) -> Tensor:
    h = m.e(x)
    q, k, v = m.q(m.n(h)).chunk(3, -1)
    h = h + m.p(torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v)
    return m.o(h.mean(1))


def attention() -> nn.Module:
    return Fn(_attend, e=nn.Linear(D, 4), n=nn.LayerNorm(4), q=nn.Linear(4, 12), p=nn.Linear(4, 4), o=nn.Linear(4, C))


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, C))
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model


def weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(D, 4)), nn.Tanh(), nn.Linear(4, C))


def normed_images() -> nn.Module:
    return nn.Sequential(nn.LayerNorm([2, 4, 4]), nn.Flatten(), nn.Linear(32, C))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, C))


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, C))


def transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(75, C))


def vectors() -> Tensor:
    return torch.randn(N, D)


def sequences() -> Tensor:
    return torch.randn(N, 3, D)


def images() -> Tensor:
    return torch.randn(N, 2, 4, 4)


def tokens(rows: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(rows, (N, 3))


Build = Callable[[], nn.Module]

MODELS: dict[str, tuple[Build, Callable[[], Tensor]]] = {
    "MLP": (mlp, vectors),
    "CNN": (cnn, images),
    "positions": (lambda: Fn(lambda m, x: m.o(torch.tanh(m.a(x)).mean(1)), a=nn.Linear(D, 4), o=nn.Linear(4, C)),
                  sequences),
    "in-place ReLU": (lambda: nn.Sequential(nn.Linear(D, 4), nn.ReLU(inplace=True), nn.Linear(4, C)), vectors),
    "layer norm": (lambda: nn.Sequential(nn.Linear(D, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, C)), vectors),
    "layer norm of images": (normed_images, images),
    "batch norm": (batch_norm, images),
    "PReLU": (lambda: nn.Sequential(nn.Linear(D, 4), nn.PReLU(4), nn.Linear(4, C)), vectors),
    "attention": (attention, sequences),
    "nn.MultiheadAttention": (lambda: Fn(lambda m, x: m.o(m.t(x, x, x)[0].mean(1)), o=nn.Linear(D, C),
                                         t=nn.MultiheadAttention(D, 1, batch_first=True)), sequences),
    "LSTM": (lambda: Fn(lambda m, x: m.o(m.r(x)[0][:, -1]), r=nn.LSTM(D, 3, batch_first=True), o=nn.Linear(3, C)),
             sequences),
    "embedding": (table, tokens(6)),
    "embedding tied to the head": (tied_table, tokens(C)),
    "two layers with one weight": (tied_linears, vectors),
    "a layer called twice": (called_twice, vectors),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, C)), sequences),
    "grouped convolution": (grouped, images),
    "transposed convolution": (transposed, images),
    "bare parameters": (lambda: Fn(lambda m, x: torch.tanh(x @ m.w) @ m.v + m.b, w=par(D, 4), v=par(4, C), b=par(C)),
                        vectors),
    "weight norm": (weight_norm, vectors),
    "frozen parameters": (frozen, vectors),
    "a mean after the last layer": (lambda: Fn(lambda m, x: m.o(torch.tanh(m.a(x))).mean(1), a=nn.Linear(D, 4),
                                               o=nn.Linear(4, C)), sequences),
}  # fmt: skip
