"""Private training: what Opacus' own optimizers make of our gradients and norms equals plain loops over samples."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import opacus
import pytest
import torch
import torch.nn.functional as F
from largest import Largest
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.schedulers import ExponentialGradClip
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.validators.errors import UnsupportedModuleError
from opacus_models import ALL, AWKWARD, LR, RIGHT, THERE, Batch, bound, data, loops, made
from oracle import close
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hookjac
from hookjac.clients.opacus import GhostClipping, PrivacyEngine, ghost_clipping, grad_samples

MODES = ("grad_samples", "ghost")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Secure RNG turned off")
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        yield


class Private:
    """A model, and all that make_private and we put around it."""

    def __init__(
        self,
        model: nn.Module,
        mode: str,
        *,
        batch_size: int = 4,
        reduction: str = "mean",
        independent: bool = False,
        **more: Any,
    ) -> None:
        self.model = model
        options = {"noise_multiplier": 0.0, "poisson_sampling": False, "wrap_model": False, **more}
        if "max_grad_norm" not in options:
            options["max_grad_norm"] = bound(model)
        self.engine = PrivacyEngine()
        self.criterion: Any = nn.CrossEntropyLoss(reduction=reduction)
        loader = DataLoader(TensorDataset(*data()), batch_size=batch_size)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
        self.hooks, self.optimizer, self.loader = self.engine.make_private(
            module=model, optimizer=optimizer, data_loader=loader, loss_reduction=reduction,
            grad_sample_mode="no_op", **options,
        )  # fmt: skip
        if mode == "ghost":
            parts = ghost_clipping(self.hooks, self.optimizer, self.criterion, independent=independent)
            self.block, self.optimizer, self.criterion = parts
        else:
            self.block = grad_samples(self.hooks, independent=independent)

    def train(self, loader: Any = None) -> list[Batch]:
        model = self.hooks if isinstance(self.hooks, nn.Module) else self.model
        seen = []
        for x, y in loader or self.loader:
            self.optimizer.zero_grad()
            with self.block:
                self.criterion(model(x), y).backward()
            self.optimizer.step()
            seen.append((x, y))
        return seen


def same(found: nn.Module, wanted: nn.Module) -> None:
    for (name, p), q in zip(found.named_parameters(), wanted.parameters(), strict=True):
        close(p.detach(), q.detach(), name)


def chunks(size: int) -> list[Batch]:
    return list(zip(*(t.split(size) for t in data()), strict=True))


# Steps are those of loops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALL)
def test_training_is_that_of_loops(name: str, mode: str) -> None:
    model = made(name)
    wanted = loops(model, chunks(4), divisor=4)
    Private(model, mode).train()
    same(model, wanted)


@pytest.mark.parametrize("mode", MODES)
def test_a_sum(mode: str) -> None:
    model = made("mlp")
    wanted = loops(model, chunks(4), divisor=1)
    Private(model, mode, reduction="sum").train()
    same(model, wanted)


@pytest.mark.parametrize("mode", MODES)
def test_poisson_batches_with_empty_ones(mode: str) -> None:
    model = made("mlp")
    start = copy.deepcopy(model)
    seen = Private(model, mode, batch_size=1, poisson_sampling=True).train()
    assert min(len(x) for x, _ in seen) == 0 < max(len(x) for x, _ in seen)
    same(model, loops(start, seen, divisor=1))


@pytest.mark.parametrize("mode", MODES)
def test_virtual_steps(mode: str) -> None:
    model = made("conv")
    wanted = loops(model, chunks(6), divisor=6)
    private = Private(model, mode, batch_size=6)
    manager = BatchMemoryManager(data_loader=private.loader, max_physical_batch_size=4, optimizer=private.optimizer)
    with manager as loader:
        seen = private.train(loader)
    assert [len(x) for x, _ in seen] == [3, 3, 3, 3]
    same(model, wanted)


@pytest.mark.parametrize("wrap", [False, True])
def test_batches_add_up_in_lists(wrap: bool) -> None:
    model = made("mlp")
    wanted = loops(model, chunks(6), divisor=6)  # two batches a step: Opacus divides by 3 * 2
    private = Private(model, "grad_samples", batch_size=3, wrap_model=wrap)
    called = private.hooks if wrap else model
    x, y = data(0)
    with grad_samples(private.hooks, accumulate=True):
        for n, (x, y) in enumerate(private.loader):
            private.criterion(called(x), y).backward()
            if n % 2:
                found = [p.grad_sample for p in model.parameters()]
                assert [[len(g) for g in gs] for gs in found] == [[3, 3]] * 4
                private.optimizer.step()
                private.optimizer.zero_grad()
    same(model, wanted)


def test_two_forwards_before_their_backwards() -> None:
    model = made("mlp")
    (x, y), (z, t) = chunks(6)
    params = list(model.parameters())
    with grad_samples(model, accumulate=True):
        first, second = F.cross_entropy(model(x), y), F.cross_entropy(model(z), t)
        first.backward()
        second.backward()
    found = [torch.cat(p.grad_sample) for p in params]
    for n, (row, label) in enumerate(zip(*data(), strict=True)):
        wanted = torch.autograd.grad(F.cross_entropy(model(row[None]), label[None]), params)
        for g, w in zip(found, wanted, strict=True):
            close(g[n], w, n)


def test_an_empty_batch() -> None:
    model = made("conv")
    private = Private(model, "grad_samples")
    x, y = data(0)
    with private.block:
        private.criterion(model(x), y).backward()
    for p in model.parameters():
        assert p.grad_sample.shape == (0, *p.shape)


@pytest.mark.parametrize("mode", MODES)
def test_one_block_for_the_whole_training_and_a_wrapped_model(mode: str) -> None:
    model = made("mlp")
    wanted = loops(model, chunks(4), divisor=4)
    private = Private(model, mode, wrap_model=True)
    with private.block:
        for x, y in private.loader:
            private.optimizer.zero_grad()
            private.criterion(private.hooks(x), y).backward()
            private.optimizer.step()
    same(model, wanted)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_returns_a_dict(mode: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = made("mlp")

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"features": x, "logits": self.inner(x)}

    model = Named()
    wanted = loops(model.inner, chunks(12), divisor=12)
    private = Private(model, "grad_samples", batch_size=12, max_grad_norm=bound(model.inner))
    x, y = data()
    if mode == "ghost":
        block, optimizer, criterion = ghost_clipping(
            private.hooks, private.optimizer, nn.CrossEntropyLoss(), output="logits"
        )
    else:
        block, optimizer, criterion = grad_samples(private.hooks, output="logits"), private.optimizer, private.criterion
    with block:
        criterion(model(x)["logits"], y).backward()
    optimizer.step()
    same(model.inner, wanted)


# Next to Opacus' own ----------------------------------------------------------------------------------------------


def of_opacus(model: nn.Module, mode: str, noise: float = 0.0, **more: Any) -> tuple[nn.Module, opacus.PrivacyEngine]:
    engine = opacus.PrivacyEngine()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    loader = DataLoader(TensorDataset(*data()), batch_size=4)
    options = {"max_grad_norm": bound(model), **more}
    found = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=noise,
        poisson_sampling=False, grad_sample_mode=mode, noise_generator=torch.Generator().manual_seed(9), **options,
    )  # fmt: skip
    model, optimizer, criterion, loader = found if mode == "ghost" else (*found[:2], nn.CrossEntropyLoss(), found[2])
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return model._module, engine


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RIGHT)
def test_noise_and_accounting_are_those_of_opacus(name: str, mode: str) -> None:
    theirs, engine = of_opacus(made(name), "hooks" if mode == "grad_samples" else "ghost", noise=1.1)
    ours = made(name)
    private = Private(ours, mode, noise_multiplier=1.1, noise_generator=torch.Generator().manual_seed(9))
    private.train()
    same(ours, theirs)
    epsilon = private.engine.get_epsilon(1e-3)
    assert epsilon == engine.get_epsilon(1e-3)
    assert 0 < epsilon < math.inf


ADAPTIVE = {"target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "max_clipbound": 10.0,
            "min_clipbound": 0.05, "unclipped_num_std": 1.0, "max_grad_norm": 0.3}  # fmt: skip


@pytest.mark.parametrize(
    "clipping", [{"clipping": "per_layer", "max_grad_norm": [0.1, 0.2, 0.2, 0.3]}, {"clipping": "adaptive", **ADAPTIVE}]
)
def test_other_ways_of_clipping(clipping: dict[str, Any]) -> None:
    theirs, _ = of_opacus(made("mlp"), "hooks", noise=1.1, **clipping)
    ours = made("mlp")
    private = Private(
        ours, "grad_samples", noise_multiplier=1.1, noise_generator=torch.Generator().manual_seed(9), **clipping
    )
    assert type(private.optimizer) is not DPOptimizer
    private.train()
    same(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
def test_a_bound_that_changes(mode: str) -> None:
    """The norms are clipped to the bound that the noise is for."""
    models = [made("mlp"), made("mlp")]
    for model, way in zip(models, ("grad_samples", mode), strict=True):
        private = Private(model, way, noise_multiplier=0.5, noise_generator=torch.Generator().manual_seed(9))
        scheduler = ExponentialGradClip(private.optimizer, gamma=0.5)
        for batch in chunks(4):
            private.train([batch])
            scheduler.step()
    same(*models)
    other = made("mlp")
    Private(other, mode, noise_multiplier=0.5, noise_generator=torch.Generator().manual_seed(9)).train()
    with pytest.raises(AssertionError, match="off by"):
        same(models[0], other)


@pytest.mark.parametrize("name", AWKWARD)
def test_what_opacus_makes_of_it(name: str) -> None:
    """As the page on Opacus says."""
    start, there = made(name), THERE[name]
    wanted = loops(start, chunks(4), divisor=4)
    if there is None:
        found, _ = of_opacus(start, "hooks")
        with pytest.raises(AssertionError, match="off by"):
            same(found, wanted)
    else:
        error, said = there
        with pytest.raises(error, match=said):
            of_opacus(start, "hooks")


def test_opacus_ties_no_weights_under_ghost_clipping() -> None:
    with pytest.raises(NotImplementedError, match="tying"):
        of_opacus(made("tied weights"), "ghost")


# Ghost clipping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_ghost_clipping_builds_no_per_sample_gradient(mode: str) -> None:
    model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))
    private = Private(model, mode, batch_size=12)
    with Largest() as seen:
        private.train()
    assert seen.entries == (12 * 40 * 40 if mode == "grad_samples" else 40 * 40)


def test_norms_of_the_last_batch() -> None:
    model = made("conv")
    private = Private(model, "ghost", batch_size=12)
    x, y = data()
    with grad_samples(model):
        nn.CrossEntropyLoss()(model(x), y).backward()
    wanted = torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], 1).norm(dim=1)
    private.train()
    close(private.block.norms, wanted, "norms")
    assert not any("norm" in name for p in model.parameters() for name in vars(p))


def test_ghost_keeps_the_settings_of_the_optimizer() -> None:
    generator = torch.Generator()
    private = Private(made("mlp"), "grad_samples", noise_multiplier=0.7, noise_generator=generator)
    _, fast, criterion = ghost_clipping(private.hooks, private.optimizer, nn.CrossEntropyLoss())
    assert type(fast) is DPOptimizerFastGradientClipping
    for name in ("original_optimizer", "noise_multiplier", "max_grad_norm", "expected_batch_size", "loss_reduction",
                 "generator", "secure_mode", "step_hook"):  # fmt: skip
        assert getattr(fast, name) is getattr(private.optimizer, name), name
    assert criterion.optimizer is fast


# Refused ----------------------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """Its samples meet where `mix` says."""

    def __init__(self, mix: Callable[[Tensor], Tensor], below: bool) -> None:
        super().__init__()
        self.inner, self.mix, self.below = made("mlp"), mix, below

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.mix(x)) if self.below else self.mix(self.inner(x))


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda z: z - z.mean(0),
    "those before": lambda z: z.cumsum(0),
    "its neighbour": lambda z: z + z.roll(1, 0),
    "even ones see odd ones": lambda z: z + (torch.arange(len(z)) % 2 == 0)[:, None] * z[1::2].mean(),
    "odd ones see even ones": lambda z: z + (torch.arange(len(z)) % 2 == 1)[:, None] * z[0::2].mean(),
    "the batch as keys": lambda z: F.scaled_dot_product_attention(z, z, z),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("name", MIXES)
def test_samples_that_mix(name: str, below: bool, mode: str) -> None:
    """Below the first layer, too, where no gradient shows it."""
    with pytest.raises(hookjac.HookjacError, match="the model mixes samples"):
        Private(Mixing(MIXES[name], below), mode, max_grad_norm=1.0).train()


@pytest.mark.parametrize("mode", MODES)
def test_samples_that_mix_in_a_wrapped_model(mode: str) -> None:
    with pytest.raises(hookjac.HookjacError, match="the model mixes samples"):
        Private(Mixing(MIXES["mean"], True), mode, max_grad_norm=1.0, wrap_model=True).train()


def test_samples_that_mix_among_words_given_by_name() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, *, words: Tensor, seen: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
            z = self.last(self.table(words).mean(1)) * scale
            return {"loss": z.sum(), "logits": z if seen is None else z + seen.sum()}

    model, words = Words(), torch.randint(9, (6, 5))
    seen = torch.arange(6)
    with grad_samples(model, output="logits"), pytest.raises(hookjac.HookjacError, match="the model mixes samples"):
        model(words=words, seen=seen)
    with grad_samples(model, output="logits", loss_reduction="sum"):
        model(words=words)["logits"].sum().backward()
    assert model.table.weight.grad_sample.shape == (6, 9, 4)


def test_a_loss_that_mixes() -> None:
    private = Private(made("mlp"), "grad_samples")
    x, _ = data()
    with private.block, pytest.raises(hookjac.HookjacError, match="the loss mixes samples"):
        private.model(x).square().mean().sqrt().backward()


def test_samples_of_a_model_that_does_not_tell() -> None:
    class Second(nn.Module):
        """The samples are its input's second axis."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = made("mlp")

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.T)

    model = Second()
    x = torch.randn(5, 4)
    with pytest.raises(hookjac.HookjacError, match=r"its output has 4, and no tensor .* independent=True"):
        with grad_samples(model):
            model(x).sum().backward()
    with grad_samples(model, independent=True):
        model(x).sum().backward()
    assert model.inner[0].weight.grad_sample.shape == (4, 6, 5)


