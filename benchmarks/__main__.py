"""`python -m benchmarks`: times every cell, prints the table, writes the results and draws them.

python -m benchmarks                    all, into benchmarks/results/<device>.json
python -m benchmarks -k "mlp and jac"   some, printed only
python -m benchmarks --show             the committed results again
python -m benchmarks --growth           how time and memory grow (benchmarks.growth)
python -m benchmarks --profile          what the dearest cells spend their time on (benchmarks.profiles)
python -m benchmarks --training         the optimizers on real data (benchmarks.training)
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
import torch

from benchmarks import growth, profiles, report, training

HERE = Path(__file__).resolve().parent
RESULTS, PICTURES, PAGE = HERE / "results", HERE.parent / "docs" / "pictures", HERE.parent / "docs" / "performance.md"
OPTIMIZERS = HERE.parent / "docs" / "optimizers.md"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGES = ("torch", "backpack-for-pytorch", "opacus", "transformers", "hookjac")


def machine() -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((li.split(":")[1].strip() for li in info.read_text().splitlines() if "model name" in li), cpu)
    threads = torch.get_num_threads()
    found = {"cpu": f"{cpu}, {threads} thread{'s' if threads > 1 else ''}", "python": platform.python_version()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def timed(selection: str | None) -> report.Results:
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        only = ["-k", selection] if selection else []
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:xdist", str(HERE / "test_speed.py"),
                   "--benchmark-enable", "--benchmark-disable-gc", "--benchmark-quiet",
                   f"--benchmark-json={raw}", *only]  # fmt: skip
        code = subprocess.run(command, cwd=HERE.parent, check=False).returncode
        if code or not raw.exists():
            raise click.ClickException("a cell failed: its contenders disagree, or it was interrupted")
        return report.read(raw, machine())


@click.command(help=__doc__)
@click.option("-k", "selection", help="Which cells, as pytest's -k has it; these are printed, not written.")
@click.option("--growth", "grows", is_flag=True, help="Exponents of time and memory, instead of the table.")
@click.option("--profile", "profiled", is_flag=True, help="Shares of the dearest cells' time, instead of the table.")
@click.option("--training", "trains", is_flag=True, help="Optimizers on real data, instead of the table.")
@click.option("--show", is_flag=True, help="Print the committed results and draw them again; nothing is timed.")
def main(selection: str | None, grows: bool, profiled: bool, trains: bool, show: bool) -> None:
    if (selection is not None) + grows + profiled + trains > 1:
        raise click.UsageError("-k, --growth, --profile and --training exclude each other: only the table has cells")
    if grows:
        return growing(show)
    if profiled:
        return profiling(show)
    if trains:
        return training_all(show)
    if selection is not None and show:
        raise click.UsageError("--show prints all cells; -k is for timing some")
    path = RESULTS / f"{DEVICE}.json"
    results = report.load(path) if show else timed(selection)
    report.print_table(results)
    if selection is None:
        report.save(results, path)
        report.draw(results, PICTURES / f"speed-{DEVICE}.png")
        report.write_page(results, PAGE)


def growing(show: bool) -> None:
    torch.set_num_threads(1)  # it is the work that grows; threads that wait for each other tell of who else is running
    path = RESULTS / f"growth-{DEVICE}.json"
    found = growth.load(path) if show else growth.Growth(machine(), growth.all_curves())
    growth.print_table(found)
    growth.save(found, path)
    growth.draw(found, PICTURES / "growth.png")
    growth.write_page(found, PAGE)


def profiling(show: bool) -> None:
    if DEVICE != "cpu":
        raise click.ClickException("--profile tells what the CPU does; here the work is the GPU's")
    path = RESULTS / "profiles-cpu.json"
    found = profiles.load(path) if show else profiles.all_profiles(report.load(RESULTS / "cpu.json"), machine())
    profiles.print_table(found)
    profiles.save(found, path)
    profiles.write_page(found, PAGE)


def training_all(show: bool) -> None:
    torch.set_num_threads(1)  # the nets are small
    path = RESULTS / f"training-{DEVICE}.json"
    found = training.load(path) if show else training.Training(machine(), training.all_of_it())
    training.print_table(found)
    training.save(found, path)
    training.draw(found, PICTURES / "training.png")
    training.write_page(found, OPTIMIZERS)


if __name__ == "__main__":
    main()
