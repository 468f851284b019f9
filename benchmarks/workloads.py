"""What is timed: models as people have them, with data and a mean cross entropy."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C = 10


def mlp(act: type[nn.Module], *widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), act()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4096, 128), nn.ReLU(), nn.Linear(128, C),
    )  # fmt: skip


class Block(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.GroupNorm(4, o)
        self.two, self.norm2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.GroupNorm(4, o)
        self.down = nn.Conv2d(i, o, 1, stride, bias=False) if (i, stride) != (o, 1) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.one(x)))
        return F.relu(self.norm2(self.two(h)) + self.down(x))


def resnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.GroupNorm(4, 16), nn.ReLU(), Block(16, 16, 1), Block(16, 32, 2),
        Block(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, C),
    )  # fmt: skip


class Attention(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        N, T, d = x.shape
        q, k, v = (t.view(N, T, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = (q @ k.transpose(2, 3) * (d // self.heads) ** -0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(N, T, d))


class Layer(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(d), Attention(d, 4), nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, words: int = 100, d: int = 64, T: int = 32) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, d), nn.Parameter(torch.randn(T, d) / 8)
        self.layers, self.norm, self.head = nn.Sequential(Layer(d), Layer(d)), nn.LayerNorm(d), nn.Linear(d, C)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.words(ids) + self.places)).mean(1))


class GPT2(nn.Module):
    """Hugging Face's, with its logits as output."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=256, n_positions=32, n_embd=128, n_layer=4, n_head=4, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0,
            bos_token_id=0, eos_token_id=0, use_cache=False,
        )  # fmt: skip
        self.net: Any = GPT2LMHeadModel(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(input_ids=ids).logits.transpose(1, 2)  # [N, vocabulary, T], as cross entropy has it


@dataclass(frozen=True)
class Workload:
    """build() makes the model; inputs [N, *shape] are normal numbers, or `words` many ids."""

    name: str
    says: str
    build: Callable[[], nn.Module]
    N: int
    shape: tuple[int, ...]
    words: int = 0
    tags: frozenset[str] = frozenset()
    sequence: bool = False  # the targets are words, too

    def job(self, device: str) -> Job:
        torch.manual_seed(0)
        model = self.build()
        x = torch.randint(self.words, (self.N, *self.shape)) if self.words else torch.randn(self.N, *self.shape)
        y = torch.randint(self.words if self.sequence else C, (self.N, *self.shape) if self.sequence else (self.N,))
        return Job(self, model.to(device), x.to(device), y.to(device))


@dataclass(frozen=True)
class Job:
    """A workload with its model and data at hand."""

    workload: Workload
    model: nn.Module
    x: Tensor
    y: Tensor

    def loss(self, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(self.x), self.y)


WORKLOADS = {
    w.name: w
    for w in [
        Workload("small", "MLP 64-64x2-10, ReLU, N=64", lambda: mlp(nn.ReLU, 64, 64, 64, C), 64, (64,),
                 tags=frozenset({"mlp", "chain", "small"})),
        Workload("mlp", "MLP 784-256x3-10, ReLU, N=128", lambda: mlp(nn.ReLU, 784, 256, 256, 256, C), 128, (784,),
                 tags=frozenset({"mlp", "chain"})),
        Workload("tanh", "MLP 784-256x3-10, Tanh, N=128", lambda: mlp(nn.Tanh, 784, 256, 256, 256, C), 128, (784,),
                 tags=frozenset({"mlp", "chain", "smooth"})),
        Workload("deep", "MLP 784-512x6-10, Tanh, N=32", lambda: mlp(nn.Tanh, 784, *[512] * 6, C), 32, (784,),
                 tags=frozenset({"mlp", "chain", "smooth"})),
        Workload("cnn", "CNN conv32-pool-conv64-pool-128-10 on 3x32x32, N=32", cnn, 32, (3, 32, 32),
                 tags=frozenset({"cnn", "chain"})),
        Workload("resnet", "ResNet with GroupNorm, 3 blocks, on 3x32x32, N=16", resnet, 16, (3, 32, 32)),
        Workload("transformer", "transformer, 2 layers, d=64, T=32, N=16", Transformer, 16, (32,), words=100),
        *([Workload("gpt2", "Hugging Face GPT-2, 4 layers, d=128, T=32, N=8", GPT2, 8, (32,), words=256, sequence=True)]
          if importlib.util.find_spec("transformers") else []),
    ]
}  # fmt: skip
