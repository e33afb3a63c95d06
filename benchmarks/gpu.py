"""All that one GPU should tell, in eight minutes: `python -m benchmarks.gpu --output gpu.jsonl`.

One line of JSON per row, written as soon as it is measured, with the card's name. The rows that matter most come first;
what does not fit into the time, or into the memory, says so in its row. `--device cpu --small` tries it without a card.

A step, of the paper's objective, has these forms:

- sparse: as a training runs it. What is absent is not computed; the decoder is called once for the teacher and once for
  each student.
- dense: as the authors' code computes it, everything times presence.
- batched: as sparse, but teacher and students are one call of the decoder, on a batch of mixed presence.
- graph: as sparse, but recorded as one CUDA graph, for one pattern of presence. It has no share of convolutions, since
  a profiler sees one launch and no operations.
- compiled: as sparse, with encoders and the layers of decoders by `torch.compile`, most of its `first_seconds`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from monai.utils import set_determinism
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.data import SHAPE, measured
from benchmarks.inference import prediction
from benchmarks.measure import NUM_MODALITIES
from benchmarks.train_step import train_step
from passion_monai.networks import BACKBONES

__all__ = ["main"]

SETTINGS = {"width": 8, "size": 80, "threads": torch.get_num_threads(), "allocator": "kept"}
SETTINGS |= {"objective": "paper", "checkpointing": False, "window_batch_size": 1, "combinations": False}
SETTINGS |= {"separate": False, "volume": SHAPE, "case": SHAPE, "warm_up": 3, "repeats": 5}
SMALL = {"width": 4, "size": 32, "volume": (40, 32, 32), "threads": 1, "warm_up": 1, "repeats": 1}
SMALL |= {"case": (128, 128, 96)}  # smaller, a phantom of a brain has no background
PRECISIONS = ("float32", "bfloat16")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
BYTES_PER_GIB = 2**30
Row = dict[str, Any]
Task = tuple[Row, Callable[[argparse.Namespace], Row]]


def tasks(*, small: bool) -> Iterator[Task]:
    """What each row is of, and the function that measures it."""
    backbones = ["rfnet"] if small else list(BACKBONES)
    presents = [1, 2] if small else range(1, NUM_MODALITIES + 1)
    grid: list[Row] = [
        {"backbone": backbone, "present": present, "dtype": dtype}
        for backbone, dtype, present in itertools.product(backbones, PRECISIONS, presents)
    ]
    # What is absent costs the dense form as much as what is there.
    yield from (({"kind": "step", "form": "sparse", **row}, step) for row in grid)
    yield from (({"kind": "step", "form": "dense", **row}, step) for row in grid if row["present"] == presents[-1])
    yield from (({"kind": "step", "form": form, **row}, step) for form in ("batched", "graph") for row in grid)
    for backbone, dtype, combinations in itertools.product(backbones, PRECISIONS, (False, True)):
        settings = {"backbone": backbone, "present": NUM_MODALITIES, "dtype": dtype, "combinations": combinations}
        yield {"kind": "volume", **settings}, volume
    yield {"kind": "data", "cases": 5, "workers": 2, "step_seconds": 0.1}, data
    # Each takes long before it is measured, so all backbones come with every modality before any comes with fewer.
    most_first = sorted(grid, key=lambda row: -row["present"])
    yield from (({"kind": "step", "form": "compiled", **row}, step) for row in most_first)


def step(arguments: argparse.Namespace) -> Row:
    """A training step: time, memory, kernels and the share of convolutions."""
    run = train_step(arguments)
    # A graph has its memory since it was recorded, and allocates none when it runs.
    recorded = peak_memory(arguments) if arguments.form == "graph" else {}
    times = timed(run, arguments, warm_up=arguments.warm_up, repeats=arguments.repeats)
    return {**times, **recorded, **profiled(run, arguments)}


def volume(arguments: argparse.Namespace) -> Row:
    """A whole volume by sliding windows."""
    return timed(prediction(arguments), arguments, warm_up=0, repeats=1)


def data(arguments: argparse.Namespace) -> Row:
    """The data of a training."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {**vars(arguments), "output": Path(folder), "shape": arguments.case}
        return measured(argparse.Namespace(**settings))


