"""The way of columns through a node, in closed form, against one gradient for each column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import close
from torch import Tensor

from hookjac.graph import edge_of, pull
from hookjac.ways import _JOINS, _WAYS, joins, ways

R = torch.randn
IMAGE: tuple[int, ...] = (2, 3, 6, 5)


def images(**options: Any) -> Callable[..., Tensor]:
    return lambda x: F.max_pool2d(x, **options)


WAYS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "view": (lambda x: x.view(3, 8), [(4, 6)]),
    "unsqueeze": (lambda x: x.unsqueeze(1), [(4, 6)]),
    "squeeze": (lambda x: x.squeeze(), [(4, 1, 6, 1)]),
    "squeeze one": (lambda x: x.squeeze(1), [(4, 1, 6, 1)]),
    "squeeze two": (lambda x: x.squeeze((1, -1)), [(4, 1, 6, 1)]),
    "reshape alias": (lambda x: torch.ops.aten._reshape_alias(x, (3, 8), (8, 1)), [(4, 6)]),
    "unsafe view": (lambda x: torch.ops.aten._unsafe_view(x, (3, 8)), [(4, 6)]),
    "transpose": (lambda x: x.transpose(-1, 0), [(4, 3, 2)]),
    "permute": (lambda x: x.permute(2, 0, -2), [(4, 3, 2)]),
    "t": (lambda x: x.t(), [(4, 3)]),
    "t of a vector": (lambda x: x.t(), [(4,)]),
    "clone": (lambda x: x.clone(), [(4, 3)]),
    "alias": (lambda x: torch.ops.aten.alias(x), [(4, 3)]),
    "expand": (lambda x: x.expand(5, 4, 3), [(4, 1)]),
    "slice": (lambda x: x[:, 1:4], [(4, 6)]),
    "slice with steps": (lambda x: x[:, 1:6:2], [(4, 6)]),
    "slice from the end": (lambda x: x[-3:-1], [(4, 6)]),
    "slice past the end": (lambda x: x[:, 2:100], [(4, 6)]),
    "select": (lambda x: x[:, 2], [(4, 6)]),
    "select from the end": (lambda x: x.select(-1, -2), [(4, 6)]),
    "sum": (lambda x: x.sum(1), [(4, 3, 2)]),
    "sum, kept": (lambda x: x.sum((-1, 0), keepdim=True), [(4, 3, 2)]),
    "mean": (lambda x: x.mean(-1), [(4, 3, 2)]),
    "mean of two": (lambda x: x.mean((0, 2)), [(4, 3, 2)]),
    "mean, kept": (lambda x: x.mean((1,), keepdim=True), [(4, 3, 2)]),
    "add": (lambda x, y: torch.add(x, y, alpha=3), [(4, 3), (3,)]),
    "sub": (lambda x, y: torch.sub(x, y, alpha=0.5), [(4, 1), (4, 3)]),
    "neg": (lambda x: -x, [(4, 3)]),
    "mul": (lambda x, y: x * y, [(4, 3), (4, 3)]),
    "mul, broadcast": (lambda x, y: x * y, [(4, 1), (5, 1, 3)]),
    "mul by a number": (lambda x: x * torch.tensor(3.0), [(4, 3)]),
    "div": (lambda x: x / torch.arange(1.0, 4.0), [(4, 3)]),
    "relu": (lambda x: x.relu(), [(4, 3)]),
    "tanh": (lambda x: x.tanh(), [(4, 3)]),
    "sigmoid": (lambda x: x.sigmoid(), [(4, 3)]),
    "softmax": (lambda x: x.softmax(1), [(4, 3, 2)]),
    "softmax along the last": (lambda x: x.softmax(-1), [(4, 3)]),
    "gelu": (lambda x: F.gelu(x), [(4, 3)]),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), [(4, 3)]),
    "silu": (lambda x: F.silu(x), [(4, 3)]),
    "mm": (lambda x, y: x @ y, [(4, 3), (3, 2)]),
    "bmm": (lambda x, y: torch.bmm(x, y), [(5, 4, 3), (5, 3, 2)]),
    "addmm": (lambda b, x, y: torch.addmm(b, x, y), [(2,), (4, 3), (3, 2)]),
    "addmm with factors": (lambda b, x, y: torch.addmm(b, x, y, beta=0.3, alpha=2), [(4, 1), (4, 3), (3, 2)]),
    "max pool": (images(kernel_size=2), [IMAGE]),
    "max pool, padded": (images(kernel_size=3, stride=3, padding=1), [IMAGE]),
    "max pool, overlapping": (images(kernel_size=3, stride=1), [IMAGE]),
    "max pool, dilated": (images(kernel_size=2, stride=2, dilation=2), [IMAGE]),
    "max pool, rounded up": (images(kernel_size=2, ceil_mode=True), [IMAGE]),
    "max pool of lines": (lambda x: F.max_pool1d(x, 2, 1), [(2, 3, 5)]),
    "max pool of volumes": (lambda x: F.max_pool3d(x, (2, 1, 2)), [(2, 3, 4, 3, 4)]),
    "max pool of one image": (images(kernel_size=2), [(3, 4, 4)]),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (3, 2), w, b), [(4, 5, 3, 2), (3, 2), (3, 2)]),
    "layer norm without scale": (lambda x: F.layer_norm(x, (2,)), [(4, 5, 2)]),
    "group norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(4, 6, 3, 2), (6,), (6,)]),
    "group norm without scale": (lambda x: F.group_norm(x, 3), [(4, 6)]),
    "convolution": (lambda x, w, b: F.conv2d(x, w, b, padding=1), [IMAGE, (4, 3, 3, 3), (4,)]),
    "convolution with everything": (
        lambda x, w: F.conv2d(x, w, stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=3), [IMAGE, (6, 1, 2, 2)]),
    "convolution of lines": (lambda x, w: F.conv1d(x, w, stride=2), [(2, 3, 7), (4, 3, 3)]),
    "convolution of volumes": (lambda x, w: F.conv3d(x, w), [(2, 2, 3, 4, 3), (3, 2, 2, 2, 2)]),
    "convolution with a kernel of one entry": (lambda x, w, b: F.conv2d(x, w, b), [IMAGE, (4, 3, 1, 1), (4,)]),
    "the same with strides": (lambda x, w: F.conv2d(x, w, stride=(2, 3), dilation=2), [IMAGE, (4, 3, 1, 1)]),
    "the same of lines": (lambda x, w: F.conv1d(x, w, stride=3), [(2, 3, 8), (4, 3, 1)]),
    "the same, padded": (lambda x, w: F.conv2d(x, w, stride=2, padding=1), [IMAGE, (4, 3, 1, 1)]),
    "the same in groups": (lambda x, w: F.conv2d(x, w, stride=2, groups=3), [IMAGE, (3, 1, 1, 1)]),
    "the same, transposed": (lambda x, w: F.conv_transpose2d(x, w, stride=2), [IMAGE, (3, 2, 1, 1)]),
    "transposed convolution": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1, groups=1), [IMAGE, (3, 2, 3, 3)]),
}  # fmt: skip


@pytest.mark.parametrize("V", [1, 3])
@pytest.mark.parametrize("name", WAYS)
def test_way(name: str, V: int) -> None:
    run, shapes = WAYS[name]
    inputs = [R(shape).requires_grad_() for shape in shapes]
    out = run(*inputs)
    node = out.grad_fn
    while not ways(node):  # max_pool1d is a view of a pool
        node = node.next_functions[0][0]  # type: ignore[union-attr]
    assert isinstance(node, object)
    G = R(V, *node._input_metadata[0].shape)  # type: ignore[union-attr]
    known = ways(node)
    assert known
    targets = [torch.autograd.graph.GradientEdge(e, nr) for e, nr in node.next_functions if e is not None]  # type: ignore[union-attr]
    head: Any = torch.autograd.graph.GradientEdge(node, 0)
    with torch.no_grad():
        found = pull(node, {0: G}, known.keys())
    wanted = [torch.autograd.grad([head], targets, [g], retain_graph=True) for g in G]
    rows = iter(zip(*wanted, strict=True))
    for k, (e, _) in enumerate(node.next_functions):  # type: ignore[union-attr]
        if e is None:
            continue
        right = torch.stack(list(next(rows)))
        if k in known:
            mine = found[k]
            assert mine is not None
            close(mine, right, (name, k))


def test_all_are_tried() -> None:
    seen = set()
    for run, shapes in WAYS.values():
        stack = [run(*[R(shape).requires_grad_() for shape in shapes]).grad_fn]
        while stack:
            node = stack.pop()
            seen.add(type(node).__name__)
            stack += [below for below, _ in node.next_functions if below is not None]  # type: ignore[union-attr]
    assert _WAYS.keys() <= seen, _WAYS.keys() - seen


JOINS: dict[str, Callable[[Tensor], Any]] = {
    "unbind": lambda x: x.unbind(1),
    "unbind from the end": lambda x: x.unbind(-1),
    "split": lambda x: x.split(2, 1),
    "split with a rest": lambda x: x.split(4, -1),
    "split by sizes": lambda x: x.split([1, 3, 1], 1),
    "chunks": lambda x: x.chunk(3, -2),
}


@pytest.mark.parametrize("missing", ["none", "first", "all but the last"])
@pytest.mark.parametrize("name", JOINS)
def test_join(name: str, missing: str) -> None:
    x = R(3, 5, 6).requires_grad_()
    outs = JOINS[name](x)
    chosen = {"none": range(len(outs)), "first": range(1, len(outs)), "all but the last": [len(outs) - 1]}[missing]
    node = outs[0].grad_fn
    assert joins(node) is not None
    columns = {k: R(4, *outs[k].shape) for k in chosen}
    with torch.no_grad():
        (found,) = pull(node, columns)
    for v in range(4):
        (wanted,) = torch.autograd.grad(
            [outs[k] for k in chosen], x, [columns[k][v] for k in chosen], retain_graph=True
        )
        assert found is not None
        close(found[v], wanted, (name, v), 0)


def test_all_joins_are_tried() -> None:
    assert {type(split(R(3, 5, 6).requires_grad_())[0].grad_fn).__name__ for split in JOINS.values()} == set(_JOINS)


def test_infinite_columns_do_not_leak_through_closed_gates() -> None:
    x = torch.tensor([-1.0, 2.0]).requires_grad_()
    y = x.relu()
    with torch.no_grad():
        (found,) = pull(y.grad_fn, {0: torch.full((3, 2), float("inf"))})
    assert found is not None
    assert torch.equal(found, torch.tensor([0.0, float("inf")]).expand(3, 2))


def test_columns_that_carry_a_graph_go_by_the_node_itself() -> None:
    x = R(4, 3).requires_grad_()
    y = x.tanh()
    G = R(2, 4, 3).requires_grad_()
    (found,) = pull(y.grad_fn, {0: G})
    assert found is not None
    assert found.requires_grad
    assert edge_of(found)
