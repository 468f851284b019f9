"""Products of a whole model's curvature with vectors, by double backward, on a graph that is kept alive.

K vectors at once · P entries of all parameters together, in the order of `model.parameters()`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hookjac import given, handover
from hookjac.errors import HookjacError
from hookjac.graph import Edge, edge_of, fenced, gradients, meta
from hookjac.plan import Plan
from hookjac.products import second_backward
from hookjac.sharded import in_one_piece

Quiet = Callable[[], contextlib.AbstractContextManager[None]]


class Curvature:
    """The Hessian, or the generalised Gauss-Newton matrix, of one backward's loss: a [P, P] linear operator.

    `C @ v` for v [P] or [P, K]; P runs over the trainable parameters in the order of `model.parameters()`, each in
    row-major order. Penalties are part of both. Exact to rounding. Cost: two (Hessian) or three (GGN) backwards for all
    K together. It keeps the graph of that backward alive; once a parameter was modified in place, PyTorch refuses.
    """

    def __init__(self, kind: Literal["ggn", "hessian"], plan: Plan, edges: Sequence[Edge], quiet: Quiet) -> None:
        if not isinstance(plan, Plan):
            raise TypeError(
                "a Curvature is made by a backward, ext.hessian of extend(model, 'hess_mp') or ext.ggn, and not of "
                + given.said(plan)
            )
        self.kind, self._quiet = kind, quiet
        self._names: Mapping[int, str] = plan.names
        self._params = {p: edge_of(t) for p, t in plan.params.items()}
        self._sizes = {p: t.numel() for p, t in plan.params.items()}
        owners = {id(t): m for m in plan.route.tape.names for t in m._parameters.values() if t is not None}
        self._owners = weakref.WeakValueDictionary({p: owners[p] for p in plan.params if p in owners})
        plan.demand_graph()
        with second_backward(list(plan.names.values())):
            with torch.enable_grad():
                if kind == "ggn":
                    self._prepare(plan, [plan.route.real(e) for e in edges] if plan.N else [])
                elif plan.N:
                    self._first = gradients([plan.top.loss], list(self._params.values()), [None], create_graph=True)
                else:  # of no sample there are penalties only, and not every node can be empty
                    self._first = [plan.top.direct.get(p, torch.zeros_like(t)) for p, t in plan.params.items()]

    def _prepare(self, plan: Plan, outputs: list[Edge]) -> None:
        """The loss's slope in the outputs, and the transposed Jacobian as a function of cotangents."""
        self._outputs = outputs
        with fenced(outputs):
            self._slopes = gradients([plan.top.loss], outputs, [None], create_graph=True) if outputs else []
        found = [meta(e) for e in outputs]
        self._at = [torch.zeros(s, dtype=d, device=v, requires_grad=True) for s, d, v in found]
        params = list(self._params.values())
        self._pulled = dict(
            zip(self._params, gradients(outputs, params, self._at, create_graph=True), strict=True) if outputs else ()
        )
        self._penalties = dict(plan.top.direct)

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        P = sum(self._sizes.values())
        return P, P

    def __repr__(self) -> str:
        return f"Curvature({self.kind}, {self.shape[0]} parameters)"

    def __matmul__(self, v: Tensor) -> Tensor:
        v = in_one_piece(v)
        rows = given.vectors(v, self.shape[0])
        parts = rows.split(list(self._sizes.values()), 1)
        vectors = {p: t.reshape(len(rows), *meta(e)[0]) for (p, e), t in zip(self._params.items(), parts, strict=True)}
        found = self.products(vectors)
        return torch.cat([t.reshape(len(rows), self._sizes[p]) for p, t in found.items()], 1).T.reshape(v.shape)

    def block(self, p: int) -> Block:
        """Products with the block of one parameter: [K, *p] -> [K, *p], or [*p] -> [*p]."""
        made = Block(self, p, self._names[p], meta(self._params[p])[0])
        owner = self._owners.get(p)
        if owner is None:  # a model that lists what lies in no layer: nobody else can keep it
            made.held = self
        else:
            _KEPT.setdefault(owner, weakref.WeakKeyDictionary())[made] = self
        return made

    def products(self, vectors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """[K, *p] for the ids of some parameters -> the same, of the block that they span."""
        params = {p: self._params[p] for p in vectors}
        vectors = {p: given.real("vectors", v, *meta(params[p])[1:]) for p, v in vectors.items()}
        # with no vector, too: ranks may meet here
        with torch.inference_mode(False), torch.enable_grad(), self._quiet():
            if not next(iter(vectors.values())).shape[0]:
                return {p: torch.zeros_like(v) for p, v in vectors.items()}
            try:
                if self.kind == "hessian":
                    heads = [h for p, h in zip(self._params, self._first, strict=True) if p in vectors]
                    return self._backward(heads, list(vectors.values()), params)
                return self._gauss_newton(vectors, params)
            except RuntimeError as error:
                raise HookjacError(
                    f"a product with the {self.kind} needs the graph of the backward that made it, and autograd "
                    f"refuses ({error}). Take products before the optimizer's step, or run the backward again."
                ) from error

    def _gauss_newton(self, vectors: Mapping[int, Tensor], params: Mapping[int, Edge]) -> dict[int, Tensor]:
        out = {p: torch.zeros_like(v) for p, v in vectors.items()}
        used = [p for p in params if p in self._pulled and self._pulled[p].requires_grad]
        if used:
            at = [edge_of(u) for u in self._at]
            forward = gradients([self._pulled[p] for p in used], at, [vectors[p] for p in used], batched=True)
            curved = [k for k, h in enumerate(self._slopes) if h.requires_grad]
            if curved:
                with fenced(self._outputs):
                    back = gradients(
                        [self._slopes[k] for k in curved], self._outputs, [forward[k] for k in curved], batched=True
                    )
                found = gradients(self._outputs, list(params.values()), back, batched=True)
                out = {p: t + f for (p, t), f in zip(out.items(), found, strict=True)}
        both = [p for p in vectors if p in self._penalties]
        if both:
            added = self._backward([self._penalties[p] for p in both], [vectors[p] for p in both], params)
            out = {p: t + added[p] for p, t in out.items()}
        return out

    def _backward(
        self, heads: Sequence[Tensor], cotangents: Sequence[Tensor], params: Mapping[int, Edge]
    ) -> dict[int, Tensor]:
        K = cotangents[0].shape[0]
        used = [k for k, h in enumerate(heads) if h.requires_grad]
        if not used:
            return {p: torch.zeros((K, *meta(e)[0]), dtype=meta(e)[1], device=meta(e)[2]) for p, e in params.items()}
        found = gradients([heads[k] for k in used], list(params.values()), [cotangents[k] for k in used], batched=True)
        return dict(zip(params, found, strict=True))

    @property
    def T(self) -> Curvature:
        """Itself: it is symmetric."""
        return self

    def to_scipy(self) -> Any:
        """A `scipy.sparse.linalg.LinearOperator` (needs scipy), for its solvers and eigenvalue routines."""
        return handover.to_scipy(self, *self._like)

    def as_linear_operator(self) -> Any:
        """A `linear_operator.LinearOperator` (needs that package, the one under GPyTorch), for its solvers."""
        return handover.as_linear_operator(self, *self._like)

    def to_curvlinops(self) -> Any:
        """A `PyTorchLinearOperator` of curvlinops (needs that package, below 4), for its traces and spectra."""
        shapes = [meta(e)[0] for e in self._params.values()]
        return handover.to_curvlinops(self, shapes, shapes, *self._like)

    @property
    def _like(self) -> tuple[torch.dtype, torch.device]:
        return meta(next(iter(self._params.values())))[1:]


# layer -> block of a parameter of its -> what that needs. A graph holds its parameters where the garbage collector does
# not see it: one that held its graph in turn would live forever, and the model with it.
_KEPT: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[Block, Curvature]] = weakref.WeakKeyDictionary()


