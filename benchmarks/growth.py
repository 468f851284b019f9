"""How time and memory grow with samples, outputs, width, depth and sequence length: measured, and as theory has it.

`python -m benchmarks --growth` measures, fits exponents to the upper half of each curve, and draws them.
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
from torch import nn

import hookjac
from benchmarks import measure
from benchmarks.workloads import Transformer, mlp

Setting = dict[str, int]
BASE: Setting = {"N": 32, "C": 10, "width": 128, "depth": 3, "T": 16}
SIZES: dict[str, list[int]] = {
    "N": [16, 32, 64, 128, 256], "C": [4, 8, 16, 32, 64], "width": [64, 128, 256, 512], "depth": [2, 4, 8, 16],
    "T": [8, 16, 32, 64],
}  # fmt: skip
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


@dataclass(frozen=True)
class Curve:
    """Seconds and bytes of one quantity along one axis, and the exponents fitted to its upper half."""

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
    seconds, sizes_of = [], []
    for size in sizes:
        run, forget = step(quantity, {**BASE, axis: size}, sequence=axis == "T")
        run()
        count = max(3, min(15, int(0.5 / max(measure.once(run), 1e-4)))) if timed else 0
        seconds.append(statistics.median(measure.once(run) for _ in range(count)) if timed else 1.0)
        forget()
        sizes_of.append(measure.peak(run))
    return Curve(quantity, axis, sizes, seconds, sizes_of)


def all_curves() -> list[Curve]:
    return [curve(q, axis, SIZES[axis]) for q in ASKED for axis in TIME[q]]


def save(curves: list[Curve], machine: dict[str, str], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "curves": [asdict(c) for c in curves]}, indent=1) + "\n")


def load(path: Path) -> list[Curve]:
    return [Curve(**c) for c in json.loads(path.read_text())["curves"]]


def draw(curves: list[Curve], path: Path) -> None:
    import matplotlib.pyplot as plt

    axes_of = list(SIZES)
    figure, grid = plt.subplots(2, len(axes_of), figsize=(3.1 * len(axes_of), 6), layout="constrained")
    colours = dict(zip(ASKED, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for c in curves:
        for row, values in enumerate((c.seconds, c.bytes)):
            axes = grid[row][axes_of.index(c.axis)]
            scaled = [1e3 * v if row == 0 else v / 1e6 for v in values]
            slope, theory = c.slopes[row], c.theory[row]
            axes.loglog(c.sizes, scaled, "o-", ms=3, color=colours[c.quantity],
                        label=f"{c.quantity}: {slope:.1f} ({theory:g})")  # fmt: skip
    for k, axis in enumerate(axes_of):
        for row, unit in enumerate(("ms", "MB at once")):
            grid[row][k].set_xlabel(axis)
            grid[row][k].set_ylabel(unit)
            grid[row][k].legend(fontsize=6, title="exponent (theory)", title_fontsize=6)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
