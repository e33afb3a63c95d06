"""From a prediction to files."""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from passion_monai.files import complete_file
from passion_monai.presence import combination_name
from passion_monai.transforms.case import Data, plain
from passion_monai.transforms.labels import values_in_file
from passion_monai.transforms.restoring import FULL_CONFIDENCE, find_temperature

__all__ = ["SaveProbabilitiesd", "SaveSegmentationd"]

logger = logging.getLogger(__name__)


class SaveSegmentationd(MapTransform):
    """Write a class map as ``<case>_seg.nii.gz`` with the data set's label values, and ``<case>_seg.json`` beside it.

    The JSON file has the modalities used and missing, the file of each (null if missing), the volume of each region in
    millilitres, and ``expected_scores``: the scores that were reached with the same modalities in the evaluation of the
    weights (null without one). ``calibration`` has the temperature that calibrated the probabilities, or null; if
    calibration was requested but not possible, a note says why. A file under its final name is complete.

    Args:
        keys: key of the class map, int [1, H, W, D] with the affine of the file to write.
        output_dir: folder to write to; it is made.
        modalities: names of the M modalities.
        values: file value of each class, background first; a case's ``label_values`` hold instead, unless these are
            the same and more.
        class_names: name of each class.
        regions: classes of each region, for the volumes.
        expected_scores: what :func:`passion_monai.evaluation.expected.read_expected_scores` gives.
        temperatures: those that the probabilities were calibrated by, as :class:`RestoreClassesd` has them.
    """

    def __init__(
        self,
        keys: str = "pred",
        *,
        output_dir: str | Path,
        modalities: Sequence[str],
        values: Sequence[int],
        class_names: Sequence[str],
        regions: Mapping[str, Sequence[int]],
        expected_scores: Mapping[str, Any] | None = None,
        temperatures: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(keys)
        self.output_dir = Path(output_dir)
        self.modalities = tuple(modalities)
        self.values = tuple(values)
        self.class_names = tuple(class_names)
        self.regions = dict(regions)
        self.expected_scores = expected_scores
        self.temperatures = temperatures

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            self._save(data, data[key])
        return dict(data)

    def _save(self, data: Data, prediction: MetaTensor) -> None:
        classes = prediction.as_tensor()[0].cpu().numpy()
        own = values_in_file(data, self.values)
        # A network that was fine-tuned on other classes has no use for those of the data set's files.
        values = np.asarray(own if len(own) == len(self.class_names) else self.values)
        values = values.astype(np.result_type(*map(np.min_scalar_type, values.tolist())))  # the smallest that holds all
        image = nib.Nifti1Image(values[classes], prediction.affine.cpu().numpy())
        image.header.set_xyzt_units("mm")
        record = self._record(data, classes, float(np.prod(image.header.get_zooms()[:3])), values)
        stem = f"{data['case']}_seg"
        # In this order: an interrupted run leaves no segmentation without its record.
        with complete_file(self.output_dir / f"{stem}.json") as unfinished:
            unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        with complete_file(self.output_dir / f"{stem}.nii.gz") as unfinished:
            nib.save(image, unfinished)

    def _record(self, data: Data, classes: np.ndarray, voxel_volume: float, values: np.ndarray) -> dict[str, Any]:
        presence = dict(zip(self.modalities, data["presence"].tolist(), strict=True))
        volumes = {name: np.isin(classes, region).sum() * voxel_volume for name, region in self.regions.items()}
        return {
            "case": data["case"],
            "modalities_used": [name for name, present in presence.items() if present],
            "modalities_missing": [name for name, present in presence.items() if not present],
            "files": {name: data["files"].get(name) for name in self.modalities},
            "labels": dict(zip(self.class_names, values.tolist(), strict=True)),
            "region_volumes_ml": {name: round(float(volume) / 1000, 3) for name, volume in volumes.items()},
            "expected_scores": self._expected(list(presence.values())),
            "calibration": self._calibration(data["case"], list(presence.values())),
        }

    def _expected(self, presence: list[bool]) -> dict[str, Any] | None:
        """Scores of the regions with a combination of modalities, and which data they were measured on."""
        name = combination_name(presence, self.modalities)
        if self.expected_scores is None or name not in self.expected_scores["combinations"]:
            return None
        return {"data": self.expected_scores["data"], "regions": self.expected_scores["combinations"][name]}

    def _calibration(self, case: str, presence: list[bool]) -> dict[str, Any] | None:
        """The temperature of a combination of modalities, and which data it was fitted on, or why there is none."""
        if self.temperatures is None:
            return None
        data, temperature = self.temperatures["data"], find_temperature(self.temperatures, presence, self.modalities)
        if temperature is not None:
            return {"temperature": temperature, "data": data}
        name = combination_name(presence, self.modalities)
        note = (
            f"NOT CALIBRATED: no temperature was fitted for {name}, since no validation case of {data} has it. The "
            "segmentation is not concerned. Run calibrate.yaml on validation cases that have these modalities."
        )
        logger.warning(f"Case {case}: {note}")
        return {"temperature": None, "data": data, "note": note}


class SaveProbabilitiesd(MapTransform):
    """Write class probabilities as ``<case>_prob.nii.gz``, the classes along the last axis.

    NIfTI has no 16-bit floats. The file holds whole numbers from 0 to `FULL_CONFIDENCE`, and a scale factor by which
    readers of NIfTI convert them to 0 to 1.

    Args:
        keys: key of the probabilities, float [K, H, W, D] with the affine of the file to write.
        output_dir: folder to write to; it is made.
    """

    def __init__(self, keys: str = "probabilities", *, output_dir: str | Path) -> None:
        super().__init__(keys)
        self.output_dir = Path(output_dir)

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            levels = (plain(data[key]).movedim(0, -1) * FULL_CONFIDENCE).round().to(torch.int16).numpy()
            image = nib.Nifti1Image(levels, data[key].affine.cpu().numpy())
            image.header.set_slope_inter(1 / FULL_CONFIDENCE, 0)
            image.header.set_xyzt_units("mm")
            with complete_file(self.output_dir / f"{data['case']}_prob.nii.gz") as unfinished:
                nib.save(image, unfinished)
        return {key: value for key, value in data.items() if key not in self.keys}  # large, and of no use afterwards
