"""Models under DistributedDataParallel and FSDP2: `.grad` stays what it is without us, results are the whole's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import C, D, Fn
from oracle import close, grad, trainable
from test_quantities import MODELS
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from workers import Workers, raised, same

from hookjac import (
    KFAC,
    GGNDiagMC,
    HessDiag,
    HookjacError,
    Hutchinson,
    JacTensor,
    Kronecker,
    Quantity,
    explain,
    extend,
    optim,
    passing,
)
from hookjac.quantity import names as all_names
from hookjac.quantity import parse
from hookjac.sharded import demand_plain
from hookjac.talkers import NODES

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
SUMS = ("grad_sq_sum", "grad_var", "ggn_diag", "hess_diag", "ggn_block", KFAC(fisher="exact"))
SINGLE = ("grad_sample", "grad_sample_norm", "jac", "ggn_diag_sample")


def named(asked: tuple[Any, ...]) -> list[str]:
    return [q if isinstance(q, str) else q.name for q in asked]


def batch(rank: int, x: Tensor, y: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return x.split(list(sizes))[rank], y.split(list(sizes))[rank]


# DistributedDataParallel ------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Layers large enough for every road of the gradients, and one that is not used."""

    def __init__(self, *, unused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 5))
        self.spare = nn.Linear(3, 3) if unused else None

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static graph": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "bucket view": {"gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 0.02, "static_graph": True, "gradient_as_bucket_view": True},
}


WIDE = {2: (24, 16), 3: (20, 13, 7)}  # ranks -> their samples
RECORDS = {"kfac_exact": KFAC(fisher="exact")}  # by names that travel to the processes


def check_ddp(rank: int, kind: str, inner: bool, names: tuple[str, ...], roads: str = "as measured") -> int:
    delivered = []
    deliver, slower = passing.deliver, passing.slower
    passing.deliver = lambda *given: (delivered.append(1), deliver(*given))[1]  # type: ignore[func-returns-value]
    if roads != "as measured":
        known = {"all ours": [], "the first by autograd": [0], "all by autograd": None}[roads]
        passing.slower = lambda *_, **__: known  # type: ignore[assignment]
    try:
        _steps(rank, kind, inner, tuple(RECORDS.get(q, q) for q in names), delivered)
    finally:
        passing.deliver, passing.slower = deliver, slower
    return len(delivered)


def _steps(rank: int, kind: str, inner: bool, asked: tuple[str | Quantity, ...], delivered: list[int]) -> None:
    sizes = WIDE[dist.get_world_size()]
    unused = kind == "unused"
    ours, theirs = (DistributedDataParallel(Wide(unused=unused), **KINDS[kind]) for _ in range(2))
    alone = Wide(unused=unused)
    steps = [torch.optim.SGD(m.parameters(), 0.1) for m in (ours, theirs)]
    torch.manual_seed(7)
    for step in range(4):
        x, y = torch.randn(40, 64), torch.randint(5, (40,))
        a, b = batch(rank, x, y, sizes)
        alone.load_state_dict(ours.module.state_dict())
        for optimizer in steps:
            optimizer.zero_grad()
        quiet = step == 2  # gradients are added up on each rank first
        for model in (ours, theirs):
            for again in (True, False) if quiet else (False,):
                sync = model.no_sync() if again else torch.enable_grad()
                with sync:
                    if model is theirs:
                        F.cross_entropy(model(a), b).backward()
                        continue
                    with extend(ours.module if inner else ours, *asked, group="world"):
                        F.cross_entropy(model(a), b).backward()
        before = len(delivered)
        with extend(alone, *asked):
            F.cross_entropy(alone(x), y).backward()
        del delivered[before:]
        for (name, p), q, r in zip(
            ours.module.named_parameters(), theirs.parameters(), alone.parameters(), strict=True
        ):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None and q.grad is not None:
                close(p.grad, q.grad, (step, name))
            for quantity in named(asked):
                if quantity not in SINGLE:
                    same(getattr(p, quantity), getattr(r, quantity), (step, name, quantity))
            if "grad_sample" in asked:  # of the rank's own mean
                mine = r.grad_sample.split(list(sizes))[rank] * 40 / len(a)  # type: ignore[attr-defined]
                close(p.grad_sample, mine, (step, name))  # type: ignore[attr-defined]
        for optimizer in steps:
            optimizer.step()


@pytest.mark.parametrize("inner", [False, True], ids=["the model", "its module"])
@pytest.mark.parametrize("kind", KINDS)
def test_ddp(two: Workers, three: Workers, kind: str, inner: bool) -> None:
    for asked in (("grad_sample", "grad_var"), ("grad_sample", "ggn_diag"), ("hess_diag", "kfac_exact")):
        for workers in (two, three):
            assert len(set(workers(check_ddp, kind, inner, asked))) == 1


@pytest.mark.parametrize("roads", ["all ours", "the first by autograd", "all by autograd"])
@pytest.mark.parametrize("kind", ["plain", "static graph", "bucket view"])
def test_ddp_whoever_computes_the_gradients(two: Workers, three: Workers, kind: str, roads: str) -> None:
    # static graphs wait for gradients at the end of the first backward, and there is a node that tells
    wanted = 0 if roads == "all by autograd" else 4 if kind == "static graph" else 5
    for workers in (two, three):
        assert set(workers(check_ddp, kind, False, ("grad_sample", "ggn_diag"), roads)) == {wanted}


