"""Where a library like this can be silently wrong: badly scaled data, zeros, coincidences, changes in between.

Each of these once gave a wrong number, here or elsewhere. All against float64 loops.
"""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N, par, random_loss
from oracle import close, compare, expected, hessian_diagonal, jacobian, trainable
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils.checkpoint import checkpoint

from hookjac import HessDiag, HookjacError, Quantity, extend

ALL = ("grad_sample", "jac", "ggn_diag", "hess_diag")


def exact(
    model: nn.Module, forward: Callable[[], Any], loss: Callable[[Any], Tensor] = random_loss, *quantities: Any
) -> None:
    asked = quantities or ALL
    wanted = expected(model, forward, loss)
    with extend(model, *asked):
        loss(forward()).backward()
    for name, p in trainable(model).items():
        for q in asked:
            key = q if isinstance(q, str) else q.name
            close(getattr(p, key), wanted[name][key], (name, key))


def zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# Zeros: nothing comes down, and yet something bends -------------------------------------------------------------


@pytest.mark.parametrize("road", ["auto", "columns", "features", "entries"])
@pytest.mark.parametrize("T", [N, 2 * N, 3])
def test_zero_initialised_layer_below_time_mixing(road: Any, T: int) -> None:
    model = Fn(lambda m, x: m.b(torch.cos(m.a(x.transpose(0, 1)).sum(0))), a=zero(nn.Linear(D, 4)), b=nn.Linear(4, C))
    x = torch.randn(N, T, D)
    exact(model, lambda: model(x), random_loss, HessDiag(road=road))


@pytest.mark.parametrize("road", ["auto", "features"])
def test_zero_derivative_that_hides_mixing(road: Any) -> None:
    """Samples meet in a square whose slope is zero here; its curvature is not."""
    A = torch.softmax(torch.randn(N, N), 1)
    model = Fn(lambda m, x: m.b((h := m.a(x)) + (A @ h) ** 2), a=zero(nn.Linear(D, 4)), b=nn.Linear(4, C))
    x = torch.randn(N, D)
    with extend(model, HessDiag(road=road)):
        random_loss(model(x)).backward()
    close(model.a.weight.hess_diag, hessian_diagonal(random_loss(model(x)), model.a.weight), "hess_diag")


def test_vanishing_probe_keeps_the_rules() -> None:
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), zero(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, C))
    x = torch.randn(N, D)
    exact(model, lambda: model(x))
    deep = nn.Sequential(*[part for _ in range(80) for part in (nn.Linear(8, 8), nn.Tanh())]).float()
    with extend(deep, "hess_diag") as ext:
        deep(torch.randn(N, 8, dtype=torch.float32)).square().sum().backward()
    assert {row.road for row in ext.explain().rows} == {"rule"}


def test_dead_samples_do_not_poison() -> None:
    """An infinite second derivative that nothing passes through: the norm of what a ReLU has closed."""
    model = Fn(lambda m, x: m.b(F.relu(m.a(x) - 2).norm(dim=1, keepdim=True)), a=nn.Linear(D, 4), b=nn.Linear(1, C))
    x = torch.randn(8, D)
    exact(model, lambda: model(x), lambda o: o.square().sum(), "hess_diag")


def test_closed_entries_are_chosen_not_multiplied() -> None:
    for act in (nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0, 1), nn.Threshold(0, 0), nn.Hardshrink(0), nn.Softshrink(0)):
        model = Fn(lambda m, x: m.b(m.r(m.a(x)).abs().sqrt()), a=nn.Linear(D, 4), r=act, b=nn.Linear(4, C))
        with extend(model, "grad_sample"):
            model(torch.randn(N, D)).sum().backward()
        finite = torch.isfinite(model.a.weight.grad)
        assert torch.equal(finite, torch.isfinite(model.a.weight.grad_sample).all(0)), type(act).__name__
        close(model.a.weight.grad_sample.sum(0)[finite], model.a.weight.grad[finite], type(act).__name__)


@pytest.mark.parametrize("act", [nn.ELU(0.7), nn.CELU(1.0), nn.SELU(), nn.Softplus(), nn.GELU(), nn.Softsign()])
def test_second_derivative_at_zero(act: nn.Module) -> None:
    model = nn.Sequential(zero(nn.Linear(D, 4)), act, nn.Linear(4, C))
    x = torch.randn(N, D)
    exact(model, lambda: model(x), random_loss, HessDiag(road="columns"))


# Scales: a large entry beside small ones ------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["matmul", "linear", "layer"])
def test_badly_scaled_features_in_float32(use: str) -> None:
    """What is 1e-4 of the largest entry is no rounding: the row sums must not pass for the diagonal."""
    scale = torch.tensor([1e5, 1.0, 1.0, 1.0], dtype=torch.float32)
    x = torch.randn(8, 4, dtype=torch.float32) * scale
    layer = nn.Linear(4, 1, bias=False).float()
    layer.weight.data /= scale
    how: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "matmul": lambda m, x: x @ m.a.weight.T,
        "linear": lambda m, x: F.linear(x, m.a.weight),
        "layer": lambda m, x: m.a(x),
    }  # fmt: skip
    model = Fn(how[use], a=layer)
    for road in ("auto", "columns", "features", "entries"):
        with extend(model, HessDiag(road=road)):  # type: ignore[arg-type]
            model(x).square().mean().backward()
        right = (2 * x.square().mean(0, keepdim=True)).double()
        assert ((layer.weight.hess_diag - right).abs() <= 1e-5 * right).all(), road


