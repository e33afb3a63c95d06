"""Relative preference, and the coefficients beta that follow from it, as pure functions.

Source: J. Shi et al., "PASSION", ACM MM 2024, https://doi.org/10.1145/3664647.3681543, Sec. 3.3. Everywhere N is the
number of samples, M the number of modalities and C (`presence`) the bool presence matrix [N, M].
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "epoch_preference",
    "gap_preference",
    "initial_beta",
    "relative_preference",
    "rescale_beta",
    "task_mask",
    "update_beta",
]


def relative_preference(gap: Tensor, presence: Tensor) -> Tensor:
    """How much the teacher prefers each modality of a sample, Eqs. (9) and (10).

    ``mean_gap = sum_m(presence * gap) / sum_m(presence)``, ``relative_preference = 1 - gap / mean_gap`` where present,
    else 0. Positive: preferred. Negative: neglected. It is 0 for a sample with one modality, and where all gaps are 0.

    Args:
        gap: semantic gap D of Eq. (7), [N, M], not negative; entries of absent modalities are not read.
        presence: bool [N, M], at least one True per row.

    Returns:
        [N, M], without gradient.
    """
    gap = torch.where(presence, gap.detach(), 0)
    mean_gap = gap.sum(dim=1, keepdim=True) / presence.sum(dim=1, keepdim=True)
    # With one modality the ratio is 1 but for rounding; the paper wants exactly 0 there.
    comparable = presence & (mean_gap > 0) & (presence.sum(dim=1, keepdim=True) > 1)
    return torch.where(comparable, 1 - gap / mean_gap.clamp_min(torch.finfo(gap.dtype).tiny), 0)


def task_mask(preference: Tensor) -> Tensor:
    """Delta of Eq. (11): 1.0 where a modality is neglected (negative relative preference), else 0.0. Same shape."""
    return (preference < 0).to(preference.dtype)


def epoch_preference(preference_sum: Tensor, sample_count: Tensor) -> Tensor:
    """Mean relative preference of an epoch, Eq. (12).

    Args:
        preference_sum: sum over samples of the relative preference, [M].
        sample_count: number of samples that had each modality, [M]; a modality that none had gets 0.
    """
    return torch.where(sample_count > 0, preference_sum / sample_count.clamp_min(1), 0)


def gap_preference(gap_sum: Tensor, sample_count: Tensor) -> Tensor:
    """Preference of an epoch as the authors' code has it, instead of Eq. (12): from the mean gaps of the epoch.

    ``1 - mean_gap_m / mean over modalities of mean_gap``; a modality that no sample had is left out and gets 0.

    Args:
        gap_sum: sum over samples of the semantic gap D of Eq. (7), [M].
        sample_count: number of samples that had each modality, [M].
    """
    seen = sample_count > 0
    mean_gap = torch.where(seen, gap_sum / sample_count.clamp_min(1), 0)
    overall = mean_gap.sum() / seen.sum().clamp_min(1)
    return torch.where(seen & (overall > 0), 1 - mean_gap / overall.clamp_min(torch.finfo(mean_gap.dtype).tiny), 0)


def rescale_beta(beta: Tensor, limits: tuple[float, float]) -> Tensor:
    """Clamp beta [M] to `limits`, then scale it to the L2 norm of M ones, as the authors' code does after an update."""
    clamped = beta.clamp(*limits)
    scale: Tensor = len(beta) ** 0.5 / torch.linalg.vector_norm(clamped)
    return clamped * scale


def initial_beta(presence: Tensor) -> Tensor:
    """Starting coefficients ``beta_m = N / sum_n C[n, m]``, float32 [M], from the presence matrix of the training set.

    Raises:
        ValueError: when no sample has a modality, whose missing rate would be 1.
    """
    presence = torch.as_tensor(presence, dtype=torch.bool)
    counts = presence.sum(dim=0)
    if not bool((counts > 0).all()):
        never = [index for index, count in enumerate(counts.tolist()) if count == 0]
        raise ValueError(f"presence has no sample with modality {never}; every modality needs at least one sample.")
    return len(presence) / counts.float()


def update_beta(beta: Tensor, preference: Tensor, gamma: float = 0.01) -> Tensor:
    """One step of Eq. (13), ``beta - gamma * epoch_preference``: slows preferred modalities, pushes neglected ones.

    Args:
        beta: coefficients [M].
        preference: mean relative preference of the epoch, Eq. (12), [M].
        gamma: updating rate (0.01 in the paper).
    """
    return beta - gamma * preference.to(beta)
