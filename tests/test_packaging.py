"""The sdist is whole, the wheel has the library only, and it runs where torch and einops are all there is."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

from hookjac.errors import HookjacError, needed_by

ROOT = Path(__file__).resolve().parents[1]
LEFT = (".git", ".venv*", "*cache*", "*.egg-info", "build", "dist", "_build", ".hypothesis", ".benchmarks", ".coverage",
        "hookjac-digits.png")  # fmt: skip
SENT = ("hookjac", "tests", "docs", "benchmarks", ".ci")  # with all that is in them

# What a place has that installed torch and einops only: the extras are here, but not to be had.
BARE = """
import importlib.abc, sys, warnings
sys.path[:] = [{target!r}, *sys.path]
class Bare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Bare())
warnings.filterwarnings("ignore", "Failed to initialize NumPy")
import hookjac
assert hookjac.__file__.startswith({target!r}), hookjac.__file__
"""
HIDDEN = {"accelerate", "click", "curvlinops", "laplace", "lightning", "linear_operator", "matplotlib", "numpy",
          "opacus", "pytorch_lightning", "rich", "safetensors", "scipy", "sklearn", "tqdm", "transformers"}  # fmt: skip


def python(program: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", "-c", program], cwd=cwd, capture_output=True, text=True, timeout=100)


def made(hook: str, source: Path, out: Path) -> Path:
    """As pip makes it of a project without pyproject.toml."""
    before = set(out.iterdir())
    done = python(f"from setuptools.build_meta import __legacy__; __legacy__.{hook}({str(out)!r})", source)
    assert done.returncode == 0, done.stderr
    (found,) = set(out.iterdir()) - before
    return found


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, place / "source", ignore=shutil.ignore_patterns(*LEFT))
    (place / "out").mkdir()
    return made("build_sdist", place / "source", place / "out")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the sdist, as an installer does it that finds no wheel."""
    place = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as file:
        file.extractall(place, filter="data")
    (source,) = place.iterdir()
    (place / "out").mkdir()
    return made("build_wheel", source, place / "out")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return target


