"""Which training digits made a net read this digit so? Two answers, and whether retraining agrees with them.

    python docs/examples/influence.py --out influence.png

Influence functions, by Kronecker factors of the curvature, and projected gradients in the manner of TRAK. For
reference: the whole Gauss-Newton matrix, gradients without any curvature, pixels, and chance.

N training digits · M digits that are read · k directions.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch
from digits import DECAY, margin, net, outputs, train
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

import hookjac
from hookjac.demo import Digits, load

K = 1024
METHODS = {
    "whole": "influence, whole Gauss-Newton",
    "kfac": "influence, KFAC",
    "projected": f"projected, k = {K}",
    "plain": "gradients, no curvature",
    "pixels": "nearest of its label",
    "chance": "chance (removed: any of its label)",
}


# The scores: how much training digit n speaks for reading digit m rightly. [M, N] each --------------------------


def influence(model: nn.Module, x: Tensor, y: Tensor, at: Tensor, label: Tensor, *, whole: bool = False) -> Tensor:
    """What the margin of `at` loses if a digit of x is left out, to first order (Koh & Liang 2017).

    - <(curvature + decay)⁻¹ d margin, d loss_n>: products with the Jacobian, so that no gradient of a training digit is
    built. whole: with the whole Gauss-Newton matrix instead of its Kronecker factors.
    """
    with hookjac.extend(model, "grad_sample"):
        margin(model(at), label).sum().backward()
    slopes = [p.grad_sample for p in model.parameters()]  # type: ignore[attr-defined]
    with hookjac.extend(model, "jac", hookjac.KFAC(fisher="exact")) as ext:
        logits = model(x)
        F.cross_entropy(logits, y).backward()
    J, p = ext.jacobian, logits.detach().softmax(1)
    if whole:
        rows = J.to_dense().view(len(x), 10, -1)
        metric = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        G = rows.flatten(0, 1).T @ (metric @ rows).flatten(0, 1) / len(x)
        solved = torch.linalg.solve(G + DECAY * torch.eye(len(G)), torch.cat([s.flatten(1) for s in slopes], 1).T)
    else:
        parts = zip(slopes, model.parameters(), strict=True)
        solved = torch.cat([p.kfac.solve(s, DECAY).flatten(1) for s, p in parts], 1).T  # type: ignore[attr-defined]
    pull = p - F.one_hot(y, 10)  # of each training loss, in the outputs
    return -torch.einsum("nc,ncm->mn", pull, (J @ solved).view(len(x), 10, -1))


def projected(model: nn.Module, x: Tensor, y: Tensor, at: Tensor, label: Tensor, *, k: int, seed: int) -> Tensor:
    """In the manner of TRAK (Park et al. 2023): logistic regression on gradients of margins, in k random directions."""

    def features(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with hookjac.extend(model, hookjac.GradSampleProjected(k=k, seed=seed)):
            margins = margin(model(x), y)
            margins.sum().backward()
        rows = [p.grad_sample_projected for p in model.parameters()]  # type: ignore[attr-defined]
        return sum(rows[1:], rows[0]), margins.detach().sigmoid()

    (phi, p), (its, _) = features(x, y), features(at, label)
    kernel = phi.T @ (phi * (p * (1 - p)).unsqueeze(1)) / len(x) + DECAY * torch.eye(k)
    return torch.linalg.solve(kernel, its.T).T @ phi.T * (1 - p)


def plain(model: nn.Module, x: Tensor, y: Tensor, at: Tensor, label: Tensor) -> Tensor:
    """Inner products of gradients: every direction of weights counts alike."""
    with hookjac.extend(model, "grad_sample"):
        margin(model(at), label).sum().backward()
    slopes = torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], 1)  # type: ignore[attr-defined]
    with hookjac.extend(model, "jac") as ext:
        logits = model(x)
        F.cross_entropy(logits, y).backward()
    pull = logits.detach().softmax(1) - F.one_hot(y, 10)
    return -torch.einsum("nc,ncm->mn", pull, (ext.jacobian @ slopes.T).view(len(x), 10, -1))


def scores(models: list[nn.Sequential], data: Digits, read: Tensor, k: int = K) -> dict[str, Tensor]:
    """Of every method, averaged over nets."""
    x, y, at, label = data.x[: data.split], data.y[: data.split], data.x[read], data.y[read]
    given = (x, y, at, label)
    found = {
        "whole": [influence(model, *given, whole=True) for model in models],
        "kfac": [influence(model, *given) for model in models],
        "projected": [projected(model, *given, k=k, seed=e) for e, model in enumerate(models)],
        "plain": [plain(model, *given) for model in models],
        "pixels": [-torch.cdist(at, x) - 1e3 * (label.unsqueeze(1) != y)],
        "chance": [torch.randn(len(at), len(x), generator=torch.Generator().manual_seed(0))],
    }
    return {name: torch.stack(parts).mean(0) for name, parts in found.items()}


# What retraining says ---------------------------------------------------------------------------------------


def halves(N: int, count: int, seed: int) -> Tensor:  # -> [count, N]
    """Random halves of the training digits: 1 in, 0 out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(N, generator=generator) < N // 2 for _ in range(count)]).float()


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:  # [S, M] twice -> [M]
    a, b = (t.argsort(0).argsort(0).float() for t in (a, b))
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a.T, b.T, strict=True)])


