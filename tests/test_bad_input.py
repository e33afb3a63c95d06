"""What users get wrong, one entry per fault: what they do, what is said, and what goes on all the same.

Files are read as the bundles do, in a list with a case that is in order, which has to come out as ever.
"""

from __future__ import annotations

import gzip
import json
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.apps.utils import extractall
from monai.transforms import Compose, NormalizeIntensityd, Orientationd, Spacingd, SpatialPadd
from safetensors.torch import save_file

from passion_monai.config import (
    check_choices,
    check_device,
    check_flips,
    check_numbers,
    check_paths,
    check_switches,
)
from passion_monai.datasets import check_classes, discover
from passion_monai.datasets.cohort import inference_cases, training_cases, validation_cases
from passion_monai.datasets.datalist import check_modalities, read_datalist
from passion_monai.datasets.nnunet import write_nnunet
from passion_monai.datasets.patterns import find_cases
from passion_monai.faults import FAULT_KEY, Fault, FaultReport, TolerantDataset, raise_faults
from passion_monai.foreground import ZeroBackgroundd
from passion_monai.networks import MMFormer, RFNet
from passion_monai.networks.checkpoints import checkpoint_paths, load_weights, read_state_dict
from passion_monai.networks.pretrained import transfer_weights
from passion_monai.presence import simulate_presence
from passion_monai.transforms import (
    AlignModalitiesd,
    CropToForegroundd,
    LabelsToClassesd,
    LoadCased,
    MaskModalitiesd,
    StackModalitiesd,
)

MODALITIES = ("a", "b", "c")
CLASSES = ("background", "core", "edema")
VALUES = (0, 2, 4)
Case = dict[str, Any]
MakeCase = Callable[..., Case]


def pipeline() -> Compose:
    """The preprocessing of the bundles, for crops of 16 voxels."""
    return Compose(
        [
            MaskModalitiesd(MODALITIES),
            LoadCased(MODALITIES),
            ZeroBackgroundd(MODALITIES),
            AlignModalitiesd(MODALITIES, label_key="label"),
            LabelsToClassesd("label", values=VALUES),
            Orientationd(MODALITIES, axcodes="RAS", labels=None, allow_missing_keys=True),
            Spacingd(MODALITIES, pixdim=[1.0] * 3, allow_missing_keys=True),
            CropToForegroundd(MODALITIES),
            NormalizeIntensityd(MODALITIES, nonzero=True, allow_missing_keys=True),
            SpatialPadd(MODALITIES, spatial_size=(16, 16, 16), allow_missing_keys=True),
            StackModalitiesd(MODALITIES),
        ]
    )


def rewrite(
    path: str, change: Callable[[np.ndarray], np.ndarray] = np.asarray, *, affine: np.ndarray | None = None
) -> None:
    image = nib.load(path)
    changed = change(np.asarray(image.dataobj))
    nib.save(nib.Nifti1Image(changed, image.affine if affine is None else affine), path)


def move_affine(path: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    rewrite(path, affine=change(nib.load(path).affine.copy()))


def write_affine(path: str, value: float) -> None:
    """A header whose affine is this value everywhere, which nibabel itself would not write."""
    content = bytearray(gzip.decompress(Path(path).read_bytes()))
    content[280:328] = np.full(12, value, "<f4").tobytes()  # srow_x, srow_y and srow_z
    Path(path).write_bytes(gzip.compress(bytes(content)))


def write_rotation(path: str) -> None:
    """A header with a quaternion that is no rotation and an affine of another spacing; ITK would go by something."""
    content = bytearray(gzip.decompress(Path(path).read_bytes()))
    content[252:256] = np.array([1, 2], "<i2").tobytes()  # qform_code and sform_code
    content[256:268] = np.array([2, 0, 0], "<f4").tobytes()  # quatern_b, quatern_c and quatern_d
    content[280:284] = np.array([9], "<f4").tobytes()  # srow_x[0]
    Path(path).write_bytes(gzip.compress(bytes(content)))


def edit(path: str, change: Callable[[bytes], bytes]) -> None:
    Path(path).write_bytes(change(Path(path).read_bytes()))


def damage(content: bytes) -> bytes:
    """What a compressed file is after voxels have changed: its checksum is another one."""
    return content[:-8] + bytes(4) + content[-4:]


def rename(case: Case, key: str, suffix: str) -> None:
    path = Path(case[key])
    case[key] = str(path.rename(path.with_name(path.name.split(".")[0] + suffix)))


def unpack(case: Case, key: str) -> str:
    content = gzip.decompress(Path(case[key]).read_bytes())
    rename(case, key, ".nii")
    Path(case[key]).write_bytes(content)
    return str(case[key])


def replace_by_link(path: str, target: str) -> None:
    Path(path).unlink()
    Path(path).symlink_to(target)


def overflow(path: str) -> None:
    """Voxels times a slope that leaves the range of float32."""
    content = bytearray(gzip.decompress(Path(path).read_bytes()))
    content[112:116] = np.array([3e38], "<f4").tobytes()  # scl_slope
    Path(path).write_bytes(gzip.compress(bytes(content)))


def store(path: str, dtype: str) -> None:
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj).astype(dtype), image.affine), path)


def say_unit(path: str, unit: str, millimetres: float = 1.0) -> None:
    """A header with its lengths in a unit; unless these are given, the numbers stay and are wrong."""
    image = nib.load(path)
    scaled = nib.Nifti1Image(np.asarray(image.dataobj), np.diag([1 / millimetres] * 3 + [1]) @ image.affine)
    scaled.header.set_xyzt_units(unit)
    nib.save(scaled, path)


class Bad:
    """A fault: what the user does, how that is done here, and what must be said."""

    def __init__(self, user: str, do: Callable[..., Any], said: str) -> None:
        self.user, self.do, self.said = user, do, said


def table(*rows: Bad) -> Any:
    """One test for each row, named after what the user does."""
    return pytest.mark.parametrize("bad", [pytest.param(row, id=re.sub(r"\W+", "-", row.user)) for row in rows])


