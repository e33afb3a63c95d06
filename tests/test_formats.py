"""Images in other formats than NIfTI, and geometry: whatever the files' axes, the same place is the same voxel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import Compose

from passion_monai.datasets.cache import FileCacheDataset
from passion_monai.datasets.datalist import read_datalist
from passion_monai.evaluation.figures import _read_volumes
from passion_monai.transforms import (
    AlignModalitiesd,
    LabelsToClassesd,
    LoadCased,
    RestoreClassesd,
    SaveSegmentationd,
    StackModalitiesd,
)

MODALITIES = ("a", "b")
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
OBLIQUE = np.array([[0.8, -0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def volume(shape: tuple[int, ...] = (5, 6, 4), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, shape).astype(np.int16)


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def to_itk(array: np.ndarray, affine: np.ndarray) -> Any:
    """The same volume for ITK, whose world has left and posterior where NIfTI has right and anterior."""
    image = itk.image_from_array(np.ascontiguousarray(array.T))
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection(np.ascontiguousarray(lps[:3, :3] / spacing))
    return image


def write_itk(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    itk.imwrite(to_itk(array, affine), str(path))
    return path


def write_dicom(folder: Path, array: np.ndarray, affine: np.ndarray, series: str = "1.2.3") -> Path:
    """A series with one file per slice, in the patient's coordinates."""
    folder.mkdir(exist_ok=True)
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    direction = lps[:3, :3] / spacing
    for index in range(array.shape[2]):
        image = itk.image_from_array(np.ascontiguousarray(array[..., index].T)[None])
        image.SetSpacing(spacing.tolist())
        image.SetOrigin((lps @ [0, 0, index, 1])[:3].tolist())
        image.SetDirection(np.ascontiguousarray(direction))
        tags = image.GetMetaDataDictionary()
        tags["0008|0060"] = "MR"
        tags["0020|000e"] = series
        tags["0020|000d"] = "1.2"
        tags["0020|0013"] = str(index + 1)
        writer = itk.ImageFileWriter.New(image, FileName=str(folder / f"{series}_{index}.dcm"))
        output = itk.GDCMImageIO.New()
        output.KeepOriginalUIDOn()
        writer.SetImageIO(output)
        writer.Update()
    return folder


