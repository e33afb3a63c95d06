from __future__ import annotations

import pytest
import torch

from passion_monai.networks.base import masked_features, mean_of_present


def test_maps_are_zero_for_the_samples_that_lack_a_modality_and_left_out_where_all_do():
    """Three samples and modalities: all have the first, two the second, none the third."""
    features = [(torch.rand(3, 2, 4) + 1, torch.rand(3, 1, 2) + 1) for _ in range(3)]
    presence = torch.tensor([[True, True, False], [True, False, False], [True, True, False]])
    present = masked_features(features, presence)
    assert set(present) == {0, 1}
    assert all(map_ is given for map_, given in zip(present[0], features[0], strict=True))  # nothing is copied
    for map_, given in zip(present[1], features[1], strict=True):
        assert torch.equal(map_[0], given[0])
        assert not map_[1].any()
        assert torch.equal(map_[2], given[2])


def test_nothing_not_even_nan_comes_from_a_sample_that_lacks_a_modality():
    maps = (torch.full((2, 3, 4), torch.nan),)
    (masked,) = masked_features([maps], torch.tensor([[True], [False]]))[0]
    assert masked[0].isnan().all()
    assert not masked[1].any()


def test_a_modality_that_was_not_encoded_is_named():
    with pytest.raises(ValueError, match="modality 1, which was not encoded"):
        masked_features([(torch.zeros(1, 1),), None], torch.tensor([[True, True]]))


def test_the_mean_is_over_the_modalities_that_a_sample_has():
    features = [(torch.rand(2, 3, 4), torch.rand(2, 2, 2)) for _ in range(3)]
    presence = torch.tensor([[True, True, False], [False, True, False]])
    for level, mean in enumerate(mean_of_present(features, presence)):
        torch.testing.assert_close(mean[0], (features[0][level][0] + features[1][level][0]) / 2)
        torch.testing.assert_close(mean[1], features[1][level][1])
