"""What docs/performance.md and the README say of speed is what the committed measurements say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import growth, profiles, report, training

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
WRITERS: dict[str, Callable[[Path], None]] = {
    "table": lambda page: report.write_page(report.load(RESULTS / "cpu.json"), page),
    "growth": lambda page: growth.write_page(growth.load(RESULTS / "growth-cpu.json"), page),
    "profiles": lambda page: profiles.write_page(profiles.load(RESULTS / "profiles-cpu.json"), page),
}


@pytest.mark.parametrize("block", WRITERS)
def test_the_page_says_what_its_results_file_says(block: str, tmp_path: Path) -> None:
    """`python -m benchmarks --show` (and `--growth`, `--profile` with it) writes it again."""
    page = tmp_path / PAGE.name
    page.write_text(PAGE.read_text())
    report.put(page, block, "something else")
    assert page.read_text() != PAGE.read_text()
    WRITERS[block](page)
    assert page.read_text() == PAGE.read_text()


def test_the_page_of_optimizers_says_what_its_results_file_says(tmp_path: Path) -> None:
    """`python -m benchmarks --training --show` writes it again."""
    page, own = tmp_path / "page.md", (ROOT / "docs" / "optimizers.md").read_text()
    page.write_text(own)
    report.put(page, "training", "something else")
    assert page.read_text() != own
    training.write_page(training.load(RESULTS / "training-cpu.json"), page)
    assert page.read_text() == own


def test_a_page_without_its_marks_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- table -->\n")
    with pytest.raises(ValueError, match=r"page.md has no <!-- table --> ... <!-- end of table -->"):
        report.put(page, "table", "")


def test_the_profiles_are_of_the_dearest_cells_of_the_table() -> None:
    """Else run `python -m benchmarks --profile` again."""
    dearest = profiles.dearest(report.load(RESULTS / "cpu.json"))
    told = profiles.load(RESULTS / "profiles-cpu.json").cells
    assert [(c.workload, c.quantity, c.ours) for c in told] == [(c.workload, c.quantity, c.ours) for c in dearest]


def test_numbers_of_speed_in_the_readme_are_those_of_the_table() -> None:
    measured = {number for row in report.rows(report.load(RESULTS / "cpu.json")) for number in row}
    text = (ROOT / "README.md").read_text()
    told = re.findall(r"(\d+(?:\.\d+)?) (?:ms\b|plain steps|times (?:as (?:fast|long)|faster|slower))", text)
    assert set(told) <= measured, "the README tells of speed what benchmarks/results/cpu.json does not"


def test_pictures_are_there() -> None:
    for name in re.findall(r"!\[.*?\]\((.*?)\)", PAGE.read_text()):
        assert (PAGE.parent / name).read_bytes().startswith(b"\x89PNG"), name