@pytest.mark.parametrize("s", [1e2, 3e3, 1e5])
def test_small_mixed_curvature_beside_large(s: float) -> None:
    parts = {"a": nn.Linear(D, 3).float(), "b": nn.Linear(D, 3).float()}
    model = Fn(lambda m, x: s * m.a(x) / (1 + m.b(x).exp()), **parts)
    x = torch.randn(N, D, dtype=torch.float32)
    reference = copy.deepcopy(model).double()
    with extend(model, "hess_diag"):
        (model(x) / s - 1).square().mean().backward()
    loss = (reference(x.double()) / s - 1).square().mean()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        close(p.hess_diag.double(), hessian_diagonal(loss, q), "hess_diag", 1e-5)


def test_a_large_sample_does_not_hide_what_leaks_into_small_ones() -> None:
    k = torch.tensor([[1e4], [1.0], [1.0], [1.0]], dtype=torch.float32)
    A = torch.tensor([[1, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0.3, 0.4, 0.3], [0, 0, 0.5, 0.5]], dtype=torch.float32)
    model = Fn(lambda m, x: k * (A @ m.a(x)), a=nn.Linear(3, 1, bias=False).float())
    x = torch.randn(4, 3, dtype=torch.float32)
    with extend(model, "jac"):
        model(x).square().sum().backward()
    close(model.a.weight.jac[1:, 0, 0].double(), (A @ x)[1:].double(), "jac", 1e-6)


def test_overflow_in_one_sample_leaves_the_others() -> None:
    x = torch.randn(N, N, D)
    x[0, 0, 0] = float("nan")
    model = Fn(lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh().sum(0)), a=nn.Linear(D, 4), b=nn.Linear(4, C))
    with extend(model, "jac"):
        model(x).sum().backward()
    found = model.a.weight.jac[1:]
    with extend(model, "jac"):
        model(x[1:]).sum().backward()
    close(found, model.a.weight.jac, "clean samples")


@pytest.mark.parametrize(("body", "head"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_two_precisions_in_one_model(body: torch.dtype, head: torch.dtype) -> None:
    model = Fn(lambda m, x: m.b(m.a(x).tanh().to(head)), a=nn.Linear(D, 4).to(body), b=nn.Linear(4, C).to(head))
    reference = copy.deepcopy(model).double()
    reference.forward_ = lambda m, x: m.b(m.a(x).tanh())
    x = torch.randn(N, D)
    wanted = expected(reference, lambda: reference.b(reference.a(x).tanh()), random_loss)
    with extend(model, *ALL):
        random_loss(model(x.to(body))).backward()
    for name, p in trainable(model).items():
        for q in ALL:
            assert getattr(p, q).dtype == p.dtype
            close(getattr(p, q).double(), wanted[name][q], (name, q), 1e-5)


def test_lower_precision_on_the_way_is_no_mixing() -> None:
    model, y = nn.Linear(D, C), torch.tensor([0, 1, 2, 0])
    with extend(model, "grad_sample"):
        F.cross_entropy(model(torch.randn(N, D)).float(), y).backward()
    close(model.weight.grad_sample.sum(0), model.weight.grad, "sum", 1e-5)


def test_saturated_loss_in_float32_is_no_mixing() -> None:
    model, y = nn.Linear(D, C).float(), torch.tensor([0, 1, 2, 0])
    with extend(model, "grad_sample", "hess_diag"):
        out = model(torch.randn(N, D, dtype=torch.float32)) + 100 * F.one_hot(y, C)
        F.cross_entropy(out, y, reduction="none").mean().backward()
    close(model.weight.grad_sample.sum(0), model.weight.grad, "sum", 1e-5)


# The graph: several outputs, complex numbers, sparse gradients, what vmap gets wrong ----------------------------


@pytest.mark.parametrize("part", ["chunk", "split", "unbind", "max"])
def test_one_output_of_a_node_returned_and_another_kept(part: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.enc(x)
        if part == "chunk":
            mu, m.kept = h.chunk(2, 1)
        elif part == "split":
            mu, m.kept = h.split([2, 2], 1)
        elif part == "unbind":
            mu, m.kept = h.reshape(-1, 2, 2).unbind(1)
        else:
            mu, m.kept = h, h.max(1).values
        return mu

    model, x = Fn(forward, enc=nn.Linear(D, 4)), torch.randn(N, D)
    with extend(model, "hess_diag", "grad_sample"):
        (model(x).pow(4).sum() + model.kept.exp().sum()).backward()
    loss = model(x).pow(4).sum() + model.kept.exp().sum()
    for p in model.parameters():
        close(p.hess_diag, hessian_diagonal(loss, p), "hess_diag")
        close(p.grad_sample.sum(0), p.grad, "sum")


def test_distances() -> None:
    """vmap over the node of cdist is wrong in torch 2.13."""
    model, x = Fn(lambda m, x: torch.cdist(m.a(x), m.c), a=nn.Linear(D, 3), c=par(6, 3)), torch.randn(N, D)
    with extend(model, "grad_sample", "jac", "ggn_diag"):
        model(x).pow(3).sum().backward()
    out = model(x)
    for p in model.parameters():
        rows = torch.stack([torch.autograd.grad(o, p, retain_graph=True)[0] for o in out.reshape(-1)])
        rows = rows.reshape(N, 6, *p.shape)
        close(p.jac, rows, "jac")
        slope, curve = 3 * out.detach() ** 2, 6 * out.detach()
        close(p.grad_sample, torch.einsum("nc,nc...->n...", slope, rows), "grad_sample")
        close(p.ggn_diag, torch.einsum("nc,nc...->...", curve, rows**2), "ggn_diag")


@pytest.mark.parametrize("how", ["product", "fft", "view"])
def test_complex_numbers_on_the_way(how: str) -> None:
    ways: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "product": lambda m, x: m.b((torch.complex(m.a(x), m.c(x)) ** 2).real),
        "fft": lambda m, x: m.b(torch.fft.irfft(torch.fft.rfft(m.a(x)) * (1 + 0.5j), n=4).tanh()),
        "view": lambda m, x: m.b((torch.view_as_complex(m.a(x).reshape(-1, 2, 2)) ** 2).real.repeat(1, 2)),
    }
    model = Fn(ways[how], a=nn.Linear(D, 4), c=nn.Linear(D, 4), b=nn.Linear(4, C))
    x = torch.randn(N, D)
    exact(model, lambda: model(x))


SPECTRA: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...]]] = {
    "filter": (lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(m.w), n=4), (3, 2), (4,)),
    "real filter": (lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * m.w, n=4), (3,), (4,)),
    "real bias": (lambda m, x: torch.fft.irfft(torch.fft.rfft(x) + m.w, n=4), (3,), (4,)),
    "mix": (lambda m, x: torch.fft.irfft(torch.einsum("nix,iox->nox", torch.fft.rfft(x), torch.view_as_complex(m.w)),
                                         n=4), (2, 2, 3, 2), (2, 4)),
    "convolution": (lambda m, x: torch.fft.irfft(torch.fft.rfft(x, n=8) * torch.fft.rfft(m.w, n=8), n=8)[..., :4], (4,),
                    (2, 4)),
    "product": (lambda m, x: torch.view_as_real(torch.fft.rfft(x) @ torch.view_as_complex(m.w)), (3, 2, 2), (4,)),
    "vector": (lambda m, x: torch.view_as_real(torch.mv(torch.fft.rfft(x), torch.view_as_complex(m.w))), (3, 2), (4,)),
    "quotient": (lambda m, x: torch.view_as_real(torch.view_as_complex(m.w) / (torch.fft.rfft(x) + 5)), (3, 2), (4,)),
    "activation": (lambda m, x: torch.view_as_real(m.act(torch.fft.rfft(x * m.w))), (4,), (4,)),
}  # fmt: skip


