"""Quantities of a whole data set: one pass over its batches, in the memory of one.

N samples of the data set · n of one batch.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from hookjac import files, given
from hookjac.errors import HookjacError
from hookjac.extend import extend
from hookjac.progress import Progress
from hookjac.quantity import Quantity, parse
from hookjac.ranks import Group, added, group_of, turn
from hookjac.saving import Accumulated
from hookjac.sharded import shards
from hookjac.sums import Measured, Reduction, Sums, measured, told
from hookjac.tape import Select


def accumulate(
    model: nn.Module,
    loss_fn: Callable[..., Tensor] | None,
    loader: Iterable[Any],
    *quantities: str | Quantity,
    reduction: Reduction = "mean",
    output: Select = None,
    step: Callable[[nn.Module, Any], Tensor] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 50,
    group: Group | Literal["world"] | None = None,
) -> Accumulated:
    """Quantities of the loss of a whole data set, batch by batch, in the memory of one batch and of the result.

        found = hookjac.accumulate(model, F.cross_entropy, loader, "ggn_diag", checkpoint="run.safetensors")

    Results are put on the parameters as by `extend`, and returned. `p.grad` is not touched. The mode of the model
    (train, eval) is yours. Exact to rounding: what one backward of the whole data set's loss would give.

    loss_fn: of the model's output and the targets, where batches are (inputs, *targets). Inputs may be a tuple or a
        dict of arguments. For batches of another form leave it None and give `step`, from (model, batch) to the loss.
    reduction: how the loss reduces a batch, and how the data set's loss is then made: "mean" over samples (a batch of
        n samples counts n times), or "sum". A mean over anything else (weighted, over tokens) is right only for batches
        that have equally much of it.
        Under "sum" a penalty, which belongs to no sample, is refused.
    quantities: those whose batches add up: grad_sq_sum, grad_var, ggn_diag, ggn_diag_mc, hess_diag, hutchinson,
        hesscale, ggn_block, hess_block, kfac (not KFRA or EKFAC), and your own with `adds=hookjac.Adds()`.
    output: as for `extend`.
    checkpoint: a file (needs safetensors) where the sums so far and the random state are kept, written every `every`
        batches and at the end, always whole. If it is there, the run goes on from it: batches already seen are drawn
        and skipped, and the result is equal to the last bit, provided that the loader gives the same batches (a
        shuffling DataLoader does: its random state is kept, too; one that draws random augmentations does not, and is
        refused). A file of another model, other weights or other quantities is refused.
    group: a `torch.distributed` process group, or "world": each of its ranks goes through batches of its own, as many
        as it has, and all get the result of all. They meet once, at the end. A checkpoint is one rank's: each needs a
        path of its own.

    Units: as each quantity has them. Cost: for each batch what `extend` costs. A bar shows where it takes long (tqdm).
    """
    given.model("accumulate", model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise HookjacError(
            "accumulate got a DistributedDataParallel, which waits for a reduction after every batch. Give it the "
            "wrapped module (model.module), and group='world' for the sums over ranks."
        )
    if shards({m: name for name, m in model.named_modules()}):
        raise HookjacError(
            "accumulate got a model under fully_shard, whose ranks must go through as many batches, and by "
            "loss.backward(). Use hookjac.extend(model, ..., group='world') for each batch."
        )
    if not isinstance(loader, Iterable):
        raise TypeError(f"accumulate expects a loader of batches after the loss, got {type(loader).__name__}")
    if not quantities:
        raise ValueError("accumulate needs the names of quantities whose batches add up, such as 'ggn_diag' or 'kfac'")
    asked = parse(quantities)
    for q in asked:
        _demand_adds(q)
    given.choice(("mean", "sum"), reduction=reduction)
    if (loss_fn is None) == (step is None):
        raise ValueError("give either a loss_fn of output and targets, or step= from (model, batch) to the loss")
    given.function(optional=True, loss_fn=loss_fn, step=step)
    given.counts(1, every=every)
    own = getattr(loss_fn, "reduction", reduction)
    if own != reduction:
        raise ValueError(f"loss_fn has reduction={own!r}, but accumulate was told reduction={reduction!r}")
    weighted = getattr(loss_fn, "weight", None) is not None or getattr(loss_fn, "ignore_index", -100) >= 0
    if reduction == "mean" and weighted and isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss)):
        raise ValueError(
            "the mean of a loss with class weights or ignore_index is not over samples, so that batches do not add up. "
            "Use reduction='sum' (in the loss, too), and divide by the total weight."
        )
    place = None if checkpoint is None else given.path("checkpoint", checkpoint)
    if place is not None:
        files.demand_place(place)
    among = None if group is None else group_of(group)
    return _Run(model, loss_fn, loader, asked, reduction, output, step, among).run(place, every)


def _demand_adds(q: Quantity) -> None:
    if q.adds is None:
        raise ValueError(
            f"results of batches of {q.name!r} do not add up to that of a data set (they belong to single samples, or "
            "to a basis of their own, or are averages of averages). Use extend for each batch."
        )
    if q.subsample is not None:
        raise ValueError(f"{q.name}: subsample= picks samples of a batch; give accumulate a loader of those you want")


@dataclass
class _Run:
    model: nn.Module
    loss_fn: Callable[..., Tensor] | None
    loader: Iterable[Any]
    asked: list[Quantity]
    reduction: Reduction
    output: Select
    step: Callable[[nn.Module, Any], Tensor] | None
    group: Group | None

    def run(self, path: Path | None, every: int) -> Accumulated:
        self.params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        sums, start = Sums(), self._random()
        doing = "" if self.group is None else turn("accumulate", self.group)
        identity = "" if path is None else self._identity()
        if path is not None and path.exists():
            sums, start, now = self._resume(path, identity)
            self._set_random(start)
        done, seen = sums.batches, 0
        total = float(len(self.loader)) if isinstance(self.loader, Sized) else math.inf
        with Progress("batches", total) as progress:
            for batch in self.loader:
                seen += 1
                if seen <= done:
                    if seen == done:
                        _demand_same(sums.last, _digest(batch), path)
                        self._set_random(now)
                    with progress.part(1):
                        continue
                with progress.part(1):
                    self._batch(sums, batch)
                if path is not None and seen % every == 0:
                    self._write(path, sums, start, identity, batch)
        least = max(done, 1 if self.group is None else 0)
        if seen < least:
            raise HookjacError(f"the loader gave {seen} batches, expected at least {least}")
        if path is not None and sums.batches > done:
            self._write(path, sums, start, identity, batch)
        if self.group is not None:
            added(doing, sums, self.asked, self.reduction, self.params, (), self.group)
        if not sums.samples:
            raise HookjacError("no batch of the loader had a sample")
        return self._finished(sums)

    def _batch(self, sums: Sums, batch: Any) -> None:
        device = next(iter(self.params.values())).device if self.params else None
        if any(isinstance(t, Tensor) and t.is_meta for t in pytree.tree_leaves(batch)):
            raise HookjacError("a batch has a tensor on the device 'meta', which holds no data")
        batch = pytree.tree_map_only(Tensor, lambda t: t.to(device), batch)
        measuring = [replace(q, reduce=measured(q)) for q in self.asked]
        before = {name: {q.name: vars(p).get(q.name) for q in self.asked} for name, p in self.params.items()}
        found: dict[str, dict[str, Measured]] = {}
        try:
            with extend(self.model, *measuring, output=self.output):
                loss = self._loss(batch)
                given.loss("loss_fn" if self.step is None else "step", loss)
                torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)
                found = {name: {q.name: vars(p).pop(q.name) for q in self.asked} for name, p in self.params.items()}
        finally:
            try:
                self._put_back(before)
            except BaseException:
                self._put_back(before)
                raise
        if self.reduction == "sum":
            for name, its in found.items():
                if any(one.penalised for one in its.values()):
                    raise HookjacError(
                        f"the loss has a part that passes through no sample (a penalty on {name!r}), which a sum over "
                        "batches would count once for each. Leave it out of the step and add its own curvature "
                        "afterwards, or use reduction='mean'."
                    )
        sums.take(self.asked, found, self.reduction)

    def _put_back(self, before: Mapping[str, Mapping[str, Any]]) -> None:
        for name, p in self.params.items():
            for attribute, value in before[name].items():
                vars(p).pop(attribute, None)
                if value is not None:
                    setattr(p, attribute, value)

    def _loss(self, batch: Any) -> Tensor:
        if self.step is not None:
            return self.step(self.model, batch)
        assert self.loss_fn is not None
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise HookjacError(
                f"a batch is a {type(batch).__name__}, expected (inputs, *targets). For batches of another form give "
                "step=, a function from (model, batch) to the loss."
            )
        inputs, *targets = batch
        if isinstance(inputs, Mapping):
            return self.loss_fn(self.model(**inputs), *targets)
        if self.reduction == "mean":
            _demand_all_counted(self.loss_fn, targets)
        out = self.model(*inputs) if isinstance(inputs, (tuple, list)) else self.model(inputs)
        return self.loss_fn(out, *targets)

    def _finished(self, sums: Sums) -> Accumulated:
        results: dict[str, dict[str, Any]] = {}
        for q in self.asked:
            for name, p in self.params.items():
                value = sums.result(q, name, self.reduction, p.dtype)
                results.setdefault(q.name, {})[name] = value
                setattr(p, q.name, value)
        about = {name: (p.shape, p.dtype) for name, p in self.params.items()}
        return Accumulated(results, about, sums.samples, sums.batches)

    # The checkpoint ---------------------------------------------------------------------------------------------

    def _generators(self) -> list[torch.Generator]:
        found = [getattr(q.wish, "generator", None) for q in self.asked]
        found += [
            getattr(self.loader, "generator", None),
            getattr(getattr(self.loader, "sampler", None), "generator", None),
        ]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def _random(self) -> list[Tensor]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return [torch.get_rng_state(), *(g.get_state() for g in self._generators()), *cuda]

    def _set_random(self, states: list[Tensor]) -> None:
        generators = self._generators()
        torch.set_rng_state(states[0])
        for generator, state in zip(generators, states[1:], strict=False):
            generator.set_state(state)
        if len(states) > 1 + len(generators):
            torch.cuda.set_rng_state_all(states[1 + len(generators) :])

    def _identity(self) -> str:
        """What a checkpoint must agree with: the quantities, the reduction, the model and its weights."""
        held = {k: t for k, t in self.model.state_dict().items() if isinstance(t, Tensor)}
        mine = [] if self.group is None else [self.group.rank(), self.group.size()]
        return _digest([self.reduction, *map(told, self.asked), sorted(self.params), held, *mine])

    def _write(self, path: Path, sums: Sums, start: list[Tensor], identity: str, batch: Any) -> None:
        tensors = {
            f"sums/{q}/{name}/{k}": t
            for q, found in sums.found.items()
            for name, parts in found.items()
            for k, t in enumerate(parts)
        }
        tensors |= {f"start/{k}": t for k, t in enumerate(start)}
        tensors |= {f"now/{k}": t for k, t in enumerate(self._random())}
        sums.last = _digest(batch)
        about = {"sums": sums.notes, "samples": sums.samples, "batches": sums.batches, "last": sums.last}
        files.write(path, tensors, about | {"identity": identity})

    def _resume(self, path: Path, identity: str) -> tuple[Sums, list[Tensor], list[Tensor]]:
        tensors, about = files.read(path, "sums")
        if about["identity"] != identity:
            raise HookjacError(
                f"the checkpoint {path} is of another run: the model, its weights, the quantities (and their options) "
                "or the reduction differ. Delete it, or give another path."
            )

        def listed(prefix: str) -> list[Tensor]:
            count = sum(key.startswith(f"{prefix}/") and key[len(prefix) + 1 :].isdecimal() for key in tensors)
            return [tensors[f"{prefix}/{k}"] for k in range(count)]

        devices = {name: p.device for name, p in self.params.items()}
        found = {
            q: {name: [t.to(devices[name]) for t in listed(f"sums/{q}/{name}")] for name in notes}
            for q, notes in about["sums"].items()
        }
        sums = Sums(found, about["sums"], about["samples"], about["batches"], about["last"])
        return sums, listed("start"), listed("now")


def _demand_all_counted(loss_fn: Callable[..., Tensor], targets: Iterable[Any]) -> None:
    """Of targets that the loss ignores, a mean is over the others: no two batches need have equally many."""
    known = loss_fn in (F.cross_entropy, F.nll_loss) or isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss))
    ignored = getattr(loss_fn, "ignore_index", -100) if known else None
    if ignored is not None and any(isinstance(t, Tensor) and bool((t == ignored).any()) for t in targets):
        raise HookjacError(
            f"targets of a batch hold {ignored}, which {getattr(loss_fn, '__name__', type(loss_fn).__name__)} leaves "
            "out of its mean: means over different numbers of targets do not add up. Use reduction='sum' (in the loss, "
            "too), and divide by the number of targets."
        )


def _demand_same(wanted: str, found: str, path: Path | None) -> None:
    if wanted != found:
        raise HookjacError(
            f"the loader does not repeat itself: the last batch that the checkpoint {path} has seen differs from the "
            "one that the loader gives now. Fix its order (a seeded generator, no random augmentation), or delete the "
            "checkpoint."
        )


def _digest(tree: Any) -> str:
    """A fingerprint of tensors, numbers and texts."""
    found = hashlib.sha256()
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            t = leaf.detach().cpu().contiguous().reshape(-1)
            found.update(f"{t.dtype}{tuple(leaf.shape)}".encode())
            found.update(bytes(t.view(torch.uint8).numpy()) if t.numel() else b"")
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()
