"""What the dearest cells spend their time on now: `python -m benchmarks --profile`.

Shares are of PyTorch's profiler: what each operator took itself, without the operators that it called. What no operator
took is Python, our hooks and autograd's engine; the profiler adds to it, by a microsecond or two for each operator.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from benchmarks import contenders, measure, report
from benchmarks.workloads import WORKLOADS

CELLS, OPERATORS = 5, 5  # how many of them are told of
SECONDS, ROUNDS = 1.0, (3, 30)  # for a cell; the fewest and the most steps in a profile
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::addbmm", "aten::baddbmm", "mkldnn::_linear_pointwise",
            "aten::mkldnn_convolution", "aten::convolution_backward", "aten::_slow_conv2d_forward"}  # fmt: skip
STEP = "one step"


@dataclass(frozen=True)
class Share:
    operator: str
    calls: float  # in a step
    share: float  # of the time of a step


@dataclass(frozen=True)
class Profile:
    """One cell: seconds of a step of ours and a plain one, from the table; operators from the dearest downward."""

    workload: str
    quantity: str
    ours: float
    plain: float
    operators: list[Share]

    @property
    def outside(self) -> float:
        return max(0.0, 1 - sum(s.share for s in self.operators))

    @property
    def heading(self) -> str:
        products = sum(s.share for s in self.operators if s.operator in PRODUCTS)
        return (
            f"`{self.quantity}`, {self.workload} ({WORKLOADS[self.workload].says}): {1e3 * self.ours:.0f} ms, "
            f"{self.ours / self.plain:.0f} plain steps; {products:.0%} in matrix products and convolutions."
        )


@dataclass(frozen=True)
class Profiles:
    machine: dict[str, str]
    cells: list[Profile]


def dearest(results: report.Results) -> list[report.Cell]:
    """Those that take most, in plain steps of their model."""
    return sorted(results.cells, key=lambda cell: -cell.ours / cell.plain)[:CELLS]


def shares(step: Callable[[], Any]) -> list[Share]:
    """What each operator takes of a step, once it is warm."""
    step()
    count = int(min(ROUNDS[1], max(ROUNDS[0], SECONDS / measure.once(step))))
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(count):
            with record_function(STEP):
                step()
    events = found.key_averages()
    (whole,) = (e.cpu_time_total for e in events if e.key == STEP)
    operators = [e for e in events if "::" in e.key and not e.key.startswith("autograd::")]
    return sorted(
        (Share(e.key, e.count / count, e.self_cpu_time_total / whole) for e in operators), key=lambda s: -s.share
    )


def all_profiles(results: report.Results, machine: dict[str, str]) -> Profiles:
    torch.set_default_dtype(torch.float32)
    cells = []
    for cell in tqdm(dearest(results), unit="cell"):
        step = contenders.CONTENDERS[cell.quantity]["hookjac"](WORKLOADS[cell.workload].job("cpu"))
        cells.append(Profile(cell.workload, cell.quantity, cell.ours, cell.plain, shares(step)))
    return Profiles(machine, cells)


def save(profiles: Profiles, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(profiles), indent=1) + "\n")


def load(path: Path) -> Profiles:
    found = json.loads(path.read_text())
    cells = [Profile(**{**c, "operators": [Share(**s) for s in c["operators"]]}) for c in found["cells"]]
    return Profiles(found["machine"], cells)


HEAD = ["operator", "calls", "share"]


def rows(cell: Profile) -> list[list[str]]:
    top, others = cell.operators[:OPERATORS], cell.operators[OPERATORS:]
    return [
        *([s.operator, f"{s.calls:.0f}", f"{s.share:.0%}"] for s in top),
        ["other operators", f"{sum(s.calls for s in others):.0f}", f"{sum(s.share for s in others):.0%}"],
        ["outside of operators", "", f"{cell.outside:.0%}"],
    ]


def print_table(profiles: Profiles) -> None:
    for cell in profiles.cells:
        table = Table(*HEAD, title=cell.heading)
        for row in rows(cell):
            table.add_row(*row)
        Console(width=110).print(table)


def write_page(profiles: Profiles, path: Path) -> None:
    """The profiles between the marks of the page."""
    parts = [f"{cell.heading}\n\n{report.markdown(HEAD, rows(cell))}" for cell in profiles.cells]
    report.put(path, "profiles", "\n\n".join([f"{report.said(profiles.machine)}.", *parts]))
