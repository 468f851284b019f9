"""FSDP2 (`fully_shard`): parameters that lie in shards, and are whole only where the model runs.

Our walk goes while all of them are whole; the user's own backward then runs as ever. Results go onto the shards.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from hookjac.errors import HookjacError


def _kind(place: str, name: str) -> Any:
    """A class of torch.distributed, if anybody has loaded it: else there is nothing of that kind."""
    return getattr(sys.modules.get(place), name, ())


def shards(model: nn.Module) -> list[Any]:
    """The modules of a model that `fully_shard` was called on. Refuses the older FSDP."""
    old = _kind("torch.distributed.fsdp", "FullyShardedDataParallel")
    kind = _kind("torch.distributed.fsdp", "FSDPModule")
    if not (old or kind):
        return []
    for name, module in model.named_modules():
        if isinstance(module, old):
            raise HookjacError(
                f"layer {name!r} is a FullyShardedDataParallel (FSDP1), which keeps its parameters as one flat "
                "tensor without a name for each. Use torch.distributed.fsdp.fully_shard (FSDP2)."
            )
    return [m for m in model.modules() if isinstance(m, kind)]


def is_spread(t: Tensor) -> bool:
    """Is it a DTensor?"""
    return isinstance(t, _kind("torch.distributed.tensor", "DTensor"))


@contextlib.contextmanager
def whole(found: list[Any]) -> Iterator[None]:
    """All parameters in one piece, as the graph has them; after an error in shards again.

    Otherwise they stay whole: the user's backward, which is about to begin, needs them so and parts them after use.
    """
    handles = [m.register_forward_pre_hook(_refuse_forward, prepend=True) for m in found]
    states = [(state := m._get_fsdp_state(), state._training_state) for m in found]
    try:
        for module in found:
            module.unshard()
        yield
    except BaseException:
        for module in found:
            module.reshard()
        raise
    finally:
        for state, before in states:
            state._training_state = before  # its hooks took our derivatives for a backward
        for handle in handles:
            handle.remove()


def _refuse_forward(module: nn.Module, args: Any) -> None:
    raise HookjacError(
        f"a checkpoint runs the {type(module).__name__} again, and would part its weights while they are needed. Under "
        "fully_shard put the checkpoint inside: fully_shard(checkpoint_wrapper(block)), or a checkpoint in its forward."
    )


def demand_plain(params: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters that no rank has as a whole even while the model runs."""
    if not _kind("torch.distributed.tensor", "DTensor"):
        return
    for name, p in params.items():
        if is_spread(p):
            raise HookjacError(
                f"parameter {name!r} is a DTensor where the model computes with it ({p.placements}: tensor "  # type: ignore[attr-defined]
                "parallelism, or one made by hand), so that no rank sees what it receives. hookjac serves "
                "DistributedDataParallel and fully_shard over data-parallel meshes."
            )


def like(value: Any, p: Tensor) -> Any:
    """A result of the parameter's own shape [*p], the same on all ranks, placed as the parameter is."""
    if not is_spread(p) or not isinstance(value, Tensor) or value.shape != p.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(p.dtype), mesh, placements, src_data_rank=None)