FILES = (
    Bad("an empty file", lambda case: edit(case["b"], lambda _: b""), "b file .*b.nii.gz cannot be read.*repair"),
    Bad("a truncated .nii.gz", lambda case: edit(case["b"], lambda text: text[:300]), "b file .* cannot be read"),
    Bad("a truncated .nii", lambda case: edit(unpack(case, "b"), lambda text: text[:900]), "b file .*b.nii cannot be"),
    Bad("a text file called .nii.gz", lambda case: edit(case["b"], lambda _: b"no image"), "b file .* cannot be read"),
    Bad("a .nii called .nii.gz", lambda case: edit(case["b"], gzip.decompress), "b file .*b.nii.gz cannot be read"),
    Bad("a .nii.gz called .nii", lambda case: rename(case, "b", ".nii"), "b file .*b.nii cannot be read"),
    Bad("a format that is not known", lambda case: rename(case, "b", ".txt"), "b file .*b.txt cannot be read"),
    Bad("a damaged voxel", lambda case: edit(case["b"], damage), "b file .* cannot be read .*CRC"),
    Bad("garbage after the end", lambda case: edit(case["b"], lambda text: text + b"xyz"), "b file .* cannot be read"),
    Bad(
        "a series of volumes (4-D)",
        lambda case: rewrite(case["b"], lambda image: np.stack([image, image], axis=-1)),
        "b file .* must have 3 axes, got shape .* with 2 channel",
    ),
    Bad(
        "a volume that the 4-D file lacks",
        lambda case: case.update(b=case["b"] + "[1]"),
        r"b file .*b.nii.gz.1. cannot be read .it has 1 volume\(s\), none is number 1",
    ),
    Bad(
        "a single slice (2-D)",
        lambda case: rewrite(case["b"], lambda image: image[..., 0]),
        "b file .* must have 3 axes",
    ),
    Bad(
        "NaN voxels",
        lambda case: rewrite(case["b"], lambda image: np.where(image > 200, np.nan, image)),
        "b file .* holds NaN or infinite values; replace",
    ),
    Bad(
        "infinite voxels",
        lambda case: rewrite(case["b"], lambda image: np.where(image > 200, np.inf, image)),
        "b file .* holds NaN or infinite values",
    ),
    Bad("a scale that overflows", lambda case: overflow(case["b"]), "b file .* (cannot be read .overflow|holds NaN)"),
    Bad(
        "complex voxels",
        lambda case: store(case["b"], "complex64"),
        "b file .* cannot be read .its voxels are complex64, not one real number each: save their magnitude.*repair",
    ),
    Bad(
        "colours",
        lambda case: rewrite(case["b"], lambda image: np.zeros(image.shape, [(c, "u1") for c in "RGB"])),
        "b file .* cannot be read .its voxels are .*, not one real number each",
    ),
    Bad(
        "values too large to square",
        lambda case: rewrite(case["b"], lambda image: image * np.float32(1e30)),
        r"b file .* holds values up to 2.\d*e.32, too large to compute their variance; scale them down in the file",
    ),
    Bad(
        "a header that says metres of millimetres",
        lambda case: say_unit(case["b"], "meter"),
        r"b file .*its header gives lengths in metres, by which its voxels measure \[1000.0, .* correct its xyzt",
    ),
    Bad("an image of one value", lambda case: rewrite(case["b"], np.ones_like), "b file .* is 1.0 everywhere; give"),
    Bad(
        "a z-score of the whole image, background and all",
        lambda case: rewrite(case["b"], lambda image: (image - image.mean()) / image.std()),
        "b file .* has the value -0.6.* at its border and not 0, .*foreground to 'constant_border'",
    ),
    Bad(
        "noise in the air, or the skull",
        lambda case: rewrite(case["b"], lambda image: image + np.random.default_rng(0).rayleigh(3, image.shape)),
        "b file .* is not 0 in 100% of its voxels, .*'otsu'",
    ),
    Bad("an image without foreground", lambda case: rewrite(case["b"], np.zeros_like), "b file .* is 0.0 everywhere"),
    Bad(
        "sequences of different shape",
        lambda case: rewrite(case["b"], lambda image: image[1:]),
        "b lies on another grid than a: shape .*b.nii.gz.*Register",
    ),
    Bad(
        "sequences of different spacing",
        lambda case: move_affine(case["b"], lambda affine: affine @ np.diag([1, 1, 2, 1])),
        "b lies on another grid than a.*b.nii.gz",
    ),
    Bad(
        "sequences turned by a little",
        lambda case: move_affine(case["b"], lambda affine: rotated(affine, 0.06)),
        "b lies on another grid than a.*b.nii.gz",
    ),
    Bad(
        "sequences that are shifted",
        lambda case: move_affine(case["b"], lambda affine: affine + np.eye(4)[:, ::-1] * [0, 0, 0, 4]),
        "b lies on another grid than a.*on_mismatch to 'resample'",
    ),
    Bad(
        "a header with a zero affine", lambda case: write_affine(case["b"], 0), "b file .* affine .* correct its header"
    ),
    Bad(
        "a header with a NaN affine",
        lambda case: write_affine(case["b"], np.nan),
        "b file .* cannot be read .its affine is not finite",
    ),
    Bad(
        "a header with a rotation that is none",
        lambda case: write_rotation(case["b"]),
        "b file .* cannot be read .w2 should be positive.* repair",
    ),
    Bad(
        "a folder instead of a file",
        lambda case: (Path(case["b"]).unlink(), Path(case["b"]).mkdir()),
        "b file .* cannot be read .a folder must hold one DICOM series, this one has 0",
    ),
    Bad("a broken link", lambda case: replace_by_link(case["b"], "/nowhere"), "b file .* cannot be read .it does not"),
    Bad(
        "a link to itself", lambda case: replace_by_link(case["b"], case["b"]), "b file .* cannot be read .it does not"
    ),
    Bad(
        "a file removed meanwhile", lambda case: Path(case["b"]).unlink(), "b file .* cannot be read .it does not exist"
    ),
    Bad("no sequence at all", lambda case: [case.pop(name) for name in MODALITIES], "none of the modalities a, b, c"),
    Bad("all sequences hidden", lambda case: case.update(presence=[False] * 3), "none of the modalities a, b, c"),
    Bad("a presence row too short", lambda case: case.update(presence=[True]), "presence must have 3 entries"),
    Bad(
        "a label value that is not known",
        lambda case: rewrite(case["label"], lambda label: np.where(label == 4, 3, label)),
        r"the label holds the values \[3.0\], known are \[0, 2, 4\], in .*label.nii.gz; give the right",
    ),
    Bad(
        "label values that overflow int8",
        lambda case: (rewrite(case["label"], lambda label: label.astype(np.int16) * 100), store(case["label"], "int8")),
        r"the label holds the values \[-112.0, -56.0\]",
    ),
    Bad(
        "a label that is no whole number",
        lambda case: rewrite(case["label"], lambda label: np.where(label == 2, np.float32(2.002), label)),
        r"the label holds the values \[2.00.*known are .* classes that the data set does not have are declared by",
    ),
    Bad(
        "a label of other shape",
        lambda case: rewrite(case["label"], lambda label: label[:, 1:]),
        "label lies on another grid than a.*label.nii.gz",
    ),
    Bad(
        "an image as label", lambda case: case.update(label=case["b"]), r"the label holds .* and \d+ others, known are"
    ),
    Bad(
        "a label with NaN",
        lambda case: rewrite(case["label"], lambda label: np.where(label == 4, np.nan, label)),
        "label file .* holds NaN",
    ),
    Bad(
        "a label that was interpolated",
        lambda case: rewrite(case["label"], lambda label: label / 3.0),
        r"the label holds the values \[0.66.*known are",
    ),
    Bad("a truncated label", lambda case: edit(case["label"], lambda text: text[:90]), "label file .* cannot be read"),
    Bad(
        "label_values of another number",
        lambda case: case.update(label_values=[0, 2, 3, 4]),
        "label_values must be 3 values, one for each class",
    ),
)


