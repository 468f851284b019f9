"""How time and memory grow with samples, outputs, width, depth and sequence length: measured, and as theory has it.

`python -m benchmarks --growth` measures, fits exponents to the last three points of each curve, prints them beside
those of theory, and draws the curves. An exponent may be below theory, where the constant part of a step still matters,
and above it by no more than the allowance for noise.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

import hookjac
from benchmarks import measure, report
from benchmarks.workloads import Transformer, mlp

Setting = dict[str, int]
BASE: Setting = {"N": 32, "C": 10, "width": 128, "depth": 3, "T": 16}
SIZES: dict[str, list[int]] = {
    "N": [16, 32, 64, 128, 256], "C": [4, 8, 16, 32, 64], "width": [64, 128, 256, 512, 1024, 2048],
    "depth": [2, 4, 8, 16, 32], "T": [8, 16, 32, 64, 128],
}  # fmt: skip
NAMES = {"N": "samples N", "C": "outputs C", "width": "width", "depth": "depth", "T": "sequence length T"}
ALLOWED = 0.15  # above theory: noise
SECONDS, ROUNDS = 0.5, (3, 100)  # for a point; the fewest and the most rounds
ASKED: dict[str, Any] = {
    "grad_sample": "grad_sample", "grad_sample_norm": "grad_sample_norm", "jac": "jac", "ntk": "ntk",
    "ggn_diag": "ggn_diag", "kfac": "kfac", "hess_diag": "hess_diag",
}  # fmt: skip
# Leading exponents of what has to be computed. MLP of equal widths w and depth d with Tanh; jac stays in its factors
TIME: dict[str, dict[str, float]] = {
    "grad_sample": {"N": 1, "C": 0, "width": 2, "depth": 1, "T": 2},
    "grad_sample_norm": {"N": 1, "C": 0, "width": 2, "depth": 1, "T": 2},
    "jac": {"N": 1, "C": 1, "width": 2, "depth": 1, "T": 2},
    "ntk": {"N": 2, "C": 2, "width": 2, "depth": 1, "T": 2},
    "ggn_diag": {"N": 1, "C": 1, "width": 2, "depth": 1, "T": 2},
    "kfac": {"N": 1, "C": 0, "width": 2, "depth": 1, "T": 2},
    "hess_diag": {"N": 1, "C": 2, "width": 3, "depth": 1},
}
MEMORY: dict[str, dict[str, float]] = {
    "grad_sample": {"N": 1, "C": 0, "width": 2, "depth": 1, "T": 2},
    "grad_sample_norm": {"N": 1, "C": 0, "width": 2, "depth": 1, "T": 2},
    "jac": {"N": 1, "C": 1, "width": 2, "depth": 1, "T": 2},
    "ntk": {"N": 2, "C": 2, "width": 2, "depth": 1, "T": 2},
    "ggn_diag": {"N": 1, "C": 1, "width": 2, "depth": 1, "T": 2},
    "kfac": {"N": 1, "C": 0, "width": 2, "depth": 1, "T": 2},
    "hess_diag": {"N": 1, "C": 2, "width": 2, "depth": 1},
}
# where the last three points are above theory and we know why: a step between two sizes, which is no growth
KNOWN: dict[tuple[str, str], str] = {}


@dataclass(frozen=True)
class Curve:
    """Seconds and bytes of one quantity along one axis, and the exponents fitted to its last three points."""

    quantity: str
    axis: str
    sizes: list[int]
    seconds: list[float]
    bytes: list[int]

    @property
    def slopes(self) -> tuple[float, float]:
        return fitted(self.sizes, self.seconds), fitted(self.sizes, [float(b) for b in self.bytes])

    @property
    def theory(self) -> tuple[float, float]:
        return TIME[self.quantity][self.axis], MEMORY[self.quantity][self.axis]

    @property
    def worse(self) -> list[str]:
        """In what it grows faster than theory, beyond the allowance."""
        both = zip(("time", "memory"), self.slopes, self.theory, strict=True)
        return [name for name, found, theory in both if found > theory + ALLOWED]

    @property
    def verdict(self) -> str:
        if not self.worse:
            return "no worse"
        return f"{' and '.join(self.worse)} above: {KNOWN.get((self.quantity, self.axis), 'WORSE')}"


@dataclass(frozen=True)
class Growth:
    machine: dict[str, str]
    curves: list[Curve]


def fitted(sizes: list[int], values: list[float]) -> float:
    """The exponent between the last three points, by least squares."""
    xs, ys = [math.log(s) for s in sizes[-3:]], [math.log(v) for v in values[-3:]]
    mx, my = statistics.mean(xs), statistics.mean(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def step(quantity: str, s: Setting, *, sequence: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step, and what forgets its results."""
    torch.manual_seed(0)
    if sequence:
        model: nn.Module = Transformer(50, 32, s["T"])
        x, y = torch.randint(50, (8, s["T"])), torch.randint(10, (8,))
    else:
        widths = [s["width"]] * s["depth"]
        model = mlp(nn.Tanh, s["width"], *widths, s["C"])
        x, y = torch.randn(s["N"], s["width"]), torch.randint(s["C"], (s["N"],))

    def run() -> None:
        model.zero_grad()
        with hookjac.extend(model, ASKED[quantity]):
            F.cross_entropy(model(x), y).backward()

    def forget() -> None:
        for p in model.parameters():
            vars(p).clear()
            p.grad = None

    return run, forget


