"""Files that cannot be written: the error says which, what was there stays, and the same can be done again."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.transforms import Compose
from torch import nn

from passion_monai.datasets import get_spec
from passion_monai.datasets.cache import FileCacheDataset
from passion_monai.datasets.datalist import write_datalist
from passion_monai.evaluation.score_files import ScoreFiles
from passion_monai.evaluation.tables import SCORE_COLUMNS
from passion_monai.faults import FAULT_KEY, FaultReport
from passion_monai.files import complete_file, save_complete
from passion_monai.handlers import FileCheckpoint, TrainingLog
from passion_monai.transforms import LoadCased, SaveSegmentationd

resource = pytest.importorskip("resource")
BYTES = 40  # fewer than any of the files has


def cause(error: BaseException) -> BaseException:
    """The error that MONAI's transforms have wrapped."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def cache(folder: Path) -> None:
    case = {"case": "x", "a": str(folder.with_name("image.nii"))}
    FileCacheDataset([case], Compose([LoadCased(["a"])]), folder / "cache")


def save_best(folder: Path) -> None:
    engine = Engine(lambda *_: None)
    engine.state.epoch = 1
    checkpoint = FileCheckpoint(folder / "model.pt", {"model": nn.Linear(9, 9)})
    checkpoint.attach(engine)
    checkpoint(engine)


def save_prediction(folder: Path) -> None:
    save = SaveSegmentationd(
        output_dir=folder, modalities=["a"], values=(0, 1), class_names=("no", "yes"), regions={"r": [1]}
    )
    classes = MetaTensor(torch.randint(2, (1, 9, 9, 9)), affine=torch.eye(4))
    save({"case": "x", "pred": classes, "presence": torch.tensor([True]), "files": {"a": "a.nii"}})


def log(folder: Path) -> None:
    training_log = TrainingLog(folder / "training.csv", nn.Identity(), ["a"], validator=Engine(lambda *_: None))
    training_log.rows = [{"epoch": epoch, "loss": 0.123456789} for epoch in range(9)]
    training_log._write_rows()


def list_cases(folder: Path) -> None:
    cases = [{"case": "x", "patient": "x", "flair": str(folder / "x.nii")}]
    write_datalist(folder / "datalist.json", {"training": cases}, spec=get_spec("brats"), root=folder)


def report_fault(folder: Path) -> None:
    fault = {"case": ["x"], "file": ["x.nii"], FAULT_KEY: ["no image" * 9]}
    FaultReport(folder / "failed_cases.csv")(Engine(lambda *_: None), fault)


WRITERS: dict[str, Callable[[Path], None]] = {
    "cache/": cache,
    "model.pt": save_best,
    "last.pt": lambda folder: save_complete({"a": torch.ones(99)}, folder / "last.pt"),
    "x_seg.json": save_prediction,
    "training.csv": log,
    "datalist.json": list_cases,
    "failed_cases.csv": report_fault,
    "scores.json": lambda folder: ScoreFiles(folder, columns={}, settings={"a": "b" * 99}).start(),
}


@contextmanager
def full(_: Path, room: int = BYTES) -> Iterator[None]:
    """No file can have more than a few bytes, which are written before it fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def full_in_the_end(_: Path) -> Iterator[None]:
    """What was written does not fit on the disk, which the system notices late."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield


@contextmanager
def forbidden(folder: Path) -> Iterator[None]:
    """A folder that may not be written to, for the superuser too."""
    before = Path.open

    def fail(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if set(mode) & set("wax+") and folder in path.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return before(path, mode, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", fail)
        yield


FAULTS = {
    full: os.strerror(errno.EFBIG),
    full_in_the_end: os.strerror(errno.ENOSPC),
    forbidden: os.strerror(errno.EACCES),
}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def _image(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.arange(27.0).reshape(3, 3, 3), np.eye(4)), tmp_path / "image.nii")


@pytest.mark.usefixtures("capsys")  # what is printed goes to no file, which would be limited too
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
def test_a_file_is_there_wholly_or_as_it_was(tmp_path: Path, name: str, fault: Any, again: bool):
    folder = tmp_path / "out"
    folder.mkdir()
    if again:
        WRITERS[name](folder)
        for path in folder.glob("cache/*"):
            path.unlink()  # or nothing would be written
    before = content(folder)
    with fault(folder), pytest.raises((OSError, RuntimeError)) as error:
        WRITERS[name](folder)
    found = cause(error.value)
    assert isinstance(found, OSError)
    assert f"Cannot write {folder / name.rstrip('/')}" in str(found)
    assert f"{FAULTS[fault]}. Make room or choose another folder, and run again." in str(found)
    assert content(folder) == before
    WRITERS[name](folder)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_where_a_folder_should_be(tmp_path: Path, name: str):
    (tmp_path / "out").touch()
    with pytest.raises((OSError, RuntimeError)) as error:
        WRITERS[name](tmp_path / "out")
    assert f"Cannot write {tmp_path / 'out'}" in str(cause(error.value))


@pytest.mark.usefixtures("capsys")
def test_weights_that_fit_in_part_say_so_too(tmp_path: Path):
    """More than a buffer holds: torch notices it in the midst, and raises an error that does not say why."""
    with full(tmp_path, 20_000), pytest.raises(OSError, match=r"Cannot write .*last\.pt: File too large\. Make room"):
        save_complete({"a": torch.ones(9999)}, tmp_path / "last.pt")
    assert content(tmp_path).keys() == {str(tmp_path / "image.nii")}


def test_a_file_reaches_the_disk_before_its_name_and_then_the_name_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Or a power cut would leave a name without the file, or neither though a run went on."""
    steps, fsync, replace = [], os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def note_replace(path: Path, target: Path) -> Path:
        steps.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    save_complete({}, tmp_path / "last.pt")
    assert steps == ["file", "last.pt", "folder"]


@pytest.mark.parametrize("other", ["process", "thread"])
def test_two_may_write_the_same_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str):
    """As two trainings do that fill one cache."""
    path = tmp_path / "case.pt"

    def write_second() -> None:
        with complete_file(path) as unfinished:
            unfinished.write_text("second")

    with complete_file(path) as unfinished:
        unfinished.write_text("first")
        if other == "thread":
            thread = threading.Thread(target=write_second)
            thread.start()
            thread.join()
        else:
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)
                write_second()
        assert path.read_text() == "second"
    assert path.read_text() == "first"


def test_a_segmentation_that_does_not_fit_leaves_only_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(RuntimeError) as error:
        Compose([lambda data: save_prediction(tmp_path)])({})
    assert f"Cannot write {tmp_path / 'x_seg.nii.gz'}: No space left" in str(cause(error.value))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.nii", "x_seg.json"]


def test_scores_that_do_not_fit_count_for_nothing(tmp_path: Path):
    row = dict.fromkeys(SCORE_COLUMNS, 0.5)

    def files() -> ScoreFiles:
        return ScoreFiles(tmp_path, columns={"scores.csv": SCORE_COLUMNS}, settings={})

    def rows(case: str) -> dict[str, Any]:
        return {"scores.csv": [row | {"case": case}] * 20}

    first = files()
    first.start()
    first.append("x", rows("x"))
    with full(tmp_path), pytest.raises(OSError, match=r"Cannot write .*scores\.csv: File too large\. Make room"):
        first.append("y", rows("y"))
    again = files()
    again.start(keep=again.complete_cases())
    assert again.cases == ["x"]
    again.append("y", rows("y"))
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 1 + 2 * 20
