"""How much memory something holds at once."""

from __future__ import annotations

from typing import Any

import torch

from hookjac import memory


class Peak:
    """The most memory that tensors made inside held at once, by PyTorch's own profiler of allocations."""

    bytes = 0

    def __enter__(self) -> Peak:
        self._start = memory._POOL.most = memory._POOL.used
        self._profile = torch.profiler.profile(profile_memory=True, record_shapes=False)
        self._profile.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._profile.__exit__(*exc)
        alive = lowest = 0  # what an earlier step left may be freed in this one: count from there
        for event in self._profile.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                alive += event.nbytes()
                lowest = min(lowest, alive)
                self.bytes = max(self.bytes, alive - lowest)
        # regions of our own are not PyTorch's to see. Both peaks at once: an upper bound
        self.bytes += memory._POOL.most - self._start
        assert self.bytes > 0
