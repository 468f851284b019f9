"""What every quantity of a recipe's model must be, by plain autograd: `hookjac.check`'s truth, entry by entry, and
definitions as loops for what `check` does not know.

N samples · M of them asked for · C entries of one sample's outputs · k one entry of a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from oracle import grad, trainable
from recipes import Recipe, data_loss, penalty
from torch import Tensor, nn

import hookjac
from hookjac.check import Pairs, _Truth
from hookjac.quantity.projected import signs

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)


class Truth(_Truth):
    """As `check` has it, of some samples, and what is needed for the definitions of the rest."""

    def __init__(self, r: Recipe, model: nn.Module, x: Tensor, seed: int, run: Callable[[], Any]) -> None:
        self.recipe, self.model, self.x, self.seed = r, model, x, seed
        self.seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}  # of each layer, its inputs and outputs
        handles = [
            m.register_forward_hook(lambda m, args, out: self.seen.setdefault(m, []).append((args[0].detach(), out)))
            for m in model.modules()
            if isinstance(m, LINEAR)
        ]
        super().__init__(model, lambda: self._called(run, handles), self._loss, r.output)

    def _called(self, run: Callable[[], Any], handles: list[Any]) -> Any:
        self.returned = run()
        for handle in handles:
            handle.remove()
        return self.returned

    def _loss(self, out: Any) -> Tensor:
        return data_loss(self.recipe, out, self.seed) + penalty(self.recipe, self.model)

    def bent(self, p: Tensor, k: int, samples: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Columns of the outputs that count, and the loss's Hessian in them times those, of some samples."""
        columns, bent = self._curvature(p, k)
        mask = torch.zeros(self.N, dtype=bent[0].dtype)
        mask[list(samples)] = 1
        return columns, [t * mask.view(-1, *[1] * (t.dim() - 1)) for t in bent]

    def gauss_newton(self, p: Tensor, k: int, samples: Sequence[int]) -> Tensor:
        """[P]: a row of the Gauss-Newton matrix's block, of some samples, without a penalty."""
        _, bent = self.bent(p, k, samples)
        return (self._pulled(p, bent) if self._whole is None else grad(self.output, p, bent[0])).reshape(-1).detach()

    def penalised(self, p: Tensor, k: int) -> Tensor:
        """[P]: a row of a penalty's Hessian."""
        return grad(self._past(p).reshape(-1)[k], p).reshape(-1).detach()

    def summand(self, n: int) -> Tensor:
        """The n-th sample's part of the loss, but for a constant."""

        def alone(t: Tensor) -> Tensor:
            mask = torch.zeros(self.N, *[1] * (t.dim() - 1), dtype=torch.bool)
            mask[n] = True
            return torch.where(mask, t, t.detach())

        out = self.returned
        out = {key: alone(t) for key, t in out.items()} if isinstance(out, dict) else alone(out)
        return data_loss(self.recipe, out, self.seed) + penalty(self.recipe, self.model) / self.N

    def hessian(self, p: Tensor, k: int, samples: Sequence[int]) -> Tensor:
        """[M, P]: a row of some samples' Hessians."""
        rows = [grad(grad(self.summand(n), p).reshape(-1)[k], p).reshape(-1).detach() for n in samples]
        return torch.stack(rows)

    def magnitude(self, p: Tensor, k: int, samples: Sequence[int]) -> float:
        """The sum over samples of j^T |H| j, with j the entry's column: what random columns are as large as."""
        columns, _ = self._curvature(p, k)
        j = torch.cat([c.detach().reshape(self.N, -1) for c in columns], 1)
        values, vectors = torch.linalg.eigh(self.hessians())
        turned = torch.einsum("nca,nc->na", vectors, j.to(vectors.dtype))
        return float((values.abs() * turned.square()).sum(1)[list(samples)].sum())

    def hessians(self) -> Tensor:
        """[N, C, C]: the loss's in the outputs that count."""
        whole = self._whole is not None
        like = [self.output] if whole else self._outputs
        sizes = [t[0].numel() for t in like]
        rows = []
        for c in range(sum(sizes)):
            unit = torch.zeros(self.N, sum(sizes), dtype=self.output.dtype)
            unit[:, c] = 1
            parts = [u.reshape(t.shape) for u, t in zip(unit.split(sizes, 1), like, strict=True)]
            bent = [grad(self._whole, self.output, parts[0])] if whole else self._bent(parts)  # type: ignore[arg-type]
            rows.append(torch.cat([t.detach().reshape(self.N, -1) for t in bent], 1))
        H = torch.stack(rows, 1)
        return H.float() if H.dtype == torch.bfloat16 else H

    def arriving(self, z: Tensor) -> Tensor:
        """[N, C, *z]: of every output entry that counts, its gradient at a tensor."""
        like = [self.output] if self._whole is not None else self._outputs
        return torch.stack(
            [torch.cat([torch.stack([grad(o, z).detach() for o in t[n].reshape(-1)]) for t in like]) for n in
             range(self.N)]
        )  # fmt: skip


