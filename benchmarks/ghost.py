"""A private step on per-sample gradients and on their norms, ours and Opacus': time, and memory above the model's own.

    python -m benchmarks.ghost [width] [samples]

Each way runs in a process of its own: a network of four dense layers, single precision, one thread.
"""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
import time
import warnings

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

WAYS = ("hookjac grad_samples", "hookjac ghost_clipping", "Opacus hooks", "Opacus ghost")
STEPS = 15


def measure(way: str, width: int, N: int) -> tuple[float, float]:
    """Milliseconds of the fastest step; MB that the process grew by while it trained."""
    import opacus

    from hookjac.clients.opacus import ghost_clipping, grad_samples

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.Tanh())]
    model: nn.Module = nn.Sequential(*layers, nn.Linear(width, 10))
    x, y = torch.randn(N, width), torch.randint(10, (N,))
    ours, mode = way.startswith("hookjac"), way.split()[1]
    found = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=N),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode="no_op" if ours else mode,
    )
    model, optimizer, criterion = (*found[:2], found[2] if mode == "ghost" else nn.CrossEntropyLoss())
    nn.CrossEntropyLoss()(nn.Linear(width, 10)(x), y).backward()  # what torch loads at the first backward
    block: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if mode == "grad_samples":
        block = grad_samples(model)
    elif mode == "ghost_clipping":
        block, optimizer, criterion = ghost_clipping(model, optimizer, criterion)
    before, best = _peak(), float("inf")
    with block:
        for _ in range(STEPS):
            start = time.perf_counter()
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            best = min(best, time.perf_counter() - start)
    return 1e3 * best, _peak() - before


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(width: int = 512, N: int = 64) -> None:
    print(f"| width {width}, {N} samples | ms | MB |\n|---|---|---|")
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.ghost", way, str(width), str(N)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        ms, mb = map(float, done.stdout.split())
        print(f"| {way} | {ms:.1f} | {mb:.0f} |")


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in WAYS:
        print(*measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
    else:
        main(*map(int, sys.argv[1:]))
