from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from passion_monai.networks.rfnet import RegionFusion, RFNet


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_are_those_of_the_authors_network():
    network = RFNet(3, num_modalities=4, num_classes=4, img_size=80)
    decoder = network.fusion_decoder
    assert [count(encoder) for encoder in network.encoders] == [366_912] * 4
    assert [count(p) for p in decoder.predictors] == [540, 1_372, 4_164, 13_236]
    assert [count(f) for f in decoder.fusions] == [23_544, 52_064, 133_296, 392_528]
    assert [count(r) for r in decoder.reductions] == [3_464, 13_840, 55_328]
    assert [[count(layer) for layer in merge] for merge in decoder.merges] == [
        [3_464, 72],
        [13_840, 272],
        [55_328, 1_056],
    ]
    assert count(decoder.head) == 36
    assert count(decoder) == 767_444
    assert count(network.modality_decoder) == 146_700
    assert count(network) == 2_381_792


def test_parameter_count_of_the_original_width():
    assert count(RFNet(3, num_modalities=4, num_classes=4, img_size=80, width=16)) == 8_984_960


@pytest.mark.parametrize(("spatial_dims", "img_size"), [(2, (16, 40)), (3, (16, 24, 16))])
def test_levels_and_their_sizes(spatial_dims: int, img_size: tuple[int, ...]):
    network = RFNet(spatial_dims, 3, 5, img_size=img_size, width=4)
    presence = torch.tensor([[True, False, True], [False, True, False]])
    with torch.no_grad():
        features = network.encode(torch.randn(2, 3, *img_size), presence)
        output = network.decode(features, presence)
    halved = [tuple(size // factor for size in img_size) for factor in (1, 2, 4, 8)]
    assert [f.shape for f in features] == [(2, 3, 4 * 2**level, *size) for level, size in enumerate(halved)]
    assert [a.shape for a in output.auxiliary] == [(2, 5, *size) for size in halved]
    assert output.logits.shape == (2, 5, *img_size)
    assert output.features.shape == (2, 4, *img_size)


def fusion_example(spatial_dims: int) -> tuple[RegionFusion, torch.Tensor, torch.Tensor]:
    """A fusion of 3 modalities and 5 regions at 4 channels; numbers of which no two are equal show mixed-up axes."""
    generator = torch.Generator().manual_seed(0)
    size = (6, 5, 7)[:spatial_dims]
    torch.manual_seed(0)
    fusion = RegionFusion(spatial_dims, 3, 5, channels=4)
    features = torch.randn(2, 3, 4, *size, generator=generator)
    features[1, 1] = 0  # an absent modality
    return fusion, features, 2 * torch.randn(2, 5, *size, generator=generator)


def weigh_explicitly(fusion: RegionFusion, features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The fusion's equations one by one, with every modality in every region: [B, M, K, C, V]."""
    probabilities = logits.softmax(dim=1).flatten(2)  # [B, K, V]
    parts = probabilities[:, None, :, None] * features.flatten(3)[:, :, None]  # [B, M, K, C, V]
    share = probabilities.mean(dim=2) + 1e-7
    weighed = torch.zeros_like(parts)
    for sample in range(len(parts)):
        for region, mlp in enumerate(fusion.weightings):
            pooled = [parts[sample, m, region].mean(dim=1) / share[sample, region] for m in range(parts.shape[1])]
            hidden, _, out, _ = mlp
            x = torch.cat([*pooled, share[sample, region][None]])
            x = nn.functional.leaky_relu(hidden.weight.flatten(1) @ x + hidden.bias, 0.2)
            weights = torch.sigmoid(out.weight.flatten(1) @ x + out.bias)
            weighed[sample, :, region] = weights[:, None, None] * parts[sample, :, region]
    return weighed.sum(dim=1).unflatten(3, features.shape[3:])


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_region_fusion_equals_the_explicit_equations(spatial_dims: int):
    fusion, features, logits = fusion_example(spatial_dims)
    with torch.no_grad():
        lean, explicit = fusion.weigh_regions(features, logits), weigh_explicitly(fusion, features, logits)
        fused = fusion(features, logits)
        halves = fusion.fuse_regions(explicit.flatten(1, 2)), fusion.fuse_modalities(features.flatten(1, 2))
    torch.testing.assert_close(lean, explicit)
    torch.testing.assert_close(fused, torch.cat(halves, dim=1))


def test_region_fusion_holds_nothing_larger_than_its_input_and_output():
    fusion, features, logits = fusion_example(3)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        regions = fusion.weigh_regions(features, logits)
    assert largest == max(regions.numel(), features.numel())


def test_region_predictions_get_no_gradient_from_the_fusion():
    fusion, features, logits = fusion_example(2)
    features.requires_grad_()
    logits.requires_grad_()
    fusion(features, logits).square().sum().backward()
    assert logits.grad is None
    assert features.grad is not None
    assert float(features.grad.abs().max()) > 0


def test_region_fusion_does_not_overflow_in_half_precision():
    fusion = RegionFusion(2, 2, 2, channels=4)
    features, logits = torch.full((1, 2, 4, 160, 160), 8.0), torch.zeros(1, 2, 160, 160)
    with torch.no_grad():
        expected = fusion.weigh_regions(features, logits)
        with torch.autocast("cpu", dtype=torch.float16):
            found = fusion.weigh_regions(features.half(), logits.half())
    torch.testing.assert_close(found, expected)


def test_an_empty_region_stays_finite():
    fusion, features, logits = fusion_example(2)
    logits[:, 0] = -1000  # its probability is exactly 0
    with torch.no_grad():
        regions = fusion.weigh_regions(features, logits)
    assert bool(regions.isfinite().all())
    assert float(regions[:, 0].abs().max()) == 0


@pytest.mark.parametrize("width", [0, 6])
def test_width_is_checked(width: int):
    with pytest.raises(ValueError, match=f"width must be a positive multiple of 4, got {width}"):
        RFNet(2, 3, 2, img_size=32, width=width)