def check_products(rank: int, kind: str) -> None:
    """Products run later, over the same graph, and are of this rank's own batch; nobody's reduction hears of them."""
    model, other = (DistributedDataParallel(Wide(unused=kind == "unused"), **KINDS[kind]) for _ in range(2))
    alone = Wide(unused=kind == "unused")
    torch.manual_seed(rank)
    for _ in range(2):
        x, y = torch.randn(6, 64), torch.randint(5, (6,))
        with extend(model, "hess_mp", "ggn_mp") as ext:
            F.cross_entropy(model(x), y).backward()
        F.cross_entropy(other(x), y).backward()
        with extend(alone, "hess_mp", "ggn_mp") as its:
            F.cross_entropy(alone(x), y).backward()
        v = torch.randn(ext.hessian.shape[1])
        close(ext.hessian @ v, its.hessian @ v, "hessian")
        close(ext.ggn @ v, its.ggn @ v, "ggn")
        for p, q, r in zip(model.parameters(), other.parameters(), alone.parameters(), strict=True):
            close(p.hess_mp(r.detach()), r.hess_mp(r.detach()), "hess_mp")  # type: ignore[attr-defined]
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None and q.grad is not None:
                close(p.grad, q.grad, "grad")


@pytest.mark.parametrize("kind", ["plain", "static graph", "unused"])
def test_products_under_ddp(two: Workers, kind: str) -> None:
    two(check_products, kind)


def check_nodes(rank: int) -> list[set[str]]:
    """Which nodes of theirs the graphs really hold."""
    found = []
    for options in (KINDS["static graph"], KINDS["unused"]):
        model = DistributedDataParallel(Wide(unused="find_unused_parameters" in options), **options)
        node, names = model(torch.randn(2, 64)).grad_fn, set()
        while node is not None:
            names.add(type(node).__name__)
            node = node.next_functions[0][0] if node.next_functions else None
        found.append(names)
    return found


def test_nodes_of_ddp_are_met(two: Workers) -> None:
    for names in two(check_nodes)[0]:
        assert NODES[0] in names


# FSDP2 ------------------------------------------------------------------------------------------------------------


def blocks() -> nn.Module:
    """Sizes that two or three ranks cannot share equally, a bias of one entry, layers within layers."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7))
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), inner, nn.Sequential(nn.Linear(7, 1), nn.SiLU()), nn.Linear(1, C))


def sharded(how: str, model: nn.Module) -> nn.Module:
    more: dict[str, Any] = {}
    if how == "kept whole":
        more = {"reshard_after_forward": False}
    elif how == "always in shards":
        more = {"reshard_after_forward": True}
    elif how == "other axis":
        # the last axis, where the ranks can share it equally
        ranks = dist.get_world_size()
        more = {"shard_placement_fn": lambda p: Shard(p.dim() - 1 if p.shape[-1] % ranks == 0 else 0)}
    elif how == "replicated":
        more = {"mesh": init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicas", "shards"))}
    if how != "one unit":
        for layer in (model[2], model[3], model[4]):  # type: ignore[index]
            fully_shard(layer, **more)
    fully_shard(model, **more)
    return model


HOW = ["nested", "one unit", "kept whole", "always in shards", "other axis", "replicated"]


def check_fsdp(rank: int, how: str, batches: list[tuple[int, ...]]) -> None:
    alone, ours, theirs = blocks(), sharded(how, blocks()), sharded(how, blocks())
    torch.manual_seed(7)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (ours, theirs)]
    for step, sizes in enumerate(batches):
        x, y = torch.randn(8, D), torch.randint(C, (8,))
        a, b = batch(rank, x, y, sizes)
        for optimizer in optimizers:
            optimizer.zero_grad()
        with extend(ours, *SUMS, *SINGLE, group="world"):
            F.cross_entropy(ours(a), b).backward()
        F.cross_entropy(theirs(a), b).backward()
        with extend(alone, *SUMS, *SINGLE):
            F.cross_entropy(alone(x), y).backward()
        for (name, p), q, r in zip(ours.named_parameters(), theirs.parameters(), alone.parameters(), strict=True):
            assert isinstance(p, DTensor)
            assert isinstance(p.grad, DTensor)
            assert isinstance(q.grad, DTensor)
            close(p.grad.to_local(), q.grad.to_local(), (step, name))
            for quantity in named(SUMS):
                found = getattr(p, quantity)
                if quantity not in ("kfac", "ggn_block"):
                    assert isinstance(found, DTensor), quantity
                    assert (found.placements, found.device_mesh) == (p.placements, p.device_mesh)
                    assert found.to_local().shape == p.to_local().shape
                    (found * p).sum().full_tensor()  # it is one of theirs
                    found = found.full_tensor()
                same(found, getattr(r, quantity), (step, name, quantity))
            for quantity in SINGLE:
                found = getattr(p, quantity)
                assert not isinstance(found, DTensor)
                scale = 1 if quantity == "jac" else 8 / len(a)
                wanted = (getattr(r, quantity) + 0).split(list(sizes))[rank] * scale
                close(found + 0, wanted, (step, name, quantity))
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for p, r in zip(ours.parameters(), alone.parameters(), strict=True):
                r.copy_(p.full_tensor())  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", HOW)
def test_fsdp(two: Workers, three: Workers, how: str) -> None:
    two(check_fsdp, how, [(5, 3), (4, 4), (1, 7)])
    three(check_fsdp, how, [(3, 4, 1), (2, 2, 4), (1, 5, 2)])


def check_fsdp_model(rank: int, name: str, units: bool, sizes: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    model = MODELS[name].build()
    x, y = torch.cat([MODELS[name].inputs() for _ in range(2)]), torch.randint(C, (8,))
    alone, asked = copy.deepcopy(model), ("grad_sample", "grad_var", "ggn_diag", "hess_diag", "kfac")
    asked = (*asked[:-1], KFAC(fisher="empirical"))  # type: ignore[assignment]
    for child in model.children() if units else ():
        fully_shard(child)
    fully_shard(model)
    a, b = batch(rank, x, y, sizes)
    told = explain(model, a, "grad_sample", "hess_diag", loss_fn=lambda out: F.cross_entropy(out, b))
    assert all(isinstance(p, DTensor) for p in model.parameters()), "in shards again"
    with extend(model, *asked, group="world") as ext:
        F.cross_entropy(model(a), b).backward()
    assert ext.explain().rows == told.rows
    assert [(c.layer, c.shape, c.road) for c in ext.explain().layers if c.layer] == [
        (c.layer, c.shape, c.road) for c in told.layers if c.layer
    ]
    with extend(alone, *asked):
        F.cross_entropy(alone(x), y).backward()
    for (key, p), r in zip(trainable(model).items(), alone.parameters(), strict=True):
        for q in ("grad_var", "ggn_diag", "hess_diag"):
            close(getattr(p, q).full_tensor(), getattr(r, q), (key, q))
        same(p.kfac, r.kfac, key)  # type: ignore[attr-defined]
        close(p.grad_sample, r.grad_sample.split(list(sizes))[rank] * 8 / len(a), key)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["CNN", "residual", "transformer", "LSTM", "tied", "bare"])
def test_fsdp_of_other_models(two: Workers, three: Workers, name: str) -> None:
    units = name != "tied"  # what is used twice must lie in one unit
    two(check_fsdp_model, name, units, (3, 5))
    three(check_fsdp_model, name, units, (3, 1, 4))


def check_fsdp_alone(rank: int) -> None:
    """Without a group all is of this rank's batch, and whole."""
    model = sharded("nested", blocks())
    torch.manual_seed(rank)
    x, y = torch.randn(3, D), torch.randint(C, (3,))
    with extend(model, "ggn_diag", "grad_sample"):
        F.cross_entropy(model(x), y).backward()
    alone = blocks()
    with extend(alone, "ggn_diag", "grad_sample"):
        F.cross_entropy(alone(x), y).backward()
    for (name, p), r in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert isinstance(p, DTensor)
        assert not isinstance(p.ggn_diag, DTensor)  # type: ignore[attr-defined]
        close(p.ggn_diag, r.ggn_diag, name)  # type: ignore[attr-defined]
        close(p.grad_sample, r.grad_sample, name)  # type: ignore[attr-defined]


