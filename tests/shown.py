"""Code that the pages show: in fences of markdown, and indented in docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README": ROOT / "README.md"} | {p.stem: p for p in sorted((ROOT / "docs").glob("*.md"))}
PACKAGE = ROOT / "hookjac"


def fenced(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def examples() -> dict[str, str]:
    """Place of a docstring -> the example in it, as docs/conf.py sees one: indented, after an empty line."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, told in _docstrings(ast.parse(path.read_text())):
            code = re.findall(r"\n\n((?: {4}.*(?:\n|\Z)|\n)+)", told)
            if code:
                found[f"{path.relative_to(PACKAGE).with_suffix('')}.{name}"] = "\n".join(code)
    return found


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name, ast.get_docstring(node) or ""