@pytest.mark.parametrize("how", SPECTRA)
def test_real_parameters_of_spectra(how: str) -> None:
    """Rules are for real numbers; of complex ones they would forget the conjugate."""
    forward, shape, data = SPECTRA[how]
    model, x = Fn(lambda m, x: forward(m, x).sin().flatten(1), w=par(*shape), act=nn.Tanh()), torch.randn(3, *data)
    exact(model, lambda: model(x))


def test_sparse_embeddings() -> None:
    model = Fn(lambda m, x: m.b(m.e(x).mean(1)), e=nn.Embedding(7, 4, sparse=True), b=nn.Linear(4, C))
    other = copy.deepcopy(model)
    other.e.sparse = False
    x = torch.randint(7, (N, 3))
    wanted = expected(other, lambda: other(x), random_loss)
    with extend(model, *ALL):
        random_loss(model(x)).backward()
    for q in ALL:
        close(getattr(model.e.weight, q), wanted["e.weight"][q], q)


class Peculiar(torch.autograd.Function):
    """A backward that writes on what it is given, refuses vmap with an error of its own, and has a `variable`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = 3
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        g.mul_(2)
        if torch._C._functorch.is_batchedtensor(g):  # type: ignore[attr-defined]
            raise TypeError("my kernel takes plain tensors")
        return g


def test_peculiar_functions() -> None:
    model, x = Fn(lambda m, x: Peculiar.apply(m.a(x).sin()), a=nn.Linear(D, C)), torch.randn(N, D)
    exact(model, lambda: model(x), random_loss, "jac")


@pytest.mark.parametrize("top", [False, True])
def test_reentrant_checkpoints(top: bool) -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    if top:
        x = torch.randn(N, 4, requires_grad=True)
        wanted = expected(inner, lambda: inner(x), random_loss)
        with extend(inner, *ALL):
            random_loss(checkpoint(inner, x, use_reentrant=True)).backward()
        model: nn.Module = inner
    else:
        x = torch.randn(N, D)
        way = lambda m, x: torch.softmax(checkpoint(m.i, m.a(x), use_reentrant=True), 1)
        model = Fn(way, a=nn.Linear(D, 4), i=inner)
        plain = Fn(lambda m, x: torch.softmax(m.i(m.a(x)), 1), a=model.a, i=inner)
        wanted = expected(plain, lambda: plain(x), random_loss)
        with extend(model, *ALL):
            random_loss(model(x)).backward()
    compare(model, wanted, ALL)


def test_second_backward_through_a_reentrant_checkpoint_is_refused() -> None:
    way = lambda m, x: m.o(checkpoint(lambda h: torch.atan2(h, m.s), m.i(x), use_reentrant=True))
    model = Fn(way, i=nn.Linear(D, 4), s=par(4), o=nn.Linear(4, C))
    with pytest.raises(HookjacError, match="use_reentrant=False"), extend(model, "hess_diag"):
        random_loss(model(torch.randn(N, D))).backward()


# Changes between forward and backward ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "option", "value"),
    [
        (nn.LeakyReLU(0.1), "negative_slope", 0.7), (nn.ELU(1.0), "alpha", 0.3), (nn.CELU(1.0), "alpha", 0.3),
        (nn.Softplus(1.0), "beta", 3.0), (nn.Threshold(0.1, 0.0), "threshold", -0.5), (nn.Hardtanh(), "max_val", 0.1),
        (nn.Hardshrink(0.1), "lambd", 0.9), (nn.GELU(), "approximate", "tanh"),
    ],
    ids=str,
)  # fmt: skip
def test_options_are_those_of_the_forward(act: nn.Module, option: str, value: Any) -> None:
    model = nn.Sequential(nn.Linear(D, 6), act, nn.Linear(6, C))
    x, before = torch.randn(N, D), getattr(act, option)
    wanted = expected(model, lambda: model(x), random_loss)
    with extend(model, "grad_sample", "hess_diag"):
        loss = random_loss(model(x))
        setattr(act, option, value)
        loss.backward()
    setattr(act, option, before)
    compare(model, wanted, ("grad_sample", "hess_diag"))


def test_batch_size_is_that_of_the_graph() -> None:
    model, x = nn.Linear(D, C), torch.randn(N, D)
    for other in (x[:0], x[:2]):
        with extend(model, "grad_sample"):
            loss = model(x).square().sum()
            model(other)
            loss.backward()
        close(model.weight.grad_sample.sum(0), 2 * model(x).T.detach() @ x, "sum")
    with extend(model, "grad_sample", "ggn_diag", "hess_diag") as ext:
        loss = model(x[:0]).sum() + model.weight.square().sum()
        model(x)
        loss.backward()
    assert model.weight.grad_sample.shape == (0, C, D)
    for found in (model.weight.hess_diag, model.weight.ggn_diag):
        close(found, torch.full((C, D), 2.0), "penalty")
    assert ext.explain().rows


def test_backward_in_inference_mode() -> None:
    model, x = nn.Linear(D, C), torch.randn(N, D)
    with extend(model, "ggn_diag", "hess_diag"):
        loss = model(x).square().sum()
        with torch.inference_mode():
            loss.backward()
    right = 2 * x.square().sum(0).expand(C, D)
    close(model.weight.hess_diag, right, "hess_diag")
    close(model.weight.ggn_diag, right, "ggn_diag")
    assert not model.weight.hess_diag.is_inference()


def test_a_weight_that_is_not_the_parameter() -> None:
    class Doubled(nn.Linear):
        @property
        def weight(self) -> Tensor:  # type: ignore[override]
            return self._parameters["weight"] * 2

        @weight.setter
        def weight(self, value: nn.Parameter) -> None:
            self.register_parameter("weight", value)

    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))
    model[2].__dict__["weight"] = torch.randn(C, 4)
    x = torch.randn(N, D)
    exact(model, lambda: model(x))


# Hooks of others -------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign() -> Iterator[None]:
    handle = hooks.register_module_forward_hook(lambda m, i, o: o * 2 if isinstance(m, nn.Linear) else None)
    yield
    handle.remove()


@pytest.mark.usefixtures("foreign")
def test_global_hooks_of_others_come_before_ours() -> None:
    model, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)), torch.randn(N, D)
    exact(model, lambda: model(x))


def test_a_hook_on_the_model_changes_its_output() -> None:
    model, x = nn.Sequential(nn.Linear(D, C)), torch.randn(N, D)
    handle = model.register_forward_hook(lambda m, i, o: o.tanh())
    exact(model, lambda: model(x))
    assert list(model._forward_hooks) == [handle.id]


def test_gradient_hooks_are_called_once_and_not_obeyed() -> None:
    model, x, calls = nn.Linear(D, C), torch.randn(N, D), []
    model.weight.register_hook(lambda g: calls.append(1) or g * 0)
    for road in ("columns", "features", "entries"):
        with extend(model, "grad_sample", HessDiag(road=road)):  # type: ignore[arg-type]
            out = model(x)
            out.register_hook(lambda g: calls.append(1))
            out.square().sum().backward()
        assert len(calls) == 2
        calls.clear()
        close(model.weight.hess_diag, 2 * x.square().sum(0).expand(C, D), road)
        assert not model.weight.grad.any()


def _retains(inside: bool) -> Any:
    """A model one of whose tensors retains its gradient: a hidden one, asked within the forward, or its output."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.kept = m.a(x).relu()
        if inside:
            m.kept.retain_grad()
        return m.b(m.kept)

    return Fn(forward, a=nn.Linear(D, 4), b=nn.Linear(4, C))


