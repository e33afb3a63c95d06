from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passion_monai.networks.m2ftrans import CrossAttention, CrossAttentionFusion, FusionTransformer, M2FTrans

GRID = (2, 3)
NUM_TOKENS = 6
PRESENCE = torch.tensor([[True, False, True], [False, True, False]])


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def bottleneck(num_heads: int = 2) -> FusionTransformer:
    torch.manual_seed(0)
    return FusionTransformer(3, 16, GRID, num_heads=num_heads, mlp_channels=8, dropout_rate=0.1).double().eval()


def small_network() -> M2FTrans:
    torch.manual_seed(0)
    return M2FTrans(2, 3, 2, img_size=32, width=2, mlp_channels=8).double().eval()


def by_modality(features: Tensor, presence: Tensor | None = None) -> dict[int, Tensor]:
    """The maps [B, C, ...] of features [B, M, C, ...], without modalities that no sample has."""
    there = range(features.shape[1]) if presence is None else presence.any(dim=0).nonzero().flatten().tolist()
    return {modality: features[:, modality] for modality in there}


def visible_tokens(query: int, presence: Tensor) -> list[int]:
    """The tokens that a token of a sample sees; the modalities' come first, then the fusion tokens."""
    group = query // NUM_TOKENS
    groups = [group] if group < len(presence) else [*presence.nonzero().flatten().tolist(), len(presence)]
    return [g * NUM_TOKENS + t for g in groups for t in range(NUM_TOKENS)]


def test_parameter_counts_are_those_of_the_authors_network():
    network = M2FTrans(3, num_modalities=4, num_classes=4, img_size=80)
    decoder = network.fusion_decoder
    assert [count(encoder) for encoder in network.encoders] == [1_473_216] * 4
    assert network.bottleneck.position_embeddings.numel() == 80_000
    assert network.bottleneck.fusion_tokens.numel() == 16_000
    assert count(network.bottleneck.layers) == 3_356_928
    assert count(decoder) == 3_255_640
    assert [count(level.fusion) for level in decoder.levels] == [2_072, 8_240, 32_864, 396_352, 1_316_992]
    assert [count(level.head) for level in decoder.levels] == [212, 340, 596, 1_108, 2_132]
    assert [count(level.merge) for level in decoder.levels] == [3_464, 13_840, 55_328, 221_248, 884_864]
    assert [count(level.project) for level in decoder.levels] == [72, 272, 1_056, 4_160, 16_512]
    assert [count(layer) for layer in decoder.reductions] == [3_464, 13_840, 55_328, 221_248]
    assert count(decoder.head) == 36
    assert count(network.modality_decoder) == 593_356
    assert count(network) == 13_194_788


def test_attention_is_masked_as_if_every_token_attended_to_what_it_sees_alone():
    transformer = bottleneck()
    attention = transformer.layers[0].attention
    tokens = torch.randn(2, 4 * NUM_TOKENS, 16, dtype=torch.float64)
    with torch.no_grad():
        masked = attention(tokens, transformer.score_bias(PRESENCE, tokens.dtype))
        for sample, presence in enumerate(PRESENCE):
            for query in range(4 * NUM_TOKENS):
                visible = visible_tokens(query, presence)
                alone = attention(tokens[sample : sample + 1, visible])[0, visible.index(query)]
                torch.testing.assert_close(masked[sample, query], alone)


def test_weights_are_what_the_fusion_tokens_attend_to_in_the_first_layer():
    transformer = bottleneck()
    tokens = torch.randn(2, 4 * NUM_TOKENS, 16, dtype=torch.float64)
    layer = transformer.layers[0]
    weights = transformer.modality_weights(tokens, transformer.score_bias(PRESENCE, tokens.dtype)).flatten(1)
    expected = torch.zeros(2, 4 * NUM_TOKENS, dtype=torch.float64)
    with torch.no_grad():
        query, key, _ = layer.attention.heads(layer.attention_norm(tokens))
    for sample, presence in enumerate(PRESENCE):
        for head in range(2):
            for row in range(3 * NUM_TOKENS, 4 * NUM_TOKENS):
                visible = visible_tokens(row, presence)
                scores = key[sample, head, visible] @ query[sample, head, row] / 8**0.5
                expected[sample, visible] += scores.softmax(dim=0)
    torch.testing.assert_close(weights, expected[:, : 3 * NUM_TOKENS])


@pytest.mark.parametrize("presence", [[True, True, True], [True, False, True], [False, True, False]])
def test_weights_of_uniform_attention_fall_with_the_number_of_modalities(presence: list[bool]):
    transformer = bottleneck(num_heads=8)
    nn.init.zeros_(transformer.layers[0].attention.qkv.weight)
    features = torch.randn(1, 3, 16, *GRID, dtype=torch.float64)
    weights = transformer(by_modality(features, torch.tensor([presence])), torch.tensor([presence]))[2]
    torch.testing.assert_close(weights, torch.full((1, sum(presence), *GRID), 8 / (sum(presence) + 1)).double())


