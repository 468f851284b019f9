"""The site builds without a warning, leaves out no public name, and all code that it shows runs."""

from __future__ import annotations

import ast
import configparser
import contextlib
import importlib
import inspect
import io
import re
import shlex
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from markdown_it import MarkdownIt
from shown import PAGES, ROOT, examples, fenced
from torch import nn

import hookjac
from hookjac import distributed, optim, plot, testing

DOCS = ROOT / "docs"


def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "cache"), str(DOCS)]
    done = subprocess.run([*command, str(tmp_path / "site")], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "reference.html").read_text()
    assert "the n-th summand of the loss" in page, "docstrings are on the page"
    assert "~" not in re.sub(r"<[^>]*>", "", page), "a signature that could not be shortened"


def own(module: ModuleType) -> list[str]:
    """Public names that a module defines itself."""
    return [name for name, found in vars(module).items()
            if getattr(found, "__module__", "") == module.__name__ and not name.startswith("_")]  # fmt: skip


@pytest.mark.parametrize(("prefix", "names"), [
    ("hookjac", hookjac.__all__), ("hookjac.optim", optim.__all__),
    ("hookjac.distributed", own(distributed)),
    ("hookjac.plot", [name for name in own(plot) if name not in ("flat", "signed_map")]),
    ("hookjac.testing", own(testing)),
    ("hookjac.factor", ["Dense", "Lookup", "Outer"]),  # of which the page on rules of your own tells
    ("hookjac.layers.broadcast", ["operand", "stretched", "summed"]),
])  # fmt: skip
def test_the_reference_leaves_nothing_out(prefix: str, names: list[str]) -> None:
    page = (DOCS / "reference.md").read_text()
    told = re.findall(rf"^\.\. auto(?:class|function):: {re.escape(prefix)}\.(\w+)$", page, re.M)
    assert sorted(told) == sorted(names)


def test_what_pages_import_is_in_the_reference() -> None:
    told = set(re.findall(r"^\.\. auto(?:class|function):: ([\w.]+)$", PAGES["reference"].read_text(), re.M))
    for page, path in PAGES.items():
        for node in ast.walk(ast.parse("\n".join(fenced(path.read_text())))):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("hookjac."):
                used = {f"{node.module}.{a.name}" for a in node.names} - {"hookjac.optim", "hookjac.plot"}
                on_its_own_page = str(node.module).startswith("hookjac.clients.")
                assert used <= told or on_its_own_page, f"{page}: {used - told}"


def test_every_page_is_in_the_index() -> None:
    listed = re.findall(r"^([\w/]+)$", (DOCS / "index.md").read_text(), re.M)
    assert sorted(listed) == sorted(p.stem for p in DOCS.glob("*.md") if p.name != "index.md")


def test_the_tutorial_runs() -> None:
    torch.set_default_dtype(torch.float32)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec("\n".join(fenced(PAGES["tutorial"].read_text())), {"__name__": "page"})
    text = said.getvalue()
    assert "torch.Size([16, 16]) torch.Size([200, 16, 16]) torch.Size([200, 2, 16, 16]) torch.Size([16, 16])" in text
    assert "the loss mixes samples" in text
    assert "WRONG" not in text
    assert text.count(" ok ") == 3 * 7


def test_the_page_for_those_who_come_from_elsewhere_runs() -> None:
    torch.set_default_dtype(torch.float32)
    said, names = io.StringIO(), {"__name__": "page"}
    page = re.sub(r"^## Opacus\n.*?(?=^## )", "", PAGES["coming"].read_text(), flags=re.S | re.M)
    with contextlib.redirect_stdout(said):
        for snippet in fenced(page):
            exec(snippet, names)
    assert said.getvalue() == "torch.Size([10, 3, 10, 3])\n"


ELSEWHERE = {  # pages that other files run, with what they need for it
    "README": "test_house", "approximations": "test_house", "own_quantity": "test_house", "own_rule": "test_house",
    "distributed": "test_distributed", "influence": "test_examples", "pruning": "test_examples",
    "optimizers": "test_optim", "plots": "test_plot", "saving": "test_saving",
    "backpack": "clients/test_side_by_side", "coming": "clients/test_side_by_side",
    "handover": "clients/test_curvlinops", "laplace": "clients/test_laplace", "opacus": "clients/test_opacus_page",
    "trainers": "clients/test_trainers",
}  # fmt: skip
HERE = ["hessian_diagonal", "jacobians", "per_sample"]


@pytest.mark.parametrize("page", HERE)
def test_pages_on_how_to_run(page: str) -> None:
    torch.set_default_dtype(torch.float32)
    names: dict[str, object] = {"__name__": "page"}
    with contextlib.redirect_stdout(io.StringIO()):
        for snippet in fenced(PAGES[page].read_text()):
            exec(snippet, names)


