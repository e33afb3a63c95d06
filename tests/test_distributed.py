from __future__ import annotations

import itertools
import os

import pytest
import torch
from monai.data import Dataset

from passion_monai.distributed import local_device, rank, start_process_group, training_sampler, validation_sampler


def shares(
    monkeypatch: pytest.MonkeyPatch, make: object, samples: int, processes: int, epoch: int = 0
) -> list[list[int]]:
    """The samples that each of several processes gets."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    result = []
    for process in range(processes):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda process=process: process)
        sampler = make(Dataset(list(range(samples))))
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        result.append(list(sampler))
    return result


@pytest.mark.parametrize(("samples", "processes", "each"), [(8, 2, 4), (9, 2, 4), (7, 3, 2), (3, 3, 1)])
def test_no_training_sample_counts_twice(monkeypatch: pytest.MonkeyPatch, samples: int, processes: int, each: int):
    got = shares(monkeypatch, lambda dataset: training_sampler(dataset, seed=0), samples, processes)
    assert [len(share) for share in got] == [each] * processes
    together = list(itertools.chain(*got))
    assert len(set(together)) == len(together)


def test_what_is_left_out_changes(monkeypatch: pytest.MonkeyPatch):
    left_out = set()
    for epoch in range(12):
        got = shares(monkeypatch, lambda dataset: training_sampler(dataset, seed=0), 5, 2, epoch)
        left_out |= set(range(5)) - set(itertools.chain(*got))
    assert len(left_out) > 2


def test_the_order_of_training_samples_depends_on_the_seed(monkeypatch: pytest.MonkeyPatch):
    one, other = (
        shares(monkeypatch, lambda dataset, seed=seed: training_sampler(dataset, seed=seed), 8, 2) for seed in (0, 1)
    )
    assert one != other


def test_too_few_training_samples(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="2 training samples are too few for 3 processes"):
        shares(monkeypatch, lambda dataset: training_sampler(dataset, seed=0), 2, 3)


@pytest.mark.parametrize(("samples", "processes"), [(5, 2), (4, 2), (3, 3)])
def test_every_validation_case_counts_once(monkeypatch: pytest.MonkeyPatch, samples: int, processes: int):
    got = shares(monkeypatch, validation_sampler, samples, processes)
    assert sorted(itertools.chain(*got)) == list(range(samples))


def test_few_validation_cases_go_to_all(monkeypatch: pytest.MonkeyPatch):
    assert shares(monkeypatch, validation_sampler, 1, 2) == [[0], [0]]


def test_without_torchrun_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="RANK is not set: start the training with torchrun"):
        rank()


def test_the_cpu_is_the_device_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device() == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="Process 4 of this machine has no GPU: there are 4, so --nproc_per_node=4"):
        local_device()


def test_processes_keep_the_numbers_that_torchrun_gave_them_in_a_slurm_job(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seen = []
    monkeypatch.setattr("ignite.distributed.sync", lambda: seen.append(os.environ["SLURM_LOCALID"]))
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "SLURM_JOB_ID": "7", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    start_process_group()
    assert seen == ["1"]
