"""MyoPS, the myocardial pathology segmentation challenge: three aligned cardiac MR sequences in short-axis slices.

Two namings are known:

- MyoPS 2020: ``myops_training_101_{C0,DE,T2,gd}``, where the labels (``gd``) may lie in a folder of their own;
- ``CaseNNNN_{C0,LGE,T2,gd}``.

C0 is balanced steady-state free precession (bSSFP), DE and LGE are late gadolinium enhancement. The files are volumes
of a few slices, along their last axis; networks see the slices.

References:
    X. Zhuang, "Multivariate mixture model for myocardial segmentation combining multi-source images", IEEE TPAMI
    41(12), 2019.
    L. Li et al., "MyoPS: A benchmark of myocardial pathology segmentation combining three-sequence cardiac magnetic
    resonance images", Medical Image Analysis 87, 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from passion_monai.datasets import DatasetSpec
from passion_monai.datasets.command import datalist_command, datalist_parser
from passion_monai.datasets.discovery import Naming, discover_cases

__all__ = ["SPEC", "discover", "main"]

SPEC = DatasetSpec(
    name="myops",
    spatial_dims=2,
    modalities=("bssfp", "lge", "t2"),
    label_values=(0, 500, 600, 200, 1220, 2221),
    class_names=(
        "background",
        "left ventricular blood pool",
        "right ventricular blood pool",
        "normal myocardium",
        "edema",
        "scar",
    ),
    # The paper scores the first three, its MYO being the left ventricle's myocardium with all that is in it.
    regions={"LVB": (1,), "RVB": (2,), "MYO": (3, 4, 5), "edema": (4,), "scar": (5,)},
    reference_split=(20, 0, 5),
)

_KEYS = {
    "{case}_C0": "bssfp",
    "{case}_DE": "lge",
    "{case}_LGE": "lge",
    "{case}_T2": "t2",
    "{case}_gd": "label",
}
_NAMINGS = (Naming(_KEYS, SPEC.label_values),)

_DESCRIPTION = """\
Find the cases of a MyoPS data set and write a datalist: a JSON file that says which case has which
files and whether it is for training, validation or test.

The folder can be given as it was unpacked: the labels may lie in a folder of their own, and every
case may miss any of its sequences. The paper's split has no validation cases; give --sizes to have
some. Cases without a label go into the section "inference".
"""

_EPILOG = """\
examples:
  the paper's proportions, drawn with seed 0:
    python -m passion_monai.datasets.myops --root /data/MyoPS2020 --output myops2020.json
  16 training, 4 validation and 5 test cases:
    python -m passion_monai.datasets.myops --root /data/MyoPS2020 --output myops2020.json --sizes 16 4 5

sequences and file names:
  bssfp  <case>_C0.nii.gz
  lge    <case>_DE.nii.gz or <case>_LGE.nii.gz
  t2     <case>_T2.nii.gz
  label  <case>_gd.nii.gz
"""


def discover(root: str | Path, *, keep_faulty: bool = False) -> list[dict[str, Any]]:
    """Find all cases below a folder; see :func:`passion_monai.datasets.discovery.discover_cases`."""
    return discover_cases(
        root, _NAMINGS, title="MyoPS", modalities=SPEC.modalities, labels_apart=True, keep_faulty=keep_faulty
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Write a datalist from the command line; see ``python -m passion_monai.datasets.myops --help``."""
    parser = datalist_parser(SPEC.name, sizes=SPEC.reference_split, description=_DESCRIPTION, epilog=_EPILOG)
    datalist_command(parser, argv, find=lambda arguments: (SPEC, discover(arguments.root)))


if __name__ == "__main__":
    main()
