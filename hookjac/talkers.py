"""What DDP and FSDP2 hang into the graph: nodes that hand columns on unchanged, and talk to other ranks as they do.

DDP's begins a reduction (static graphs, unused parameters), FSDP2's reduces its module's gradients and frees its
weights. In derivatives of ours they shall do the first only; in the user's own backward, both.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from hookjac.switches import Switch

# node -> the Function that makes it: module and name
_FUNCTIONS = {
    "_DDPSinkBackward": ("torch.nn.parallel.distributed", "_DDPSink"),
    "RegisterPostBackwardFunctionBackward": (
        "torch.distributed.fsdp._fully_shard._fsdp_param_group",
        "RegisterPostBackwardFunction",
    ),
}
NODES = tuple(_FUNCTIONS)


def talks(node: Any) -> bool:
    return type(node).__name__ in _FUNCTIONS


def _hand_on(ctx: Any, *grads: Any) -> Any:
    return (None, *grads)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    before = []
    if dist.is_available() and dist.is_initialized():
        for place, name in _FUNCTIONS.values():
            kind = getattr(sys.modules.get(place), name, None)
            if kind is not None:
                before.append((kind, kind.backward))
                kind.backward = staticmethod(_hand_on)
    try:
        yield
    finally:
        for kind, backward in before:
            kind.backward = staticmethod(backward)


SILENT = Switch(_silenced)
