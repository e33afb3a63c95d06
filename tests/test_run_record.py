from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from passion_monai.datasets.phantom import write_phantom
from passion_monai.presence import read_presence
from passion_monai.run_record import trained_settings, write_run

MODALITIES = ("flair", "t1")


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("phantom", [False, True])
def test_write_run_says_what_the_run_was_and_what_each_case_had(tmp_path: Path, slices: int, phantom: bool) -> None:
    label = tmp_path / "label.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), label)
    if phantom:
        write_phantom("myops", tmp_path, num_cases=1, shape=(16, 16, 1), spacing=(9, 9, 9))
        label = next(tmp_path.glob("*/*_gd.nii.gz"))
    cases = [
        {"case": "001", "label": label, "flair": "a", "t1": "b", "presence": [False, True]},
        {"case": "002", "label": label, "flair": "a"},
    ]
    samples = [{**case, "slice": index} for case in cases for index in range(slices)]
    settings = {"seed": 3, "regions": {"whole": (1, 2)}, "missing_rates": None}
    for _ in range(2):  # as a resumed training does
        given: dict[str, Any] = {"bundle": "/some/where/my_bundle/", "cases": samples, "modalities": MODALITIES}
        write_run(tmp_path, resume=True, settings=settings, **given)
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record == {
        "bundle": "my_bundle",
        "modalities": ["flair", "t1"],
        "phantom": phantom,
        "seed": 3,
        "regions": {"whole": [1, 2]},
        "missing_rates": None,
    }
    rows = read_presence(tmp_path / "presence.json", MODALITIES)
    assert list(rows) == ["001", "002"]
    np.testing.assert_array_equal(list(rows.values()), [[False, True], [True, False]])


def test_a_training_goes_on_with_the_settings_that_it_was_started_with(tmp_path: Path) -> None:
    write_phantom("myops", tmp_path, num_cases=1, shape=(16, 16, 1), spacing=(9, 9, 9))
    case = {"case": "001", "label": next(tmp_path.glob("*/*_gd.nii.gz")), "flair": "a"}
    given: dict[str, Any] = {"bundle": "b", "cases": [case], "modalities": MODALITIES}
    before = {"seed": 3, "regions": {"whole": (1, 2)}, "learning_rate": 2e-4, "epochs": 5, "precision": "float32"}
    write_run(tmp_path, resume=False, settings=before, **given)
    longer = before | {"epochs": 9, "precision": "bfloat16", "setting_of_a_later_version": 1}
    write_run(tmp_path, resume=True, settings=longer, **given)
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["epochs"] == 9
    with pytest.raises(ValueError, match=r"regions .*, now {}; learning_rate 0\.0002, now 0\.1\. Give those it"):
        write_run(tmp_path, resume=True, settings=longer | {"learning_rate": 0.1, "regions": {}}, **given)
    write_run(tmp_path, resume=False, settings=longer | {"learning_rate": 0.1}, **given)


SETTINGS = {
    "phantom": False,
    "dataset": "brats",
    "backbone": "RFNet",
    "class_names": ["background", "tumour"],
    "modalities": ["flair"],
    "regions": {"whole": [1]},
    "missing_rates": None,
    "seed": 0,
    "epochs": 1,
    "objective": "passion",
    "modality_dropout": False,
    "lambda_pixel": 0.5,
    "lambda_prototype": 0.1,
    "use_task_mask": True,
    "adaptive_beta": True,
}
BUNDLE: dict[str, Any] = {"spacing": [1.0, 1.0], "class_names": ["background", "core"], "regions": {"WT": (1, 2)}}


class TestTrainedSettings:
    def test_are_those_of_the_weights(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO")
        trained = {"spacing": [2.0, 2.0], "class_names": ["background", "tumour"], "regions": {"WT": [1, 2]}}
        (tmp_path / "run.json").write_text(json.dumps(SETTINGS | trained), encoding="utf-8")
        weights = tmp_path / "models" / "model.pt"
        assert trained_settings(weights, **BUNDLE) == trained
        assert trained_settings([weights, "elsewhere/models/model.pt"], **BUNDLE) == trained
        said = f"As in {tmp_path / 'run.json'}: spacing [2.0, 2.0], class_names ['background', 'tumour']."
        assert caplog.messages == [said] * 2  # nothing of what is the bundle's

    def test_are_the_bundles_where_nothing_is_known(self, tmp_path: Path) -> None:
        weights = tmp_path / "models" / "model.pt"
        assert trained_settings(weights, **BUNDLE) == BUNDLE
        (tmp_path / "run.json").write_text(json.dumps(SETTINGS), encoding="utf-8")  # of an earlier version
        assert trained_settings(weights, **BUNDLE)["spacing"] == [1.0, 1.0]

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "run.json").write_text("{", encoding="utf-8")
        with pytest.raises(ValueError, match=r"run\.json cannot be read as JSON"):
            trained_settings(tmp_path / "models" / "model.pt", **BUNDLE)
