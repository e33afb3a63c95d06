"""Layers that are computed in another way than torch's give the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from passion_monai.networks import blocks
from passion_monai.networks.blocks import (
    ConvNormAct,
    ModalityFusion,
    NormActConv,
    conv,
    reflect,
    upsample_logits,
    use_fast_convolutions,
)

CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("padding_mode", ["reflect", "zeros"])
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "kernel_size", "stride", "groups"),
    [
        (1, 8, 3, 1, 1),  # the first of an encoder
        (2, 2, 3, 1, 1),  # narrow, as RFNet's region predictors
        (3, 8, 3, 2, 1),
        (4, 6, 3, 1, 1),  # small for torch's choice of kernel
        (4, 5, 3, 1, 1),
        (4, 8, 3, 2, 1),
        (4, 8, 3, 1, 4),
        (6, 4, 1, 1, 1),
    ],
)
def test_convolutions_are_those_of_torch(
    spatial_dims: int,
    padding_mode: str,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    groups: int,
):
    torch.manual_seed(0)
    layer = conv(
        spatial_dims,
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        groups=groups,
        padding_mode=padding_mode,
    )
    plain = CONVOLUTIONS[spatial_dims](
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        groups=groups,
        padding_mode=padding_mode,
    )
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, in_channels, *(8, 6, 10)[:spatial_dims], requires_grad=True)
    found, expected = layer(x), plain(x)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    ours = torch.autograd.grad(found, [x, *layer.parameters()], gradient)
    theirs = torch.autograd.grad(expected, [x, *plain.parameters()], gradient)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_another_librarys_convolutions_in_fast_forms(spatial_dims: int, with_gradient: bool, batch_size: int):
    torch.manual_seed(0)
    layer, kernel, stride = CONVOLUTIONS[spatial_dims], (1, 3, 5)[:spatial_dims], (1, 2, 2)[:spatial_dims]
    network = nn.Sequential(
        layer(2, 4, kernel, stride, padding=tuple(size // 2 for size in kernel), bias=False),
        nn.Sequential(layer(4, 6, 3, padding=1), nn.LeakyReLU()),
        layer(6, 6, 1, bias=False),
        layer(6, 4, 3, padding=2, dilation=2),  # from here on others than the fast forms
        layer(4, 4, 1, stride=2),
        layer(4, 4, 3),
        layer(4, 4, 3, padding="same"),
    )
    fast = copy.deepcopy(network)
    use_fast_convolutions(fast)
    types = [type(part) for part in fast.modules() if not isinstance(part, nn.Sequential | nn.LeakyReLU)]
    assert types == [blocks.PaddedConv, blocks.PaddedConv, blocks.Pointwise, *[layer] * 4]
    assert {name: value.shape for name, value in fast.state_dict().items()} == {
        name: value.shape for name, value in network.state_dict().items()
    }
    x = torch.randn(batch_size, 2, *(16, 18, 20)[:spatial_dims], requires_grad=True)
    with torch.set_grad_enabled(with_gradient):
        found, expected = fast(x), network(x)
    torch.testing.assert_close(found, expected)
    if with_gradient:
        gradient = torch.randn_like(expected)
        ours = torch.autograd.grad(found, [x, *fast.parameters()], gradient)
        theirs = torch.autograd.grad(expected, [x, *network.parameters()], gradient)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_small_maps_are_given_to_the_fast_kernel():
    """It shows if torch changes which convolutions it gives to oneDNN."""

    def kernels(x: torch.Tensor) -> set[str]:
        layer = conv(3, 64, 64, padding_mode="reflect")
        with torch.profiler.profile() as profile, torch.no_grad():
            layer(x)
        return {event.key for event in profile.key_averages()}

    for edge in (4, 10, 20):
        assert "aten::mkldnn_convolution" in kernels(torch.randn(1, 64, edge, edge, edge))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_norm_is_the_instance_norm_of_torch(spatial_dims: int):
    x = torch.randn(3, 4, *[6] * spatial_dims, dtype=torch.float64) + 5
    torch.testing.assert_close(blocks.instance_norm(x), F.instance_norm(x))


@pytest.mark.parametrize(("shape", "size"), [((2, 3, 4, 5), (8, 10)), ((1, 2, 2, 3, 4), (4, 9, 8))])
def test_upsampling_by_products_is_interpolation(shape: tuple[int, ...], size: tuple[int, ...]):
    x = torch.randn(shape, dtype=torch.float64)
    mode = {2: "bilinear", 3: "trilinear"}[len(size)]
    torch.testing.assert_close(upsample_logits(x, size), F.interpolate(x, size, mode=mode, align_corners=True))


@pytest.mark.parametrize("block", [ConvNormAct, NormActConv])
def test_fusion_by_projections_is_a_convolution_of_all_modalities(block: type[blocks.ConvBlock]):
    torch.manual_seed(0)
    fusion = ModalityFusion(2, 3, 4, 5, 6, block=block).double()
    maps = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    maps[:, 1] = 0  # an absent modality
    expected = fusion[2](fusion[1](fusion[0](maps.flatten(1, 2))))
    found = fusion([fusion.project(maps[:, modality], modality) for modality in (0, 2)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 2, 4, 5, 3)])
@pytest.mark.parametrize("size", [1, 2])
def test_reflected_borders_are_those_of_torch(shape: tuple[int, ...], size: int):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    result, expected = reflect(x, size), F.pad(x, [size] * 2 * (len(shape) - 2), mode="reflect")
    assert torch.equal(result, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((padded * weights).sum(), x)[0] for padded in (result, expected)]
    torch.testing.assert_close(*gradients)
