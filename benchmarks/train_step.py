"""A whole training step, with the optimiser: `python -m benchmarks.train_step --backbone rfnet --present 2`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.batched import BatchedDistillation
from benchmarks.compiled import compile_regions
from benchmarks.dense import DenseStep
from benchmarks.graph import captured
from benchmarks.measure import NUM_CLASSES, NUM_MODALITIES, add_arguments, network_from, presence_of, print_results
from passion_monai.distillation import SelfDistillation
from passion_monai.losses import PassionLoss, TaskLoss
from passion_monai.networks import Backbone

MISSING_RATES = (0.2, 0.4, 0.6, 0.8)
FORMS = ("sparse", "batched", "compiled", "graph", "dense")
"""Of a step: as a training runs it; all passes of the decoder as one batch; by torch.compile; as a CUDA graph; and as
the authors' code computes it."""
LossOfStep = Callable[[Tensor, Tensor, Tensor], Tensor]
AVAILABILITY = [1 / (1 - rate) for rate in MISSING_RATES]


def objective(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A loss, and the passes that it needs."""
    if name == "paper":
        return PassionLoss(NUM_MODALITIES, NUM_CLASSES, initial_beta=AVAILABILITY), {"own_predictions": "none"}
    if name == "released":
        return PassionLoss.released(NUM_MODALITIES, NUM_CLASSES, availability=AVAILABILITY), {
            "own_predictions": "neglected"
        }
    return TaskLoss(), {"students": "none", "own_predictions": "all"}


def train_step(arguments: argparse.Namespace) -> Callable[[], None]:
    """A function that runs one step on a random crop of one sample."""
    network = network_from(arguments)
    compute = loss_of_step(arguments, network)
    in_graph = arguments.form == "graph"
    parameters = network.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=1e-4, capturable=in_graph)
    sample = random_sample(arguments)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        compute(*sample).backward()
        optimizer.step()

    return captured(step, optimizer, torch.device(arguments.device)) if in_graph else step


def loss_of_step(arguments: argparse.Namespace, network: Backbone) -> LossOfStep:
    """The loss of image, presence and label, in the form that is asked for."""
    loss, passes = objective(arguments.objective)
    loss = loss.to(arguments.device)
    if arguments.form == "dense":
        return dense_step(arguments, network, loss)
    if arguments.form == "graph" and arguments.objective != "paper":
        raise ValueError("A CUDA graph is of the paper's objective only; the others read back or are no distillation.")
    if arguments.form == "compiled":
        compile_regions(network)
    form = BatchedDistillation if arguments.form == "batched" else SelfDistillation
    settings = {"precision": arguments.dtype, "activation_checkpointing": arguments.checkpointing}
    distillation = form(network, **settings, **passes)
    return lambda image, presence, label: loss(distillation(image, presence, label), label)


def random_sample(arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Image, presence and label of a crop."""
    shape = [arguments.size] * 3
    image = torch.randn(1, NUM_MODALITIES, *shape, device=arguments.device)
    # Nested boxes: every class is there, and most is background, as in a brain.
    axes = torch.meshgrid(*[torch.linspace(-1, 1, size) for size in shape], indexing="ij")
    distance = torch.stack(axes).abs().amax(dim=0)
    label = torch.bucketize(-distance, torch.tensor([-0.6, -0.35, -0.2]))[None, None].to(arguments.device)
    return image, presence_of(arguments), label


def dense_step(arguments: argparse.Namespace, network: Backbone, loss: nn.Module) -> DenseStep:
    """The step as the authors' code computes it."""
    if not isinstance(loss, PassionLoss):
        raise ValueError(f"The dense form is of the paper's objective and the released one, not {arguments.objective}.")
    return DenseStep(network, loss, precision=arguments.dtype)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--objective", choices=("paper", "released", "baseline"), default="released")
    parser.add_argument("--checkpointing", action="store_true", help="keep no activations")
    parser.add_argument("--form", choices=FORMS, default="sparse", help="dense: as the authors compute it")
    parser.add_argument("--profile", action="store_true", help="say what takes the time, instead of how long it is")
    arguments = parser.parse_args()
    step = train_step(arguments)
    print_results(arguments, step)


if __name__ == "__main__":
    main()