def timed(run: Callable[[], Any], arguments: argparse.Namespace, *, warm_up: int, repeats: int) -> Row:
    """Seconds of a run, the median of several, and the memory that it takes on the card."""
    first = {"first_seconds": _seconds(run, arguments)} if warm_up else {}
    for _ in range(1, warm_up):
        run()
    if on_card(arguments):
        torch.cuda.reset_peak_memory_stats()
    seconds = [_seconds(run, arguments) for _ in range(repeats)]
    return {**first, "seconds": statistics.median(seconds), **peak_memory(arguments)}


def on_card(arguments: argparse.Namespace) -> bool:
    """Whether it is a card that is measured."""
    return torch.device(arguments.device).type == "cuda"


def peak_memory(arguments: argparse.Namespace) -> Row:
    """The most that tensors took on the card since it was last asked for anew."""
    return {"peak_memory_gib": torch.cuda.max_memory_allocated() / BYTES_PER_GIB} if on_card(arguments) else {}


def _seconds(run: Callable[[], Any], arguments: argparse.Namespace) -> float:
    wait = torch.cuda.synchronize if on_card(arguments) else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def profiled(run: Callable[[], Any], arguments: argparse.Namespace) -> Row:
    """How many kernels one run launches, and which part of their time is convolutions'."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card(arguments) else [])]
    with profile(activities=activities) as profiler:
        run()
    # Kernels are events too; their time is also that of the operations which launched them.
    events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
    launches = sum(event.count for event in events if event.key.startswith(LAUNCHES))
    name = "self_device_time_total" if on_card(arguments) else "self_cpu_time_total"
    total = sum(getattr(event, name) for event in events)
    convolutions = sum(getattr(event, name) for event in events if "conv" in event.key)
    # A profiler that the driver does not let in sees no time at all; what was measured before must not be lost for it.
    share = {} if arguments.form == "graph" or not total else {"share_of_convolutions": convolutions / total}
    return {**share, **({"launches": launches} if on_card(arguments) else {})}


class _Limit:
    """Ends what runs in it by a TimeoutError when the time is up."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def is_over(self) -> bool:
        return self.end <= time.monotonic()

    def __enter__(self) -> None:
        def stop(*_: object) -> None:
            raise TimeoutError

        if self.is_over():
            stop()
        signal.signal(signal.SIGALRM, stop)
        # Once more every few seconds, should the first be caught by what runs.
        signal.setitimer(signal.ITIMER_REAL, self.end - time.monotonic(), 5)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


def results(task: Task, arguments: argparse.Namespace, end: float) -> Row:
    """A row: what it is of, and what was measured, or why nothing was."""
    row, function = task
    settings = {**SETTINGS, **(SMALL if arguments.small else {}), "device": arguments.device, **row}
    with contextlib.suppress(RuntimeError):  # of a card that the row before has left in an error, which this one tells
        forget(arguments)
    limit = _Limit(min(arguments.row_seconds, end - time.monotonic()))
    try:
        with limit:
            return {**row, **function(argparse.Namespace(**settings))}
    except Exception as error:  # noqa: BLE001 (a row that fails must not end the others)
        # A compiler wraps whatever ends it into an error of its own.
        message = "TimeoutError: out of time" if limit.is_over() else first_line(error)
        return {**row, "error": message}


def forget(arguments: argparse.Namespace) -> None:
    """Let go of what the row before compiled and, where it failed, left on the card."""
    torch.compiler.reset()
    gc.collect()
    if on_card(arguments):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def first_line(error: Exception) -> str:
    """The kind of an error and what it says first."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def card(device: str) -> str:
    """Its name."""
    on_card = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if on_card else f"no card: {platform.processor() or platform.machine()}"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines; it is written anew")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="one backbone of a few channels, on small crops")
    parser.add_argument("--seconds", type=float, default=480, help="in which all must be done")
    parser.add_argument("--row_seconds", type=float, default=40, help="in which each row must be done")
    arguments = parser.parse_args()
    set_determinism(seed=0)  # as the bundles do
    if on_card(arguments):
        torch.cuda.set_device(arguments.device)  # by which all is measured
    end = time.monotonic() + arguments.seconds
    about = {"card": card(arguments.device), "torch": torch.__version__}
    with arguments.output.open("w", encoding="utf-8") as file:
        for task in tasks(small=arguments.small):
            line = json.dumps({**about, **_rounded(results(task, arguments, end))})
            print(line, file=file, flush=True)
            print(line, flush=True)


def _rounded(row: Row) -> Row:
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}


if __name__ == "__main__":
    main()
