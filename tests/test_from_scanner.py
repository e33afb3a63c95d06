"""examples/from_scanner/ on a made-up head: what registration moves comes back to where it was.

Atlases and weights of HD-BET are downloaded where they are used: here the atlas is made up too, brain extraction is a
known mask, and the segmentation is a threshold.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine

# Of other registration tools, which brainles-preprocessing can use too.
pytestmark = pytest.mark.filterwarnings("ignore:.*package not found:UserWarning")
ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "from_scanner" / "segment.py"
TUMOUR = 300.0
# Of scalp, skull, brain and ventricles.
CONTRASTS = {"t1": (180.0, 20.0, 100.0, 40.0), "flair": (150.0, 10.0, 110.0, 30.0), "t2": (120.0, 20.0, 90.0, 200.0)}
# Rotation about an axis in degrees, shift in mm: where a head lies during a sequence.
PLACES = {
    "t1": ("z", 9.0, (6.0, -5.0, 8.0)),
    "flair": ("x", -7.0, (-4.0, 9.0, 3.0)),
    "t2": ("y", 6.0, (8.0, 4.0, -6.0)),
}
SPACINGS = {"t1": (3.0, 3.0, 3.0), "flair": (2.5, 3.5, 4.0), "t2": (3.5, 2.5, 3.0)}

HD_BET = """#!{python}
import argparse
import nibabel as nib

parser = argparse.ArgumentParser()
for name in ("-i", "-o", "-device"):
    parser.add_argument(name, required=True)
for name in ("--save_bet_mask", "--disable_tta"):
    parser.add_argument(name, action="store_true")
given = parser.parse_args()
image, mask = nib.load(given.i), nib.load("{mask}")
nib.save(nib.Nifti1Image(image.get_fdata() * mask.get_fdata(), image.affine), given.o)
nib.save(nib.Nifti1Image(mask.get_fdata(), image.affine), given.o[:-7] + "_bet.nii.gz")
"""


def place(axis: str, degrees: float, shift: tuple[float, float, float]) -> np.ndarray:
    """A rigid transformation, 4 x 4."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    one, other = [index for index in range(3) if index != "xyz".index(axis)]
    matrix = np.eye(4)
    matrix[[one, one, other, other], [one, other, one, other]] = cos, -sin, sin, cos
    matrix[:3, 3] = shift
    return matrix


