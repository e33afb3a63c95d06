"""MONAI's SegResNet, with an encoder for each sequence, as a backbone."""

from __future__ import annotations

from monai.networks.nets import SegResNet
from torch import Tensor, nn

from passion_monai.networks.base import Backbone, DecoderOutput, Features, mean_of_present
from passion_monai.networks.blocks import use_fast_convolutions


class MultiSegResNet(Backbone):
    """An encoder per sequence; what they give is averaged over the sequences present, at every level, and decoded."""

    def __init__(
        self, spatial_dims: int, num_modalities: int, num_classes: int, *, img_size: list[int], init_filters: int = 16
    ) -> None:
        super().__init__(spatial_dims, num_modalities, num_classes, img_size, stride=8)
        settings = {"spatial_dims": spatial_dims, "init_filters": init_filters, "out_channels": num_classes}
        self.encoders = nn.ModuleList(SegResNet(**settings) for _ in range(num_modalities))
        self.decoder = SegResNet(**settings, use_conv_final=False)
        self.modality_decoder = SegResNet(**settings, use_conv_final=False)
        for encoder in self.encoders:  # only halves of the networks are needed
            del encoder.up_layers, encoder.up_samples, encoder.conv_final
        for decoder in (self.decoder, self.modality_decoder):
            del decoder.convInit, decoder.down_layers
        use_fast_convolutions(self)  # on a CPU

    def encode_modality(self, image: Tensor, modality: int) -> tuple[Tensor, ...]:
        """Maps from fine to coarse, of one sequence alone."""
        _, maps = self.encoders[modality].encode(image)
        return tuple(maps)

    def decode(self, features: Features, presence: Tensor) -> DecoderOutput:
        """Logits from the sequences in `presence`, no logits of coarser levels, and the map before the logits."""
        maps = mean_of_present(features, presence)[::-1]
        last = self.decoder.decode(maps[0], maps)
        return DecoderOutput(self.decoder.conv_final(last), (), last)

    def decode_modality(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Logits from one sequence by the decoder that all share, for the Baseline's regularisation."""
        last = self.modality_decoder.decode(maps[-1], list(maps[::-1]))
        return self.modality_decoder.conv_final(last)
