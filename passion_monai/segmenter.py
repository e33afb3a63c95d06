"""Segmentation from Python, by a bundle's own inference."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from passion_monai.config import similar_id
from passion_monai.datasets import discover
from passion_monai.datasets.cohort import single_case
from passion_monai.errors import find_words
from passion_monai.faults import FaultReport

__all__ = ["Segmentation", "Segmenter"]

_OF_A_CALL = ("bundle_root", "output_dir", "dataset_dir", "files", "datalist", "section")
Image = str | Path | nib.spatialimages.SpatialImage | MetaTensor


@dataclass(frozen=True)
class Segmentation:
    """The prediction for a patient.

    Attributes:
        label: the label image, with the affine of the first sequence present.
        record: the JSON record of the command: sequences used and missing, volumes, expected scores.
        probabilities: the class probabilities, classes along the last axis; None unless ``save_probabilities`` is set.
    """

    label: nib.Nifti1Image
    record: dict[str, Any]
    probabilities: nib.Nifti1Image | None


class Segmenter:
    """Segments patients from the sequences they have, as ``monai.bundle run`` does with the same bundle.

    It runs the bundle's inference workflow, so the results are identical; it builds the network only once. Calls from
    several threads wait for each other.

    Args:
        bundle: folder of the bundle.
        ids: those of its ``inference.yaml``, such as ``ckpt_path``, ``device`` or ``save_probabilities=True``; but not
            those that say where patients come from and predictions go.

    Attributes:
        bundle: folder of the bundle.
        modalities: names of the bundle's sequences.
        classes: names of the classes, background first, each with its value in a label image.

    Raises:
        FileNotFoundError: when the folder is not a bundle, or there are no weights.
        ValueError: when an id is unknown, or has a value that it cannot have, or the weights cannot be used.

    Example:
        ``segmenter = Segmenter("bundles/brats_rfnet_passion")``, and then
        ``segmenter({"flair": "f.nii.gz", "t1": "t1.nii.gz"}).label.to_filename("seg.nii.gz")``.
    """

    def __init__(self, bundle: str | Path, **ids: Any) -> None:
        config = Path(bundle) / "configs" / "inference.yaml"
        if not config.is_file():
            raise FileNotFoundError(f"{config} does not exist; give the folder of a bundle.")
        if taken := [name for name in _OF_A_CALL if name in ids]:
            raise ValueError(f"{', '.join(taken)}: give the images to each call, and save what it returns.")
        self.bundle = Path(bundle).resolve()
        self._one_at_a_time = threading.Lock()
        self._folder = Path(tempfile.mkdtemp(prefix="segmenter"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._parser = ConfigParser()
        self._parser.read_config(str(config))
        known: dict[str, Any] = self._parser.config  # type: ignore[assignment]
        unknown = [name for name in ids if name.split("::")[0] not in known]
        if unknown:
            hints = ", ".join(f"{name} ({similar_id(name.split('::')[0], known)})" for name in unknown)
            raise ValueError(f"Unknown ids: {hints}. Known are those of {config}.")
        fixed = {"bundle_root": str(self.bundle), "output_dir": str(self._folder), "num_workers": 0}
        self._parser.update({**fixed, **ids, "dataset::data": [{}]})  # one patient at a time
        for checks in ("settings", "inference_settings", "temperatures", "kept_memory"):
            self._get(checks)
        self._get("weights")()  # so that weights that do not fit fail now, not with the first patient
        self.modalities = tuple(self._get("modalities"))
        names, values = self._get("class_names"), self._get("label_values")
        self.classes = dict(zip(names, values, strict=True))

    def discover(self, root: str | Path) -> dict[str, dict[str, str]]:
        """The patients below a folder, found by the file names of the bundle's data set: the images of each, by id.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when files contradict each other.
        """
        cases = discover(self._get("spec").name, root)
        return {case["case"]: {name: case[name] for name in self.modalities if name in case} for case in cases}

    def __call__(self, images: Mapping[str, Image]) -> Segmentation:
        """Segment one patient.

        Args:
            images: for each available sequence, by name, a path (of a file or the folder of a DICOM series), a nibabel
                image, or a MetaTensor [H, W, D] or [1, H, W, D]. A sequence that is None is missing.

        Returns:
            The label image on the grid of the first sequence present, and the record that goes with it.

        Raises:
            ValueError: when a name is none of the bundle's sequences, or an image cannot be used; the message says
                which and why.
        """
        if not isinstance(images, Mapping):
            raise ValueError(
                f"Give the images by the names of their sequences, {list(self.modalities)}; got {images!r}."
            )
        given = {name: image for name, image in images.items() if image is not None}
        with self._one_at_a_time:
            try:
                files = {name: str(self._path(name, image)) for name, image in given.items()}
                self._run(single_case(files | {"case": "patient"}, self.modalities))
                return self._read()
            finally:  # a server that is killed leaves no patient behind
                for path in self._folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _get(self, name: str) -> Any:
        """A part of the bundle's inference; an error of ours in it comes without those of MONAI around it."""
        try:
            return self._parser.get_parsed_content(name)
        except RuntimeError as error:
            if words := find_words(error):
                raise ValueError(words) from error
            raise

    def _run(self, case: dict[str, Any]) -> None:
        faults: FaultReport = self._get("faults")
        evaluator = self._get("evaluator")
        self._get("dataset").data = [case]
        try:
            faults.run(evaluator)
        except ValueError as error:
            if not faults.faults:
                raise
            raise ValueError(faults.faults[0].reason) from error

    def _path(self, name: str, image: Image) -> str | Path:
        """Where an image lies, after it was written if need be."""
        if isinstance(image, (str, Path)):
            return image
        if isinstance(image, MetaTensor):
            voxels = image.as_tensor().detach().cpu().to(torch.float32).numpy()
            image = nib.Nifti1Image(voxels.reshape(voxels.shape[-3:]), image.affine.cpu().numpy())
        if not isinstance(image, nib.spatialimages.SpatialImage):
            raise ValueError(f"{name} must be a path, a nibabel image or a MetaTensor, got {type(image).__name__}.")
        path = self._folder / f"{name}.nii.gz"
        nib.save(image, path)
        return path

    def _read(self) -> Segmentation:
        folder = self._folder / "predictions"
        record = json.loads((folder / "patient_seg.json").read_text(encoding="utf-8"))
        probabilities = folder / "patient_prob.nii.gz"
        return Segmentation(
            _in_memory(folder / "patient_seg.nii.gz"),
            record,
            _in_memory(probabilities) if probabilities.is_file() else None,
        )


def _in_memory(path: Path) -> nib.Nifti1Image:
    """An image that does not need its file any more."""
    image: Any = nib.load(path)
    return nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header)
