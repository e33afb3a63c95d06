"""Layers on maps with the channels last, computed in forms that are faster on a CPU than torch's.

What torch offers goes through such a map of few channels once too often, or through it channel by channel. Each
function here gives the numbers of the plain form in its first line, forward and backward; :func:`applies` and the
functions `can_...` say where it may be used. Small maps are left to torch, which needs fewer calls for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "applies",
    "can_multiply",
    "can_norm",
    "can_reflect",
    "convolve",
    "is_exporting",
    "norm_act",
    "pointwise",
    "reflect",
]

GROUPS = 32
"""Parts of a map whose statistics are taken side by side: one row of a product of so many times the channels."""
MIN_VOXELS = 2**15
"""Maps with fewer voxels than this gain nothing from :func:`norm_act` and :func:`pointwise`."""
MIN_REFLECTED_VOXELS = 2**16
"""Likewise of :func:`reflect`."""
EPS = 1e-5


def is_exporting() -> bool:
    """Whether a network is being traced for TorchScript or exported for ONNX."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def applies(*tensors: Tensor) -> bool:
    """Whether the tensors are float32 on a CPU with oneDNN, and no graph of torch's own layers is being made."""
    in_float32 = all(tensor.dtype == torch.float32 for tensor in tensors)
    return in_float32 and not torch.is_autocast_enabled("cpu") and _is_eager_on_cpu(*tensors)


def _is_eager_on_cpu(*tensors: Tensor) -> bool:
    return (
        all(tensor.device.type == "cpu" for tensor in tensors)
        and not torch.compiler.is_compiling()
        and not is_exporting()
        and torch.backends.mkldnn.is_available()
    )


