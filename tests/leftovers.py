"""What a block could leave behind: in PyTorch's state, and on a model."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_hooks
from torch.overrides import _get_current_function_mode_stack

from hookjac import watch
from hookjac.switches import MATH_ATTENTION, QUIET_VMAP
from hookjac.talkers import SILENT

_RETAIN_GRAD = torch.Tensor.retain_grad
_WEIGHT_NORMS = (torch._weight_norm, importlib.import_module("torch.nn.utils.weight_norm")._weight_norm)
_TABLES = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_forward_hooks_always_called",
           "_global_forward_hooks_with_kwargs", "_global_backward_hooks", "_global_backward_pre_hooks")  # fmt: skip


def state() -> tuple[Any, ...]:
    """Everything global that a block could leave behind."""
    private: Any = torch._C
    cuda = torch.backends.cuda
    return (
        *(dict(getattr(torch_hooks, table)) for table in _TABLES),
        _get_current_function_mode_stack(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        torch.get_rng_state().shape,
        torch.Tensor.retain_grad is _RETAIN_GRAD,
        (torch._weight_norm, importlib.import_module("torch.nn.utils.weight_norm")._weight_norm) == _WEIGHT_NORMS,
        private._is_torch_function_enabled(),
        list(watch.open_blocks()),
        [len(switch._users) for switch in (MATH_ATTENTION, QUIET_VMAP, SILENT, watch._RETAINING)],
        private._debug_only_are_vmap_fallback_warnings_enabled(),
        private._functorch.peek_interpreter_stack() is None,
        private._get_graph_exec_group(),
        private._autograd._top_saved_tensors_default_hooks(False),
    )


def attributes(model: nn.Module) -> set[str]:
    """What a model and its parameters carry, hooks included."""
    found = {a for m in model.modules() for a in vars(m)}
    found |= {a for m in model.modules() for a in map(str, (*m._forward_hooks, *m._forward_pre_hooks))}
    for p in model.parameters():
        found |= set(vars(p)) | {f"{p.requires_grad}, hooks {list(p._backward_hooks or ())}"}
    return found


def clear(model: nn.Module) -> None:
    """Take results and gradients off."""
    model.zero_grad()
    for p in model.parameters():
        vars(p).clear()