def test_fsdp_without_a_group(two: Workers) -> None:
    two(check_fsdp_alone)


def check_products_of_shards(rank: int, how: str) -> None:
    """As often as wished, after the block, and as long as the weights are those of the backward."""
    model, theirs, alone = sharded(how, blocks()), sharded(how, blocks()), blocks()
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        x, y = torch.randn(3 + rank, D), torch.randint(C, (3 + rank,))
        for m in (model, theirs, alone):
            m.zero_grad()
        with extend(model, "hess_mp", "ggn_mp", "ggn_diag", Hutchinson(samples=2)) as ext:
            F.cross_entropy(model(x), y).backward()
        F.cross_entropy(theirs(x), y).backward()
        with extend(alone, "hess_mp", "ggn_mp") as its:
            F.cross_entropy(alone(x), y).backward()
        lie = {name: type(p) for name, p in model.named_parameters()}
        v = torch.randn(ext.hessian.shape[1], 2)
        close(ext.hessian @ v, its.hessian @ v, "hessian")
        close(ext.ggn @ v, its.ggn @ v, "ggn")
        for (name, p), q, r in zip(model.named_parameters(), theirs.parameters(), alone.parameters(), strict=True):
            for kind in ("hess_mp", "ggn_mp"):
                wanted = getattr(r, kind)(r.detach())
                for vector in (r.detach(), p.detach()):  # whole, and in shards
                    close(getattr(p, kind)(vector), wanted, (name, kind))
            assert isinstance(p.grad, DTensor)
            close(p.grad.full_tensor(), q.grad.full_tensor(), name)  # type: ignore[union-attr]
        assert lie == {name: type(p) for name, p in model.named_parameters()}
        before = [p.detach().full_tensor().clone() for p in model.parameters()]  # type: ignore[attr-defined]
        optimizer.step()
        with pytest.raises(HookjacError, match="weights of the backward that made it, and they were changed since"):
            ext.ggn @ v
        with torch.no_grad():
            for p, t in zip(model.parameters(), before, strict=True):
                p.copy_(distribute_tensor(t, p.device_mesh, p.placements))  # type: ignore[attr-defined]
        close(ext.ggn @ v, its.ggn @ v, "as it was")


@pytest.mark.parametrize("how", HOW)
def test_products_of_shards(two: Workers, three: Workers, how: str) -> None:
    two(check_products_of_shards, how)
    three(check_products_of_shards, how)


