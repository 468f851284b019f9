"""The site: `sphinx-build -W docs docs/_build` (extra `docs`)."""

import contextlib
import importlib.metadata
import inspect
import re

project, author = "hookjac", "hookjac maintainers"
release = version = importlib.metadata.version("hookjac")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_show_copyright = False
html_title = "hookjac"
html_static_path = ["static"]
html_css_files = ["site.css"]
exclude_patterns = ["_build", "examples/**/README.md"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository, which are no pages


def _as_rst(app, what, name, obj, options, lines):  # type: ignore[no-untyped-def]
    """Docstrings are written to be read as they are: `this` is code, "name: ..." an argument, "name()   ..." a row."""
    names, code, out = _arguments(obj), False, [""]
    for k, line in enumerate(lines):
        indented = line.startswith("    ")
        if indented and not code and k and not lines[k - 1].strip():
            code = True
            out += ["::", ""]
        code = code and (indented or not line.strip())
        if code:
            out.append(line)
            continue
        head, row = re.match(r"([\w, ]+): ", line), re.match(r"(\w[\w(), ]*?) {2,}", line)
        if row:
            out += ["", f"``{row[1]}``: {_escaped(line[row.end() :])}"]
        elif head and set(head[1].split(", ")) <= names:
            out += ["", f"**{_escaped(head[1])}**: {_escaped(line[head.end() :])}"]
        else:
            out.append(_escaped(line.strip()))
    lines[:] = out[1:]


def _readable(app, what, name, obj, options, signature, returns):  # type: ignore[no-untyped-def]
    """A default that is a function has no text that could be parsed, and then nothing of the signature is shortened."""
    kinds = ("dense.Dense", "outer.Outer", "lookup.Lookup", "mixed.Sum")
    union = " | ".join(f"~hookjac.factor.{kind}" for kind in kinds)
    shown = re.sub(r"<function [\w.]+(<lambda>)?>|<factory>", "...", signature or "")
    return (shown.replace(union, "~hookjac.factor.Factor"), returns) if signature else None


def _arguments(obj):  # type: ignore[no-untyped-def]
    with contextlib.suppress(TypeError, ValueError):
        return {*inspect.signature(obj).parameters, *getattr(obj, "__annotations__", {})}
    return set()


def _escaped(line: str) -> str:
    parts = re.split(r"(`[^`]+`)", line)
    return "".join(f"`{p}`" if k % 2 else re.sub(r"([*_|])", r"\\\1", p) for k, p in enumerate(parts))


def setup(app):  # type: ignore[no-untyped-def]
    app.connect("autodoc-process-docstring", _as_rst)
    app.connect("autodoc-process-signature", _readable)
