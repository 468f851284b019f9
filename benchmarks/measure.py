"""Measuring: contenders in turn, so that whatever else the machine does happens to all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peak import Peak
from benchmarks.workloads import Job

SECONDS, ROUNDS = 4.0, (3, 300)  # for a cell; the fewest and the most rounds
LONG = 0.1  # seconds of a step that needs no warming up
ROUNDING = 64 * torch.finfo(torch.float32).eps  # of the largest entry: what two orders of one sum may differ by


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def once(step: Callable[[], Any]) -> float:
    synchronise()
    start = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - start


class Turns:
    """Every other contender's turn before each of ours: `setup` of a pedantic benchmark."""

    def __init__(self, ours: Callable[[], Any], others: dict[str, Callable[[], Any]]) -> None:
        self.ours, self.others = ours, others
        self.times: dict[str, list[float]] = {name: [] for name in others}
        self.long = {name: once(step) > LONG for name, step in {"ours": ours, **others}.items()}

    def __call__(self) -> None:
        for name, step in self.others.items():
            self.times[name].append(self.warmed(name, step))
        if not self.long["ours"]:
            self.ours()
        synchronise()

    def warmed(self, name: str, step: Callable[[], Any]) -> float:
        """Timed after an untimed one: in a training loop, a step finds the caches as the same step left them, not as
        another contender did. What takes long leaves nothing of itself there anyway."""
        if not self.long[name]:
            step()
        return once(step)

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in self.times.items()}


def rounds(steps: list[Callable[[], Any]]) -> int:
    """As many as fit into the time of a cell, after one to warm up."""
    for step in steps:
        once(step)
    times = [once(step) for step in steps]
    total = sum(t if t > LONG else 2 * t for t in times)
    return int(min(ROUNDS[1], max(ROUNDS[0], SECONDS / total)))


def peak(step: Callable[[], Any]) -> int:
    """Bytes that are alive at once, results included."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with Peak() as found:
        step()
    return found.bytes


def bandwidth(device: str) -> float:
    """Bytes a second that can be written to memory which has been used before."""
    t = torch.empty(1 << 26, device=device)
    return t.nbytes / min(once(lambda: t.fill_(1.0)) for _ in range(5))


def earliest(job: Job) -> tuple[Tensor, Tensor]:
    """What the first layer with parameters gave, in the order of execution, and the model's output.

    A layer, not the model: one that holds a parameter of its own beside its layers comes first of all modules, but what
    it gives is the output. Where the model is a single layer, there is nothing before its output.
    """
    found: list[Tensor] = []

    def see(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.requires_grad:
            found.append(out)

    layers = [m for m in job.model.modules() if m is not job.model and dict(m.named_parameters(recurse=False))]
    hooks = [layer.register_forward_hook(see) for layer in layers]
    try:
        out = job.model(job.x)
    finally:
        for hook in hooks:
            hook.remove()
    return (found or [out])[0], out


def column(job: Job) -> float:
    """Seconds of one more cotangent through the model, in its activations alone."""
    first, out = earliest(job)
    cotangent = torch.randn_like(out)
    return statistics.median(
        once(lambda: torch.autograd.grad(out, first, cotangent, retain_graph=True)) for _ in range(7)
    )