def can_multiply(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`pointwise` takes the map: a large one."""
    return x.ndim > 3 and _voxels(x) >= MIN_VOXELS and applies(x, weight)


def can_reflect(x: Tensor) -> bool:
    """Whether :func:`reflect` takes the map: a large one, in any precision."""
    return _voxels(x) >= MIN_REFLECTED_VOXELS and _is_eager_on_cpu(x)


def can_norm(x: Tensor) -> bool:
    """Whether :func:`norm_act` takes the map: a large float32 one that has the channels last."""
    voxels = _voxels(x)
    is_right = x.dtype == torch.float32 and voxels >= MIN_VOXELS and voxels % GROUPS == 0
    return is_right and _is_eager_on_cpu(x) and x.movedim(1, -1).is_contiguous()


def _voxels(x: Tensor) -> int:
    return math.prod(x.shape[2:])


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """``F.conv3d(x, weight, bias, stride, padding, groups=groups)``, or in 2-D, by oneDNN.

    torch gives some convolutions, those of small maps, of one thread and a kernel of 1, to kernels of its own that take
    two to five times longer. It would do so with the gradients of this one too: it pays only without them.
    """
    return torch.mkldnn_convolution(x, weight, bias, padding, stride, [1] * len(stride), groups)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)`` of a map in 2-D or 3-D.

    The library behind `F.linear` takes up to five times longer for a product of many voxels and few channels.
    """
    return _Pointwise.apply(x, weight.flatten(1), bias)


def reflect(x: Tensor, size: int) -> Tensor:
    """``F.pad(x, [size] * 2 * spatial_dims, mode="reflect")``, in about half the time."""
    return _Reflect.apply(x, size)


def norm_act(x: Tensor, negative_slope: float) -> Tensor:
    """``F.leaky_relu(F.instance_norm(x), negative_slope)`` of [1, C, ...], keeping nothing but its output for backward.

    Mean and variance are those of 32 parts of the map, which are then joined: forward it is faster, and much so for 2
    or 4 channels. It is also exact to the last digits, where torch's batch norm of a map with the channels last, which
    adds up the voxels one by one, is off by 5e-4 of a standard deviation for 80^3 voxels.
    """
    return _NormAct.apply(x, negative_slope)


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        gradient = gradient.movedim(1, -1).contiguous().movedim(-1, 1)
        columns = gradient.movedim(1, -1).flatten(0, -2)
        return (
            _product(gradient, weight.T, None) if to_x else None,
            columns.T @ x.movedim(1, -1).flatten(0, -2) if to_weight else None,
            columns.sum(dim=0) if to_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    ones = [1] * (x.ndim - 2)
    return convolve(x, weight.reshape(*weight.shape, *ones), bias, stride=ones, padding=[0] * len(ones))


class _Reflect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        lengths = [length + 2 * size for length in x.shape[2:]]
        out = x.new_empty(len(x), *lengths, x.shape[1]).movedim(-1, 1)
        _inner(out, size).copy_(x)
        for axis in reversed(range(2, x.ndim)):  # the borders of the first axes overwrite what was not set yet
            for border, source in _borders(out.shape[axis], size):
                out.select(axis, border).copy_(out.select(axis, source))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _fold(gradient, ctx.size, 2), None


def _fold(gradient: Tensor, size: int, axis: int) -> Tensor:
    """A padded map without its borders along an axis and those after it, which are added to what they mirror."""
    if axis == gradient.ndim:
        return gradient.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
    length = gradient.shape[axis]
    folded = _fold(gradient.narrow(axis, size, length - 2 * size), size, axis + 1)
    for border, source in _borders(length, size):
        folded.narrow(axis, source - size, 1).add_(_fold(gradient.narrow(axis, border, 1), size, axis + 1))
    return folded


def _inner(x: Tensor, size: int) -> Tensor:
    for axis in range(2, x.ndim):
        x = x.narrow(axis, size, x.shape[axis] - 2 * size)
    return x


def _borders(length: int, size: int) -> list[tuple[int, int]]:
    """Places along an axis of a padded map that lie in its borders, and those that they mirror."""
    before = [(place, 2 * size - place) for place in range(size)]
    return before + [(length - 1 - border, length - 1 - source) for border, source in before]


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, negative_slope: float) -> Tensor:
        channels = x.shape[1]
        rows = _rows(x)
        means, variances = (
            part.view(GROUPS, channels) for part in torch.batch_norm_update_stats(rows, None, None, momentum=0.0)
        )
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        rows = F.batch_norm(rows, mean.repeat(GROUPS), variance.repeat(GROUPS), eps=EPS)
        out = _map(F.leaky_relu_(rows, negative_slope), x.shape)
        ctx.save_for_backward(out, (variance + EPS).rsqrt())
        ctx.negative_slope = negative_slope
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        out, inverse_deviation = ctx.saved_tensors
        activated = _rows(out)
        gradient = torch.ops.aten.leaky_relu_backward(_rows(gradient), activated, ctx.negative_slope, True)
        normalised = F.leaky_relu(activated, 1 / ctx.negative_slope)
        # d x = (g - mean(g) - normalised * mean(g * normalised)) / deviation
        factor = inverse_deviation.repeat(GROUPS)
        to_mean, to_deviation = (-factor * _mean(part) / len(gradient) for part in _sums(gradient, normalised))
        return _map(torch.addcmul(to_mean, normalised, to_deviation).addcmul_(gradient, factor), out.shape), None


def _sums(gradient: Tensor, normalised: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows of g and of g * normalised, [GROUPS * C] each: what the weights of a norm would get as gradients."""
    zeros, ones = normalised.new_zeros(normalised.shape[1]), normalised.new_ones(normalised.shape[1])
    backward = torch.ops.aten.native_batch_norm_backward
    _, product, plain = backward(gradient, normalised, None, zeros, ones, None, None, False, 0.0, [False, True, True])
    return plain, product


def _mean(values: Tensor) -> Tensor:
    """The mean of the groups of [GROUPS * C], for each of them."""
    return values.view(GROUPS, -1).mean(dim=0).repeat(GROUPS)


def _rows(x: Tensor) -> Tensor:
    """[1, C, ...] as [voxels / GROUPS, GROUPS * C]."""
    return x.movedim(1, -1).reshape(-1, GROUPS * x.shape[1])


def _map(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """[voxels / GROUPS, GROUPS * C] as [1, C, ...]."""
    return rows.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
