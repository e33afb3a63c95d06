"""Segmentation from Python gives what the bundle's command gives."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.data import MetaTensor

from passion_monai import Segmenter
from passion_monai.datasets import discover

WITH_WEIGHTS = Path(__file__).parents[2] / "bundles" / "brats_rfnet_passion"


@pytest.mark.two_bundles
def test_it_gives_what_the_command_gives(bundle: Any, trained: Path, tmp_path: Path):
    case = next(iter(discover(bundle.dataset, trained / "phantom")))
    names = [name for name in ("flair", "t1", "lge", "bssfp") if name in case][:2]
    files = {name: str(case[name]) for name in names}
    network = {name: value for name, value in bundle.small.items() if name.startswith("network_def::")}
    ids = {"ckpt_path": str(trained / "models" / "model.pt"), "save_probabilities": True}
    bundle.succeed(
        "inference", output_dir=tmp_path, files={**files, "case": "patient"}, spacing=None, roi_size=None, **ids
    )
    segmenter = Segmenter(bundle.folder, **ids, **network)
    assert set(names) <= set(segmenter.modalities)
    images = {name: nib.load(path) for name, path in files.items()}
    tensors = {name: MetaTensor(image.get_fdata(), affine=image.affine) for name, image in images.items()}
    for given in (files, images, tensors):
        result = segmenter(given)
        for image, kind in ((result.label, "seg"), (result.probabilities, "prob")):
            written = nib.load(tmp_path / "predictions" / f"patient_{kind}.nii.gz")
            assert np.array_equal(image.dataobj, written.dataobj)
            np.testing.assert_array_equal(image.affine, written.affine)
        record = json.loads((tmp_path / "predictions" / "patient_seg.json").read_text())
        assert {**result.record, "files": None} == {**record, "files": None}
        assert not list(segmenter._folder.iterdir())
    with ThreadPoolExecutor() as pool:  # as in a server, whose patients must not be mixed up
        single = list(pool.map(lambda name: segmenter({name: files[name]}), names * 2))
    assert [one.record["modalities_used"] for one in single] == [[name] for name in names * 2]


def test_what_is_wrong_is_said(one_bundle: Any, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"inference\.yaml does not exist; give the folder of a bundle"):
        Segmenter(tmp_path)
    with pytest.raises(ValueError, match=r"Unknown ids: save_probabilites \(did you mean save_probabilities\?\)"):
        Segmenter(one_bundle.folder, save_probabilites=True)
    with pytest.raises(ValueError, match=r"^output_dir, files: give the images to each call"):
        Segmenter(one_bundle.folder, files={}, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"^There are no temperatures .*calibrate"):
        Segmenter(one_bundle.folder, calibrated=True, save_probabilities=True)
    with pytest.raises(FileNotFoundError, match=r"^There is no checkpoint .*model\.pt"):
        Segmenter(one_bundle.folder, ckpt_path=str(tmp_path / "model.pt"))
    with pytest.raises(ValueError, match="does not fit this MMFormer"):
        Segmenter(one_bundle.folder, ckpt_path=str(WITH_WEIGHTS / "models" / "model.pt"))
    segmenter = Segmenter(WITH_WEIGHTS)
    first = segmenter.modalities[0]
    for images, message in (
        ({"pet": "x.nii.gz"}, r"files: unknown key 'pet'; the keys are \["),
        ({first: None}, "files must give a path for one or more of"),
        ({first: np.zeros((4, 4, 4))}, f"{first} must be a path, a nibabel image or a MetaTensor, got ndarray"),
        ("x.nii.gz", "Give the images by the names of their sequences"),
    ):
        with pytest.raises(ValueError, match=message):
            segmenter(images)