def _check_retained(quantity: str, inside: bool) -> None:
    model, x = _retains(inside), torch.randn(N, D)
    for _ in range(2):
        with extend(model, quantity):
            out = model(x)
            if not inside:
                out.retain_grad()
            out.pow(4).sum().backward()
        slope = 4 * out.detach() ** 3
        found, expected = (model.kept.grad, slope @ model.b.weight) if inside else (out.grad, slope)
        assert found is not None, quantity
        close(found, expected, quantity)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_retained_gradients_are_the_users(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for quantity in ALL:
        _check_retained(quantity, inside)
    # where ours are delivered, a backward that carries nothing but frees the graph would leave them empty
    monkeypatch.setattr("hookjac.deliver._DELIVERY", -1e9)
    monkeypatch.setattr("hookjac.passing._IN_ENGINE", 1e9)
    for quantity in ("jac", "ggn_diag", "kfac", "grad_sample"):
        _check_retained(quantity, inside)


def test_what_retains_is_torchs_own_again() -> None:
    before = torch.Tensor.retain_grad
    model, x = _retains(True), torch.randn(N, D)
    with extend(model), pytest.raises(RuntimeError, match="boom"):
        model(x)
        raise RuntimeError("boom")
    assert torch.Tensor.retain_grad is before
    assert "retain_grad" not in vars(torch.Tensor)


# Nothing left behind, whatever happens ---------------------------------------------------------------------------


class Stop(BaseException):
    pass


def test_interrupted_forward() -> None:
    def interrupted(m: Any, x: Tensor) -> Tensor:
        if m.stop:
            raise Stop
        return m.a(x)

    model, x = Fn(interrupted, a=nn.Linear(D, C)), torch.randn(N, D)
    with torch.device("cpu"):
        before = torch.overrides._get_current_function_mode_stack()
        model.stop = True
        with pytest.raises(Stop), extend(model, "grad_sample"):
            model(x)
        assert torch.overrides._get_current_function_mode_stack() == before
        with extend(model, "grad_sample"):
            with pytest.raises(Stop):
                model(x)
            model.stop = False
            model(x).sum().backward()
        assert model.a.weight.grad_sample.shape == (N, C, D)
        assert torch.overrides._get_current_function_mode_stack() == before


def test_blocks_left_in_any_order() -> None:
    flags = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    modes = torch.overrides._get_current_function_mode_stack()
    one, two, x = nn.Linear(D, C), nn.Linear(D, C), torch.randn(N, D)
    first, second = extend(one, "hess_diag"), extend(two, "hess_diag")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    two(x).square().sum().backward()
    second.__exit__(None, None, None)
    assert two.weight.hess_diag.shape == (C, D)
    assert flags == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    assert torch.overrides._get_current_function_mode_stack() == modes
    with pytest.raises(HookjacError, match="this extend block is not open"):
        second.__exit__(None, None, None)


def test_no_entry_stays_in_the_tables_of_torch() -> None:
    tables = [v for k, v in vars(hooks).items() if k.startswith("_global_") and isinstance(v, dict)]
    before = [len(t) for t in tables]
    filters = list(warnings.filters)
    for _ in range(5):
        with extend(nn.Linear(D, C), "jac") as ext:
            ext.model(torch.randn(N, D)).sum().backward()
    assert [len(t) for t in tables] == before
    assert warnings.filters == filters


@pytest.mark.parametrize("samples", [1, 3])
def test_an_output_under_a_layer_of_zeros(samples: int) -> None:
    """As layers are initialised that shall begin as nothing: no probe comes through, but the loss uses both outputs."""
    last = nn.Linear(4, 2)
    nn.init.zeros_(last.weight)
    model: Any = Fn(lambda m, x: {"last": m.b(m.h(x)), "middle": m.h(x)}, a=nn.Linear(D, 4), b=last)
    hidden: dict[int, Tensor] = {}

    def h(x: Tensor) -> Tensor:
        return hidden.setdefault(id(x), torch.sin(model.a(x)) * model.a(x))

    model.h, x = h, torch.randn(samples, D)
    asked = ("ggn_diag", "ggn_block", "hess_diag")
    with extend(model, *asked, output="last"):
        out = model(x)
        (out["last"].square().sum() + out["middle"].pow(4).sum()).backward()
    hidden.clear()
    out = model(x)
    for name, p in model.named_parameters():
        G = torch.zeros(p.numel(), p.numel())
        for t, bend in ((out["last"], torch.full_like(out["last"], 2.0)), (out["middle"], 12 * out["middle"].square())):
            J = jacobian(t, p).reshape(t.numel(), p.numel())
            G += J.T @ (bend.detach().reshape(-1, 1) * J)
        close(p.ggn_block, G, name)
        close(p.ggn_diag.flatten(), G.diagonal(), name)
        loss = out["last"].square().sum() + out["middle"].pow(4).sum()
        close(p.hess_diag, hessian_diagonal(loss, p), name)


def test_kernels_that_vmap_loops_over_are_our_own_affair() -> None:
    """PyTorch tells of each once in a process: a fresh one."""
    program = """
import torch, hookjac
from torch import nn
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    def forward(self, x):
        q, k, v = (t(x).unflatten(2, (2, 4)).transpose(1, 2) for t in (self.q, self.k, self.v))
        return nn.functional.scaled_dot_product_attention(q, k, v).flatten(1)
a, x = Attention(), torch.randn(4, 5, 8)
for asked in ("ggn_diag", "jac", "kfac", "grad_sample"):
    for _ in range(3):
        with hookjac.extend(a, asked):
            a(x).square().sum().backward()
"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "vmap" not in done.stderr
    assert "batching rule" not in done.stderr


def test_results_of_the_last_step_do_not_survive_an_error() -> None:
    model, x = nn.Linear(D, C), torch.randn(N, D)
    with extend(model, "grad_sample"):
        model(x).sum().backward()
    with pytest.raises(HookjacError, match="mixes samples"), extend(model, "grad_sample"):
        model(x).square().mean().sqrt().backward()
    assert not hasattr(model.weight, "grad_sample")


@pytest.mark.parametrize("form", ["generator", "values", "set", "edge"])
def test_inputs_in_any_form(form: str) -> None:
    model, x = nn.Linear(D, C), torch.randn(N, D)
    forms: dict[str, Callable[[], Any]] = {
        "generator": lambda: (p for p in model.parameters()),
        "values": lambda: dict(model.named_parameters()).values(),
        "set": lambda: set(model.parameters()),
        "edge": lambda: [torch.autograd.graph.get_gradient_edge(p) for p in model.parameters()],
    }
    with extend(model, "grad_sample"):
        model(x).sum().backward(inputs=forms[form]())
    assert model.weight.grad_sample.shape == (N, C, D)


def test_default_device_does_not_matter() -> None:
    model, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)), torch.randn(N, D)
    with extend(model, *ALL):
        loss = random_loss(model(x))
        with torch.device("meta"):
            loss.backward()
    assert model[0].weight.hess_diag.device.type == "cpu"


def test_compiled_models() -> None:
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)), torch.randn(N, D)
    wanted = expected(model, lambda: model(x), random_loss)
    compiled: Any = torch.compile(model, backend="eager")
    with extend(compiled, *ALL):  # its first call: compiled inside the block
        random_loss(compiled(x)).backward()
    compare(model, wanted, ALL)
    torch._dynamo.reset()


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_before_the_block(fullgraph: bool) -> None:
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)), torch.randn(N, D)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    random_loss(compiled(x)).backward()
    with pytest.raises(HookjacError, match="was compiled and had run before this block"), extend(compiled, *ALL):
        random_loss(compiled(x)).backward()
    wanted = expected(model, lambda: model(x), random_loss)
    with extend(compiled._orig_mod, *ALL):
        random_loss(compiled._orig_mod(x)).backward()
    compare(model, wanted, ALL)
    torch._dynamo.reset()


def test_compiled_as_one_graph() -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(nn.Linear(D, C), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="inside an extend block, compile without fullgraph=True"):
        with extend(compiled, *ALL):
            compiled(torch.randn(N, D))
    torch._dynamo.reset()


def test_compiled_loss_has_no_second_derivative() -> None:
    torch._dynamo.reset()
    model, y = nn.Linear(D, C), torch.tensor([0, 1, 2, 0])
    loss: Any = torch.compile(lambda o: F.cross_entropy(o, y), backend="aot_eager")
    with pytest.raises(HookjacError, match="cannot be differentiated twice"), extend(model, "hess_diag"):
        loss(model(torch.randn(N, D))).backward()
    torch._dynamo.reset()


# Losses: coincidences of size, kinks, side data -----------------------------------------------------------------


COINCIDENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "as many kept as samples": lambda o: o[torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)]
    .exp().sum(),
    "as many outputs as samples": lambda o: (o - 1).pow(4).mean(0).sum(),
    "transposed": lambda o: (o.T.exp() * torch.arange(o.shape[0])).sum(),
    "flipped": lambda o: (o.flip(0).exp() * torch.arange(o.shape[0])[:, None]).sum(),
    "permuted": lambda o: F.cross_entropy(o[[2, 0, 3, 1]], torch.tensor([0, 1, 2, 0])),
    "drawn with repetition": lambda o: F.cross_entropy(o[[2, 2, 3, 1]], torch.tensor([0, 1, 2, 0])),
    "stacked": lambda o: (torch.stack([o[n].exp() for n in reversed(range(len(o)))]) * torch.arange(4)[:, None]).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", COINCIDENCES)
@pytest.mark.parametrize("outputs", [3, N])
def test_a_first_axis_of_the_right_size_by_chance(name: str, outputs: int) -> None:
    if name == "as many kept as samples" and outputs != 3:
        pytest.skip("its mask is for three outputs")
    model, x = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, outputs)), torch.randn(N, D)
    loss = COINCIDENCES[name]
    with extend(model, "grad_sample", "hess_diag"):
        loss(model(x)).backward()
    out = model(x)
    (rows,) = torch.autograd.grad(loss(out), out, retain_graph=True)
    for p in model.parameters():
        close(p.hess_diag, hessian_diagonal(loss(out), p), "hess_diag")
        for n in range(N):
            (g,) = torch.autograd.grad(out[n], p, rows[n], retain_graph=True)
            close(p.grad_sample[n], g, n)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda o: o.max(),
    "max over samples": lambda o: o.max(0).values.sum(),
    "hardest": lambda o: o.square().sum(1).topk(2).values.sum(),
    "median": lambda o: o.median(),
    "sorted": lambda o: (o.sort(0).values * torch.arange(1.0, N + 1)[:, None]).sum(),
    "a pair": lambda o: (o[0] - o[1]).abs().sum(),
    "total variation": lambda o: (o[1:] - o[:-1]).abs().sum(),
    "of the mean": lambda o: (o.mean(0) - 1).abs().sum(),
    "hinge of the mean": lambda o: F.relu(o.mean() + 3),
    "largest of two samples": lambda o: torch.maximum(o[0], o[1]).sum(),
    "clamped total": lambda o: o.sum().clamp(-100, 100),
}


@pytest.mark.parametrize("name", MIXING)
def test_piecewise_linear_mixing_is_refused(name: str) -> None:
    model, x = nn.Linear(D, C), torch.randn(N, D)
    with pytest.raises(HookjacError, match="mixes samples"), extend(model, "grad_sample"):
        MIXING[name](model(x)).backward()


PIECEWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "absolute": lambda o: o.abs().sum(),
    "of some": lambda o: o[:2].abs().sum() + o[3].max(),
    "masked": lambda o: F.l1_loss(o[o > 0], torch.zeros(int((o > 0).sum()))),
    "transposed": lambda o: o.T.max(0).values.sum(),
    "hinge": lambda o: F.multi_margin_loss(o, torch.tensor([0, 1, 2, 0])),
    "huber": lambda o: F.huber_loss(o[1:], torch.ones(N - 1, C)),
    "largest": lambda o: torch.maximum(o[1:], torch.zeros(())).sum(),
}


@pytest.mark.parametrize("name", PIECEWISE)
def test_piecewise_linear_sums_are_not_refused(name: str) -> None:
    model, x = nn.Linear(D, C), torch.randn(N, D)
    with extend(model, "grad_sample"):
        PIECEWISE[name](model(x)).backward()
    close(model.weight.grad_sample.sum(0), model.weight.grad, "sum")


def test_mixing_of_two_outputs() -> None:
    model = Fn(lambda m, x: (m.a(x), m.b(x)), a=nn.Linear(D, C), b=nn.Linear(D, C))
    with pytest.raises(HookjacError, match="mixes samples"), extend(model, "grad_sample", output=0):
        a, b = model(torch.randn(N, D))
        (a.mean(0) - b.mean(0)).square().sum().backward()


SIDE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda m, x: F.linear(x.repeat(3, 1), m.w).pow(4).sum(),
    "product": lambda m, x: (x * m.w[0]).pow(4).sum(),
    "where": lambda m, x: torch.where(x > 0, m.w[0], 0 * m.w[0]).pow(2).sum(),
    "one at a time": lambda m, x: torch.stack([(x[n] @ m.w[0]) ** 4 for n in range(N)]).sum(),
    "looked up": lambda m, x: F.embedding(torch.tensor([0, 1, 1, 0]), m.w).pow(4).sum(),
}


@pytest.mark.parametrize("name", SIDE)
def test_side_data_is_not_taken_for_a_penalty(name: str) -> None:
    model, x = Fn(lambda m, x: m.a(x), a=nn.Linear(N, C), w=par(2, N)), torch.randn(N, N)
    with pytest.raises(HookjacError, match="these may be the 4 samples"), extend(model, "grad_sample"):
        (model(x).square().sum() + SIDE[name](model, x)).backward()


def test_fisher_penalty_is_a_penalty() -> None:
    """Elastic weight consolidation: a constant of the weight's own shape, whatever the sizes."""
    model, x = nn.Linear(N, N), torch.randn(N, N)
    fisher, before = torch.rand(N, N), torch.randn(N, N)
    with extend(model, "grad_sample", "hess_diag"):
        (model(x).square().sum() + (fisher * (model.weight - before) ** 2).sum()).backward()
    close(model.weight.hess_diag, 2 * x.square().sum(0).expand(N, N) + 2 * fisher, "hess_diag")
    close(model.weight.grad_sample.sum(0), model.weight.grad, "sum")


@pytest.mark.parametrize("K", [3, N])
def test_what_is_made_of_parameters_alone_holds_no_samples(K: int) -> None:
    way = lambda m, x: {"logits": m.a(x), "prototypes": m.w / m.w.norm(dim=1, keepdim=True)}
    model, x = Fn(way, a=nn.Linear(D, C), w=par(K, D)), torch.randn(N, D)
    with extend(model, "grad_sample", output="logits"):
        out = model(x)
        (out["logits"].square().sum() + (out["prototypes"].pow(3)).sum()).backward()
    for n in range(N):
        close(model.w.grad_sample[n], model.w.grad / N, "shared equally")


def test_uncertainty_weighting_has_curvature_but_no_summands() -> None:
    model = Fn(lambda m, x: m.a(x), a=nn.Linear(D, C), s=nn.Parameter(torch.tensor(0.3)))
    x, y = torch.randn(N, D), torch.tensor([0, 1, 2, 0])
    loss = lambda: torch.exp(-model.s) * F.cross_entropy(model(x), y) + model.s
    with extend(model, "hess_diag", "jac"):
        loss().backward()
    for p in model.parameters():
        close(p.hess_diag, hessian_diagonal(loss(), p), "hess_diag")
    with pytest.raises(HookjacError, match="parameter 's' scales the loss above the samples"):
        with extend(model, "grad_sample"):
            loss().backward()


def test_ggn_is_that_of_the_selected_output() -> None:
    way = lambda m, x: {"logits": (h := m.a(x)), "probs": h.softmax(1)}
    model, x, y = Fn(way, a=nn.Linear(D, C)), torch.randn(N, D), torch.tensor([0, 1, 2, 0])
    fisher = expected(model, lambda: model(x)["logits"], lambda o: F.cross_entropy(o, y))["a.weight"]["ggn_diag"]
    with extend(model, "ggn_diag", output="logits"):
        F.nll_loss(model(x)["probs"].log(), y).backward()
    close(model.a.weight.ggn_diag, fisher, "Fisher information")


def test_an_output_modified_in_place_is_refused_for_ggn() -> None:
    model = Fn(lambda m, x: m.a(x).sin().square().unsqueeze(1), a=nn.Linear(D, 2))
    with pytest.raises(HookjacError, match="modified in place"), extend(model, "ggn_diag"):
        out = model(torch.randn(N, D))
        out.mul_(2.0)
        random_loss(out).backward()


@pytest.mark.parametrize(
    "way",
    [lambda m, x: m.a(x).T, lambda m, x: m.a(x).mean(0), lambda m, x: m.a(x[0])],
    ids=["transposed", "averaged", "one sample"],
)
def test_features_are_no_samples(way: Callable[[Any, Tensor], Tensor]) -> None:
    model = Fn(way, a=nn.Linear(D, D))
    with pytest.raises(HookjacError, match=r"layer 'a' .* output features would be the samples"):
        with extend(model, "grad_sample"):
            model(torch.randn(D, D)).square().sum().backward()


def test_instance_norm_is_welcome_and_functional_batch_norm_is_not() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True), nn.Flatten(), nn.Linear(12, C))
    x = torch.randn(N, 2, 5)
    exact(model, lambda: model(x))
    mixing = Fn(lambda m, x: F.batch_norm(m.a(x), None, None, training=True), a=nn.Linear(D, C))
    with pytest.raises(HookjacError, match="a functional batch norm"), extend(mixing, "grad_sample"):
        mixing(torch.randn(N, D)).exp().sum().backward()


