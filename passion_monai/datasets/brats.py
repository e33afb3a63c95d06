"""BraTS, the brain tumour segmentation challenge: four MR sequences and tumour labels of each case.

Two namings are known:

- 2018-2021: ``<case>_{flair,t1ce,t1,t2,seg}``, where enhancing tumour has the value 4;
- 2023 and later: ``<case>-{t2f,t1c,t1n,t2w,seg}``, where it has the value 3 and the last number of the id is a time
  point.

The resection cavity of the post-treatment cases of 2024 (value 4 there) is not among the classes here.

References:
    B. H. Menze et al., "The Multimodal Brain Tumor Image Segmentation Benchmark (BRATS)", IEEE TMI 34(10), 2015.
    U. Baid et al., "The RSNA-ASNR-MICCAI BraTS 2021 Benchmark", arXiv:2107.02314.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from passion_monai.datasets import DatasetSpec
from passion_monai.datasets.command import datalist_command, datalist_parser
from passion_monai.datasets.discovery import Naming, discover_cases

__all__ = ["SPEC", "discover", "main"]

SPEC = DatasetSpec(
    name="brats",
    spatial_dims=3,
    modalities=("flair", "t1ce", "t1", "t2"),
    label_values=(0, 1, 2, 4),
    class_names=("background", "necrotic and non-enhancing tumour core", "edema", "enhancing tumour"),
    regions={"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)},
    reference_split=(219, 50, 100),
    csv_modalities=("flair", "t1ce", "t1", "t2"),
    # High and low grade, in the names that the authors gave to the cases of 2020.
    csv_prefixes=("HG_", "LG_"),
    # DICOM PS3.16, context group 7168, types of brain lesions.
    dicom_codes={
        "necrotic and non-enhancing tumour core": ("6574001", "SCT", "Necrosis"),
        "non-enhancing core": ("C81175", "NCIt", "Non-Enhancing Lesion"),  # as classes of 2024 are called in the README
        "edema": ("79654002", "SCT", "Edema"),
        "enhancing tumour": ("C113842", "NCIt", "Enhancing Lesion"),
    },
)


_NAMINGS = (
    Naming(
        {"{case}_flair": "flair", "{case}_t1ce": "t1ce", "{case}_t1": "t1", "{case}_t2": "t2", "{case}_seg": "label"},
        SPEC.label_values,
    ),
    Naming(
        {"{case}-t2f": "flair", "{case}-t1c": "t1ce", "{case}-t1n": "t1", "{case}-t2w": "t2", "{case}-seg": "label"},
        (0, 1, 2, 3),
    ),
)
_TIME_POINT = re.compile(r"(?P<patient>.+-\d+)-\d+")
# Kaggle's copy of 2020 has one label under the name that the hospital gave it.
_MISNAMED = {"W39_1998.09.19_Segm": "BraTS20_Training_355_seg"}

_DESCRIPTION = """\
Find the cases of a BraTS data set and write a datalist: a JSON file that says which case has which
files and whether it is for training, validation or test.

Any release since 2018 can be given as it was unpacked: case folders may lie directly in the root or
deeper (HGG/, LGG/), files may be .nii or .nii.gz, and every case may miss any of its sequences. All
cases of a patient go into the same part. Cases without a label go into the section "inference".
"""

_EPILOG = """\
examples:
  the paper's proportions, drawn with seed 0:
    python -m passion_monai.datasets.brats --root /data/BraTS2020 --output brats2020.json
  80 % training, 20 % validation, no test set:
    python -m passion_monai.datasets.brats --root /data/BraTS2020 --output brats2020.json --sizes 80 20 0
  a published split:
    python -m passion_monai.datasets.brats --root /data/BraTS2020 --output brats2020.json \\
        --training-ids train.txt --validation-ids val.txt --test-ids test.txt

sequences and file names:
  flair  <case>_flair.nii.gz (2018-2021)  <case>-t2f.nii.gz (2023 and later)
  t1ce   <case>_t1ce.nii.gz               <case>-t1c.nii.gz
  t1     <case>_t1.nii.gz                 <case>-t1n.nii.gz
  t2     <case>_t2.nii.gz                 <case>-t2w.nii.gz
  label  <case>_seg.nii.gz                <case>-seg.nii.gz
"""


def discover(root: str | Path, *, keep_faulty: bool = False) -> list[dict[str, Any]]:
    """Find all cases below a folder; see :func:`passion_monai.datasets.discovery.discover_cases`."""
    return discover_cases(
        root,
        _NAMINGS,
        title="BraTS",
        modalities=SPEC.modalities,
        patient=_patient,
        rename=lambda stem: _MISNAMED.get(stem, stem),
        keep_faulty=keep_faulty,
    )


def _patient(case: str) -> str:
    time_point = _TIME_POINT.fullmatch(case)
    return time_point["patient"] if time_point else case


def main(argv: Sequence[str] | None = None) -> None:
    """Write a datalist from the command line; see ``python -m passion_monai.datasets.brats --help``."""
    parser = datalist_parser(SPEC.name, sizes=SPEC.reference_split, description=_DESCRIPTION, epilog=_EPILOG)
    datalist_command(parser, argv, find=lambda arguments: (SPEC, discover(arguments.root)))


if __name__ == "__main__":
    main()
