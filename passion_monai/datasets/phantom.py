"""A PHANTOM cohort in the file layout of a data set: simulated images, not patients.

Use it to try and test the software without registering for a data set. Scores on it say nothing about patients.

    python -m passion_monai.datasets.phantom --dataset brats --output phantom --cases 20 --size 96 --spacing 2 --seed 0
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from passion_monai.datasets.brain_phantom import brain_phantom
from passion_monai.datasets.cardiac_phantom import cardiac_phantom, draw_slices
from passion_monai.datasets.phantom_mark import PHANTOM_MARK

__all__ = ["write_phantom"]

NOTICE = """PHANTOM, not patients.

The images in this folder are simulated by {module}: {what}
Files and label values are those of {layout},
so that software for that data set runs on them. They are no measurement of any person; scores on them say nothing
about patients.
"""
VERSION = 1  # written to each file's header; increase it when the same seed gives other images than before


@dataclass(frozen=True)
class _Layout:
    """How to simulate cases of a data set, and how to name their files.

    ``case_shape`` computes the shape of a case from the requested shape and the case's seed.
    """

    simulate: Callable[[Sequence[int], Sequence[float], Sequence[int]], tuple[dict[str, NDArray], NDArray]]
    case_name: str
    suffixes: Mapping[str, str]
    least_shape: tuple[int, int, int]
    case_shape: Callable[[Sequence[int], Sequence[int]], tuple[int, ...]]
    default_shape: tuple[int, int, int]
    default_spacing: tuple[float, float, float]
    what: str
    title: str


_LAYOUTS = {
    "brats": _Layout(
        simulate=brain_phantom,
        case_name="BraTS20_Training_{:03d}",
        suffixes={"flair": "flair", "t1ce": "t1ce", "t1": "t1", "t2": "t2", "label": "seg"},
        least_shape=(8, 8, 8),
        case_shape=lambda shape, _: tuple(shape),
        default_shape=(96, 96, 96),
        default_spacing=(2.0, 2.0, 2.0),
        what="MNI152 anatomy, randomly deformed, with\nsimulated tumours, MR signals and noise.",
        title="BraTS 2020 (1 necrotic and non-enhancing core, 2 edema, 4 enhancing tumour)",
    ),
    "myops": _Layout(
        simulate=cardiac_phantom,
        case_name="myops_training_1{:02d}",
        suffixes={"bssfp": "C0", "lge": "DE", "t2": "T2", "label": "gd"},
        least_shape=(8, 8, 1),
        case_shape=draw_slices,
        default_shape=(256, 256, 6),
        default_spacing=(1.0, 1.0, 10.0),
        what="drawn hearts with\nsimulated infarcts, MR signals and noise.",
        title="MyoPS 2020 (200 normal myocardium, 500 left and 600 right ventricular blood,\n1220 edema, 2221 scar)",
    ),
}


def write_phantom(
    dataset: str,
    output_dir: str | Path,
    *,
    num_cases: int,
    shape: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
    seed: int = 0,
) -> list[Path]:
    """Writes a PHANTOM cohort (not patients) as NIfTI, with the file names of a data set.

    ``<output_dir>/BraTS20_Training_001/BraTS20_Training_001_{flair,t1ce,t1,t2,seg}.nii.gz`` and so on, or
    ``myops_training_101_{C0,DE,T2,gd}.nii.gz``, with a ``README.txt`` that declares them a phantom. A case depends only
    on ``seed`` and its number, not on ``num_cases``. Folders appear only when complete, and existing cases are kept, so
    you can repeat an interrupted call.

    Args:
        dataset: "brats" for brains with tumours, "myops" for hearts with infarcts.
        output_dir: folder of the cohort; created if missing.
        num_cases: number of cases.
        shape: number of voxels X, Y, Z. For hearts, Z is the maximum number of slices. BraTS itself has
            (240, 240, 155) with ``spacing`` 1 mm.
        spacing: voxel size in mm.
        seed: seed of the cohort, at least 0.

    Returns:
        The folders of the cases, ordered by number.

    Raises:
        ValueError: an argument is invalid, or ``output_dir`` contains something else under a case's name.
        ImportError: for brains, if nilearn, which contains the anatomy, is not installed.

    Example:
        >>> folders = write_phantom("myops", "phantom", num_cases=2, shape=(64, 64, 4), spacing=(4, 4, 10))
    """
    layout = _layout(dataset)
    shape = layout.default_shape if shape is None else shape
    spacing = layout.default_spacing if spacing is None else spacing
    _check_grid(shape, spacing, layout.least_shape)
    for name, value, least in (("num_cases", num_cases, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    root = Path(output_dir)
    root.mkdir(parents=True, exist_ok=True)
    notice = NOTICE.format(module=layout.simulate.__module__, what=layout.what, layout=layout.title)
    (root / "README.txt").write_text(notice, encoding="utf-8")
    folders = [root / layout.case_name.format(number) for number in range(1, num_cases + 1)]
    for number, folder in enumerate(folders, start=1):
        empty = _empty_image(layout.case_shape(shape, (seed, number)), spacing, seed=seed, number=number)
        if not _holds_case(folder, layout, empty):
            _write_case(folder, layout, empty, simulated=layout.simulate(empty.shape, spacing, (seed, number)))
    return folders


def _layout(dataset: str) -> _Layout:
    if dataset not in _LAYOUTS:
        raise ValueError(f"There is no phantom of {dataset!r}, only of {list(_LAYOUTS)}.")
    return _LAYOUTS[dataset]


def _check_grid(shape: Sequence[int], spacing: Sequence[float], least: Sequence[int]) -> None:
    if len(shape) != 3 or any(size != int(size) or size < few for size, few in zip(shape, least, strict=True)):
        raise ValueError(f"shape must be three integers of at least {tuple(least)} voxels, got {tuple(shape)}.")
    if len(spacing) != 3 or not all(0 < step < np.inf for step in spacing):
        raise ValueError(f"spacing must be three positive numbers of millimetres, got {tuple(spacing)}.")


def _affine(shape: Sequence[int], spacing: Sequence[float]) -> NDArray[np.float64]:
    """LPS affine with the origin of BraTS: for 240 x 240 x 155 voxels of 1 mm it equals that of BraTS."""
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[1, 3] = (shape[1] - 1) * spacing[1]
    return affine


def _empty_image(shape: Sequence[int], spacing: Sequence[float], *, seed: int, number: int) -> nib.Nifti1Image:
    """An empty label; its header is that of all files of the case, except for the data type."""
    affine = _affine(shape, spacing)
    image = nib.Nifti1Image(np.zeros(tuple(int(size) for size in shape), np.uint8), affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = f"{PHANTOM_MARK}: passion_monai v{VERSION} seed {seed} case {number}"
    return image


def _holds_case(folder: Path, layout: _Layout, expected: nib.Nifti1Image) -> bool:
    """True if ``folder`` contains the expected case, False if it does not exist; otherwise an error."""
    if not folder.exists():
        return False
    for suffix in layout.suffixes.values():
        path = folder / f"{folder.name}_{suffix}.nii.gz"
        header = nib.Nifti1Image.from_filename(path).header if path.is_file() else None
        if header is None or any((header[key] != expected.header[key]).any() for key in ("descrip", "dim", "pixdim")):
            raise ValueError(
                f"{path} is missing or is not the case asked for ({expected.header['descrip'].item().decode()}, "
                f"shape {expected.shape}, spacing {tuple(map(float, expected.header.get_zooms()))}). "
                f"Choose another output_dir, or delete {folder} if you do not need it."
            )
    return True


def _write_case(
    folder: Path, layout: _Layout, empty: nib.Nifti1Image, *, simulated: tuple[dict[str, NDArray], NDArray]
) -> None:
    images, label = simulated
    volumes: dict[str, NDArray[Any]] = {**images, "label": label}
    with TemporaryDirectory(prefix=".phantom_", dir=folder.parent) as scratch:
        partial = Path(scratch) / folder.name
        partial.mkdir()
        for key, suffix in layout.suffixes.items():
            header = empty.header.copy()
            header.set_data_dtype(volumes[key].dtype)
            nib.save(nib.Nifti1Image(volumes[key], None, header), partial / f"{folder.name}_{suffix}.nii.gz")
        try:
            partial.rename(folder)
        except OSError:
            # Another process may have written the same case in the meantime.
            if not _holds_case(folder, layout, empty):
                raise


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: writes a PHANTOM cohort."""
    parser = argparse.ArgumentParser(
        prog="python -m passion_monai.datasets.phantom",
        description="Write a PHANTOM cohort (simulated, not patients) as NIfTI, with the file names of a data set. "
        "An interrupted run can be repeated: complete cases are kept.",
    )
    parser.add_argument("--dataset", choices=sorted(_LAYOUTS), default="brats", help="default: %(default)s")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the cohort, made if needed")
    parser.add_argument("--cases", type=int, default=20, metavar="N", help="number of cases (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs="+", help="voxels: one number, or X Y Z")
    parser.add_argument("--spacing", type=float, nargs="+", help="voxel size in mm: one number, or X Y Z")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same cases")
    arguments = parser.parse_args(argv)
    try:
        folders = write_phantom(
            arguments.dataset,
            arguments.output,
            num_cases=arguments.cases,
            shape=_three(arguments.size),
            spacing=_three(arguments.spacing),
            seed=arguments.seed,
        )
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    print(f"{len(folders)} PHANTOM cases (not patients) in {arguments.output}")


def _three(values: Sequence[Any] | None) -> Sequence[Any] | None:
    return list(values) * 3 if values is not None and len(values) == 1 else values


if __name__ == "__main__":
    main()