def test_penalty_on_an_effective_weight_with_one_sample() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        m.w = m.v * m.g
        return F.linear(x, m.w)

    model = Fn(way, v=par(6, D), g=par(6, 1))
    for n in (1, 3, N):
        x = torch.randn(n, D)
        model.zero_grad()
        with extend(model, "grad_sample", "hess_diag"):
            (model(x).pow(3).sum() + model.w.square().sum()).backward()
        loss = model(x).pow(3).sum() + model.w.square().sum()
        for p in model.parameters():
            close(p.hess_diag, hessian_diagonal(loss, p), n)
            close(p.grad_sample.sum(0), p.grad, n)


def test_shapes_of_given_gradients() -> None:
    model, x = nn.Linear(D, C), torch.randn(N, D)
    with pytest.raises(HookjacError, match=r"a gradient of shape \(4,\) for a tensor of \(4, 3\)"):
        with extend(model, "grad_sample"):
            model(x).backward(torch.ones(N))
    with pytest.raises(HookjacError, match="is_grads_batched"), extend(model, "grad_sample"):
        out = model(x)
        torch.autograd.grad(out, list(model.parameters()), torch.ones(2, N, C), is_grads_batched=True)
    with pytest.raises(HookjacError, match="started from a GradientEdge"), extend(model, "grad_sample"):
        edge = torch.autograd.graph.get_gradient_edge(model(x).sum())
        torch.autograd.grad(edge, list(model.parameters()))


