"""Many small nets trained side by side on scikit-learn's digits, each on some of them: what the examples here retrain.

E nets · N training digits · M digits to read · h hidden units.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hookjac.demo import Digits

Weights = list[Tensor]  # of all nets together: [E, h, 64], [E, h], [E, 10, h], [E, 10]

SIDE = 8  # so many nets at once: more no longer fit the cache
DECAY = 1e-3  # the loss is mean cross entropy + DECAY / 2 |weights|²


def start(E: int, hidden: int, seed: int) -> Weights:
    """Random weights, drawn as `nn.Linear` draws them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for o, i in ((hidden, 64), (10, hidden)):
        for shape in ((E, o, i), (E, o)):
            found.append((2 * torch.rand(shape, generator=generator) - 1) / i**0.5)
    return found


def outputs(weights: Weights, x: Tensor) -> Tensor:  # x [M, 64] -> [E, M, 10]
    """Logits of every net."""
    W, b, V, c = weights
    hidden = torch.tanh(x @ W.mT + b.unsqueeze(1))
    return hidden @ V.mT + c.unsqueeze(1)


def train(
    data: Digits, share: Tensor, *, seed: int, hidden: int = 32, steps: int = 200, done: Callable[[int], None] = print
) -> Weights:
    """One net for each row of share [E, N]: what each digit counts in its loss; 0: it is not in its training set.

    done: told how many more nets there are, after some.
    """
    found = []
    for k, some in enumerate(share.split(SIDE)):
        found.append(_train(start(len(some), hidden, 1000 * seed + k), data, some, steps))
        done(len(some))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _train(weights: Weights, data: Digits, share: Tensor, steps: int) -> Weights:
    """Full batches and Adam."""
    x, y = data.x[: data.split], data.y[: data.split]
    weights = [w.requires_grad_() for w in weights]
    optimizer = torch.optim.Adam(weights, lr=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
    share = share / share.sum(1, keepdim=True)
    target = y.expand(len(share), -1).reshape(-1)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = F.cross_entropy(outputs(weights, x).flatten(0, 1), target, reduction="none").view_as(share)
        ridge = sum((w.square().sum() for w in weights), torch.zeros(()))
        ((share * losses).sum() + DECAY / 2 * ridge).backward()
        optimizer.step()
        schedule.step()
    return [w.detach() for w in weights]


def margin(logits: Tensor, y: Tensor) -> Tensor:  # [..., M, 10], [M] -> [..., M]
    """log p / (1 - p) of the right answer: how sure a net is of it."""
    right = F.one_hot(y, 10).bool().expand_as(logits)
    return logits[right].view(logits.shape[:-1]) - logits.masked_fill(right, float("-inf")).logsumexp(-1)


def net(weights: Weights, e: int) -> nn.Sequential:
    """One of the nets as a module."""
    W, b, V, c = (w[e] for w in weights)
    found = nn.Sequential(nn.Linear(64, len(b)), nn.Tanh(), nn.Linear(len(b), 10))
    found.load_state_dict({"0.weight": W, "0.bias": b, "2.weight": V, "2.bias": c})
    return found
