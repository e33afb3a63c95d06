from __future__ import annotations

import pytest
import torch
from torch import nn

from passion_monai.networks import MMFormer


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_are_those_of_the_authors_network():
    network = MMFormer(3, num_modalities=4, num_classes=4, img_size=80)
    assert [count(encoder) for encoder in network.encoders] == [1_473_216] * 4
    assert [count(layer) for layer in network.to_tokens] == [66_048] * 4
    assert network.position_embeddings.numel() == 4 * 64_000
    assert [count(layer) for layer in network.intra_transformers] == [5_250_048] * 4
    assert count(network.inter_transformer) == 5_250_048
    assert count(network.from_tokens) == 1_049_088
    assert count(network.fusion_decoder) == 1_293_444
    assert [count(f) for f in network.fusion_decoder.fusions] == [2_072, 8_240, 32_864, 131_264, 524_672]
    assert [count(h) for h in network.fusion_decoder.heads] == [36, 68, 132, 260, 516]
    assert count(network.modality_decoder) == 593_356
    assert count(network) == 35_599_184


def test_parameter_count_in_two_dimensions():
    assert count(MMFormer(2, num_modalities=3, num_classes=6, img_size=256)) == 24_345_772


def joined(token_order: str) -> torch.Tensor:
    """Tokens whose channels name modality and place, after the joint transformer is made an identity."""
    network = MMFormer(2, 3, 2, img_size=(32, 48), width=2, token_channels=4, num_heads=2, token_order=token_order)
    network.inter_transformer = nn.Identity()
    network.from_tokens = nn.Identity()
    modality = torch.arange(3).view(3, 1, 1)
    place = torch.arange(6).view(1, 2, 3)
    tokens = torch.stack([modality.expand(3, 2, 3), place.expand(3, 2, 3)], dim=3).float()  # [M, h, w, 2]
    return network._join_tokens(dict(enumerate(torch.cat([tokens, tokens], dim=3).flatten(1, 2)[:, None])))


def test_aligned_tokens_keep_their_place():
    joint = joined("aligned")[0].unflatten(0, (3, 4))  # [M, C, h, w]
    for modality in range(3):
        assert bool((joint[modality, 0] == modality).all())
        assert torch.equal(joint[modality, 1].flatten(), torch.arange(6.0))


def test_scrambled_tokens_share_a_place_with_their_successors():
    joint = joined("scrambled")[0].flatten(1).T.unflatten(1, (3, 4))  # [T, M, C]
    flat = [(m, t) for m in range(3) for t in range(6)]
    for place in range(6):
        assert [tuple(map(int, token[:2])) for token in joint[place]] == flat[3 * place : 3 * place + 3]


def test_token_order_is_checked():
    with pytest.raises(ValueError, match="token_order must be one of"):
        MMFormer(2, 3, 2, img_size=32, token_order="sorted")
