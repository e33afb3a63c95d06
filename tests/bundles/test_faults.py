"""Bad cases and bad weights in the workflows of a bundle, within this process, and without a network."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator

from passion_monai.datasets.phantom import write_phantom
from passion_monai.networks import RFNet

pytestmark = pytest.mark.parametrize("bundle", ["brats_rfnet_passion"], indirect=True)
SAID = ("Checkpoint", "1 case", "2 case", "3 case", "[Errno")  # how errors of ours begin, whose cause says less


class Harmful:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def small(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bundle with a small network, whose process cannot connect to anything but the processes that load cases."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            raise OSError("nothing is fetched at run time")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return bundle


def run(bundle: Any, *files: str, run_id: str = "run", **overrides: Any) -> str:
    """What a workflow ends with: nothing, or the text of the error that says most."""
    settings = bundle.small | {"bundle_root": str(bundle.folder)} | overrides
    config = [str(bundle.folder / "configs" / f"{name}.yaml") for name in files]
    workflow = ConfigWorkflow(config, workflow_type=None, logging_file=False, run_id=run_id, **settings)
    try:
        workflow.initialize()
        workflow.run()
    except (OSError, RuntimeError, ValueError) as error:
        while error.__cause__ is not None and not str(error).startswith(SAID):
            error = error.__cause__
        return str(error)
    return ""


def spoil(data: Path, case: str) -> None:
    (data / case / f"{case}_t1.nii.gz").write_bytes(b"no image")


def test_bad_cases_from_training_to_inference(small: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    data, out = tmp_path / "data", tmp_path / "out"
    write_phantom("brats", data, **(small.small["phantom"] | {"num_cases": 6}))
    places = {"dataset_dir": str(data), "output_dir": str(out)}
    training = {"run_id": "training", "epochs": 1, "val_interval": 1, **places}
    assert run(small, "train", run_id="check", **places) == ""
    assert "All 6 cases can be used." in caplog.text
    assert run(small, "train", **training) == ""
    datalist = json.loads((out / "datalist.json").read_text())
    bad, good = (entry["case"] for entry in datalist["test"])
    spoil(data, bad)

    said = run(small, "evaluate", **places)
    assert f"1 case(s) cannot be used:\nCase {bad}: t1 file" in said
    scores = list(csv.DictReader((out / "evaluation" / "scores.csv").read_text().splitlines()))
    assert {row["case"] for row in scores} == {good}
    assert len(scores) == 15 * 3
    assert "1 cases." in (out / "evaluation" / "table.md").read_text()
    (fault,) = csv.DictReader((out / "evaluation" / "failed_cases.csv").read_text().splitlines())
    assert (fault["case"], fault["file"]) == (bad, str(data / bad / f"{bad}_t1.nii.gz"))

    said = run(small, "inference", ckpt_path=str(out / "models" / "model.pt"), **places)
    assert f"1 case(s) cannot be used:\nCase {bad}: t1 file" in said
    assert len(list((out / "predictions").glob("*_seg.nii.gz"))) == 5

    for section in ("training", "validation"):
        spoil(data, datalist[section][0]["case"])
    said = run(small, "train", missing_rates=[0.0] * 4, overwrite=True, **training)
    assert "2 case(s) cannot be used" in said
    assert all(datalist[section][0]["case"] in said for section in ("training", "validation"))
    said = run(small, "train", run_id="check", **places)
    assert "3 case(s) cannot be used" in said
    assert "the other 3 cases are in order" in said


def test_a_background_that_is_not_0_from_check_to_inference(small: Any, tmp_path: Path):
    """Said for the case, which is left out, or taken with the remedy: then its segmentation is that of the original."""
    data, out = tmp_path / "data", tmp_path / "out"
    first, second, *_ = write_phantom("brats", data, **(small.small["phantom"] | {"num_cases": 4}))
    torch.save(RFNet(3, 4, 4, img_size=32, width=4).state_dict(), tmp_path / "model.pt")
    places = {"dataset_dir": str(data), "output_dir": str(out)}
    check = places | {"run_id": "check", "missing_rates": [0.0] * 4}
    inference = places | {"ckpt_path": str(tmp_path / "model.pt")}
    assert run(small, "inference", **inference) == ""
    expected = nib.load(out / "predictions" / f"{first.name}_seg.nii.gz").get_fdata()
    for name in ("flair", "t1"):
        image = nib.load(first / f"{first.name}_{name}.nii.gz")
        nib.save(nib.Nifti1Image(image.get_fdata() - 500, image.affine), first / f"{first.name}_{name}.nii.gz")
    shutil.rmtree(out)

    for said in (run(small, "train", **check), run(small, "inference", **inference)):
        assert f"1 case(s) cannot be used:\nCase {first.name}: flair file" in said
        assert "has the value -500 at its border and not 0" in said
        assert "set foreground to 'constant_border'" in said
    assert (out / "predictions" / f"{second.name}_seg.nii.gz").is_file()
    assert not (out / "predictions" / f"{first.name}_seg.nii.gz").exists()

    remedied = {"foreground": "constant_border"}
    assert run(small, "train", **check, **remedied) == ""
    assert run(small, "inference", **inference, **remedied) == ""
    found = nib.load(out / "predictions" / f"{first.name}_seg.nii.gz").get_fdata()
    assert (found == expected).mean() > 0.999  # intensities differ by rounding


@pytest.mark.parametrize(
    ("workflow", "name"),
    [("train", "validate::postprocessing"), ("evaluate", "postprocessing"), ("inference", "postprocessing")],
)
def test_no_prediction_stays_outside_of_the_head(small: Any, tmp_path: Path, workflow: str, name: str):
    """Not in what is scored, in validation and in the end, and not in what is written; unless that is not wanted."""
    combinations = [] if workflow == "inference" else [15]
    image = torch.zeros(4, 8, 8, 8)
    image[:, 2:6, 2:6, 2:6] = 1
    sample = {"case": "x", "files": {}, "presence": torch.ones(4, dtype=torch.bool)}
    for wanted, voxels in ((True, 4**3), (False, 8**3)):
        config = ConfigParser(ConfigParser.load_config_file(str(small.folder / "configs" / f"{workflow}.yaml")))
        config.update({"bundle_root": str(small.folder), "output_dir": str(tmp_path), "clear_background": wanted})
        pred = torch.tensor([0.1, 0.9, 0, 0])[:, None, None, None].expand(*combinations, 4, 8, 8, 8).clone()
        meta = {"original_affine": torch.eye(4), "spatial_shape": (8, 8, 8)}
        restore = config.get_parsed_content(name)
        restored = restore(sample | {"pred": pred, "image": MetaTensor(image, affine=torch.eye(4), meta=meta)})
        assert (restored["pred"] > 0).sum(dim=(1, 2, 3)).unique().tolist() == [voxels]


def test_a_modality_that_no_training_case_has_is_named_beside_the_bad_cases(small: Any, tmp_path: Path):
    data, places = tmp_path / "data", {"dataset_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")}
    write_phantom("brats", data, **(small.small["phantom"] | {"num_cases": 6}))
    for path in data.rglob("*_t2.nii.gz"):
        path.unlink()
    absent = "no training case has t2, so that nothing can be learned of it. Train without it by --modalities"
    assert absent in run(small, "train", run_id="training", **places)
    said = run(small, "train", run_id="check", **places)
    assert absent in said
    assert "the other 6 cases are in order" in said
    spoil(data, json.loads((tmp_path / "out" / "datalist.json").read_text())["test"][0]["case"])
    said = run(small, "train", run_id="check", **places)
    assert re.match(r"1 case\(s\) cannot be used:\nCase .*: t1 file", said)
    assert absent in said
    others = {"modalities": ["flair", "t1ce"], "missing_rates": [0.5, 0.5]}
    assert run(small, "train", run_id="check", **others, **places) == ""


def test_a_training_that_is_there_is_not_replaced_and_nothing_is_read(small: Any, tmp_path: Path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "last.pt").write_bytes(b"days of work")
    said = run(small, "train", run_id="training", output_dir=str(tmp_path))
    assert "last.pt, which a new training would replace. Continue the old one with --resume True" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [".training.lock", "models"]
    assert run(small, "train", run_id="training", output_dir=str(tmp_path), overwrite=True, epochs=1) == ""
    assert set(torch.load(tmp_path / "models" / "last.pt", weights_only=True)) > {"model", "optimizer"}


@pytest.fixture
def untrained(small: Any, tmp_path: Path) -> dict[str, str]:
    """Two cases to segment and to score, and weights of which nothing is expected."""
    data, out = tmp_path / "data", tmp_path / "out"
    write_phantom("brats", data, **(small.small["phantom"] | {"num_cases": 2}))
    names = sorted(path.name for path in data.iterdir() if path.is_dir())
    files = ("flair", "t1ce", "t1", "t2")
    cases = [
        {"case": name, "patient": name, "label": f"{name}/{name}_seg.nii.gz"}
        | {key: f"{name}/{name}_{key}.nii.gz" for key in files}
        for name in names
    ]
    content = {"dataset": "brats", "modalities": files, "root": str(data), "test": cases}
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    network = RFNet(3, 4, 4, img_size=32, width=4)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    return {"dataset_dir": str(data), "output_dir": str(out), "ckpt_path": str(tmp_path / "model.pt")}


def test_nothing_but_bad_cases(small: Any, untrained: dict[str, str], tmp_path: Path):
    data, out = Path(untrained["dataset_dir"]), tmp_path / "out"
    names = sorted(path.name for path in data.iterdir() if path.is_dir())
    for name in names:
        spoil(data, name)
    said = run(small, "evaluate", datalist=str(tmp_path / "datalist.json"), **untrained)
    assert "2 case(s) cannot be used" in said
    assert all(f"Case {name}: t1 file" in said for name in names)
    assert len((out / "evaluation" / "scores.csv").read_text().splitlines()) == 1
    assert not (out / "evaluation" / "table.md").exists()
    said = run(small, "inference", **untrained)
    assert "2 case(s) cannot be used" in said
    assert [path.name for path in (out / "predictions").iterdir()] == ["failed_cases.csv"]


def test_predictions_and_scores_that_cannot_be_written_end_the_run_and_are_made_later(
    small: Any, untrained: dict[str, str], tmp_path: Path
):
    datalist, out = str(tmp_path / "datalist.json"), tmp_path / "out"
    out.mkdir()
    for name, settings in (("predictions", ["inference"]), ("evaluation", ["evaluate"])):
        (out / name).touch()
        more = {"datalist": datalist} if name == "evaluation" else {}
        said = run(small, *settings, **untrained, **more)
        assert f"Cannot write {out / name}" in said
        assert "Make room or choose another folder, and run again." in said
        (out / name).unlink()
        assert run(small, *settings, **untrained, **more) == ""
    assert len(list((out / "predictions").glob("*_seg.nii.gz"))) == 2
    assert "2 cases." in (out / "evaluation" / "table.md").read_text()


def test_a_disk_that_is_full_ends_the_run_at_once(
    small: Any, untrained: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is no fault of the case that is written, and the next one would not fit either."""

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(nib, "save", fail)
    said = run(small, "inference", **untrained)
    assert os.strerror(errno.ENOSPC) in said
    assert "case(s) cannot be used" not in said
    assert list((tmp_path / "out" / "predictions").glob("failed_cases.csv")) == []


