"""Autograd's own graph, read from Python: edges, order, and nodes called on many columns at once.

Everything here is exact for any node, because the node itself does the work. The engine that normally calls
the nodes does three things around each call, and we do them too: it sums a broadcast gradient down to the
shape of the receiver, fills the missing outputs of a node with zeros, and drops `None`s.

V columns · shapes `[V, *out]` are V cotangents of a tensor of shape `out`.
"""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hookjac.mended import formula
from hookjac.samples import random, tolerance
from hookjac.ways import joins, ways

Node = Any  # autograd nodes have no public common type: C++ nodes and Python Functions differ


class Edge(NamedTuple):
    """One tensor of the graph: the `nr`-th output of what `node` differentiates."""

    node: Node
    nr: int

    @property
    def shape(self) -> torch.Size:
        return meta(self)[0]

    @property
    def leaf(self) -> Tensor | None:
        """The leaf tensor whose `.grad` this edge feeds, if it is one."""
        return self.node.variable if type(self.node).__name__ == "AccumulateGrad" else None


def meta(edge: Edge) -> tuple[torch.Size, torch.dtype, torch.device]:
    """Shape, dtype and device of the tensor at an edge."""
    leaf = edge.leaf
    if leaf is not None:
        return leaf.shape, leaf.dtype, leaf.device
    entry = edge.node._input_metadata[edge.nr]
    return torch.Size(entry.shape), entry.dtype, entry.device


_ATTRIBUTES: weakref.WeakKeyDictionary[type, tuple[str, ...]] = weakref.WeakKeyDictionary()


def attributes(node: Node, prefix: str) -> list[str]:
    """Names of what a node saved: "_saved_", or "_raw_saved_" for how it is held."""
    kind = type(node)
    if kind not in _ATTRIBUTES:
        _ATTRIBUTES[kind] = tuple(name for name in dir(kind) if name.startswith(("_saved_", "_raw_saved_")))
    return [name for name in _ATTRIBUTES[kind] if name.startswith(prefix)]


class Held:
    """A node as a rule looks at it, with what it saved: a backward frees that, and leaves it here."""

    def __init__(self, node: Node) -> None:
        kind = type(node)
        read = _READERS.get(kind)
        if read is None:
            names = [name for name in attributes(node, "_saved_") if not name.endswith(("_sym_sizes", "_sym_strides"))]
            read = _READERS[kind] = names, operator.attrgetter(*names, "next_functions")
        self.__dict__.update(zip(read[0], read[1](node), strict=False))
        self.node = node

    def __getattr__(self, name: str) -> Any:
        return getattr(self.node, name)


_READERS: dict[type, tuple[list[str], Callable[[Node], tuple[Any, ...]]]] = {}  # of PyTorch's own types


def signed(saved: int) -> int:
    """An axis or index as it was given: autograd keeps a negative one as an unsigned number."""
    return saved - (1 << 64) if saved >= 1 << 63 else saved


def saved(t: Tensor) -> Tensor:
    """What a node saved, for a result: with its history if the result shall be differentiated (grad mode is on)."""
    return t if torch.is_grad_enabled() else t.detach()


def edge_of(tensor: Tensor) -> Edge:
    """Where the gradient of `tensor` flows in. Leaves get their accumulator."""
    if tensor.grad_fn is not None:
        return Edge(tensor.grad_fn, tensor.output_nr)
    found = get_gradient_edge(tensor)
    return Edge(found.node, found.output_nr)


def children(node: Node) -> list[Edge | None]:
    """The edges a node sends gradients to; None where an input needs none."""
    return [None if f is None else Edge(f, nr) for f, nr in node.next_functions]


def ordered(
    starts: Iterable[Any],
    successors: Callable[[Any], Iterable[Any]],
) -> list[Any]:
    """Every item reachable from `starts`, each after all its predecessors (reverse post-order, no recursion)."""
    done: set[Any] = set()
    order: list[Any] = []
    for start in starts:
        if start in done:
            continue
        done.add(start)
        stack = [(start, iter(successors(start)))]
        while stack:
            item, rest = stack[-1]
            for after in rest:
                if after not in done:
                    done.add(after)
                    stack.append((after, iter(successors(after))))
                    break
            else:
                order.append(item)
                stack.pop()
    return order[::-1]