def test_weights_carry_no_gradient_and_have_dropout_in_training():
    transformer = bottleneck().train()
    features = torch.randn(2, 3, 16, *GRID, dtype=torch.float64)
    first, second = (transformer(by_modality(features), PRESENCE)[2] for _ in range(2))
    assert not first.requires_grad
    assert not torch.equal(first, second)
    assert float(first[~PRESENCE].abs().max()) == 0


def test_tokens_keep_their_place():
    transformer = bottleneck()
    transformer.layers = nn.ModuleList([transformer.layers[0]])
    # Without what the layer adds to its input, the maps that come out are those that went in.
    for parameter in [*transformer.layers[0].attention.project.parameters(), *transformer.layers[0].mlp.parameters()]:
        nn.init.zeros_(parameter)
    features = torch.randn(2, 3, 16, *GRID, dtype=torch.float64)
    maps, fused, _ = transformer(by_modality(features), PRESENCE)
    torch.testing.assert_close(maps, by_modality(features))
    torch.testing.assert_close(fused[0].flatten(1).T, transformer.fusion_tokens)


def test_features_of_every_level_are_weighted_by_place_before_they_are_fused():
    network = small_network()
    weights = torch.rand(1, 3, 2, 2, dtype=torch.float64)
    maps = torch.randn(1, 3, 32, 2, 2, dtype=torch.float64)

    class Joined(nn.Module):
        def forward(self, features: dict[int, Tensor], presence: Tensor) -> tuple[dict[int, Tensor], Tensor, Tensor]:
            return by_modality(maps), maps[:, 0], weights

    class Decoder(nn.Module):
        def forward(self, fused: Tensor, features: list[Tensor], presence: Tensor) -> list[Tensor]:
            return features

    presence = torch.ones(1, 3, dtype=torch.bool)
    features = network.encode(torch.randn(1, 3, 32, 32, dtype=torch.float64), presence)
    levels = network.fusion_decoder.levels
    network.bottleneck, network.fusion_decoder = Joined(), Decoder()
    weighted = network.decode(features, presence)
    for level in range(5):
        factor = 2 ** (4 - level)
        spread = weights.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
        for modality in range(3):
            before = maps[:, modality] if level == 4 else features[modality][level]
            expected = before * spread[:, modality : modality + 1]
            if level < 3:
                expected = levels[level].fusion.layers.project(expected, modality)
            torch.testing.assert_close(weighted[level][modality], expected)


@pytest.mark.parametrize("presence", PRESENCE)
def test_cross_attention_equals_that_to_the_present_modalities_alone(presence: Tensor):
    torch.manual_seed(0)
    layer = CrossAttention(2, 3, 4).double()
    layer.project = nn.Identity()
    x, features = torch.randn(1, 4, *GRID).double(), torch.randn(1, 3, 4, *GRID).double()
    score_bias = torch.zeros(1, 1, 1, 12).double().masked_fill(~presence.repeat_interleave(4), -torch.inf)
    query = layer.query(x)[0].flatten(1)
    expected = torch.zeros(4, 6, dtype=torch.float64)
    present = presence.nonzero().flatten().tolist()
    key = torch.cat([layer.keys[m](features[:, m])[0].flatten(1) for m in present])
    value = torch.cat([layer.values[m](features[:, m])[0].flatten(1) for m in present])
    for channel in range(4):
        scores = (key * query[channel]).sum(dim=1) / NUM_TOKENS**0.5
        expected[channel] = (scores.softmax(dim=0)[:, None] * value).sum(dim=0)
    torch.testing.assert_close(layer(x, by_modality(features), score_bias)[0].flatten(1), expected)


def test_cross_attention_fusion_does_not_see_absent_modalities():
    torch.manual_seed(0)
    fusion = CrossAttentionFusion(2, 3, 4, dropout_rate=0.1).eval()
    x, features = torch.randn(2, 4, *GRID), torch.randn(2, 3, 4, *GRID)
    with torch.no_grad():
        output = fusion(x, by_modality(features), PRESENCE)
        for changed, same in [(~PRESENCE, True), (PRESENCE, False)]:
            noisy = torch.where(changed[:, :, None, None, None], torch.randn_like(features), features)
            assert torch.equal(fusion(x, by_modality(noisy), PRESENCE), output) == same


def test_auxiliary_logits_go_from_full_resolution_to_the_tokens():
    network = small_network()
    presence = torch.tensor([[True, False, True]])
    with torch.no_grad():
        features = network.encode(torch.randn(2, 3, 32, 32, dtype=torch.float64), presence)
        output = network.decode(features, presence)
        expanded = network.decode(features, presence.expand(2, -1))
    assert [level.shape[2:] for level in output.auxiliary] == [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2)]
    assert output.features.shape == (2, 2, 32, 32)
    torch.testing.assert_close(output, expanded)


def test_num_heads_is_checked():
    with pytest.raises(ValueError, match=r"num_heads must divide width \* 16 = 32, got 5"):
        M2FTrans(2, 3, 2, img_size=32, width=2, num_heads=5)
