"""FSDP2 (`fully_shard`): parameters that lie in shards, and are whole only where the model runs.

Our walk goes while all of them are whole; the user's own backward then runs as ever. Results go onto the shards.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hookjac.errors import HookjacError


def _kind(place: str, name: str) -> Any:
    """A class of torch.distributed, if anybody has loaded it: else there is nothing of that kind."""
    return getattr(sys.modules.get(place), name, ())


def shards(modules: Mapping[nn.Module, str]) -> list[Any]:
    """Those of the modules (and their names) that `fully_shard` was called on. Refuses the older FSDP."""
    old = _kind("torch.distributed.fsdp", "FullyShardedDataParallel")
    kind = _kind("torch.distributed.fsdp", "FSDPModule")
    if not (old or kind):
        return []
    for module, name in modules.items():
        if isinstance(module, old):
            raise HookjacError(
                f"layer {name!r} is a FullyShardedDataParallel (FSDP1), which keeps its parameters as one flat "
                "tensor without a name for each. Use torch.distributed.fsdp.fully_shard (FSDP2)."
            )
    return [m for m in modules if isinstance(m, kind)]


def is_spread(t: Tensor) -> bool:
    """Is it a DTensor?"""
    return isinstance(t, _kind("torch.distributed.tensor", "DTensor"))


def in_one_piece(t: Tensor) -> Tensor:
    """A DTensor's value, as a plain tensor on each rank. Collective."""
    return t.full_tensor() if is_spread(t) else t  # type: ignore[attr-defined, no-any-return]


@contextlib.contextmanager
def whole(found: list[Any], apart: list[Any] | None = None) -> Iterator[None]:
    """All parameters in one piece, as the graph has them; after an error in shards again: of those in `apart`, or all.

    Otherwise they stay whole: the user's backward, which is about to begin, needs them so and parts them after use.
    """
    handles = [m.register_forward_pre_hook(_refuse_forward, prepend=True) for m in found]
    states = [(state := m._get_fsdp_state(), state._training_state) for m in found]
    try:
        with _gathering():
            for module in found:
                module.unshard()
        yield
    except BaseException:
        for module in found if apart is None else apart:
            module.reshard()
        raise
    finally:
        for state, before in states:
            state._training_state = before  # its hooks took our derivatives for a backward
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def whole_awhile(found: list[Any]) -> Iterator[None]:
    """`whole` where no backward follows: in shards again afterwards."""
    with whole(found):
        yield
    for module in found:
        module.reshard()


@contextlib.contextmanager
def _gathering() -> Iterator[None]:
    """Say in our words that weights do not come together."""
    try:
        yield
    except RuntimeError as error:
        raise HookjacError(
            "fully_shard could not make the weights whole: another rank ended, raised an error or did not take the "
            "same products, so that it did not come within the time-out of the process group; or the model was "
            f"converted to another type or device since it first ran ({error})"
        ) from error


class Whole:
    """Parameters that a graph was made with, for a product with it: in one piece as they were then, and after it as
    they were before.

    Collective, as whatever fetches weights is. What the graph saved is the memory that they are gathered into, and
    FSDP2 hides from autograd that it is written anew: other weights would be taken for those of the graph.
    """

    def __init__(self, found: list[Any], params: Iterable[nn.Parameter]) -> None:
        """params: while they are whole."""
        self._found, self._params = found, list(params)
        self._before = self._bits()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        apart = _in_shards(self._found)  # none while our walk goes, and the root is not after a forward
        with whole(self._found, apart):
            if not torch.equal(self._bits(), self._before):
                raise HookjacError(
                    "a product with the curvature needs the weights of the backward that made it, and they were "
                    "changed since. Take products before the optimizer's step, or run the backward again."
                )
            try:
                yield
            finally:
                for module in apart:
                    module.reshard()

    def _bits(self) -> Tensor:
        """[parameters]: a number for the values of each; other values have, in all likelihood, another one."""
        return torch.stack([_mixed(p.detach()) for p in self._params])