def without(tau: Tensor, count: int) -> Tensor:  # [M, N] -> [M, N]
    """All digits but those with the highest scores, a training set for each digit that is read."""
    return torch.ones_like(tau).scatter(1, tau.topk(count, dim=1).indices, 0.0)


def said(values: Tensor) -> str:
    """The mean over digits, and its standard error."""
    return f"{values.mean():.2f} ± {values.std() / len(values) ** 0.5:.2f}"


def compare(
    tau: dict[str, Tensor], data: Digits, read: Tensor, sets: int, inits: int, remove: int, removals: int, **train_: Any
) -> tuple[dict[str, tuple[str, str]], str]:
    """For each method: how its sums rank nets that were trained on halves (the linear datamodeling score), and what the
    margin of a digit loses without the digits of the highest scores for it. And how well half of the nets predict the
    other half.
    """
    at, label, N = data.x[read], data.y[read], data.split
    share = halves(N, sets, seed=7)
    margins = torch.stack([margin(outputs(train(data, share, seed=r + 1, **train_), at), label) for r in range(inits)])
    truth = margins.mean(0)  # [S, M]
    one, two = margins[: inits // 2].mean(0), margins[inits // 2 :].mean(0)
    agreement = said(rank_correlation(one, two))
    few, rows = slice(0, removals), torch.arange(removals)

    def after(share: Tensor) -> Tensor:  # [removals, N] -> [removals]: the margin of digit m in the net without its own
        found = [outputs(train(data, share, seed=100 + r, **train_), at[few]) for r in range(inits)]
        return torch.stack([margin(out, label[few])[rows, rows] for out in found]).mean(0)

    before = after(torch.ones(removals, N))
    result = {}
    for name, t in tau.items():
        t = torch.where(label.unsqueeze(1) == data.y[:N], t, t - 1e6) if name == "chance" else t  # of its own label
        lost = before - after(without(t[few], remove))
        result[name] = said(rank_correlation(share @ tau[name].T, truth)), said(lost)
    return result, agreement


# The picture ------------------------------------------------------------------------------------------------

INK, MUTED, FOR, AGAINST = "#1f2933", "#8a949e", "#1d6fa5", "#c2410c"


def picture(tau: Tensor, data: Digits, read: Tensor, guesses: Tensor, path: Path, show: int = 7) -> None:
    """Digits that were read, and what spoke for and against the right answer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 9, "text.color": INK}):
        figure = plt.figure(figsize=(12, 1.3 * len(read) + 1.1), layout="constrained")
        figure.suptitle("Which training digits made a net read this digit so? (influence functions, KFAC)",
                        fontsize=13, fontweight="bold")  # fmt: skip
        parts: Any = figure.subfigures(1, 3, width_ratios=[1.25, show, show], wspace=0.03)
        blocks = [part.subplots(len(read), n, squeeze=False) for part, n in zip(parts, (1, show, show), strict=True)]
        for part, title, colour in zip(parts, ("read", "speak for the right answer", "speak against it"),
                                       (INK, FOR, AGAINST), strict=True):  # fmt: skip
            part.suptitle(title, color=colour, fontsize=10, fontweight="bold")
        for row, (m, scores) in enumerate(zip(read.tolist(), tau, strict=True)):
            right, guess = int(data.y[m]), int(guesses[row])
            said = f"{right}" if right == guess else f"{right}, read {guess}"
            _digit(blocks[0][row, 0], data, m, said, INK if right == guess else AGAINST)
            for block, sign, colour in ((blocks[1], 1, FOR), (blocks[2], -1, AGAINST)):
                order = (sign * scores).topk(show).indices.tolist()
                for axis, n in zip(block[row], order, strict=True):
                    _digit(axis, data, n, f"{int(data.y[n])}", colour, f"{scores[n]:+.0f}")
        figure.savefig(path, dpi=120, facecolor="white")
        plt.close(figure)


def _digit(axis: Any, data: Digits, n: int, title: str, colour: str, below: str = "") -> None:
    axis.imshow(data.x[n].reshape(8, 8).numpy(), cmap="gray_r", interpolation="nearest")
    axis.set_title(title, color=colour, fontsize=9)
    axis.set_xlabel(below, color=MUTED, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Minutes of work in seconds; the numbers mean nothing.")
@click.option("--nets", type=click.IntRange(1, 100), default=10, help="Nets that scores are averaged over.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("influence.png"))
def main(quick: bool, nets: int, out: Path) -> None:
    """Scores of 1,297 training digits for 50 others, by several methods, and how well retraining agrees with them."""
    console, data, began = Console(), load(0), time.perf_counter()
    read = torch.arange(len(data.y))[-4 if quick else -50 :]
    sets, inits, removals, k = (4, 2, 2, 16) if quick else (48, 6, 30, K)
    nets = 1 if quick else nets
    settings: dict[str, Any] = {"steps": 10, "hidden": 8} if quick else {}
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("training", total=nets + inits * (sets + removals * (len(METHODS) + 1)))
        settings["done"] = lambda more: bar.advance(task, more)
        weights = train(data, torch.ones(nets, data.split), seed=0, **settings)
        models = [net(weights, e) for e in range(nets)]
        tau = scores(models, data, read, k)
        rows, agreement = compare(tau, data, read, sets, inits, 50, removals, **settings)
    console.print("| scores | rank correlation with retraining | margin lost without the 50 highest |", soft_wrap=True)
    console.print("|---|---|---|")
    for name, (correlation, lost) in rows.items():
        console.print(f"| {METHODS[name]} | {correlation} | {lost} |", soft_wrap=True)
    console.print(f"\nhalf of the retrained nets against the other half: {agreement}")
    everyone = torch.arange(data.split, len(data.y))
    logits = outputs(weights, data.x[everyone]).mean(0)
    order = margin(logits, data.y[everyone]).argsort()
    shown = order[torch.tensor([0, 1, 5, 12, 60, 250])]  # misread, close calls, and ones that are clear
    found = torch.stack([influence(m, data.x[: data.split], data.y[: data.split], data.x[everyone[shown]],
                                   data.y[everyone[shown]]) for m in models]).mean(0)  # fmt: skip
    picture(found, data, everyone[shown], logits[shown].argmax(1), out)
    console.print(f"picture: {out}; {time.perf_counter() - began:.0f} seconds")


if __name__ == "__main__":
    main()
