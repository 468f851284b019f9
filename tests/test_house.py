"""The house rules: imports run downward, linters are quiet, pins agree, and everything in the README runs."""

from __future__ import annotations

import ast
import configparser
import contextlib
import inspect
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from setuptools import find_packages

import hookjac
from hookjac import rule

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hookjac"

# each may import only from those before it; the files of a folder share a place
ORDER = [
    "errors", "tables", "called", "given", "switches", "talkers", "sharded", "memory", "gemm", "ways", "samples",
    "members", "mended", "graph", "checkpoints", "progress", "products", "factor", "deliver", "rule", "places",
    "layers", "tape", "apart", "watch", "described", "route", "structure", "uses", "streamed", "kinks", "layouts",
    "loss", "plan", "gathering", "handover", "operator", "kronecker", "structured", "jacobian", "quantity", "sums",
    "ranks", "distributed", "limits", "head", "curvature", "roads", "seeds", "engine", "survey", "explanation",
    "passage", "reading", "passing", "service", "extend", "explain", "files", "saving", "accumulate", "testing",
    "check", "plot", "", "clients", "optim", "demo", "__main__",
]  # fmt: skip
FOLDERS = ["factor", "layers", "quantity", "clients", "optim"]


def run(*command: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **more)  # type: ignore[call-overload, no-any-return]


def is_module(name: str) -> bool:
    place = ROOT / name.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").exists()


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, as names in ORDER; `from hookjac import x` counts as x if x is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [inner if is_module(inner := f"{module}.{a.name}") else module for a in node.names]
        else:
            continue
        found |= {[*n.split("."), ""][1] for n in names if n.split(".")[0] == "hookjac"}
    return found


def test_imports_run_downward() -> None:
    files = {(p.parent.name if p.parent != PACKAGE else p.stem).replace("__init__", "") for p in PACKAGE.rglob("*.py")}
    assert files == set(ORDER), "a module has no place in the order"
    for path in PACKAGE.rglob("*.py"):
        place = path.parent.name if path.parent != PACKAGE else path.stem.replace("__init__", "")
        here = ORDER.index(place)
        for name in imported(path):
            above = ORDER.index(name)
            together = name == place and name in FOLDERS
            assert above < here or together, f"{path.name} imports {name or 'hookjac'}"


def test_no_quantity_knows_a_layer() -> None:
    """And neither do the engine and what lies between: rules answer for layers."""
    layers = {name for name, kind in vars(torch.nn).items() if inspect.isclass(kind)} - {"Parameter", "Module"}
    files = [*(PACKAGE / "quantity").glob("*.py"), *(PACKAGE / "factor").glob("*.py")]
    files += [PACKAGE / f"{name}.py" for name in ("engine", "seeds", "curvature", "roads", "kronecker", "structured")]
    for path in files:
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        assert "layers" not in imported(path), f"{path.name} imports rules of layers"
        assert not names & layers, f"{path.name} names {names & layers}"


def test_the_optimizers_are_written_on_the_public_face() -> None:
    """They are the examples of how to write one. How they refuse an argument is no part of that."""
    public = {*hookjac.__all__, "distributed"}
    for path in (PACKAGE / "optim").glob("*.py"):
        if path.name != "__init__.py":
            assert imported(path) <= {"", "optim", "given"}, path.name
        tree = ast.walk(ast.parse(path.read_text()))
        used = {n.attr for n in tree if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "hookjac"}
        assert used <= public, f"{path.name} uses {used - public}"


def test_the_library_needs_torch_and_einops_only() -> None:
    late = {"demo.py", "__main__.py"}
    allowed = {"torch", "einops", "hookjac", *sys.stdlib_module_names}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            bridge = (
                path.parent.name == "clients" and path.name != "__init__.py"
            )  # imported by those who have the other end
            if isinstance(node, (ast.Import, ast.ImportFrom)) and path.name not in late and not bridge:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert {n.split(".")[0] for n in names} <= allowed, f"{path.name} imports {names} at the top"


@pytest.mark.parametrize("command", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)])
def test_linters_are_quiet(command: tuple[str, ...]) -> None:
    done = run(sys.executable, "-m", *command)
    assert done.returncode == 0, done.stdout + done.stderr


