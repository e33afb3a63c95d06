"""What the benchmarks share: arguments, timing interleaved with a calibrator, and one line of JSON."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from passion_monai.memory import keep_freed_memory
from passion_monai.networks import BACKBONES, Backbone
from passion_monai.precision import PRECISIONS

__all__ = ["add_arguments", "measure", "network_from", "presence_of", "print_results", "report"]

CALIBRATOR_REPEATS = 20
"""Runs of the calibrator for each run of what is measured."""
NUM_MODALITIES, NUM_CLASSES = 4, 4
Times = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of every benchmark."""
    parser.add_argument("--backbone", choices=BACKBONES, default="rfnet")
    parser.add_argument("--present", type=int, choices=range(1, NUM_MODALITIES + 1), default=NUM_MODALITIES)
    parser.add_argument("--size", type=int, default=80, help="edge of the crop in voxels")
    parser.add_argument("--width", type=int, default=8, help="channels of the finest level")
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--allocator",
        choices=("kept", "default"),
        default="kept",
        help="kept: freed memory stays with the process, as in every bundle; default: the C library decides",
    )


def network_from(arguments: argparse.Namespace) -> Backbone:
    """The backbone, with position embeddings that are not 0; sets threads and allocator as asked for."""
    torch.set_num_threads(arguments.threads)
    if arguments.allocator == "kept":
        keep_freed_memory()
    torch.manual_seed(0)
    settings = {"img_size": arguments.size, "width": arguments.width}
    network = BACKBONES[arguments.backbone](3, NUM_MODALITIES, NUM_CLASSES, **settings)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "position_embeddings" in name:
                parameter.normal_(std=0.02)
    return network.to(arguments.device)


def presence_of(arguments: argparse.Namespace) -> Tensor:
    """The first `--present` modalities, bool [1, M]."""
    return torch.tensor([[modality < arguments.present for modality in range(NUM_MODALITIES)]])


def calibrator() -> Callable[[], None]:
    """Forward and backward of a plain Conv3d(16, 16, 3) on 1x16x40^3: a unit of time that travels between machines."""
    layer = nn.Conv3d(16, 16, 3, padding=1)
    image = torch.randn(1, 16, 40, 40, 40, requires_grad=True)
    gradient = torch.randn(1, 16, 40, 40, 40)

    def run() -> None:
        layer(image).backward(gradient)

    return run


def timed(function: Callable[[], Any]) -> Times:
    """Wall seconds, CPU seconds of all threads, and minor page faults of one call."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "page_faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults,
    }


def median(times: list[Times], key: str) -> float:
    return statistics.median(entry[key] for entry in times)


def peak_flops(function: Callable[[], Any], repeats: int = 10) -> float:
    """FLOPs per CPU second of a function, at its fastest."""
    flops = count_flops(function)
    return flops / min(timed(function)["cpu_seconds"] for _ in range(repeats))


def count_flops(function: Callable[[], Any]) -> int:
    """FLOPs of convolutions and products, by torch's counter: two for a multiplication and an addition."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_convolution: onednn_flops}) as counter:
        function()
    return int(counter.get_total_flops())


def onednn_flops(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """FLOPs of a convolution that oneDNN is called for directly, which torch's counter does not know, from shapes."""
    return int(conv_flop_count(x, weight, out_shape))


def measure(function: Callable[[], Any], repeats: int, *, warm_up: bool = True) -> dict[str, float]:
    """Medians over runs of a function, which alternate with runs of the calibrator, after one of each to warm up.

    A function of many equal parts, of which the first ones cost nothing to speak of, needs no `warm_up`.

    `peak_rss_gib` is that of the process until the end of the runs. The peaks that `fraction_of_conv_peak` and
    `fraction_of_matmul_peak` refer to are a convolution of 32 channels on 40^3 and a product of two 2048^2 matrices,
    measured afterwards in the same process.
    """
    unit = calibrator()
    for _ in range(CALIBRATOR_REPEATS):
        unit()
    if warm_up:
        function()
    times, units = [], []
    for _ in range(repeats):
        times.append(timed(function))
        units += [timed(unit) for _ in range(CALIBRATOR_REPEATS)]
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    flops = count_flops(function)  # after the peak was read, since the counter keeps tensors alive
    convolution, image = nn.Conv3d(32, 32, 3, padding=1), torch.randn(1, 32, 40, 40, 40)
    matrix = torch.randn(2048, 2048)
    with torch.no_grad():
        conv_peak, matmul_peak = peak_flops(lambda: convolution(image)), peak_flops(lambda: matrix @ matrix)
    seconds, cpu_seconds = median(times, "seconds"), median(times, "cpu_seconds")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "calibrator_cpu_seconds": median(units, "cpu_seconds"),
        "calibrators": cpu_seconds / median(units, "cpu_seconds"),
        "peak_rss_gib": peak_rss,
        "page_faults": median(times, "page_faults"),
        "flops": flops,
        "fraction_of_conv_peak": flops / cpu_seconds / conv_peak,
        "fraction_of_matmul_peak": flops / cpu_seconds / matmul_peak,
    }


def profile_of(function: Callable[[], Any]) -> str:
    """The operations that take the most time in a call, after one to warm up."""
    function()
    with torch.profiler.profile() as profile:
        function()
    return str(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))


def print_results(arguments: argparse.Namespace, function: Callable[[], Any], *, warm_up: bool = True) -> None:
    """What `--profile` asks for: which operations take the time of a call, or how long it takes."""
    if arguments.profile:
        print(profile_of(function))
    else:
        results = measure(function, arguments.repeats, warm_up=warm_up)
        # All but the seconds is of the CPU; benchmarks.gpu has more of a card.
        report(arguments, results if arguments.device == "cpu" else {"seconds": results["seconds"]})


def report(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """One line of JSON: the settings, then the results."""
    rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in results.items()}
    json.dump(vars(arguments) | rounded, sys.stdout)
    print()