@table(*FILES)
def test_a_bad_file_is_named_and_leaves_the_other_cases(make_case: MakeCase, bad: Bad):
    case, good = make_case("bad"), make_case("good")
    bad.do(case)
    dataset = TolerantDataset([case, good], pipeline())
    found, other = dataset[0], dataset[1]
    assert re.match(f"Case bad: {bad.said}", found[FAULT_KEY], flags=re.DOTALL), found[FAULT_KEY]
    assert found["case"] == "bad"
    assert not found["file"] or found["file"] in case.values()
    assert other["image"].shape == (3, 16, 16, 16)
    with pytest.raises(ValueError, match=r"1 case\(s\) cannot be used:\nCase bad: "):
        raise_faults([Fault(found["case"], found["file"], found[FAULT_KEY])])


def test_a_report_names_what_failed_in_its_own_run(tmp_path: Path):
    """Nothing of a run before, whose cases were mended."""
    report, engine = FaultReport(tmp_path / "failed_cases.csv"), Engine(lambda *_: None)
    bad = {"case": ["x"], "file": ["x.nii"], FAULT_KEY: ["Case x: no image"]}
    with pytest.raises(ValueError, match=r"1 case\(s\) cannot be used:\nCase x: no image"):
        report.run(SimpleNamespace(run=lambda: report(engine, bad)))
    assert engine.state.batch == []
    assert report.path.read_text().splitlines() == ["case,file,reason", "x,x.nii,Case x: no image"]
    report.run(SimpleNamespace(run=lambda: None))
    assert not report.path.exists()


@pytest.mark.parametrize("iteration", [0, 3])
def test_what_ends_a_run_comes_with_its_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture, iteration: int):
    def fail() -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    evaluator: Any = SimpleNamespace(run=fail, state=SimpleNamespace(iteration=iteration))
    with pytest.raises(RuntimeError, match="killed by signal"):
        FaultReport(tmp_path / "failed_cases.csv").run(evaluator)
    assert "try fewer num_workers" in caplog.text
    assert ("What was written before is complete" in caplog.text) == (iteration > 0)


def rotated(affine: np.ndarray, degrees: float = 20) -> np.ndarray:
    turn, angle = np.eye(4), np.deg2rad(degrees)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn @ affine


def scale_label(path: str) -> None:
    """A float label stored as int16, for which nibabel makes up a scale; 4 is then 4.0000610."""
    image = nib.load(path)
    scaled = nib.Nifti1Image(np.asarray(image.dataobj).astype(np.float64), image.affine)
    scaled.set_data_dtype(np.int16)
    nib.save(scaled, path)
    assert set(np.unique(nib.load(path).get_fdata())) - {0, 2, 4}