def setup_cfg() -> configparser.ConfigParser:
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def test_lowest_torch_is_stated_once_and_is_what_runs_here() -> None:
    (needed,) = re.findall(r"^torch>=(.*)$", setup_cfg()["options"]["install_requires"], re.M)
    (pinned,) = re.findall(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned.startswith(needed), "the constraints install the lowest version, so that the tests run on it"
    assert f"torch {needed}" in (ROOT / "README.md").read_text()
    assert [int(k) for k in torch.__version__.split("+")[0].split(".")[:2]] >= [int(k) for k in needed.split(".")]


def test_only_the_library_is_installed() -> None:
    include = setup_cfg()["options.packages.find"]["include"].split()
    assert sorted(find_packages(str(ROOT), include=include)) == [
        "hookjac",
        "hookjac.clients",
        "hookjac.factor",
        "hookjac.layers",
        "hookjac.optim",
        "hookjac.quantity",
    ]


def test_public_names_are_documented() -> None:
    for name in hookjac.__all__:
        found = getattr(hookjac, name)
        assert inspect.getdoc(found), f"hookjac.{name} has no docstring"
        for key, member in vars(found).items() if inspect.isclass(found) else ():
            if inspect.isfunction(member) and not member.__name__.startswith(("_", "<")):
                assert member.__doc__, f"hookjac.{name}.{key} has no docstring"


def test_parts_are_there_without_an_import_of_their_own() -> None:
    parts = "hookjac.optim.KFAC, hookjac.plot.kernel, hookjac.testing.loops, hookjac.distributed.eigh"
    done = run(sys.executable, "-c", f"import hookjac; {parts}; assert not hasattr(hookjac, 'utils')")
    assert done.returncode == 0, done.stderr


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_readme_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for snippet in blocks("python"):
            exec(snippet, names)
    lines = said.getvalue().splitlines()
    assert lines[0] == (
        "0.weight torch.Size([16, 8]) torch.Size([32, 16, 8]) torch.Size([32, 3, 16, 8]) torch.Size([16, 8])"
    )
    assert float(lines[-1].strip("tensor()")) > 0.3, "the row sums should be far from the diagonal"
    assert {f.name for f in tmp_path.iterdir()} == {"curvature.safetensors", "result.safetensors"}


def test_own_quantity_page_runs() -> None:
    torch.set_default_dtype(torch.float32)
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_quantity.md").read_text(), re.S)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(snippet, {"__name__": "page"})
    assert said.getvalue() == "torch.Size([32])\n"


def test_approximations_page_says_what_its_program_prints() -> None:
    page = (ROOT / "docs" / "approximations.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.S)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(snippet, {"__name__": "page"})
    rows = re.findall(r"^\| (.+) \| (-?[\d.]+) \| (-?[\d.]+) \|$", said.getvalue(), re.M)
    stated = re.findall(r"^\| (.+) \| (-?[\d.]+) \| (-?[\d.]+) \|$", page, re.M)
    assert [name for name, *_ in rows] == [name for name, *_ in stated]
    for (name, *found), (_, *told) in zip(rows, stated, strict=True):
        assert [float(t) for t in told] == pytest.approx([float(t) for t in found], abs=0.02, rel=0.02), name


def test_own_rule_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "_RULES", dict(rule._RULES))
    monkeypatch.setattr(rule, "_NODES", dict(rule._NODES))
    said, names = io.StringIO(), {"__name__": "page"}
    with contextlib.redirect_stdout(said):
        for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_rule.md").read_text(), re.S):
            exec(snippet, names)
    for parameter in ("2.gain", "module.gain", "module.w", "input_scale.0"):
        assert parameter in said.getvalue()
    assert "WRONG" not in said.getvalue()


def test_readme_commands() -> None:
    demo, tests, clients = blocks("sh")
    assert demo.rstrip().endswith("python -m hookjac")
    assert tests.rstrip().endswith("python -m pytest -q -n 2")
    assert clients.rstrip().endswith("python -m pytest -q -n 2 tests/clients")
    for command, extra in ((demo, "demo"), (tests, "test"), (clients, "test,clients")):
        assert command.startswith("python3 -m venv ")
        assert f"-c constraints.txt -e '.[{extra}]'" in command
    ci = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in ci
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_quantities_of_the_readme_are_those_of_the_library() -> None:
    from hookjac.quantity import names

    table = re.findall(r"^\| `(\w+)` \| `(\w+)\(", (ROOT / "README.md").read_text(), re.M)
    assert [name for name, _ in table] == names()
    for name, record in table:
        assert getattr(hookjac, record)().name == name


# The main job -----------------------------------------------------------------------------------------------


def test_demo_runs_and_draws(tmp_path: Path) -> None:
    out = tmp_path / "digits.png"
    done = run(sys.executable, "-m", "hookjac", "--epochs", "2", "--batch", "32", "--out", str(out))
    assert done.returncode == 0, done.stderr
    for name in ("0.weight", "2.bias", "4.weight", "rule (linear)", "by columns", "picture"):
        assert name in done.stdout
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size > 50_000


def test_demo_on_other_nets(tmp_path: Path) -> None:
    out = tmp_path / "digits.svg"
    options = ["--epochs", "1", "--hidden", "12", "--activation", "relu", "--batch", "8", "--seed", "3"]
    done = run(sys.executable, "-m", "hookjac", *options, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "<svg" in out.read_text()[:500]


def test_demo_help_and_errors(tmp_path: Path) -> None:
    from hookjac.__main__ import main

    shown = run(sys.executable, "-m", "hookjac", "--help")
    assert shown.returncode == 0
    for option in ("--epochs", "--hidden", "--activation", "--batch", "--entries", "--seed", "--out"):
        assert option in shown.stdout
    for bad, said in (
        (["--hidden", "32,x"], "expected widths from 1 to 256 separated by commas"),
        (["--hidden", "300"], "expected widths from 1 to 256 separated by commas"),
        (["--seed", "99999999999999999999"], "is not in the range"),
        (["--hidden", "0"], "expected widths from 1 to 256 separated by commas"),
        (["--out", str(tmp_path / "nowhere" / "x.png")], "does not exist"),
        (["--out", str(tmp_path / "x.txt")], "expected a .png"),
        (["--activation", "cosine"], "'cosine' is not one of"),
        (["--epochs", "0"], "0 is not in the range"),
    ):
        done = CliRunner().invoke(main, bad)
        assert done.exit_code == 2
        assert said in " ".join(done.output.split())


def test_demo_without_its_extra() -> None:
    done = run(
        sys.executable, "-c", "import sys; sys.modules['rich'] = None; import runpy; runpy.run_module('hookjac')"
    )
    assert done.returncode == 1
    assert "pip install 'hookjac[demo]'" in done.stderr
