"""What DDP and FSDP2 hang into the graph: nodes that hand columns on unchanged, and talk to other ranks as they do.

DDP's begins a reduction (static graphs, unused parameters), FSDP2's reduces its module's gradients and frees its
weights, and hooks fetch them before. In derivatives of ours they shall do nothing but hand on; in the user's own
backward, all of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from typing import Any

import torch.distributed as dist

from hookjac.switches import Switch

_DDP, _FSDP = "torch.nn.parallel.distributed", "torch.distributed.fsdp._fully_shard"
NODES = ("_DDPSinkBackward", "RegisterPostBackwardFunctionBackward")


def talks(node: Any) -> bool:
    return type(node).__name__ in NODES


def _hand_on(ctx: Any, *grads: Any) -> Any:
    return (None, *grads)


def _nothing(*given: Any) -> None:
    pass


# module, class, method, and what it is meanwhile
_METHODS: list[tuple[str, str, str, Callable[..., Any]]] = [
    (_DDP, "_DDPSink", "backward", _hand_on),
    (f"{_FSDP}._fsdp_param_group", "RegisterPostBackwardFunction", "backward", _hand_on),
    # hooks on a module's outputs: a backward begins, weights are fetched
    (f"{_FSDP}._fsdp_param_group", "FSDPParamGroup", "pre_backward", _nothing),
    (f"{_FSDP}._fsdp_state", "FSDPState", "_register_root_post_backward_final_callback", _nothing),
]


def _silenced() -> Generator[None, None, None]:
    own: list[tuple[Any, str, Any]] = []
    try:
        if dist.is_available() and dist.is_initialized():
            for place, name, method, instead in _METHODS:
                kind = getattr(sys.modules.get(place), name, None)
                if kind is not None:
                    own.append((kind, method, vars(kind)[method]))
                    setattr(kind, method, staticmethod(instead) if instead is _hand_on else instead)
        yield
    finally:
        for kind, method, before in own:
            setattr(kind, method, before)


SILENT = Switch(_silenced)