def check_products_at_any_time(rank: int) -> None:
    """Between another step's forward and its backward, inside its block; after an error in our derivatives on one rank;
    with no vector on one. FSDP2 is left as it was, and the steps are those of a model that never saw us."""
    torch.manual_seed(0)

    def build() -> nn.Module:
        model = Fn(lambda m, x: m.last(torch.tanh(m.first(x)) * m.scale), first=nn.Linear(D, 4), last=nn.Linear(4, C))
        model.register_parameter("nothing", nn.Parameter(torch.zeros(0, 3)))
        model.register_buffer("scale", torch.rand(4))
        return model

    alone: Any = build()
    model, theirs = (copy.deepcopy(alone) for _ in range(2))
    for m in (model, theirs):
        fully_shard(m.last)
        fully_shard(m)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, theirs)]
    torch.manual_seed(rank)
    for _ in range(2):
        x, y = torch.randn(3, D), torch.randint(C, (3,))
        other = torch.randn(3, D), torch.randint(C, (3,))
        for m in (model, theirs, alone):
            m.zero_grad()
        with torch.no_grad():
            for p, q in zip(alone.parameters(), theirs.parameters(), strict=True):
                p.copy_(q.full_tensor())
        with extend(alone, "hess_mp", "ggn_mp") as its:
            F.cross_entropy(alone(x), y).backward()
        with extend(model, "hess_mp", "ggn_mp") as ext:
            F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            model(x)  # the root is whole since
            theirs(x)
        v = torch.randn(ext.hessian.shape[1])

        def compare(v: Tensor = v, ext: Any = ext, its: Any = its) -> None:
            lie = [type(p) for p in model.parameters()]
            close(ext.hessian @ v, its.hessian @ v, "hessian")
            close(ext.ggn @ v, its.ggn @ v, "ggn")
            assert [type(p) for p in model.parameters()] == lie

        compare()
        with extend(model, "ggn_diag"):
            loss = F.cross_entropy(model(other[0]), other[1])
            compare()
            loss.backward()
            found = [p.ggn_diag for p in model.parameters()]
            compare()
            assert all(p.ggn_diag is q for p, q in zip(model.parameters(), found, strict=True))
        for a, b in ((x, y), other):
            F.cross_entropy(theirs(a), b).backward()
        compare()
        assert (ext.ggn @ v[:, None][:, : 1 - rank]).shape == (len(v), 1 - rank)  # with the others, who have a vector
        before = model.scale.clone()
        model.scale.mul_(1 + rank)  # rank 0: the same
        for kind in ("ggn", "hessian"):
            with pytest.raises(HookjacError, match="autograd refuses"):
                getattr(ext, kind) @ v
        model.scale.copy_(before)
        for optimizer in optimizers:
            optimizer.step()
        for (name, p), q in zip(model.named_parameters(), theirs.parameters(), strict=True):
            assert isinstance(p, DTensor)
            close(p.full_tensor(), q.full_tensor(), name)
            assert (p.grad is None) == (q.grad is None) == (name == "nothing")
            if isinstance(p.grad, DTensor):
                close(p.grad.full_tensor(), q.grad.full_tensor(), name)


def test_products_of_shards_at_any_time(two: Workers) -> None:
    two(check_products_at_any_time)


