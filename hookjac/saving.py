"""Results that outlive the process: from a model's parameters to a file, and back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hookjac import files, given
from hookjac.errors import HookjacError
from hookjac.quantity import names
from hookjac.sharded import like
from hookjac.structured import JacTensor

Parameters = Mapping[str, tuple[torch.Size, torch.dtype]]


class Results(Mapping[str, dict[str, Any]]):
    """Quantity -> name of a parameter -> its result: what `load` returns. `save(path)` writes it to a file.

    parameters: shape and type of every parameter that it is about.
    """

    def __init__(self, results: Mapping[str, dict[str, Any]], parameters: Parameters) -> None:
        self._results, self.parameters = dict(results), dict(parameters)

    def __getitem__(self, quantity: str) -> dict[str, Any]:
        return self._results[quantity]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._results)}; {len(self.parameters)} parameters)"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all results to a safetensors file (needs safetensors); what was there stays whole until it is done."""
        save(self, path)


class Accumulated(Results):
    """What `accumulate` returns: quantity -> name of a parameter -> its result. samples, batches: how many it is of.

    `save(path)` writes a safetensors file, which `hookjac.load(path)` reads.
    """

    def __init__(
        self, results: Mapping[str, dict[str, Any]], parameters: Parameters, samples: int, batches: int
    ) -> None:
        super().__init__(results, parameters)
        self.samples, self.batches = samples, batches

    def __repr__(self) -> str:
        return f"Accumulated({', '.join(self)}; {self.samples} samples in {self.batches} batches)"


def parameters_of(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of each parameter by its name."""
    return {name: (p.shape, p.dtype) for name, p in model.named_parameters()}


def save(results: nn.Module | Results, path: str | os.PathLike[str], *quantities: str, dense: bool = False) -> None:
    """Write what lies on a model's parameters to a safetensors file (needs safetensors): `hookjac.load` reads it.

        hookjac.save(model, "results.safetensors")
        hookjac.save(model, "results.safetensors", "kfac", "grad_sample")

    results: a model, or what `accumulate` or `load` returned. quantities: names of those wanted, one's own among them;
    none: all of hookjac's that are there. Tensors, Kronecker factors and `p.jac` can be saved; products (`ggn_mp`,
    `hess_mp`) hang on a graph, and cannot. dense: save `p.jac` as the [N, *out, *p] tensor, which other programs can
    read, instead of its factors, which are smaller and hold the inputs of layers.

    What was at `path` stays whole until the new file is. Graphs of `create_graph=True` are not saved.
    """
    if not isinstance(results, (nn.Module, Results)):
        raise TypeError(f"save expects a model, or what accumulate or load returned, got {type(results).__name__}")
    if not all(isinstance(q, str) for q in quantities):
        raise TypeError(f"save expects names of quantities after the path, such as 'kfac'; got {quantities!r:.80}")
    given.flag(dense=dense)
    place = given.path("path", path)
    files.demand_place(place)
    found = _lying_on(results, quantities) if isinstance(results, nn.Module) else results
    missing = [q for q in quantities if q not in found]
    if missing or not found:
        what = repr(missing[0]) if missing else "results"
        raise HookjacError(f"there are no {what} to save. Run a backward inside hookjac.extend(model, ...) before.")
    tensors: dict[str, Tensor] = {}
    notes: dict[str, dict[str, Any]] = {}
    for q in quantities or found:
        for name, value in found[q].items():
            value = value.to_dense() if dense and isinstance(value, JacTensor) else value
            notes.setdefault(q, {})[name] = files.pack(value, f"{q}/{name}", tensors)
    about: dict[str, Any] = {"results": notes}
    about["parameters"] = {
        name: [list(shape), str(dtype).removeprefix("torch.")] for name, (shape, dtype) in found.parameters.items()
    }
    if isinstance(found, Accumulated):
        about |= {"samples": found.samples, "batches": found.batches}
    files.write(place, tensors, about)


def _lying_on(model: nn.Module, quantities: tuple[str, ...]) -> Results:
    found: dict[str, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        for q in quantities or names():
            if q in vars(p):
                found.setdefault(q, {})[name] = vars(p)[q]
    about = parameters_of(model)
    held = {name: None for results in found.values() for name in results}
    return Results(found, {name: about[name] for name in held})


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> Results:
    """What `save`, `Accumulated.save` or `Results.save` wrote: quantity -> name of a parameter -> its result.

        found = hookjac.load("results.safetensors")
        hookjac.load("results.safetensors", model)  # p.kfac, ... as after the backward

    model: put the results on its parameters, on their devices. Each name in the file must be one of its parameters', of
    the same shape and type, or nothing is put there; other parameters lose what they had of these quantities. Reads
    tensors and numbers only: nothing in the file is run. A `p.jac` saved as factors is a `JacTensor` again.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"load expects a model after the path, got {type(model).__name__}")
    place = given.path("path", path)
    if place.is_dir():
        raise HookjacError(f"{place} is a folder; give the path of a file that save wrote")
    tensors, about = files.read(place, "results")
    params = {} if model is None else dict(model.named_parameters())
    found: dict[str, dict[str, Any]] = {}
    try:
        parameters = {name: (torch.Size(s), files.DTYPES[t]) for name, (s, t) in about["parameters"].items()}
        if model is not None:
            _demand_fits(parameters, model, path)
        for q, notes in about["results"].items():
            if not q.isidentifier() or hasattr(Tensor, q):
                raise ValueError(f"{q!r} cannot be a quantity: attributes of tensors are not for files to set")
            for name, note in notes.items():
                parameters[name]  # each has been held against the model's
                device = params[name].device if name in params else None
                found.setdefault(q, {})[name] = files.unpack(note, tensors, device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, HookjacError):
            raise
        raise HookjacError(f"{path} is damaged: its note does not fit its tensors ({error!r:.200}).") from error
    for q, results in found.items():
        for name, p in params.items():
            vars(p).pop(q, None)
            if name in results:
                setattr(p, q, like(results[name], p))
    if "samples" in about:
        return Accumulated(found, parameters, about["samples"], about["batches"])
    return Results(found, parameters)


def _demand_fits(parameters: Parameters, model: nn.Module, path: str | os.PathLike[str]) -> None:
    there = parameters_of(model)
    for name, (shape, dtype) in parameters.items():
        if name not in there:
            raise HookjacError(
                f"{path} has results of a parameter {name!r}, which the model does not have; it has {list(there)[:4]}. "
                "Wrapping (DistributedDataParallel, torch.compile) puts a prefix before names: take the inner one."
            )
        if there[name] != (shape, dtype):
            its = f"{list(there[name][0])} of {there[name][1]}"
            raise HookjacError(
                f"{path} has results of {name!r} {list(shape)} of {dtype}, but the model's is {its}. Load without the "
                "model to get them by name."
            )
