from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from passion_monai.distillation import SelfDistillation
from passion_monai.losses import PMRLoss, TaskLoss
from passion_monai.losses.pmr import prototype_scores
from passion_monai.losses.prototype import one_hot_label
from passion_monai.networks import MMFormer

PRESENCE = torch.tensor([[True, True, True], [False, True, True], [False, False, True]])


def slow_score_and_dce(features: Tensor, label: Tensor) -> tuple[float, float]:
    """Of one sample, voxel by voxel: features [C, ...], label [...]."""
    voxels, target = features.flatten(1).T.tolist(), label.flatten().tolist()
    classes = sorted(set(target))
    members = {k: [voxel for voxel, y in zip(voxels, target, strict=True) if y == k] for k in classes}
    prototypes = {k: [sum(channel) / len(members[k]) for channel in zip(*members[k], strict=True)] for k in classes}
    own = {k: [] for k in classes}
    for voxel, y in zip(voxels, target, strict=True):
        weights = {k: math.exp(-math.dist(voxel, prototypes[k])) for k in classes}
        own[y].append(weights[y] / sum(weights.values()))
    score = sum(sum(p) / len(p) for p in own.values()) / len(classes)
    dce = sum(sum(-math.log(q) for q in p) / len(p) for p in own.values()) / len(classes)
    return score, dce


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 5)])
@pytest.mark.parametrize("absent_class", [None, 0, 2])
def test_score_and_dce_equal_the_explicit_version(shape: tuple[int, ...], absent_class: int | None):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, *shape, generator=generator)
    label = torch.randint(3, (2, 1, *shape), generator=generator)
    if absent_class is not None:
        label[0][label[0] == absent_class] = 1
    expected = torch.tensor([slow_score_and_dce(features[n], label[n]) for n in range(2)])
    score, dce = prototype_scores(features, one_hot_label(label, 3, torch.float32))
    torch.testing.assert_close(torch.stack([score, dce], dim=1), expected)


def test_score_and_dce_do_not_depend_on_where_the_features_lie():
    """Distances are of differences: of features far from 0 too, and not only exact where there are few voxels."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 6, 6, generator=generator)
    one_hot = one_hot_label(torch.randint(3, (2, 1, 6, 6), generator=generator), 3, torch.float32)
    shifted = prototype_scores(features + 1000, one_hot)
    torch.testing.assert_close(shifted, prototype_scores(features, one_hot), rtol=1e-3, atol=1e-3)


def test_gradients_of_the_dce_are_exact():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 3, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    one_hot = one_hot_label(torch.randint(2, (1, 1, 3, 4), generator=generator), 2, torch.float64)
    prototypes = prototype_scores(features, one_hot)  # prototypes are constants: compare with ones that are
    (gradient,) = torch.autograd.grad(prototypes[1].sum(), features)
    fixed = (one_hot @ features.detach().movedim(1, -1).flatten(1, 2)) / one_hot.sum(dim=2, keepdim=True)
    distances = torch.cdist(features.movedim(1, -1).flatten(1, 2), fixed)
    log_own = ((-distances).log_softmax(dim=2) * one_hot.mT).sum(dim=2)
    dce = -((log_own @ one_hot.mT) / one_hot.sum(dim=2)).mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(dce, features)[0])


def test_only_modalities_below_the_mean_score_are_pushed():
    torch.manual_seed(0)
    network = MMFormer(2, 3, 3, img_size=32, width=2, token_channels=8, num_heads=2, mlp_channels=8).eval()
    image, label = torch.randn(3, 3, 32, 32), torch.randint(3, (3, 1, 32, 32))
    output = SelfDistillation(network, own_predictions="all")(image, PRESENCE)
    loss = PMRLoss(3, lambda_dce=0.7)
    total = loss(output, label)
    score, dce = loss.terms["prototype_score"], loss.terms["loss_dce"]
    expected = TaskLoss()(output, label)
    for n, m in [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)]:
        if score[n, m] < score[n].nanmean():
            expected = expected + 0.7 * dce[n, m] / 3
    torch.testing.assert_close(total, expected)
    # A sample with one modality has nothing to be compared with.
    assert score.isnan().tolist() == [[False] * 3, [True, False, False], [True] * 3]
    assert 0 < int((score < score.nanmean(dim=1, keepdim=True)).sum()) < 5
