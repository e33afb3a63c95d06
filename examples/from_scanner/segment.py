"""From a patient's images as the scanner gives them to a segmentation on the grid of each of them.

It registers and skull-strips by brainles-preprocessing, segments by a bundle, and brings the label back. The page
docs/from_scanner.md says how to install what it needs, and what it takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import ants
import nibabel as nib
import numpy as np
from brainles_preprocessing.brain_extraction import HDBetExtractor
from brainles_preprocessing.brain_extraction.brain_extractor import BrainExtractor
from brainles_preprocessing.constants import Atlas
from brainles_preprocessing.modality import CenterModality, Modality
from brainles_preprocessing.preprocessor import AtlasCentricPreprocessor
from brainles_preprocessing.registration import ANTsRegistrator
from brainles_preprocessing.transform import Transform
from scipy.ndimage import binary_erosion, binary_fill_holes

from passion_monai import Segmenter

ATLASES = {
    "sri24": Atlas.BRATS_SRI24,
    "sri24_skullstripped": Atlas.BRATS_SRI24_SKULLSTRIPPED,
    "mni152": Atlas.BRATS_MNI152,
}
CENTERS = ("t1ce", "t1c", "t1", "t2", "flair")  # all others are registered to the first of these that there is


class LinearRegistrator(ANTsRegistrator):
    """Rigid registration, the same every time, with images interpolated linearly instead of by the nearest voxel."""

    def __init__(self) -> None:
        super().__init__({"type_of_transform": "Rigid"})
        ants.config.set_ants_deterministic(True, 1)  # with 0 it would be the time

    def transform(self, *args: Any, interpolator: str = "linear", **kwargs: Any) -> None:
        """As in ANTsRegistrator, but for the default."""
        super().transform(*args, interpolator=interpolator, **kwargs)


class HDBet2Extractor(BrainExtractor):
    """The command `hd-bet` of version 2, which may be installed in another environment."""

    def extract(
        self, input_image_path: Path, masked_image_path: Path, brain_mask_path: Path, device: Any = "cpu", **_: Any
    ) -> None:
        """Write the brain and its mask."""
        command = ["hd-bet", "-i", str(input_image_path), "-o", str(masked_image_path), "-device", str(device)]
        command += ["--save_bet_mask", *(["--disable_tta"] if str(device) == "cpu" else [])]
        subprocess.run(command, check=True)
        shutil.move(str(masked_image_path).removesuffix(".nii.gz") + "_bet.nii.gz", brain_mask_path)


EXTRACTORS = {"hd-bet": HDBetExtractor, "hd-bet-2": HDBet2Extractor, "none": None}


def preprocess(images: dict[str, Path], output: Path, *, atlas: str, brain_extraction: str) -> dict[str, Path]:
    """Register images to each other and to an atlas, and skull-strip them.

    Args:
        images: file of each sequence that there is.
        output: folder to make, for `registered/` and `transformations/`.
        atlas: name of an atlas, or the path of an image.
        brain_extraction: one of EXTRACTORS; "none" for images that are skull-stripped already.

    Returns:
        The new file of each sequence.

    Raises:
        FileExistsError: when the folder is there: transformations of an earlier run in it would be applied too.
    """
    output.mkdir(parents=True)
    extractor = EXTRACTORS[brain_extraction]
    kind = "raw_skull_output_path" if extractor is None else "raw_bet_output_path"
    registered = {name: output / "registered" / f"{name}.nii.gz" for name in images}
    center = next(name for name in (*CENTERS, *images) if name in images)
    with tempfile.TemporaryDirectory() as steps:
        preprocessor = AtlasCentricPreprocessor(
            CenterModality(center, images[center], **{kind: registered[center]}),
            [Modality(name, images[name], **{kind: registered[name]}) for name in images if name != center],
            LinearRegistrator(),
            None if extractor is None else extractor(),
            atlas_image_path=ATLASES.get(atlas, atlas),
            temp_folder=steps,
        )
        preprocessor.run(save_dir_transformations=output / "transformations", log_file=output / "preprocessing.log")
    if extractor is None:
        for file in registered.values():
            cut_rim(file)
    return registered


def cut_rim(file: Path) -> None:
    """Take away the outermost voxels of a brain without skull, which interpolation has mixed with the 0 around it."""
    image = nib.load(file)
    voxels = image.get_fdata(dtype=np.float32)
    brain = binary_erosion(binary_fill_holes(voxels != 0))
    nib.save(nib.Nifti1Image(voxels * brain, image.affine), file)


def move_label(label: Path, name: str, onto: Path, path: Path, output: Path, *, back: bool) -> None:
    """Bring a label from the grid of a sequence to the atlas, or back, by the nearest voxel.

    Args:
        label: file of the label.
        name: of the sequence.
        onto: image with the grid to bring it to.
        path: of the new file.
        output: the folder that was given to `preprocess`.
        back: from the atlas to the sequence.
    """
    Transform(output / "transformations", LinearRegistrator()).apply(
        name, onto, label, path, output / "labels.log", interpolator="nearestNeighbor", inverse=back
    )
    voxels = np.asarray(nib.load(path).dataobj).round()  # ANTs writes floating-point numbers
    voxels = voxels.astype(np.min_scalar_type(int(voxels.max())))  # label values are not negative
    nib.save(nib.Nifti1Image(voxels, nib.load(onto).affine), path)


def segment(segmenter: Segmenter, images: dict[str, Path], registered: dict[str, Path], output: Path) -> None:
    """Segment the registered images, and write the label on the grid of each image that the scanner gave."""
    patient = segmenter(registered)
    (output / "record.json").write_text(json.dumps(patient.record, indent=2) + "\n", encoding="utf-8")
    label = output / "registered" / "segmentation.nii.gz"
    patient.label.to_filename(label)
    for name, image in images.items():
        path = output / f"{name}_seg.nii.gz"
        move_label(label, name, image, path, output, back=True)
        print(path)


def sequence(text: str) -> tuple[str, Path]:
    """Name and file of a sequence."""
    name, file = text.split("=", 1)
    return name, Path(file)


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command's arguments; files that are not there are an error before anything is computed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=sequence, metavar="NAME=FILE", help="sequences as NIfTI")
    parser.add_argument("--output", required=True, type=Path, help="folder to make, one for each patient")
    parser.add_argument("--bundle", help="folder of a bundle; without it, nothing is segmented")
    parser.add_argument("--ckpt_path", help="weights, if not those of the bundle")
    parser.add_argument("--atlas", default="sri24", help=f"{', '.join(ATLASES)}, or a file: what the training had")
    parser.add_argument("--brain_extraction", default="hd-bet", choices=EXTRACTORS)
    parser.add_argument(
        "--label", type=sequence, metavar="NAME=FILE", help="to bring to the atlas: drawn on that sequence"
    )
    given = parser.parse_args(arguments)
    files = [file for _, file in [*given.images, *([given.label] if given.label else [])]]
    files += [] if given.atlas in ATLASES else [Path(given.atlas)]
    if missing := [str(file) for file in files if not file.is_file()]:
        parser.error(f"no such file: {', '.join(missing)}")
    names = [name for name, _ in given.images]
    if len(set(names)) < len(names) or (given.label and given.label[0] not in names):
        parser.error(f"each sequence once, and a label on one of them: got {names}")
    return given


def main(arguments: list[str] | None = None) -> None:
    """Preprocess; segment where a bundle is given; bring labels where they belong."""
    given = read_arguments(arguments)
    images = dict(given.images)
    segmenter = None
    if given.bundle is not None:  # first, since what is wrong with it should not cost the minutes of the registration
        segmenter = Segmenter(given.bundle, **({} if given.ckpt_path is None else {"ckpt_path": given.ckpt_path}))
        if unknown := set(images) - set(segmenter.modalities):
            raise ValueError(f"{given.bundle} has no {sorted(unknown)}; it has {segmenter.modalities}.")
    registered = preprocess(images, given.output, atlas=given.atlas, brain_extraction=given.brain_extraction)
    if given.label is not None:
        name, label = given.label
        path = given.output / "registered" / "label.nii.gz"
        move_label(label, name, registered[name], path, given.output, back=False)
    if segmenter is not None:
        segment(segmenter, images, registered, given.output)


if __name__ == "__main__":
    main()
