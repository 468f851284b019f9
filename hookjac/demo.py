"""The main job on real data: train a small net on handwritten digits, then look at what `.grad` throws away."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import hookjac
from hookjac import plot
from hookjac.plot import BAD, GOOD, INK, MUTED

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid,
}  # fmt: skip


@dataclass(frozen=True)
class Digits:
    """8 x 8 images scaled to [0, 1], shuffled; the first `split` are trained on."""

    x: Tensor  # [1797, 64]
    y: Tensor  # [1797]
    split: int


def load(seed: int) -> Digits:
    raw = load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(seed))
    x = torch.from_numpy(np.asarray(raw.data)).float()[order] / 16
    return Digits(x, torch.from_numpy(np.asarray(raw.target)).long()[order], split=1297)


def build(hidden: tuple[int, ...], activation: str, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    widths, parts = (64, *hidden), []
    for i, o in itertools.pairwise(widths):
        parts += [nn.Linear(i, o), ACTIVATIONS[activation]()]
    return nn.Sequential(*parts, nn.Linear(widths[-1], 10))


def train(model: nn.Module, data: Digits, epochs: int, console: Console) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=epochs, state="")
        for _ in range(epochs):
            for rows in torch.randperm(data.split).split(64):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(data.x[rows]), data.y[rows])
                loss.backward()
                optimizer.step()
            bar.update(task, advance=1, state=f"loss {loss.item():.3f}, held-out accuracy {accuracy(model, data):.1%}")


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    found = model(data.x[data.split :]).argmax(1)
    return (found == data.y[data.split :]).float().mean().item()


@dataclass(frozen=True)
class Measured:
    """Everything the table and the picture show."""

    explanation: Any
    seconds: float
    norms: Tensor  # [1797], of each sample's own gradient
    guesses: Tensor  # [1797]
    batch: int


def measure(model: nn.Module, data: Digits, batch: int) -> Measured:
    """Run `extend` on the first held-out digits, and once on all of them for the gradient norms."""
    x, y = held_out(data, batch)
    model.zero_grad()
    start = time.perf_counter()
    with hookjac.extend(model, "grad_sample", "jac", "hess_diag") as ext:
        F.cross_entropy(model(x), y).backward()
    seconds = time.perf_counter() - start
    kept = {name: (p.grad_sample, p.jac, p.hess_diag) for name, p in _named(model)}
    with hookjac.extend(model, "grad_sample"):
        logits = model(data.x)
        F.cross_entropy(logits, data.y, reduction="sum").backward()
    squares = sum((p.grad_sample.flatten(1).square().sum(1) for _, p in _named(model)), torch.zeros(len(data.y)))
    for name, p in _named(model):
        p.grad_sample, p.jac, p.hess_diag = kept[name]
    return Measured(ext.explain(), seconds, squares.sqrt(), logits.argmax(1), batch)


def held_out(data: Digits, batch: int) -> tuple[Tensor, Tensor]:
    return data.x[data.split :][:batch], data.y[data.split :][:batch]


def _named(model: nn.Module) -> list[tuple[str, Any]]:
    return list(model.named_parameters())


def agreement(model: nn.Module, data: Digits, batch: int, entries: int) -> dict[str, float]:
    """The largest relative difference to plain autograd loops, on a few entries of each result."""
    x, y = held_out(data, batch)
    generator = torch.Generator().manual_seed(1)
    found: dict[str, float] = {}
    logits = model(x)
    losses = F.cross_entropy(logits, y, reduction="none") / len(y)
    for name, p in _named(model):
        (slope,) = torch.autograd.grad(losses.sum(), p, create_graph=True)
        worst = 0.0
        for _ in range(entries):
            n = int(torch.randint(len(y), (), generator=generator))
            c = int(torch.randint(10, (), generator=generator))
            k = int(torch.randint(p.numel(), (), generator=generator))
            (g,) = torch.autograd.grad(losses[n], p, retain_graph=True)
            (j,) = torch.autograd.grad(logits[n, c], p, retain_graph=True)
            (h,) = torch.autograd.grad(slope.reshape(-1)[k], p, retain_graph=True)
            pairs = [
                (p.grad_sample[n], g, p.grad_sample),
                (p.jac[n, c], j, p.jac),
                (p.hess_diag.reshape(-1)[k], h.reshape(-1)[k], p.hess_diag),
            ]
            for ours, loop, whole in pairs:
                worst = max(worst, ((ours - loop).abs().max() / whole.abs().max()).item())
        found[name] = worst
    return found


def table(model: nn.Module, measured: Measured, agree: dict[str, float]) -> Table:
    rows = measured.explanation.to_dict()["parameters"]
    N, title = measured.batch, f"{measured.batch} held-out digits, one backward, {measured.seconds * 1e3:.0f} ms"
    shapes = f"grad_sample [{N}, *p]   jac [{N}, 10, *p]   hess_diag [*p]   error: to loops"
    out = Table(title=title, caption=shapes, box=SIMPLE_HEAD, pad_edge=False)
    for head in ("parameter", "p", "road", "hess_diag"):
        out.add_column(head, no_wrap=True)
    for head in ("from", "to", "error"):
        out.add_column(head, justify="right")
    for name, p in _named(model):
        row, shape = rows[name], " x ".join(map(str, p.shape))
        assert p.grad_sample.shape == (N, *p.shape)
        assert p.jac.shape == (N, 10, *p.shape)
        road = f"{row['road']} ({row['why'].split(';')[0]})"
        lowest, highest = f"{p.hess_diag.min():.1e}", f"{p.hess_diag.max():.1e}"
        out.add_row(name, shape, road, f"by {row['hessian']}", lowest, highest, f"{agree[name]:.0e}")
    return out


# The picture ------------------------------------------------------------------------------------------------


def picture(model: nn.Sequential, data: Digits, measured: Measured, path: Path) -> None:
    """Hessian-diagonal maps, the histogram of gradient norms, and the digits that pull hardest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    look = {"font.size": 9, "axes.edgecolor": MUTED, "axes.titleweight": "bold", "axes.titlelocation": "left",
            "axes.spines.top": False, "axes.spines.right": False, "text.color": INK}  # fmt: skip
    with plt.rc_context(look):  # type: ignore[arg-type]
        weights = [(name, p) for name, p in _named(model) if p.dim() == 2]
        figure = plt.figure(figsize=(13, 10), layout="constrained")
        title = "What .grad throws away: 1,797 handwritten digits, one small network"
        figure.suptitle(title, fontsize=14, fontweight="bold")
        parts: Any = figure.subfigures(3, 1, height_ratios=[3.4, 2.2, 3.6])
        upper, middle, lower = parts
        _maps(upper, weights)
        _histogram(middle, data, measured)
        _hardest(lower, data, measured)
        figure.savefig(path, dpi=130, facecolor="white")
        plt.close(figure)


