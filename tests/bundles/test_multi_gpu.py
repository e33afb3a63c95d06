"""Training by two processes, connected by gloo on the CPU as they are by NCCL on GPUs."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from passion_monai.datasets.phantom import write_phantom

# Everything that is drawn is taken out; the optimiser is one whose step is proportional to the gradient, since Adam
# makes a full step of the rounding error where a gradient is 0; and all is in double precision, in which rounding
# errors do not grow to anything in the steps of an epoch.
DETERMINISTIC: dict[str, Any] = {
    "optimizer::_target_": "torch.optim.SGD",
    "learning_rate": 1e-4,
    "network": "$@network_def.to(@device).double()",
    "loss": "$@objective_parts.loss.double()",
    "epochs": 1,
    "val_interval": 2,
    "train::random_transforms": [
        {
            "_target_": "ResizeWithPadOrCropd",
            "keys": "$@modalities + ['label']",
            "spatial_size": "@roi_size",
            "allow_missing_keys": True,
        },
        {"_target_": "passion_monai.transforms.StackModalitiesd", "keys": "@modalities"},
        {
            "_target_": "EnsureTyped",
            "keys": ["image", "label"],
            "track_meta": False,
            "dtype": ["$torch.float64", "$torch.uint8"],
        },
        {"_target_": "SelectItemsd", "keys": ["image", "label", "presence"]},
    ],
}


def run_processes(bundle: Any, *, cwd: Path, **overrides: Any) -> str:
    """`torchrun` with two processes; an error when they hang, which is not how long a busy machine takes."""
    options = bundle.small | overrides | {"config_file": bundle.config("train", "multi_gpu_train")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "monai.bundle", "run", "training"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    on_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # this machine may have one GPU, and two do not share it
    with subprocess.Popen(command, cwd=cwd, text=True, env=on_cpu, **pipes) as process:
        try:
            said, _ = process.communicate(timeout=1200)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its processes, which would go on if it was killed
            raise
    assert process.returncode == 0, said[-15000:]
    return said


def read_log(folder: Path) -> list[dict[str, str]]:
    with (folder / "training.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def check_that_two_do_what_one_does(bundle: Any, tmp_path: Path, **overrides: Any) -> None:
    """Batches of one sample in two processes, and of the same two in one."""
    overrides = DETERMINISTIC | overrides
    one, two = tmp_path / "one", tmp_path / "two"
    single = {"train::dataloader::shuffle": False, "train::dataloader::drop_last": True}
    bundle.succeed("train", output_dir=one, batch_size=2, **single, **overrides)
    in_order = {"_target_": "monai.data.DistributedSampler", "dataset": "@train::dataset"} | {
        "shuffle": False,
        "drop_last": True,
    }
    run_processes(bundle, cwd=tmp_path, output_dir=two, batch_size=1, **{"train::sampler": in_order}, **overrides)

    expected, actual = (torch.load(folder / "models" / "last.pt", weights_only=True) for folder in (one, two))
    assert actual["model"].keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        torch.testing.assert_close(
            actual["model"][name], value, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: name + text
        )
    torch.testing.assert_close(actual["loss"]["beta"], expected["loss"]["beta"], rtol=1e-6, atol=1e-8)
    (theirs,), (ours,) = read_log(one), read_log(two)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert float(ours[name]) == pytest.approx(float(value), rel=1e-6, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("bundle", ["brats_rfnet_passion", "myops_m2ftrans_passion"], indirect=True)
def test_two_processes_do_what_one_does_with_the_same_batches(bundle: Any, tmp_path: Path):
    more = {"network_def::dropout_rate": 0.0} if "m2ftrans" in bundle.name else {}
    check_that_two_do_what_one_does(bundle, tmp_path, **{"phantom::num_cases": 7}, **more)


@pytest.mark.parametrize("bundle", ["brats_rfnet_passion"], indirect=True)
def test_a_process_without_any_modality_of_the_other(bundle: Any, tmp_path: Path):
    """In each step one process has FLAIR alone, and the other one all but FLAIR."""
    write_phantom("brats", tmp_path / "data", **(bundle.small["phantom"] | {"num_cases": 4}))
    modalities, entries = ("flair", "t1ce", "t1", "t2"), []
    for index, folder in enumerate(sorted(path for path in (tmp_path / "data").iterdir() if path.is_dir())):
        case = folder.name
        files = {name: f"{case}/{case}_{name}.nii.gz" for name in (modalities[1:] if index % 2 else modalities[:1])}
        entries.append({"case": case, "patient": case, "label": f"{case}/{case}_seg.nii.gz", **files})
    content = {"dataset": "brats", "modalities": modalities, "root": str(tmp_path / "data")}
    (tmp_path / "list.json").write_text(json.dumps(content | {"training": entries, "validation": []}))
    check_that_two_do_what_one_does(bundle, tmp_path, datalist=tmp_path / "list.json", simulate_missing=False)


def test_validation_counts_every_case_once(one_bundle: Any, tmp_path: Path):
    """Three validation cases for two processes, with weights that do not move."""
    settings = {"epochs": 1, "val_interval": 1, "learning_rate": 0.0, "phantom::num_cases": 20}
    one_bundle.succeed("train", output_dir=tmp_path / "one", **settings)
    run_processes(one_bundle, cwd=tmp_path, output_dir=tmp_path / "two", **settings)
    (theirs,), (ours,) = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert float(ours["val_mean_dice"]) == pytest.approx(float(theirs["val_mean_dice"]), rel=1e-4)


def test_uneven_cohorts_resume_and_files(one_bundle: Any, tmp_path: Path):
    """Five training cases and two validation cases for two processes."""
    settings = {"output_dir": tmp_path / "out", "val_interval": 1, "phantom::num_cases": 9}
    run_processes(one_bundle, cwd=tmp_path, epochs=1, **settings)
    run_processes(one_bundle, cwd=tmp_path, epochs=2, resume=True, **settings)
    assert [row["epoch"] for row in read_log(tmp_path / "out")] == ["1", "2"]
    assert {path.name for path in (tmp_path / "out" / "models").iterdir()} == {
        "model.pt",
        "last.pt",
        "last.previous.pt",
    }
    # One file of events of the trainer and one of the validation in each of the two runs.
    assert len(list((tmp_path / "out" / "tensorboard").iterdir())) == 4
    one_bundle.succeed("evaluate", output_dir=tmp_path / "out")
    one_bundle.succeed("train", epochs=3, resume=True, **settings)
    assert [row["epoch"] for row in read_log(tmp_path / "out")] == ["1", "2", "3"]


def test_without_torchrun_it_says_so(one_bundle: Any, tmp_path: Path):
    result = one_bundle.run("train", "multi_gpu_train", output_dir=tmp_path)
    assert result.returncode != 0
    assert "start the training with torchrun" in result.stderr
