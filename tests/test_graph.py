"""What autograd's engine does around a node's call, and we do ourselves: pinned for this version of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import close
from torch import Tensor

from hookjac.graph import Bend, Edge, children, differentiable_once, edge_of, fenced, gradients, ordered, pull


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def engine(output: Tensor, inputs: list[Tensor], G: Tensor) -> list[Tensor]:
    """The columns one by one through autograd's own engine."""
    rows = [torch.autograd.grad(output, inputs, g, retain_graph=True) for g in G]
    return [torch.stack(r) for r in zip(*rows, strict=True)]


@pytest.mark.parametrize("V", [1, 3])
def test_broadcast_gradients_are_summed(V: int) -> None:
    a, b, c = leaf(4, 5), leaf(5), leaf(4, 1)
    for out in (a + b, a * c, b * c, torch.where(a > 0, b, c)):
        G = torch.randn(V, 4, 5)
        found = pull(out.grad_fn, {0: G})
        inputs = [e.leaf for e in children(out.grad_fn) if e is not None]
        wanted = engine(out, inputs, G)  # type: ignore[arg-type]
        for f, w in zip([f for f in found if f is not None], wanted, strict=True):
            close(f, w, type(out.grad_fn).__name__)


@pytest.mark.parametrize("V", [1, 3])
def test_unused_outputs_are_zeros(V: int) -> None:
    a = leaf(4, 6)
    _, second, _ = a.split(2, 1)
    G = torch.randn(V, 4, 2)
    (found,) = pull(second.grad_fn, {1: G})
    assert found is not None
    close(found[:, :, 2:4], G, "middle")
    assert not found[:, :, :2].any()
    values, _ = a.max(1)
    (found,) = pull(values.grad_fn, {0: torch.ones(V, 4)})
    assert found is not None
    assert found.sum() == 4 * V


def test_inputs_without_gradient_are_none() -> None:
    a = leaf(3)
    found = pull((a * torch.ones(3)).grad_fn, {0: torch.ones(2, 3)})
    assert found[0] is not None
    assert found[1] is None


class Stubborn(torch.autograd.Function):
    """A backward that no vmap can run, with arguments that are not tensors."""

    @staticmethod
    def forward(ctx: Any, k: int, a: Tensor, name: str, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.k = k
        return k * a * b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        a, b = ctx.saved_tensors
        if g.sum().item() > 1e9:
            raise AssertionError
        return None, ctx.k * g * b, None, ctx.k * g * a


def test_python_functions_and_the_loop_behind_vmap() -> None:
    a, b = leaf(3), leaf(3)
    out = Stubborn.apply(2, a, "x", b)
    G = torch.randn(4, 3)
    for f, w in zip(pull(out.grad_fn, {0: G}), engine(out, [a, b], G), strict=True):
        assert f is not None
        close(f, w, "stubborn")
    frozen = Stubborn.apply(2, a.detach(), "x", b)
    found = pull(frozen.grad_fn, {0: G})
    assert found[0] is None
    close(found[1], engine(frozen, [b], G)[0], "frozen")  # type: ignore[arg-type]


def test_errors_of_a_node_come_in_its_own_words() -> None:
    a = leaf(3)
    out = a.exp()
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        pull(out.grad_fn, {0: torch.ones(2, 3)})


def test_fence_gives_partial_derivatives() -> None:
    a = leaf(4) * 1
    b = a.sin()
    out = (a * b).sum()
    edges = [edge_of(a), edge_of(b)]
    total = gradients([out], edges, [None])
    close(total[0], (b + a * a.cos()).detach(), "total")
    with fenced(edges):
        partial = gradients([out], edges, [None])
    close(partial[0], b.detach(), "partial")
    close(partial[1], a.detach(), "partial")
    close(gradients([out], edges, [None])[0], total[0], "the fence is gone")


def test_bend_of_a_product_with_itself_upstream() -> None:
    """a * f(a): the second derivative in (a, f(a)) held apart is [[0, g], [g, 0]]."""
    a = leaf(4) * 1
    b = a.sin()
    out = a * b
    g = torch.randn(4)
    edges = [edge_of(a), edge_of(b)]
    bend = Bend(out.grad_fn, {0: g}, edges)
    t = [torch.randn(2, 4), torch.randn(2, 4)]
    found = bend.times(t)
    close(found[0], g * t[1], "upper")
    close(found[1], g * t[0], "lower")
    assert Bend((a + b).grad_fn, {0: g}, edges).flat


def test_bend_of_a_square() -> None:
    """Both inputs are one edge."""
    a = leaf(4) * 1
    out, g = a * a, torch.randn(4)
    (found,) = Bend(out.grad_fn, {0: g}, [edge_of(a)]).times([torch.ones(1, 4)])
    close(found[0], 2 * g, "square")


def test_differentiable_once() -> None:
    assert not differentiable_once(Stubborn.apply(2, leaf(3), "x", leaf(3)).grad_fn)
    assert not differentiable_once(leaf(3).exp().grad_fn)


def test_order_is_consumers_first_and_not_recursive() -> None:
    a = leaf(2)
    out = a
    for _ in range(5000):
        out = out * 1
    order = ordered([out.grad_fn], lambda node: [e.node for e in children(node) if e is not None])
    assert len(order) == 5001
    assert order[0] is out.grad_fn
    assert Edge(order[-1], 0).leaf is a
