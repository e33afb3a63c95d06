"""Backbones that segment from any subset of modalities; see :class:`passion_monai.networks.base.Backbone`."""

from __future__ import annotations

from passion_monai.networks.base import Backbone, DecoderOutput
from passion_monai.networks.mmformer import MMFormer

__all__ = ["BACKBONES", "Backbone", "DecoderOutput", "MMFormer"]

BACKBONES: dict[str, type[Backbone]] = {"mmformer": MMFormer}
