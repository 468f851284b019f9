"""How fast, against whom, on what: `python -m benchmarks` prints the table."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else PyTorch's profiler announces every start and stop
