"""Models to train privately, and DP-SGD in plain loops over samples: what every way of training must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Batch = tuple[Tensor, Tensor]
LR = 0.5


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table(_words(x)).mean(1).tanh())


class Functional(nn.Module):
    """A weight that no module's forward sees."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 6)
        self.outer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(x).tanh(), self.outer.weight * 2, self.outer.bias)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.inner, self.first(x), use_reentrant=False))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(1, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.lift(x.unsqueeze(-1))
        return self.last((z + self.attention(z, z, z, need_weights=False)[0]).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = kind(1, 4, batch_first=True)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cell(x.unsqueeze(-1))[0][:, -1])


class Keyword(nn.Module):
    """A layer that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(input=self.first(x).tanh())


class Rows(nn.Module):
    """A layer that sees each sample as several rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.reshape(-1, 1)).tanh().reshape(len(x), 5, 4).mean(1))


class Idle(nn.Module):
    """A parameter that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.idle = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, padding_idx=2)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.table(_words(x)).mean(1).tanh())


def _words(x: Tensor) -> Tensor:
    return (x * 3).long().abs() % 6


def _frozen() -> nn.Module:
    model = _mlp()
    model[0].weight.requires_grad_(False)
    return model


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def _conv(**more: Any) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3, padding=1, **more), nn.GELU(), nn.Flatten(),
                         nn.LayerNorm(15), nn.Linear(15, 3))  # fmt: skip


# Opacus computes these
RIGHT: dict[str, Callable[[], nn.Module]] = {"mlp": _mlp, "frozen": _frozen, "conv": _conv}

# and refuses these, or gets them wrong
AWKWARD: dict[str, Callable[[], nn.Module]] = {
    "weights used functionally": Functional,
    "a parameter that the loss does not reach": Idle,
    "LayerNorm(bias=False)": lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6, bias=False), nn.Linear(6, 3)),
    "in-place ReLU": lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
    "non-reentrant checkpointing": Checkpointed,
    "nn.MultiheadAttention": Attention,
    "nn.LSTM": lambda: Recurrent(nn.LSTM),
    "nn.GRU": lambda: Recurrent(nn.GRU),
    "a layer called by keyword": Keyword,
    "samples as rows of a layer": Rows,
    "a convolution with padding_mode": lambda: _conv(padding_mode="circular"),
    "Embedding(padding_idx)": Padded,
}

# by such an error, or (None) by wrong numbers without one
THERE: dict[str, tuple[type[Exception], str] | None] = {
    "weights used functionally": (ValueError, "not initialized"),
    "a parameter that the loss does not reach": (ValueError, "not initialized"),
    "LayerNorm(bias=False)": (AttributeError, "NoneType"),
    "in-place ReLU": (RuntimeError, "view"),
    "non-reentrant checkpointing": (ValueError, "not initialized"),
    "nn.MultiheadAttention": (UnsupportedModuleError, "DPMultiheadAttention"),
    "nn.LSTM": (UnsupportedModuleError, "DPLSTM"),
    "nn.GRU": (UnsupportedModuleError, "nn.GRU"),
    "a layer called by keyword": (IndexError, "out of range"),
    "samples as rows of a layer": (RuntimeError, "equal size"),
    "a convolution with padding_mode": None,
    "Embedding(padding_idx)": None,
}

# and tied weights only without ghost clipping
ALL = {**RIGHT, **AWKWARD, "tied weights": Tied}


def made(name: str) -> nn.Module:
    torch.manual_seed(3)
    return ALL[name]()


def data(N: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(N, 5, generator=generator) * 2, torch.randint(3, (N,), generator=generator)


def bound(model: nn.Module) -> float:
    """The median norm of the samples' gradients: a bound that clips half of them."""
    norms = []
    for x, y in zip(*data(), strict=True):
        params = [p for p in model.parameters() if p.requires_grad]
        loss = F.cross_entropy(model(x[None]), y[None])
        grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        norms.append(torch.cat([g.flatten() for g in grads]).norm())
    return torch.stack(norms).median().item()


def clipped(model: nn.Module, batch: Batch, clip: float) -> tuple[list[Tensor], int]:
    """The sum over samples of clipped gradients, by a backward for each; and how many were shortened."""
    params = [p for p in model.parameters() if p.requires_grad]
    total, short = [torch.zeros_like(p) for p in params], 0
    for x, y in zip(*batch, strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        short += bool(norm > clip)
        for sum_, g in zip(total, grads, strict=True):
            sum_ += g * min(1.0, clip / (norm.item() + 1e-6))
    return total, short


def loops(model: nn.Module, steps: Sequence[Batch], divisor: float) -> nn.Module:
    """A copy of the model, trained by SGD on clipped gradients without noise."""
    clip = bound(model)
    model = copy.deepcopy(model)
    seen = short = 0
    for batch in steps:
        sums, some = clipped(model, batch, clip)
        seen, short = seen + len(batch[0]), short + some
        with torch.no_grad():
            for p, g in zip((p for p in model.parameters() if p.requires_grad), sums, strict=True):
                p -= LR * g / divisor
    assert 0 < short < seen, "the bound should clip some gradients, and not all"
    return model