SHEAR = np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
UNUSUAL = {
    "RAS": lambda case: [
        move_affine(case[key], lambda a: np.diag([-1, -1, 1, 1]) @ a) for key in (*MODALITIES, "label")
    ],
    "LPI": lambda case: [
        move_affine(case[key], lambda a: np.diag([1, 1, -1, 1]) @ a) for key in (*MODALITIES, "label")
    ],
    "oblique": lambda case: [move_affine(case[key], rotated) for key in (*MODALITIES, "label")],
    "sheared": lambda case: [move_affine(case[key], lambda a: a @ SHEAR) for key in (*MODALITIES, "label")],
    "anisotropic": lambda case: [
        move_affine(case[key], lambda a: a @ np.diag([1, 1, 1.5, 1])) for key in (*MODALITIES, "label")
    ],
    "negative values": lambda case: rewrite(case["b"], lambda image: np.where(image > 0, image - 1000, 0)),
    "whole numbers": lambda case: store(case["b"], "int16"),
    "metres": lambda case: [say_unit(case[key], "meter", 1000) for key in (*MODALITIES, "label")],
    "micrometres in one file": lambda case: say_unit(case["b"], "micron", 0.001),
    "no unit": lambda case: say_unit(case["b"], "unknown"),
    "a label scaled to int16": lambda case: scale_label(case["label"]),
    "a label next to whole numbers": lambda case: rewrite(
        case["label"], lambda label: np.nextafter(label, 0, dtype=np.float32)
    ),
    "a grid that a registration tool rounded": lambda case: move_affine(
        case["b"], lambda a: a + np.eye(4)[:, ::-1] * [0, 0, 0, 0.005]
    ),
    "a 4-D file of one volume": lambda case: rewrite(case["b"], lambda image: image[..., None]),
    "an uncompressed file": lambda case: unpack(case, "b"),
    "a label of background only": lambda case: rewrite(case["label"], np.zeros_like),
    "a link to the file": lambda case: replace_by_link(
        case["b"], str(shutil.copy(case["b"], Path(case["b"]).with_name("real.nii.gz")))
    ),
    "zeros after the end": lambda case: edit(case["b"], lambda text: text + bytes(512)),
}


@pytest.mark.parametrize("unusual", UNUSUAL)
def test_what_is_unusual_works(make_case: MakeCase, unusual: str):
    case = make_case("Grüße aus Köln (1)")
    UNUSUAL[unusual](case)
    sample = TolerantDataset([case], pipeline())[0]
    assert sample.get(FAULT_KEY) is None
    assert all(size >= 16 for size in sample["image"].shape[1:])  # smaller than the crop: padded
    assert bool(torch.isfinite(sample["image"]).all())
    assert sample["presence"].all()
    assert sample["label"].max() == (0 if "background" in unusual else 2)


def content(root: Path) -> Case:
    """A datalist of two training cases, one for validation and one without label, whose files exist."""

    def entry(case: str, *keys: str) -> Case:
        for key in keys:
            (root / f"{case}_{key}.nii").touch()
        return {"case": case, "patient": case, **{key: f"{case}_{key}.nii" for key in keys}}

    return {
        "dataset": "ours",
        "modalities": list(MODALITIES),
        "root": str(root),
        "training": [entry("x", "a", "b", "label"), entry("y", "c", "label")],
        "validation": [entry("v", "a", "label")],
        "inference": [entry("z", "b")],
    }


DATALISTS = (
    Bad("a section of another name", lambda c: c.update(train=[]), r"list.json must be an object with .*'train'"),
    Bad("no root", lambda c: c.pop("root"), "list.json must be an object with"),
    Bad("a number as root", lambda c: c.update(root=3), "'root' a folder, got .* and 3"),
    Bad(
        "an empty section", lambda c: c.update(training=[]), r"no case in section 'training'\. The sections with cases"
    ),
    Bad("a section that is no list", lambda c: c.update(training="x"), "must be a list of objects"),
    Bad("an unknown key of a case", lambda c: c["training"][0].update(seg="s"), r"case 'x': unknown keys \['seg'\]"),
    Bad("a misspelt sequence", lambda c: c["training"][0].update(A="a"), r"case 'x': unknown keys \['A'\], expected"),
    Bad("a case without id", lambda c: c["training"][0].pop("case"), "'case' must be the case's id, got None"),
    Bad("a case twice", lambda c: c["validation"].append(c["training"][0]), "case 'x' is there twice, in 'training'"),
    Bad(
        "a patient in two sections",
        lambda c: c["validation"][0].update(patient="x"),
        "case 'v': patient 'x' is in 'training' and in 'validation', .* keep all cases of a patient in one",
    ),
    Bad("no label", lambda c: c["training"][0].pop("label"), "case 'x': has no label; add one or move"),
    Bad("null for a missing sequence", lambda c: c["training"][0].update(c=None), "'c' must be a path, .*leave out"),
    Bad("a list of files", lambda c: c["training"][0].update(a=["1", "2"]), r"'a' must be a path, got \['1', '2'\]"),
    Bad("a file twice", lambda c: c["training"][0].update(b="x_a.nii"), "'a' and 'b' are the same file, x_a.nii"),
    Bad("an image as label", lambda c: c["training"][0].update(label="x_a.nii"), "'a' and 'label' are the same file"),
    Bad("a presence row too short", lambda c: c["training"][0].update(presence=[1]), "'presence' must be 3 booleans"),
    Bad("a presence that is no flag", lambda c: c["training"][0].update(presence=[1, 0, 2]), "'presence' must be 3"),
    Bad(
        "a case that hides all", lambda c: c["training"][0].update(presence=[0, 0, 1]), "none of .* is present; remove"
    ),
    Bad("a folder that moved", lambda c: c.update(root="/nowhere"), "no case has all of its files.*as root"),
    Bad("other sequences than asked for", lambda c: c.update(modalities=["a", "b", "t"]), "'c' is asked for"),
    Bad(
        "two bad cases",
        lambda c: [entry.update(seg="s") for entry in c["training"]],
        "(?s)case 'x': unknown keys.*case 'y': unknown keys",
    ),
)


@table(*DATALISTS)
def test_a_bad_datalist_is_named(tmp_path: Path, bad: Bad):
    datalist = content(tmp_path)
    bad.do(datalist)
    path = tmp_path / "list.json"
    path.write_text(json.dumps(datalist))
    with pytest.raises((ValueError, FileNotFoundError), match=bad.said) as error:
        read_datalist(path, "training", modalities=MODALITIES)
    assert str(path) in str(error.value)


TEXTS = (
    Bad("JSON with a trailing comma", lambda text: text.replace('"inference"', ',"inference"'), "as JSON: .*line 1"),
    Bad("JSON that ends too early", lambda text: text[:99], "as JSON"),
    Bad("a list instead of an object", lambda text: f"[{text}]", "must be an object with .*, got list"),
)


