"""From a patient's images as the scanner gives them to a segmentation on the grid of each of them.

It registers and skull-strips by brainles-preprocessing, segments by a bundle, and brings the label back. The page
docs/from_scanner.md says how to install what it needs, and what it takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from brainles_preprocessing.brain_extraction import HDBetExtractor
from brainles_preprocessing.brain_extraction.brain_extractor import BrainExtractor
from brainles_preprocessing.constants import Atlas
from brainles_preprocessing.modality import CenterModality, Modality
from brainles_preprocessing.preprocessor import AtlasCentricPreprocessor
from brainles_preprocessing.registration import ANTsRegistrator
from brainles_preprocessing.transform import Transform

from passion_monai import Segmenter

ATLASES = {
    "sri24": Atlas.BRATS_SRI24,
    "sri24_skullstripped": Atlas.BRATS_SRI24_SKULLSTRIPPED,
    "mni152": Atlas.BRATS_MNI152,
}
CENTERS = ("t1ce", "t1c", "t1", "t2", "flair")  # all others are registered to the first of these that there is


class LinearRegistrator(ANTsRegistrator):
    """Rigid registration with images interpolated linearly, for which ANTsRegistrator takes the nearest voxel."""

    def __init__(self) -> None:
        super().__init__({"type_of_transform": "Rigid", "random_seed": 0})

    def transform(self, *args: Any, interpolator: str = "linear", **kwargs: Any) -> None:
        """As in ANTsRegistrator, but for the default; a label's way back names the nearest voxel itself."""
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
        shutil.move(str(masked_image_path).replace(".nii.gz", "_bet.nii.gz"), brain_mask_path)


EXTRACTORS = {"hd-bet": HDBetExtractor, "hd-bet-2": HDBet2Extractor, "none": None}


def preprocess(images: dict[str, Path], output: Path, *, atlas: str, brain_extraction: str) -> dict[str, Path]:
    """Register images to each other and to an atlas and skull-strip them.

    Args:
        images: file of each sequence that there is.
        output: folder for `registered/`, `transformations/` and `steps/`, which has what is between.
        atlas: name of an atlas, or the path of an image.
        brain_extraction: "none" for images that are skull-stripped already.

    Returns:
        The new file of each sequence.

    Raises:
        FileExistsError: when the folder is there: transformations of an earlier run in it would be applied too.
    """
    output.mkdir(parents=True)
    extractor = EXTRACTORS[brain_extraction]
    result = "raw_skull_output_path" if extractor is None else "raw_bet_output_path"
    registered = {name: output / "registered" / f"{name}.nii.gz" for name in images}
    center = next(name for name in (*CENTERS, *images) if name in images)
    moving = [Modality(name, images[name], **{result: registered[name]}) for name in images if name != center]
    preprocessor = AtlasCentricPreprocessor(
        CenterModality(center, images[center], **{result: registered[center]}),
        moving,
        LinearRegistrator(),
        extractor and extractor(),
        atlas_image_path=ATLASES.get(atlas, atlas),
        temp_folder=output / "steps",
    )
    preprocessor.run(save_dir_transformations=output / "transformations", log_file=output / "preprocessing.log")
    return registered


def bring_back(label: Path, name: str, image: Path, output: Path) -> Path:
    """Bring a label from the atlas to the grid of a sequence, by the nearest voxel.

    Args:
        label: file of the label.
        name: of the sequence.
        image: its file, as the scanner gave it.
        output: the folder that was given to `preprocess`.

    Returns:
        The new file.
    """
    path = output / f"{name}_seg.nii.gz"
    Transform(output / "transformations", LinearRegistrator()).apply(
        name, image, label, path, output / "back.log", interpolator="nearestNeighbor", inverse=True
    )
    voxels = np.asarray(nib.load(path).dataobj).round().astype(np.uint8)  # ANTs writes floating-point numbers
    nib.save(nib.Nifti1Image(voxels, nib.load(image).affine), path)
    return path


def main(arguments: list[str] | None = None) -> None:
    """Preprocess, segment where a bundle is given, and bring the label back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="NAME=FILE", help="sequences, by the bundle's names; NIfTI")
    parser.add_argument("--output", required=True, type=Path, help="folder to write to, one for each patient")
    parser.add_argument("--bundle", help="folder of a bundle; without it, nothing is segmented")
    parser.add_argument("--ckpt_path", help="weights, if not those of the bundle")
    parser.add_argument("--atlas", default="sri24", help=f"{', '.join(ATLASES)}, or a file; what the training had")
    parser.add_argument("--brain_extraction", default="hd-bet", choices=EXTRACTORS)
    given = parser.parse_args(arguments)
    images = {name: Path(file) for name, file in (text.split("=", 1) for text in given.images)}
    registered = preprocess(images, given.output, atlas=given.atlas, brain_extraction=given.brain_extraction)
    if given.bundle is None:
        return
    ids = {} if given.ckpt_path is None else {"ckpt_path": given.ckpt_path}
    patient = Segmenter(given.bundle, **ids)(registered)
    label = given.output / "registered" / "label.nii.gz"
    patient.label.to_filename(label)
    (given.output / "record.json").write_text(json.dumps(patient.record, indent=2) + "\n", encoding="utf-8")
    for name, image in images.items():
        print(bring_back(label, name, image, given.output))


if __name__ == "__main__":
    main()
