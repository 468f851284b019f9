"""`torch.utils.checkpoint`: parts of a graph whose tensors were thrown away and are computed again.

A reentrant checkpoint is one node with a function inside: it is run again and its graph takes the node's place.
A non-reentrant one is an ordinary graph whose saved tensors come back when asked for; outside of a backward, every
single one of them would run the whole part again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import GraphExecGroup, detach_variable, set_device_states

from hookjac.graph import Edge, Node, attributes, children, edge_of


def is_reentrant(node: Node) -> bool:
    return type(node).__name__ == "CheckpointFunctionBackward"


def is_hidden(node: Node) -> bool:
    """Does a non-reentrant checkpoint hold what this node saved, or what the one below that it reshapes did?"""
    for _ in range(4):
        if node is None or attributes(node, "_raw_saved_"):
            break
        node = next((below for below, _ in node.next_functions if below is not None), None)
    return node is not None and next(_holders(node), None) is not None


def reopen(node: Node) -> tuple[list[Tensor], dict[Edge, Edge], tuple[Any, ...]]:
    """Run a reentrant checkpoint's function again with grad, in the random state it ran in.

    Returns its outputs (an entry for each of the node's, which need not be tensors); where edges at its new inputs
    lead in the graph around it; and what must be kept alive with the new graph.
    """
    inputs, tensors = list(node.inputs), node.saved_tensors
    for k, index in enumerate(node.tensor_indices):
        inputs[index] = tensors[k]
    devices = getattr(node, "fwd_devices", [])
    with torch.random.fork_rng(devices, enabled=node.preserve_rng_state, device_type=node.device_type):
        if node.preserve_rng_state:
            torch.set_rng_state(node.fwd_cpu_state)
            if node.had_device_in_fwd:
                set_device_states(node.fwd_devices, node.fwd_device_states, device_type=node.device_type)
        fresh = detach_variable(tuple(inputs))
        cast = torch.autocast(node.device_type, **node.device_autocast_kwargs)
        with torch.enable_grad(), cast, torch.autocast("cpu", **node.cpu_autocast_kwargs):
            outputs = node.run_function(*fresh)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # the function's tensor arguments, in order, are the node's children, in order
    given = [t for t in fresh if isinstance(t, Tensor)]
    after = children(node)
    joints = {
        edge_of(tensor): outer
        for tensor, outer in zip(given, after[len(after) - len(given) :], strict=True)
        if outer is not None and tensor.requires_grad
    }
    return list(outputs), joints, (fresh, outputs)


class Recomputed:
    """While open, each non-reentrant checkpoint that was met runs once; its tensors live until the end.

    torch has the means (`GraphExecGroup`: one run for a group of backwards), but hands out each tensor once. So the
    holders of the nodes that were met are made to keep what they handed out.
    """

    def __init__(self) -> None:
        self._group = GraphExecGroup()
        self._kept: dict[Any, Any] = {}  # holder -> its own handles

    def __enter__(self) -> Recomputed:
        # inside a group of the user's: theirs; two cannot be open at once
        self._outer = torch._C._get_graph_exec_group()  # type: ignore[attr-defined]
        try:
            torch._C._set_graph_exec_group(self._group)  # type: ignore[attr-defined]
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._close()
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        torch._C._set_graph_exec_group(self._outer)  # type: ignore[attr-defined]
        for holder, handles in self._kept.items():
            holder.handles = handles
        self._kept.clear()

    @property
    def any(self) -> bool:
        """Was one met?"""
        return bool(self._kept)

    def meet(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            for holder in _holders(node):
                if holder not in self._kept:
                    self._kept[holder], holder.handles = holder.handles, _Handles(holder.handles)


class _Handles(dict[Any, Any]):
    """Where a holder finds its tensor: not forgotten when it is handed out."""

    def __setitem__(self, group: Any, handle: Any) -> None:
        if handle is not None:
            super().__setitem__(group, handle)


def _holders(node: Node) -> Iterator[Any]:
    """What stands in for the saved tensors of a node within a non-reentrant checkpoint."""
    for name in attributes(node, "_raw_saved_"):
        with contextlib.suppress(RuntimeError):  # freed: the user's backward will say so
            saved = getattr(node, name)
            for raw in saved if isinstance(saved, (list, tuple)) else (saved,):
                found = None if raw is None else raw.data
                if hasattr(found, "handles"):
                    yield found
                elif isinstance(found, Tensor):
                    return  # of an ordinary node
