"""How results of parts make up that of the whole: of the batches of a data set, or of the ranks of a process group.

Each part's loss is a mean or a sum over its own samples. What is summed are statistics of the sum's scale, so that
parts of different size count as they must: never a mean of means.

n samples of a part · N of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from hookjac.errors import HookjacError
from hookjac.quantity.record import Adds, Quantity, Received

Reduction = Literal["mean", "sum"]

_HALF = (torch.float16, torch.bfloat16)  # added up in single precision


@dataclass(frozen=True)
class Measured:
    """What one parameter has of one part: how many samples that had, whether a penalty had a share, what is split."""

    samples: int
    penalised: bool
    value: Any


def measured(q: Quantity) -> Callable[[Received], Measured]:
    """Instead of a quantity's `reduce`: what adds up."""
    assert isinstance(q.adds, Adds)
    measure = q.adds.measure or q.reduce
    return lambda got: Measured(got.N, got.direct is not None, measure(got) if got.N else None)


def told(q: Quantity) -> str:
    """What must be the same of a quantity wherever its statistics are added up."""
    options = [f"{f.name}={getattr(q.wish, f.name)}" for f in fields(q.wish) if f.name != "generator"]
    return f"{q.name} {type(q.wish).__name__} {options} {q.adds.label if q.adds else ''}"


@dataclass
class Sums:
    """What has been added up so far: quantity -> parameter -> statistics, and a note of their form."""

    found: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)
    notes: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    samples: int = 0
    batches: int = 0
    last: str = ""  # what the last batch was

    def take(
        self, quantities: Iterable[Quantity], results: dict[str, dict[str, Measured]], reduction: Reduction
    ) -> None:
        """Add a part: parameter -> quantity -> what was measured."""
        n = 0
        for name, its in results.items():
            for q in quantities:
                one = its[q.name]
                n = one.samples
                if n:
                    self._add(q, name, one.value, n if reduction == "mean" else 1)
        self.samples += n
        self.batches += 1

    def _add(self, q: Quantity, name: str, value: Any, weight: int) -> None:
        """weight: by which a mean over the part becomes a sum."""
        assert q.adds is not None
        parts, note = q.adds.split(value)
        parts = [t.detach().float() if t.dtype in _HALF else t.detach() for t in parts]
        new = [t * float(weight) ** power for t, power in zip(parts, _powers(q.adds, parts), strict=True)]
        sums, notes = self.found.setdefault(q.name, {}), self.notes.setdefault(q.name, {})
        if name not in sums or notes[name].get("empty"):
            sums[name], notes[name] = new, note
        elif not note.get("empty"):
            if note != notes[name]:
                raise HookjacError(
                    f"{q.name} of parameter {name!r} has another form in batch {self.batches} ({note}) than before "
                    f"({notes[name]}), so that they do not add up."
                )
            sums[name] = [a + b for a, b in zip(sums[name], new, strict=True)]

    def result(self, q: Quantity, name: str, reduction: Reduction, dtype: torch.dtype) -> Any:
        """Of the loss of all N samples, reduced in that way. dtype: the parameter's."""
        assert q.adds is not None
        weight = self.samples if reduction == "mean" else 1
        parts = self.found[q.name][name]
        parts = [t / float(weight) ** power for t, power in zip(parts, _powers(q.adds, parts), strict=True)]
        parts = [t.to(dtype) if dtype in _HALF and t.dtype == torch.float32 else t for t in parts]
        return q.adds.join(self.notes[q.name][name], parts, self.samples)


def _powers(adds: Adds, parts: list[Tensor]) -> list[int]:
    return list(adds.powers) * (len(parts) // len(adds.powers))