def curve(quantity: str, axis: str, sizes: list[int], *, timed: bool = True) -> Curve:
    seconds, bytes_ = [], []
    for size in sizes:
        run, forget = step(quantity, {**BASE, axis: size}, sequence=axis == "T")
        run()
        seconds.append(shortest(run) if timed else 1.0)
        forget()
        bytes_.append(measure.peak(run))
    return Curve(quantity, axis, sizes, seconds, bytes_)


def shortest(run: Callable[[], None]) -> float:
    """Of many rounds: what else the machine does can only add to them, and an exponent has no peer measured in turn."""
    times: list[float] = []
    while len(times) < ROUNDS[0] or (sum(times) < SECONDS and len(times) < ROUNDS[1]):
        times.append(measure.once(run))
    return min(times)


def all_curves() -> list[Curve]:
    todo = [(quantity, axis) for quantity in ASKED for axis in TIME[quantity]]
    found = []
    with tqdm(todo, unit="curve") as bar:
        for quantity, axis in bar:
            bar.set_description(f"{quantity}, {axis}")
            found.append(curve(quantity, axis, SIZES[axis]))
    return found


def save(growth: Growth, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(growth), indent=1) + "\n")


def load(path: Path) -> Growth:
    found = json.loads(path.read_text())
    return Growth(found["machine"], [Curve(**c) for c in found["curves"]])


HEAD = ["quantity", "along", "sizes", "time", "in theory", "memory", "in theory", "verdict"]


def rows(growth: Growth) -> list[list[str]]:
    return [
        [
            c.quantity, c.axis, ", ".join(str(s) for s in c.sizes[-3:]), f"{c.slopes[0]:.2f}", f"{c.theory[0]:g}",
            f"{c.slopes[1]:.2f}", f"{c.theory[1]:g}", c.verdict,
        ]
        for c in growth.curves
    ]  # fmt: skip


def print_table(growth: Growth) -> None:
    table = Table(*HEAD, title=f"fitted exponents; {report.said(growth.machine)}")
    for row, c in zip(rows(growth), growth.curves, strict=True):
        table.add_row(*row, style="red" if c.worse else "")
    Console(width=150).print(table)


def write_page(growth: Growth, path: Path) -> None:
    """The exponents between the marks of the page."""
    report.put(path, "growth", f"{report.said(growth.machine)}.\n\n{report.markdown(HEAD, rows(growth))}")


# blue, vermilion, green, ... : told apart by eyes that see few colours, too (Okabe and Ito)
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00"]


def draw(growth: Growth, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, len(SIZES), figsize=(15, 7), sharex="col", sharey="row", layout="constrained")
    for c in growth.curves:
        for row, values in enumerate(([1e3 * t for t in c.seconds], [b / 1e6 for b in c.bytes])):
            style = dict(zip(ASKED, zip(COLOURS, "os^DvPX", strict=True), strict=True))[c.quantity]
            axes = grid[row][list(SIZES).index(c.axis)]
            axes.loglog(c.sizes, values, color=style[0], marker=style[1], ms=4.5, lw=1.6, label=c.quantity)
    for k, axis in enumerate(SIZES):
        for row in range(2):
            axes = grid[row][k]
            _slopes(axes, SIZES[axis])
            axes.set_xticks(SIZES[axis], [str(s) for s in SIZES[axis]])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        grid[1][k].set_xlabel(NAMES[axis], fontsize=12)
    grid[0][0].set_ylabel("time of a step, ms", fontsize=12)
    grid[1][0].set_ylabel("memory at once, MB", fontsize=12)
    lines, names = grid[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=len(names), fontsize=12, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _slopes(axes: Any, sizes: list[int]) -> None:
    """What growing with the first and the second power looks like, dotted, from the lower left corner."""
    low, high = axes.get_ylim()
    for power in (1, 2):
        ends = [low * 1.3, low * 1.3 * (sizes[-1] / sizes[0]) ** power]
        axes.plot([sizes[0], sizes[-1]], ends, ":", color="grey", lw=1, zorder=0)
        axes.annotate(str(power), (sizes[-1], ends[1]), (4, 0), textcoords="offset points", va="center", color="grey",
                      annotation_clip=True)  # fmt: skip
    axes.set_ylim(low, high)
