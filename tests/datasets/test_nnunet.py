"""A datalist as a dataset of nnU-Net: the same images in the same places, and labels that count from 0."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from passion_monai.datasets.nnunet import main, write_nnunet
from passion_monai.datasets.patterns import find_cases

MODALITIES = ["a", "b"]


@pytest.fixture
def datalist(tmp_path: Path, make_case: Callable[..., dict[str, Any]]) -> Path:
    """A training case, a validation case that lacks b and hides nothing else, a test case, and one without a label."""
    cases = [make_case(name, ("a", "b"), label=name != "new") for name in ("x", "y", "z", "new")]
    cases = [{"label_values": [0, 2, 4], **case} for case in cases]
    cases[1]["presence"] = [True, False]
    content: dict[str, Any] = {"dataset": "ours", "modalities": MODALITIES, "root": str(tmp_path)}
    content["class_names"] = ["background", "core", "edema"]
    content |= {name: [case] for name, case in zip(("training", "validation", "test", "inference"), cases, strict=True)}
    path = tmp_path / "list.json"
    path.write_text(json.dumps(content))
    return path


def names(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.nii.gz"))


FILES = [
    "imagesTr/x_0000.nii.gz",
    "imagesTr/x_0001.nii.gz",
    "imagesTr/y_0000.nii.gz",
    "imagesTs/new_0000.nii.gz",
    "imagesTs/new_0001.nii.gz",
    "imagesTs/z_0000.nii.gz",
    "imagesTs/z_0001.nii.gz",
    "labelsTr/x.nii.gz",
    "labelsTr/y.nii.gz",
    "labelsTs/z.nii.gz",
]


def test_a_missing_modality_is_a_missing_file(datalist: Path, tmp_path: Path) -> None:
    assert write_nnunet(datalist, tmp_path / "out") == 4
    assert names(tmp_path / "out") == FILES
    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == {
        "channel_names": {"0": "a", "1": "b"},
        "labels": {"background": 0, "core": 1, "edema": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }


def test_or_zeros(datalist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--datalist", str(datalist), "--output", str(tmp_path / "out"), "--fill-missing"])
    assert f"4 cases in {tmp_path / 'out'}" in capsys.readouterr().out
    assert names(tmp_path / "out") == sorted([*FILES, "imagesTr/y_0001.nii.gz"])
    present, absent = (nib.load(tmp_path / "out" / "imagesTr" / f"y_000{index}.nii.gz") for index in (0, 1))
    assert not np.asarray(absent.dataobj).any()
    assert absent.shape == present.shape
    assert np.array_equal(absent.affine, present.affine)


def test_images_are_the_same_and_labels_are_classes(datalist: Path, tmp_path: Path) -> None:
    write_nnunet(datalist, tmp_path / "out")
    for written, source in (("imagesTr/x_0001", "x/b"), ("imagesTs/z_0000", "z/a")):
        image, expected = nib.load(tmp_path / "out" / f"{written}.nii.gz"), nib.load(tmp_path / f"{source}.nii.gz")
        assert np.array_equal(image.affine, expected.affine)
        assert np.array_equal(image.dataobj, expected.dataobj)
    label, values = (
        nib.load(path).dataobj for path in (tmp_path / "out/labelsTr/x.nii.gz", tmp_path / "x/label.nii.gz")
    )
    assert np.array_equal(label, np.asarray(values) // 2)


def test_there_and_back(datalist: Path, tmp_path: Path) -> None:
    write_nnunet(datalist, tmp_path / "out")
    spec, cases = find_cases(tmp_path / "out", "nnunet")
    assert (spec.modalities, spec.label_values, spec.class_names) == (
        ("a", "b"),
        (0, 1, 2),
        ("background", "core", "edema"),
    )
    assert {case["case"]: {"a", "b", "label"} & case.keys() for case in cases} == {
        "x": {"a", "b", "label"},
        "y": {"a", "label"},
        "z": {"a", "b", "label"},
        "new": {"a", "b"},
    }


def test_an_error_is_said_in_words(datalist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--datalist", "nowhere.json", "--output", "out"])
    assert "nowhere.json does not exist" in capsys.readouterr().err