def check_changed_weights(rank: int) -> None:
    """Changes that cancel in a sum of the weights' bits, and a conversion."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)  # 64 entries
    fully_shard(model)
    x = torch.randn(3, 8)
    with extend(model, "ggn_mp") as ext:
        model(x).pow(4).sum().backward()
    v = torch.randn(64)
    wanted = ext.ggn @ v
    for factor in (-1.0, 2.0, 0.5):
        with torch.no_grad():
            model.weight.mul_(factor)
        with pytest.raises(HookjacError, match="changed since"):
            ext.ggn @ v
        with torch.no_grad():
            model.weight.div_(factor)
    close(ext.ggn @ v, wanted, "as it was")
    model.float()
    with pytest.raises(HookjacError, match="the model was converted to another type"):
        ext.ggn @ v


def test_changed_weights_in_shards(two: Workers) -> None:
    two(check_changed_weights)


def check_a_smaller_group(rank: int) -> None:
    """Results of a group are DTensors only where all ranks that share the parameter have the same."""
    alone = [dist.new_group([r]) for r in range(2)][rank]
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    torch.manual_seed(rank)
    x, y = torch.randn(3, D), torch.randint(C, (3,))
    plain = blocks()
    with extend(plain, "ggn_diag"):
        F.cross_entropy(plain(x), y).backward()
    for more, group in (({}, alone), ({"mesh": mesh}, mesh.get_group("shards"))):
        model = fully_shard(blocks(), **more)  # type: ignore[arg-type]
        with extend(model, "ggn_diag", group=group):
            F.cross_entropy(model(x), y).backward()
        for (name, p), r in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert not isinstance(p.ggn_diag, DTensor)  # type: ignore[attr-defined]
            close(p.ggn_diag, r.ggn_diag, name)  # type: ignore[attr-defined]


def test_a_group_smaller_than_the_mesh(two: Workers) -> None:
    two(check_a_smaller_group)


def check_left_whole(rank: int) -> None:
    """Parameters that stay whole after the backward: results are there then, and when they are parted again."""
    model = sharded("nested", blocks())
    for m in model.modules():
        if isinstance(m, FSDPModule):
            m.set_reshard_after_backward(False)
    x, y = torch.randn(3, D), torch.randint(C, (3,))
    shards = dict(model.named_parameters())
    with extend(model, "ggn_diag", group="world"):
        F.cross_entropy(model(x), y).backward()
    alone = blocks()
    with extend(alone, "ggn_diag"):
        F.cross_entropy(alone(x), y).backward()
    for (name, p), r in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert not isinstance(p, DTensor)
        close(p.ggn_diag, r.ggn_diag, name)  # type: ignore[attr-defined]
        close(shards[name].ggn_diag.full_tensor(), r.ggn_diag, name)  # type: ignore[attr-defined]


def test_fsdp_left_whole(two: Workers) -> None:
    two(check_left_whole)


def check_precision(rank: int) -> None:
    model, alone = blocks(), blocks().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
    for layer in (model[2], model[3], model):  # type: ignore[index]
        fully_shard(layer, mp_policy=policy)
    torch.manual_seed(7)
    x, y = torch.randn(8, D), torch.randint(C, (8,))
    a, b = batch(rank, x, y, (5, 3))
    asked = ("grad_var", "ggn_diag", "hess_diag")
    with extend(model, *asked, "grad_sample", group="world"):
        F.cross_entropy(model(a), b).backward()
    with extend(alone, *asked):
        F.cross_entropy(alone(x.float()), y).backward()
    for (name, p), r in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert p.dtype == p.ggn_diag.dtype == torch.float64  # type: ignore[attr-defined]
        assert p.grad_sample.dtype == torch.float32, "as the model computed"  # type: ignore[attr-defined]
        for q in asked:
            close(getattr(p, q).full_tensor().float(), getattr(r, q), (name, q), rtol=2e-5)


def test_fsdp_in_mixed_precision(two: Workers) -> None:
    two(check_precision)


def check_accumulated_and_frozen(rank: int) -> None:
    """Gradients that are added up before they are reduced, and a parameter that has none."""
    models = [blocks(), blocks()]
    for model in models:
        model[0].weight.requires_grad_(False)  # type: ignore[index]
        sharded("nested", model)
    ours, theirs = models
    torch.manual_seed(rank)
    for last in (False, False, True):
        x, y = torch.randn(3, D), torch.randint(C, (3,))
        for model in models:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
        with extend(ours, "ggn_diag", "grad_sample", group="world"):
            F.cross_entropy(ours(x), y).backward()
        F.cross_entropy(theirs(x), y).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert hasattr(p, "ggn_diag") == hasattr(p, "grad_sample") == p.requires_grad == (name != "0.weight")
        if p.requires_grad:
            close(p.grad.to_local(), q.grad.to_local(), name)  # type: ignore[union-attr]


def test_fsdp_accumulated_and_frozen(two: Workers) -> None:
    two(check_accumulated_and_frozen)


def check_empty(rank: int, wrap: str) -> None:
    """A rank without data takes part in what the wrapper does, with a batch of no sample."""
    alone, model = blocks(), blocks()
    model = sharded("nested", model) if wrap == "fsdp" else DistributedDataParallel(model)
    x, y = torch.randn(3, D), torch.randint(C, (3,))
    a, b = batch(rank, x, y, (3, 0))
    asked = ("ggn_diag", "hess_diag", "grad_var")
    with extend(model, *asked, "grad_sample", group="world"):
        F.cross_entropy(model(a), b).backward()
    with extend(alone, *asked):
        F.cross_entropy(alone(x), y).backward()
    for (name, p), r in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert p.grad_sample.shape == (len(a), *p.shape)  # type: ignore[attr-defined]
        for q in asked:
            found = getattr(p, q)
            close(found.full_tensor() if wrap == "fsdp" else found, getattr(r, q), (name, q))


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_an_empty_batch(two: Workers, wrap: str) -> None:
    two(check_empty, wrap)


def check_parts(rank: int) -> None:
    """Where only a part of the model, or of what the loss goes through, is under fully_shard."""
    x, y = torch.randn(3, D), torch.randint(C, (3,))
    alone, model = blocks(), blocks()
    fully_shard(model[2])  # type: ignore[index]
    with extend(alone, "ggn_diag"):
        F.cross_entropy(alone(x), y).backward()

    def compare(model: nn.Module, alone: nn.Module) -> None:
        for (name, p), r in zip(model.named_parameters(), alone.parameters(), strict=True):
            found: Any = p.ggn_diag  # type: ignore[attr-defined]
            assert isinstance(found, DTensor) == isinstance(p, DTensor)
            close(found.full_tensor() if isinstance(found, DTensor) else found, r.ggn_diag, name)  # type: ignore

    with extend(model, "ggn_diag", group="world"):
        F.cross_entropy(model(x), y).backward()
    compare(model, alone)
    for whole in (True, False):
        trunk, head = blocks(), nn.Linear(C, C)
        both = copy.deepcopy(head)
        fully_shard(head, reshard_after_forward=not whole)

        def run(trunk: nn.Module = trunk, head: nn.Module = head, **more: Any) -> None:
            with extend(trunk, "ggn_diag", **more):
                F.cross_entropy(head(trunk(x)), y).backward()

        if whole:
            run(group="world")
            other = blocks()
            run(other, both)
            compare(trunk, other)
        else:
            raised(HookjacError, "modules under fully_shard outside the extended model", run)


def test_parts_under_fsdp(two: Workers) -> None:
    two(check_parts)


# What is refused --------------------------------------------------------------------------------------------------


def check_refusals(rank: int) -> None:
    x, y = torch.randn(3, D), torch.randint(C, (3,))
    model = sharded("nested", blocks())

    def opened(*asked: Any, **more: Any) -> Callable[[], Any]:
        return lambda: extend(model, *asked, **more).__enter__()

    raised(HookjacError, "create_graph=True under fully_shard", opened("jac", create_graph=True))

    def wrong(how: Callable[[Tensor], Any]) -> Callable[[], None]:
        def run() -> None:
            with extend(model, "ggn_diag"):
                how(F.cross_entropy(model(x), y))

        return run

    params = list(model.parameters())
    raised(HookjacError, "only a backward into all", wrong(lambda loss: loss.backward(inputs=params)))
    raised(HookjacError, "only a backward into all", wrong(lambda loss: torch.autograd.grad(loss, params)))

    free = x.clone().requires_grad_()
    wrong(lambda loss: loss.backward())()
    kept = params[0].ggn_diag  # type: ignore[attr-defined]
    with extend(model, "ggn_diag"):  # towards something else is none of ours
        torch.autograd.grad(model(free).sum(), free)
    assert params[0].ggn_diag is kept  # type: ignore[attr-defined]

    def penalty() -> None:
        with extend(model, "ggn_diag"):
            loss = F.cross_entropy(model(x), y)
            (loss + model[2][0].weight.full_tensor().square().sum()).backward()  # type: ignore

    raised(HookjacError, "the shards of parameter '2.0.weight' themselves", penalty)
    raised(HookjacError, "a part of a model under fully_shard", lambda: extend(model[0]).__enter__())  # type: ignore
    inside = Fn(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)), a=nn.Linear(D, 4), b=nn.Linear(4, C))
    fully_shard(inside.a)  # type: ignore[arg-type]
    fully_shard(inside)

    def recomputes() -> None:
        with extend(inside, "ggn_diag"):
            F.cross_entropy(inside(x), y).backward()

    raised(HookjacError, "put the checkpoint inside", recomputes)

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    tensors = parallelize_module(nn.Sequential(nn.Linear(D, 4), nn.Linear(4, C)), mesh["tensor"], plan)
    raised(HookjacError, "'0.weight' is a DTensor", lambda: extend(tensors).__enter__())
    fully_shard(tensors, mesh=mesh["data"])

    def parallel() -> None:
        with extend(tensors, "ggn_diag"):
            F.cross_entropy(tensors(x), y).backward()

    raised(HookjacError, "'0.weight' is a DTensor where the model computes with it", parallel)
    old = FullyShardedDataParallel(nn.Linear(D, C), device_id=torch.device("cpu"))
    raised(HookjacError, r"FullyShardedDataParallel \(FSDP1\)", lambda: extend(old, "ggn_diag").__enter__())


def test_refusals(two: Workers) -> None:
    two(check_refusals)


def check_after_an_error(rank: int, how: str) -> None:
    """Refused half-way through our walk; the model is as it was."""
    x, y = torch.randn(3, D), torch.randint(C, (3,))
    ours, theirs = (sharded(how, blocks()) for _ in range(2))

    def fail(got: Any) -> Any:
        raise HookjacError("halfway")

    late = Quantity(name="late", columns="loss", reduce=fail)

    def run() -> None:
        with extend(ours, "hutchinson", HessDiag(road="entries"), late):  # backwards of autograd's own are behind it
            F.cross_entropy(ours(x), y).backward()

    raised(HookjacError, "late of parameter .* halfway", run)
    assert all(isinstance(p, DTensor) for p in ours.parameters())
    for model in (ours, theirs):
        F.cross_entropy(model(x), y).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert isinstance(p, DTensor)
        assert isinstance(q, DTensor)
        close(p.grad.to_local(), q.grad.to_local(), name)  # type: ignore[union-attr]
        assert not hasattr(p, "hutchinson")


@pytest.mark.parametrize("how", HOW)
def test_after_an_error(two: Workers, how: str) -> None:
    two(check_after_an_error, how)


def test_offloading_is_refused() -> None:
    """Where there is but a CPU, nothing is offloaded from it."""
    shards, p = {"w": nn.Parameter(torch.ones(2))}, nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(HookjacError, match=r"'w' is kept on cpu and used on meta .*without offload_policy"):
        demand_plain({"w": p}, shards)


def check_pipeline(rank: int) -> None:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    alone = [dist.new_group([r]) for r in range(2)][rank]
    model = nn.Linear(D, C)
    schedule = ScheduleGPipe(PipelineStage(model, 0, 1, torch.device("cpu"), group=alone), 2, loss_fn=F.cross_entropy)

    def run() -> None:
        with extend(model, "ggn_diag"):
            schedule.step(torch.randn(4, D), target=torch.randint(C, (4,)))

    with pytest.raises(RuntimeError) as found:  # theirs, about ours
        run()
    assert isinstance(found.value.__cause__, HookjacError)
    assert "started by a pipeline's schedule" in str(found.value.__cause__)
    with extend(model, "ggn_diag"):  # others are none
        model(torch.randn(4, D)).square().sum().backward()


def test_pipelines_are_refused(two: Workers) -> None:
    two(check_pipeline)


def check_checkpoint_inside(rank: int) -> None:
    torch.manual_seed(0)
    layers = {"a": nn.Linear(D, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, C)}

    def forward(m: Any, x: Tensor) -> Tensor:
        h = checkpoint(lambda t: torch.tanh(m.b(torch.tanh(m.a(t)))), x, use_reentrant=False)
        return m.c(h)  # type: ignore[no-any-return]

    model = Fn(forward, **layers)
    alone = copy.deepcopy(model)
    fully_shard(model)
    x, y = torch.randn(3, D), torch.randint(C, (3,))
    with extend(model, "ggn_diag", "hess_diag", group="world"):
        F.cross_entropy(model(x), y).backward()
    with extend(alone, "ggn_diag", "hess_diag"):
        F.cross_entropy(alone(x), y).backward()
    for (name, p), r in zip(model.named_parameters(), alone.parameters(), strict=True):
        for q in ("ggn_diag", "hess_diag"):
            close(getattr(p, q).full_tensor(), getattr(r, q), (name, q))


def test_a_checkpoint_within_a_unit(two: Workers) -> None:
    two(check_checkpoint_inside)


# Optimizers -------------------------------------------------------------------------------------------------------


def check_kfac_steps(rank: int, size: int, tied: bool) -> None:
    """Ranks with a share of the batch each take the steps of one process with all of it."""
    torch.manual_seed(3)
    table = nn.Embedding(6, 4)
    parts = {"t": table, "m": nn.Linear(4, 4)} | ({} if tied else {"o": nn.Linear(4, 6)})
    whole = Fn(
        lambda m, i: torch.tanh(m.m(m.t(i).mean(1))) @ m.t.weight.T if tied else m.o(torch.tanh(m.m(m.t(i).mean(1)))),
        **parts,
    )
    split = DistributedDataParallel(copy.deepcopy(whole))
    settings: dict[str, Any] = {"fisher": "exact", "inverse_every": 2, "lr": 0.3}
    one, many = optim.KFAC(whole, **settings), optim.KFAC(split, group="world", **settings)
    torch.manual_seed(4)
    for _ in range(4):
        ids, y = torch.randint(6, (4 * size, 3)), torch.randint(6, (4 * size,))
        mine = slice(4 * rank, 4 * rank + 4)
        for optimizer, model, rows in ((one, whole, slice(None)), (many, split, mine)):
            optimizer.zero_grad()
            with optimizer.block():
                F.cross_entropy(model(ids[rows]), y[rows]).backward()
            optimizer.step()
        for (name, p), q in zip(whole.named_parameters(), split.parameters(), strict=True):
            close(q.detach(), p.detach(), name, 1e-9)


@pytest.mark.parametrize("tied", [False, True])
def test_kfac_steps(two: Workers, three: Workers, tied: bool) -> None:
    two(check_kfac_steps, 2, tied)
    three(check_kfac_steps, 3, tied)


def check_every_quantity(rank: int, wrapper: str) -> None:
    """Without a group, each rank has what its own batch gives a plain model."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 4))
    wrapped: Any = copy.deepcopy(plain)
    if wrapper == "FSDP2":
        for unit in (wrapped[0], wrapped[3], wrapped):
            fully_shard(unit)
    else:
        wrapped = DistributedDataParallel(wrapped)
    torch.manual_seed(10 + rank)
    x, y = torch.randn(3 + rank, 4), torch.randint(4, (3 + rank,))
    for q in all_names():
        for model in (plain, wrapped):
            model.zero_grad()
            torch.manual_seed(3)
            with extend(model, q):
                F.cross_entropy(model(x), y).backward()
                if q.endswith("_mp"):
                    for p in model.parameters():
                        p.result = getattr(p, q)(torch.ones(p.shape))
                else:
                    for p in model.parameters():
                        p.result = getattr(p, q)
        for (name, p), r in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
            if q == "jac":
                same(r.result.to_dense(), p.result.to_dense(), (q, name))
            else:
                same(r.result, p.result, (q, name))


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "FSDP2"])
def test_every_quantity(two: Workers, three: Workers, wrapper: str) -> None:
    two(check_every_quantity, wrapper)
    three(check_every_quantity, wrapper)