def inside(points: np.ndarray, center: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
    return (((points - center) / radii) ** 2).sum(axis=-1) <= 1


def brain(points: np.ndarray) -> np.ndarray:
    return inside(points, (0, 0, 0), (58, 72, 54))


def tumour(points: np.ndarray) -> np.ndarray:
    return inside(points, (24, 20, 12), (22, 26, 20))


def head(points: np.ndarray, contrast: tuple[float, float, float, float], *, healthy: bool = False) -> np.ndarray:
    scalp, skull, tissue, ventricles = contrast
    image = np.zeros(points.shape[:-1])
    image[inside(points, (0, 0, 0), (72, 88, 68)) | inside(points, (0, 88, -20), (12, 16, 16))] = scalp
    image[inside(points, (0, 0, 0), (65, 80, 61))] = skull
    image[brain(points)] = tissue
    for side in (-1, 1):
        image[inside(points, (side * 14, -12, 8), (7, 26, 10))] = ventricles
    image[brain(points) & inside(points, (-30, -40, -20), (16, 14, 14))] = (tissue + ventricles) / 2
    if not healthy:
        image[tumour(points)] = TUMOUR
    return image


def grid(spacing: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """An affine with axes turned as scanners have them, and the world coordinates of each voxel."""
    shape = tuple(round(220 / size) for size in spacing)
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = 110.0, 110.0, -110.0
    return affine, apply_affine(affine, np.stack(np.indices(shape), axis=-1))


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("brainles_preprocessing", reason="pip install brainles-preprocessing==0.6.14")
    spec = importlib.util.spec_from_file_location("from_scanner", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_head(folder: Path, name: str, *, skull: bool = True) -> tuple[Path, np.ndarray]:
    """A sequence with its head somewhere, and the tumour in it."""
    affine, points = grid(SPACINGS[name])
    points = apply_affine(np.linalg.inv(place(*PLACES[name])), points)
    path = folder / f"patient_{name}.nii.gz"
    image = head(points, CONTRASTS[name]) * (skull | brain(points))
    nib.save(nib.Nifti1Image(image.astype(np.float32), affine), path)
    return path, tumour(points)


def write_atlas(folder: Path, *, skull: bool = True) -> Path:
    affine, points = grid((3.0, 3.0, 3.0))
    path = folder / "atlas.nii.gz"
    image = head(points, CONTRASTS["t1"], healthy=True) * (skull | brain(points))
    nib.save(nib.Nifti1Image(image.astype(np.float32), affine), path)
    return path


def write_command(folder: Path) -> None:
    """A command that takes what `hd-bet` 2.0.1 takes, and finds the brain where the atlas has it."""
    affine, points = grid((3.0, 3.0, 3.0))
    nib.save(nib.Nifti1Image(brain(points).astype(np.uint8), affine), folder / "brain.nii.gz")
    command = folder / "hd-bet"
    command.write_text(HD_BET.format(python=sys.executable, mask=folder / "brain.nii.gz"))
    command.chmod(0o755)


class Threshold:
    """In the place of a Segmenter."""

    modalities = ("flair", "t1", "t2")

    def __init__(self, bundle: str, **ids: Any) -> None:
        pass

    def __call__(self, images: dict[str, Path]) -> SimpleNamespace:
        image: Any = nib.load(next(iter(images.values())))
        assert all(nib.load(path).shape == image.shape for path in images.values())
        label = (image.get_fdata() > (TUMOUR + CONTRASTS["t1"][0]) / 2).astype(np.uint8)
        return SimpleNamespace(label=nib.Nifti1Image(label, image.affine), record={"modalities_used": list(images)})


@pytest.mark.parametrize("names", [("flair", "t1", "t2"), ("flair",)], ids=["three", "alone"])
def test_labels_go_to_the_atlas_and_back(
    script: ModuleType, names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(script, "Segmenter", Threshold)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    write_command(tmp_path)
    written = {name: write_head(tmp_path, name) for name in names}
    drawn, (image, truth) = tmp_path / "drawn.nii.gz", written["flair"]
    nib.save(nib.Nifti1Image(truth.astype(np.uint8), nib.load(image).affine), drawn)
    output = tmp_path / "results"
    arguments = [f"{name}={path}" for name, (path, _) in written.items()]
    arguments += ["--bundle", "any", "--output", str(output), "--atlas", str(write_atlas(tmp_path))]
    arguments += ["--brain_extraction", "hd-bet-2", "--label", f"flair={drawn}"]
    script.main(arguments)
    assert json.loads((output / "record.json").read_text()) == {"modalities_used": list(names)}
    for name, (path, truth) in written.items():
        label, image = nib.load(output / f"{name}_seg.nii.gz"), nib.load(path)
        assert label.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(label.affine, image.affine)
        assert dice(np.asarray(label.dataobj) == 1, truth) > 0.9, name
        # To one grid, skull-stripped, 0 outside.
        registered = nib.load(output / "registered" / f"{name}.nii.gz").get_fdata()
        assert (registered[~brain(grid((3.0, 3.0, 3.0))[1])] == 0).all()
    there, predicted = (nib.load(output / "registered" / f"{name}.nii.gz") for name in ("label", "segmentation"))
    np.testing.assert_array_equal(there.affine, predicted.affine)
    assert dice(np.asarray(there.dataobj) == 1, np.asarray(predicted.dataobj) == 1) > 0.9
    with pytest.raises(FileExistsError):  # the transformations of an earlier run would be applied too
        script.main(arguments)


def test_what_is_skull_stripped_already(script: ModuleType, tmp_path: Path):
    """Without brain extraction images are registered only; without a bundle nothing is segmented."""
    scan, _ = write_head(tmp_path, "t1", skull=False)
    atlas = write_atlas(tmp_path, skull=False)
    script.main([f"t1={scan}", "--output", str(tmp_path / "o"), "--atlas", str(atlas), "--brain_extraction", "none"])
    result = nib.load(tmp_path / "o" / "registered" / "t1.nii.gz")
    np.testing.assert_allclose(result.affine, nib.load(atlas).affine)
    truth = brain(grid((3.0, 3.0, 3.0))[1])
    assert dice(nib.load(scan).get_fdata() != 0, truth) < 0.9 < 0.97 < dice(result.get_fdata() != 0, truth)
    assert not list((tmp_path / "o").glob("*_seg.nii.gz"))


def test_what_is_wrong_is_said_first(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, _ = write_head(tmp_path, "t1")
    output = ["--output", str(tmp_path / "o")]
    for words, message in (
        ([f"t1={tmp_path / 'none.nii.gz'}"], "no such file"),
        ([f"t1={path}", "--atlas", "mni"], "no such file: mni"),
        ([f"t1={path}", f"t1={path}"], "each sequence once"),
        ([f"t1={path}", "--label", f"t2={path}"], "a label on one of them"),
        ([str(path)], "invalid sequence value"),
    ):
        with pytest.raises(SystemExit):
            script.main([*words, *output])
        assert message in capsys.readouterr().err
    bundle = str(ROOT / "bundles" / "brats_rfnet_passion")
    with pytest.raises(ValueError, match=r"has no \['t1w'\]; it has \('flair', 't1ce', 't1', 't2'\)"):
        script.main([f"t1w={path}", *output, "--bundle", bundle, "--ckpt_path", str(path)])
    assert not (tmp_path / "o").exists()