@table(*TEXTS)
def test_a_datalist_that_is_none_is_named(tmp_path: Path, bad: Bad):
    path = tmp_path / "list.json"
    path.write_text(bad.do(json.dumps(content(tmp_path))))
    for read in (
        lambda: read_datalist(path, "training", modalities=MODALITIES),
        lambda: validation_cases(path, modalities=MODALITIES),
    ):
        with pytest.raises(ValueError, match=f"list.json .*{bad.said}"):
            read()


@pytest.mark.parametrize("form", ["absolute", "..", "byte order mark", "link"])
def test_any_path_and_a_byte_order_mark_will_do(tmp_path: Path, form: str):
    datalist, entry = content(tmp_path), {}
    if form == "link":
        (tmp_path / "link.nii").symlink_to(tmp_path / "x_a.nii")
    entry["a"] = {"absolute": str(tmp_path / "x_a.nii"), "..": f"../{tmp_path.name}/x_a.nii", "link": "link.nii"}.get(
        form, "x_a.nii"
    )
    datalist["training"][0] |= entry
    (tmp_path / "list.json").write_text(
        json.dumps(datalist), encoding="utf-8-sig" if form == "byte order mark" else "utf-8"
    )
    cases = read_datalist(tmp_path / "list.json", "training", modalities=MODALITIES)
    assert Path(cases[0]["a"]).samefile(tmp_path / "x_a.nii")


def test_no_datalist_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"list\.json does not exist; python -m passion_monai.datasets"):
        validation_cases(str(tmp_path / "list.json"), modalities=MODALITIES)


BRATS = ("flair", "t1ce", "t1", "t2")


def cohort(root: Path, *cases: str) -> None:
    for case in cases:
        (root / case).mkdir(parents=True)
        for name in (*BRATS, "seg"):
            (root / case / f"{case}_{name}.nii.gz").touch()


def link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


FOLDERS = (
    Bad("a sequence in two formats", lambda case: (case / "bad_t1.nii").touch(), "has two files for t1, .*remove one"),
    Bad("a case in two folders", lambda case: cohort(case.parent / "copy", "bad"), "lies in 2 folders, .*; keep one"),
    Bad("the names of two years", lambda case: (case / "bad-t1n.nii").touch(), "mixes the namings of different years"),
    Bad(
        "a label without images",
        lambda case: [(case / f"bad_{name}.nii.gz").unlink() for name in BRATS],
        "has a label but no image",
    ),
    Bad("a broken link", lambda case: link(case / "bad_t2.nii.gz", "/nowhere"), "bad_t2.nii.gz is a broken link"),
    Bad("a link to itself", lambda case: link(case / "bad_t2.nii.gz", "bad_t2.nii.gz"), "is a broken link or no file"),
    Bad(
        "a folder called like a file",
        lambda case: ((case / "bad_t2.nii.gz").unlink(), (case / "bad_t2.nii.gz").mkdir()),
        "bad_t2.nii.gz is a folder, not a file; move",
    ),
)


@table(*FOLDERS)
def test_a_bad_folder_is_named_and_leaves_the_other_cases(tmp_path: Path, bad: Bad):
    cohort(tmp_path, "bad", "good")
    bad.do(tmp_path / "bad")
    with pytest.raises(ValueError, match=f"1 case.s. cannot be used:\nCase 'bad'.*{bad.said}"):
        discover("brats", tmp_path)
    arguments = {"files": None, "output_dir": "", "phantom": {}, "missing_rates": None, "seed": 0}
    found = inference_cases("brats", dataset_dir=str(tmp_path), modalities=BRATS, **arguments)
    assert [case["case"] for case in found if FAULT_KEY not in case] == ["good"]
    faulty = TolerantDataset(found, Compose([]))[0]
    assert re.search(bad.said, faulty[FAULT_KEY])


def test_all_bad_folders_are_named_at_once(tmp_path: Path):
    cohort(tmp_path, "x", "y", "z")
    for case in ("x", "z"):
        (tmp_path / case / f"{case}_t1.nii").touch()
    with pytest.raises(ValueError, match=r"2 case.s. cannot be used:\nCase 'x' has two .*\nCase 'z' has two"):
        discover("brats", tmp_path)


@pytest.mark.parametrize(
    ("name", "said"), [("none", "is not a folder; pass"), ("empty", "holds no BraTS case; looked")]
)
def test_a_folder_without_cases_is_named(tmp_path: Path, name: str, said: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=said):
        discover("brats", tmp_path / name)


DESCRIPTION = {"channel_names": {"0": "a", "1": "b"}, "labels": {"background": 0, "core": 1}, "file_ending": ".nii.gz"}


def described(layout: str = "nnunet", **changed: Any) -> Callable[[Path], dict[str, Any]]:
    """What is given where dataset.json has something else in it."""

    def give(root: Path) -> dict[str, Any]:
        (root / "dataset.json").write_text(json.dumps(DESCRIPTION | changed))
        return {"layout": layout}

    return give


def patterns(label: str | None = None, **modalities: str) -> Callable[[Path], dict[str, Any]]:
    return lambda _: {"modalities": modalities, "label": label}


