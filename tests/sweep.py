"""Random models, losses and requests, held to plain autograd entry by entry: `python tests/sweep.py --minutes 30`.

A case is all of a number. What may come of it: equal numbers, at the first step and at those that go by what was
learnt; or an error of ours. Anything else is printed with its number, and `case(number)` runs it again.
"""

from __future__ import annotations

import collections
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import torch
import torch.nn.functional as F
from test_random import STEPS, Net
from torch import Tensor, nn

import hookjac
from hookjac.check import _CHECKS, _row, _Truth
from hookjac.testing import random_loss, trainable

DRAWN = sorted(STEPS)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "random": random_loss,
    "cross entropy": lambda out: F.cross_entropy(out.flatten(1), torch.arange(len(out)) % out.flatten(1).shape[1]),
    "summed cross entropy": lambda out: F.cross_entropy(
        out.flatten(1), torch.arange(len(out)) % out.flatten(1).shape[1], reduction="sum"),
    "squares": lambda out: F.mse_loss(out, torch.ones_like(out)),
    "logistic": lambda out: F.binary_cross_entropy_with_logits(out, torch.full_like(out, 0.3)),
    "linear": lambda out: (out * torch.linspace(-1, 1, out[0].numel()).view_as(out[0])).sum(),
    "huber": lambda out: F.huber_loss(out, torch.full_like(out, 0.2), reduction="sum"),
}  # fmt: skip


class Outputs(nn.Module):
    """A net that returns, beside its last tensor, one from its midst, and a second head."""

    def __init__(self, net: Net, d: int) -> None:
        super().__init__()
        self.net, self.side = net, nn.Linear(d, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        seen = [x]
        for part, back in zip(self.net.parts, self.net.back, strict=True):
            seen.append(part(seen[-1], seen[max(0, len(seen) - 1 - back)]))
        middle = seen[len(seen) // 2]
        return {"last": self.net.head(seen[-1]).sum(1), "middle": middle, "side": self.side(middle).mean(1)}


@dataclass(frozen=True)
class Case:
    model: nn.Module
    x: Tensor
    loss: Callable[[Any], Tensor]
    output: str | None
    asked: list[str]
    said: str


def case(number: int) -> Case:
    draw = random.Random(number)
    torch.manual_seed(number)
    d, N, T = draw.randint(2, 4), draw.choice([1, 2, 3, 5]), draw.randint(1, 3)
    names = [draw.choice(DRAWN) for _ in range(draw.randint(1, 6))]
    net = Net(names, [draw.randint(0, 3) for _ in names], d, draw.randint(1, 3), draw.random() < 0.3)
    several = draw.random() < 0.4
    model: nn.Module = Outputs(net, d) if several else net
    params = list(model.parameters())
    if draw.random() < 0.4:
        for p in draw.sample(params, draw.randint(0, len(params) - 1)):
            p.requires_grad_(False)
    output = draw.choice(["last", "middle", "side"]) if several else None
    which = draw.choice(sorted(LOSSES))
    used = [output, *draw.sample(["last", "middle", "side"], draw.randint(0, 2))] if several else []
    penalised = draw.random() < 0.2

    def loss(out: Any) -> Tensor:
        value = (
            sum((LOSSES[which](out[key]) for key in used), LOSSES[which](out[used[0]]) * 0)
            if several
            else LOSSES[which](out)
        )
        if penalised:
            value = value + sum((p.square() * p.cos()).sum() for p in model.parameters() if p.requires_grad)
        return value

    asked = draw.sample(sorted(_CHECKS), draw.randint(1, 4))
    said = f"{names} back {net.back} d {d} N {N} T {T} {which} output {output} of {used} penalty {penalised} {asked}"
    return Case(model, torch.randn(N, T, d), loss, output, asked, said)


def run(one: Case) -> str:
    """What came of it: "equal", or the beginning of an error of ours. AssertionError for all else."""
    model = one.model
    try:
        truth = _Truth(model, lambda: model(one.x), one.loss, one.output)
    except hookjac.HookjacError as error:
        return f"no truth: {error}"[:40]
    for step in range(3):
        model.zero_grad()
        try:
            with hookjac.extend(model, *one.asked, output=one.output):
                one.loss(model(one.x)).backward()
            for name, p in trainable(model).items():
                picks = torch.randperm(p.numel())[:2].tolist()
                for q in one.asked:
                    row = _row(name, q, "", "", _CHECKS[q](truth, p, getattr(p, q), picks), 1e-8)
                    assert row.fine, f"{q} of {name} at step {step} is off by {row.error:.1e}: {one.said}"
        except hookjac.HookjacError as error:
            return str(error)[:40]
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}: {one.said}") from error
    return "equal"


@click.command(help=__doc__)
@click.option("--minutes", type=float, default=1.0)
@click.option("--start", type=int, default=0, help="The first number.")
def main(minutes: float, start: int) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    came: collections.Counter[str] = collections.Counter()
    end, number = time.monotonic() + 60 * minutes, start
    while time.monotonic() < end:
        try:
            came[run(case(number))] += 1
        except AssertionError as error:
            came["WRONG"] += 1
            click.echo(f"case {number}: {str(error)[:600]}")
        number += 1
    for what, count in came.most_common():
        click.echo(f"{count:6} {what}")


if __name__ == "__main__":
    main()
