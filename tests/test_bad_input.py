"""Every refusal names what is wrong, and leaves nothing behind: the next step is unharmed."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import C, D, Fn, N, mlp, par
from leftovers import attributes, state
from oracle import close, compare, expected, trainable
from torch import Tensor, nn

import hookjac
from hookjac import HookjacError, extend

Y = torch.tensor([0, 2, 1, 2])


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = state()
    yield
    assert state() == before


def works(model: nn.Module) -> None:
    """The next step is exact, and only results are left on the parameters."""
    x = torch.randn(N, D)
    wanted = expected(model, lambda: model(x), lambda o: F.cross_entropy(o, Y))
    model.zero_grad()
    with extend(model):
        F.cross_entropy(model(x), Y).backward()
    compare(model, wanted, ("grad_sample", "jac", "hess_diag"))


def refuses(match: str, model: Any, step: Callable[[], Any], *quantities: Any, **options: Any) -> None:
    before = attributes(model)
    with pytest.raises(HookjacError, match=match), extend(model, *quantities, **options):
        step()
    assert attributes(model) == before


def test_unknown_quantity() -> None:
    with pytest.raises(ValueError, match="unknown quantity 'hess_dia'; did you mean 'hess_diag'"):
        extend(nn.Linear(1, 1), "hess_dia")
    with pytest.raises(ValueError, match="unknown quantity 'zzzzzz' Known: grad_sample"):
        extend(nn.Linear(1, 1), "zzzzzz")
    with pytest.raises(TypeError, match="a quantity is a name or a record"):
        extend(nn.Linear(1, 1), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'jac' was asked for twice"):
        extend(nn.Linear(1, 1), "jac", hookjac.Jac())
    with pytest.raises(ValueError, match="loss_reduction must be"):
        hookjac.GradSample(loss_reduction="average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="road must be"):
        hookjac.HessDiag(road="fast")  # type: ignore[arg-type]


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module, got function"):
        extend(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(HookjacError, match=r"nn\.DataParallel"):
        extend(nn.DataParallel(nn.Linear(1, 1)))


def test_no_trainable_parameter() -> None:
    with pytest.raises(HookjacError, match="no trainable parameter"), extend(nn.Tanh()):
        pass
    with (
        pytest.raises(HookjacError, match="2 parameters, all with requires_grad=False"),
        extend(nn.Linear(2, 2).requires_grad_(False)),
    ):
        pass


def test_parameter_without_data() -> None:
    with pytest.raises(HookjacError, match="parameter 'weight' is on the meta device"):
        with extend(nn.Linear(D, C, device="meta")):
            pass


@pytest.mark.parametrize("how", ["compiled", "scripted"])
def test_batchnorm_hidden_in_compiled_code(how: str) -> None:
    """Its layers call no hooks, and their nodes are in one that nobody can look into."""
    model: Any = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Linear(4, C))
    x = torch.randn(N, D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, of global hooks, and that scripts are deprecated
        hidden: Any = torch.compile(model, backend="aot_eager") if how == "compiled" else torch.jit.script(model)
        for _ in range(2):
            hidden(x)  # before there are hooks; and TorchScript is not optimised when it runs for the first time
        with pytest.raises(HookjacError, match=r"1' \(BatchNorm1d\), hidden in compiled code, normalises with"):
            with extend(hidden, "grad_sample"):
                hidden(x).square().sum().backward()
        hidden.eval()
        for _ in range(2):
            hidden(x)
        with extend(hidden, "grad_sample"):
            hidden(x).square().sum().backward()
    for p in hidden.parameters():
        torch.testing.assert_close(p.grad_sample.sum(0), p.grad)
    torch._dynamo.reset()


def test_complex_parameter() -> None:
    model = Fn(lambda m, x: x, w=nn.Parameter(torch.zeros(2, dtype=torch.complex128)))
    with pytest.raises(HookjacError, match="parameter 'w' is complex"), extend(model):
        pass


def test_integer_parameters_are_no_matter() -> None:
    model = mlp(nn.Tanh)
    model.register_parameter("count", nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False))
    works(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_forward_without_grad(mode: Any) -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)

    def step() -> None:
        with mode():
            loss = F.cross_entropy(model(x), Y)
        loss.backward()

    refuses("does not require grad: the forward ran under", model, step)
    works(model)


def test_loss_not_connected() -> None:
    model, other, x = mlp(nn.Tanh), mlp(nn.Tanh), torch.randn(N, D)

    def elsewhere() -> None:
        model(x)
        F.cross_entropy(other(x), Y).backward()

    def detached() -> None:
        F.cross_entropy(model(x).detach(), Y).backward()

    def uncalled() -> None:
        F.mse_loss(torch.ones(3), torch.zeros(3)).backward()

    outside = model(x)
    refuses("not connected to an output of the model", model, elsewhere)
    refuses("something between the model and the loss detached it", model, detached)
    refuses("was not called inside the block", model, uncalled)
    refuses("not connected to an output of the model", model, lambda: F.cross_entropy(outside, Y).backward())
    works(model)


@pytest.mark.parametrize("track", [True, False])
def test_batch_norm(track: bool) -> None:
    model = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4, track_running_stats=track), nn.Linear(4, C))
    if not track:
        model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    refuses(r"layer '1' \(BatchNorm1d\) normalises with the statistics of the batch", model,
            lambda: F.cross_entropy(model(torch.randn(N, D)), Y).backward())  # fmt: skip
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_functional_batch_norm() -> None:
    model = Fn(lambda m, x: m.b(F.batch_norm(m.a(x), None, None, training=True)), a=nn.Linear(D, 4), b=nn.Linear(4, C))
    refuses("functional batch norm", model, lambda: F.cross_entropy(model(torch.randn(N, D)), Y).backward())


def _contrast(o: Tensor) -> Tensor:
    return F.cross_entropy(o @ o.T, torch.arange(N))


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "root of a mean": lambda o: F.mse_loss(o, torch.zeros(N, C)).sqrt(),
    "log of a mean": lambda o: o.exp().mean().log(),
    "contrastive": _contrast,
    "batch statistics": lambda o: ((o - o.mean(0)) ** 3).mean(),
    "softmax over the batch": lambda o: F.log_softmax(o, 0)[:, 1].sum(),
    "product of samples": lambda o: (o[0] * o[1]).sum() + o[2:].sum(),
    "variance": lambda o: o.var(0).sum(),
}


@pytest.mark.parametrize("quantity", ["grad_sample", "jac", "ggn_diag", "hess_diag"])
@pytest.mark.parametrize("name", MIXING)
def test_loss_mixes_samples(name: str, quantity: str) -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    refuses("the loss mixes samples", model, lambda: MIXING[name](model(x)).backward(), quantity)
    works(model)


def test_parameter_multiplies_the_reduced_loss() -> None:
    model = Fn(lambda m, x: m.a(x), a=nn.Linear(D, C), s=nn.Parameter(torch.tensor(2.0)))
    refuses("parameter 's' scales the loss above the samples", model,
            lambda: (model.s * F.cross_entropy(model(torch.randn(N, D)), Y)).backward(), "grad_sample")  # fmt: skip


def test_first_axis_is_not_the_batch() -> None:
    model = nn.Linear(D, C)
    refuses("no input has an axis of 3", model, lambda: model(torch.randn(D)).sum().backward())
    refuses("a single number", scalar := Fn(lambda m, x: m.a(x).sum(), a=nn.Linear(D, C)),
            lambda: scalar(torch.randn(N, D)).backward())  # fmt: skip
    works(model)


def test_batch_sizes_differ() -> None:
    model = nn.Linear(D, C)
    refuses(r"number of samples differs .*: \[2, 4\]", model,
            lambda: (model(torch.randn(N, D)).sum() + model(torch.randn(2, D)).sum()).backward())  # fmt: skip


def test_output_selection() -> None:
    x = torch.randn(N, D)
    two = Fn(lambda m, x: {"y": m.a(x), "z": m.a(x)}, a=nn.Linear(D, C))
    tup = Fn(lambda m, x: (m.a(x), "text"), a=nn.Linear(D, C))
    refuses(r"2 tensors that require grad \(output\['y'\], output\['z'\]\) and none was selected", two, lambda: two(x))
    refuses("output='w' finds nothing", two, lambda: two(x), output="w")
    refuses("output=7 finds nothing", tup, lambda: tup(x), output=7)
    refuses("output=1 found a str, expected a tensor", tup, lambda: tup(x), output=1)
    none = Fn(lambda m, x: {"n": 3}, a=nn.Linear(D, C))
    refuses(r"returned no tensor that requires grad \(found: dict\)", none, lambda: none(x))
    deaf = Fn(lambda m, x: {"y": m.a(x).detach(), "z": m.a(x)}, a=nn.Linear(D, C))
    refuses("selected output does not require grad", deaf, lambda: deaf(x), output="y")


def test_jac_of_two_calls() -> None:
    model = nn.Linear(D, C)
    refuses("jac: 2 selected outputs of the model", model,
            lambda: (model(torch.randn(N, D)).sum() + model(torch.randn(N, D)).sum()).backward(), "jac")  # fmt: skip


def test_model_never_called_but_its_parts() -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    refuses(
        "jac: 0 selected outputs of the model", model, lambda: model[1](model[0](x)).square().sum().backward(), "jac"
    )
    with extend(model, "grad_sample"):
        model[4](torch.tanh(model[2](torch.tanh(model[0](x))))).square().sum().backward()
    wanted = expected(model, lambda: model(x), lambda o: o.square().sum())
    for key, p in trainable(model).items():
        close(p.grad_sample, wanted[key]["grad_sample"], key)


def test_parameter_replaced_or_moved() -> None:
    x = torch.randn(N, D)

    def change(how: Callable[[nn.Module], Any], model: nn.Module) -> Callable[[], None]:
        def step() -> None:
            loss = F.cross_entropy(model(x), Y)
            how(model)
            loss.backward()

        return step

    def replace(m: Any) -> None:
        m[0].weight = nn.Parameter(m[0].weight.detach().clone())

    def remove(m: Any) -> None:
        m[0] = nn.Identity()

    def cast(m: Any) -> None:
        m.float()

    def swap(m: Any) -> None:
        m[0].weight.data = m[0].weight.data.clone()

    for how, match in [
        (replace, "'0.weight' was replaced or removed"),
        (remove, "'0.weight' was replaced or removed"),
        (cast, "was moved, cast or given new data"),
        (swap, "was moved, cast or given new data"),
    ]:
        model = mlp(nn.Tanh)
        refuses(match, model, change(how, model))


def test_modified_in_place_between() -> None:
    """What autograd forbids stays forbidden, in its own words; what it allows is exact."""
    x = torch.randn(N, D)
    model = mlp(nn.Tanh)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), extend(model, "grad_sample"):
        loss = F.cross_entropy(model(x), Y)
        with torch.no_grad():
            model[2].weight.mul_(2)
        loss.backward()
    works(model)
    model = nn.Linear(D, C)
    wanted = expected(model, lambda: model(x), lambda o: o.square().sum())
    with extend(model):
        loss = model(x).square().sum()
        with torch.no_grad():
            model.bias.zero_()  # nothing saved the bias
        loss.backward()
    compare(model, wanted, ("grad_sample", "jac", "hess_diag"))


def test_second_backward_without_retain_graph() -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"), extend(model, "grad_sample"):
        loss = F.cross_entropy(model(x), Y)
        loss.backward()
        loss.backward()
    works(model)
    with extend(model, "grad_sample", "hess_diag"):
        loss = F.cross_entropy(model(x), Y)
        loss.backward(retain_graph=True)
        first = {key: (p.grad_sample, p.hess_diag) for key, p in trainable(model).items()}
        loss.backward()
    for key, p in trainable(model).items():
        assert torch.equal(first[key][0], p.grad_sample)
        assert first[key][0] is not p.grad_sample
        assert torch.equal(first[key][1], p.hess_diag)


def test_exception_in_the_block() -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    with pytest.raises(ZeroDivisionError), extend(model):
        model(x)
        raise ZeroDivisionError
    works(model)


def test_exception_in_the_forward() -> None:
    def fail(m: Any, x: Tensor) -> Tensor:
        if m.armed:
            raise ZeroDivisionError
        return m.a(x)

    model = Fn(fail, a=nn.Linear(D, C), armed=True)
    with extend(model):
        with pytest.raises(ZeroDivisionError):
            model(torch.randn(N, D))
        model.armed = False
        F.cross_entropy(model(torch.randn(N, D)), Y).backward()
    assert model.a.weight.grad_sample.shape == (N, C, D)
    works(model)


def test_exception_in_the_forward_of_a_model_with_hooks() -> None:
    """Ours comes last on the model itself; it goes, even if its turn never came."""

    def fail(m: Any, x: Tensor) -> Tensor:
        raise ZeroDivisionError

    model = Fn(fail, a=nn.Linear(D, C))
    model.register_forward_hook(lambda module, args, out: None)
    before = attributes(model)
    with extend(model):
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                model(torch.randn(N, D))
            assert attributes(model) == before
    assert attributes(model) == before


def test_forward_without_backward() -> None:
    model, x = mlp(nn.Tanh), torch.randn(N, D)
    with extend(model):
        model(x)
    assert not hasattr(model[0].weight, "grad_sample")
    with extend(model):
        model(x)
        with torch.no_grad():
            model(torch.randn(9, D))
        F.cross_entropy(model(x), Y).backward()
    assert model[0].weight.grad_sample.shape[0] == N
    works(model)


def test_non_scalar_loss() -> None:
    model = nn.Linear(D, C)
    refuses(r"tensor of shape \(4, 3\) without a gradient", model, lambda: model(torch.randn(N, D)).backward())


def test_block_opened_twice_and_explain_too_early() -> None:
    model = nn.Linear(D, C)
    block = extend(model)
    with block:
        with pytest.raises(HookjacError, match="already open"), block:
            pass
        with pytest.raises(HookjacError, match="there was none yet"):
            block.explain()
        model(torch.randn(N, D)).sum().backward()
    with block:  # but one after the other is fine
        model(torch.randn(2, D)).sum().backward()
    assert model.weight.grad_sample.shape[0] == 2


def test_batch_not_first_where_the_loss_looks() -> None:
    model = Fn(lambda m, x: (m.a(x), m.b(x).transpose(0, 1)), a=nn.Linear(D, C), b=nn.Linear(D, 2))
    x = torch.randn(N, D)
    with extend(model, "grad_sample", output=0):
        a, b = model(x)
        (a.square().sum() + b.square().sum()).backward()
    per_sample = [(model(x)[0][n].square().sum() + model(x)[1][:, n].square().sum()) for n in range(N)]
    for p in model.parameters():
        wanted = torch.stack([torch.autograd.grad(v, p, retain_graph=True, allow_unused=True)[0] for v in per_sample])
        close(p.grad_sample, wanted, "grad_sample")


def test_custom_function_without_second_derivative_in_the_network() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.pow(3)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 3 * x.square() * g

    model = Fn(lambda m, x: m.b(Once.apply(m.a(x))), a=nn.Linear(D, 4), b=nn.Linear(4, C))
    x = torch.randn(N, D)
    with extend(model, "grad_sample", "ggn_diag"):
        F.cross_entropy(model(x), Y).backward()
    close(model.a.weight.grad_sample.sum(0), model.a.weight.grad, "sum")
    refuses("marked once_differentiable", model, lambda: F.cross_entropy(model(x), Y).backward(), "hess_diag")


def test_parameter_frozen_between() -> None:
    model = Fn(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(D, 4), b=nn.Linear(4, C), s=par(2))
    with extend(model, "grad_sample"):
        loss = F.cross_entropy(model(torch.randn(N, D)), Y)
        model.a.weight.requires_grad_(False)
        loss.backward()
    assert not hasattr(model.a.weight, "grad_sample")
    close(model.b.weight.grad_sample.sum(0), model.b.weight.grad, "sum")
    assert torch.equal(model.s.grad_sample, torch.zeros(N, 2))


def test_data_parallel_inside() -> None:
    model = nn.Sequential(nn.Linear(D, 4), nn.DataParallel(nn.Linear(4, C)))
    with pytest.raises(HookjacError, match=r"layer '1' is nn\.DataParallel"), extend(model, "grad_sample"):
        model(torch.randn(N, D))


def test_a_bare_parameter_is_moved_in_between() -> None:
    model = Fn(lambda m, x: torch.atan2(x, m.w), w=par(D))
    with pytest.raises(HookjacError, match="parameter 'w' was moved, cast or given new data"):
        with extend(model, "grad_sample"):
            loss = model(torch.randn(N, D)).sum()
            model.w.data = model.w.data.float()
            loss.backward()


def test_complex_output() -> None:
    model = Fn(lambda m, x: torch.complex(m.a(x), m.a(x)), a=nn.Linear(D, C))
    with pytest.raises(HookjacError, match="selected output is complex"), extend(model, "jac"):
        model(torch.randn(N, D)).abs().sum().backward()


def test_output_in_a_dataclass_and_by_attribute() -> None:
    @dataclasses.dataclass
    class Out:
        y: torch.Tensor
        note: str = "text"
        later: torch.Tensor = dataclasses.field(init=False)

    model = Fn(lambda m, x: Out(m.a(x)), a=nn.Linear(D, C))
    for output in (None, "y"):
        with extend(model, "jac", output=output):
            model(torch.randn(N, D)).y.sum().backward()
        assert model.a.weight.jac.shape == (N, C, C, D)
    with pytest.raises(HookjacError, match="output='z' finds nothing"), extend(model, "jac", output="z"):
        model(torch.randn(N, D))


def test_a_time_first_tensor_in_the_loss() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.h = m.a(x.transpose(0, 1)).tanh()
        return m.b(m.h.sum(0))

    model = Fn(forward, a=nn.Linear(D, 4), b=nn.Linear(4, C))
    with pytest.raises(HookjacError, match="does not count the 4 samples"), extend(model, "grad_sample"):
        (model(torch.randn(N, 3, D)).sum() + model.h.square().sum()).backward()