WHERE = "must say where the case's id stands: by its only"
LAYOUTS = (
    Bad("no dataset.json", lambda root: {"layout": "nnunet"}, "dataset.json does not exist; root is the folder that"),
    Bad("files of a format that is not read", described(file_ending=".png"), "file_ending '.png' is not read here"),
    Bad("a label to ignore", described(labels={"background": 0, "ignore": 1}), "a label to ignore is not supported"),
    Bad("a class whose value is text", described(labels={"background": 0, "x": "1"}), "must be whole numbers"),
    Bad("classes without a background", described(labels={"core": 1}), "labels must be .*, 0 for the background"),
    Bad("channels without numbers", described(channel_names=["a"]), "'modality' with a name for each number"),
    Bad("two channels of one name", described(channel_names={"0": "x", "1": "x"}), "a list of different names"),
    Bad("a channel that dataset.json lacks", described(channel_names={"0": "a", "1": "c"}), "No case .* has c, but"),
    Bad("neither a layout nor patterns", lambda _: {}, "Give --layout, one of .*'bids'.*, or a --modality"),
    Bad("a pattern without *", patterns(a="jo_a"), WHERE),
    Bad("a pattern with two *", patterns(a="*_*_a"), WHERE),
    Bad("a pattern with **", patterns(a="**/{case}_a"), WHERE),
    Bad("a pattern twice", patterns(a="*_a", b="*_a.nii"), "need a pattern of their own"),
    Bad("a pattern that nothing fits", patterns(a="*_A"), r"holds no such case; looked for files named \*_A.nii"),
    Bad("an image for a label", patterns("*_image", a="*_a"), "holds more values than a label does; is it an image"),
    Bad("a label that is no image", patterns("*_text", a="*_a"), "jo_text.nii.gz cannot be read"),
    Bad(
        "names for the volumes of 4-D files",
        lambda root: described("decathlon")(root) | {"modalities": {"a": "*_a"}},
        "--modality does not apply to the volumes of 4-D files",
    ),
    Bad(
        "without a sequence that the layout lacks",
        lambda _: {"layout": "bids", "without": ["pd"]},
        r"--without takes .*'flair'.*, got \['pd'\]",
    ),
)


@table(*LAYOUTS)
def test_a_layout_that_makes_no_sense_is_named(tmp_path: Path, bad: Bad):
    (tmp_path / "imagesTr").mkdir()
    voxels = np.arange(125, dtype=np.uint8).reshape(5, 5, 5)
    for name in ("imagesTr/jo_0000", "imagesTr/jo_0002", "jo_a", "jo_image"):
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / f"{name}.nii.gz")
    (tmp_path / "jo_text.nii.gz").write_text("no image")
    given = bad.do(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=bad.said):
        find_cases(tmp_path, **given)


def add(output: Path) -> None:
    output.mkdir()
    (output / "dataset.json").touch()


NNUNETS = (
    Bad("a dataset that is there", lambda output, _: add(output), "holds a dataset already; give another folder"),
    Bad("classes that are not known", lambda _, c: c.pop("class_names"), "must have class_names, and cases with as"),
    Bad("values of other classes", lambda _, c: c.update(class_names=["k"]), "as many label_values, got .'k'. and "),
    Bad("a bad case", lambda _, c: Path(c["root"], c["training"][0]["a"]).write_text(""), "(?s)Case case1.*no dataset"),
)


@table(*NNUNETS)
def test_what_nnunet_cannot_have_is_named(tmp_path: Path, make_case: MakeCase, bad: Bad):
    case = make_case("case1") | {"patient": "x", "label_values": list(VALUES)}
    datalist = {"dataset": "ours", "modalities": list(MODALITIES), "root": str(tmp_path), "class_names": list(CLASSES)}
    datalist["training"] = [case]
    bad.do(tmp_path / "out", datalist)
    (tmp_path / "list.json").write_text(json.dumps(datalist))
    with pytest.raises(ValueError, match=bad.said):
        write_nnunet(tmp_path / "list.json", tmp_path / "out")


FILES_OF_ONE_CASE = (
    Bad("another sequence", lambda: {"t3": "x.nii"}, "files: unknown key 't3'"),
    Bad("a text instead of files", lambda: "x.nii", "files must give a path for .* got 'x.nii'"),
    Bad(
        "a name that leads elsewhere",
        lambda: {"t1": "x.nii", "case": "../../x"},
        "'case' .* without folders, got '../../x'",
    ),
)


@table(*FILES_OF_ONE_CASE)
def test_files_of_one_case(bad: Bad):
    arguments = {"output_dir": "", "phantom": {}, "missing_rates": None, "seed": 0}
    with pytest.raises(ValueError, match=bad.said):
        inference_cases("brats", dataset_dir=None, files=bad.do(), modalities=BRATS, **arguments)


RATES = (
    Bad("a rate of 1", lambda: [1.0, 0, 0], r"missing_rates must be in \[0, 1\), got 1.0"),
    Bad("a negative rate", lambda: [-0.1, 0, 0], r"missing_rates must be in \[0, 1\), got -0.1"),
    Bad("a rate that is NaN", lambda: [float("nan"), 0, 0], r"missing_rates must be in \[0, 1\), got nan"),
    Bad("a rate in words", lambda: ["half", 0, 0], r"missing_rates must be in \[0, 1\), got 'half'"),
    Bad("a rate for all", lambda: 0.5, "missing_rates must be a list of one rate for each of .*, got 0.5"),
    Bad("a rate too few", lambda: [0.5, 0.5], "missing_rates must be a list of one rate for each of"),
    Bad("a rate that leaves no image", lambda: [0.9, 0, 0], "leaves modality 0 in none of 2 samples.*lower"),
    Bad("a sequence that is missing already", lambda: [0.0, 0.0, 0.0], "case 'x' has 'c', but the case does not"),
)


def training(tmp_path: Path, **changed: Any) -> list[Case]:
    (tmp_path / "list.json").write_text(json.dumps(content(tmp_path)))
    return training_cases(str(tmp_path / "list.json"), dataset="brats", modalities=MODALITIES, **changed)


@table(*RATES)
def test_bad_missing_rates(tmp_path: Path, bad: Bad):
    with pytest.raises(ValueError, match=bad.said):
        training(tmp_path, missing_rates=bad.do())


def test_rates_that_leave_less_than_one_image_for_each_case(tmp_path: Path):
    with pytest.raises(ValueError, match=r"leave 60 images for 100 samples.*lower the rates until"):
        simulate_presence(100, (0.8, 0.8, 0.8), seed=0)


