"""What a model was called with, and the same call once more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

import hookjac


class Call:
    """One call of the model, and what is needed for the same once more."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        kind = next(model.parameters()).device.type
        self.args, self.kwargs, self.cpu = args, kwargs, torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        self.cast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.outputs: list[Tensor] = []

    def gave(self, out: Any) -> None:
        self.outputs = leaves(out)
        self.nodes, self.versions = {t.grad_fn for t in self.outputs}, [t._version for t in self.outputs]
        for t in self.outputs:
            t.retain_grad()

    def again(self, model: nn.Module) -> list[Tensor]:
        with torch.random.fork_rng(), torch.enable_grad(), torch.autocast(*self.cast):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda)
            found = leaves(model(*self.args, **self.kwargs))
        for t, before in zip(found, self.outputs, strict=True):
            top = float(before.detach().abs().max()) if before.numel() else 0.0
            off = float((t.detach() - before.detach()).abs().max()) if t.numel() else 0.0
            if not off <= 1e3 * torch.finfo(t.dtype).eps * top:
                raise hookjac.HookjacError(
                    f"the model, called twice on the same batch and random numbers, gave outputs that differ by "
                    f"{off:.1e}: it keeps a state between calls. Use `with optimizer.block():` and step()."
                )
        return found


@contextlib.contextmanager
def noting(model: nn.Module, calls: list[Call]) -> Iterator[None]:
    """While it lasts, calls of the model under gradients are noted."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            calls.append(Call(module, args, kwargs))

    def after(module: nn.Module, args: Any, out: Any) -> None:
        if torch.is_grad_enabled() and calls:
            calls[-1].gave(out)

    hooks: list[RemovableHandle] = []
    try:
        hooks.append(model.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(model.register_forward_hook(after))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def leaves(out: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