def bare(program: str, installed: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return python(BARE.format(target=str(installed), hidden=HIDDEN) + program, cwd)


def about(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as file:
        (name,) = [n for n in file.namelist() if n.endswith(".dist-info/METADATA")]
        return message_from_string(file.read(name).decode())


def test_the_sdist_has_what_its_tests_need(sdist: Path) -> None:
    with tarfile.open(sdist) as file:
        found = {name.partition("/")[2] for name in file.getnames()}
    ours = [p for top in SENT for p in (ROOT / top).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    wanted = {p.relative_to(ROOT).as_posix() for p in ours if "_build" not in p.parts}
    wanted |= {"README.md", "LICENSE", "CHANGELOG.md", "setup.cfg", "setup.py", "constraints.txt", ".ruff.toml"}
    assert not wanted - found


def test_the_wheel_has_the_library_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    library = {n for n in names if n.startswith("hookjac/")}
    assert library == {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "hookjac").rglob("*")
        if p.suffix == ".py" or p.name == "py.typed"
    }
    others = {n.partition("/")[2] for n in names if n not in library}
    assert others == {"licenses/LICENSE", "METADATA", "WHEEL", "top_level.txt", "RECORD"}
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    found = about(wheel)
    hard = [line for line in found.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(re.split(r"[<>=]", line)[0] for line in hard) == ["einops", "torch"]
    assert found["Requires-Python"] == ">=3.10"
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload().strip() == (ROOT / "README.md").read_text().strip()


def test_every_extra_that_a_message_names_exists(wheel: Path) -> None:
    there = set(about(wheel).get_all("Provides-Extra", []))
    for path in (*(ROOT / "hookjac").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"):
        text = path.read_text()
        assert set(re.findall(r"hookjac\[(\w+)\]", text)) <= there, path.name
        assert set(re.findall(r"\bextra `(\w+)`", text)) <= there, path.name


def test_the_first_example_runs_with_torch_and_einops_only(installed: Path, tmp_path: Path) -> None:
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0]
    done = bare(example, installed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "2.bias torch.Size([3]) torch.Size([32, 3])" in done.stdout


MISSING = """
import torch
from torch import nn
from torch.nn import functional as F
model = nn.Linear(3, 2)
x, y = torch.randn(4, 3), torch.randint(2, (4,))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
with hookjac.extend(model, "grad_sample", "grad_sample_norm", "ggn_mp") as ext:
    F.cross_entropy(model(x), y).backward()
    for call in (
        lambda: ext.ggn.to_scipy(),
        lambda: ext.ggn.as_linear_operator(),
        lambda: ext.ggn.to_curvlinops(),
        lambda: hookjac.save(model, "r.safetensors", "grad_sample"),
        lambda: hookjac.load("r.safetensors"),
        lambda: hookjac.accumulate(model, F.cross_entropy, loader, "ggn_diag", checkpoint="c.safetensors"),
        lambda: __import__("hookjac.plot").plot.gradient_norms(model),
        lambda: __import__("hookjac.clients.laplace"),
        lambda: __import__("hookjac.clients.laplace_kron"),
        lambda: __import__("hookjac.clients.opacus"),
    ):
        try:
            call()
        except hookjac.HookjacError as error:
            print(error)
"""


def test_what_is_not_installed_is_named(installed: Path, tmp_path: Path) -> None:
    done = bare(MISSING, installed, tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [re.search(r"pip install '(.*)'$", line)[1] for line in said] == [  # type: ignore[index]
        "scipy", "linear_operator", "curvlinops-for-pytorch<4", "hookjac[stream]", "hookjac[stream]", "hookjac[stream]",
        "hookjac[plot]", "laplace-torch>=0.3,<0.4", "laplace-torch>=0.3,<0.4", "opacus>=1.5",
    ]  # fmt: skip
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize("arguments", [[], ["check", "a:b"]])
def test_the_program_says_what_it_needs(installed: Path, tmp_path: Path, arguments: list[str]) -> None:
    run = f"sys.argv[1:] = {arguments!r}\nimport runpy\nrunpy.run_module('hookjac', run_name='__main__')"
    done = bare(run, installed, tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith("pip install 'hookjac[demo]'")


def test_what_clients_need_is_in_their_extra(wheel: Path) -> None:
    """A message of theirs and the extra agree on versions."""
    extra = {re.split(r"[<>=;]", line)[0].strip(): line.partition(";")[0].strip()
             for line in about(wheel).get_all("Requires-Dist", []) if 'extra == "clients"' in line}  # fmt: skip
    for path in (*(ROOT / "hookjac" / "clients").glob("*.py"), ROOT / "hookjac" / "handover.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = re.fullmatch(r"(laplace-torch|opacus|curvlinops-for-pytorch)([<>=].*)", node.value)
                if found:
                    assert sorted(found[2].split(",")) == sorted(extra[found[1]].removeprefix(found[1]).split(","))


def test_an_import_that_fails_is_both_errors() -> None:
    for kind in (HookjacError, ImportError):
        with pytest.raises(kind, match="this needs more than torch and einops"), needed_by("this", "that"):
            import nowhere_to_be_found  # noqa: F401


@pytest.fixture(scope="module")
def empty(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment in which pip put the wheel and what it asks for."""
    place = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True, timeout=100)
    found = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pip = [str(found), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    return found


needs_network = pytest.mark.skipif(not os.environ.get("HOOKJAC_TEST_EMPTY"), reason="HOOKJAC_TEST_EMPTY is not set")


def alone(python: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(python), "-I", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)


@needs_network
@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_the_first_pages_run_in_an_empty_environment(empty: Path, tmp_path: Path, page: str) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    program = snippets[0] if page == "README.md" else "\n".join(snippets)
    where = f"\nassert hookjac.__file__.startswith({str(empty.parents[1])!r}), hookjac.__file__"
    done = alone(empty, tmp_path, "-c", program + where)
    assert done.returncode == 0, done.stderr
    said = {"README.md": "2.bias torch.Size([3]) torch.Size([32, 3])", "docs/tutorial.md": "the loss mixes samples"}
    assert said[page] in done.stdout


@needs_network
def test_an_empty_environment_stays_nearly_empty(empty: Path, tmp_path: Path) -> None:
    done = alone(empty, tmp_path, "-m", "pip", "list", "--format=freeze")
    there = {line.partition("==")[0].lower() for line in done.stdout.splitlines()}
    assert {"hookjac", "torch", "einops"} <= there
    assert not there & {name.replace("_", "-") for name in HIDDEN}


@needs_network
@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"]])
def test_the_program_in_an_empty_environment(empty: Path, tmp_path: Path, arguments: list[str]) -> None:
    """It needs click, and says so, after torch has said that it found no NumPy."""
    done = alone(empty, tmp_path, "-m", "hookjac", *arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("pip install 'hookjac[demo]'")