@pytest.fixture
def second_case(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """Lets something happen to an evaluator while it computes its second case."""
    iteration = SupervisedEvaluator._iteration

    def inject(action: Callable[[Any], None]) -> None:
        def act(self: Any, engine: Any, batch: Any) -> Any:
            if engine.state.iteration == 2:
                action(engine)
            return iteration(self, engine, batch)

        monkeypatch.setattr(SupervisedEvaluator, "_iteration", act)

    return inject


def done(out: Path, workflow: str) -> list[str]:
    """Cases that are complete."""
    if workflow == "evaluate":
        return list(json.loads((out / "evaluation" / "scores.json").read_text())["cases"])
    return [path.name for path in (out / "predictions").glob("*_seg.nii.gz")]


def kill_a_worker(engine: Any) -> None:
    """As a system does that is short of memory; torch notices within a second."""
    engine._dataloader_iter._workers[0].kill()
    time.sleep(5)


@pytest.mark.parametrize("workflow", ["evaluate", "inference"])
def test_a_worker_that_dies_ends_the_run_and_what_was_written_stays(
    small: Any,
    untrained: dict[str, str],
    second_case: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    workflow: str,
):
    settings = {"num_workers": 1, **untrained}
    if workflow == "evaluate":
        settings["datalist"] = str(tmp_path / "datalist.json")
    second_case(kill_a_worker)
    assert "DataLoader worker" in run(small, workflow, **settings)
    assert "A process that loads cases was ended, often for lack of memory: try fewer num_workers" in caplog.text
    assert "What was written before is complete; run the same command again." in caplog.text
    assert not list(tmp_path.rglob("failed_cases.csv"))
    assert len(done(tmp_path / "out", workflow)) == 1
    monkeypatch.undo()
    assert run(small, workflow, **settings) == ""
    assert len(done(tmp_path / "out", workflow)) == 2


NO_MEMORY = MemoryError("Unable to allocate 7.00 GiB")
NO_MEMORY_ON_GPU = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    ("workflow", "error", "remedy"),
    [
        ("evaluate", NO_MEMORY, "It needs more memory than there is; fewer num_workers"),
        ("inference", NO_MEMORY, "It needs more memory than there is; fewer num_workers"),
        ("inference", NO_MEMORY_ON_GPU, "Try a smaller window_batch_size or roi_size, or the CPU."),
    ],
)
def test_memory_that_does_not_suffice_for_a_case_leaves_the_others(
    small: Any,
    untrained: dict[str, str],
    second_case: Any,
    tmp_path: Path,
    workflow: str,
    error: Exception,
    remedy: str,
):
    def fail(_: Any) -> None:
        raise error

    second_case(fail)
    settings = {"datalist": str(tmp_path / "datalist.json")} if workflow == "evaluate" else {}
    said = run(small, workflow, **settings, **untrained)
    assert "1 case(s) cannot be used" in said
    assert f"{type(error).__name__}: {error} {remedy}" in said
    assert len(done(tmp_path / "out", workflow)) == 1


@pytest.mark.parametrize("where", ["evaluate", "inference", "finetune", "resume"])
def test_weights_with_code_are_refused_and_do_not_run(small: Any, tmp_path: Path, where: str):
    (tmp_path / "models").mkdir()
    for name in ("model.pt", "last.pt"):
        torch.save({"model": Harmful(tmp_path / "ran")}, tmp_path / "models" / name)
    weights = str(tmp_path / "models" / "model.pt")
    settings: dict[str, Any] = {"output_dir": str(tmp_path), "phantom::num_cases": 6}
    if where in ("evaluate", "inference"):
        said = run(small, where, ckpt_path=weights, **settings)
    elif where == "finetune":
        said = run(small, "train", "finetune", pretrained_weights=weights, **settings)
    else:
        said = run(small, "train", resume=True, epochs=1, **settings)
    assert "cannot be read as tensors" in said or "Weights only load failed" in said
    assert not (tmp_path / "ran").exists()
