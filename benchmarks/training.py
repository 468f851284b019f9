"""The optimizers of `hookjac.optim` on real data, next to SGD and AdamW tuned by the same budget.

`python -m benchmarks --training` tunes, trains, prints the table, draws the curves. Every optimizer has the same number
of configurations to choose from, each tried once; the one with the lowest loss over the last tenth of its steps then
runs from other seeds, which shuffle, initialise and draw anew. Losses of the curves are those of the batches; the
held-out loss is of the last step.
"""

from __future__ import annotations

import itertools
import json
import math
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import report
from benchmarks.growth import COLOURS
from hookjac import optim

SEEDS = (1, 2, 3, 4, 5)
CONTEXT = 32
Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """Data to train on and held out, a net, a loss, and how long."""

    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    data: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]  # x, y, and those held out
    batch: int
    steps: int


def _table(load: Callable[..., Any], *, standard: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = load()
    x, y = torch.as_tensor(found.data).float(), torch.as_tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, cut = (x - x.mean(0)) / x.std(0).clamp(min=1e-6), len(x) * 3 // 4
    y = ((y - y.double().mean()) / y.double().std()).float().unsqueeze(1) if standard else y
    x, y = x[order], y[order]
    return x[:cut], y[:cut], x[cut:], y[cut:]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    return _table(load_digits)


def diabetes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_diabetes

    return _table(load_diabetes, standard=True)


def breast_cancer() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_breast_cancer

    return _table(load_breast_cancer)


def python_docs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Windows of the language reference that `help()` reads from: each character's successor is to be told."""
    text = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    known = {c: k for k, c in enumerate(LETTERS)}
    ids = torch.tensor([known.get(c, 0) for c in text])
    windows = ids[: len(ids) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    held = 512
    return windows[held:, :-1], windows[held:, 1:], windows[:held, :-1], windows[:held, 1:]


LETTERS = "\0\n " + "".join(map(chr, range(33, 127)))


class Characters(nn.Module):
    """A small transformer over characters: two blocks of width 64."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(len(LETTERS), 64), nn.Embedding(CONTEXT, 64)
        self.blocks = nn.ModuleList(_Block() for _ in range(2))
        self.norm, self.out = nn.LayerNorm(64), nn.Linear(64, len(LETTERS))

    def forward(self, ids: Tensor) -> Tensor:  # [N, T] -> [N, T, letters]
        h = self.letters(ids) + self.places(torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.out(self.norm(h))
        return out


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(64), nn.LayerNorm(64)
        self.qkv, self.join = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (4, 16)).transpose(1, 2) for t in self.qkv(self.first(h)).chunk(3, 2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = h + self.join(mixed)
        out: Tensor = h + self.down(F.gelu(self.up(self.second(h))))
        return out


def mlp(*widths: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        parts: list[nn.Module] = []
        for i, o in itertools.pairwise(widths[:-1]):
            parts += [nn.Linear(i, o), nn.Tanh()]
        return nn.Sequential(*parts, nn.Linear(*widths[-2:]))

    return build


def per_letter(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), y.flatten())


TASKS = {
    t.name: t
    for t in (
        Task("digits", mlp(64, 64, 64, 10), F.cross_entropy, digits, batch=128, steps=200),
        Task("diabetes", mlp(10, 32, 32, 1), F.mse_loss, diabetes, batch=331, steps=200),
        Task("breast cancer", mlp(30, 32, 32, 2), F.cross_entropy, breast_cancer, batch=128, steps=200),
        Task("characters", Characters, per_letter, python_docs, batch=32, steps=300),
    )
}

# The optimizers: six configurations each -------------------------------------------------------------------------

Make = Callable[[nn.Module], torch.optim.Optimizer]
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


def configurations(task: Task) -> dict[str, dict[str, Make]]:
    few = task.name == "characters"  # its outputs are 32 times 97 numbers a sample: sampled curvature only
    diagonal: Any = "ggn_diag_mc" if few else "ggn_diag"
    found: dict[str, dict[str, Make]] = {
        "SGD": {f"lr {lr:g}": lambda m, lr=lr: torch.optim.SGD(m.parameters(), lr, momentum=0.9)
                for lr in (3 * r for r in RATES)},
        "AdamW": {f"lr {lr:g}": lambda m, lr=lr: torch.optim.AdamW(m.parameters(), lr) for lr in RATES},
        "KFAC": {f"lr {lr:g}, damping {d:g}": lambda m, lr=lr, d=d: optim.KFAC(m, lr=lr, damping=d)
                 for lr in (0.01, 0.03, 0.1) for d in (1e-3, 1e-2)},
        "EKFAC": {f"lr {lr:g}, damping {d:g}": lambda m, lr=lr, d=d: optim.KFAC(m, lr=lr, damping=d, corrected=True)
                  for lr in (0.01, 0.03, 0.1) for d in (1e-3, 1e-2)},
        "DiagonalNewton": {f"lr {lr:g}, damping {d:g}": lambda m, lr=lr, d=d: optim.DiagonalNewton(
            m, lr=lr, damping=d, curvature=diagonal, every=5) for lr in (0.003, 0.01, 0.03) for d in (1e-3, 1e-2)},
        "NaturalGradient": {f"damping {d:g}, {k} products": lambda m, d=d, k=k: optim.NaturalGradient(
            m, damping=d, iterations=k) for d in (1e-2, 1e-1, 1.0) for k in ((3, 8) if few else (5, 20))},
    }  # fmt: skip
    if not few:
        found["GaussNewton"] = {
            f"damping {d:g}, at least {least:g}": lambda m, d=d, least=least: optim.GaussNewton(
                m, damping=d, least_damping=least)
            for d in (1e-2, 1e-1, 1.0) for least in (1e-4, 1e-2)}  # fmt: skip
    return found


# Training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Loss of the batch and seconds so far at every step; the held-out loss at the end."""

    losses: list[float]
    seconds: list[float]
    held_out: float

    @property
    def last(self) -> float:
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return statistics.fmean(tail) if all(map(math.isfinite, tail)) else math.inf


def train(task: Task, make: Make, seed: int, steps: int) -> Run:
    torch.manual_seed(seed)
    x, y, held_x, held_y = task.data()
    model = task.build()
    optimizer = make(model)
    losses, seconds, spent = [], [], 0.0
    for rows in batches(len(x), task.batch, steps, seed):
        a, b = x[rows], y[rows]

        def closure(a: Tensor = a, b: Tensor = b) -> Tensor:
            optimizer.zero_grad()
            loss = task.loss(model(a), b)
            loss.backward()
            return loss

        start = time.perf_counter()
        loss: Any = optimizer.step(closure)  # type: ignore[arg-type]
        spent += time.perf_counter() - start
        losses.append(loss.item())
        seconds.append(spent)
        if not math.isfinite(losses[-1]):
            return Run(losses, seconds, math.inf)
    with torch.no_grad():
        return Run(losses, seconds, float(task.loss(model(held_x), held_y)))


def batches(N: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(left) < batch:
            left = torch.randperm(N, generator=generator)
        rows, left = left[:batch], left[batch:]
        yield rows


# What comes of it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """One optimizer on one task: the configuration that was chosen, and its runs."""

    task: str
    optimizer: str
    chosen: str
    tried: int
    runs: list[Run]

    def median(self, what: Callable[[Run], float]) -> float:
        return statistics.median(map(what, self.runs))


@dataclass(frozen=True)
class Training:
    machine: dict[str, str]
    found: list[Trained]


def all_of_it(steps: int | None = None, seeds: tuple[int, ...] = SEEDS) -> list[Trained]:
    todo = [(task, name) for task in TASKS.values() for name in configurations(task)]
    found = []
    with tqdm(todo, unit="optimizer") as bar:
        for task, name in bar:
            bar.set_description(f"{name}, {task.name}")
            found.append(tuned(task, name, configurations(task)[name], steps or task.steps, seeds))
    return found


def tuned(task: Task, name: str, made: dict[str, Make], steps: int, seeds: tuple[int, ...]) -> Trained:
    tries = {said: train(task, make, 0, steps).last for said, make in made.items()}
    chosen = min(tries, key=lambda said: tries[said])
    runs = [train(task, made[chosen], seed, steps) for seed in seeds]
    return Trained(task.name, name, chosen, len(made), runs)


def save(training: Training, path: Path) -> None:
    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}") if math.isfinite(value) else None
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return [short(v) for v in value] if isinstance(value, list) else value

    path.write_text(json.dumps(short(asdict(training))) + "\n")


def load(path: Path) -> Training:
    raw = json.loads(path.read_text())
    found = [Trained(**{**t, "runs": [_run(**run) for run in t["runs"]]}) for t in raw["found"]]
    return Training(raw["machine"], found)


def _run(losses: list[float | None], seconds: list[float], held_out: float | None) -> Run:
    return Run([math.inf if v is None else v for v in losses], seconds, math.inf if held_out is None else held_out)


def _said(loss: float, digits: int = 3) -> str:
    return f"{loss:.{digits}g}" if math.isfinite(loss) else "diverged"


HEAD = ["task", "optimizer", "chosen", "loss, last tenth", "its spread", "held out", "steps to AdamW's", "ms a step",
        "seconds to AdamW's"]  # fmt: skip


def rows(training: Training) -> list[list[str]]:
    """Medians over seeds. The goal is what AdamW reached: how many steps, and seconds, the others took to it."""
    out = []
    for t in training.found:
        goal = next(a for a in training.found if (a.task, a.optimizer) == (t.task, "AdamW")).median(lambda r: r.last)
        lasts = [r.last for r in t.runs]
        reached = [reach(r, goal) for r in t.runs]
        there = sum(k is not None for k in reached) * 2 > len(reached)
        steps = statistics.median(len(r.losses) if k is None else k for k, r in zip(reached, t.runs, strict=True))
        seconds = statistics.median(r.seconds[-1 if k is None else k - 1] for k, r in zip(reached, t.runs, strict=True))
        out.append([
            t.task, t.optimizer, t.chosen, _said(t.median(lambda r: r.last)),
            f"{_said(min(lasts), 2)} to {_said(max(lasts), 2)}", _said(t.median(lambda r: r.held_out)),
            f"{steps:.0f}" if there else "never", f"{1e3 * t.median(lambda r: r.seconds[-1] / len(r.seconds)):.1f}",
            f"{seconds:.2f}" if there else "never",
        ])  # fmt: skip
    return out


def reach(run: Run, goal: float) -> int | None:
    """The first step from which on the mean of ten batches is at the goal, or below."""
    smooth = smoothed(run.losses)
    return next((k + 1 for k, loss in enumerate(smooth) if k >= 9 and loss <= goal), None)


def smoothed(losses: list[float]) -> list[float]:
    return [statistics.fmean(losses[max(0, k - 9) : k + 1]) for k in range(len(losses))]


def print_table(training: Training) -> None:
    table = Table(*HEAD, title=report.said(training.machine))
    for row in rows(training):
        table.add_row(*row)
    Console(width=170).print(table)


def write_page(training: Training, path: Path) -> None:
    report.put(path, "training", f"{report.said(training.machine)}.\n\n{report.markdown(HEAD, rows(training))}")


def draw(training: Training, path: Path) -> None:
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(t.optimizer for t in training.found))
    colours = dict(zip(names, COLOURS, strict=False))
    tasks = list(dict.fromkeys(t.task for t in training.found))
    figure, grid = plt.subplots(2, len(tasks), figsize=(16, 8), sharey="col", layout="constrained", squeeze=False)
    for k, task in enumerate(tasks):
        for t in training.found:
            if t.task != task:
                continue
            curves = torch.tensor([smoothed(r.losses) for r in t.runs if math.isfinite(r.held_out)])
            if not len(curves):
                continue
            middle, low, high = curves.median(0).values, curves.amin(0), curves.amax(0)
            clocks = torch.tensor([r.seconds for r in t.runs if math.isfinite(r.held_out)]).median(0).values
            for row, xs in enumerate((torch.arange(1, len(middle) + 1), clocks)):
                axes, plain = grid[row][k], t.optimizer in ("SGD", "AdamW")
                axes.fill_between(xs, low, high, color=colours[t.optimizer], alpha=0.12, lw=0)
                axes.plot(xs, middle, color=colours[t.optimizer], lw=1.8, ls="--" if plain else "-", label=t.optimizer)
        for row, what in enumerate(("step", "seconds")):
            grid[row][k].set_yscale("log")
            grid[row][k].grid(alpha=0.3)
            grid[row][k].set_xlabel(what)
        grid[1][k].set_xscale("log")
        grid[0][k].set_title(task)
    for row in range(2):
        grid[row][0].set_ylabel("training loss, mean of ten batches")
    lines, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
