"""Tests of what stands on other libraries: they run where the extra `clients` is installed, and not otherwise."""

from __future__ import annotations

import importlib.util

NEEDED = ("laplace", "opacus", "lightning", "accelerate", "backpack")

collect_ignore_glob = [] if all(importlib.util.find_spec(name) for name in NEEDED) else ["test_*.py"]