def _maps(figure: Any, weights: list[tuple[str, Any]]) -> None:
    figure.suptitle("Exact Hessian diagonal of each weight, colours in log steps (first layer: an 8 x 8 tile a unit)",
                    fontsize=10, x=0.01, ha="left")  # fmt: skip
    axes = figure.subplots(1, len(weights), width_ratios=[1.6] + [1] * (len(weights) - 1), squeeze=False)[0]
    for k, (axis, (name, p)) in enumerate(zip(axes, weights, strict=True)):
        h, title = p.hess_diag.detach(), f"{name}  [{p.shape[0]} x {p.shape[1]}]"
        if k == 0:
            plot.signed_map(axis, torch.from_numpy(mosaic(h)), title, "equal")
        else:
            plot.signed_map(axis, h, title)
            axis.set_xlabel("input")
            axis.set_ylabel("output")


def mosaic(h: Tensor) -> Any:  # [hidden, 64] -> one image of 8 x 8 tiles with gaps
    per_row = max(1, round((1.6 * h.shape[0]) ** 0.5))
    rows = -(-h.shape[0] // per_row)
    tiles = np.full((rows * per_row, 9, 9), np.nan)
    tiles[: len(h), :8, :8] = rearrange(h.numpy(), "hidden (y x) -> hidden y x", x=8)
    return rearrange(tiles, "(r c) y x -> (r y) (c x)", c=per_row)[:-1, :-1]


def _histogram(figure: Any, data: Digits, measured: Measured) -> None:
    axis = figure.subplots()
    norms = measured.norms.clamp(min=1e-12).numpy()
    edges = np.geomspace(max(norms.min(), norms.max() * 1e-9), norms.max() * 1.01, 60)
    right = (measured.guesses == data.y).numpy()
    axis.hist([norms[right], norms[~right]], bins=edges, stacked=True, color=[GOOD, BAD],
              label=[f"read correctly ({right.sum()})", f"misread ({(~right).sum()})"])  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlabel("norm of one sample's gradient, over all parameters")
    axis.set_ylabel("digits")
    median = float(np.median(norms))
    title = "Per-sample gradient norms"
    if (~right).any():
        title += f": a misread digit pulls {np.median(norms[~right]) / median:,.0f} times as hard as the median digit"
    axis.set_title(title)
    axis.legend(frameon=False, loc="upper left")


def _hardest(figure: Any, data: Digits, measured: Measured, rows: int = 2, columns: int = 12) -> None:
    figure.suptitle("The digits with the largest gradients: label, and what the network reads",
                    fontsize=10, x=0.01, ha="left")  # fmt: skip
    order = measured.norms.argsort(descending=True)
    axes = figure.subplots(rows, columns)
    for axis, k in zip(axes.flat, order.tolist(), strict=False):
        axis.imshow(data.x[k].reshape(8, 8).numpy(), cmap="gray_r", interpolation="nearest")
        label, guess = int(data.y[k]), int(measured.guesses[k])
        axis.set_title(f"{label}" if label == guess else f"{label}, read {guess}", loc="center",
                       color=INK if label == guess else BAD)  # fmt: skip
        axis.set_xlabel(f"{measured.norms[k]:.2g}", color=MUTED, fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_visible(True)