AFFINES = {
    "as NIfTI": np.diag([2.0, 1.5, 3.0, 1.0]),
    "as DICOM": np.array([[-2.0, 0, 0, 10], [0, -1.5, 0, -7], [0, 0, 3.0, 5], [0, 0, 0, 1]]),
    "oblique": OBLIQUE @ np.array([[-2.0, 0, 0, 10], [0, -1.5, 0, -7], [0, 0, 3.0, 5], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize("kind", ["nrrd", "mha", "mhd", "dicom"])
def test_every_format_gives_the_voxels_of_the_nifti(tmp_path: Path, kind: str, affine: np.ndarray):
    array = volume()
    case = {"case": "x", "a": str(write_nifti(tmp_path / "a.nii.gz", array, affine))}
    if kind == "dicom":
        case["b"] = str(write_dicom(tmp_path / "b", array, affine))
    else:
        case["b"] = str(write_itk(tmp_path / f"b.{kind}", array, affine))
    loaded = AlignModalitiesd(MODALITIES)(LoadCased(MODALITIES)(case))
    assert torch.equal(loaded["a"].as_tensor(), loaded["b"].as_tensor())
    torch.testing.assert_close(loaded["a"].affine, loaded["b"].affine, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["nii.gz", "nii", "nrrd", "mha", "mhd"])
def test_an_extension_may_be_in_capitals(tmp_path: Path, kind: str):
    write = write_nifti if "nii" in kind else write_itk
    file = write(tmp_path / f"a.{kind}", volume(), AFFINES["oblique"])
    loaded = LoadCased(MODALITIES)({"case": "x", "a": str(file)})["a"]
    capitals = file.rename(tmp_path / f"a.{kind.upper()}")
    again = LoadCased(MODALITIES)({"case": "x", "a": str(capitals)})["a"]
    assert torch.equal(loaded.as_tensor(), again.as_tensor())
    assert torch.equal(loaded.affine, again.affine)


def test_mixed_letters_that_nibabel_does_not_read_are_named(tmp_path: Path):
    file = write_nifti(tmp_path / "a.nii", volume(), AFFINES["oblique"])
    with pytest.raises(ValueError, match=r"a file .*a\.Nii cannot be read \(nibabel reads \.nii or \.NII"):
        LoadCased(MODALITIES)({"case": "x", "a": str(file.rename(tmp_path / "a.Nii"))})


def test_the_prediction_of_a_series_lies_on_its_grid(tmp_path: Path):
    affine, array = AFFINES["oblique"], volume()
    case = {"case": "x", "a": str(write_dicom(tmp_path / "a", array, affine)), "presence": torch.tensor([True, False])}
    predicted = predict(case, tmp_path, classes=(array > 500).astype(int))
    written = nib.load(tmp_path / "x_seg.nii.gz")
    np.testing.assert_allclose(written.affine, affine, atol=1e-4)
    assert np.array_equal(np.asarray(written.dataobj), predicted)


def predict(case: dict[str, Any], output_dir: Path, *, classes: np.ndarray) -> np.ndarray:
    """Load a case, put out these classes as probabilities, restore and save them."""
    data = Compose([LoadCased(MODALITIES), AlignModalitiesd(MODALITIES), StackModalitiesd(MODALITIES)])(case)
    one_hot = torch.nn.functional.one_hot(torch.as_tensor(classes)).movedim(-1, 0).float()
    save = SaveSegmentationd(
        output_dir=output_dir, modalities=MODALITIES, values=(0, 1), class_names=("no", "yes"), regions={}
    )
    save(RestoreClassesd()(data | {"pred": one_hot}))
    return classes


class TestBadSeries:
    def load(self, folder: Path) -> None:
        LoadCased(MODALITIES)({"case": "x", "a": str(folder)})

    def test_two_series_in_one_folder(self, tmp_path: Path):
        write_dicom(tmp_path / "a", volume(), LPS, "1.2.3")
        write_dicom(tmp_path / "a", volume(seed=1), LPS, "1.2.4")
        with pytest.raises(ValueError, match=r"Case x: a file .* one DICOM series, this one has 2\); repair the file"):
            self.load(tmp_path / "a")

    def test_no_series(self, tmp_path: Path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "notes.txt").write_text("nothing")
        with pytest.raises(ValueError, match=r"Case x: a file .* one DICOM series, this one has 0"):
            self.load(tmp_path / "a")

    def test_a_file_of_no_known_format(self, tmp_path: Path):
        (tmp_path / "a.nrrd").write_text("nothing")
        with pytest.raises(ValueError, match=r"Case x: a file .* cannot be read"):
            self.load(tmp_path / "a.nrrd")


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], np.ndarray]:
    """A shape, and an affine of any orientation, obliquity, spacing and origin."""
    shape = tuple(draw(st.integers(2, 6)) for _ in range(3))
    angles = [draw(st.floats(-0.6, 0.6)) for _ in range(3)]
    spacing = [draw(st.floats(0.5, 4)) for _ in range(3)]
    origin = [draw(st.floats(-100, 100)) for _ in range(3)]
    affine = np.eye(4)
    for axis, angle in enumerate(angles):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(4)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        affine = affine @ turn
    affine = affine @ np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return shape, affine


def turned(array: np.ndarray, affine: np.ndarray, order: tuple[int, ...], flips: tuple[bool, ...]) -> Any:
    """The same volume with its axes in another order and direction."""
    orientation = np.array([[axis, -1 if flip else 1] for axis, flip in zip(order, flips, strict=True)])
    image = nib.Nifti1Image(array, affine).as_reoriented(orientation)
    return np.asarray(image.dataobj), image.affine


@settings(max_examples=25, deadline=None)
@given(grid=grids(), order=st.permutations(range(3)), flips=st.tuples(*[st.booleans()] * 3))
def test_the_order_and_direction_of_axes_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, grid: Any, order: list[int], flips: tuple[bool, ...]
):
    shape, affine = grid
    folder = tmp_path_factory.mktemp("case")
    first, second = volume(shape), volume(shape, seed=1)
    label = (first > 500).astype(np.uint8)
    aligned = {"case": "x", "a": write_nifti(folder / "a.nii", first, affine)}
    aligned |= {
        "b": write_nifti(folder / "b.nii", second, affine),
        "label": write_nifti(folder / "l.nii", label, affine),
    }
    other = aligned | {"b": write_nifti(folder / "b2.nii", *turned(second, affine, tuple(order), flips))}
    other |= {"label": write_nifti(folder / "l2.nii", *turned(label, affine, tuple(order), flips))}
    steps = [
        LoadCased(MODALITIES),
        AlignModalitiesd(MODALITIES, label_key="label"),
        LabelsToClassesd("label", values=(0, 1)),
    ]
    prepare = Compose([*steps, StackModalitiesd(MODALITIES)])
    expected, actual = prepare(aligned), prepare(other)
    assert torch.equal(actual["image"].as_tensor(), expected["image"].as_tensor())
    assert torch.equal(actual["label"].as_tensor(), expected["label"].as_tensor())


