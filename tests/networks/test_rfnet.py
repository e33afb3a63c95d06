from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from passion_monai.networks import rfnet
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
    for maps in features:
        assert [m.shape for m in maps[:4]] == [(2, 4 * 2**level, *size) for level, size in enumerate(halved)]
    assert [a.shape for a in output.auxiliary] == [(2, 5, *size) for size in halved]
    assert output.logits.shape == (2, 5, *img_size)
    assert output.features.shape == (2, 4, *img_size)


def fusion_example(spatial_dims: int) -> tuple[RegionFusion, dict[int, torch.Tensor], torch.Tensor]:
    """A fusion of 3 modalities and 5 regions at 4 channels; numbers of which no two are equal show mixed-up axes.

    The modality in the middle is absent.
    """
    generator = torch.Generator().manual_seed(0)
    size = (6, 5, 7)[:spatial_dims]
    torch.manual_seed(0)
    fusion = RegionFusion(spatial_dims, 3, 5, channels=4).double()
    features = {m: torch.randn(2, 4, *size, generator=generator, dtype=torch.float64) for m in (0, 2)}
    return fusion, features, 2 * torch.randn(2, 5, *size, generator=generator, dtype=torch.float64)


def fuse(fusion: RegionFusion, features: dict[int, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    projected = [fusion.fuse_modalities.project(y, modality) for modality, y in features.items()]
    return fusion(features, projected, logits)


def regions_explicitly(fusion: RegionFusion, features: dict[int, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """region_k of the fusion's equations one by one, with every modality in every region: [B, K, C, h, w(, d)]."""
    complete = torch.stack([features.get(m, torch.zeros_like(features[0])) for m in range(3)], dim=1)
    probabilities = logits.softmax(dim=1).flatten(2)  # [B, K, V]
    parts = probabilities[:, None, :, None] * complete.flatten(3)[:, :, None]  # [B, M, K, C, V]
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
    return weighed.sum(dim=1).unflatten(3, logits.shape[2:])


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_region_fusion_equals_the_explicit_equations(spatial_dims: int):
    fusion, features, logits = fusion_example(spatial_dims)
    with torch.no_grad():
        found = fusion.project_regions(features, logits)
        regions = regions_explicitly(fusion, features, logits).flatten(1, 2)
    weight = fusion.fuse_regions[0].conv.weight.flatten(1)
    torch.testing.assert_close(found, torch.einsum("oc,bc...->bo...", weight, regions))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_fusion_of_modalities_is_a_convolution_of_them_all(spatial_dims: int):
    fusion, features, _ = fusion_example(spatial_dims)
    first = fusion.fuse_modalities[0]
    complete = torch.cat([features.get(m, torch.zeros_like(features[0])) for m in range(3)], dim=1)
    with torch.no_grad():
        found = fusion.fuse_modalities([fusion.fuse_modalities.project(y, m) for m, y in features.items()])
        expected = fusion.fuse_modalities[2](fusion.fuse_modalities[1](first(complete)))
    torch.testing.assert_close(found, expected)


def test_mixing_of_regions_in_parts_has_the_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rfnet, "VOXELS_AT_ONCE", 3)
    probabilities = torch.rand(2, 2, 7, dtype=torch.float64)
    weights = torch.randn(2, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    voxels = [torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    mixed = rfnet.RegionMixing.apply(probabilities, weights, *voxels)
    expected = torch.einsum("bkv,bvc,bcko->bvo", probabilities, torch.cat(voxels, dim=2), weights)
    torch.testing.assert_close(mixed, expected)
    assert torch.autograd.gradcheck(rfnet.RegionMixing.apply, (probabilities, weights, *voxels))


def test_fusion_of_regions_holds_nothing_larger_than_its_input_and_output():
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

    with Watch(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(rfnet, "VOXELS_AT_ONCE", 16)
        fusion.project_regions(features, logits)
    assert largest == logits.numel()


def test_region_predictions_get_no_gradient_from_the_fusion():
    fusion, features, logits = fusion_example(2)
    logits.requires_grad_()
    for y in features.values():
        y.requires_grad_()
    fuse(fusion, features, logits).square().sum().backward()
    assert logits.grad is None
    assert all(float(y.grad.abs().max()) > 0 for y in features.values())


def test_region_fusion_does_not_overflow_in_half_precision():
    fusion = RegionFusion(2, 2, 2, channels=4)
    features = {0: torch.full((1, 4, 160, 160), 8.0), 1: torch.full((1, 4, 160, 160), 8.0)}
    logits = torch.zeros(1, 2, 160, 160)
    with torch.no_grad():
        expected = fusion.project_regions(features, logits)
        with torch.autocast("cpu", dtype=torch.float16):
            found = fusion.project_regions({m: y.half() for m, y in features.items()}, logits.half())
    torch.testing.assert_close(found, expected)


def test_an_empty_region_stays_finite():
    fusion, features, logits = fusion_example(2)
    logits[:, 0] = -1000  # its probability is exactly 0
    with torch.no_grad():
        assert bool(fuse(fusion, features, logits).isfinite().all())


@pytest.mark.parametrize("width", [0, 6])
def test_width_is_checked(width: int):
    with pytest.raises(ValueError, match=f"width must be a positive multiple of 4, got {width}"):
        RFNet(2, 3, 2, img_size=32, width=width)
