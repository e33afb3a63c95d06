"""The layouts that people have: which file is which modality of which case, and what is said of the others."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from passion_monai.datasets.brats import SPEC as BRATS
from passion_monai.datasets.datalist import read_datalist
from passion_monai.datasets.patterns import find_cases, main

BRAINS = {
    "bids": [
        "derivatives/prep/sub-1/ses-a/anat/sub-1_ses-a_FLAIR",
        "derivatives/prep/sub-1/ses-a/anat/sub-1_ses-a_ce-gadolinium_desc-preproc_T1w",
        "derivatives/prep/sub-1/ses-a/anat/sub-1_ses-a_desc-preproc_T1w",
        "derivatives/prep/sub-1/ses-a/anat/sub-1_ses-a_space-SRI24_T2w",
        "derivatives/manual/sub-1/ses-a/anat/sub-1_ses-a_label-tumor_mask",
    ],
    "ucsf_pdgm": [
        f"UCSF-PDGM-0429_FU003d_nifti/UCSF-PDGM-0429_FU003d_{name}"
        for name in ("FLAIR", "T1c", "T1", "T2", "tumor_segmentation")
    ],
    "upenn_gbm": [
        *(f"images_structural/UPENN-GBM-00002_11/UPENN-GBM-00002_11_{name}" for name in ("FLAIR", "T1GD", "T1", "T2")),
        "images_segm/UPENN-GBM-00002_11_segm",
    ],
}
IDS = {
    "bids": ("sub-1_ses-a", "sub-1"),
    "ucsf_pdgm": ("UCSF-PDGM-0429_FU003d", "UCSF-PDGM-0429"),
    "upenn_gbm": ("UPENN-GBM-00002_11", "UPENN-GBM-00002"),
}
# What lies beside them, and is none of them.
OTHERS = {
    "bids": "derivatives/prep/sub-1/ses-a/anat/sub-1_ses-a_desc-brain_mask",
    "ucsf_pdgm": "UCSF-PDGM-0429_FU003d_nifti/UCSF-PDGM-0429_FU003d_T1c_bias",
    "upenn_gbm": "images_DSC/UPENN-GBM-00002_11_DSC_ap-rCBV",
}


def write(path: Path, value: Any = 1, shape: Sequence[int] = (4, 4, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.zeros(shape, np.uint8)
    voxels[1:3] = value
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    return path


def describe(root: Path, **content: Any) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(content))


@pytest.mark.parametrize("layout", BRAINS)
def test_brains(tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture) -> None:
    files = [write(tmp_path / f"{name}.nii.gz") for name in BRAINS[layout]]
    write(tmp_path / f"{OTHERS[layout]}.nii.gz")
    spec, [case] = find_cases(tmp_path, layout)
    case_id, patient = IDS[layout]
    values = [0, 1] if layout == "bids" else list(BRATS.label_values)
    keys = ("flair", "t1ce", "t1", "t2", "label")
    assert case == {
        "case": case_id,
        "patient": patient,
        **{key: str(path) for key, path in zip(keys, files, strict=True)},
        "label_values": values,
    }
    assert spec.modalities == BRATS.modalities
    assert f"1 other image(s): {OTHERS[layout]}.nii.gz" in caplog.text


@pytest.mark.parametrize("layout", BRAINS)
def test_a_brain_without_label_or_session(tmp_path: Path, layout: str) -> None:
    case_id, patient = IDS[layout]
    name = BRAINS[layout][0]
    write(tmp_path / f"{name if layout == 'upenn_gbm' else name.replace(case_id, patient)}.nii.gz")
    _, [case] = find_cases(tmp_path, layout)
    assert case.keys() == {"case", "patient", "flair", "label_values"}
    assert case["patient"] == patient


def test_an_automatic_label_only_stands_in_for_one_by_hand(tmp_path: Path) -> None:
    for case in ("UPENN-GBM-00001_11", "UPENN-GBM-00002_11"):
        write(tmp_path / "images_structural" / case / f"{case}_T1.nii.gz")
        write(tmp_path / "automated_segm" / f"{case}_automated_approx_segm.nii.gz")
    write(tmp_path / "images_segm" / "UPENN-GBM-00002_11_segm.nii.gz")
    _, cases = find_cases(tmp_path, "upenn_gbm")
    assert [Path(case["label"]).parent.name for case in cases] == ["automated_segm", "images_segm"]


LABELS = {"background": 0, "edema": 2, "core": 1}


class TestNnunet:
    def root(self, tmp_path: Path, **changed: Any) -> Path:
        description = {"channel_names": {"0": "T2 w", "1": "ADC"}, "labels": LABELS, "file_ending": ".nii.gz"}
        describe(tmp_path, **(description | changed))
        for name in ("imagesTr/x_0000", "imagesTr/x_0001", "labelsTr/x", "imagesTr/y_1_0001", "labelsTr/y_1"):
            write(tmp_path / f"{name}.nii.gz")
        write(tmp_path / "imagesTs" / "z_0000.nii.gz")
        return tmp_path

    def test_cases(self, tmp_path: Path) -> None:
        spec, cases = find_cases(self.root(tmp_path), "nnunet")
        assert [(case["case"], sorted(case.keys() & {"T2 w", "ADC", "label"})) for case in cases] == [
            ("x", ["ADC", "T2 w", "label"]),
            ("y_1", ["ADC", "label"]),
            ("z", ["T2 w"]),
        ]
        assert (spec.modalities, spec.label_values) == (("T2 w", "ADC"), (0, 1, 2))
        assert spec.class_names == ("background", "core", "edema")
        assert spec.regions == {"edema": (2,), "core": (1,)}

    def test_regions(self, tmp_path: Path) -> None:
        labels = {"background": 0, "whole": [1, 2, 4], "core": [2, 4], "enhancing": 4}
        spec, _ = find_cases(self.root(tmp_path, labels=labels), "nnunet")
        assert spec.label_values == (0, 1, 2, 4)
        assert spec.class_names == ("background", "label 1", "label 2", "enhancing")
        assert spec.regions == {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}

    def test_the_first_version(self, tmp_path: Path) -> None:
        root = self.root(tmp_path, labels={"0": "background", "1": "core"}, channel_names=None)
        describe(root, modality={"0": "T2 w", "1": "ADC"}, labels={"0": "background", "1": "core"})
        spec, cases = find_cases(root, "nnunet")
        assert (len(cases), spec.class_names) == (3, ("background", "core"))

    def test_a_channel_that_is_not_described(self, tmp_path: Path) -> None:
        root = self.root(tmp_path)
        for path in root.glob("imagesT?/*_0000.nii.gz"):
            path.rename(path.with_name(path.name.replace("_0000", "_0002")))
        with pytest.raises(ValueError, match=r"No case .* has T2 w, but there are 1 other image\(s\): imagesTr/x_0002"):
            find_cases(root, "nnunet")


class TestDecathlon:
    def root(self, tmp_path: Path, *modalities: str) -> Path:
        describe(
            tmp_path,
            modality=dict(enumerate(modalities)),
            labels={"0": "background", "1": "core"},
            tensorImageSize="4D",
        )
        shape = (4, 4, 4, len(modalities)) if len(modalities) > 1 else (4, 4, 4)
        for name in ("imagesTr/x", "imagesTs/y", "imagesTr/._x"):
            write(tmp_path / f"{name}.nii.gz", shape=shape)
        write(tmp_path / "labelsTr" / "x.nii.gz")
        return tmp_path

    def test_volumes_of_a_file(self, tmp_path: Path) -> None:
        spec, [x, y] = find_cases(self.root(tmp_path, "FLAIR", "T1w"), "decathlon")
        assert spec.modalities == ("FLAIR", "T1w")
        assert (x["FLAIR"], x["T1w"]) == tuple(f"{tmp_path}/imagesTr/x.nii.gz[{index}]" for index in (0, 1))
        assert "label" not in y

    def test_one_modality(self, tmp_path: Path) -> None:
        _, [x, _] = find_cases(self.root(tmp_path, "MRI"), "decathlon")
        assert x["MRI"] == str(tmp_path / "imagesTr" / "x.nii.gz")


class TestPatterns:
    def find(self, root: Path, *names: str, **patterns: Any) -> dict[str, dict[str, Any]]:
        for name in names:
            write(root / name)
        return {case["case"]: case for case in find_cases(root, **patterns)[1]}

    @pytest.mark.parametrize(
        ("name", "pattern"),
        [
            ("jo_FLAIR.nii.gz", "*_FLAIR.nii.gz"),
            ("deep/er/jo_FLAIR.nii", "./*_FLAIR.nii.gz"),
            ("jo/flair.nii.gz", "*/flair.nii.gz"),
            ("flair/jo.nii.gz", "flair/*.nii.gz"),
            ("day1/jo/scan_flair.nii.gz", "day*/{case}/*_flair.nii.gz"),
            ("a+b_jo.nii.gz", "a+b_*"),
        ],
    )
    def test_the_id_is_what_the_star_stands_for(self, tmp_path: Path, name: str, pattern: str) -> None:
        assert self.find(tmp_path, name, modalities={"flair": pattern})["jo"]["flair"] == str(tmp_path / name)

    def test_the_pattern_that_says_more_holds(self, tmp_path: Path) -> None:
        patterns = {"t1": "*T1.nii.gz", "t1ce": "*_ceT1.nii.gz"}
        cases = self.find(tmp_path, "jo_ceT1.nii.gz", "joT1.nii.gz", modalities=patterns)
        assert cases["jo"].keys() >= {"t1", "t1ce"}

    def test_modalities_and_labels_may_lie_apart(self, tmp_path: Path) -> None:
        names = ("t1/jo.nii.gz", "t2/jo.nii.gz", "seg/jo.nii.gz")
        cases = self.find(tmp_path, *names, modalities={"t1": "t1/*", "t2": "t2/*"}, label="seg/*")
        assert cases["jo"].keys() >= {"t1", "t2", "label"}

    def test_a_layout_may_be_changed(self, tmp_path: Path) -> None:
        names = (
            "sub-1/anat/sub-1_acq-a_T1w.nii.gz",
            "sub-1/anat/sub-1_acq-b_T1w.nii.gz",
            "sub-1/anat/sub-1_PDw.nii.gz",
        )
        others = ("t1ce", "t2", "flair")
        with pytest.raises(ValueError, match=r"has flair, t1ce, t2, but there are 1 .*PDw.*--without"):
            self.find(tmp_path, *names, layout="bids")
        with pytest.raises(ValueError, match="has two files for t1"):
            self.find(tmp_path, layout="bids", without=others)
        patterns = {"t1": "{case}_acq-b_T1w", "pd": "{case}*_PDw"}
        case = self.find(tmp_path, layout="bids", modalities=patterns, without=others)["sub-1"]
        assert (case["t1"], case["pd"]) == (str(tmp_path / names[1]), str(tmp_path / names[2]))

    def test_patients(self, tmp_path: Path) -> None:
        cases = self.find(tmp_path, "jo_1.nii", "jo_2.nii", "al.nii", modalities={"t1": "*"}, patient="{patient}_*")
        assert [case["patient"] for case in cases.values()] == ["al", "jo", "jo"]

    def test_classes_are_what_the_labels_hold(self, tmp_path: Path) -> None:
        write(tmp_path / "al_seg.nii.gz", 7)
        write(tmp_path / "jo_seg.nii.gz", 3)
        cases = self.find(tmp_path, "al_a.nii", "jo_a.nii", modalities={"a": "*_a"}, label="*_seg")
        assert all(case["label_values"] == [0, 3, 7] for case in cases.values())

    def test_classes_may_be_named(self, tmp_path: Path) -> None:
        write(tmp_path / "jo_a.nii")
        spec, _ = find_cases(tmp_path, modalities={"a": "*_a"}, classes={"core": 4, "edema": 2})
        assert (spec.label_values, spec.class_names) == ((0, 2, 4), ("background", "edema", "core"))


class TestCommand:
    def run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[list[str], str]:
        """The words of the command that is printed last, and all that is printed."""
        main(["--root", str(tmp_path / "data"), "--output", str(tmp_path / "my list.json"), *options])
        printed = capsys.readouterr().out
        return shlex.split(printed[printed.rindex("python -m monai") :].replace("\\\n", "")), printed

    def test_says_how_to_train(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for number in range(5):
            write(tmp_path / "data" / f"{number}_a.nii.gz")
            write(tmp_path / "data" / f"{number}_seg.nii.gz", 3)
        patterns = ["--modality", "it's=*_a.nii.gz", "--modality", "none=*_b.nii.gz", "--label", "*_seg.nii.gz"]
        words, printed = self.run(tmp_path, capsys, *patterns)
        assert "Found 5 cases of 5 patients\n  with it's: 5\n  with none: 0\n  with label: 5\n" in printed
        assert words[:5] == ["python", "-m", "monai.bundle", "run", "training"]
        given = dict(zip(words[5::2], words[6::2], strict=True))
        assert given == {
            "--config_file": "bundles/brats_mmformer_passion/configs/train.yaml",
            "--datalist": str(tmp_path / "my list.json"),
            "--output_dir": "runs/my list",
            "--simulate_missing": "False",
            "--modalities": '["it\'s"]',
            "--label_values": "[0, 3]",
            "--class_names": "['background', 'label 3']",
            "--regions": "{'label 3': [1]}",
        }
        assert len(read_datalist(tmp_path / "my list.json", "test", modalities=["it's"])) == 1

    def test_hides_nothing_of_complete_cases(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Unlike for BraTS, where that is the paper's experiment."""
        for name in BRAINS["ucsf_pdgm"]:
            write(tmp_path / "data" / f"{name}.nii.gz")
        words, _ = self.run(tmp_path, capsys, "--layout", "ucsf_pdgm")
        assert words[-2:] == ["--simulate_missing", "False"]

    def test_says_how_to_segment_what_has_no_label(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write(tmp_path / "data" / "UPENN-GBM-00001_11_T1.nii.gz")
        words, _ = self.run(tmp_path, capsys, "--layout", "upenn_gbm")
        assert words[5] == "bundles/brats_mmformer_passion/configs/inference.yaml"
        assert words[7] == str(tmp_path / "my list.json")

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ([], "Give --layout"),
            (["--modality", "flair"], "expected NAME=..., got 'flair'"),
            (["--layout", "nnunet"], "dataset.json does not exist"),
        ],
    )
    def test_errors(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
        with pytest.raises(SystemExit):
            self.run(tmp_path, capsys, *options)
        assert said in capsys.readouterr().err
