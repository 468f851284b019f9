"""How fast, against whom, on what: `python -m benchmarks` prints the table."""
