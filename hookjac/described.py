"""The structure of a loss's graph: all there is to say of it but its values, quickly enough to be said at every step.

What a plan finds out by structure alone holds for every graph of the same structure (`passage`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hookjac.checkpoints import is_reentrant
from hookjac.graph import Edge, Node, attributes
from hookjac.tape import Tape

Structure = tuple[Any, ...]


class Described:
    """The nodes of one graph, as they are met coming down from the loss, and its structure."""

    __slots__ = ("nodes", "structure")

    def __init__(self, nodes: list[Node], structure: Structure) -> None:
        self.nodes, self.structure = nodes, structure


def describe(tape: Tape, loss: Tensor, position: Mapping[int, int]) -> Described | None:
    """position: id of a parameter to serve -> its number. None where a graph is no fixed structure (a checkpoint), or
    where something is amiss that the plan has words for."""
    if loss.grad_fn is None:
        return None
    nodes: list[Node] = [loss.grad_fn]
    index: dict[Node, int] = {loss.grad_fn: 0}
    facts: list[Any] = []
    for node in nodes:  # grows as we go
        kind = type(node)
        told = _KINDS.get(kind) or _kind(node)
        facts.append(kind)
        for out in node._input_metadata:
            facts += (tuple(out.shape), out.dtype)
        if told is _LEAF:  # it may have been moved or cast since: then no other graph is like this one
            v = node.variable
            facts += (position.get(id(v), -1), type(v), out.device, v.device, v.dtype, v.shape)
            continue
        if told is _OPENS:
            return None
        if told is not _PLAIN:
            facts.append(told(node))
        for child, nr in node.next_functions:
            k = index.get(child)
            if k is None:
                if child is None:
                    facts.append(None)
                    continue
                k = index[child] = len(nodes)
                nodes.append(child)
            facts += (k, nr)
        marks = node.metadata.get(tape.key)
        if marks is not None:
            facts += [(nr, mark.selected, mark.output) for nr, mark in marks.items() if mark.output]
    return Described(nodes, tuple(facts))


# What does not differ between nodes of one type: what they save besides tensors, as a function that reads it; or that
# there is nothing to read, that it is a leaf, or that it opens when it is called.
_LEAF, _OPENS, _PLAIN = (lambda node: None), (lambda node: None), (lambda node: None)
_KINDS: dict[type, Callable[[Node], Any]] = {}


def _kind(node: Node) -> Callable[[Node], Any]:
    if Edge(node, 0).leaf is not None:
        found: Callable[[Node], Any] = _LEAF
    elif is_reentrant(node):
        found = _OPENS
    else:
        held = {name.removeprefix("_raw") for name in attributes(node, "_raw_saved_")}  # tensors: not to be read
        names = [name for name in attributes(node, "_saved_") if name not in held]
        found = operator.attrgetter(*names) if names else _PLAIN
    if callable(node):  # PyTorch's own types live for ever; a Python Function's may not
        _KINDS[type(node)] = found
    return found