# Every quantity over a group ---------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross entropy": F.cross_entropy, "mse": F.mse_loss}
DRAWS = 2


def every_record(seed: int) -> list[Quantity]:
    """All that a group serves; what is random draws from that seed."""

    def draw() -> dict[str, Any]:
        return {"samples": DRAWS, "generator": torch.Generator().manual_seed(seed)}

    drawn = {"ggn_diag_mc": GGNDiagMC(**draw()), "hutchinson": Hutchinson(**draw()), "kfac": KFAC(**draw())}
    served = [q.name for q in parse(all_names()) if q.adds is not None or q.single]
    return [*parse([drawn.get(q, q) for q in served]), KFAC(fisher="exact"), KFAC(fisher="empirical")]


def random_columns(loss: str, output: Tensor, generator: torch.Generator) -> Tensor:  # [V, N, C]
    """H_n^(1/2) e of a mean, where H_n is diag p - p pᵀ, or 2 / C."""
    signs = torch.randint(0, 2, (DRAWS, *output.shape), generator=generator).to(output) * 2 - 1
    if loss == "mse":
        return signs * (2 / output.numel()) ** 0.5
    p = output.detach().softmax(1)
    e = signs * p.sqrt()
    return (e - p * e.sum(2, keepdim=True)) / len(output) ** 0.5


