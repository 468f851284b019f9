"""Backends for laplace-torch: `Laplace(model, ..., backend=HookjacGGN)`; and the predictive without a Jacobian.

N samples of a batch · C outputs · P entries of the parameters that the posterior is over, in the order of
`model.parameters()`
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hookjac import given
from hookjac.clients.laplace_kron import LAPLACE, Blocks, Fisher, Sharing, entries, kron_of
from hookjac.errors import HookjacError, needed_by
from hookjac.extend import extend
from hookjac.jacobian import Jacobian
from hookjac.kronecker import Kronecker, KroneckerEigen
from hookjac.quantity import Quantity

with needed_by(*LAPLACE):
    from laplace import DiagLaplace, FullLaplace, KronLaplace, LLLaplace, ParametricLaplace, SubnetLaplace
    from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface
    from laplace.utils.matrix import KronDecomposed

Inputs = Tensor | MutableMapping[str, Any]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_ROWS = 1 << 22  # entries of the dense Jacobian that are built at once


class HookjacInterface(CurvatureInterface):  # type: ignore[misc]
    """What the backends share: one forward, one backward, and the Jacobian of any model, in reverse mode.

    Whatever the model does with its parameters is part of the answer: weights that are shared, what follows the last
    layer. In a last-layer posterior all parameters of that layer take part, frozen or not, as Laplace counts them.
    sharing: what `hookjac.KFAC` makes of weights that are used at many positions.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        *args: Any,
        sharing: Sharing = "expand",
        **kwargs: Any,
    ) -> None:
        given.model(type(self).__name__, model)
        given.choice(("expand", "reduce"), sharing=sharing)
        if not isinstance(likelihood, str) or likelihood not in ("classification", "regression"):
            raise ValueError(
                f"the likelihood of a backend is 'classification' or 'regression', got {given.said(likelihood)}"
            )
        given.flag(last_layer=last_layer)
        if last_layer and not isinstance(getattr(model, "last_layer", None), nn.Module):
            raise HookjacError(
                f"{type(model).__name__} has no module `last_layer`, and last_layer=True was given. Wrap the model in "
                "laplace.utils.FeatureExtractor, or let Laplace(..., subset_of_weights='last_layer') do it."
            )
        super().__init__(model, likelihood, last_layer, subnetwork_indices, *args, **kwargs)  # type: ignore[arg-type]
        self.sharing = sharing
        if self.last_layer:
            self.params = list(self._model.parameters())
        if subnetwork_indices is not None:
            _demand_places(subnetwork_indices, sum(p.numel() for p in self.params))

    # One walk ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _walk(
        self,
        x: Inputs,
        asked: str | Quantity,
        params: Sequence[nn.Parameter],
        head: Callable[[Tensor], Tensor] = torch.sum,
        *,
        create_graph: bool = False,
    ) -> Iterator[tuple[extend, Tensor]]:
        """The model's output [N, C]; meanwhile the parameters have what was asked for, of the number `head` makes."""
        ext = extend(self.model, asked, create_graph=create_graph)
        name = ext.quantities[0].name
        before = {p: vars(p)[name] for p in self.model.parameters() if name in vars(p)}  # of the user's own
        with torch.inference_mode(False), torch.enable_grad(), _only(self.model, params, freeze=not create_graph):
            with ext:
                f = self.model(_plain(x))
                if f.dim() != 2:
                    raise HookjacError(
                        f"the model's output has shape {tuple(f.shape)}; Laplace counts outputs by the last axis and "
                        "samples by the first: let the model return [N, C]."
                    )
                torch.autograd.grad(head(f), params, allow_unused=True, create_graph=create_graph)
            try:
                yield ext, f
            finally:
                for p in params:
                    vars(p).pop(name, None)
                for p, value in before.items():
                    setattr(p, name, value)

    def _chosen(self) -> tuple[list[nn.Parameter], Tensor | None]:
        """The parameters that take part, and, of a subnetwork, the places of its entries among theirs."""
        indices = self.subnetwork_indices
        if indices is None:
            return self.params, None
        sizes = torch.tensor([p.numel() for p in self.params], device=indices.device)
        owner = torch.searchsorted(sizes.cumsum(0), indices, right=True)
        used = torch.zeros_like(sizes, dtype=torch.bool)
        used[owner] = True
        skipped = torch.where(used, torch.zeros_like(sizes), sizes).cumsum(0)
        params = [p for p, here in zip(self.params, used.tolist(), strict=True) if here]
        return params, indices - skipped[owner]

    # Jacobians -----------------------------------------------------------------------------------------------

    def jacobians(self, x: Inputs, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """[N, C, P], and the outputs [N, C]; both with a graph if `enable_backprop`."""
        return self._jacobians(x, enable_backprop, *self._chosen())

    functorch_jacobians = jacobians

    def last_layer_jacobians(self, x: Inputs, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """The same, in the parameters of the last layer."""
        last: Any = self.model.last_layer
        return self._jacobians(x, enable_backprop, list(last.parameters()), None)

    def _jacobians(
        self, x: Inputs, graph: bool, params: Sequence[nn.Parameter], places: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with self._walk(x, "jac", params, create_graph=graph) as (ext, f):
            Js = _dense(ext.jacobian, slice(None), places)
            return (Js, f) if graph else (Js.detach(), f.detach())

    def selected_output_jacobians(
        self, x: Inputs, outputs: Tensor, enable_backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """[N, S, P]: for each sample the rows of its own `outputs` [N] or [N, S], for S backwards and not C."""
        if not isinstance(outputs, Tensor) or outputs.dtype not in _INTEGERS or outputs.dim() not in (1, 2):
            raise TypeError(f"outputs must be a tensor [N] or [N, S] of integers, got {given.said(outputs)}")
        outputs = outputs.unsqueeze(1) if outputs.dim() == 1 else outputs
        if outputs.shape[1] == 0:
            raise ValueError(f"outputs must name an output of each sample at least, got {given.said(outputs)}")
        params, places = self._chosen()
        rows = []
        for column in outputs.split(1, 1):

            def head(f: Tensor, column: Tensor = column) -> Tensor:
                if len(column) != len(f):
                    raise ValueError(f"outputs are given for {len(column)} inputs, the batch has {len(f)}")
                if bool(((column < 0) | (column >= f.shape[1])).any()):
                    raise ValueError(
                        f"outputs must be from 0 to {f.shape[1] - 1}, got {column.flatten().tolist()!r:.80}"
                    )
                return f.gather(1, column.to(f.device, torch.long)).sum()

            with self._walk(x, "grad_sample", params, head, create_graph=enable_backprop) as (_, f):
                rows.append(_taken(params, "grad_sample", places))
        Js = torch.stack(rows, 1)
        return (Js, f) if enable_backprop else (Js.detach(), f.detach())

    def gradients(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        """[N, P], and the summed loss, neither with Laplace's `factor`."""
        params, places = self._chosen()
        with self._walk(x, "grad_sample", params, self._loss(y)) as (_, f):
            return _taken(params, "grad_sample", places), self.lossfunc(f, y).detach()

    # What classes add ----------------------------------------------------------------------------------------

    def _loss(self, y: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda f: self.lossfunc(f, y)

    def _scaled(self, f: Tensor, y: Tensor) -> Tensor:
        return self.factor * self.lossfunc(f, y).detach()

    def _diag(self, x: Inputs, y: Tensor, asked: str) -> tuple[Tensor, Tensor]:
        params, places = self._chosen()
        with self._walk(x, asked, params, self._loss(y)) as (_, f):
            found = torch.cat([getattr(p, asked).reshape(-1) for p in params])
            return self._scaled(f, y), self.factor * (found if places is None else found[places])

    def _kron(
        self, x: Inputs, y: Tensor, N: int, fisher: Fisher, kfac_approx: Sharing | None, samples: int = 1
    ) -> tuple[Tensor, Blocks]:
        if self.subnetwork_indices is not None:
            raise ValueError("a subnetwork has no Kronecker factors: use hessian_structure 'full' or 'diag'")
        given.counts(1, N=N)
        asked = entries(fisher, samples, self.sharing if kfac_approx is None else kfac_approx)
        with self._walk(x, asked, self.params, self._loss(y)) as (_, f):
            return self._scaled(f, y), self.factor * kron_of(self.model, self.params, len(f), N)


class HookjacGGN(HookjacInterface, GGNInterface):  # type: ignore[misc]
    """The generalised Gauss-Newton matrix (for these likelihoods the Fisher information); sampled if `stochastic`.

    `full` and `diag` are exact; with `stochastic` they draw `num_samples` labels a sample, as Laplace's own do.
    """

    def __init__(self, model: nn.Module, likelihood: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, likelihood, *args, **kwargs)
        given.flag(stochastic=self.stochastic)
        given.counts(1, num_samples=self.num_samples)

    def _metric(self, f: Tensor) -> Tensor:  # [N, C] -> [N, C] or [N, C, C]
        f = f.detach()
        if self.stochastic:
            return self._get_mc_functional_fisher(f)
        found = self._get_functional_hessian(f)
        return torch.ones_like(f) if found is None else found

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss and [P]."""
        params, places = self._chosen()
        with self._walk(x, "jac", params) as (ext, f):
            found = ext.jacobian.diagonal(self._metric(f))
            return self._scaled(f, y), found if places is None else found[places]

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss and [P, P]; of the Jacobian, a few samples at a time."""
        params, places = self._chosen()
        with self._walk(x, "jac", params) as (ext, f):
            metric = self._metric(f)
            P = ext.jacobian.shape[1] if places is None else len(places)
            found = f.new_zeros(P, P).detach()
            for n in _steps(ext.jacobian):
                J = _dense(ext.jacobian, n, places)  # [n, C, P]
                W = metric[n].unsqueeze(2) * J if metric.dim() == 2 else metric[n] @ J
                found.addmm_(J.flatten(0, 1).T, W.flatten(0, 1))
            return self._scaled(f, y), found

    def kron(  # type: ignore[override]
        self, x: Inputs, y: Tensor, N: int, *, kfac_approx: Sharing | None = None, mc_samples: int | None = None
    ) -> tuple[Tensor, Blocks]:
        """The loss and an entry for each parameter: see the page docs/laplace.md for what each layer gets."""
        samples = self.num_samples if mc_samples is None else mc_samples
        return self._kron(x, y, N, "mc" if self.stochastic else "exact", kfac_approx, samples)


class HookjacEF(HookjacInterface, EFInterface):  # type: ignore[misc]
    """The empirical Fisher information: outer products of the gradients of samples.

    For regression Laplace's `factor` of one half stands outside the square, so that it is twice that of the likelihood.
    """

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss and [P], without the gradients of single samples."""
        return self._diag(x, y, "grad_sq_sum")

    def kron(  # type: ignore[override]
        self, x: Inputs, y: Tensor, N: int, *, kfac_approx: Sharing | None = None
    ) -> tuple[Tensor, Blocks]:
        """The loss and an entry for each parameter."""
        return self._kron(x, y, N, "empirical", kfac_approx)


class HookjacHessian(HookjacInterface):
    """The Hessian itself, `full` or its exact `diag`. Away from a minimum it need not be positive."""

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss and [P, P]: products with unit vectors, 64 at once."""
        params, places = self._chosen()
        with self._walk(x, "hess_mp", params, self._loss(y)) as (ext, f):
            units = torch.eye(ext.hessian.shape[0], dtype=f.dtype, device=f.device)
            units = units if places is None else units[places]
            found = torch.cat([(ext.hessian @ some.T).T for some in units.split(64)])
            return self._scaled(f, y), self.factor * (found if places is None else found[:, places])

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss and [P]."""
        return self._diag(x, y, "hess_diag")

    def kron(self, x: Inputs, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Blocks]:
        """There is none."""
        raise NotImplementedError("the Hessian has no Kronecker factors: use HookjacGGN, or 'full' or 'diag'")


# The predictive --------------------------------------------------------------------------------------------------


def functional_variance(la: ParametricLaplace, x: Inputs) -> tuple[Tensor, Tensor]:
    """The linearised model's mean [N, C] and covariance J Σ Jᵀ [N, C, C], as `la(x)` has them inside, without its J.

    la: a fitted Laplace of structure diag, kron or full, over all weights, the last layer or a subnetwork, with any
    backend. Equal to rounding to `la.functional_variance(J)`. No [N, C, P] is built: layers with sides keep their
    factors, of the rest a few samples are built at a time. Differentiable if `la.enable_backprop`.
    """
    if not isinstance(la, (DiagLaplace, KronLaplace, FullLaplace)):
        raise TypeError(f"functional_variance takes a Laplace of structure diag, kron or full, got {type(la).__name__}")
    if la.H is None or (isinstance(la, KronLaplace) and not isinstance(la.H, KronDecomposed)):
        raise HookjacError(f"this {type(la).__name__} is not fitted: call la.fit(train_loader) first")
    kind = "regression" if la.likelihood == "regression" else "classification"
    subnet = la.backend.subnetwork_indices if isinstance(la, SubnetLaplace) else None
    backend = HookjacGGN(la.model, kind, last_layer=isinstance(la, LLLaplace), subnetwork_indices=subnet)
    params, places = backend._chosen()
    with backend._walk(x, "jac", params, create_graph=la.enable_backprop) as (ext, f):
        J = ext.jacobian
        if isinstance(la, FullLaplace):
            roots = [_dense(J, n, places) @ la.posterior_scale for n in _steps(J)]
            found = torch.cat([R @ R.transpose(1, 2) for R in roots])
        elif isinstance(la, KronLaplace):
            found = J.variance(_inverse(la.posterior_precision, params))
        else:
            S = la.posterior_variance
            found = J.variance(S if places is None else S.new_zeros(J.shape[1]).index_put((places,), S))
        return (f, found) if la.enable_backprop else (f.detach(), found.detach())


def _inverse(precision: KronDecomposed, params: Sequence[nn.Parameter]) -> list[KroneckerEigen]:
    found = []
    parts = zip(precision.eigenvectors, precision.eigenvalues, precision.deltas, params, strict=True)
    for vectors, values, delta, p in parts:
        Q_B, Q_A = vectors[0].unsqueeze(0), vectors[1].unsqueeze(0) if len(vectors) > 1 else None
        b, a = values[0], values[1] if len(values) > 1 else values[0].new_ones(1)
        if precision.damping and Q_A is not None:
            root = delta.sqrt()
            raised = torch.outer(b + root, a + root)
        else:
            raised = torch.outer(b, a) + delta
        sides = [(Q * t) @ Q.T for Q, t in zip(vectors, values, strict=True)]
        source = Kronecker(sides[1] if len(sides) > 1 else None, sides[0], p.shape)
        found.append(KroneckerEigen(Q_A, Q_B, 1 / raised.unsqueeze(0), source))
    return found


def _plain(x: Inputs) -> Inputs:
    """What was made in inference mode as tensors that a backward may use."""
    if isinstance(x, Tensor):
        return x.clone() if x.is_inference() else x
    if not isinstance(x, MutableMapping):
        raise TypeError(f"x must be a tensor [N, ...], or a mapping of names to tensors; got {given.said(x)}")
    made = {key: t for key, t in x.items() if isinstance(t, Tensor) and t.is_inference()}
    if made:
        x = copy.copy(x)
        x.update({key: t.clone() for key, t in made.items()})
    return x


def _demand_places(indices: Any, P: int) -> None:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1 or not len(indices):
        raise TypeError(f"subnetwork_indices must be a tensor [K] of torch.int64, got {given.said(indices)}")
    if not 0 <= int(indices.min()) <= int(indices.max()) < P:
        raise ValueError(
            f"subnetwork_indices must be from 0 to {P - 1}, as the model's trainable parameters have {P} entries; got "
            f"{int(indices.min())} to {int(indices.max())}"
        )


# Rows of Jacobians -----------------------------------------------------------------------------------------------


def _steps(J: Jacobian) -> Iterator[slice]:
    step = max(1, _ROWS // max(1, J.C * J.shape[1]))
    return (slice(n, n + step) for n in range(0, J.N, step))


def _dense(J: Jacobian, n: slice, places: Tensor | None) -> Tensor:  # -> [n, C, P]
    parts = [jac[n].to_dense().flatten(1 + len(jac.out)).flatten(1, -2) for jac in J.parts.values()]
    rows = torch.cat(parts, 2)
    return rows if places is None else rows[:, :, places]


def _taken(params: Sequence[nn.Parameter], name: str, places: Tensor | None) -> Tensor:  # -> [N, P]
    rows = torch.cat([getattr(p, name).flatten(1) for p in params], 1)
    return rows if places is None else rows[:, places]


@contextlib.contextmanager
def _only(model: nn.Module, params: Sequence[nn.Parameter], *, freeze: bool) -> Iterator[None]:
    """These require a gradient, and, with `freeze`, no others: no graph is kept below the last layer."""
    wanted = {id(p) for p in params}
    switched = [
        p for p in model.parameters() if p.requires_grad != (id(p) in wanted) and (freeze or not p.requires_grad)
    ]
    try:
        for p in switched:
            p.requires_grad_(not p.requires_grad)
        yield
    finally:
        for p in switched:
            p.requires_grad_(not p.requires_grad)
