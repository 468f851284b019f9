"""What hookjac must equal: plain float64 loops over outputs, samples and parameter entries. No vmap anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

RTOL = 1e-10


def grad(output: Tensor, inputs: Tensor, seed: Tensor | None = None) -> Tensor:
    """d <seed, output> / d inputs, zeros where there is no path."""
    if not output.requires_grad:
        return torch.zeros_like(inputs)
    (found,) = torch.autograd.grad(output, inputs, seed, retain_graph=True, create_graph=True, allow_unused=True)
    return torch.zeros_like(inputs) if found is None else found


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def jacobian(output: Tensor, p: Tensor) -> Tensor:  # [N, *out, *p]
    rows = [grad(entry, p).detach() for entry in output.reshape(-1)]
    return torch.stack(rows).reshape(*output.shape, *p.shape) if rows else p.new_zeros(*output.shape, *p.shape)


def hessian_diagonal(loss: Tensor, p: Tensor) -> Tensor:  # [*p]
    first = grad(loss, p).reshape(-1)
    entries = [grad(first[k], p).reshape(-1)[k].detach() for k in range(first.numel())]
    return torch.stack(entries).reshape(p.shape) if entries else torch.zeros_like(p)


def expected(
    model: nn.Module,
    run: Callable[[], Tensor],
    loss_of: Callable[[Tensor], Tensor],
    penalty: Callable[[], Tensor] | None = None,
    *,
    hessian: bool = True,
) -> dict[str, dict[str, Tensor]]:
    """All four quantities by loops: parameter name -> quantity -> value. The loss is loss_of(run()) + penalty()."""
    with sdpa_kernel(SDPBackend.MATH):
        output = run()
    N, rest = output.shape[0], output.shape[1:]
    free = output.detach().requires_grad_()
    slope = grad(loss_of(free), free)  # dL/d output
    H = torch.stack(
        [torch.stack([grad(s, free)[n].detach().reshape(-1) for s in slope[n].reshape(-1)]) for n in range(N)]
    )  # [N, C, C]
    loss = loss_of(output) + (penalty() if penalty else 0.0)
    found: dict[str, dict[str, Tensor]] = {}
    for name, p in trainable(model).items():
        J = jacobian(output, p)
        rows = J.reshape(N, rest.numel(), *p.shape)
        per_sample = torch.stack(
            [
                sum((g * r for g, r in zip(slope[n].detach().reshape(-1), rows[n], strict=True)), torch.zeros_like(p))
                for n in range(N)
            ]
        ).detach()
        ggn = torch.zeros_like(p).detach()
        for n in range(N):
            for c in range(rest.numel()):
                ggn += torch.tensordot(H[n, c], rows[n], 1) * rows[n, c]
        if penalty is not None:
            per_sample = per_sample + grad(penalty(), p).detach() / N
            ggn = ggn + hessian_diagonal(penalty(), p)
        found[name] = {
            "grad_sample": per_sample,
            "jac": J,
            "ggn_diag": ggn,
            "hess_diag": hessian_diagonal(loss, p) if hessian else torch.zeros(0),
            "grad": grad(loss, p).detach(),
        }
    return found


def close(found: Tensor, wanted: Tensor, what: Any, rtol: float = RTOL) -> None:
    """Equal to rounding, relative to the largest entry; shapes and dtype too."""
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    assert found.dtype == wanted.dtype, f"{what}: {found.dtype}, expected {wanted.dtype}"
    top = wanted.abs().max().item() if wanted.numel() else 0.0
    error = (found - wanted).abs().max().item() if wanted.numel() else 0.0
    # absolute floor: a value that is zero by cancellation of terms of order one
    assert error <= rtol * top + 1e-13, f"{what}: off by {error:.3e} where the largest entry is {top:.3e}"
