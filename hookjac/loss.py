"""From the loss that was really backpropagated: where the samples part, its gradient and Hessian there.

Between the number that `backward` is called on and the model lies the user's own code. The *frontier* is where,
coming down from that number, tensors first have one row for each sample. Above it the loss must be a sum over
the rows; what reaches parameters without crossing it (a penalty) belongs to no sample.

N samples · C all entries of one sample's outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hookjac.errors import HookjacError
from hookjac.graph import Edge, edge_of, fenced, gradients, meta, ordered
from hookjac.kinks import crossing
from hookjac.products import units
from hookjac.route import Key, Route
from hookjac.samples import Layout, agree, random, scaled, scales
from hookjac.structure import scales_linearly, separable


def scalar(tensors: list[Tensor], weights: list[Tensor | None]) -> Tensor:
    """The number whose gradient the user asked for: the loss, or the sum of outputs times given cotangents."""
    if len(tensors) == 1 and weights[0] is None:
        if tensors[0].numel() != 1:
            raise HookjacError(
                f"backward was called on a tensor of shape {tuple(tensors[0].shape)} without a gradient. Reduce the "
                "loss to one number, or pass gradient=."
            )
        return tensors[0]
    for t, w in zip(tensors, weights, strict=True):
        if w is not None and w.shape != t.shape:
            raise HookjacError(f"backward got a gradient of shape {tuple(w.shape)} for a tensor of {tuple(t.shape)}.")
    with torch.enable_grad():
        parts = [(t if w is None else t * w.detach()).sum() for t, w in zip(tensors, weights, strict=True)]
        return torch.stack(parts).sum()


_CHUNK = 1 << 23  # entries of one batch of tangents


@dataclass
class Top:
    """The part of the graph between the loss and the frontier."""

    loss: Tensor
    N: int
    frontier: list[Edge]  # as the walk knows them
    real: list[Edge]  # as the user's graph does: a reentrant checkpoint is opened for the walk only
    gradients: list[Tensor]  # dL/d frontier, differentiable
    direct: dict[int, Tensor]  # id of a parameter -> its gradient through no sample, differentiable
    entwined: set[int] = field(default_factory=set)  # of those, the ones that scale what the samples add up to
    certain: bool = False  # that it is a sum over the rows of the frontier follows from structure alone


def top(
    loss: Tensor, route: Route, sampled: Collection[Edge], N: int, names: Mapping[int, str], *, low: bool = False
) -> Top:
    """Find the frontier, and refuse a loss that is no sum over its rows. `sampled`: edges known to hold samples.

    low: only those may make up the frontier. Else the topmost tensors do whose first axis has the right size, which
    is cheaper, and may be chance.
    """
    leading = leading_to(route, sampled) | {route.key(edge) for edge in sampled}
    frontier: list[Edge] = []
    free: list[Edge] = []
    seen: set[Edge] = set()
    above: set[Key] = set()
    stack = list(route.starts)
    while stack:
        edge = stack.pop()
        if edge in seen:
            continue
        seen.add(edge)
        key = route.key(edge)
        if key not in leading:
            free.append(edge)
        elif edge.shape[:1] == (N,) and (edge in sampled or not low):
            frontier.append(edge)
        elif edge in sampled:
            raise HookjacError(
                f"the loss uses a tensor of shape {tuple(edge.shape)} whose first axis does not count the {N} samples. "
                "Move the batch to the first axis before the loss is computed."
            )
        else:
            if key in route.calls and names.keys() & {id(p) for p in route.calls[key].params.values()}:
                raise _mixing(f"layer {route.calls[key].name!r} sees a tensor of shape {tuple(edge.shape)}")
            above.add(key)
            stack += [after for after in route.after[key] if after is not None]
    direct = _parameters_below(route, free, names, N)
    real = [route.real(edge) for edge in frontier]
    edges = real + [edge_of(p) for p in direct.values()]
    with fenced(real):
        found = gradients([loss], edges, [None], create_graph=True)
    at = found[: len(frontier)]
    result = Top(loss, N, frontier, real, at, dict(zip(direct, found[len(frontier) :], strict=True)))
    _check(result, [key for key in route.order if key in above], route, names)
    return result


def leading_to(route: Route, edges: Collection[Edge]) -> set[Key]:
    """Stations above one of these edges."""
    found: set[Key] = set()
    for key in reversed(route.order):
        if any(edge is not None and (edge in edges or route.key(edge) in found) for edge in route.after[key]):
            found.add(key)
    return found


def _parameters_below(route: Route, starts: list[Edge], names: Mapping[int, str], N: int) -> dict[int, Tensor]:
    """Tracked parameters that these edges lead to, by ways that hold no sample.

    What leads to none may be joined to them by sums, as a loss of other tensors is to a penalty, and by nothing else:
    data that require a gradient are data as well.
    """
    found: dict[int, Tensor] = {}
    suspects: list[torch.Size] = []
    needed = route.needed(names.keys())
    seen: set[tuple[Key, bool]] = set()
    # and whether all above is linear
    stack = [(key, True) for edge in starts if (key := route.key(edge)) in needed]
    while stack:
        at = key, linear = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        leaf = route.leaf(key)
        here = [] if leaf is None else [leaf]
        if key in route.calls:
            here += list(route.calls[key].params.values())
        found.update((id(p), p) for p in here if id(p) in names)
        if N > 1 and leaf is None:
            suspect = _may_be_samples(route, key, N)
            suspects += [] if suspect is None else [suspect.shape]
            suspects += [] if linear else _spread(route, key, N)
        linear = linear and scales_linearly(route, key)
        after = [(edge, route.key(edge)) for edge in route.after[key] if edge is not None]
        stack += [(k, linear) for _, k in after if k in needed]
        if N > 1 and not linear:
            met = {tuple(edge.shape) for edge, k in after if k in needed}
            suspects += [t.shape for _, k in after if k not in needed for t in _data_below(route, k, N, met)]
    if found and suspects:
        raise HookjacError(
            f"the loss reaches parameter {names[next(iter(found))]!r} past the model's outputs, where it meets a "
            f"constant of shape {tuple(suspects[0])}: these may be the {N} samples, and hookjac cannot tell. "
            "Return what is made there from the model as well, batch first, and select the main output with "
            "extend(output=...). If it is a penalty, call its backward outside the block."
        )
    return found


def _spread(route: Route, key: Key, N: int) -> list[torch.Size]:
    """Where something is added that autograd does not keep, the shape to which parameters are spread by it."""
    (edge, *_), after = route.outs[key], route.after[key]
    if type(key).__name__ not in ("AddBackward0", "SubBackward0") or None not in after:
        return []
    alike = any(e is not None and e.shape == edge.shape for e in after)
    return [edge.shape] if not alike and _rows_of_samples(edge.shape, N) else []


def _rows_of_samples(shape: torch.Size, N: int) -> bool:
    return any(d >= N and d % N == 0 for d in shape)


def _data_below(route: Route, key: Key, N: int, met: Collection[tuple[int, ...]]) -> list[Tensor]:
    """What may be the samples, of all that a station without parameters is made of."""
    found: list[Tensor] = []
    for k in ordered([key], lambda k: [route.key(e) for e in route.after[k] if e is not None]):
        leaf = route.leaf(k)
        if leaf is None:
            suspect = _may_be_samples(route, k, N)
            found += [] if suspect is None else [suspect]
        elif not isinstance(leaf, torch.nn.Parameter) and _counts(route, leaf, N, met if k is key else ()):
            found.append(leaf)
    return found


def _may_be_samples(route: Route, key: Key, N: int) -> Tensor | None:
    """A constant that enters here and could hold one row for each sample, or is what the model was called with.

    A constant in the shape of what it meets (a mask on a weight, the Fisher information of an earlier task) is not.
    """
    if type(key).__name__.startswith(_OWN_INDICES):
        return None
    met = {tuple(e.shape) for e in route.after[key] if e is not None}
    return next((t for t in route.constants(key) if _counts(route, t, N, met)), None)


def _counts(route: Route, t: Tensor, N: int, met: Collection[tuple[int, ...]] = ()) -> bool:
    given = [x for ref in route.tape.given if (x := ref()) is not None]
    if _rows_of_samples(t.shape, N) and tuple(t.shape) not in met:
        return True
    return any(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for x in given)


_OWN_INDICES = ("Max", "Min", "Sort", "Topk", "Kthvalue", "Median", "Nanmedian", "Mode", "Cummax", "Cummin")


def _check(part: Top, above: Iterable[Key], route: Route, names: Mapping[int, str]) -> None:
    heads = [g for g in part.gradients if g.requires_grad]
    above = list(above)
    if not part.direct and separable(route, above, part.frontier, part.N):
        part.certain = True
        return
    try:
        route.demand_twice(above)
        if part.N > 1 and heads:
            _check_rows(part, route.rounding)
        if part.N > 1 and (kink := crossing(route, above, part.real, part.N, route.rounding)):
            raise _mixing(f"{kink} above the model's outputs bends or chooses across samples")
        for key, g in part.direct.items():
            if g.requires_grad and part.real:
                mixed = gradients([g], part.real, [_random(g)])
                if any(bool((m != 0).any()) for m in mixed):
                    part.entwined.add(key)
    except HookjacError:
        raise
    except RuntimeError as error:
        warnings.warn(
            f"the loss cannot be differentiated twice ({error}), so that hookjac could not check that it is a sum "
            "over samples; the per-sample results hold if it is one",
            stacklevel=2,
        )


def _random(like: Tensor, seed: int = 11) -> Tensor:
    return random(like.shape, seed, like.device, like.dtype)


def _check_rows(part: Top, rounding: float) -> None:
    """H (s u) = s (H u) row by row: the loss is a sum over the rows of the frontier."""
    factors = scales(part.N, part.loss.device, part.loss.dtype)
    layout = Layout(part.N)
    index = [k for k, g in enumerate(part.gradients) if g.requires_grad]
    first, second = ([_random(g, seed + 31 * k) for k, g in enumerate(part.gradients)] for seed in (1, 2))
    columns = []
    for k, (u, v) in enumerate(zip(first, second, strict=True)):
        s = factors.to(u.dtype)
        columns.append(torch.stack([t for w in (u, v, u + v) for t in (w, scaled(w, s, layout))]) if k in index else u)
    with fenced(part.real):
        found = gradients([part.gradients[k] for k in index], part.real, [columns[k] for k in index], batched=True)
    for edge, rows in zip(part.real, found, strict=True):
        s = factors.to(rows.dtype)
        left = [rows[k + 1] - scaled(rows[k], s, layout) for k in (0, 2, 4)]
        if agree(rows[1], scaled(rows[0], s, layout), rounding):
            continue
        # it may be the rounding of something that is zero (a saturated softmax): then it does not add up
        if bool((left[0] + left[1] - left[2]).abs().max() < 0.1 * left[2].abs().max()):
            raise _mixing(f"a sample's loss depends on other samples at a tensor of shape {tuple(edge.shape)}")


def _mixing(what: str) -> HookjacError:
    return HookjacError(
        f"the loss mixes samples: {what}. Per-sample quantities need a loss that is a sum (or mean) over the first "
        "axis of the model's output. Typical causes: a root or logarithm of the batch mean, a contrastive loss, "
        "statistics over the batch, an output without a batch axis."
    )


def hessian(loss: Tensor, edges: list[Edge], N: int) -> Tensor:
    """[N, C, C]: the loss's second derivative in the given tensors [N, ...] of each sample, all else held."""
    shapes = [meta(edge)[0] for edge in edges]
    sizes = [shape[1:].numel() for shape in shapes]
    C = sum(sizes)
    with fenced(edges):
        heads = gradients([loss], edges, [None], create_graph=True)
        index = [k for k, h in enumerate(heads) if h.requires_grad]
        if not index:
            return torch.zeros(N, C, C, dtype=loss.dtype, device=loss.device)
        found = []
        for _, t in units(C, max(1, _CHUNK // max(1, N * C)), loss.detach().new_zeros(())):
            parts = t.split(sizes, 1)
            tangents = [p.reshape(-1, 1, *s[1:]).expand(-1, *s) for p, s in zip(parts, shapes, strict=True)]
            rows = gradients([heads[k] for k in index], edges, [tangents[k] for k in index], batched=True)
            found.append(torch.cat([r.reshape(t.shape[0], N, -1) for r in rows], 2))
    H = torch.cat(found).transpose(0, 1)
    return (H + H.transpose(1, 2)) / 2
