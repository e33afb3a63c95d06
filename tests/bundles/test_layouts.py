"""The commands of docs/layouts.md as they stand there, on a phantom cohort that is rearranged into each layout."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai_command import printed, run_command

from passion_monai.datasets import nnunet, patterns
from passion_monai.datasets.brats import discover
from passion_monai.datasets.phantom import write_phantom

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
SEQUENCES = ("flair", "t1", "t1ce", "t2")
Case = dict[str, Any]


def commands(heading: str) -> list[list[str]]:
    """The commands below a heading of the page, word by word, with the array that stands before them filled in."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    block = "\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL)).replace("\\\n", " ")
    array = re.search(r"^ids=\((.*?)\)$", block, re.DOTALL | re.MULTILINE)
    if array is not None:
        block = block.replace(array[0], "").replace('"${ids[@]}"', " ".join(array[1].split("\n")))
    return [shlex.split(line) for line in block.splitlines() if line]


def place(source: str, path: Path, change: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
    """A copy of an image, perhaps with other voxels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.load(source)
    voxels = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(voxels if change is None else change(voxels), image.affine), path)


def as_classes(label: np.ndarray) -> np.ndarray:
    return np.select([label == value for value in (1, 2, 4)], (1, 2, 3)).astype(np.uint8)


def parts(case: Case) -> str:
    return "Tr" if "label" in case else "Ts"


def to_nnunet(cases: list[Case], root: Path) -> None:
    for case in cases:
        for index, name in enumerate(SEQUENCES):
            if name in case:
                place(case[name], root / f"images{parts(case)}" / f"{case['case']}_{index:04d}.nii.gz")
        if "label" in case:
            place(case["label"], root / "labelsTr" / f"{case['case']}.nii.gz", as_classes)
    channels = {"0": "FLAIR", "1": "T1w", "2": "T1c", "3": "T2w"}
    labels = {"background": 0, "core": 1, "edema": 2, "enhancing": 3}
    describe(root, channel_names=channels, labels=labels, file_ending=".nii.gz")


def to_decathlon(cases: list[Case], root: Path) -> None:
    for case in cases:
        volumes = [np.asarray(nib.load(case.get(name, case["flair"])).dataobj) for name in SEQUENCES]
        place(
            case["flair"],
            root / f"images{parts(case)}" / f"{case['case']}.nii.gz",
            functools.partial(lambda volumes, _: np.stack(volumes, axis=-1), volumes),
        )
        if "label" in case:
            place(case["label"], root / "labelsTr" / f"{case['case']}.nii.gz", as_classes)
    labels = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}
    describe(root, modality={"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}, labels=labels, tensorImageSize="4D")


def describe(root: Path, **content: Any) -> None:
    (root / "dataset.json").write_text(json.dumps(content))


def to_bids(cases: list[Case], root: Path) -> None:
    names = {"flair": "FLAIR", "t1": "T1w", "t1ce": "ce-gadolinium_T1w", "t2": "T2w"}
    for number, case in enumerate(cases):
        session = f"sub-{number:02d}_ses-pre"
        for name, suffix in names.items():
            if name in case:
                place(case[name], root / "prep" / session.replace("_", "/") / "anat" / f"{session}_{suffix}.nii.gz")
        if "label" in case:
            folder = root / "manual" / session.replace("_", "/") / "anat"
            place(case["label"], folder / f"{session}_dseg.nii.gz", lambda label: (label > 0).astype(np.uint8))


def by_names(case_name: str, folder: str, label: str, names: dict[str, str]) -> Callable[[list[Case], Path], None]:
    """Rearranges into a layout in which the id stands before the sequence.

    Args:
        case_name: with the place of the case's number.
        folder: of the images, with the place of the case's id.
        label: with the place of the case's id.
        names: of the sequences.
    """

    def rearrange(cases: list[Case], root: Path) -> None:
        for number, case in enumerate(cases):
            name = case_name.format(number)
            for key, suffix in names.items():
                if key in case:
                    place(case[key], root / folder.format(name) / f"{name}_{suffix}.nii.gz")
            if "label" in case:
                place(case["label"], root / label.format(name))

    return rearrange


UCSF_PDGM = {"flair": "FLAIR", "t1": "T1", "t1ce": "T1c", "t2": "T2"}
UPENN_GBM = {"flair": "FLAIR", "t1": "T1", "t1ce": "T1GD", "t2": "T2"}
LAYOUTS = {
    "nnU-Net": to_nnunet,
    "Medical Segmentation Decathlon": to_decathlon,
    "BIDS": to_bids,
    "UCSF-PDGM": by_names("UCSF-PDGM-{:04d}", "{0}_nifti", "{0}_nifti/{0}_tumor_segmentation.nii.gz", UCSF_PDGM),
    "UPENN-GBM": by_names("UPENN-GBM-{:05d}_11", "images_structural/{0}", "images_segm/{0}_segm.nii.gz", UPENN_GBM),
    "Any other": by_names("P{:02d}", "{0}", "{0}/{0}_seg.nii.gz", {"flair": "FLAIR", "t1": "T1"}),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Eight cases: one lacks T1c, one T2, and the last one its label."""
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom("brats", folder, num_cases=8, shape=(32, 32, 32), spacing=(6.0, 6.0, 6.0))
    found = discover(folder)
    del found[0]["t1ce"], found[1]["t2"], found[7]["label"]
    return found


@pytest.fixture(scope="module", params=LAYOUTS)
def workplace(
    request: pytest.FixtureRequest, cases: list[Case], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A layout, and a folder with a cohort in it, in which the page's commands find the bundles."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "bundles").symlink_to(ROOT / "bundles")
    data = commands(request.param)[0]
    LAYOUTS[request.param](cases, folder / Path(data[data.index("--root") + 1]).relative_to("/"))
    return request.param, folder


def run(words: list[str], folder: Path, bundle: Any) -> str:
    """What a command of the page prints, with a small network in a few steps."""
    small = {name: value for name, value in bundle.small.items() if name != "phantom"}
    if "training" in words:
        small |= {"epochs": 1}
    options = [text for name, value in small.items() for text in (f"--{name}", str(value))]
    return printed(run_command([*words[3:], *options], folder))


def here(words: list[str], folder: Path) -> list[str]:
    return [word.replace("/data/", f"{folder}/data/") for word in words]


def write_list(heading: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's first command."""
    monkeypatch.chdir(folder)
    words = here(commands(heading)[0], folder)
    assert words[:3] == ["python", "-m", "passion_monai.datasets.patterns"]
    patterns.main(words[3:])


def test_the_datalist_can_be_checked(
    workplace: tuple[str, Path], one_bundle: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    heading, folder = workplace
    write_list(heading, folder, monkeypatch)
    said = capsys.readouterr().out
    assert "Found 8 cases of 8 patients" in said
    assert "with label: 7\nSplit into training 5, validation 1, test 1, inference 1" in said
    check, training = commands(heading)[1:3]
    assert "voxels" in run(check, folder, one_bundle)
    # What is printed is what stands on the page, but for blanks.
    shown = shlex.split(said[said.rindex("python -m monai") :].replace("\\\n", ""))
    assert sorted(word.replace(" ", "") for word in shown) == sorted(word.replace(" ", "") for word in training)


def go_through(heading: str, folder: Path, bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a section's commands."""
    write_list(heading, folder, monkeypatch)
    _, _, training, evaluation, inference = commands(heading)
    for words in (training, evaluation, inference):
        run(words, folder, bundle)
    name = training[training.index("--output_dir") + 1]
    assert (folder / name / "models" / "model.pt").is_file()
    assert (folder / name / "evaluation" / "scores.csv").is_file()
    [segmentation] = (folder / "results" / "predictions").glob("*_seg.nii.gz")
    assert nib.load(segmentation).shape == (32, 32, 32)


@pytest.mark.parametrize("workplace", ["Medical Segmentation Decathlon"], indirect=True)
def test_train_evaluate_infer(workplace: tuple[str, Path], one_bundle: Any, monkeypatch: pytest.MonkeyPatch):
    go_through(*workplace, one_bundle, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "workplace", [name for name in LAYOUTS if name != "Medical Segmentation Decathlon"], indirect=True
)
def test_train_evaluate_infer_with_the_others(
    workplace: tuple[str, Path], one_bundle: Any, monkeypatch: pytest.MonkeyPatch
):
    go_through(*workplace, one_bundle, monkeypatch)


@pytest.mark.parametrize("workplace", ["Any other"], indirect=True)
def test_to_nnunet_and_back(workplace: tuple[str, Path], monkeypatch: pytest.MonkeyPatch):
    heading, folder = workplace
    write_list(heading, folder, monkeypatch)
    [words] = commands("To nnU-Net, for a comparison")
    words = here(words, folder)
    nnunet.main(words[3:])
    spec, found = patterns.find_cases(Path(words[words.index("--output") + 1]), "nnunet")
    assert spec.class_names == ("background", "core", "edema", "enhancing")
    assert all({"flair", "t1"} <= case.keys() for case in found)
    assert sum("label" in case for case in found) == 7