def _mixed(t: Tensor) -> Tensor:
    """A number for a tensor's values, bit by bit.

    Each entry and its place are scrambled before they are added, by the last step of SplitMix64 (Steele, Lea and Flood
    2014): in a sum of the bits themselves, changes as plain as of all signs or of a factor 2 can cancel.
    """
    bits = (torch.view_as_real(t) if t.is_complex() else t).double().reshape(-1).view(torch.int64)
    z = bits + torch.arange(1, len(bits) + 1, device=bits.device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ _shifted(z, shift)) * factor
    return (z ^ _shifted(z, 31)).sum()


def _shifted(z: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _in_shards(found: list[Any]) -> list[Any]:
    """Those whose own parameters are, whatever holds for those of units within them."""
    apart = []
    for module in found:
        inside = set(module.modules()) - {module}
        theirs = {p for m in found if m in inside for p in m.parameters()}
        if any(is_spread(p) and p not in theirs for p in module.parameters()):
            apart.append(module)
    return apart


def _refuse_forward(module: nn.Module, args: Any) -> None:
    raise HookjacError(
        f"a checkpoint runs the {type(module).__name__} again, and would part its weights while they are needed. Under "
        "fully_shard put the checkpoint inside: fully_shard(checkpoint_wrapper(block)), or a checkpoint in its forward."
    )


def demand_plain(params: Mapping[str, nn.Parameter], shards: Mapping[str, nn.Parameter] | None = None) -> None:
    """Refuse parameters that no rank has as a whole even while the model runs, or that are elsewhere when it does not.

    shards: the same parameters in shards.
    """
    if not _kind("torch.distributed.tensor", "DTensor"):
        return
    for name, p in params.items():
        if is_spread(p):
            raise HookjacError(
                f"parameter {name!r} is a DTensor where the model computes with it ({p.placements}: tensor "  # type: ignore[attr-defined]
                "parallelism, one made by hand, or a part of a model under fully_shard), so that no rank sees what it "
                "receives. hookjac serves DistributedDataParallel, and whole models under fully_shard over "
                "data-parallel meshes: extend what fully_shard was called on."
            )
        if shards is not None and shards[name].device != p.device:
            raise HookjacError(
                f"parameter {name!r} is kept on {shards[name].device} and used on {p.device} (an offload policy of "
                "fully_shard), where its results could not stay. Call fully_shard without offload_policy."
            )


def like(value: Any, p: Tensor, group: Any = None) -> Any:
    """A result of the parameter's own shape [*p], placed as the parameter is.

    group: whose ranks have the same one; None: all. If the parameter is spread over others, too, it stays as it is: a
    DTensor is one value that all of them share.
    """
    if not is_spread(p) or not isinstance(value, Tensor) or value.shape != p.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    if group is not None and not set(mesh.mesh.flatten().tolist()) <= set(dist.get_process_group_ranks(group)):
        return value
    return distribute_tensor(value.to(p.dtype), mesh, placements, src_data_rank=None)


@contextlib.contextmanager
def in_reach() -> Iterator[None]:
    """Say in our words that weights outside the extended model lie in shards."""
    try:
        yield
    except RuntimeError as error:
        if not any(said in str(error) for said in ("its data is not allocated", "for storage of size 0")):
            raise
        raise HookjacError(
            "the loss goes through modules under fully_shard outside the extended model, whose weights are in shards "
            "now. Extend the whole model that fully_shard was called on, or give those reshard_after_forward=False."
        ) from error


_PIPELINE = "torch.distributed.pipelining"


def demand_no_pipeline() -> None:
    """Refuse backwards of a pipeline's schedule: they start from a stage's output, one for each microbatch."""
    if _PIPELINE not in sys.modules:
        return
    frame = sys._getframe()
    while (above := frame.f_back) is not None:
        frame = above
        if frame.f_globals.get("__name__", "").startswith(_PIPELINE):
            raise HookjacError(
                "this backward was started by a pipeline's schedule (torch.distributed.pipelining), which has no loss "
                "at most stages and a backward for each microbatch. hookjac serves DistributedDataParallel and "
                "fully_shard."
            )