def fit(grad: Tensor, edge: Edge, lead: int) -> Tensor:
    """What the engine does to a gradient before it hands it on: sum out broadcasting, cast. `lead` axes stay."""
    shape, dtype, _ = meta(edge)
    return fitted(grad, shape, dtype, lead)


def fitted(grad: Tensor, shape: torch.Size, dtype: torch.dtype, lead: int) -> Tensor:
    """`fit`, to a tensor of this shape and type."""
    if grad.shape[lead:] != shape:
        extra = grad.dim() - lead - len(shape)
        axes = [lead + k for k in range(extra)]
        axes += [lead + extra + k for k, d in enumerate(shape) if d == 1 and grad.shape[lead + extra + k] != 1]
        grad = grad.sum(axes, keepdim=True) if axes else grad
        grad = grad.reshape(grad.shape[:lead] + shape)
    return grad if grad.dtype == dtype else grad.to(dtype)


def _apply(node: Node, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """One call of a node: an entry for each of `next_functions`."""
    if torch.is_grad_enabled() and (own := formula(node)) is not None:
        return own(grads)
    if callable(node):
        out = node(*grads)
        # an embedding may answer with a sparse gradient
        return [
            t.to_dense() if t is not None and t.is_sparse else t for t in (out if isinstance(out, tuple) else [out])
        ]
    # A Python Function: `backward` answers for every argument of `forward`, the graph only for tensors.
    out = node.apply(*grads)
    answers = list(out) if isinstance(out, tuple) else [out]
    wanted = iter([a for a, needed in zip(answers, node.needs_input_grad, strict=False) if needed])
    return [None if f is None else next(wanted, None) for f, _ in node.next_functions]


_ONCE = once_differentiable(lambda ctx, *grads: None).__code__

# their batching rules give wrong numbers when only the cotangent is batched (seen on torch 2.13)
_NOT_BATCHED = {"CdistBackward0", "AsStridedScatterBackward0", "RollBackward0"}


def differentiable_once(node: Node) -> bool:
    """A Python Function whose backward is marked so, or a compiled graph. Autograd says nothing when it is
    differentiated once more towards other tensors: the second derivative is silently zero."""
    if "CompiledFunction" in type(node).__name__:
        return True
    made_by = getattr(type(node), "_forward_cls", None)
    return made_by is not None and getattr(made_by.backward, "__code__", None) is _ONCE


def fill(node: Node, grads: dict[int, Tensor], lead: tuple[int, ...]) -> list[Tensor | None]:
    """Cotangents for all outputs of a node, zeros for those that nobody used.

    None for what the node may never have made (the gradient of a scale, where only that of the data was asked for): its
    shape is said to be (), whatever it would have been. Autograd's engine hands over nothing either.
    """
    filled: list[Tensor | None] = []
    for nr in range(len(node._input_metadata)):
        shape, dtype, device = meta(Edge(node, nr))
        if nr in grads:
            filled.append(grads[nr])
        elif not shape and callable(node):
            filled.append(None)
        else:
            filled.append(torch.zeros(lead + tuple(shape), dtype=dtype, device=device))
    return filled


def pull(node: Node, grads: dict[int, Tensor], wanted: Collection[int] | None = None) -> list[Tensor | None]:
    """V columns through one node, by closed forms or by autograd's own formula.

    `grads`: output number -> [V, *out]. Returns [V, *in] for each of the node's `next_functions` (at least for those
    that are wanted; None: all); with grad mode on, they carry a graph back to the columns and to what the node saved.
    """
    after = children(node)
    known = None if torch.is_grad_enabled() else ways(node)
    if known is not None and grads.keys() == {0} and not grads[0].is_complex():
        slots = [k for k, edge in enumerate(after) if edge is not None and (wanted is None or k in wanted)]
        if known.keys() >= set(slots):
            out: list[Tensor | None] = [None] * len(after)
            for k in slots:
                edge = after[k]
                assert edge is not None
                out[k] = fit(known[k](node, grads[0], edge.shape), edge, 1)
            return out
    together = None if torch.is_grad_enabled() else joins(node)
    if together is not None and grads and not any(G.is_complex() for G in grads.values()):
        return [None if e is None else fit(together(node, grads, e.shape), e, 1) for e in after]
    V = next(iter(grads.values())).shape[0]
    columns = fill(node, grads, (V,))
    if V == 1:
        out = _apply(node, [None if c is None else c[0] for c in columns])
        found = [None if t is None else t.unsqueeze(0) for t in out]
    else:
        found = _batched(node, columns)
    return [None if t is None or edge is None else fit(t, edge, 1) for t, edge in zip(found, after, strict=True)]


def _batched(node: Node, filled: list[Tensor | None]) -> list[Tensor | None]:
    slots: list[int] = []
    columns = [c for c in filled if c is not None]
    kept = columns if callable(node) else [c.clone() for c in columns]  # a Function may write on what it gets
    width = len(node.next_functions)

    def whole(grads: Iterable[Tensor]) -> list[Tensor | None]:
        its = iter(grads)
        return [None if c is None else next(its) for c in filled]

    def call(*grads: Tensor) -> tuple[Tensor, ...]:
        out = _apply(node, whole(grads))
        slots[:] = [k for k, t in enumerate(out) if t is not None]
        return tuple(out[k] for k in slots)  # type: ignore[misc]

    def looped() -> list[Tensor | None]:
        rows = [_apply(node, whole(c[v].clone() for c in kept)) for v in range(kept[0].shape[0])]
        return [None if r[0] is None else torch.stack([t for t in r if t is not None]) for r in zip(*rows, strict=True)]

    # batched kernels take some of what a node saved (LayerNorm's statistics) for constants: their values are right,
    # their derivatives are not (seen on torch 2.13)
    if type(node).__name__ in _NOT_BATCHED or torch.is_grad_enabled():
        return looped()
    try:
        # "same": a node that recomputes its forward must draw the mask that was drawn, once for all columns
        out = torch.vmap(call, randomness="same")(*columns)
        found: list[Tensor | None] = [None] * width
        for k, t in zip(slots, out, strict=True):
            found[k] = t
        return found
    except Exception:
        # Some backwards (custom Functions, kernels without a batching rule) refuse vmap: a loop is as exact.
        # An error of the node itself comes again from here, in its own words.
        return looped()


@contextlib.contextmanager
def fenced(edges: Sequence[Edge]) -> Iterator[None]:
    """Inside, a gradient taken towards `edges` is the *partial* derivative: nothing flows past any of them.

    Without it, d(a * b)/da for b = f(a) would count the path through b too, as `torch.autograd.grad` does.
    It works because the engine captures a gradient before the node's own pre-hooks see it.
    """
    closed: dict[Node, set[int]] = {}
    for edge in edges:
        if edge.leaf is None:
            closed.setdefault(edge.node, set()).add(edge.nr)
    handles: list[Any] = []
    try:
        for node, numbers in closed.items():
            handles.append(node.register_prehook(_stop(numbers)))
        yield
    finally:
        for numbers in closed.values():
            numbers.clear()  # first: an interrupt may leave a hook behind, which then lets all pass
        for handle in handles:
            handle.remove()


def _stop(numbers: set[int]) -> Callable[[tuple[Tensor | None, ...]], tuple[Tensor | None, ...]]:
    """A hook that lets nothing past these outputs of a node; its other outputs are no business of the fence.

    Nothing, not zeros: those would run what is below, and be differentiated through it again.
    """

    def nothing(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(None if nr in numbers else g for nr, g in enumerate(grads))

    return nothing


def gradients(
    outputs: Sequence[Tensor | Edge],
    edges: Sequence[Edge],
    cotangents: Sequence[Tensor | None],
    *,
    batched: bool = False,
    create_graph: bool = False,
) -> list[Tensor]:
    """`torch.autograd.grad` towards edges, keeping the graph; zeros where nothing arrives.

    With `batched`, cotangents are [V, *out] and so are the results; a kernel that refuses to be batched is
    called V times.
    """
    targets = [GradientEdge(e.node, e.nr) for e in edges]
    heads: list[Any] = [GradientEdge(o.node, o.nr) if isinstance(o, Edge) else o for o in outputs]

    def once(grads: Sequence[Tensor | None], batch: bool) -> list[Tensor | None]:
        return list(
            torch.autograd.grad(
                heads,
                targets,
                list(grads),
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
                is_grads_batched=batch,
            )
        )

    def looped() -> list[Tensor | None]:
        rows = [once([None if c is None else c[v] for c in cotangents], False) for v in range(V)]
        return [None if r[0] is None else torch.stack([t for t in r if t is not None]) for r in zip(*rows, strict=True)]

    V = cotangents[0].shape[0] if batched and cotangents[0] is not None else 0
    if not batched:
        found = once(cotangents, False)
    elif V == 1:
        found = [None if t is None else t[None] for t in once([None if c is None else c[0] for c in cotangents], False)]
    else:
        try:
            found = once(cotangents, True)
            # some kernels answer a batch wrongly (GroupNorm's second derivative, torch 2.13), or in another order: a
            # sum gives them away, if no two columns weigh the same
            whole = once([None if c is None else _weighed_sum(c) for c in cotangents], False)
            if not _adds_up(found, whole):
                found = looped()
        except Exception:  # an error of its own comes again from here
            found = looped()
    lead = (V,) if batched else ()
    result = []
    for t, edge in zip(found, edges, strict=True):
        if t is None:
            shape, dtype, device = meta(edge)
            t = torch.zeros(lead + tuple(shape), dtype=dtype, device=device)
        result.append(t)
    return result


def _weighed_sum(columns: Tensor, *, sizes: bool = False) -> Tensor:  # [V, *out] -> [*out]
    """No two columns weigh the same. sizes: of their sizes, by that of their weights."""
    weights = random((len(columns),), 3, columns.device, columns.dtype)
    rows = columns.reshape(len(columns), -1)
    found = weights.abs() @ rows.abs() if sizes else weights @ rows
    return found.view(columns.shape[1:])


def _adds_up(columns: list[Tensor | None], whole: list[Tensor | None]) -> bool:
    """Is the weighed sum of what columns became what theirs becomes? So it must be: all here is linear in them."""
    for c, w in zip(columns, whole, strict=True):
        if c is None or w is None or c.numel() == 0:
            continue
        off, size = (_weighed_sum(c) - w).abs(), _weighed_sum(c, sizes=True)
        off, size = off.nan_to_num(0, 0, 0), size.nan_to_num(0, 0, 0)
        if bool((off > tolerance(c.dtype) * size.max()).any()):
            return False
    return True


class Bend:
    """The second derivative of one node: how its backward formula depends on what the node was given.

    For a node u with inputs `edges` and loss gradient g at its outputs, `times(t)` is M t with
    M = sum_k g_k d²u_k / d(inputs)², t and the result lists with one [V, *in] for each edge.
    """

    def __init__(self, node: Node, grads: dict[int, Tensor], edges: Sequence[Edge]) -> None:
        self.edges = list(edges)
        slots = [k for k, e in enumerate(children(node)) if e is not None and e in self.edges]
        if differentiable_once(node):
            raise RuntimeError(f"{type(node).__name__} is marked once_differentiable")
        with torch.enable_grad():
            out = _apply(node, fill(node, grads, ()))
            self._heads: list[tuple[int, Tensor]] = []
            for k in slots:
                t, edge = out[k], children(node)[k]
                if t is not None and edge is not None and t.requires_grad:
                    self._heads.append((self.edges.index(edge), fit(t, edge, 0)))

    @property
    def flat(self) -> bool:
        """True when autograd itself says that nothing depends on the inputs."""
        return not self._heads

    def times(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        V = tangents[0].shape[0]
        if self.flat:
            return [torch.zeros_like(t) for t in tangents]
        heads = [t for _, t in self._heads]
        with fenced(self.edges):
            return gradients(heads, self.edges, [tangents[k].expand(V, *h.shape) for k, h in self._heads], batched=True)
