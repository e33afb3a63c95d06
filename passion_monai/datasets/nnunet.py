"""A datalist's cases in nnU-Net's raw format, so that it can be trained on the very same ones.

    python -m passion_monai.datasets.nnunet --datalist ours.json --output nnUNet_raw/Dataset001_Ours --fill-missing

Training and validation cases go to imagesTr and labelsTr, which nnU-Net splits by itself; test cases to imagesTs and
labelsTs, and those without a label to imagesTs. Images are NIfTI whatever they were; labels have the classes 0, 1,
2 and so on in place of the values in the files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from monai.transforms import Compose
from tqdm import tqdm

from passion_monai.datasets import DATASETS, get_spec
from passion_monai.datasets.datalist import UNLABELLED_SECTION, read_datalist, read_json
from passion_monai.faults import FAULT_KEY, Fault, TolerantDataset, raise_faults
from passion_monai.files import complete_file
from passion_monai.transforms import AlignModalitiesd, LabelsToClassesd, LoadCased, MaskModalitiesd

__all__ = ["write_nnunet"]

Case = dict[str, Any]
_PARTS = {"training": "Tr", "validation": "Tr", "test": "Ts", UNLABELLED_SECTION: "Ts"}
_ENDING = ".nii.gz"


def write_nnunet(
    datalist: str | Path,
    output_dir: str | Path,
    *,
    root: str | Path | None = None,
    fill_missing: bool = False,
    on_grid_mismatch: str = "raise",
) -> int:
    """Write cases as a dataset of nnU-Net; ``dataset.json`` is written last, so where it is the dataset is complete.

    Args:
        datalist: path of the datalist.
        output_dir: folder of the dataset, ``nnUNet_raw/DatasetXXX_Name``; it is made.
        root: folder that the datalist's paths are relative to, where it is no longer the one in the file.
        fill_missing: write zeros in place of what a case lacks, instead of no file.
        on_grid_mismatch: "raise" an error where the modalities of a case lie on several grids, or "resample".

    Returns:
        The number of cases.

    Raises:
        FileNotFoundError: when the datalist does not exist, or no case of a section has all of its files.
        ValueError: when there is a dataset already, the classes are not known, or something is wrong with cases, which
            are all named.
    """
    output_dir, content = Path(output_dir), read_json(datalist)
    if (output_dir / "dataset.json").exists():
        raise ValueError(f"{output_dir} holds a dataset already; give another folder, or remove it.")
    sections = [name for name in _PARTS if content.get(name)]
    modalities = content.get("modalities", [])
    cases = {name: read_datalist(datalist, name, modalities=modalities, root=root) for name in sections}
    values, names = _known_classes(content, [case for members in cases.values() for case in members], datalist)
    transform = Compose(
        [
            MaskModalitiesd(modalities),
            LoadCased(modalities),
            AlignModalitiesd(modalities, label_key="label", on_mismatch=on_grid_mismatch),
            LabelsToClassesd("label", values=values),
        ]
    )
    faults = []
    for section, members in cases.items():
        for case in tqdm(TolerantDataset(members, transform), desc=section, unit="case"):
            if FAULT_KEY in case:
                faults.append(Fault(case["case"], case["file"], case[FAULT_KEY]))
            else:
                _write_case(case, output_dir, _PARTS[section], modalities, fill_missing=fill_missing)
    raise_faults(faults, outcome="Mend or remove these; there is no dataset.json yet.")
    training = sum(len(members) for section, members in cases.items() if _PARTS[section] == "Tr")
    _write_description(output_dir, modalities, names, training)
    return sum(map(len, cases.values()))


def _known_classes(
    content: Mapping[str, Any], cases: Sequence[Case], datalist: str | Path
) -> tuple[Sequence[int], Sequence[str]]:
    """Value and name of each class."""
    spec = get_spec(content["dataset"]) if content.get("dataset") in DATASETS else None
    values = next((case["label_values"] for case in cases if case.get("label_values")), spec and spec.label_values)
    names = content.get("class_names", spec and spec.class_names)
    if not values or not names or len(values) != len(names):
        raise ValueError(
            f"{datalist} must have class_names, and cases with as many label_values, got {names} and {values}; "
            "python -m passion_monai.datasets.patterns writes both."
        )
    return values, names


def _write_case(case: Case, output_dir: Path, part: str, modalities: Sequence[str], *, fill_missing: bool) -> None:
    first = next(case[name] for name in modalities if name in case)
    for index, name in enumerate(modalities):
        if name in case or fill_missing:
            image = case[name][0].numpy() if name in case else np.zeros(first.shape[1:], np.uint8)
            _write_image(image, first, output_dir / f"images{part}" / f"{case['case']}_{index:04d}{_ENDING}")
    if "label" in case:
        label = case["label"][0].numpy().astype(np.uint8)
        _write_image(label, case["label"], output_dir / f"labels{part}" / f"{case['case']}{_ENDING}")


def _write_image(voxels: np.ndarray, grid: MetaTensor, path: Path) -> None:
    image = nib.Nifti1Image(voxels, grid.affine.numpy())
    image.header.set_xyzt_units("mm")
    with complete_file(path) as unfinished:
        nib.save(image, unfinished)


def _write_description(output_dir: Path, modalities: Sequence[str], names: Sequence[str], training: int) -> None:
    content = {
        "channel_names": {str(index): name for index, name in enumerate(modalities)},
        "labels": {name: index for index, name in enumerate(names)},
        "numTraining": training,
        "file_ending": _ENDING,
    }
    with complete_file(output_dir / "dataset.json") as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Write a dataset of nnU-Net from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m passion_monai.datasets.nnunet", description="Write a datalist's cases in nnU-Net's raw format."
    )
    parser.add_argument("--datalist", type=Path, required=True, help="JSON file")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, nnUNet_raw/DatasetXXX_Name")
    parser.add_argument("--root", type=Path, help="where the data lie, if no longer where the datalist says")
    parser.add_argument(
        "--fill-missing",
        action="store_true",
        help="write zeros for what a case lacks, instead of no file; nnU-Net refuses cases that lack channels",
    )
    parser.add_argument(
        "--on-grid-mismatch",
        choices=["raise", "resample"],
        default="raise",
        help="what to do where the modalities of a case lie on several grids (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    options = {"fill_missing": arguments.fill_missing, "on_grid_mismatch": arguments.on_grid_mismatch}
    try:
        count = write_nnunet(arguments.datalist, arguments.output, root=arguments.root, **options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{count} cases in {arguments.output}")


if __name__ == "__main__":
    main()