def test_what_is_merely_true_leaves_no_trial_out() -> None:
    model = made("mlp")
    for options in ({"independent": "no"}, {"accumulate": 1}):
        with pytest.raises(TypeError, match=f"{next(iter(options))} must be True or False"):
            grad_samples(model, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expects Opacus' DPOptimizerFastGradientClipping, got SGD: use ghost_clipping"):
        GhostClipping(model, torch.optim.SGD(model.parameters(), lr=1.0))  # type: ignore[arg-type]


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.calls = made("mlp"), nn.Dropout(0.5), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += len(x)
        return self.inner(self.drop(x))


@pytest.mark.parametrize("mode", MODES)
def test_trying_leaves_no_trace(mode: str) -> None:
    """Neither in random numbers nor in buffers; and it is done once, at the first call that can tell."""
    tried, vouched = Counting(), Counting()
    private = Private(tried, mode, max_grad_norm=0.3)
    x, y = data()
    batches = [(x[:1], y[:1]), (x[:1].expand(4, -1), y[:4]), (x, y), (x, y)]
    torch.manual_seed(1)
    private.train(batches)
    assert tried.calls == 4 + 1 + 3 + 3  # one sample: one look; equal ones, or any: three
    assert tried.seen == 1 + 4 + 12 + 12
    other = Private(vouched, mode, max_grad_norm=0.3, independent=True)
    torch.manual_seed(1)
    other.train(batches)
    assert vouched.calls == 4
    same(tried, vouched)
    assert not tried._forward_pre_hooks


def test_a_model_without_trainable_parameters_leaves_no_hook() -> None:
    model = made("mlp").requires_grad_(False)
    with pytest.raises(hookjac.HookjacError, match="no trainable parameter"), grad_samples(model):
        pass
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("mode", MODES)
def test_batch_norm(mode: str) -> None:
    with pytest.raises(UnsupportedModuleError, match="BatchNorm"):
        Private(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), mode, max_grad_norm=1.0)
    # without parameters it passes Opacus' check, and its training, too
    with pytest.raises(hookjac.HookjacError, match="BatchNorm1d"):
        Private(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, affine=False)), mode, max_grad_norm=1.0).train()


