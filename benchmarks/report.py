"""What the timings say: table, results file, picture, and the table in the docs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

# the most that a cell may take, in times of the best peer, or (where none runs) of a plain step
TARGETS: dict[str, dict[str, float]] = {
    "grad_sample": {"small": 0.5, "mlp": 0.5, "tanh": 0.5, "deep": 0.5, "cnn": 0.7, "*": 0.85},
    "grad_sample_norm": {"*": 0.6},
    "grad_var": {"*": 0.6},
    "jac": {"small": 0.7, "mlp": 0.3, "tanh": 0.3, "deep": 0.3, "cnn": 0.5, "*": 0.7},
    "ntk": {"small": 0.05, "mlp": 0.05, "tanh": 0.05, "deep": 0.05, "cnn": 0.15, "*": 1.0},
    # torch.func has no such quantity for a ResNet or a transformer; built by hand, it is at least not to be faster
    "ggn_diag": {"resnet": 1.0, "transformer": 1.0, "*": 0.6},
    "ggn_diag_mc": {"*": 0.7},
    "kfac": {"*": 0.6},
    "kfac exact": {"*": 0.5},
    "hess_diag": {"tanh": 0.1, "deep": 0.1, "*": 0.7},
}
ABSOLUTE = {("resnet", "ggn_diag"): 9.0, ("transformer", "ggn_diag"): 9.0, ("resnet", "kfac"): 4.0,
            ("transformer", "kfac"): 4.0, ("small", "grad_sample_norm"): 1.6}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Seconds (medians of turns) and bytes."""

    workload: str
    quantity: str
    ours: float
    plain: float
    peers: dict[str, float]
    peak: dict[str, int]
    floor: float
    rounds: int

    @property
    def best(self) -> tuple[str, float] | None:
        return min(self.peers.items(), key=lambda item: item[1], default=None)

    @property
    def ratio(self) -> float | None:
        """To the best peer."""
        return None if self.best is None else self.ours / self.best[1]

    @property
    def target(self) -> float | None:
        if self.best is None:
            return None
        goals = TARGETS[self.quantity]
        return goals.get(self.workload, goals["*"])

    @property
    def met(self) -> bool | None:
        """None where nothing was promised."""
        goals = [(self.ratio, self.target), (self.ours / self.plain, ABSOLUTE.get((self.workload, self.quantity)))]
        asked = [found <= goal for found, goal in goals if found is not None and goal is not None]
        return all(asked) if asked else None


@dataclass(frozen=True)
class Results:
    machine: dict[str, str]
    cells: list[Cell]


def read(raw: Path, machine: dict[str, str]) -> Results:
    """pytest-benchmark's file."""
    cells = []
    for row in json.loads(raw.read_text())["benchmarks"]:
        info = row["extra_info"]
        if "quantity" not in info:
            continue
        peers = dict(info["peers"])
        plain = peers.pop("plain")
        cells.append(Cell(info["workload"], info["quantity"], row["stats"]["median"], plain, peers, info["peak"],
                          info["floor"], row["stats"]["rounds"]))  # fmt: skip
    return Results(machine, cells)


def load(path: Path) -> Results:
    found = json.loads(path.read_text())
    return Results(found["machine"], [Cell(**cell) for cell in found["cells"]])


def save(results: Results, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(results), indent=1) + "\n")


HEAD = ["workload", "quantity", "plain, ms", "ours, ms", "to plain", "best peer", "to best peer", "wanted", "peak, MB",
        "its peak", "to floor"]  # fmt: skip


def rows(results: Results) -> list[list[str]]:
    found = []
    for c in results.cells:
        best = c.best
        goal = ABSOLUTE.get((c.workload, c.quantity))
        wanted = [f"{c.target:g}"] if c.target is not None else []
        wanted += [f"{goal:g} plain"] if goal is not None else []
        found.append([
            c.workload, c.quantity, f"{1e3 * c.plain:.2f}", f"{1e3 * c.ours:.2f}", f"{c.ours / c.plain:.1f}",
            best[0] if best else "", f"{c.ratio:.3f}" if c.ratio is not None else "",
            ", ".join(wanted) + (" (missed)" if c.met is False else ""), f"{c.peak['hookjac'] / 1e6:.1f}",
            f"{c.peak[best[0]] / 1e6:.1f}" if best else "", f"{c.ours / c.floor:.1f}",
        ])  # fmt: skip
    return found


def print_table(results: Results) -> None:
    table = Table(*HEAD, title=said(results.machine))
    for row, cell in zip(rows(results), results.cells, strict=True):
        table.add_row(*row, style="red" if cell.met is False else "")
    Console(width=150).print(table)
    missed = [c for c in results.cells if c.met is False]
    Console().print(f"{len(results.cells)} cells, {len(missed)} short of what is wanted")


def draw(results: Results, path: Path) -> None:
    import matplotlib.pyplot as plt
    import numpy as np

    workloads = list(dict.fromkeys(c.workload for c in results.cells))
    quantities = list(dict.fromkeys(c.quantity for c in results.cells))
    grid = np.full((len(quantities), len(workloads)), np.nan)
    for c in results.cells:
        if c.ratio is not None:
            grid[quantities.index(c.quantity), workloads.index(c.workload)] = c.ratio
    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    image = axes.imshow(np.log10(grid), cmap="RdYlGn_r", vmin=-2, vmax=0.5, aspect="auto")
    for c in results.cells:
        place = workloads.index(c.workload), quantities.index(c.quantity)
        said = f"{c.ratio:.2g}\n{c.best[0]}" if c.ratio is not None and c.best else f"{c.ours / c.plain:.1f} x plain"
        axes.text(*place, said, ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_yticks(range(len(quantities)), quantities)
    bar = figure.colorbar(image, ticks=[-2, -1, 0])
    bar.ax.set_yticklabels(["0.01", "0.1", "1"])
    bar.set_label("our time over the best peer's")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_page(results: Results, path: Path) -> None:
    """The table between the marks of the page."""
    put(path, "table", f"{said(results.machine)}.\n\n{markdown(HEAD, rows(results))}")


def said(machine: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def put(path: Path, mark: str, block: str) -> None:
    """Write a block between the two marks of that name, in place of what is there."""
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path.name} has no {begin} ... {end}")
    path.write_text(f"{before}{begin}\n{block}\n{end}{after}")
