"""The forms for a CPU give what the plain ones do, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from passion_monai.networks import blocks, cpu

SLOPE = 0.2


def channels_last(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return (3 * torch.randn(shape[0], *shape[2:], shape[1]) + 1).movedim(-1, 1)


def plain_norm_act(x: Tensor) -> Tensor:
    return F.leaky_relu(F.instance_norm(x), SLOPE)


def plain_pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("oc,bc...->bo...", weight.flatten(1), x) + bias.view(-1, *[1] * (x.ndim - 2))


def check(
    fast: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 1e-5
) -> Tensor:
    """Output and gradients against the plain form's in double precision."""
    inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, expected = fast(*inputs), plain(*exact)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    gradient = torch.randn_like(found)
    ours = torch.autograd.grad(found, inputs, gradient)
    theirs = torch.autograd.grad(expected, exact, gradient.double())
    for mine, reference in zip(ours, theirs, strict=True):
        error = (mine - reference).abs().max() / reference.abs().max()
        assert error < 10 * tolerance
    return found


@pytest.mark.parametrize("shape", [(1, 8, 32, 32, 32), (1, 2, 48, 32, 32), (1, 5, 256, 128)])
def test_norm_and_activation_in_one(shape: tuple[int, ...]):
    x = channels_last(*shape)
    assert cpu.can_norm(x)
    check(lambda x: cpu.norm_act(x, SLOPE), plain_norm_act, x)


def test_norm_and_activation_are_exact_for_many_voxels():
    x = channels_last(1, 8, 64, 64, 64)
    exact = plain_norm_act(x.double())
    error = (blocks.NormAct()(x).double() - exact).abs().max()
    assert error < 1e-5


@pytest.mark.parametrize("shape", [(2, 4, 5, 6, 7), (2, 4, 5, 6)])
def test_pointwise(shape: tuple[int, ...]):
    weight = torch.randn(3, 4, *[1] * (len(shape) - 2))
    result = check(cpu.pointwise, plain_pointwise, channels_last(*shape), weight, torch.randn(3))
    assert result.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 2, 4, 5, 3)])
def test_reflect(shape: tuple[int, ...], size: int):
    plain = lambda x: F.pad(x, [size] * 2 * (len(shape) - 2), mode="reflect")  # noqa: E731
    result = check(lambda x: cpu.reflect(x, size), plain, channels_last(*shape))
    assert result.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("padding_mode", ["reflect", "zeros"])
@pytest.mark.parametrize(("channels", "stride", "groups"), [(1, 1, 1), (2, 1, 1), (4, 2, 1), (4, 1, 4)])
@pytest.mark.parametrize("shape", [(2, 6, 8, 10), (1, 6, 8)])
def test_convolution_is_the_same_without_a_gradient(
    shape: tuple[int, ...], channels: int, stride: int, groups: int, padding_mode: str
):
    torch.manual_seed(0)
    spatial_dims = len(shape) - 1
    layer = blocks.conv(spatial_dims, channels, 8, stride=stride, groups=groups, padding_mode=padding_mode)
    x = torch.randn(shape[0], channels, *shape[1:], *[6] * (spatial_dims - len(shape[1:])))
    with torch.no_grad():
        found = layer(x)
    torch.testing.assert_close(found, layer(x).detach(), rtol=1e-5, atol=1e-5)
    assert found.movedim(1, -1).is_contiguous()


def test_other_precisions_and_autocast_take_the_plain_form():
    x = channels_last(1, 4, 32, 32, 32)
    assert cpu.applies(x)
    assert not cpu.applies(x.double())
    assert not cpu.applies(x, x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu.applies(x)


def test_maps_of_another_order_are_not_normed_in_groups():
    x = channels_last(1, 4, 32, 32, 32)
    assert not cpu.can_norm(x.contiguous())
    assert not cpu.can_norm(x[..., :16])
    assert not cpu.can_norm(channels_last(1, 4, 33, 33, 33))


def test_small_maps_are_left_to_torch():
    weight = torch.randn(4, 8, 1, 1, 1)
    small, large = channels_last(1, 8, 16, 16, 16), channels_last(1, 8, 48, 48, 48)
    for takes in (cpu.can_norm, cpu.can_reflect, lambda x: cpu.can_multiply(x, weight)):
        assert takes(large)
        assert not takes(small)
        assert not takes(large.to("meta"))


def test_borders_and_norms_are_fast_beside_half_precision_too():
    x = channels_last(1, 2, 48, 48, 48)
    assert cpu.can_reflect(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu.can_norm(x)
        assert not cpu.can_norm(x.bfloat16())
        check(lambda x: cpu.norm_act(x, SLOPE), plain_norm_act, x)