def test_what_the_engine_refuses_still() -> None:
    engine, attention = PrivacyEngine(), made("nn.MultiheadAttention")
    assert engine.is_compatible(module=attention, optimizer=None, data_loader=None)
    assert not opacus.PrivacyEngine().is_compatible(module=attention, optimizer=None, data_loader=None)
    attention.eval()
    assert not engine.is_compatible(module=attention, optimizer=None, data_loader=None)
    with pytest.raises(UnsupportedModuleError, match="training mode"):
        engine.validate(module=attention, optimizer=None, data_loader=None)


def test_a_second_backward_before_the_step() -> None:
    private = Private(made("mlp"), "grad_samples")
    x, y = data()
    with private.block:
        private.criterion(private.model(x), y).backward()
        first = [p.grad_sample for p in private.model.parameters()]
        with pytest.raises(ValueError, match=r"'0.weight' holds .* accumulate=True"):
            private.criterion(private.model(x), y).backward()
    assert all(p.grad_sample is g for p, g in zip(private.model.parameters(), first, strict=True))
    with pytest.raises(ValueError, match="zero_grad"), private.block:
        private.optimizer.step()
        private.criterion(private.model(x), y).backward()


def test_results_used_twice_are_refused_by_opacus() -> None:
    private = Private(made("mlp"), "grad_samples")
    x, y = data()
    with grad_samples(private.hooks, accumulate=True):
        private.criterion(private.model(x), y).backward()
        private.optimizer.step()
        private.criterion(private.model(x), y).backward()
        with pytest.raises(ValueError, match="haven't been cleared"):
            private.optimizer.step()


