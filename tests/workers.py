"""Processes of one gloo group that do what they are told, all the same at once. Started once for many tests."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import close

from hookjac import Kronecker, KroneckerSum

TIMEOUT = 30.0  # seconds until a process takes another for lost


class Workers:
    """`workers(function, *args)`: what function(rank, *args) returns on each rank. It is one of a module, by name."""

    def __init__(self, size: int, path: Path, timeout: float = TIMEOUT) -> None:
        self.size, context = size, mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(size)]
        self.pipes = [mine for mine, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, size, str(path / "store"), timeout, its), daemon=True)
            for rank, (_, its) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, its in pipes:
            its.close()  # then the pipe of a process that died is at its end

    def tell(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As it went on each rank: what was returned, or the traceback; None if the process is gone."""
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send((function, args))
        found = []
        for pipe in self.pipes:
            try:
                found.append(pipe.recv())
            except (EOFError, ConnectionResetError):
                found.append(None)
        return found

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        found = self.tell(function, *args)
        wrong = [f"rank {rank}:\n{its}" for rank, its in enumerate(found) if its is None or its[0] == "error"]
        assert not wrong, "\n".join(wrong)
        return [its[1] for its in found]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            process.kill()


@contextlib.contextmanager
def working(size: int, path: Path, timeout: float = TIMEOUT) -> Iterator[Workers]:
    workers = Workers(size, path, timeout)
    try:
        yield workers
    finally:
        workers.close()


def _serve(rank: int, size: int, store: str, timeout: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)  # without a farewell to processes that may be gone
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        start = time.monotonic()
        try:
            pipe.send(("done", function(rank, *args), time.monotonic() - start))
        except BaseException:
            pipe.send(("error", traceback.format_exc(), time.monotonic() - start))


# In the processes ---------------------------------------------------------------------------------------------------


def same(found: Any, wanted: Any, what: Any, rtol: float = 1e-10) -> None:
    """Tensors, or Kronecker products factor by factor."""
    if isinstance(wanted, KroneckerSum):
        for a, b in zip(found.parts, wanted.parts, strict=True):
            same(a, b, what, rtol)
    elif isinstance(wanted, Kronecker):
        assert (found.shape, found.swapped, found.rows) == (wanted.shape, wanted.swapped, wanted.rows), what
        close(found.B, wanted.B, what, rtol)
        assert (found.A is None) == (wanted.A is None), what
        if wanted.A is not None:
            close(found.A, wanted.A, what, rtol)
    else:
        close(found, wanted, what, rtol)


def raised(kind: type[Exception], says: str, run: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=says):
        run()
