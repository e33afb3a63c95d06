"""A training step by `torch.compile`, region by region."""

from __future__ import annotations

import re
from collections.abc import Iterator

from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetResBlock, UnetUpBlock
from torch import nn

from passion_monai.networks import Backbone
from passion_monai.networks.blocks import ConvBlock, DecoderStage, Encoder, ModalityFusion, TransformerLayer

__all__ = ["compile_regions"]

REGIONS = (
    Encoder,
    DecoderStage,
    ModalityFusion,
    TransformerLayer,
    ConvBlock,
    UnetBasicBlock,
    UnetResBlock,
    UnetUpBlock,
)
"""Whose graphs are the same whatever is present, but for how many maps a fusion gets."""
MOST_GRAPHS = 8
"""Of one region: a fusion has one for each number of modalities."""


def compile_regions(network: Backbone, *, backend: str = "inductor") -> None:
    """Compile encoders and the layers of decoders in place, each when it is first called.

    A graph of the whole step would break wherever `presence` decides what is called, and one of a whole decoder, ten
    times as long to compile as an encoder, would be compiled anew for each student and each pattern of presence. What
    cannot be compiled is an error, and does not run as it is instead.
    """
    for name, region in _outermost(network, ""):
        # Modules of different modalities are alike and share their graphs. Others would only look through each other's.
        is_shared = any(re.match(pattern, name) for pattern in network.modality_modules)
        region.compile(
            backend=backend,
            fullgraph=True,
            dynamic=False,
            recompile_limit=MOST_GRAPHS,
            isolate_recompiles=not is_shared,
        )


def _outermost(network: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The regions that are not in another one, with their names, each of which ends in a dot."""
    for name, module in network.named_children():
        if isinstance(module, REGIONS):
            yield f"{prefix}{name}.", module
        else:
            yield from _outermost(module, f"{prefix}{name}.")
