"""Training by several processes, started by torchrun, each with a device of its own."""

from __future__ import annotations

import os

import ignite.distributed as idist
import torch
from monai.data import Dataset, DistributedSampler
from torch import distributed
from torch.utils.data import Sampler, SequentialSampler

__all__ = ["Agreement", "local_device", "rank", "start_process_group", "training_sampler", "validation_sampler"]


class Agreement:
    """Lets processes decide together, without one of them waiting for its GPU; all must make it, and ask it in turn."""

    def __init__(self) -> None:
        self._group = distributed.new_group(backend="gloo") if idist.get_world_size() > 1 else None

    def any(self, flag: bool) -> bool:
        """Whether it is true in any of the processes."""
        if self._group is None:
            return flag
        flags = torch.tensor(int(flag))
        distributed.all_reduce(flags, distributed.ReduceOp.MAX, self._group)
        return bool(flags)


def rank() -> int:
    """The number of this process among all of them.

    Raises:
        ValueError: when this process was not started by torchrun.
    """
    return _from_environment("RANK")


def local_device() -> torch.device:
    """The device of this process: the GPU with its number on this machine, or the CPU where there is none.

    Raises:
        ValueError: when there are fewer GPUs than processes.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, count = _from_environment("LOCAL_RANK"), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"Process {number} of this machine has no GPU: there are {count}, so --nproc_per_node={count}."
        )
    return torch.device("cuda", number)


def start_process_group() -> None:
    """Connect the processes, by NCCL between GPUs and by gloo between CPUs."""
    rank()  # an error of ours, instead of one of the group's, where torchrun is not used
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if "SLURM_JOB_ID" in os.environ:  # Ignite would number the processes as Slurm does, to which torchrun is but one
        os.environ["SLURM_LOCALID"] = os.environ["LOCAL_RANK"]
    # Ignite makes a group of its own at its first call; if only some of the processes made that call, they would hang.
    idist.sync()


def training_sampler(dataset: Dataset, *, seed: int) -> Sampler[int]:
    """Give every process its own samples, in a new order each epoch, and no sample to two processes.

    What is left over when the samples are not a multiple of the processes is left out of that epoch, other samples in
    each.

    Raises:
        ValueError: when there are fewer samples than processes.
    """
    processes = distributed.get_world_size()
    if len(dataset) < processes:
        raise ValueError(f"{len(dataset)} training samples are too few for {processes} processes; start fewer.")
    return DistributedSampler(
        dataset, num_replicas=processes, rank=distributed.get_rank(), shuffle=True, seed=seed, drop_last=True
    )


def validation_sampler(dataset: Dataset) -> Sampler[int]:
    """Divide the cases among the processes; each case goes to one of them.

    Fewer cases than processes are given to all of them, which changes no mean.
    """
    processes = distributed.get_world_size()
    if len(dataset) < processes:
        return SequentialSampler(dataset)
    return DistributedSampler(
        dataset, even_divisible=False, num_replicas=processes, rank=distributed.get_rank(), shuffle=False
    )


def _from_environment(name: str) -> int:
    if name not in os.environ:
        raise ValueError(f"{name} is not set: start the training with torchrun, or without multi_gpu_train.yaml.")
    return int(os.environ[name])
