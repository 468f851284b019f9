"""Files of results: safetensors, written whole or not at all, and read without running anything that is in them.

A file holds tensors, and a note in JSON that says how they make up results. A structured result (Kronecker factors, a
Jacobian as its factors) is a record of ours: the note has its class by name, of a fixed list, and its fields.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hookjac.errors import HookjacError, needed_by
from hookjac.factor import Dense, Lookup, Outer, Sum, Unfolded
from hookjac.kronecker import Kronecker, KroneckerEigen, KroneckerSum
from hookjac.structured import JacTensor

_FORMAT = "hookjac 2"
_RECORDS: dict[str, Callable[..., Any]] = {
    kind.__name__: kind for kind in (Kronecker, KroneckerSum, KroneckerEigen, Dense, Outer, Lookup, Sum, Unfolded)
}
_KINDS = {"results": "a saved result", "sums": "a checkpoint of accumulate"}

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


def _stream() -> contextlib.AbstractContextManager[None]:
    return needed_by("a file of results", "hookjac[stream]")


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """A safetensors file that is there as a whole or not at all."""
    with _stream():
        from safetensors.torch import save_file

    apart = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(apart, part, metadata={"format": _FORMAT, "about": json.dumps(about)})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its tensors and its note. kind: "results" or "sums", what the file must hold."""
    with _stream():
        from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise HookjacError(
            f"{path} is no whole safetensors file ({error}). Was it written by something else?"
        ) from error
    found = str(meta.get("format"))
    if found.startswith("hookjac ") and found != _FORMAT:
        raise HookjacError(
            f"{path} has the format {found!r}, this version reads {_FORMAT!r}: read it with the version that wrote it."
        )
    about = json.loads(meta.get("about", "{}")) if found == _FORMAT else {}
    if kind not in about:
        other = next((what for what in _KINDS if what in about), None)
        if other is None:
            raise HookjacError(f"{path} was not written by hookjac, or holds no {kind}.")
        hint = "pass it as checkpoint=, or save() one" if other == "sums" else "give checkpoint= another path"
        raise HookjacError(f"{path} is {_KINDS[other]}, not {_KINDS[kind]}; {hint}.")
    return tensors, about


def demand_place(path: Path) -> None:
    """Can a file be written there? Better known before the work than after it."""
    with _stream():
        import numpy as numpy  # safetensors cannot write without it, but does not install it
        import safetensors as safetensors
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise HookjacError(f"{path} {what}; give the path of a file that can be written")


# Results as tensors and notes ------------------------------------------------------------------------------------


def pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """The note of a result, or of a part of one; its tensors are put into `tensors`, under names that begin so."""
    if isinstance(value, JacTensor):
        inner = {"factor": value.intact, "out": value.out, "dtype": str(value.dtype).removeprefix("torch.")}
        return {"is": "JacTensor", **{key: pack(part, f"{place}/{key}", tensors) for key, part in inner.items()}}
    if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided:
        if place in tensors:
            raise HookjacError(f"two results would have the name {place!r} in a file: rename a parameter")
        # what is the same along an axis is stored once
        once = tuple(slice(0, 1) if step == 0 else slice(None) for step in value.stride())
        tensors[place] = value[once]
        return {"tensor": place, "shape": list(value.shape)}
    if type(value).__name__ in _RECORDS:
        here = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        return {"is": type(value).__name__} | {key: pack(t, f"{place}/{key}", tensors) for key, t in here.items()}
    if isinstance(value, tuple):
        parts = [pack(part, f"{place}/{k}", tensors) for k, part in enumerate(value)]
        return {"size" if isinstance(value, torch.Size) else "tuple": parts}
    if value is None or type(value) in (bool, int, str):
        return value
    raise HookjacError(
        f"{place.replace('/', ' of ', 1)} is a {type(value).__name__}: {value!r:.80}. Only tensors, Kronecker factors "
        "and Jacobians can be saved."
    )


def unpack(note: Any, tensors: Mapping[str, Tensor], device: torch.device | None = None) -> Any:
    """What `pack` made a note of."""
    if not isinstance(note, dict):
        return note
    if "tensor" in note:
        return tensors[note["tensor"]].to(device).expand(note["shape"])
    for key, kind in (("size", torch.Size), ("tuple", tuple)):
        if key in note:
            return kind(unpack(part, tensors, device) for part in note[key])
    here = {key: unpack(part, tensors, device) for key, part in note.items() if key != "is"}
    if note["is"] == "JacTensor":
        return JacTensor(here["factor"], here["out"], DTYPES[here["dtype"]])
    return _RECORDS[note["is"]](**here)