ROWS = {"modalities": ["a", "b", "c"], "cases": {"x": [1, 1, 0], "y": [0, 0, 1]}}
PRESENCES = (
    Bad("presence of other cases", lambda rows: rows.update(cases={"k": [1, 1, 1]}), r"no row for .* \['x', 'y'\]"),
    Bad("presence of other sequences", lambda rows: rows.update(modalities=["a", "b", "t"]), "has the modalities"),
    Bad("a row too short", lambda rows: rows["cases"].update(y=[1]), "case 'y': expected 3 entries"),
    Bad(
        "an entry that is no flag", lambda rows: rows["cases"].update(y=[0, 0, 0.5]), "case 'y': entries must be 0 or 1"
    ),
    Bad("a row of zeros", lambda rows: rows["cases"].update(y=[0, 0, 0]), "case 'y': the case has no modality at all"),
    Bad("an image that is not there", lambda rows: rows["cases"].update(y=[1, 0, 1]), "case 'y' has 'a', but the case"),
    Bad("a key of another name", lambda rows: rows.update(order=[]), 'must hold ."modalities"'),
)


@table(*PRESENCES)
def test_a_bad_presence_file(tmp_path: Path, bad: Bad):
    rows = json.loads(json.dumps(ROWS))
    bad.do(rows)
    (tmp_path / "presence.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=bad.said):
        training(tmp_path, presence_file=str(tmp_path / "presence.json"))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.json", None, "none.json does not exist"),
        ("presence.txt", "", "must end in .json or .csv"),
        ("presence.json", '{"modalities": [],}', "presence.json cannot be read as JSON.*line 1"),
        ("presence.json", '{"modalities": ["a"], "modalities": []}', "'modalities' is there twice"),
    ],
)
def test_a_presence_file_that_is_none(tmp_path: Path, name: str, text: str | None, said: str):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        training(tmp_path, presence_file=str(tmp_path / name))


def test_a_presence_file_with_a_byte_order_mark(tmp_path: Path):
    (tmp_path / "presence.json").write_text(json.dumps(ROWS), encoding="utf-8-sig")
    assert training(tmp_path, presence_file=str(tmp_path / "presence.json"))[0]["presence"] == [True, True, False]


SETTINGS = (
    Bad("a negative learning rate", lambda: check_numbers(0, learning_rate=-1.0), "learning_rate must be .* got -1.0"),
    Bad("a learning rate 1e-4 in YAML", lambda: check_numbers(0, rate="1e-4"), "rate is the text '1e-4'.*1.0e-4"),
    Bad("a number in words", lambda: check_numbers(1, whole=True, epochs="ten"), "epochs must be a whole .* got 'ten'"),
    Bad(
        "half an epoch", lambda: check_numbers(1, whole=True, epochs=0.5), "epochs must be a whole number of at least 1"
    ),
    Bad(
        "no epoch", lambda: check_numbers(1, whole=True, epochs=0), "epochs must be a whole number of at least 1, got 0"
    ),
    Bad("True for a number", lambda: check_numbers(0, seed=True), "seed must be a number of at least 0, got True"),
    Bad("NaN for a number", lambda: check_numbers(0, gamma=float("nan")), "gamma must be .* got nan"),
    Bad("an infinite number", lambda: check_numbers(0, gamma=float("inf")), "gamma must be .* got inf"),
    Bad("nothing for a number", lambda: check_numbers(0, gamma=None), "gamma must be .* got None"),
    Bad(
        "windows that overlap fully", lambda: check_numbers(0, below=1, overlap=1.0), "at least 0 and below 1, got 1.0"
    ),
    Bad("one number for a crop", lambda: check_numbers(1, length=3, roi_size=80), "roi_size must be a list of 3"),
    Bad("a crop in 2-D of 3-D", lambda: check_numbers(1, length=3, roi_size=[80, 80]), "roi_size must be a list of 3"),
    Bad("a spacing of 0", lambda: check_numbers(0.001, length=2, spacing=[1.0, 0.0]), "spacing must be .* 0.001"),
    Bad("a switch in words", lambda: check_switches(resume="false"), "resume must be True or False .* got 'false'"),
    Bad("a folder called by a number", lambda: check_paths(output_dir=2020), "output_dir must be a path, got 2020"),
    Bad("another device", lambda: check_device("gpu"), "device must be cpu, cuda, cuda:1 or the like, got 'gpu'"),
    Bad("flips along no axis", lambda: check_flips(flip_test=True, flip_axes=[]), "flip_axes must not be empty, got"),
    Bad("weights called by a number", lambda: checkpoint_paths(7), "ckpt_path must be a path or a list of .* got 7"),
    Bad("another objective", lambda: check_choices(["passion"], objective="pasion"), r"one of \['passion'\], got 'pas"),
    Bad(
        "a crop that is no multiple of the stride",
        lambda: RFNet(2, 2, 3, img_size=44),
        "multiples of 8, at least 16, got",
    ),
    Bad("a crop that is too small", lambda: RFNet(2, 2, 3, img_size=8), "multiples of 8, at least 16, got"),
    Bad("a class without name", lambda: check_classes((0, 1, 2), ("a", "b"), {}), "must have the same length"),
    Bad(
        "one number for the label values", lambda: check_classes(3, ("a",), {}), "label_values must be a list .* got 3"
    ),
    Bad("one number for the regions", lambda: check_classes((0, 1), ("a", "b"), 5), "regions must be names .* got 5"),
    Bad("a label value twice", lambda: check_classes((0, 1, 1), ("a", "b", "c"), {}), "label_values must be different"),
    Bad("a class name twice", lambda: check_classes((0, 1), ("a", "a"), {}), "class_names must be different"),
    Bad(
        "a label value in words",
        lambda: check_classes((0, "1"), ("a", "b"), {}),
        "label_values must be two or more whole",
    ),
    Bad("one class", lambda: check_classes((0,), ("a",), {}), "label_values must be two or more"),
    Bad(
        "a region of another class", lambda: check_classes((0, 1), ("a", "b"), {"r": [2]}), r"regions\['r'\] must hold"
    ),
    Bad("a region of nothing", lambda: check_classes((0, 1), ("a", "b"), {"r": []}), r"regions\['r'\] must hold"),
    Bad("a sequence twice", lambda: check_modalities(["a", "a"]), "modalities must be a list of different names"),
    Bad("no sequence", lambda: check_modalities([]), "modalities must be a list of different names, got"),
    Bad("one name for the sequences", lambda: check_modalities("flair"), "modalities must be a list .* got 'flair'"),
    Bad(
        "a sequence called label", lambda: check_modalities(["a", "label"]), "modalities must not have one of the names"
    ),
)


