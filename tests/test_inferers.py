from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from passion_monai.inferers import CombinationInferer, EnsembleInferer, PresenceInferer
from passion_monai.networks import MMFormer
from passion_monai.networks.checkpoints import WeightsLoader
from passion_monai.presence import combinations

WINDOWS = {"roi_size": (32, 32), "overlap": 0.5}


@pytest.fixture(scope="module")
def network() -> MMFormer:
    torch.manual_seed(0)
    return MMFormer(2, 3, 3, img_size=32, width=2, token_channels=8, num_heads=2, mlp_channels=8).eval().double()


def volumes(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, 50, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def slow_probabilities(network: MMFormer, image: torch.Tensor, presence: torch.Tensor) -> torch.Tensor:
    """Softmax of windows of 32 at every 16 voxels and at the end, averaged voxel by voxel."""
    total = torch.zeros(1, 3, 50, 40, dtype=torch.float64)
    count = torch.zeros(1, 1, 50, 40, dtype=torch.float64)
    for x in (0, 16, 18):
        for y in (0, 8):
            window = (slice(None), slice(None), slice(x, x + 32), slice(y, y + 32))
            total[window] += network(image[window], presence).float().softmax(dim=1)
            count[window] += 1
    return total / count


@torch.no_grad()
@pytest.mark.parametrize("sw_batch_size", [1, 4])
def test_presence_goes_with_all_windows_of_its_volume(network: MMFormer, sw_batch_size: int):
    image, presence = volumes(2), torch.tensor([[True, False, True], [False, True, False]])
    result = PresenceInferer(sw_batch_size=sw_batch_size, **WINDOWS)(image, network, presence)
    for n in range(2):
        expected = slow_probabilities(network, image[n : n + 1], presence[n : n + 1])
        torch.testing.assert_close(result[n : n + 1], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_every_combination_equals_its_own_inference(network: MMFormer):
    image, presence = volumes(), torch.ones(1, 3, dtype=torch.bool)
    result = CombinationInferer(num_modalities=3, sw_batch_size=4, **WINDOWS)(image, network, presence)
    assert result.shape == (1, 7, 3, 50, 40)
    for index, combination in enumerate(torch.from_numpy(combinations(3))):
        expected = slow_probabilities(network, image, combination[None])
        torch.testing.assert_close(result[:, index], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_combinations_with_a_missing_modality_are_nan(network: MMFormer):
    image, presence = volumes(), torch.tensor([[True, False, True]])
    image[:, 1] = torch.nan
    result = CombinationInferer(num_modalities=3, **WINDOWS)(image, network, presence)
    needs_the_missing = torch.from_numpy(combinations(3))[:, 1]
    assert result[0].isnan().flatten(1).all(dim=1).tolist() == needs_the_missing.tolist()
    assert result[0].isnan().flatten(1).any(dim=1).tolist() == needs_the_missing.tolist()


@torch.no_grad()
def test_a_selection_of_combinations_is_the_same_of_all(network: MMFormer):
    image, presence = volumes(), torch.tensor([[True, True, True], [True, False, True]])
    every = CombinationInferer(num_modalities=3, **WINDOWS)(image, network, presence)
    some = CombinationInferer(num_modalities=3, selection="single_and_complete", **WINDOWS)(image, network, presence)
    selected = torch.from_numpy(combinations(3).sum(axis=1) != 2)
    torch.testing.assert_close(some[:, selected], every[:, selected], rtol=0, atol=0, equal_nan=True)
    assert some[:, ~selected].isnan().all()


@torch.no_grad()
def test_windows_are_encoded_once(network: MMFormer, monkeypatch: pytest.MonkeyPatch):
    calls = []
    encode = network.encode
    monkeypatch.setattr(network, "encode", lambda *args: calls.append(1) or encode(*args))
    CombinationInferer(num_modalities=3, **WINDOWS)(volumes(), network, torch.ones(1, 3, dtype=torch.bool))
    assert len(calls) == 6


def test_a_volume_smaller_than_the_window_keeps_its_size(network: MMFormer):
    with torch.no_grad():
        result = PresenceInferer(**WINDOWS)(volumes()[..., :20, :25], network, torch.ones(1, 3, dtype=torch.bool))
    assert result.shape == (1, 3, 20, 25)
    torch.testing.assert_close(result.sum(dim=1), torch.ones(1, 20, 25, dtype=torch.float64))


@torch.no_grad()
@pytest.mark.parametrize("sw_batch_size", [1, 5])
def test_a_network_in_2d_predicts_a_volume_slice_by_slice(network: MMFormer, sw_batch_size: int):
    slices, presence = volumes(3), torch.tensor([[True, False, True]])
    volume = slices.movedim(0, -1)[None]
    result = PresenceInferer(sw_batch_size=sw_batch_size, **WINDOWS)(volume, network, presence)
    assert result.shape == (1, 3, 50, 40, 3)
    for n in range(3):
        expected = slow_probabilities(network, slices[n : n + 1], presence)
        torch.testing.assert_close(result[..., n], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_combinations_of_a_volume_slice_by_slice(network: MMFormer):
    slices, presence = volumes(2), torch.ones(1, 3, dtype=torch.bool)
    inferer = CombinationInferer(num_modalities=3, sw_batch_size=4, **WINDOWS)
    result = inferer(slices.movedim(0, -1)[None], network, presence)
    for n in range(2):
        torch.testing.assert_close(result[..., n], inferer(slices[n : n + 1], network, presence))


@torch.no_grad()
def test_without_presence_a_channel_of_zeros_is_missing(network: MMFormer):
    """As the inference task of MONAI Label calls an inferer."""
    image, presence = volumes(2), torch.tensor([[True, False, True], [True, True, True]])
    image[0, 1] = 0
    inferer = PresenceInferer(**WINDOWS)
    torch.testing.assert_close(inferer(image, network), inferer(image, network, presence), rtol=0, atol=0)


@torch.no_grad()
def test_flips_are_averaged(network: MMFormer):
    image, presence = volumes()[..., :32, :32], torch.tensor([[True, False, True]])
    plain, flipping = PresenceInferer(**WINDOWS), PresenceInferer(flip_axes=(0, 1), **WINDOWS)
    axes = ([], [2], [3], [2, 3])
    expected = sum(plain(image.flip(flip), network, presence).flip(flip) for flip in axes) / 4
    result = flipping(image, network, presence)
    torch.testing.assert_close(result, expected)
    assert not torch.allclose(result, plain(image, network, presence))
    combined = CombinationInferer(num_modalities=3, flip_axes=(0, 1), **WINDOWS)(image, network, presence)
    index = combinations(3).tolist().index([True, False, True])
    torch.testing.assert_close(combined[:, index], expected)


@torch.no_grad()
def test_checkpoints_are_averaged(network: MMFormer, tmp_path: Path):
    image, presence, inferer = volumes(), torch.tensor([[True, False, True]]), PresenceInferer(**WINDOWS)
    running, expected = deepcopy(network), []
    for seed in range(3):
        other = deepcopy(network)
        torch.manual_seed(seed)
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        torch.save(other.state_dict(), tmp_path / f"{seed}.pt")
        expected.append(inferer(image, other, presence))
    weights = WeightsLoader(running, [tmp_path / f"{seed}.pt" for seed in range(3)])
    weights()
    ensemble = EnsembleInferer(inferer, weights)
    for _ in range(2):  # for every volume anew
        torch.testing.assert_close(ensemble(image, running, presence), torch.stack(expected).mean(dim=0))
    single = WeightsLoader(running, tmp_path / "1.pt")
    single()
    torch.testing.assert_close(EnsembleInferer(inferer, single)(image, running, presence), expected[1], rtol=0, atol=0)


@pytest.mark.parametrize("path", [7, [], ["model.pt", 7]])
def test_checkpoints_are_paths(network: MMFormer, path: object):
    with pytest.raises(ValueError, match="ckpt_path must be a path or a list of paths, got "):
        WeightsLoader(network, path)  # type: ignore[arg-type]