def test_ghost_outside_its_block() -> None:
    private = Private(made("mlp"), "ghost")
    x, y = data()
    with pytest.raises(hookjac.HookjacError, match="outside the GhostClipping block"):
        private.criterion(private.model(x), y).backward()
    with private.block:
        loss = private.criterion(private.model(x), y)
    with pytest.raises(hookjac.HookjacError, match="outside the GhostClipping block"):
        loss.backward()
    with private.block, pytest.raises(hookjac.HookjacError, match="already open"), private.block:
        pass
    with hookjac.extend(private.model, "grad_sample_norm"):
        private.criterion.criterion(private.model(x), y).backward()
    with pytest.raises(hookjac.HookjacError, match="outside the GhostClipping block"):
        private.criterion(private.model(x), y).backward()  # what another block left is not taken
    private.train()


def test_other_optimizers_have_no_ghost() -> None:
    private = Private(made("mlp"), "grad_samples", clipping="per_layer", max_grad_norm=[1.0] * 4)
    with pytest.raises(hookjac.HookjacError, match="got DPPerLayerOptimizer"):
        ghost_clipping(private.hooks, private.optimizer, nn.CrossEntropyLoss())


def test_what_is_no_model() -> None:
    wrapped = opacus.GradSampleModule(made("mlp"))
    private = Private(made("mlp"), "ghost", reduction="sum")
    with pytest.raises(hookjac.HookjacError, match="got GradSampleModule"):
        grad_samples(wrapped)
    with pytest.raises(TypeError, match="got list"):
        GhostClipping([], private.optimizer)
    with pytest.raises(hookjac.HookjacError, match="'mean' here, but the engine was told 'sum'"):
        grad_samples(private.hooks, loss_reduction="mean")
    with pytest.raises(ValueError, match="'none'"):
        grad_samples(made("mlp"), loss_reduction="none")  # type: ignore[arg-type]


def test_another_block_that_writes_grad_sample() -> None:
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))

    def ours() -> Any:
        return grad_samples(model, loss_reduction="mean")

    def plain() -> Any:
        return hookjac.extend(model, "grad_sample")

    for outer, inner in ((ours, plain), (plain, ours), (ours, ours)):
        with outer():
            with pytest.raises(hookjac.HookjacError, match="another block is open that leaves 'grad_sample'"):
                inner().__enter__()
            with hookjac.extend(nn.Linear(2, 2), "grad_sample"):
                pass
            with hookjac.extend(model, "ggn_diag"):
                F.cross_entropy(model(x), y).backward()
        assert model.weight.ggn_diag.shape == (3, 4)
        assert model.weight.grad_sample.shape == (6, 3, 4)
        del model.weight.grad_sample, model.bias.grad_sample
