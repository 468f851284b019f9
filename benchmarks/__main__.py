"""`python -m benchmarks`: times every cell, prints the table, writes the results and draws them.

python -m benchmarks                    all, into benchmarks/results/<device>.json
python -m benchmarks -k "mlp and jac"   some, printed only
python -m benchmarks --show             the committed results again
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

from benchmarks import report

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "backpack-for-pytorch", "opacus", "transformers", "hookjac")


def machine() -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((li.split(":")[1].strip() for li in info.read_text().splitlines() if "model name" in li), cpu)
    found = {"cpu": f"{cpu}, {torch.get_num_threads()} threads", "python": platform.python_version()}
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
@click.option("--show", is_flag=True, help="Print the committed results and draw them again; nothing is timed.")
def main(selection: str | None, show: bool) -> None:
    path = HERE / "results" / ("cuda.json" if torch.cuda.is_available() else "cpu.json")
    results = report.load(path) if show else timed(selection)
    report.print_table(results)
    if selection is None:
        report.save(results, path)
        report.draw(results, HERE.parent / "docs" / "pictures" / f"speed-{path.stem}.png")
        report.write_page(results, HERE.parent / "docs" / "performance.md")


if __name__ == "__main__":
    main()
