"""The site builds without a warning, leaves out no public name, and its tutorial runs."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import hookjac
from hookjac import distributed, optim, plot, testing

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "cache"), str(DOCS)]
    done = subprocess.run([*command, str(tmp_path / "site")], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "reference.html").read_text()
    assert "the n-th summand of the loss" in page, "docstrings are on the page"


def own(module: ModuleType) -> list[str]:
    """Public names that a module defines itself."""
    return [name for name, found in vars(module).items()
            if getattr(found, "__module__", "") == module.__name__ and not name.startswith("_")]  # fmt: skip


@pytest.mark.parametrize(("prefix", "names"), [
    ("hookjac", hookjac.__all__), ("hookjac.optim", optim.__all__),
    ("hookjac.distributed", own(distributed)),
    ("hookjac.plot", [name for name in own(plot) if name not in ("flat", "signed_map")]),
    ("hookjac.testing", own(testing)),
])  # fmt: skip
def test_the_reference_leaves_nothing_out(prefix: str, names: list[str]) -> None:
    page = (DOCS / "reference.md").read_text()
    told = re.findall(rf"^\.\. auto(?:class|function):: {re.escape(prefix)}\.(\w+)$", page, re.M)
    assert sorted(told) == sorted(names)


def test_every_page_is_in_the_index() -> None:
    listed = re.findall(r"^([\w/]+)$", (DOCS / "index.md").read_text(), re.M)
    assert sorted(listed) == sorted(p.stem for p in DOCS.glob("*.md") if p.name != "index.md")


def test_the_tutorial_runs() -> None:
    torch.set_default_dtype(torch.float32)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(
            "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / "tutorial.md").read_text(), re.S)),
            {"__name__": "page"},
        )
    text = said.getvalue()
    assert "torch.Size([16, 16]) torch.Size([200, 16, 16]) torch.Size([200, 2, 16, 16]) torch.Size([16, 16])" in text
    assert "the loss mixes samples" in text
    assert "WRONG" not in text
    assert text.count(" ok ") == 3 * 7


def test_the_page_for_those_who_come_from_elsewhere_runs() -> None:
    torch.set_default_dtype(torch.float32)
    said, names = io.StringIO(), {"__name__": "page"}
    page = re.sub(r"^## Opacus\n.*?(?=^## )", "", (DOCS / "coming.md").read_text(), flags=re.S | re.M)
    with contextlib.redirect_stdout(said):
        for snippet in re.findall(r"```python\n(.*?)```", page, re.S):
            exec(snippet, names)
    assert said.getvalue() == "torch.Size([10, 3, 10, 3])\n"


def test_its_part_on_opacus_runs() -> None:
    pytest.importorskip("opacus", reason="Opacus is not installed")
    page = (DOCS / "coming.md").read_text()
    (part,) = re.findall(r"^## Opacus\n.*?(?=^## )", page, re.S | re.M)
    first, *_ = re.findall(r"```python\n(.*?)```", page, re.S)
    run_with_warnings_off([first, *re.findall(r"```python\n(.*?)```", part, re.S)])


def test_the_page_for_those_who_come_from_backpack_runs() -> None:
    pytest.importorskip("backpack", reason="BackPACK is not installed")
    run_with_warnings_off(re.findall(r"```python\n(.*?)```", (DOCS / "backpack.md").read_text(), re.S))


def run_with_warnings_off(snippets: list[str]) -> None:
    """Of pages that call another library, whose hooks warn."""
    assert len(snippets) == 3
    torch.set_default_dtype(torch.float32)
    names: dict[str, object] = {"__name__": "page"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for snippet in snippets:
            exec(snippet, names)


@pytest.mark.parametrize("page", ["per_sample", "jacobians", "hessian_diagonal"])
def test_pages_on_how_to_run(page: str) -> None:
    torch.set_default_dtype(torch.float32)
    names: dict[str, object] = {"__name__": "page"}
    with contextlib.redirect_stdout(io.StringIO()):
        for snippet in re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.S):
            exec(snippet, names)


def test_optimizers_have_docstrings() -> None:
    for module, names in ((optim, optim.__all__), (plot, own(plot))):
        for name in names:
            found = getattr(module, name)
            assert inspect.getdoc(found), name
            for key, member in vars(found).items() if inspect.isclass(found) else ():
                told = key in ("wanted", "update", "options", "demand_options")  # in `Curved`
                if inspect.isfunction(member) and not key.startswith("_") and not told:
                    assert member.__doc__, f"{name}.{key} has no docstring"
