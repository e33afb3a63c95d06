from __future__ import annotations

import pytest
import torch

from passion_monai.networks import FusionUNet

FUSIONS = ("mean_variance", "gated")
# Two samples: the first has all three modalities, the second the first and the last.
PRESENCE = torch.tensor([[True, True, True], [True, False, True]])


def build(fusion: str = "mean_variance", **settings: object) -> FusionUNet:
    torch.manual_seed(0)
    return FusionUNet(2, num_modalities=3, num_classes=4, img_size=32, width=4, fusion=fusion, **settings).double()


def fused_by_hand(network: FusionUNet, image: torch.Tensor, sample: int, level: int) -> torch.Tensor:
    """What is fused at a level, voxel by voxel, from the modalities of one sample."""
    modalities = [m for m in range(3) if PRESENCE[sample, m]]
    encoded = {m: network.encode_modality(image[sample : sample + 1, m : m + 1], m) for m in modalities}
    maps = torch.stack([encoded[m][level][0] for m in modalities])
    if not len(network.gates):
        return torch.cat([maps.mean(dim=0), maps.var(dim=0)])
    gates = [torch.exp(encoded[m][network.levels + level][0]) for m in modalities]
    return sum(gate * x for gate, x in zip(gates, maps, strict=True)) / sum(gates)


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_fusion_is_over_the_modalities_present_alone(fusion: str) -> None:
    network, image = build(fusion), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    seen: dict[int, torch.Tensor] = {}
    for level, block in enumerate(network.fusions):
        block.register_forward_pre_hook(lambda _, inputs, level=level: seen.__setitem__(level, inputs[0]))
    network(image, PRESENCE)
    for sample in range(2):
        for level in range(network.levels):
            expected = fused_by_hand(network, image, sample, level)
            torch.testing.assert_close(seen[level][sample], expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_single_modality_has_no_variance() -> None:
    network, seen = build(), []
    network.fusions[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(torch.randn(1, 3, 32, 32, dtype=torch.float64), torch.tensor([[False, True, False]]))
    mean, variance = seen[0].chunk(2, dim=1)
    assert float(mean.abs().max()) > 0
    assert not variance.any()


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("residual", [False, True])
@torch.no_grad()
def test_it_takes_images_larger_than_its_crop(fusion: str, residual: bool) -> None:
    """Far from the borders of a window nothing depends on where they are, but for the norms over it."""
    network = build(fusion, residual=residual)
    assert network(torch.randn(1, 3, 64, 48, dtype=torch.float64)).shape == (1, 4, 64, 48)


@torch.no_grad()
def test_strides_and_kernels_follow_thick_slices() -> None:
    network = FusionUNet(
        3,
        num_modalities=2,
        num_classes=3,
        img_size=(32, 32, 4),
        width=4,
        strides=[(2, 2, 1), (2, 2, 1), 2],
        kernel_sizes=[(3, 3, 1), (3, 3, 1), 3, 3],
    )
    output = network.decode(*encoded(network, torch.randn(1, 2, 32, 32, 4)))
    assert output.logits.shape == (1, 3, 32, 32, 4)
    assert [tuple(level.shape[2:]) for level in output.auxiliary] == [(16, 16, 4), (8, 8, 4)]
    with pytest.raises(ValueError, match=r"multiples of \(8, 8, 2\), at least \(16, 16, 4\), got \(32, 32, 5\)"):
        network(torch.zeros(1, 2, 32, 32, 5))


def encoded(network: FusionUNet, image: torch.Tensor) -> tuple[tuple, torch.Tensor]:
    presence = torch.ones(1, network.num_modalities, dtype=torch.bool)
    return network.encode(image, presence), presence


def test_widths_end_where_those_of_nnu_net_do() -> None:
    network = FusionUNet(3, num_modalities=1, num_classes=2, img_size=64, strides=(2,) * 5)
    widths = [len(block.conv1.conv.weight) for block in network.encoders[0]]
    assert widths == [32, 64, 128, 256, 320, 320]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusion": "sum"}, r"fusion must be one of \('mean_variance', 'gated'\), got 'sum'"),
        ({"kernel_sizes": [3, 3]}, r"one for each of 5 levels, got \[3, 3\]"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusionUNet(2, num_modalities=2, num_classes=2, img_size=32, **settings)
