"""From files of one patient's modalities to a stacked image with its presence, and from a prediction back to a file.

Until the last step each modality is its own key, and a modality that is missing is a missing key: nothing of it can be
read by accident. Simulated missing modalities are keys removed; cohorts that are really incomplete never had them. In
the paper's words: IDT masking is fixed before training (:class:`MaskModalitiesd` with the rows of a presence matrix),
PDT and ModDrop draw anew for each sample and iteration (:class:`RandMaskModalitiesd`).
"""

from __future__ import annotations

from passion_monai.transforms.augmentation import NNUNetIntensitiesd, NNUNetSpatiald, RandForegroundCropd
from passion_monai.transforms.grid import AlignModalitiesd, CropToForegroundd, SelectSliced
from passion_monai.transforms.labels import LabelsToClassesd
from passion_monai.transforms.loading import LoadCased
from passion_monai.transforms.missing import MaskModalitiesd, RandMaskModalitiesd, StackModalitiesd
from passion_monai.transforms.restoring import (
    FULL_CONFIDENCE,
    ReplaceSmallClassesd,
    RestoreClassesd,
    resample_probabilities,
    seen_voxels,
)
from passion_monai.transforms.writing import SaveProbabilitiesd, SaveSegmentationd

__all__ = [
    "FULL_CONFIDENCE",
    "AlignModalitiesd",
    "CropToForegroundd",
    "LabelsToClassesd",
    "LoadCased",
    "MaskModalitiesd",
    "NNUNetIntensitiesd",
    "NNUNetSpatiald",
    "RandForegroundCropd",
    "RandMaskModalitiesd",
    "ReplaceSmallClassesd",
    "RestoreClassesd",
    "SaveProbabilitiesd",
    "SaveSegmentationd",
    "SelectSliced",
    "StackModalitiesd",
    "resample_probabilities",
    "seen_voxels",
]