def drawn_by_loops(loss: str, parts: list[tuple[Tensor, Tensor]], seeds: list[int]) -> dict[str, dict[str, Any]]:
    """parameter -> quantity -> what the ranks' draws give, each for its part of the batch, by plain autograd."""
    model = blocks()
    N = sum(len(a) for a, _ in parts)
    params = trainable(model)
    found: dict[str, dict[str, Any]] = {
        name: {"hutchinson": torch.zeros_like(p), "ggn_diag_mc": torch.zeros_like(p)} for name, p in params.items()
    }
    A, B = ({name: torch.zeros(()) for name in params} for _ in range(2))
    inputs: dict[str, Tensor] = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear):
            m.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0].detach()}))  # type: ignore
    for (a, b), seed in zip(parts, seeds, strict=True):
        if not len(a):
            continue
        share = len(a) / N
        output = model(a)
        generator = torch.Generator().manual_seed(seed)
        signs = {
            k: torch.randint(0, 2, (DRAWS, *p.shape), generator=generator).to(p) * 2 - 1 for k, p in params.items()
        }
        slopes = {k: grad(LOSSES[loss](output, b), p) for k, p in params.items()}
        for v in range(DRAWS):
            slope = sum((slopes[k] * signs[k][v]).sum() for k in params)
            for k, p in params.items():
                found[k]["hutchinson"] += share / DRAWS * signs[k][v] * grad(slope, p).detach()  # type: ignore[arg-type]
        columns = random_columns(loss, output, torch.Generator().manual_seed(seed))
        each: dict[str, Tensor] = {}  # [V, n, *p]
        for k, p in params.items():
            rows = [grad(output[n], p, columns[v, n]).detach() for v in range(DRAWS) for n in range(len(a))]
            each[k] = torch.stack(rows).reshape(DRAWS, len(a), *p.shape)
        for k, p in params.items():
            found[k]["ggn_diag_mc"] += share / DRAWS * each[k].square().sum((0, 1))
            layer = k.removesuffix(".weight")
            g = each[f"{layer}.bias" if layer in inputs else k].reshape(-1, p.shape[0])
            B[k] = B[k] + share / DRAWS * g.T @ g
            if layer in inputs:
                A[k] = A[k] + inputs[layer].T @ inputs[layer] / N
    for k in params:
        found[k]["kfac"] = (A[k], B[k]) if A[k].dim() else (None, B[k])
    return found