def test_quantities_check_themselves() -> None:
    for name in ("requires_grad", "not a name", "grad"):
        with pytest.raises(ValueError, match="a quantity's name becomes an attribute"):
            Quantity(name=name, columns="loss", reduce=lambda got: got.zeros())
    with pytest.raises(TypeError, match=r"call it: HessDiag\(\)"):
        extend(nn.Linear(2, 2), HessDiag)  # type: ignore[arg-type]
    mine = Quantity(name="mine", columns="hessian", reduce=lambda got: got.zeros())
    with pytest.raises(ValueError, match="share one walk"):
        extend(nn.Linear(2, 2), HessDiag(road="entries"), mine)


def test_inputs_that_contain_themselves() -> None:
    tree: dict[str, Any] = {"x": torch.randn(N, D)}
    tree["self"] = tree
    model = Fn(lambda m, t: m.a(t["x"]), a=nn.Linear(D, C))
    with extend(model, "grad_sample"):
        model(tree).sum().backward()
    assert model.a.weight.grad_sample.shape == (N, C, D)
    gc.collect()


def test_output_names_are_keys_before_they_are_methods() -> None:
    model, x = Fn(lambda m, x: {"values": m.a(x), "items": m.a(x) * 2}, a=nn.Linear(D, C)), torch.randn(N, D)
    with extend(model, "jac", output="values"):
        model(x)["values"].sum().backward()
    assert model.a.weight.jac.shape == (N, C, C, D)
    plain = nn.Linear(D, C)
    with pytest.raises(HookjacError, match="the model returned one tensor"), extend(plain, "jac", output=0):
        plain(x).sum().backward()


