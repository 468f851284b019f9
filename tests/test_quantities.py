"""Every quantity against its definition, written with plain loops: one backward for each number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import C, D, Fn, N, par, random_loss
from oracle import close, grad, jacobian, trainable
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hookjac
from benchmarks.peak import Peak
from hookjac import HookjacError, extend


@dataclass(frozen=True)
class Model:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (D,)
    ids: int = 0
    penalty: Callable[[Any], Tensor] | None = None

    def inputs(self) -> Tensor:
        return torch.randint(self.ids, (N, *self.shape)) if self.ids else torch.randn(N, *self.shape)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, C))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.SiLU(), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(2, C))


def residual(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    return m.c(h + torch.tanh(m.n(m.b(h))))


def transformer() -> nn.Module:
    parts = {"e": nn.Embedding(5, 4), "t": nn.TransformerEncoderLayer(4, 2, 3, 0.0, batch_first=True)}
    return Fn(lambda m, i: m.o(m.t(m.e(i)).mean(1)), o=nn.Linear(4, C), **parts)


def tied(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    return m.o(torch.tanh(m.a(h)) @ m.a.weight)


MODELS = {
    "MLP": Model(mlp),
    "CNN": Model(cnn, (2, 3, 3)),
    "residual": Model(lambda: Fn(residual, a=nn.Linear(D, 4), b=nn.Linear(4, 4), n=nn.LayerNorm(4), c=nn.Linear(4, C))),
    "transformer": Model(transformer, (3,), ids=5),
    "LSTM": Model(lambda: Fn(lambda m, x: m.o(m.r(x)[0][:, -1]), r=nn.LSTM(2, 3, batch_first=True),
                             o=nn.Linear(3, C)), (3, 2)),
    "tied": Model(lambda: Fn(tied, a=nn.Linear(D, D), o=nn.Linear(D, C))),
    "bare": Model(lambda: Fn(lambda m, x: (torch.exp(m.s) * x) @ m.w, s=par(D), w=par(D, C))),
    "with a penalty": Model(mlp, penalty=lambda m: sum((p.sin().sum() * p.square().sum() for p in m.parameters()),
                                                       torch.zeros(()))),
}  # fmt: skip
FIRST = ("grad_sample", "grad_sample_norm", "grad_sample_gram", "grad_sq_sum", "grad_var", "jac")
SECOND = ("ggn_diag", "ggn_diag_sample", "ggn_block", "hess_diag", "hess_diag_sample", "hess_block")


def hessian(loss: Tensor, p: Tensor) -> Tensor:  # [P, P]
    first = grad(loss, p).reshape(-1)
    return torch.stack([grad(entry, p).detach().reshape(-1) for entry in first])


def summand(output: Tensor, n: int) -> Tensor:
    """The loss as a function of the n-th sample alone."""
    mask = torch.zeros(len(output), *[1] * (output.dim() - 1), dtype=torch.bool)
    mask[n] = True
    return random_loss(torch.where(mask, output, output.detach()))


def definitions(model: nn.Module, x: Tensor, penalty: Tensor | None) -> dict[str, dict[str, Tensor]]:
    with sdpa_kernel(SDPBackend.MATH):
        output = model(x)
    N, C = output.shape
    free = output.detach().requires_grad_()
    slope = grad(random_loss(free), free)
    H = torch.stack([torch.stack([grad(s, free)[n].detach() for s in slope[n]]) for n in range(N)])  # [N, C, C]
    found: dict[str, dict[str, Tensor]] = {}
    for name, p in trainable(model).items():
        P = p.numel()
        J = jacobian(output, p).reshape(N, C, P)
        g = torch.stack([(slope[n].detach()[:, None] * J[n]).sum(0) for n in range(N)])
        G = torch.stack([J[n].T @ H[n] @ J[n] for n in range(N)])
        F = torch.stack([hessian(summand(output, n), p) for n in range(N)])
        if penalty is not None:
            g, second = g + grad(penalty, p).detach().reshape(-1) / N, hessian(penalty, p) / N
            G, F = G + second, F + second
        found[name] = {
            "grad_sample": g.reshape(N, *p.shape),
            "grad_sample_norm": torch.stack([row.square().sum().sqrt() for row in g]),
            "grad_sample_gram": torch.stack([torch.stack([(a * b).sum() for b in g]) for a in g]),
            "grad_sq_sum": sum((row.square() for row in g), torch.zeros(P)).reshape(p.shape),
            "grad_var": sum(((N * row - g.sum(0)).square() for row in g), torch.zeros(P)).reshape(p.shape) / N,
            "jac": J.reshape(N, C, *p.shape),
            "ggn_diag": G.sum(0).diagonal().reshape(p.shape),
            "ggn_diag_sample": G.diagonal(dim1=1, dim2=2).reshape(N, *p.shape),
            "ggn_block": G.sum(0),
            "hess_diag": F.sum(0).diagonal().reshape(p.shape),
            "hess_diag_sample": F.diagonal(dim1=1, dim2=2).reshape(N, *p.shape),
            "hess_block": F.sum(0),
        }
    return found


def prepared(name: str) -> tuple[nn.Module, Tensor, Callable[[], Tensor], dict[str, dict[str, Tensor]]]:
    case = MODELS[name]
    model, x = case.build(), case.inputs()
    penalty = case.penalty(model) if case.penalty else None
    wanted = definitions(model, x, penalty)

    def loss() -> Tensor:
        return random_loss(model(x)) + (case.penalty(model) if case.penalty else 0.0)

    return model, x, loss, wanted


def hold(model: nn.Module, wanted: dict[str, dict[str, Tensor]], asked: tuple[str, ...]) -> None:
    for name, p in trainable(model).items():
        for q in asked:
            close(getattr(p, q), wanted[name][q], (name, q), 1e-9 if q == "grad_var" else 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_all_of_them_together(name: str) -> None:
    model, _, loss, wanted = prepared(name)
    with extend(model, *FIRST, *SECOND):
        loss().backward()
    hold(model, wanted, FIRST + SECOND)


@pytest.mark.parametrize("q", FIRST + SECOND)
def test_each_by_itself(q: str) -> None:
    for name in ("MLP", "transformer", "with a penalty"):
        model, _, loss, wanted = prepared(name)
        with extend(model, q):
            loss().backward()
        hold(model, wanted, (q,))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("road", ["columns", "features", "entries"])
def test_roads(name: str, road: Any) -> None:
    records = [make(road=road) for make in (hookjac.HessDiag, hookjac.HessDiagSample, hookjac.HessBlock)]
    model, _, loss, wanted = prepared(name)
    with extend(model, *records):
        loss().backward()
    hold(model, wanted, SECOND[3:])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chosen", [[2], [3, 0], torch.tensor([1, 2, 3])])
def test_some_samples(name: str, chosen: Any) -> None:
    """Of the chosen samples alone, and of the loss as the whole batch reduced it."""
    makers = [hookjac.GradSample, hookjac.GradSampleNorm, hookjac.GradSampleGram, hookjac.GradSqSum, hookjac.GradVar,
              hookjac.Jac, hookjac.GGNDiag, hookjac.GGNDiagSample, hookjac.GGNBlock, hookjac.HessDiag,
              hookjac.HessDiagSample, hookjac.HessBlock]  # fmt: skip
    model, _, loss, wanted = prepared(name)
    with extend(model, *[make(subsample=chosen) for make in makers]):
        loss().backward()
    rows = [int(n) for n in chosen]
    for key, p in trainable(model).items():
        w = wanted[key]
        g = w["grad_sample"][rows]
        close(p.grad_sample, g, key)
        close(p.grad_sample_norm, w["grad_sample_norm"][rows], key)
        close(p.grad_sample_gram, w["grad_sample_gram"][rows][:, rows], key)
        close(p.grad_sq_sum, g.square().sum(0), key)
        close(p.grad_var, (N * g).var(0, correction=0), key, 1e-9)
        close(p.jac, w["jac"][rows], key)
        close(p.ggn_diag, w["ggn_diag_sample"][rows].sum(0), key)
        close(p.ggn_diag_sample, w["ggn_diag_sample"][rows], key)
        close(p.ggn_block.diagonal(), w["ggn_diag_sample"][rows].sum(0).reshape(-1), key)
        close(p.hess_diag, w["hess_diag_sample"][rows].sum(0), key)
        close(p.hess_diag_sample, w["hess_diag_sample"][rows], key)
        close(p.hess_block.diagonal(), w["hess_diag_sample"][rows].sum(0).reshape(-1), key)


@pytest.mark.parametrize("name", MODELS)
def test_some_outputs(name: str) -> None:
    model, _, loss, wanted = prepared(name)
    with extend(model, hookjac.Jac(outputs=[2, 0]), "ggn_diag"):
        loss().backward()
    for key, p in trainable(model).items():
        close(p.jac, wanted[key]["jac"][:, [2, 0]], key)
        close(p.ggn_diag, wanted[key]["ggn_diag"], key)


@pytest.mark.parametrize("name", ["MLP", "CNN", "transformer", "bare"])
def test_square_roots(name: str) -> None:
    case = MODELS[name]
    model, x = case.build(), case.inputs()
    y = torch.tensor([0, 2, 1, 1])
    with extend(model, "ggn_sqrt", "ggn_block"):
        nn.functional.cross_entropy(model(x), y).backward()
    for key, p in trainable(model).items():
        S = p.ggn_sqrt.reshape(-1, p.numel())
        assert p.ggn_sqrt.shape == (C - 1, N, *p.shape)  # the rank of a softmax's second derivative
        close(S.T @ S, p.ggn_block, key)


@pytest.mark.parametrize("name", ["MLP", "CNN", "transformer", "bare"])
def test_square_roots_in_factors(name: str) -> None:
    case = MODELS[name]
    model, x = case.build(), case.inputs()
    model.unused = nn.Parameter(torch.ones(2))  # type: ignore[assignment]
    with extend(model, "ggn_sqrt", "ggn_mp") as ext:
        nn.functional.cross_entropy(model(x), torch.tensor([0, 2, 1, 1])).backward()
        P = ext.ggn.shape[0]
        wanted = ext.ggn @ torch.eye(P)
    dense = {key: p.ggn_sqrt for key, p in trainable(model).items()}
    with extend(model, hookjac.GGNSqrt(structured=True)):
        nn.functional.cross_entropy(model(x), torch.tensor([0, 2, 1, 1])).backward()
    parts = {key: p.ggn_sqrt for key, p in trainable(model).items()}
    for key, part in parts.items():
        assert isinstance(part, hookjac.JacTensor)
        close(part.to_dense(), dense[key].transpose(0, 1), key)
    assert parts.pop("unused").shape == (N, 0, 2)
    W = hookjac.Jacobian(parts)
    kept = torch.cat([torch.full((p.numel(),), key in parts) for key, p in trainable(model).items()])
    v = torch.randn(int(kept.sum()))
    close(W.T @ (W @ v), wanted[kept][:, kept] @ v, "product")
    close(W.gram().reshape(W.shape[0], -1), W.to_dense() @ W.to_dense().T, "gram")


def test_no_square_root_of_what_is_not_convex() -> None:
    model = mlp()
    with pytest.raises(HookjacError, match=r"ggn_sqrt of parameter '\d\.\w+': the loss is not convex"):
        with extend(model, "ggn_sqrt"):
            model(torch.randn(N, D)).square().neg().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("asked", [("ggn_sqrt",), ("ggn_sqrt", "jac"), ("ggn_sqrt", "hess_diag")])
def test_the_square_root_of_a_sure_softmax(asked: tuple[str, ...], dtype: torch.dtype) -> None:
    """Its Hessian is zero but for rounding, which may lie below: no reason to refuse it."""
    below = False
    for size in range(0, 80, 2):
        torch.manual_seed(size)
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)).to(dtype)
        ids, y = torch.randint(5, (6, 2)), torch.randint(3, (12,))
        with torch.no_grad():
            model[1].weight.mul_(size)

        def loss(out: Tensor, y: Tensor = y) -> Tensor:
            return nn.functional.cross_entropy(out.flatten(0, 1), y)

        free = model(ids).detach().requires_grad_()
        slope = grad(loss(free), free).reshape(6, -1)
        H = torch.stack([grad(slope[:, k].sum(), free).reshape(6, -1) for k in range(6)], 1)
        values = torch.linalg.eigvalsh(H.detach())
        below |= bool((values.amin(1) < -1e3 * torch.finfo(dtype).eps * values.amax(1)).any())
        for _ in range(2):
            with extend(model, *asked, "ggn_block"):
                loss(model(ids)).backward()
            for p in model.parameters():
                R = p.ggn_sqrt.flatten(0, 1).flatten(1)  # type: ignore[attr-defined]
                off = (R.T @ R - p.ggn_block).abs().max()  # type: ignore[attr-defined]
                assert off <= 100 * torch.finfo(dtype).eps * max(1.0, float(p.ggn_block.abs().max()))  # type: ignore[attr-defined]
    assert below


@pytest.mark.parametrize("bend", [1e-3, 1e-9])
def test_little_that_is_not_convex_is_seen(bend: float) -> None:
    model = mlp()
    with pytest.raises(HookjacError, match=r"the loss is not convex"), extend(model, "ggn_sqrt"):
        out = model(torch.randn(N, D))
        (out.sum() - bend * out.square().sum()).backward()


def estimates(name: str, make: Callable[[], Any], loss: Callable[[Tensor], Tensor], draws: int) -> None:
    """The mean of many draws is the exact value, within five standard errors entry by entry."""
    case = MODELS[name]
    model, x = case.build(), case.inputs()
    torch.manual_seed(5)
    kept: dict[str, list[Tensor]] = {key: [] for key in trainable(model)}
    with extend(model, make(), "ggn_diag"):
        for _ in range(draws):
            loss(model(x)).backward()
            for key, p in trainable(model).items():
                kept[key].append(p.ggn_diag_mc)
    for key, p in trainable(model).items():
        t = torch.stack(kept[key])
        error = t.std(0) / draws**0.5
        assert ((t.mean(0) - p.ggn_diag).abs() <= 5 * error + 1e-12).all(), key
        assert error.max() < 0.3 * p.ggn_diag.abs().max(), "too few draws to tell"


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", ["MLP", "transformer"])
def test_sampled_diagonals_are_unbiased(name: str, samples: int) -> None:
    y = torch.tensor([0, 2, 1, 1])
    estimates(name, lambda: hookjac.GGNDiagMC(samples=samples), lambda o: nn.functional.cross_entropy(o, y), 300)
    estimates(name, lambda: hookjac.GGNDiagMC(samples=samples), random_loss, 300)  # not convex


def test_sampling_repeats_with_its_generator() -> None:
    model, x = mlp(), torch.randn(N, D)
    found = []
    for seed in (3, 3, 4):
        before = torch.get_rng_state()
        with extend(model, hookjac.GGNDiagMC(samples=2, generator=torch.Generator().manual_seed(seed))):
            random_loss(model(x)).backward()
        assert torch.equal(before, torch.get_rng_state()), "the global state was touched"
        found.append(model[0].weight.ggn_diag_mc)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_sampled_columns_of_a_rank_one_curvature_are_exact() -> None:
    """With one output there is one sign, and its square is one."""
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 1))
    with extend(model, "ggn_diag_mc", "ggn_diag"):
        model(torch.randn(N, D)).square().sum().backward()
    for key, p in trainable(model).items():
        close(p.ggn_diag_mc, p.ggn_diag, key)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hookjac.GGNDiagMC(samples=0), "samples must be a positive integer, got 0"),
        (lambda: hookjac.GradSample(subsample=[]), "indices of samples or outputs"),
        (lambda: hookjac.Jac(outputs=[-1]), "indices of samples or outputs"),
        (lambda: hookjac.Jac(outputs=1), "expected a list .* got 1"),  # type: ignore[arg-type]
        (lambda: hookjac.Jac(outputs=torch.tensor(1)), r"expected a list .* got tensor\(1\)"),
        (lambda: hookjac.GradSample(subsample=slice(2)), "expected a list"),  # type: ignore[arg-type]
        (lambda: hookjac.GradSample(subsample=[True, False]), r"got a mask; pass mask\.nonzero"),
        (lambda: hookjac.GradSample(subsample=torch.tensor([True, False])), r"got a mask; pass mask\.nonzero"),
        (lambda: hookjac.HessDiag(flop_limit="x"), "flop_limit must be a positive number"),  # type: ignore[arg-type]
        (lambda: hookjac.Quantity(name="mine", columns="rows", reduce=lambda got: 0), "columns must be one of"),
        (lambda: hookjac.HessBlock(road="down"), "road must be"),  # type: ignore[arg-type]
    ],
)
def test_bad_options(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_indices_as_numpy_has_them() -> None:
    import numpy

    for given in (numpy.array([2, 0]), [numpy.int64(2), 0], range(2, -1, -2), torch.tensor([2, 0])):
        assert hookjac.GradSample(subsample=given).subsample == (2, 0)


def test_many_random_columns_cost_what_they_are() -> None:
    """A root of a diagonal is taken entry by entry."""
    model = nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, C))
    with extend(model, hookjac.GGNSqrt(samples=2000), hookjac.GGNDiagMC(samples=2000)):
        model(torch.randn(N, D)).square().sum().backward()
    for p in model.parameters():
        assert p.ggn_sqrt.shape == (2000, N, *p.shape)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (hookjac.GradSample(subsample=[N]), rf"grad_sample: sample {N} was asked for, but the batch has {N}"),
        (hookjac.Jac(outputs=[0, C]), rf"jac: outputs={C} was asked for, .* has {C} entries"),
    ],
)
def test_what_is_not_there(record: Any, message: str) -> None:
    model = mlp()
    with pytest.raises(HookjacError, match=message), extend(model, record):
        random_loss(model(torch.randn(N, D))).backward()
    assert not hasattr(model[0].weight, record.name)


def test_a_block_too_large_is_refused() -> None:
    model = nn.Linear(300, 100)
    with pytest.raises(HookjacError, match=r"ggn_block of parameter 'weight': .* \(100, 300\) has 30000² entries"):
        with extend(model, "ggn_block"):
            model(torch.randn(2, 300)).square().sum().backward()


def test_a_quantity_of_ones_own() -> None:
    cosine = hookjac.Quantity(
        name="cosine",
        columns="loss",
        reduce=lambda got: nn.functional.cosine_similarity(
            got.columns()[0].flatten(1), got.columns()[0].sum(0).flatten()[None]
        ),
    )
    model, _, loss, wanted = prepared("CNN")
    with extend(model, cosine):
        loss().backward()
    for key, p in trainable(model).items():
        g = wanted[key]["grad_sample"].flatten(1)
        close(p.cosine, torch.stack([(row @ g.sum(0)) / (row.norm() * g.sum(0).norm()) for row in g]), key)


@pytest.mark.parametrize("q", ["grad_sample_norm", "grad_sample_gram", "grad_sq_sum", "grad_var", "ggn_diag", "kfac"])
def test_reductions_never_hold_a_gradient_for_each_sample(q: str) -> None:
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 3))
    n, P = 64, 300 * 400
    x = torch.randn(n, 300)
    with Peak() as peak, extend(model, q):
        model(x).square().sum().backward()
    assert peak.bytes < 4 * n * P / 5, f"{peak.bytes / (4 * n * P):.2f} of N P"


@pytest.mark.parametrize("q", ["grad_sample_norm", "grad_sq_sum"])
def test_neither_does_a_tied_table(q: str) -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    rows, d, n = 5000, 64, 256
    model = Fn(lambda m, i: m.o(torch.tanh(m.e(i)).mean(1)), e=nn.Embedding(rows, d), o=nn.Linear(d, rows, bias=False))
    model.o.weight = model.e.weight
    ids = torch.randint(rows, (n, 6))
    with Peak() as peak, extend(model, q):
        model(ids)[:, :7].square().sum().backward()
    assert peak.bytes < 4 * n * rows * d / 3, f"{peak.bytes / (4 * n * rows * d):.2f} of N P"
