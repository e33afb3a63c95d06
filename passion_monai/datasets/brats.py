"""BraTS, the brain tumour segmentation challenge: four MR sequences and tumour labels of each case.

Two namings are known, and files of both end in ``.nii`` or ``.nii.gz``:

- 2018-2021: ``<case>_{flair,t1ce,t1,t2,seg}``, where enhancing tumour has the value 4;
- 2023 and later: ``<case>-{t2f,t1c,t1n,t2w,seg}``, where it has the value 3 and the last number of the id is a time
  point.

The resection cavity of the post-treatment cases of 2024 (value 4 there) is not among the classes here.

References:
    B. H. Menze et al., "The Multimodal Brain Tumor Image Segmentation Benchmark (BRATS)", IEEE TMI 34(10), 2015.
    U. Baid et al., "The RSNA-ASNR-MICCAI BraTS 2021 Benchmark", arXiv:2107.02314.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passion_monai.datasets import DatasetSpec
from passion_monai.datasets.datalist import datalist_command

__all__ = ["SPEC", "discover", "main"]

logger = logging.getLogger(__name__)

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
)


@dataclass(frozen=True)
class _Naming:
    """How the files of some years are called: ``<case><separator><suffix>.nii[.gz]``."""

    keys: Mapping[str, str]
    label_values: tuple[int, ...]


_NAMINGS = {
    "_": _Naming({"flair": "flair", "t1ce": "t1ce", "t1": "t1", "t2": "t2", "seg": "label"}, SPEC.label_values),
    "-": _Naming({"t2f": "flair", "t1c": "t1ce", "t1n": "t1", "t2w": "t2", "seg": "label"}, (0, 1, 2, 3)),
}
_FILE_NAME = re.compile(r"(?P<case>.+)(?P<separator>[_-])(?P<suffix>[a-z0-9]+)\.nii(\.gz)?")
_TIME_POINT = re.compile(r"(?P<patient>.+-\d+)-\d+")
# Kaggle's copy of 2020 has one label under the name that the hospital gave it.
_MISNAMED_LABEL = re.compile(r"W39_1998\.09\.19_Segm\.nii(\.gz)?")
_MISNAMED_LABEL_CASE = "BraTS20_Training_355"

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


def discover(root: str | Path) -> list[dict[str, Any]]:
    """Find all cases below a folder, which may also be the folder of a single case.

    Hidden files and folders are left out; linked folders are not followed, which is logged.

    Args:
        root: the folder that is searched.

    Returns:
        One case per id, ordered by id: ``case``, ``patient``, the absolute path of each modality there is, ``label``
        if there is one, and the ``label_values`` of its year.

    Raises:
        FileNotFoundError: when ``root`` is no folder or holds no case, or when a file is a broken link.
        ValueError: naming the case and the files when it has two files for one modality, lies in two folders, is
            named in two ways, or has a label only.
    """
    root = Path(root).expanduser().absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"root {root} is not a folder; pass the folder that holds the BraTS cases.")
    found: dict[str, list[_File]] = {}
    for path in _walk(root):
        file = _identify(path)
        if file is not None:
            found.setdefault(file.case, []).append(file)
    if not found:
        names = [f"*{separator}{suffix}.nii[.gz]" for separator, naming in _NAMINGS.items() for suffix in naming.keys]
        raise FileNotFoundError(f"root {root} holds no BraTS case; looked for files named {', '.join(names)}.")
    return [_assemble(case, found[case]) for case in sorted(found)]


@dataclass(frozen=True)
class _File:
    """A file whose name says what it is."""

    path: Path
    case: str
    key: str
    separator: str


def _walk(root: Path) -> Iterator[Path]:
    """All files below ``root`` in a stable order."""
    for folder, subfolders, names in os.walk(root, onerror=lambda error: logger.warning("Left out: %s", error)):
        for name in subfolders:
            if (Path(folder) / name).is_symlink():
                logger.warning("Left out: %s is a link, links to folders are not followed.", Path(folder) / name)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder) / name for name in sorted(names) if not name.startswith("."))


def _identify(path: Path) -> _File | None:
    """What a file is by its name; None if it is nothing of BraTS."""
    if _MISNAMED_LABEL.fullmatch(path.name):
        return _File(path, _MISNAMED_LABEL_CASE, "label", "_")
    match = _FILE_NAME.fullmatch(path.name)
    if match is None:
        return None
    key = _NAMINGS[match["separator"]].keys.get(match["suffix"])
    return None if key is None else _File(path, match["case"], key, match["separator"])


def _assemble(case: str, files: Sequence[_File]) -> dict[str, Any]:
    """Check that the files fit together, and make a case of them."""
    folders = sorted({str(file.path.parent) for file in files})
    if len(folders) > 1:
        raise ValueError(
            f"Case {case!r} lies in {len(folders)} folders, {', '.join(folders)}; keep one or change root."
        )
    if len({file.separator for file in files}) > 1:
        names = sorted(file.path.name for file in files)
        raise ValueError(
            f"Case {case!r} mixes the namings of before and after 2023 in {folders[0]}: {', '.join(names)}."
        )
    paths: dict[str, str] = {}
    for file in files:
        if file.key in paths:
            raise ValueError(
                f"Case {case!r} has two files for {file.key}, {paths[file.key]} and {file.path}; remove one."
            )
        if not file.path.is_file():
            raise FileNotFoundError(f"Case {case!r}: {file.path} is a broken link; restore its target or remove it.")
        paths[file.key] = str(file.path)
    if paths.keys() == {"label"}:
        raise ValueError(f"Case {case!r} has a label but no image, only {paths['label']}; move it out of root.")
    time_point = _TIME_POINT.fullmatch(case)
    return {
        "case": case,
        "patient": time_point["patient"] if time_point else case,
        **{key: paths[key] for key in (*SPEC.modalities, "label") if key in paths},
        "label_values": list(_NAMINGS[files[0].separator].label_values),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Write a datalist from the command line; see ``python -m passion_monai.datasets.brats --help``."""
    datalist_command(argv, spec=SPEC, discover=discover, description=_DESCRIPTION, epilog=_EPILOG)


if __name__ == "__main__":
    main()