def test_a_frozen_layer_above_where_samples_are_permuted() -> None:
    parts = {"a": nn.Linear(D, 4), "f": nn.Linear(4, 4).requires_grad_(False), "b": nn.Linear(4, C)}
    model, x = Fn(lambda m, x: m.b(m.f(m.a(x).flip(0)).flip(0)), **parts), torch.randn(N, D)
    exact(model, lambda: model(x))


def test_empty_layers() -> None:
    way = lambda m, x: torch.cat([m.a(x), m.b(m.e(x))], 1)
    model, x = Fn(way, a=nn.Linear(D, C), e=nn.Linear(D, 0), b=nn.Linear(0, 2)), torch.randn(N, D)
    exact(model, lambda: model(x))


def test_an_output_made_of_parameters_alone_still_has_samples() -> None:
    model = Fn(lambda m, x: m.w.expand(len(x), -1).sin() + 0 * m.a(x), w=par(C), a=nn.Linear(D, C))
    alone = Fn(lambda m, x: (m.w * 2).expand(len(x), -1), w=par(C))
    for net in (model, alone):
        x = torch.randn(N, D)
        exact(net, lambda net=net, x=x: net(x))


# What a batch of one hides, and what vanishes ---------------------------------------------------------------------


def test_a_single_number_below_a_group_norm() -> None:
    """PyTorch's batched second derivative of GroupNorm is wrong for a batch of one, too."""
    x = torch.randn(2, 2, 2)
    for f in (
        lambda m, x: (x * m.s).sin() * m.s,
        lambda m, x: (m.s.exp() * x).sin(),
        lambda m, x: torch.softmax(x / m.s, -1),
    ):
        model = Fn(lambda m, x, f=f: m.n(f(m, x)).tanh(), s=nn.Parameter(torch.tensor([0.7])), n=nn.GroupNorm(1, 2))
        exact(model, lambda model=model: model(x))  # type: ignore[misc]


