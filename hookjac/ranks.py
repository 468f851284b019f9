"""The results of a process group's ranks, made into those of all their samples together.

When the block closes, in calls that are the same on every rank and in the same order: a fingerprint of what each rank
has; where these differ, what that is, so that all raise alike; then all statistics in one sum for each dtype. Ranks
without data take part with zeros.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hookjac import given
from hookjac.errors import HookjacError
from hookjac.quantity.record import Graph, Quantity
from hookjac.sums import Measured, Reduction, Sums, measured, told

Group = Any  # dist.ProcessGroup, where torch was built with it


def group_of(group: Any) -> Group:
    """The process group that was meant by `group=`."""
    if not (dist.is_available() and dist.is_initialized()):
        raise HookjacError(
            "group= was given, but torch.distributed is not initialised in this process. Call "
            "torch.distributed.init_process_group first, and start the script with torchrun."
        )
    if isinstance(group, str) and group == "world":
        return dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise HookjacError(
            f"rank {dist.get_rank()} is not a member of the process group that was given as group=. Only members open "
            "the block with it."
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be 'world' or a torch.distributed.ProcessGroup, got {group!r:.80}")
    return group  # type: ignore[no-any-return]


def demand_group(q: Quantity) -> None:
    """Refuse what has no meaning beyond one rank."""
    if q.adds is None and not q.single:
        what = {
            "kfac": "Use KFAC without corrected= and with another fisher=; KroneckerEigen comes from p.kfac.eigen().",
            "ntk": "Gather the ranks' inputs and ask for it on one, or leave group= out for each rank's own.",
            "grad_sample_gram": "Gather the ranks' grad_sample, or leave group= out for each rank's own.",
        }.get(q.name, "Leave group= out for each rank's own.")
        if isinstance(q.wish, Graph):
            what = f"Leave group= out, and all_reduce the products of p.{q.name}, weighed by each rank's samples."
        raise HookjacError(
            f"{q.name} over the ranks of a group is not supported: it neither adds up nor belongs to single samples. "
            + what
        )
    if q.adds is not None and q.subsample is not None:
        raise ValueError(f"{q.name}: subsample= picks samples of one rank's batch; it cannot be used with group=")


@contextlib.contextmanager
def reaching() -> Iterator[None]:
    """Say in our words that another rank is not there."""
    try:
        yield
    except RuntimeError as error:
        raise HookjacError(
            "the exchange with the other ranks failed: one of them ended, raised an error inside its block, or did "
            f"not come within the time-out of the process group ({error})"
        ) from error


_TURNS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def turn(what: str, group: Group) -> str:
    """The next thing that this process does with a group. Ranks that do not do the same ones are out of step, as after
    an error that one of them took no notice of; what they say must not be mixed up."""
    _TURNS[group] = _TURNS.get(group, 0) + 1
    return f"{what} number {_TURNS[group]}"


def gathered(doing: str, table: Any, group: Group) -> list[Any]:
    """What each rank says, in the order of ranks. doing: a `turn`."""
    found: list[Any] = [None] * group.size()
    with reaching():
        dist.all_gather_object(found, (doing, table), group=group)
    demand_equal("what they do with the group", [its[0] for its in found])
    return [its[1] for its in found]


def demand_equal(what: str, said: Sequence[Any]) -> None:
    """Raise on all ranks alike where they disagree."""
    for rank, its in enumerate(said):
        if its != said[0]:
            first = said[0]
            if isinstance(its, list) and isinstance(first, list):  # what one has and the other has not
                first, its = ([x for x in one if x not in two] or one for one, two in ((first, its), (its, first)))
            raise HookjacError(f"ranks disagree about {what}: rank 0 has {first!s:.300}, rank {rank} has {its!s:.300}.")


# a note of `Adds.split`, and shape and dtype of each statistic
Form = tuple[dict[str, Any], list[tuple[tuple[int, ...], torch.dtype]]]


@dataclass
class Ranks:
    """What one block knows of its group."""

    group: Group
    reduction: Reduction
    quantities: Sequence[Quantity]

    def __post_init__(self) -> None:
        given.choice(("mean", "sum"), reduction=self.reduction)
        for q in self.quantities:
            demand_group(q)
        self.summed = {q.name: q for q in self.quantities if q.adds is not None}
        if not self.summed:
            raise ValueError(
                f"nothing of what was asked for ({', '.join(q.name for q in self.quantities)}) adds up over the ranks "
                "of a group: it belongs to single samples and stays on their rank. Leave group= out."
            )
        self.kept: dict[str, dict[str, Measured]] = {}  # parameter -> quantity
        self._turn = ""

    def open(self) -> None:
        self.kept, self._turn = {}, turn("block", self.group)

    def measuring(self) -> list[Quantity]:
        """The quantities as a block shall ask for them."""
        return [replace(q, reduce=measured(q)) if q.name in self.summed else q for q in self.quantities]

    def keep(self, found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """parameter -> quantity -> result: keeps what is to be added up, and returns what stays on this rank."""
        self.kept = {name: {q: its[q] for q in self.summed} for name, its in found.items()}
        return {name: {q: v for q, v in its.items() if q not in self.summed} for name, its in found.items()}

    def exchange(self, params: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
        """Parameter -> quantity -> result, the same on all ranks. Collective."""
        sums = Sums()
        if self.kept:
            sums.take(self.summed.values(), self.kept, self.reduction)
        penalised = [name for name, its in self.kept.items() if any(one.penalised for one in its.values())]
        self.kept = {}
        names = added(self._turn, sums, list(self.summed.values()), self.reduction, params, penalised, self.group)
        return {
            name: {q.name: sums.result(q, name, self.reduction, params[name].dtype) for q in self.summed.values()}
            for name in names
        }


def added(
    doing: str,
    sums: Sums,
    quantities: Sequence[Quantity],
    reduction: Reduction,
    params: Mapping[str, nn.Parameter],
    penalised: Sequence[str],
    group: Group,
) -> list[str]:
    """Make the sums of this rank those of the whole group. Returns whose they are. Collective. doing: a `turn`."""
    table = {
        "the quantities": [told(q) for q in quantities],
        "the reduction": reduction,
        "the parameters": [(name, tuple(p.shape)) for name, p in params.items()],
    }
    forms: dict[tuple[str, str], Form] = {
        (q, name): (sums.notes[q][name], [(tuple(t.shape), t.dtype) for t in parts])
        for q, found in sums.found.items()
        for name, parts in found.items()
    }
    digest = hashlib.sha256(repr((table, forms)).encode()).hexdigest()
    brief = gathered(doing, (digest, sums.samples, sums.batches, list(penalised)), group)
    samples = [n for _, n, _, _ in brief]
    if len({its for its, *_ in brief}) > 1:
        tables = gathered("", (table, forms), group)
        for what in table:
            demand_equal(what, [its[what] for its, _ in tables])
        forms = _agreed({rank: its for rank, (_, its) in enumerate(tables) if samples[rank]})
    _demand_no_penalty(reduction, [names for *_, names in brief])
    sums.samples, sums.batches = sum(samples), sum(batches for _, _, batches, _ in brief)
    if not sums.samples:
        raise HookjacError("no rank of the group had any sample, so that there is nothing to add up")
    _sum(sums, forms, params, group)
    return [name for name in params if any(name == key for _, key in forms)]


def _demand_no_penalty(reduction: Reduction, penalised: Sequence[Sequence[str]]) -> None:
    found = [(rank, name) for rank, names in enumerate(penalised) for name in names]
    if found and reduction == "sum":
        rank, name = found[0]
        raise HookjacError(
            f"the loss of rank {rank} has a part that passes through no sample (a penalty on {name!r}), which a sum "
            "over ranks would count once for each. Leave it out of the loss and add its own curvature afterwards, or "
            "use reduction='mean'."
        )


def _agreed(speaking: Mapping[int, Mapping[tuple[str, str], Form]]) -> dict[tuple[str, str], Form]:
    """Of which form the statistics are, from what the ranks with data say: as where something reached the parameter."""
    found: dict[tuple[str, str], Form] = {}
    if not speaking:
        return found
    first, forms = next(iter(speaking.items()))
    for rank, its in speaking.items():
        if list(its) != list(forms):
            odd = sorted({name for _, name in its.keys() ^ forms.keys()})
            raise HookjacError(
                f"ranks {first} and {rank} have results for different parameters ({', '.join(odd[:3])}): list the same "
                "in backward(inputs=...) on all ranks."
            )
    for q, name in forms:
        each = {rank: its[q, name] for rank, its in speaking.items()}
        full = {rank: form for rank, form in each.items() if not form[0].get("empty")} or each
        (one, form), *others = full.items()
        for rank, other in others:
            if other != form:
                raise HookjacError(
                    f"{q} of parameter {name!r} has another form on rank {rank} ({other[0]}) than on rank {one} "
                    f"({form[0]}), so that they do not add up."
                )
        found[q, name] = form
    return found


def _sum(sums: Sums, forms: Mapping[tuple[str, str], Form], params: Mapping[str, nn.Parameter], group: Group) -> None:
    """All statistics in one call for each dtype, in the order of `forms`."""
    before = sums.found, sums.notes
    sums.found, sums.notes = {}, {}
    parts: list[tuple[list[Tensor], int]] = []  # where each of them stands
    for (q, name), (note, form) in forms.items():
        found = before[0].get(q, {}).get(name)
        if found is None or (before[1][q][name] != note):  # nothing arrived here
            found = [torch.zeros(shape, dtype=dtype, device=params[name].device) for shape, dtype in form]
        sums.found.setdefault(q, {})[name] = found
        sums.notes.setdefault(q, {})[name] = note
        parts += [(found, k) for k in range(len(found))]
    device = next(iter(params.values())).device
    for dtype in sorted({found[k].dtype for found, k in parts}, key=str):
        mine = [(found, k) for found, k in parts if found[k].dtype == dtype]
        together = torch.cat([found[k].to(device).reshape(-1) for found, k in mine])
        with reaching():
            dist.all_reduce(together, group=group)
        pieces = together.split([found[k].numel() for found, k in mine])
        for (found, k), t in zip(mine, pieces, strict=True):
            # each in memory of its own: one that is kept shall not keep all
            found[k] = t.view(found[k].shape).clone().to(found[k].device)