@table(*SETTINGS)
def test_a_bad_setting_is_named(bad: Bad):
    with pytest.raises(ValueError, match=bad.said):
        bad.do()


class Harmful:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def small(backbone: type = RFNet, modalities: int = 3, classes: int = 3, **more: Any) -> Any:
    return backbone(2, modalities, classes, **({"img_size": 32, "width": 4} | more))


def save(network: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(network().state_dict(), path)


TOKENS: dict[str, Any] = {"token_channels": 16, "num_heads": 2, "mlp_channels": 32}
WEIGHTS = (
    Bad(
        "weights of another backbone",
        save(lambda: small(MMFormer, **TOKENS)),
        "does not fit this RFNet: .* only in one",
    ),
    Bad(
        "weights of other sequences",
        save(lambda: small(modalities=2)),
        "does not fit this RFNet.*needs the backbone, mod",
    ),
    Bad("weights of other classes", save(lambda: small(classes=4)), r"have another shape \(.* is \(4, .* not \(4, "),
    Bad("weights of another width", save(lambda: small(width=8)), "have another shape"),
    Bad("no weights", lambda path: None, "There is no checkpoint .*model.pt; train first"),
    Bad("an empty file of weights", lambda path: path.touch(), "model.pt cannot be read as tensors: it is damaged"),
    Bad("text as weights", lambda path: path.write_text("weights"), "model.pt cannot be read as tensors"),
    Bad(
        "a truncated file", lambda path: (save(small)(path), edit(str(path), lambda text: text[:-500])), "it is damaged"
    ),
    Bad(
        "a list as weights", lambda path: torch.save([torch.ones(1)], path), "must hold named weights, but holds a list"
    ),
    Bad(
        "a pickle with code",
        lambda path: path.write_bytes(pickle.dumps({"a": Harmful(path.with_name("ran"))})),
        "run code",
    ),
    Bad(
        "a checkpoint with code", lambda path: torch.save({"a": Harmful(path.with_name("ran"))}, path), "could run code"
    ),
)


@table(*WEIGHTS)
def test_bad_weights_are_refused_and_change_nothing(tmp_path: Path, bad: Bad):
    path, network = tmp_path / "model.pt", small()
    bad.do(path)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises((ValueError, FileNotFoundError), match=bad.said):
        load_weights(network, path)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not (tmp_path / "ran").exists()


def save_safetensors(path: Path) -> None:
    save_file({name: value.contiguous() for name, value in small().state_dict().items()}, path)


def test_safetensors_are_read(tmp_path: Path):
    save_safetensors(tmp_path / "model.safetensors")
    network = small()
    load_weights(network, tmp_path / "model.safetensors")
    expected = read_state_dict(tmp_path / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: b"weights", lambda content: content[:-500]])
def test_damaged_safetensors_are_refused_and_change_nothing(tmp_path: Path, damage: Callable[[bytes], bytes]):
    path, network = tmp_path / "model.safetensors", small()
    save_safetensors(path)
    path.write_bytes(damage(path.read_bytes()))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read as tensors: it is damaged"):
        load_weights(network, path)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_missing_package_is_not_taken_for_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_safetensors(tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="safetensors"):
        load_weights(small(), tmp_path / "model.safetensors")


def test_the_documentation_counts_them():
    text = (Path(__file__).parents[1] / "docs" / "reliability.md").read_text(encoding="utf-8")
    tables = {
        "files of a case": FILES,
        "a datalist": DATALISTS,
        "a datalist that is not valid JSON": TEXTS,
        "a folder of cases": FOLDERS,
        "layouts and patterns": LAYOUTS,
        "an nnU-Net dataset to write": NNUNETS,
        "`--files`": FILES_OF_ONE_CASE,
        "missing rates": RATES,
        "a presence file": PRESENCES,
        "settings": SETTINGS,
        "weights": WEIGHTS,
    }
    assert [name for name, rows in tables.items() if f"| {name} | {len(rows)} | " not in text] == []
    assert f"| bad input, [listed below](#bad-input) | {sum(map(len, tables.values()))} | " in text


def test_weights_fit_the_crop_of_their_training(tmp_path: Path):
    save(lambda: small(MMFormer, **TOKENS))(tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"does not fit this MMFormer: .* have another shape .*roi_size"):
        load_weights(small(MMFormer, img_size=64, **TOKENS), tmp_path / "model.pt")


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_weights_may_be_part_of_a_checkpoint(tmp_path: Path, key: str | None):
    source, network = small(), small()
    torch.save(source.state_dict() if key is None else {key: source.state_dict(), "epoch": 3}, tmp_path / "model.pt")
    load_weights(network, tmp_path / "model.pt")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in network.state_dict().items())


def test_weights_of_another_backbone_are_no_start():
    state = read_state_dict(small(MMFormer, **TOKENS).state_dict())
    with pytest.raises(ValueError, match="another backbone, width or number of dimensions"):
        transfer_weights(
            small(width=8),
            state,
            modalities=MODALITIES,
            pretrained_modalities=MODALITIES,
            classes=CLASSES,
            pretrained_classes=CLASSES,
        )


@pytest.mark.parametrize("member", ["../outside", "/outside", "bundle/../../outside"])
def test_monai_unpacks_nothing_outside_the_folder(tmp_path: Path, member: str):
    """What `monai.bundle download` unpacks."""
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        archive.writestr(member, "content")
    with pytest.raises(ValueError, match="Unsafe path detected"):
        extractall(tmp_path / "bundle.zip", tmp_path / "in" / "here")
    assert not list(tmp_path.rglob("outside"))
