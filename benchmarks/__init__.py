"""Speed and memory, each measured in a process of its own: `python -m benchmarks.table` runs them all."""