@settings(max_examples=15, deadline=None)
@given(grid=grids(), order=st.permutations(range(3)), flips=st.tuples(*[st.booleans()] * 3))
def test_a_prediction_lies_on_the_grid_of_the_first_modality(
    tmp_path_factory: pytest.TempPathFactory, grid: Any, order: list[int], flips: tuple[bool, ...]
):
    folder = tmp_path_factory.mktemp("case")
    array, affine = turned(volume(grid[0]), grid[1], tuple(order), flips)
    case = {"case": "x", "a": write_nifti(folder / "a.nii", array, affine), "presence": torch.tensor([True, False])}
    classes = predict(case, folder, classes=(array > 500).astype(int))
    written = nib.load(folder / "x_seg.nii.gz")
    np.testing.assert_allclose(written.affine, affine, atol=1e-3)
    assert np.array_equal(np.asarray(written.dataobj), classes)


class TestVolumes:
    """One volume of a 4-D file, by its number."""

    def case(self, tmp_path: Path) -> dict[str, Any]:
        path = write_nifti(tmp_path / "all.nii.gz", np.stack([volume(seed=0), volume(seed=1)], axis=-1), OBLIQUE)
        return {"case": "x", "a": f"{path}[1]", "b": f"{path}[0]"}

    def test_is_as_if_it_had_a_file_of_its_own(self, tmp_path: Path) -> None:
        case = self.case(tmp_path)
        single = {"case": "x"}
        for name, seed in (("a", 1), ("b", 0)):
            single[name] = str(write_nifti(tmp_path / f"{name}.nii.gz", volume(seed=seed), OBLIQUE))
        loaded, expected = (LoadCased(MODALITIES)(given) for given in (case, single))
        for name in MODALITIES:
            assert torch.equal(loaded[name], expected[name])
            assert torch.equal(loaded[name].affine, expected[name].affine)
            for key in ("original_affine", "spatial_shape"):
                assert np.array_equal(loaded[name].meta[key], expected[name].meta[key])
            volumes = [_read_volumes("x", {name: given[name]})[0][name] for given in (case, single)]
            assert np.array_equal(*volumes)

    def test_counts_as_a_file_that_is_there_and_may_change(self, tmp_path: Path) -> None:
        case = self.case(tmp_path) | {"label_values": [0, 1]}
        content = {"dataset": "x", "modalities": list(MODALITIES), "root": str(tmp_path), "inference": [case]}
        (tmp_path / "list.json").write_text(json.dumps(content))
        cases = read_datalist(tmp_path / "list.json", "inference", modalities=MODALITIES)
        for seed in (0, 2):
            write_nifti(tmp_path / "all.nii.gz", np.stack([volume(seed=seed + 1), volume(seed=seed)], axis=-1), OBLIQUE)
            dataset = FileCacheDataset(cases, Compose([LoadCased(MODALITIES)]), cache_dir=tmp_path / "cache")
            assert np.array_equal(dataset[0]["a"][0], volume(seed=seed))
