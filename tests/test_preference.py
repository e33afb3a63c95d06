from __future__ import annotations

import pytest
import torch

from passion_monai.preference import epoch_preference, initial_beta, relative_preference, task_mask, update_beta

GAP = torch.tensor([[0.2, 0.4, 0.0, 0.6], [0.3, 9.0, 0.1, 9.0], [9.0, 9.0, 0.7, 9.0], [0.0, 0.0, 9.0, 9.0]])
PRESENCE = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0], [1, 1, 0, 0]]).bool()


def slow_relative_preference(gap: torch.Tensor, presence: torch.Tensor) -> torch.Tensor:
    """Eqs. (9) and (10), one sample and modality at a time."""
    result = torch.zeros_like(gap)
    for n in range(len(gap)):
        there = [m for m in range(gap.shape[1]) if presence[n, m]]
        mean = sum(float(gap[n, m]) for m in there) / len(there)
        for m in there:
            result[n, m] = 0.0 if mean == 0 or len(there) == 1 else 1 - float(gap[n, m]) / mean
    return result


def test_relative_preference_equals_its_equations():
    torch.testing.assert_close(relative_preference(GAP, PRESENCE), slow_relative_preference(GAP, PRESENCE))


def test_relative_preference_by_hand():
    preference = relative_preference(torch.tensor([[0.1, 0.3]]), torch.tensor([[True, True]]))
    torch.testing.assert_close(preference, torch.tensor([[0.5, -0.5]]))


@pytest.mark.parametrize("value", [0.0, 1e-30, 0.1, 1 / 3, 123.456])
def test_relative_preference_of_a_single_modality_is_exactly_zero(value: float):
    preference = relative_preference(torch.tensor([[value, 5.0]]), torch.tensor([[True, False]]))
    assert preference.tolist() == [[0.0, 0.0]]


def test_relative_preference_sums_to_zero_over_a_sample():
    generator = torch.Generator().manual_seed(0)
    gap = torch.rand(50, 4, generator=generator)
    presence = torch.rand(50, 4, generator=generator) > 0.4
    presence[:, 0] |= ~presence.any(dim=1)
    torch.testing.assert_close(relative_preference(gap, presence).sum(dim=1), torch.zeros(50), atol=1e-5, rtol=0)


def test_relative_preference_does_not_read_absent_modalities():
    changed = torch.where(PRESENCE, GAP, torch.nan)
    torch.testing.assert_close(relative_preference(changed, PRESENCE), relative_preference(GAP, PRESENCE))


def test_relative_preference_has_no_gradient():
    gap = GAP.clone().requires_grad_()
    assert not relative_preference(gap, PRESENCE).requires_grad


def test_task_mask_marks_neglected_modalities():
    assert task_mask(torch.tensor([[0.2, -0.1, 0.0]])).tolist() == [[0.0, 1.0, 0.0]]


def test_epoch_preference_divides_by_the_samples_that_have_the_modality():
    preference = relative_preference(GAP, PRESENCE)
    result = epoch_preference(preference.sum(dim=0), PRESENCE.sum(dim=0))
    for m in range(4):
        rows = [float(preference[n, m]) for n in range(4) if PRESENCE[n, m]]
        assert float(result[m]) == pytest.approx(sum(rows) / len(rows), abs=1e-6)


def test_epoch_preference_without_samples_is_zero():
    assert epoch_preference(torch.tensor([0.0, 1.0]), torch.tensor([0, 2])).tolist() == [0.0, 0.5]


def test_initial_beta_is_the_inverse_availability():
    torch.testing.assert_close(initial_beta(PRESENCE), torch.tensor([4 / 3, 4 / 2, 4 / 3, 4 / 1]))


def test_initial_beta_refuses_a_modality_that_is_never_there():
    with pytest.raises(ValueError, match=r"no sample with modality \[1\]"):
        initial_beta(torch.tensor([[True, False], [True, False]]))


def test_update_beta_slows_the_preferred_modality():
    updated = update_beta(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.5, -0.5, 0.0]), 0.01)
    torch.testing.assert_close(updated, torch.tensor([0.995, 2.005, 5.0]))
