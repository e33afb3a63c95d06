"""MONAI's SwinUNETR, with an encoder for each sequence, as a backbone."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.nets import SwinUNETR
from torch import Tensor, nn

from passion_monai.networks.base import Backbone, DecoderOutput, Features, mean_of_present

DECODERS = ("decoder5", "decoder4", "decoder3", "decoder2", "decoder1")  # from coarse to fine
ENCODERS = ("swinViT", "encoder1", "encoder2", "encoder3", "encoder4", "encoder10")


class MultiSwinUNETR(Backbone):
    """An encoder per sequence; what they give is averaged over the sequences present, at every level, and decoded."""

    def __init__(
        self, spatial_dims: int, num_modalities: int, num_classes: int, *, img_size: list[int], feature_size: int = 24
    ) -> None:
        super().__init__(spatial_dims, num_modalities, num_classes, img_size, stride=32)
        settings = {"in_channels": 1, "out_channels": num_classes, "feature_size": feature_size}

        def network() -> SwinUNETR:
            return SwinUNETR(**settings, spatial_dims=spatial_dims)

        self.encoders = nn.ModuleList(network() for _ in range(num_modalities))
        self.decoder, self.modality_decoder = network(), network()
        for encoder in self.encoders:  # only halves of the networks are needed
            for name in (*DECODERS, "out"):
                delattr(encoder, name)
        for decoder in (self.decoder, self.modality_decoder):
            for name in ENCODERS:
                delattr(decoder, name)

    def encode_modality(self, image: Tensor, modality: int) -> tuple[Tensor, ...]:
        """Maps from fine to coarse, of one sequence alone."""
        network = self.encoders[modality]
        first, second, third, fourth, deepest = network.swinViT(image, network.normalize)
        fine = (network.encoder1(image), network.encoder2(first), network.encoder3(second), network.encoder4(third))
        return (*fine, fourth, network.encoder10(deepest))

    def decode(self, features: Features, presence: Tensor) -> DecoderOutput:
        """Logits from the sequences in `presence`, no logits of coarser levels, and the map before the logits."""
        last = _decode(self.decoder, mean_of_present(features, presence))
        return DecoderOutput(self.decoder.out(last), (), last)

    def decode_modality(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Logits from one sequence by the decoder that all share, for the Baseline's regularisation."""
        return self.modality_decoder.out(_decode(self.modality_decoder, maps))


def _decode(network: SwinUNETR, maps: Sequence[Tensor]) -> Tensor:
    *skips, x = maps
    for name, skip in zip(DECODERS, reversed(skips), strict=True):
        x = getattr(network, name)(x, skip)
    return x