@pytest.mark.parametrize("n", [1, 3])
def test_instance_norms_where_no_sample_can_be_seen(n: int) -> None:
    """Below zeros, one sample at a time, or some samples only: no reason to think that samples mix."""
    x, zero = torch.randn(n, 2, 3, 3), nn.Conv2d(2, 1, 2)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)  # type: ignore[arg-type]
    conv = lambda: nn.Conv2d(2, 2, 1)
    for model in (
        nn.Sequential(conv(), nn.InstanceNorm2d(2, affine=True), nn.Tanh(), zero, nn.Flatten()),
        Fn(lambda m, x: (x + m.s * m.n(m.c(x)).tanh()).flatten(1).sin(), c=conv(), n=nn.InstanceNorm2d(2),
           s=nn.Parameter(torch.zeros(1))),
        Fn(lambda m, x: torch.stack([m.n(m.c(t[None]))[0] for t in x]).flatten(1).sin(), c=conv(),
           n=nn.InstanceNorm2d(2)),
        Fn(lambda m, x: torch.cat([m.n(m.c(x[:1])), m.c(x[1:])]).flatten(1).sin(), c=conv(),
           n=nn.InstanceNorm2d(2)),
    ):  # fmt: skip
        exact(model, lambda model=model: model(x))  # type: ignore[misc]


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_scaled_by_frequency_are_as_pytorch_has_them(mode: str) -> None:
    model = nn.EmbeddingBag(5, 1, mode=mode, scale_grad_by_freq=True)
    ids = torch.tensor([[0, 1, 1], [2, 3, 0]])
    with extend(model, "grad_sample"):
        random_loss(model(ids)).backward()
    assert model.weight.grad is not None
    close(model.weight.grad_sample.sum(0), model.weight.grad, mode)
