"""Products with all patches of a convolution's input, made by convolutions: against loops in double precision."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Fn
from oracle import expected, trainable
from test_kfac import arriving, positions
from torch import Tensor, nn

from hookjac import KFAC, extend
from hookjac.factor import Outer, Unfolded, unfolded

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
N = 3
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def single() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of `products`, whether something came of it."""
    found: list[bool] = []
    real = Unfolded.products

    def seen(self: Unfolded, g: Tensor) -> Tensor | None:
        out = real(self, g)
        found.append(out is not None)
        return out

    monkeypatch.setattr(Unfolded, "products", seen)
    return found


def layer(V: int, C: int, out: int, groups: int = 1, space: tuple[int, ...] = (6, 7), kernel: tuple[int, ...] = (3, 3),
          stride: tuple[int, ...] = (1, 1), padding: tuple[int, ...] = (0, 0), dilation: tuple[int, ...] = (1, 1),
          dtype: Any = None) -> tuple[Unfolded, Tensor, Tensor]:  # fmt: skip
    """What a convolution is given, columns at its output [V, N, O, *sizes] and, by loops, what its weight receives."""
    x = torch.randn(N, C, *space, dtype=dtype)
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(space) - 1]
    w = torch.zeros(out, C // groups, *kernel, dtype=torch.float64, requires_grad=True)
    slide = stride, padding, dilation
    z = [conv(one[None].double(), w, None, *slide, groups) for one in x]
    G = torch.randn(V, N, *z[0].shape[1:], dtype=dtype)
    rows = [[torch.autograd.grad(z[n], w, G[v, n, None].double(), retain_graph=True)[0] for n in range(N)]
            for v in range(V)]  # fmt: skip
    wanted = torch.stack([t for row in rows for t in row]) if V else w.new_zeros(0)
    wanted = wanted.reshape(V, N, *w.shape).detach()
    return Unfolded(x, groups, tuple(z[0].shape[2:]), kernel, *slide), G, wanted


def arrived(u: Unfolded, G: Tensor) -> Tensor:  # [V, N, O, *sizes] -> [V, N, B, L, o], a view, as the rule makes it
    return G.reshape(*G.shape[:2], u.groups, G.shape[2] // u.groups, G.shape[3:].numel()).transpose(3, 4)


def near(found: Tensor, wanted: Tensor, what: Any, ulps: float = 8) -> None:
    """A result in single precision, to a few of its roundings of the largest entry."""
    assert found.dtype == torch.float32, what
    assert found.shape == wanted.shape, what
    top = wanted.abs().max()
    assert (found - wanted).abs().max() <= ulps * EPS * top, (what, float((found - wanted).abs().max() / top / EPS))


TAKEN: dict[str, dict[str, Any]] = {
    "plain": {"V": 1, "C": 16, "out": 16},
    "columns": {"V": 5, "C": 16, "out": 32},
    "more inputs": {"V": 2, "C": 48, "out": 16, "space": (4, 4), "kernel": (2, 2)},
    "stride": {"V": 2, "C": 16, "out": 16, "stride": (2, 3)},
    "stride, a border left over": {"V": 2, "C": 16, "out": 16, "stride": (3, 2), "padding": (1, 0)},
    "padding": {"V": 2, "C": 16, "out": 16, "padding": (2, 1)},
    "dilation": {"V": 2, "C": 16, "out": 16, "dilation": (2, 3)},
    "all of them": {"V": 3, "C": 32, "out": 16, "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    "not square": {"V": 2, "C": 16, "out": 16, "kernel": (1, 4)},
    "one by one": {"V": 2, "C": 16, "out": 16, "kernel": (1, 1)},
    "as large as the image": {"V": 2, "C": 16, "out": 16, "kernel": (6, 7)},
    "groups": {"V": 1, "C": 32, "out": 64, "groups": 2},
    "groups, all of them": {"V": 1, "C": 32, "out": 32, "groups": 2, "stride": (2, 1), "padding": (1, 2)},
}
LEFT: dict[str, dict[str, Any]] = {
    "channels": {"V": 2, "C": 12, "out": 16},
    "features": {"V": 2, "C": 16, "out": 24},
    "channels of a group": {"V": 1, "C": 16, "out": 32, "groups": 2},
    "features of a group": {"V": 1, "C": 32, "out": 16, "groups": 2},
    "columns of groups": {"V": 2, "C": 32, "out": 32, "groups": 2},
    "nothing": {"V": 0, "C": 16, "out": 16},
    "double": {"V": 2, "C": 16, "out": 16, "dtype": torch.float64},
    "half": {"V": 2, "C": 16, "out": 16, "dtype": torch.bfloat16},
    "1-d": {"V": 2, "C": 16, "out": 16, "space": (6,), "kernel": (3,), "stride": (1,), "padding": (1,),
            "dilation": (2,)},
    "3-d": {"V": 2, "C": 16, "out": 16, "space": (4, 3, 4), "kernel": (2, 1, 3), "stride": (1, 1, 1),
            "padding": (0, 1, 0), "dilation": (1, 1, 1)},
}  # fmt: skip


@pytest.mark.parametrize("chunk", [None, 1, 9000])
@pytest.mark.parametrize("kind", TAKEN)
def test_products(kind: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples in one call, one by one, and two by two with one left over."""
    u, G, wanted = layer(**TAKEN[kind])
    if chunk is not None:
        V, o = G.shape[0], G.shape[2]
        each = max(V * G[0, 0].numel(), V * o * u.features // 2)
        monkeypatch.setattr(unfolded, "_CACHED", 1 if chunk == 1 else 2 * each)
    found = u.products(arrived(u, G))
    assert found is not None
    assert u._patches is None, "nothing was unfolded"
    V, B = G.shape[0], u.groups
    assert found.shape == (N, V, B, G.shape[2] // B, u.features)
    near(found.transpose(0, 1).reshape(wanted.shape), wanted, kind)


@pytest.mark.parametrize("kind", [*TAKEN, *LEFT])
def test_either_way(kind: str, made: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built, from products or from patches; what is left to patches is said to be so."""
    u, G, wanted = layer(**(TAKEN | LEFT)[kind])
    outer = Outer(arrived(u, G), u, wanted.shape[2:])
    found = outer.dense()
    assert made == [kind in TAKEN]
    monkeypatch.setattr(unfolded, "_able", lambda x, g: False)
    again = replace_built(outer).dense()
    for t in (found, again):
        if t.dtype == torch.float32 and t.numel():
            near(t, wanted, kind)
        else:
            bound = 1e-14 if t.dtype == torch.float64 else 2e-2
            torch.testing.assert_close(t.double(), wanted, rtol=bound, atol=bound * 50)
    assert not made[-1]


def replace_built(outer: Outer) -> Outer:
    assert isinstance(outer.inputs, Unfolded)
    return Outer(outer.g, outer.inputs.map(lambda x: x), outer.shape)


def test_patches_are_what_unfold_says() -> None:
    for kind in ("all of them", "stride, a border left over", "not square"):
        u, _, _ = layer(**TAKEN[kind])
        torch.testing.assert_close(
            u.patches[:, 0], F.unfold(u.x, u.kernel, u.dilation, u.padding, u.stride).mT, rtol=0, atol=0
        )


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "a part": lambda t: torch.cat([t, t], 1)[:, t.shape[1] :],
    "every other": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "samples last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "off the grid": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("how", STRIDES)
def test_strides(how: str) -> None:
    u, G, wanted = layer(**TAKEN["all of them"])
    turned = u.map(STRIDES[how])
    assert torch.equal(turned.x, u.x)
    g = torch.stack([STRIDES[how](each) for each in G])
    for columns in (G, g, G.transpose(0, 1).contiguous().transpose(0, 1)):
        found = turned.products(arrived(u, columns))
        assert found is not None
        near(found.transpose(0, 1).reshape(wanted.shape), wanted, how)


def test_what_a_graph_is_wanted_of_is_left_to_patches() -> None:
    u, G, _ = layer(**TAKEN["plain"])
    g = arrived(u, G)
    with torch.no_grad():
        assert u.products(g.requires_grad_()) is not None
    assert u.products(g) is None
    assert u.map(lambda x: x.requires_grad_()).products(g.detach()) is None
    with torch.backends.mkldnn.flags(enabled=False):
        assert u.products(g.detach()) is None


def test_some_samples() -> None:
    u, G, wanted = layer(**TAKEN["padding"])
    for index in (slice(1, 3), torch.tensor([2, 0, 2]), slice(0, 0)):
        outer = Outer(arrived(u, G), u, wanted.shape[2:]).samples(index)
        some = wanted[:, index]
        assert outer.dense().shape == some.shape
        if some.numel():
            near(outer.dense(), some, index)


# Through the whole ---------------------------------------------------------------------------------------------------


def net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


def twice(m: Any, x: Tensor) -> Tensor:
    """One convolution over two sizes of image: what it receives are positions side by side."""
    h = m.c(x).tanh()
    return m.o(m.c(h).flatten(1))  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: net(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, (2, 3), stride=2)),
    "tanh": lambda: net(nn.Conv2d(16, 32, 3, 2, 1), nn.Tanh(), nn.Conv2d(32, 16, 2, dilation=2, padding=1)),
    "groups": lambda: net(nn.Conv2d(16, 32, 2), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=2, bias=False)),
    "neither": lambda: net(nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 2)),
    "circular": lambda: net(nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"), nn.Softplus()),
    "used twice": lambda: Fn(twice, c=nn.Conv2d(16, 16, 2, padding=1), o=nn.LazyLinear(3)),
}
ASKED = ("grad_sample", "jac", "ggn_diag", "grad_sample_norm")
Y = torch.tensor([0, 2, 1])


def loss(output: Tensor) -> Tensor:
    return F.cross_entropy(output, Y)


@pytest.fixture(params=[None, 3000], ids=["at once", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(unfolded, "_CACHED", request.param)


@pytest.mark.parametrize("asked", [ASKED, ("grad_sample",), ("ggn_diag", "grad_sample_norm")], ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("pieces")
def test_models(name: str, asked: tuple[str, ...], made: list[bool]) -> None:
    model, x = MODELS[name](), torch.randn(N, 16, 4, 5)
    model(x)
    large = deepcopy(model).double()
    wanted = expected_once(name, large, x)
    for _ in range(2):
        model.zero_grad()
        with extend(model, *asked):
            loss(model(x)).backward()
        for key, p in trainable(model).items():
            right = wanted[key]
            near(p.grad, right["grad"], key, 64)  # type: ignore[arg-type]
            for q in asked:
                each = right["grad_sample"].flatten(1).norm(dim=1) if q == "grad_sample_norm" else right[q]
                near(getattr(p, q)[:] if q == "jac" else getattr(p, q), each, (key, q), 64)
    if "grad_sample" in asked:
        assert any(made) == (name not in ("neither", "used twice"))


def expected_once(name: str, large: nn.Module, x: Tensor) -> dict[str, dict[str, Tensor]]:
    torch.set_default_dtype(torch.float64)
    found = expected(large, lambda: large(x.double()), loss, hessian=False)
    torch.set_default_dtype(torch.float32)
    return found


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_kronecker_factors(name: str, sharing: Any) -> None:
    model: Any = MODELS[name]()
    x = torch.randn(N, 16, 4, 5)
    model(x)
    large = deepcopy(model).double()
    for _ in range(2):
        with extend(model, KFAC(fisher="exact", sharing=sharing), "grad_sample"):
            loss(model(x)).backward()
        for k in (0, 2):
            a, J, H, _ = arriving(large, large[k], x.double(), loss)
            a, J = positions(large[k], a, J)  # [N, L, i], [N, C, L, o]
            if sharing == "reduce":
                a, J = a.mean(1, keepdim=True), J.sum(2, keepdim=True)
            A = sum(torch.outer(row, row) for each in a for row in each) / a[..., 0].numel()
            B = sum(J[n, :, p].T @ H[n] @ J[n, :, p] for n in range(N) for p in range(a.shape[1]))
            near(model[k].weight.kfac.A, A, (k, "A"), 32)
            near(model[k].weight.kfac.B, B, (k, "B"), 64)
