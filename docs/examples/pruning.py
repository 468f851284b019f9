"""Which training digits can be left out? Pruning by the norms of single digits' gradients, against chance.

    python docs/examples/pruning.py --out pruning.png

Gradient norms early in training (GraNd, and its cheaper relative EL2N; Paul et al. 2021) call a digit hard or easy.
Leave out the easiest, the hardest or any, train again from scratch, and compare on digits that no net has seen.

N training digits · E nets.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch
from digits import net, outputs, train
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

import hookjac
from hookjac.demo import Digits, load

METHODS = {
    "random": "random ones",
    "easy": "the easiest (gradient norm)",
    "easy, EL2N": "the easiest (EL2N)",
    "hard": "the hardest (gradient norm)",
}


def difficulty(data: Digits, nets: int, **train_: Any) -> tuple[Tensor, Tensor]:
    """[N] twice: norms of gradients, and of errors in the outputs (EL2N); means over nets that have learnt little."""
    weights = train(data, torch.ones(nets, data.split), seed=50, **train_)
    x, y = data.x[: data.split], data.y[: data.split]
    norms, errors = [], []
    for e in range(nets):
        model = net(weights, e)
        with hookjac.extend(model, "grad_sample_norm"):
            logits = model(x)
            F.cross_entropy(logits, y, reduction="sum").backward()
        each = [p.grad_sample_norm for p in model.parameters()]  # type: ignore[attr-defined]
        norms.append(torch.stack(each).norm(dim=0))
        errors.append((logits.detach().softmax(1) - F.one_hot(y, 10)).norm(dim=1))
    return torch.stack(norms).mean(0), torch.stack(errors).mean(0)


def kept(scores: tuple[Tensor, Tensor], method: str, part: float, seeds: int) -> Tensor:  # -> [seeds, N]
    """Training sets of which `part` was left out: 1 in, 0 out."""
    norms, errors = scores
    N, generator = len(norms), torch.Generator().manual_seed(11)
    order = {"easy": norms, "easy, EL2N": errors, "hard": -norms}.get(method)
    rows = [torch.rand(N, generator=generator) if order is None else order for _ in range(seeds)]
    # the first `part` of the order are out
    return torch.stack([(row.argsort().argsort() >= round(part * N)).float() for row in rows])


def compare(
    data: Digits, scores: tuple[Tensor, Tensor], parts: list[float], seeds: int, **train_: Any
) -> dict[str, Tensor]:
    """Each method's accuracy on held-out digits, [parts], averaged over nets that start from different weights."""
    x, y = data.x[data.split :], data.y[data.split :]
    found = {}
    for method in METHODS:
        share = torch.cat([kept(scores, method, part, seeds) for part in parts])
        weights = train(data, share, seed=60, **train_)
        right = (outputs(weights, x).argmax(2) == y).float().mean(1)
        found[method] = right.view(len(parts), seeds).mean(1)
    return found


def table(found: dict[str, Tensor], parts: list[float]) -> list[str]:  # [parts, splits] each
    """Markdown: mean accuracy, and its standard error over splits, in percent."""
    lines = ["| left out | " + " | ".join(f"{part:.0%}" for part in parts) + " |", "|---" * (len(parts) + 1) + "|"]
    for method, right in found.items():
        mean, error = 100 * right.mean(1), 100 * right.std(1) / right.shape[1] ** 0.5
        cells = [f"{m:.1f} ± {e:.1f}" for m, e in zip(mean.tolist(), error.tolist(), strict=True)]
        lines.append(f"| {METHODS[method]} | " + " | ".join(cells) + " |")
    return lines


# The picture ------------------------------------------------------------------------------------------------

INK, MUTED = "#1f2933", "#8a949e"
COLOURS = {"random": MUTED, "easy": "#1d6fa5", "easy, EL2N": "#7fb3d5", "hard": "#c2410c"}


def picture(found: dict[str, Tensor], parts: list[float], data: Digits, norms: Tensor, path: Path) -> None:
    """Accuracy against what was left out; and the easiest and the hardest digits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 9, "text.color": INK, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=(11, 4), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=[1.25, 1])
        axis = left.subplots()
        for method, rows in found.items():
            mean, error = 100 * rows.mean(1), 100 * rows.std(1) / rows.shape[1] ** 0.5
            shifted = [100 * part for part in parts]
            axis.errorbar(shifted, mean, error, marker="o", ms=4, capsize=2, color=COLOURS[method],
                          label=f"without {METHODS[method]}")  # fmt: skip
        axis.set_xlabel("training digits left out, %")
        axis.set_ylabel("accuracy on 500 held-out digits, %")
        axis.legend(frameon=False, loc="lower left")
        axis.set_title("Pruned by gradient norm, trained again", loc="left", fontweight="bold")
        order = norms.argsort()
        rows = right.subplots(4, 8)
        for k, n in enumerate([*order[:16].tolist(), *order[-16:].tolist()]):
            cell = rows.flat[k]
            cell.imshow(data.x[n].reshape(8, 8).numpy(), cmap="gray_r", interpolation="nearest")
            cell.set_title(f"{int(data.y[n])}", color=COLOURS["easy" if k < 16 else "hard"], fontsize=9)
            cell.set_xticks([])
            cell.set_yticks([])
        right.suptitle("The easiest (blue) and the hardest (red)", fontsize=10, fontweight="bold")
        figure.savefig(path, dpi=120, facecolor="white")
        plt.close(figure)


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Minutes of work in seconds; the numbers mean nothing.")
@click.option("--splits", type=click.IntRange(2, 100), default=8, help="Into training and held-out digits.")
@click.option("--seeds", type=click.IntRange(1, 100), default=2, help="Nets for each training set.")
@click.option("--early", type=click.IntRange(1, 1000), default=20, help="Steps before difficulty is measured.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("pruning.png"))
def main(quick: bool, splits: int, seeds: int, early: int, out: Path) -> None:
    """Accuracy without the easiest, the hardest or any of 1,297 training digits."""
    console, began = Console(), time.perf_counter()
    parts = [0.0, 0.5] if quick else [0.0, 0.2, 0.4, 0.6, 0.8]
    splits, seeds, judges = (2, 1, 1) if quick else (splits, seeds, 8)
    each = []
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("training", total=splits * (judges + len(METHODS) * len(parts) * seeds))
        done = lambda more: bar.advance(task, more)
        for split in range(splits):
            data = load(split)
            scores = difficulty(data, judges, steps=early, done=done)
            each.append(compare(data, scores, parts, seeds, done=done, **({"steps": 10} if quick else {})))
    found = {method: torch.stack([one[method] for one in each], 1) for method in METHODS}
    for line in table(found, parts):
        console.print(line, soft_wrap=True)
    picture(found, parts, data, scores[0], out)
    console.print(f"picture: {out}; {time.perf_counter() - began:.0f} seconds")


if __name__ == "__main__":
    main()
