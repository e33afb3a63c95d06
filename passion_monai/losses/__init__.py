"""The losses of PASSION and of its baseline, one file per idea."""

from __future__ import annotations

from passion_monai.losses.passion import PassionLoss
from passion_monai.losses.pixel import PixelDistillationLoss
from passion_monai.losses.pmr import PMRLoss
from passion_monai.losses.prototype import PrototypeDistillationLoss
from passion_monai.losses.segmentation import DiceWeightedCELoss, SegmentationLoss, TaskLoss

__all__ = [
    "DiceWeightedCELoss",
    "PMRLoss",
    "PassionLoss",
    "PixelDistillationLoss",
    "PrototypeDistillationLoss",
    "SegmentationLoss",
    "TaskLoss",
]