def test_every_page_with_code_runs_somewhere() -> None:
    assert {p for p in PAGES if fenced(PAGES[p].read_text())} == {"tutorial", *HERE, *ELSEWHERE}
    for page, file in ELSEWHERE.items():
        text = (ROOT / "tests" / f"{file}.py").read_text()
        assert "exec(" in text
        assert PAGES[page].name in text or f'"{page}"' in text, page


def test_no_code_is_out_of_their_sight() -> None:
    """Neither indented, nor in a language that nothing runs."""
    for page, path in PAGES.items():
        for token in MarkdownIt("commonmark").parse(path.read_text()):
            assert token.type != "code_block", f"{page}: {token.content}"
            if token.type == "fence":
                told = token.info in ("python", "sh", "text") or token.info.startswith("{")
                assert told, f"{page}: {token.info}: {token.content}"
    assert [p for p in PAGES if fenced(PAGES[p].read_text(), "text")] == ["optimizers"], "what its program prints"


EXAMPLES = {place: code for place, code in examples().items() if not place.startswith("clients")}


@pytest.mark.parametrize("place", EXAMPLES)
def test_examples_in_docstrings_run(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(10, 4), torch.randint(3, (10,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5)
    optimizer = optim.KFAC(model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with hookjac.extend(model, "grad_sample", "kfac"):
        closure()
    hookjac.save(model, "results.safetensors")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(
            textwrap.dedent(EXAMPLES[place]), {"hookjac": hookjac, "F": F, "loss_function": F.cross_entropy} | locals()
        )


# Command lines ----------------------------------------------------------------------------------------------


def commands() -> list[str]:
    """In `sh` blocks, and quoted in sentences."""
    found = []
    for path in PAGES.values():
        text = path.read_text()
        found += [line for block in fenced(text, "sh") for line in re.split(r"\n|&&", block)]
        found += re.findall(r"`((?:[A-Z_]+=\w+ )?(?:python|pip|sphinx-build|torchrun) [^`]*)`", text)
    return sorted({" ".join(line.split()) for line in found} - {""})


@pytest.mark.parametrize("command", commands())
def test_commands_are_of_this_repository(command: str) -> None:
    """Modules, files, options and extras that a page names exist. What is fast and offline runs in other tests."""
    words = [w for w in shlex.split(command) if not w.startswith("HOOKJAC_")]
    match [Path(words[0]).name, *words[1:]]:
        case ["python" | "python3", "-m", "venv", _]:
            pass
        case ["python", "-m", "pytest", *rest]:
            known = subprocess.run([sys.executable, "-m", "pytest", "--help"], capture_output=True, text=True).stdout
            for word in rest:
                assert word in known if word.startswith("-") else word == "2" or (ROOT / word).exists(), word
        case ["python", "-m", "hookjac", "check", *rest]:
            from hookjac.__main__ import main as demo

            demo.commands["check"].make_context("check", rest)
        case ["python", "-m", "hookjac" | "benchmarks" as package, *rest]:
            importlib.import_module(f"{package}.__main__").main.make_context(package, rest)
        case ["python", "-m", "benchmarks.ghost"]:
            assert callable(importlib.import_module("benchmarks.ghost").main)
        case ["python", file]:
            assert (ROOT / file).exists()
        case ["pip", "install" | "uninstall", *rest]:
            there = configparser.ConfigParser()
            there.read(ROOT / "setup.cfg")
            extras = {e for word in rest for e in re.sub(r"^\.\[(.*)\]$|.*", r"\1", word).split(",") if e}
            assert extras <= set(there["options.extras_require"])
            assert all((ROOT / file).exists() for flag, file in pairwise(rest) if flag == "-c")
        case ["sphinx-build", "docs", "site"]:
            pass  # `test_the_site_builds`
        case ["torchrun", *_]:
            pass  # test_distributed.py
        case _:
            pytest.fail(f"nobody looks at {command!r}")


def test_switches_that_pages_name_are_those_of_the_tests() -> None:
    told = {s for path in PAGES.values() for s in re.findall(r"HOOKJAC_\w+", path.read_text())}
    used = {s for path in (ROOT / "tests").glob("*.py") for s in re.findall(r'environ.get\("(\w+)"', path.read_text())}
    assert told == used


# Docstrings -------------------------------------------------------------------------------------------------


def test_optimizers_have_docstrings() -> None:
    for module, names in ((optim, optim.__all__), (plot, own(plot))):
        for name in names:
            found = getattr(module, name)
            assert inspect.getdoc(found), name
            for key, member in vars(found).items() if inspect.isclass(found) else ():
                told = key in ("wanted", "update", "options", "demand_options")  # in `Curved`
                if inspect.isfunction(member) and not key.startswith("_") and not told:
                    assert member.__doc__, f"{name}.{key} has no docstring"
