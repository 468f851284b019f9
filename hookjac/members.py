"""The modules and parameters of a model by name, in one quick pass: a block needs them at every step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class Members:
    """What `named_modules` and `named_parameters` list, as it was when this was made."""

    __slots__ = ("kinds", "model", "modules", "params", "trainable")

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[nn.Module, str] = {}
        self.params: dict[str, nn.Parameter] = {}
        kind = type(model)
        if (
            kind.named_parameters is nn.Module.named_parameters
            and kind.named_modules is nn.Module.named_modules
            and kind._named_members is nn.Module._named_members
        ):
            self._visit(model, "", set())
        else:  # it lists what it likes
            self.modules = {module: name for name, module in model.named_modules()}
            self.params = dict(model.named_parameters())
        self.trainable = {name: p for name, p in self.params.items() if p.requires_grad}
        self.kinds = {type(module) for module in self.modules}

    def _visit(self, module: nn.Module, prefix: str, seen: set[int]) -> None:
        self.modules[module] = prefix[:-1]
        for key, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                self.params[prefix + key] = p
        for key, child in module._modules.items():
            if child is not None and child not in self.modules:
                self._visit(child, f"{prefix}{key}.", seen)


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Around calls of a model that shall leave no trace: buffers and random numbers are afterwards as before."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    places = [(m, dict(m._buffers)) for m in model.modules()]  # a forward may put others in their place
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for m, its in places:
            for key, b in its.items():
                if key not in m._buffers or m._buffers[key] is not b:  # of a ScriptModule, no dict
                    m._buffers[key] = b
        with torch.no_grad():
            for b, before in buffers:
                b.copy_(before)
