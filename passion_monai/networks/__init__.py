"""Backbones that segment from any subset of modalities; see :class:`passion_monai.networks.base.Backbone`."""

from __future__ import annotations

from passion_monai.networks.base import Backbone, DecoderOutput
from passion_monai.networks.fusion_unet import FusionUNet
from passion_monai.networks.m2ftrans import M2FTrans
from passion_monai.networks.mmformer import MMFormer
from passion_monai.networks.rfnet import RFNet

__all__ = ["BACKBONES", "Backbone", "DecoderOutput", "FusionUNet", "M2FTrans", "MMFormer", "RFNet"]

BACKBONES: dict[str, type[Backbone]] = {
    "mmformer": MMFormer,
    "rfnet": RFNet,
    "m2ftrans": M2FTrans,
    "fusionunet": FusionUNet,
}