# Found and right, for some entries of one result ------------------------------------------------------------------


def _within(found: Tensor, right: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Equal, if no further apart than the noise."""
    off = found.detach() - right
    return right + off.sign() * (off.abs() - bound).clamp(min=0), right


def pairs(truth: Truth, name: str, options: dict[str, Any], key: str, p: Any, found: Any, picks: list[int]) -> Pairs:
    """What was found of a parameter and what is right."""
    N = truth.N
    S = options.get("subsample") or list(range(N))
    share = len(S) / N
    if name == "grad_sample":
        scale = N if options.get("loss_reduction") == "mean" else 1
        return [(found.reshape(len(S), -1)[:, k], truth.each(p, k)[S] * scale) for k in picks]
    if name in ("grad_sample_norm", "grad_sample_gram", "grad_sample_projected"):
        g = torch.stack([truth.of_sample(p, n) for n in S])
        if name == "grad_sample_norm":
            return [(found, torch.stack([row.square().sum().sqrt() for row in g]))]
        if name == "grad_sample_gram":
            return [(found, torch.stack([torch.stack([(a * b).sum() for b in g]) for a in g]))]
        X, Y = (t.to(g.dtype) for t in signs(key, p.shape, options["k"], options["seed"]))
        R = torch.stack([torch.outer(x, y).reshape(-1) for x, y in zip(X, Y, strict=True)]) / options["k"] ** 0.5
        return [(found, torch.stack([torch.stack([(row * r).sum() for r in R]) for row in g]))]
    if name == "grad_sq_sum":
        return [(found.reshape(-1)[k], truth.each(p, k)[S].square().sum()) for k in picks]
    if name == "grad_var":
        each = [(k, N * truth.each(p, k)[S]) for k in picks]
        return [(found.reshape(-1)[k] + g.mean().square(), g.square().mean()) for k, g in each]
    if name in ("jac", "ntk"):
        C = truth.output[0].numel()
        rows = options.get("outputs") or list(range(C))
        if name == "jac":
            dense, squares = found[0].reshape(len(S), len(rows), -1), found[1].reshape(-1)
            if truth.loss.dtype == torch.float64:
                columns = [(k, truth.column(p, k).reshape(N, C)[S][:, rows]) for k in picks]
            else:  # as a backward rounds it: a derivative of one rounds otherwise
                J = torch.stack([grad(o, p).detach().reshape(-1) for o in truth.output.reshape(-1)])
                columns = [(k, J[:, k].reshape(N, C)[S][:, rows]) for k in picks]
            made = [(dense[..., k], column) for k, column in columns]
            return made + [(squares[k], column.square().sum()) for k, column in columns]
        whole = found.reshape(len(S) * len(rows), -1)
        some = torch.randperm(len(S) * len(rows))[:3].tolist()
        by_row = {}
        for at in some:
            n, c = S[at // len(rows)], rows[at % len(rows)]
            by_row[at] = grad(truth.output[n].reshape(-1)[c], p).reshape(-1).detach()
        return [(whole[a, b], by_row[a] @ by_row[b]) for a in some for b in some]
    if name == "ggn_diag":
        return [(found.reshape(-1)[k], truth.curved(p, k)[S].sum() + truth.penalty(p, k) * share) for k in picks]
    if name == "ggn_diag_sample":
        return [(found.reshape(len(S), -1)[:, k], truth.curved(p, k)[S] + truth.penalty(p, k) / N) for k in picks]
    if name == "ggn_diag_mc":
        right = [(k, truth.curved(p, k)[S].sum() + truth.penalty(p, k) * share) for k in picks]
        noise = 9 * math.sqrt(3 / options["samples"])
        return [_within(found.reshape(-1)[k], t, noise * truth.magnitude(p, k, S)) for k, t in right]
    if name == "ggn_sqrt":
        dense = found[0].transpose(0, 1) if options.get("structured") else found
        s = dense.reshape(*dense.shape[:2], p.numel())
        each = [(s[:, :, k].square().sum(0), truth.curved(p, k)[S]) for k in picks]
        return each + [(torch.einsum("vn,vnp->p", s[:, :, k], s), truth.gauss_newton(p, k, S)) for k in picks]
    if name in ("ggn_block", "ggn_mp"):
        right = [(k, truth.gauss_newton(p, k, S) + truth.penalised(p, k) * share) for k in picks]
        return [(found[k], t) for k, t in right]
    if name in ("hess_block", "hess_diag"):
        whole = "subsample" not in options
        right = [(k, truth.row(p, k) if whole else truth.hessian(p, k, S).sum(0)) for k in picks]
        return [(found[k], t) if name == "hess_block" else (found.reshape(-1)[k], t[k]) for k, t in right]
    if name == "hess_diag_sample":
        return [(found.reshape(len(S), -1)[:, k], truth.hessian(p, k, S)[:, k]) for k in picks]
    if name == "hess_mp":
        return [(found[k], truth.row(p, k)) for k in picks]
    if name == "hutchinson":
        made = []
        for k in picks:
            first = grad(truth.loss, p).reshape(-1)[k]
            row = torch.cat([grad(first, q).reshape(-1).detach() for q in trainable(truth.model).values()])
            if not bool(row.isfinite().all()):  # a norm of zeros: products with the Hessian are not, either
                continue
            own = truth.row(p, k)[k]
            noise = (row.square().sum() - own.square()).clamp(min=0).sqrt() / math.sqrt(options["samples"])
            made.append(_within(found.reshape(-1)[k], own, 7 * float(noise)))
        return made
    if name == "hesscale":
        return _hesscale(truth, key, p, found)
    assert name == "kfac", name
    return _kfac(truth, options, p, found, S)


CHAIN = ("linear", "no bias", "tanh", "relu", "in-place relu", "gelu", "elu", "softplus", "silu", "sigmoid", "selu",
         "leaky", "square", "functional gelu")  # fmt: skip


def chained(truth: Truth) -> bool:
    """One layer after the other, one position, one output: what step-by-step definitions are written for."""
    r = truth.recipe
    plain = (
        truth.x.shape[1] == 1
        and r.output is None
        and r.given == "numbers"
        and r.head in ("sum", "mean below", "positions")
    )
    return plain and not r.shared and all(name in CHAIN for name, _ in r.steps)


def _recursion(truth: Truth, average: bool) -> dict[int, tuple[Tensor, Tensor]]:
    """HesScale (diagonals, and each step's own bend) or KFRA (averages): by the id of each weight and bias, the layer's
    inputs [N, i], and what is in place of the Hessian at its outputs, [N, o] or [o, o]."""
    model: Any = truth.model
    layers: list[Any] = []
    for part, (name, _) in zip(model.parts, truth.recipe.steps, strict=True):
        if isinstance(getattr(part, "f", None), nn.Linear):
            layers.append(part.f)
            layers += [part.r] if name == "in-place relu" else []
        else:
            layers.append(lambda t, part=part: part(t, t))
    layers.append(model.head)
    tensors = [truth.x.detach().reshape(truth.N, -1)]
    for layer in layers:
        t = tensors[-1] + 0 if isinstance(layer, nn.ReLU) else tensors[-1]  # it writes to what it is given
        tensors.append(layer(t))
    loss = data_loss(truth.recipe, tensors[-1].view_as(truth.output), truth.seed)
    H = truth.hessians()
    h = H.mean(0) if average else H.diagonal(dim1=1, dim2=2)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for k in reversed(range(len(layers))):
        layer, a = layers[k], tensors[k].detach()
        if isinstance(layer, nn.Linear):
            W = layer.weight.detach()
            found |= {id(p): (a, h) for p in layer.parameters()}
            h = W.T @ h @ W if average else h @ W.square()
            continue
        at = a.clone().requires_grad_()
        first = grad(layer(at + 0).sum(), at)
        slope, second = first.detach(), grad(first.sum(), at).detach()
        if average:
            h = h * (slope.T @ slope / truth.N)
        else:
            above = grad(loss, tensors[k + 1]).detach() if tensors[k + 1].requires_grad else torch.zeros_like(a)
            h = slope.square() * h + second * above
    return found


def _hesscale(truth: Truth, key: str, p: Tensor, found: Tensor) -> Pairs:
    """Its recursion in chains; the exact diagonal for the last layer, where that has one position."""
    r = truth.recipe
    assert found.shape == p.shape
    if chained(truth):
        a, h = _recursion(truth, False)[id(p)]
        right = torch.einsum("no,ni->oi", h, a.square()) if p.dim() > 1 else h.sum(0)
        penalties = torch.stack([truth.penalty(p, k) for k in range(p.numel())]).view_as(right)
        return [(found, right + penalties)]
    if key.startswith("head.") and truth.x.shape[1] == 1 and r.output is None and r.given != "tied ids":
        return [(found.reshape(-1)[k], truth.row(p, k)[k]) for k in range(p.numel())]
    if not bool(found.isfinite().all()):  # as where a norm of zeros is differentiated twice
        exact = torch.stack([truth.row(p, k)[k] for k in range(p.numel())])
        assert not bool(exact.isfinite().all()), f"hesscale of {key} is not finite"
    return []


def _columns_of(m: nn.Module, a: Tensor, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The inputs of a layer, [R, i], and how tensors [..., *z] become [..., R, o]."""
    dtype = m.weight.dtype  # autocast computes in another
    if isinstance(m, nn.Embedding):
        return torch.nn.functional.one_hot(a.reshape(-1), m.num_embeddings).to(dtype), lambda t: t.reshape(
            *t.shape[: t.dim() - z.dim()], -1, z.shape[-1]
        )
    a = a.to(dtype)
    if isinstance(m, nn.Linear):
        return a.reshape(-1, a.shape[-1]), lambda t: t.reshape(*t.shape[: t.dim() - z.dim()], -1, z.shape[-1])
    assert isinstance(m, (nn.Conv1d, nn.Conv2d))
    size = m.weight[0].numel()
    units = torch.eye(size, dtype=dtype).reshape(size, *m.weight.shape[1:])
    patches = m._conv_forward(a, units, None).movedim(1, -1)

    def rows(t: Tensor) -> Tensor:
        lead = t.dim() - z.dim()
        t = t.movedim(lead + 1, -1)
        return t.reshape(*t.shape[:lead], -1, t.shape[-1])

    return patches.reshape(-1, size), rows


def _kfac(truth: Truth, options: dict[str, Any], p: Any, found: Any, S: Sequence[int]) -> Pairs:
    fisher, sharing = options["fisher"], options["sharing"]
    empirical, P = fisher == "empirical", p.numel()
    corrected = found if isinstance(found, hookjac.KroneckerEigen) else None
    plain = found if corrected is None else corrected.source
    made: Pairs = []
    if fisher == "kfra":
        if not chained(truth) or "subsample" in options:
            return []
        a, G = _recursion(truth, True)[id(p)]
        return [(plain._b[0], truth.N * G)] + ([(plain._a[0], a.T @ a / truth.N)] if p.dim() > 1 else [])
    if fisher == "mc" and float(torch.linalg.eigvalsh(truth.hessians()).min()) < -1e-12:
        return []  # pairs of columns: no bound known
    if empirical:
        past = truth._past(p).detach().reshape(-1) / truth.N
        g = torch.stack([truth.of_sample(p, n) - past for n in S])
        block = g.T @ g
    else:
        block = torch.stack([truth.gauss_newton(p, k, S) for k in range(P)])
    if not _reached(truth.loss, p):
        return [(plain.to_dense(), torch.zeros_like(block))]
    sides = _sides(truth, p, S, empirical, sharing)
    if isinstance(plain, hookjac.Kronecker):
        if sides is not None and plain.A is not None and plain._b.shape[0] == 1:
            A, B = sides
            made.append((torch.diag(plain.A) if plain.A.dim() == 1 else plain._a[0], A))
            made.append(_noisy(plain._b[0], B, options))
        elif plain.A is None or (plain.rows == 1 and sharing == "expand"):
            made.append(_noisy(plain.to_dense(), block, options))
    if corrected is not None:
        own = corrected.values.dtype
        apart = hookjac.KroneckerEigen(
            corrected.Q_A,
            corrected.Q_B,
            torch.arange(1.0, 1 + P, dtype=own).reshape_as(corrected.values),
            corrected.source,
        )
        units = torch.eye(P, dtype=own).reshape(-1, *p.shape)
        Q = torch.linalg.eigh((apart @ units).reshape(P, P))[1].to(p.dtype)
        made.append((corrected.values.flatten(), (Q.T @ block @ Q).diagonal()))
    return made


def _noisy(found: Tensor, right: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if options["fisher"] != "mc":
        return found, right
    size = right.diagonal().clamp(min=0).sqrt()
    bound = 9 * math.sqrt(2 / options["samples"]) * size[:, None] * size[None, :]
    off = found.detach() - right
    return right + off.sign() * (off.abs() - bound).clamp(min=0), right


def _sides(truth: Truth, p: Tensor, S: Sequence[int], empirical: bool, sharing: str) -> tuple[Tensor, Tensor] | None:
    """A and B of a weight that is used by layers, and by nothing else; None for all else."""
    uses = [(m, *use) for m, its in truth.seen.items() for use in its if getattr(m, "weight", None) is p]
    uses = [use for use in uses if _reached(truth.loss, use[2])]
    if not uses or any(getattr(m, "groups", 1) > 1 for m, _, _ in uses) or len({type(m) for m, _, _ in uses}) > 1:
        return None
    if any(isinstance(m, nn.Embedding) and m.padding_idx is not None for m, _, _ in uses):
        return None
    inputs, slopes, H = [], [], None if empirical else truth.hessians()
    whole, draw = torch.zeros_like(p).reshape(-1), torch.Generator().manual_seed(0)
    probes = [torch.randn(t.shape, generator=draw, dtype=t.dtype) for t in truth._outputs]
    for m, a, z in uses:
        rows, opened = _columns_of(m, a, z)
        g = opened(sum((grad(t, z, s) for t, s in zip(truth._outputs, probes, strict=True)), torch.zeros_like(z)))
        g = g.to(p.dtype)
        part = torch.einsum("ro,ri->io" if isinstance(m, nn.Embedding) else "ro,ri->oi", g, rows)
        whole = whole + part.detach().reshape(-1)
        if empirical:
            each = torch.stack([
                opened(sum((grad(t, z, _only(s, n)) for t, s in zip(truth._outputs, truth._slopes, strict=True)),
                           torch.zeros_like(z))).detach() for n in range(truth.N)])[:, None]  # fmt: skip
        else:
            each = opened(truth.arriving(z))
        inputs.append(rows)
        slopes.append(each.to(p.dtype))  # [N, C, R, o]
    direct = truth._pulled(p, probes).detach().reshape(-1)
    eps = torch.finfo(getattr(torch, truth.recipe.dtype)).eps
    if (whole - direct).abs().max() > eps**0.5 * direct.abs().max():
        return None  # it is used by something else, too
    rows, each = torch.cat(inputs), torch.cat(slopes, 2)
    # row r of a batch [N, L]: only of this sample
    R = len(rows) // truth.N
    if (len(uses) > 1 or len(rows) % truth.N) and (sharing == "reduce" or len(S) < truth.N):
        return None
    if sharing == "reduce" or len(S) < truth.N:
        by_sample = each.reshape(truth.N, each.shape[1], truth.N, R, -1)
        own = torch.stack([by_sample[n, :, n] for n in range(truth.N)])  # [N, C, R, o]
        if own.abs().sum() < 0.999999 * each.abs().sum() or not bool(each.any()) or uses[0][1].shape[0] != truth.N:
            return None  # samples do not come first
        rows = rows.reshape(truth.N, R, -1)[list(S)]
        own = own[list(S)]
        if sharing == "reduce":
            rows, own = rows.mean(1, keepdim=True), own.sum(2, keepdim=True)
        A = torch.einsum("nri,nrj->ij", rows, rows) / (rows.shape[0] * rows.shape[1])
        M = own.new_ones(len(S), 1, 1) if H is None else H[list(S)]
        return A, torch.einsum("ncro,ncd,ndrp->op", own, M, own)
    A = rows.T @ rows / len(rows)
    M = each.new_ones(truth.N, 1, 1) if H is None else H
    return A, torch.einsum("ncro,ncd,ndrp->op", each, M, each)


def _reached(loss: Tensor, z: Tensor) -> bool:
    return torch.autograd.grad(loss, z, retain_graph=True, allow_unused=True)[0] is not None


def _only(s: Tensor, n: int) -> Tensor:
    out = torch.zeros_like(s)
    out[n] = s[n].detach()
    return out