class Block:
    """`p.hess_mp`, `p.ggn_mp`: products with one parameter's block, [K, *p] -> [K, *p] or [*p] -> [*p].

    As long as it lives, and the layer whose parameter that is, so does the graph.
    """

    held: Curvature | None = None

    def __init__(self, curvature: Curvature, p: int, name: str, shape: torch.Size) -> None:
        self._curvature, self._p, self.name, self.shape = weakref.ref(curvature), p, name, shape
        self._said = f"products with the {curvature.kind} block of {name!r} {tuple(shape)}"

    def __call__(self, v: Tensor) -> Tensor:
        shape = self.shape
        if not isinstance(v, Tensor) or v.shape[v.dim() - len(shape) :] != shape or v.dim() - len(shape) not in (0, 1):
            found = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"expected vectors of shape [*p] or [K, *p] with p = {tuple(shape)}, got {found}")
        curvature = self._curvature()
        if curvature is None:
            raise HookjacError(
                f"{self._said} need their layer, which nobody holds any more. Keep the model, or what extend returned."
            )
        v = in_one_piece(v)
        rows = v.reshape(-1 if v.numel() else v.shape[0], *shape)
        return curvature.products({self._p: rows})[self._p].reshape(v.shape)

    def __repr__(self) -> str:
        return self._said

    def __deepcopy__(self, memo: Any) -> Block:
        return self

    def __reduce__(self) -> Any:
        return Gone, (repr(self),)  # a graph cannot be saved; the model that it hangs on can


class Gone:
    """What is left of products after pickling."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, v: Tensor) -> Tensor:
        raise HookjacError(f"{self.what} needed the graph of their backward, which was not saved. Run it again.")

    def __reduce__(self) -> Any:
        return Gone, (self.what,)
