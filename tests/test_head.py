"""The loss's second derivative in the outputs, in closed form against loops; random columns against their moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N
from oracle import close, expected, trainable
from torch import Tensor, nn

from hookjac import KFAC, GGNDiagMC, HookjacError, extend, head, passing, seeds
from hookjac.graph import pull

T = 2
Y, YT, SOFT = torch.tensor([0, 2, 1, 1]), torch.tensor([[0, 1], [2, 2], [1, 0], [0, 0]]), torch.rand(N, C)
WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)

Loss = Callable[[Tensor], Tensor]
ROWS: dict[str, Loss] = {  # of outputs [N, C]
    "cross entropy": lambda z: F.cross_entropy(z, Y),
    "summed": lambda z: F.cross_entropy(z, Y, reduction="sum"),
    "weighted": lambda z: F.cross_entropy(z, Y, WEIGHT),
    "ignored": lambda z: F.cross_entropy(z, torch.tensor([0, -100, 1, 1])),
    "smoothed": lambda z: F.cross_entropy(z, Y, label_smoothing=0.2),
    "soft targets": lambda z: F.cross_entropy(z, SOFT.double()),
    "tempered": lambda z: F.cross_entropy(z / 3.0, Y),
    "by hand": lambda z: -(z.log_softmax(1) * SOFT.double()).sum(1).mean(),
    "a class left out": lambda z: F.cross_entropy(z[:, 1:], Y.clamp(max=1)),
    "maximised": lambda z: -F.cross_entropy(z, Y),
    "for and against": lambda z: (F.cross_entropy(z, Y, reduction="none") * torch.tensor([1.0, -1, 2, 0])).sum(),
    "nll": lambda z: F.nll_loss(F.log_softmax(z, -1), Y),
    "mse": lambda z: F.mse_loss(z, SOFT.double()),
    "mse by hand": lambda z: ((z - SOFT.double()) ** 2).sum(1).mean() / 2,
    "huber": lambda z: F.huber_loss(z, SOFT.double(), delta=0.4),
    "logistic": lambda z: F.binary_cross_entropy_with_logits(z, SOFT.double()),
    "logistic weighted": lambda z: F.binary_cross_entropy_with_logits(z, SOFT.double(), pos_weight=WEIGHT),
    "logsigmoid": lambda z: -F.logsigmoid(z * 2).sum(),
    "concave and convex": lambda z: z.pow(3).sum(),
}
DRAWN = torch.tensor([2, 2, 3, 1])
ROWS |= {
    "drawn with repetition": lambda z: F.cross_entropy(z[DRAWN], Y),
    "in pairs": lambda z: F.cross_entropy(z.reshape(2, 2, C).transpose(0, 1).reshape(N, C), Y),
}
SEQUENCES: dict[str, Loss] = {  # of outputs [N, T, C]
    "tokens": lambda z: F.cross_entropy(z.reshape(-1, C), YT.reshape(-1)),
    "tokens, transposed": lambda z: F.cross_entropy(z.transpose(1, 2), YT),
    "next tokens": lambda z: F.cross_entropy(z[:, :-1].reshape(-1, C), YT[:, 1:].reshape(-1)),
    "last token": lambda z: F.cross_entropy(z[:, -1], Y),
    "pooled": lambda z: F.cross_entropy(z.mean(1), Y),
    "mse of sequences": lambda z: F.mse_loss(z, torch.ones(N, T, C, dtype=torch.float64)),
}
OTHERS: dict[str, Loss] = {  # two things that bend, or one that couples
    "softmax, squared": lambda z: z.softmax(1).square().sum(),
    "two losses": lambda z: F.cross_entropy(z, Y) + z.square().sum(),
    "focal": lambda z: ((1 - z.log_softmax(1).exp()) ** 2 * z.log_softmax(1)).sum(),
    "product of entries": lambda z: (z[:, 0] * z[:, 1]).sum(),
    "log of a sum": lambda z: z.exp().sum(1).log().sum(),
    "left to right and back": lambda z: F.cross_entropy(torch.cat([z, z.flip(1)]), torch.cat([Y, Y])),
    "linear": lambda z: (z * SOFT.double()).sum(),
}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[head.Head]:
    found: list[head.Head] = []

    class Seen(head.Head):
        def __post_init__(self) -> None:
            super().__post_init__()
            found.append(self)

    for module in (seeds, passing):
        monkeypatch.setattr(module, "Head", Seen)
    return found


def hessians(loss: Loss, out: Tensor) -> Tensor:  # [N, C', C'], one entry after the other
    z = out.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(z), z, create_graph=True)
    if not slope.requires_grad:
        return torch.zeros(N, out[0].numel(), out[0].numel())
    found = []
    for n in range(N):
        rows = [torch.autograd.grad(s, z, retain_graph=True)[0][n].flatten() for s in slope[n].flatten()]
        found.append(torch.stack(rows))
    return torch.stack(found)


def model_of(name: str) -> tuple[Any, Tensor, Loss]:
    if name in SEQUENCES:
        return (
            Fn(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(D, 4), b=nn.Linear(4, C)),
            torch.randn(N, T, D),
            SEQUENCES[name],
        )
    net = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))
    return net, torch.randn(N, D), (ROWS | OTHERS)[name]


@pytest.mark.parametrize("name", [*ROWS, *SEQUENCES, *OTHERS])
def test_hessian(name: str, seen: list[head.Head]) -> None:
    model, x, loss = model_of(name)
    wanted = expected(model, lambda: model(x), loss)
    with extend(model, "ggn_diag"):
        loss(model(x)).backward(retain_graph=True)
    for key, p in trainable(model).items():
        close(p.ggn_diag, wanted[key]["ggn_diag"], key)  # type: ignore[attr-defined]
    (found,) = seen
    assert (found.form is None) == (name in OTHERS)
    close(found.full(), hessians(loss, model(x)), name)


@pytest.mark.parametrize("name", [*ROWS, *SEQUENCES])
def test_second_moment_of_random_columns(name: str, seen: list[head.Head]) -> None:
    """Not by drawing: what the unit vectors become instead of random signs has the Hessian as its sum of squares."""
    model, x, loss = model_of(name)
    with extend(model, "ggn_diag_mc"):
        out = model(x)
        loss(out).backward(retain_graph=True)
        (found,) = seen
        assert found.form is not None
        like = found.form.p if isinstance(found.form, head._Softmax) else found.form.d
        units = torch.eye(like.numel()).reshape(-1, *like.shape)
        u, w = found.form.root(units)
        pair = []
        for t in (u, u if w is None else w):
            assert found.bending is not None
            for edge in found.bending.chain:
                (t,) = [c for c in pull(edge.node, {edge.nr: t}) if c is not None]
            pair.append(t.reshape(len(units), N, -1))
        close(torch.einsum("vnc,vnd->ncd", *pair), hessians(loss, out), name)


@pytest.mark.parametrize(
    "name", ["cross entropy", "for and against", "tokens", "softmax, squared", "concave and convex"]
)
def test_draws_are_unbiased(name: str) -> None:
    model, x, loss = model_of(name)
    with extend(model, "ggn_diag"):
        loss(model(x)).backward()
    wanted = [p.ggn_diag for p in model.parameters()]
    drawn = [[] for _ in wanted]  # type: ignore[var-annotated]
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        with extend(model, GGNDiagMC(samples=20, generator=generator)):
            loss(model(x)).backward()
        for k, p in enumerate(model.parameters()):
            drawn[k].append(p.ggn_diag_mc)
    noisy = False
    for found, right in zip(drawn, wanted, strict=True):
        each = torch.stack(found)
        error = each.std(0) / len(each) ** 0.5
        assert bool(((each.mean(0) - right).abs() <= 5 * error + 1e-12).all()), name
        noisy |= bool((error > 0).any())
    assert noisy


def test_a_language_model_is_within_reach() -> None:
    """[N, C, C] of these logits would be 2 x 16000 x 16000 numbers."""
    words, length = 500, 32
    model = Fn(lambda m, i: m.o(m.e(i).tanh()), e=nn.Embedding(words, 4), o=nn.Linear(4, words))
    ids = torch.randint(words, (2, length))
    with extend(model, "ggn_diag_mc", KFAC(fisher="mc")):
        F.cross_entropy(model(ids).reshape(-1, words), ids.reshape(-1)).backward()
    assert model.o.weight.ggn_diag_mc.shape == (words, 4)  # type: ignore[union-attr]
    assert model.o.weight.kfac.B.shape == (words, words)  # type: ignore[union-attr]


def test_too_large_for_anything_but_products_is_said() -> None:
    words, length = 500, 64
    model = Fn(lambda m, i: m.o(m.e(i).tanh()), e=nn.Embedding(words, 4), o=nn.Linear(4, words))
    ids = torch.randint(words, (2, length))
    with pytest.raises(HookjacError, match=r"2 x 32000 x 32000 entries.*ggn_mp"), extend(model, "ggn_diag_mc"):
        model(ids).softmax(2).square().sum().backward()


# The root of a softmax's Hessian -----------------------------------------------------------------------------------


def softmaxes(k: int) -> dict[str, Tensor]:  # logits [5, k]
    far = torch.randn(5, k)
    one_hot = -1e4 * torch.ones(5, k)
    one_hot[torch.arange(5), torch.arange(5) % k] = 1e4
    sure = torch.zeros(5, k)
    sure[torch.arange(5), torch.arange(5) % k] = 28.0 + torch.arange(5)  # within 1e-12 of one
    return {
        "usual": far,
        "sure": sure,
        "certain": one_hot,
        "all alike": torch.zeros(5, k),
        "two alike, the others out": torch.where(torch.arange(k) < 2, 0.0, -1e4).expand(5, k).clone(),
        "far apart": 30 * far,
    }


SCALES = {
    "mean": torch.full((5,), 0.2),
    "negative": torch.full((5,), -0.2),
    "weights": torch.tensor([0.5, 0.0, 2.0, 1e-3, 7.0]),
    "both": torch.tensor([0.5, 0.0, -2.0, 1e-3, -7.0]),
    "nothing": torch.zeros(5),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", softmaxes(2))
@pytest.mark.parametrize("k", [2, 3, 10])
def test_the_fewest_columns(k: int, kind: str, scale: str) -> None:
    """C - 1 of them, whose second moment is diag p - p pT of each sample to rounding, however sure of itself."""
    p, s = softmaxes(k)[kind].softmax(1), SCALES[scale].double()
    found = head._Softmax(p, s.unsqueeze(1), 1).rows()
    assert found is not None
    u, weights = found
    assert u.shape == (k - 1, 5, k)
    for n in range(5):
        wanted = torch.zeros(k, k)
        for a in range(k):
            rest = p[n].sum() - p[n, a] if p[n, a] < 0.5 else p[n, torch.arange(k) != a].sum()
            for b in range(k):
                wanted[a, b] = p[n, a] * rest if a == b else -p[n, a] * p[n, b]
        root = u[:, n]
        assert root.isfinite().all()
        moment = sum(torch.outer(row, row) for row in root) * weights[n].sign()
        torch.testing.assert_close(
            moment, s[n] * wanted, rtol=1e-13, atol=1e-15 * float(s[n].abs() * wanted.abs().max())
        )
    assert head._Softmax(p[:, :1], s.unsqueeze(1), 1).rows() is None, "one class: nothing to be unsure of"
    assert head._Softmax(p[None], s.view(1, 5, 1), 2).rows() is None, "rows that are no samples"


WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda z, y: F.cross_entropy(z, y),
    "times minus one": lambda z, y: -1 * F.cross_entropy(z, y),
    "for each sample": lambda z, y: F.cross_entropy(z, y, reduction="none") @ SCALES["weights"].double(),
    "of both signs": lambda z, y: F.cross_entropy(z, y, reduction="none") @ SCALES["both"].double(),
    "ignored": lambda z, y: F.cross_entropy(z, torch.where(torch.arange(5) % 2 == 0, y, -100)),
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.3),
    "classes": lambda z, y: F.cross_entropy(z, y, torch.arange(1.0, z.shape[1] + 1) % 3),
    "classes, smoothed, ignored": lambda z, y: F.cross_entropy(
        z, torch.where(torch.arange(5) > 0, y, -100), torch.arange(1.0, z.shape[1] + 1), label_smoothing=0.1),
    "sure": lambda z, y: F.cross_entropy(30 * z, y),
    "certain": lambda z, y: F.cross_entropy(1e6 * z, y),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_models_that_are_sure_of_themselves(k: int, name: str) -> None:
    """At every step by loops: planned anew, and as known."""
    model = nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, k))
    x, y = torch.randn(5, D), torch.arange(5) % k
    loss = lambda z: WEIGHTS[name](z, y)
    wanted = expected(model, lambda: model(x), loss, hessian=False)
    for asked in (("ggn_diag",), ("ggn_diag", "hess_diag"), ("ggn_diag", "jac", "grad_sample")):
        with extend(model, *asked, KFAC(fisher="exact")):
            loss(model(x)).backward()
        for key, p in trainable(model).items():
            for q in asked:
                right = wanted[key]["ggn_diag" if q == "hess_diag" else q]  # piecewise linear
                close(getattr(p, q), right, (key, q), rtol=1e-9)
        B = model[2].bias.kfac.B.diagonal()  # type: ignore[union-attr,operator]
        close(B, wanted["2.bias"]["ggn_diag"], "kfac", rtol=1e-9)
