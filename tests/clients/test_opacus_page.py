"""docs/opacus.md: its programs run, and its table is that of the tests."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path

import torch
from opacus_models import THERE

from benchmarks import ghost

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "opacus.md").read_text()


def test_programs_run() -> None:
    torch.set_default_dtype(torch.float32)
    said, names = io.StringIO(), {"__name__": "page"}
    with contextlib.redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for snippet in re.findall(r"```python\n(.*?)```", PAGE, re.S):
            exec(snippet, names)
    first, second = (float(e) for e in re.findall(r"epsilon = ([\d.]+)", said.getvalue()))
    assert 0 < first < second, "the second epoch spends, too: the accountant is the same"


def test_the_table_is_that_of_the_tests() -> None:
    rows = re.findall(r"^\| ([^|]+) \| (error|refused|wrong|right)", PAGE, re.M)
    assert [name for name, _ in rows] == [*THERE, "tied weights"]
    for name, what in rows[:-1]:
        assert (what == "wrong") == (THERE[name] is None), name


def test_the_measurement_runs() -> None:
    torch.set_default_dtype(torch.float32)
    found = {way: ghost.measure(way, 16, 8) for way in ghost.WAYS}
    assert all(ms > 0 for ms, _ in found.values())
    for way in ghost.WAYS:
        mode = way.split()[1]
        assert re.search(rf"^\| (hookjac|Opacus) .{mode}. \| \d+ \| \d+ \|$", PAGE, re.M), way
