"""Hessian-vector products by double backward: slower than columns, and exact wherever autograd itself is.

They run over the user's own graph, so they need it to be twice differentiable, and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hookjac.errors import HookjacError
from hookjac.graph import Edge, gradients, meta
from hookjac.progress import Tick, unseen
from hookjac.samples import Layout, random, same

_CHUNK = 1 << 23  # entries of one batch of tangents


@contextlib.contextmanager
def second_backward(names: Sequence[str]) -> Iterator[None]:
    """Say in our words what it means that autograd refuses."""
    try:
        yield
    except RuntimeError as error:
        raise HookjacError(
            f"second derivatives of the loss with respect to {', '.join(names[:3])} need a second backward through "
            f"the graph, and part of it does not allow one ({error}). With torch.utils.checkpoint, pass "
            "use_reentrant=False; a custom autograd.Function needs a differentiable backward."
        ) from error


def units(size: int, step: int, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The unit vectors of a space in chunks [k, size], with the number of the first."""
    for start in range(0, size, step):
        stop = min(size, start + step)
        t = torch.zeros(stop - start, size, dtype=like.dtype, device=like.device)
        t[:, start:stop].fill_diagonal_(1)
        yield start, t


def diagonal(head: Tensor, edge: Edge, *, step: int | None = None, tick: Tick = lambda done: None) -> Tensor:
    """The diagonal of d head / d edge, both of one shape.

    Two products first: if the matrix acts on a random vector as its row sums do, entry by entry, then it is
    diagonal and the row sums are the answer (an L2 penalty, say). Otherwise one product for each entry. The row
    sums alone are *not* the diagonal: that is the mistake this library exists to end.
    """
    shape, dtype, device = meta(edge)
    like = torch.zeros((), dtype=dtype, device=device)
    size = shape.numel()
    if not head.requires_grad or size == 0:
        return like.expand(shape).clone()
    if size > 2:
        probe = torch.stack([torch.ones(shape, device=device, dtype=dtype), random(shape, 7, device, dtype)])
        sums, probed = gradients([head], [edge], [probe], batched=True)[0]
        if same(probed, sums * probe[1]):
            return sums.detach()
    found = []
    for start, t in units(size, step or max(1, _CHUNK // size), like):
        rows = gradients([head], [edge], [t.reshape(-1, *shape)], batched=True)[0].reshape(t.shape[0], size)
        found.append(rows[:, start : start + t.shape[0]].diagonal().clone())
        tick((start + t.shape[0]) / size)
    return torch.cat(found).reshape(shape)


def rows(
    head: Tensor, edge: Edge, layout: Layout, *, tick: Tick = lambda done: None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The rows of d head / d edge of each sample, [N, D, D], a few at a time: the number of the first, the unit columns
    [k, *edge] and what comes of them. D products for the whole batch.

    All samples share a product: they must not interact between this tensor and the loss.
    """
    shape, dtype, device = meta(edge)
    like = torch.zeros((), dtype=dtype, device=device)
    rest = layout.split(like.expand(1, *shape)).shape[2:]
    D = rest.numel()
    for start, t in units(D, max(1, _CHUNK // max(1, shape.numel())), like):
        k = t.shape[0]
        tangent = layout.join(t.reshape(k, 1, *rest).expand(k, layout.N, *rest), shape)
        yield start, tangent, gradients([head], [edge], [tangent], batched=True)[0]
        tick((start + k) / D)


def block(head: Tensor, edge: Edge, layout: Layout, *, diagonal_only: bool, tick: Tick = lambda done: None) -> Tensor:
    """d head / d edge of each sample, [N, D, D], or its diagonal [N, D]; see `rows`."""
    shape, dtype, device = meta(edge)
    if not head.requires_grad:
        like = torch.zeros((), dtype=dtype, device=device)
        D = layout.split(like.expand(1, *shape)).shape[2:].numel()
        return like.expand(layout.N, D).clone() if diagonal_only else like.expand(layout.N, D, D).clone()
    found = []
    for start, _, made in rows(head, edge, layout, tick=tick):
        some = layout.features(made)  # [k, N, D]
        if diagonal_only:
            found.append(some[:, :, start : start + len(some)].diagonal(dim1=0, dim2=2))  # [N, k]
        else:
            found.append(some.transpose(0, 1))
    return torch.cat(found, 1)


def matrix(head: Tensor, edge: Edge, *, tick: Tick = lambda done: None) -> Tensor:
    """d head / d edge as a whole, [P, P]: one product for each entry."""
    shape, dtype, device = meta(edge)
    like = torch.zeros((), dtype=dtype, device=device)
    size = shape.numel()
    if not head.requires_grad or size == 0:
        return like.expand(size, size).clone()
    found = []
    for start, t in units(size, max(1, _CHUNK // max(1, size)), like):
        rows = gradients([head], [edge], [t.reshape(-1, *shape)], batched=True)[0]
        found.append(rows.reshape(t.shape[0], size))
        tick((start + t.shape[0]) / size)
    full = torch.cat(found)
    return (full + full.T) / 2


class Product:
    """The Hessian of a sum of samples' losses (or of a penalty) in one parameter, by double backward.

    name: of the parameter. edge: where its gradient flows. heads: from numbers of samples to their gradient,
    differentiable; None stands for all that are asked for.
    """

    def __init__(
        self,
        name: str,
        edge: Edge,
        heads: Callable[[Sequence[int] | None], Tensor],
        samples: Sequence[int] = (),
        work: Callable[[], contextlib.AbstractContextManager[Tick]] = unseen,
    ) -> None:
        self.name, self.edge, self.samples = name, edge, samples
        self._heads, self._work = heads, work

    @functools.cached_property
    def head(self) -> Tensor:
        """The gradient itself, [*p]."""
        return self._heads(None)

    @functools.cached_property
    def _diagonal(self) -> Tensor:
        with second_backward([self.name]), torch.enable_grad(), self._work() as tick:
            return diagonal(self.head, self.edge, tick=tick)

    def diagonal(self) -> Tensor:  # -> [*p]
        return self._diagonal

    def diagonals(self) -> Tensor:  # -> [M, *p]
        """Of each sample by itself."""
        found = []
        with second_backward([self.name]), torch.enable_grad(), self._work() as tick:
            for k, n in enumerate(self.samples):
                found.append(diagonal(self._heads([n]), self.edge))
                tick((k + 1) / len(self.samples))
        return torch.stack(found) if found else torch.zeros((0, *meta(self.edge)[0]))

    def matrix(self) -> Tensor:  # -> [P, P]
        with second_backward([self.name]), torch.enable_grad(), self._work() as tick:
            return matrix(self.head, self.edge, tick=tick)
