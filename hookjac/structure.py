"""What the structure of a graph says, whatever the values are: where the samples lie, that a loss is a sum over them.

Both answers may be "cannot tell"; then values are looked at (`plan`, `loss`). A wrong answer is not among them: the
tests hold each against what probes find, on every model they have.

N samples.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Literal

import torch

from hookjac.graph import Edge, Node, children, meta, signed
from hookjac.places import Placed, placing
from hookjac.route import Key, Route
from hookjac.samples import Layout
from hookjac.talkers import NODES


def placed(route: Route, starts: Iterable[Edge], N: int, needed: Collection[Key]) -> dict[Edge, Layout | None] | None:
    """The layout of every tensor below `starts`, whose first axes hold the samples; None for one that all share.

    None altogether where structure cannot tell.
    """
    if N < 2:
        return None  # every axis would fit
    state: dict[Edge, Layout | None] = dict.fromkeys(starts, Layout(N))
    for key in route.order:
        if key not in needed:
            continue
        here = [(edge, state[edge]) for edge in route.outs[key] if edge in state]
        if not here or route.leaf(key) is not None:
            continue
        edge, layout = here[0]
        if any(other != layout for _, other in here):
            return None
        found = _into(route, key, edge, layout)
        if found is None:
            return None
        for below, its in zip(route.after[key], found, strict=True):
            if below is None or below.leaf is not None:
                continue
            if its is not None and not _there(its, below.shape):
                return None
            if its is None and layout is not None and _may_part(route, key, below):
                return None
            if state.setdefault(below, its) != its:
                return None
    return state


def _may_part(route: Route, key: Key, below: Edge) -> bool:
    """Values may keep the samples apart in what is shared at a product."""
    rule = placing(key)
    return rule is not None and rule.product and route.with_data(route.key(below))


def _there(layout: Layout, shape: torch.Size) -> bool:
    return 0 <= layout.axis < len(shape) and shape[layout.axis] == layout.outer * layout.N * layout.inner


def _into(route: Route, key: Key, edge: Edge, layout: Layout | None) -> Placed:
    after = route.after[key]
    if layout is None:
        return [None] * len(after)
    call = route.calls.get(key)
    if call is not None:
        place = call.rule.place
        found = None if place is None else place(call, layout, edge.shape)
        return None if found is None else [found]
    known = placing(key)
    return None if known is None else known.into(key, layout, edge.shape, [e and meta(e)[0] for e in after])


# The loss ---------------------------------------------------------------------------------------------------------

# linear, and entries stay in their order
_IN_ORDER = {
    "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "SqueezeBackward0",
    "SqueezeBackward1", "SqueezeBackward2", "NegBackward0", "CloneBackward0", "ToCopyBackward0", "AliasBackward0",
    "DivBackward1", "MulBackward1", *NODES,
}  # fmt: skip
_LINEAR = _IN_ORDER | {
    "SumBackward0", "SumBackward1", "MeanBackward0", "MeanBackward1", "NllLossBackward0", "NllLoss2DBackward0",
    "TBackward0", "TransposeBackward0", "PermuteBackward0", "SelectBackward0", "SliceBackward0", "ExpandBackward0",
    "StackBackward0", "CatBackward0", "IndexBackward0", "MaskedSelectBackward0", "UnbindBackward0", "SplitBackward0",
    "MaskedFillBackward0",
}  # fmt: skip
# linear in each operand, and entry by entry
_ARITHMETIC = {"AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0"}
# entry by entry, perhaps summed up
SEPARATE = {
    "MseLossBackward0", "BinaryCrossEntropyWithLogitsBackward0", "BinaryCrossEntropyBackward0", "HuberLossBackward0",
    "SmoothL1LossBackward0", "AbsBackward0", "ExpBackward0", "LogBackward0", "Log1PBackward0", "PowBackward0",
    "SigmoidBackward0", "LogSigmoidBackward0", "SoftplusBackward0", "ReluBackward0", "TanhBackward0", "SqrtBackward0",
    "ClampBackward1", "ClampMinBackward0", "ClampMaxBackward0", "XlogyBackward0",
}  # fmt: skip
_ALONG = {"LogSoftmaxBackward0", "SoftmaxBackward0"}


# The second derivative of one node: none ... --------------------------------------------------------------------

_FLAT = _LINEAR | {
    "ConvolutionBackward0", "MmBackward0", "AddmmBackward0", "BmmBackward0", "BaddbmmBackward0", "MvBackward0",
    "AddBackward0", "AddBackward1", "SubBackward0", "SubBackward1", "MulBackward0",
    "MaxPool2DWithIndicesBackward0", "MaxPool3DWithIndicesBackward0", "AvgPool2DBackward0", "AvgPool3DBackward0",
    "AdaptiveAvgPool2DBackward0", "AdaptiveMaxPool2DBackward0", "ConstantPadNdBackward0", "NativeDropoutBackward0",
    "ReluBackward0", "ThresholdBackward0", "LeakyReluBackward0", "HardtanhBackward0", "AbsBackward0", "WhereBackward0",
}  # fmt: skip
# ... or a diagonal
_ENTRYWISE = {
    "TanhBackward0", "SigmoidBackward0", "GeluBackward0", "SiluBackward0", "SoftplusBackward0", "EluBackward0",
    "ExpBackward0", "LogBackward0", "SqrtBackward0", "SinBackward0", "CosBackward0", "PowBackward0",
    "LogSigmoidBackward0", "MishBackward0", "HardswishBackward0", "ReciprocalBackward0",
}  # fmt: skip
# of a complex number they bend otherwise: the modulus in both parts together
_OF_REALS = _ENTRYWISE | {"AbsBackward0"}


def bend(node: Node, edges: Collection[Edge]) -> Literal["none", "diagonal"] | None:
    """The second derivative of a node in one of its inputs, if its kind says; None: look at values.

    A node that is linear in each of two inputs bends only in both together.
    """
    if len(edges) != 1 or sum(e in edges for e in children(node)) != 1:
        return None
    name = type(node).__name__
    if name in _OF_REALS and meta(next(iter(edges)))[1].is_complex:
        return None
    return "none" if name in _FLAT else "diagonal" if name in _ENTRYWISE else None


def separable(route: Route, above: Iterable[Key], frontier: Sequence[Edge], N: int) -> bool:
    """Is the loss a sum over the samples of its frontier, by its structure? False: it cannot tell.

    What is tracked is how many entries of a tensor, in row-major order, may meet below it: blocks of that length,
    or none (0) where all above is linear.
    """
    blocks: dict[Edge, int] = dict.fromkeys(route.starts, 0)
    for key in above:
        here = {blocks[e] for e in route.outs[key] if e in blocks}
        if len(here) != 1 or key in route.calls:
            return False
        found = _met(route, key, here.pop())
        if found is None:
            return False
        for edge in route.after[key]:
            if edge is not None:
                before = blocks.get(edge, 0)
                if before and found and max(before, found) % min(before, found):
                    return False
                blocks[edge] = max(before, found)
    return not N or all(not (b := blocks.get(e, 0)) or (e.shape.numel() // N) % b == 0 for e in frontier)


def scales_linearly(route: Route, key: Key) -> bool:
    """Is a station linear in all that it is given together, with coefficients that hold no gradient?"""
    name, after = type(key).__name__, route.after[key]
    if key in route.calls:
        return False
    if name in _ARITHMETIC:
        only = sum(e is not None for e in after) == 1 and (name != "DivBackward0" or after[0] is not None)
        return name in ("AddBackward0", "SubBackward0") or only
    return name in _LINEAR


def _met(route: Route, key: Key, block: int) -> int | None:
    """How many entries of what goes into a node may meet, given those of what comes out."""
    name, (edge, *others) = type(key).__name__, route.outs[key]
    after = [e for e in route.after[key] if e is not None]
    alike = all(e.shape == edge.shape for e in after) and not others
    if name in _LINEAR:
        in_order = name in _IN_ORDER and after[0].shape.numel() == edge.shape.numel()
        return block if not block or in_order else None
    if name in _ARITHMETIC:
        linear = len(after) == 1 and (name != "DivBackward0" or route.after[key][0] is not None)
        if name in ("AddBackward0", "SubBackward0") or linear:
            return block if not block or alike else None
        return max(block, 1) if alike else None
    if name in SEPARATE:
        return max(block, 1) if alike or (not block and len({e.shape for e in after}) == 1) else None
    if name in _ALONG and alike:
        rows = edge.shape[signed(key._saved_dim) % max(len(edge.shape), 1) :].numel()
        if not block or rows % block == 0:
            return rows
        return block if block % rows == 0 else None
    return None