def whole(t: Any) -> Tensor:
    t = t.to_dense() if isinstance(t, JacTensor) else t
    return t.full_tensor() if isinstance(t, DTensor) else t  # type: ignore[no-any-return]


def bits(t: Any) -> bytes:
    if isinstance(t, Kronecker):
        return (b"" if t.A is None else bits(t.A)) + bits(t.B)
    return whole(t).detach().numpy().tobytes()


def check_over_a_group(rank: int, wrapper: str, loss: str, sizes: tuple[int, ...]) -> dict[Any, bytes]:
    """Returns what must have the same bits on all ranks."""
    N, seeds = sum(sizes), [7 + r for r in range(len(sizes))]
    torch.manual_seed(3)
    x = torch.randn(N, D)
    y = torch.randn(N, C) if loss == "mse" else torch.randint(C, (N,))
    parts = [batch(r, x, y, sizes) for r in range(len(sizes))]
    by_loops = drawn_by_loops(loss, parts, seeds)
    alone, mine = blocks(), blocks()
    model = sharded("nested", blocks()) if wrapper == "FSDP2" else DistributedDataParallel(blocks())
    a, b = parts[rank]
    results: dict[Any, bytes] = {}
    for q in every_record(seeds[rank]):
        more = () if q.adds is not None else ("ggn_diag",)  # a group wants something that adds up
        with extend(model, q, *more, group="world"):
            LOSSES[loss](model(a), b).backward()
        with extend(alone, q):
            LOSSES[loss](alone(x), y).backward()
        if q.single:
            with extend(mine, q):
                LOSSES[loss](mine(a), b).backward()
        for (name, r), p, m in zip(alone.named_parameters(), trainable(model).values(), mine.parameters(), strict=True):
            found, wanted, what = getattr(p, q.name), getattr(r, q.name), (q, name)
            if q.single:  # of the rank's own loss, whole and plain
                assert not isinstance(found, DTensor), what
                assert (0 in found.shape) == (not len(a)), what
                close(whole(found), whole(getattr(m, q.name)), what)
                continue
            results[q.name, str(q.adds and q.adds.label), name] = bits(found)
            if isinstance(found, DTensor):
                assert isinstance(p, DTensor)
                assert found.placements == p.placements, what
            # of the parameter's own shape, so that it can lie as the parameter does
            assert isinstance(found, DTensor) == (wrapper == "FSDP2" and not q.name.endswith(("_block", "kfac"))), what
            if getattr(q.wish, "generator", None) is None:
                same(found if isinstance(found, Kronecker) else whole(found), wanted, what)
            elif q.name == "kfac":
                A, B = by_loops[name]["kfac"]
                same(found, Kronecker(A, B, wanted.shape, wanted.swapped, wanted.rows), what)
            else:
                close(whole(found), by_loops[name][q.name], what)
    return results


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "FSDP2"])
def test_every_quantity_over_a_group(two: Workers, three: Workers, wrapper: str, loss: str) -> None:
    """Uneven shares, and a rank that has none, against one process with all samples."""
    for workers, sizes in ((two, (9, 2)), (three, (7, 0, 4))):
        first, *others = workers(check_over_a_group, wrapper, loss, sizes)
        assert first
        assert all(its == first for its in others), sizes


def check_refused_steps(rank: int) -> None:
    model = DistributedDataParallel(nn.Linear(3, 2))
    for make in (optim.KFAC, optim.DiagonalNewton, optim.GaussNewton, optim.NaturalGradient):
        step = make(model)
        with pytest.raises(HookjacError, match="another step on every rank"), step.block():
            pass
    with pytest.raises(HookjacError, match="another step on every rank"), optim.DPSGD(model, batch_size=2).block():
        pass
    sharded = nn.Linear(4, 4)
    fully_shard(sharded)
    for more in ({}, {"group": "world"}):
        with pytest.raises(HookjacError, match="under fully_shard"), optim.KFAC(sharded, **more).block():  # type: ignore[arg-type]
            pass


def test_steps_that_ranks_would_not_share(two: Workers) -> None:
    two(check_refused_steps)


def check_a_given_basis(rank: int) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    x, y = torch.randn(8, 4), torch.randint(4, (8,))
    with extend(plain, KFAC(fisher="empirical")):
        F.cross_entropy(plain(x), y).backward()
    bases = {name: p.kfac.eigen() for name, p in plain.named_parameters()}
    with extend(plain, KFAC(fisher="exact", corrected=bases)):
        F.cross_entropy(plain(x), y).backward()
    sharded = copy.deepcopy(plain)
    fully_shard(sharded)
    for given in (bases, {p: bases[name] for name, p in sharded.named_parameters()}):
        with extend(sharded, KFAC(fisher="exact", corrected=given)):
            F.cross_entropy(sharded(x), y).backward()
        for (name, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
            close(p.kfac.Q_B, bases[name].Q_B, name)
            close(p.kfac.values, q.kfac.values, name)


def test_a_given_basis(two: Workers) -> None:
    two(check_a_given_basis)


def check_names_of_wrappers(rank: int) -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 3)))
    found = []
    for one in (model, model.module):
        with extend(one, "grad_sample_projected"):
            one(torch.ones(2, 4)).square().sum().backward()
        found.append([p.grad_sample_projected for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        close(a, b, "the same directions")


def test_names_of_wrappers(two: Workers) -> None:
    two(check_names_of_wrappers)


def test_kfac_over_a_group_refuses() -> None:
    for more in ({"corrected": True}, {"adapt_every": 5}):
        with pytest.raises(ValueError, match="over a group"):
            optim.KFAC(nn.Linear(2, 2), group="world", **more)  # type: ignore[arg-type]
