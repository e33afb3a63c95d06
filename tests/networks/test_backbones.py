"""The contract of every backbone: a new entry of BACKBONES is tested because it is there."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest
import torch

from passion_monai.distillation import SelfDistillation
from passion_monai.networks import BACKBONES, Backbone
from passion_monai.presence import combinations

CASES = list(itertools.product(BACKBONES, (2, 3), (2, 3, 4)))  # backbone, spatial_dims, num_modalities
SLOW_CASES = [(name, *case) for name in BACKBONES for case in ((2, 3), (3, 2))]  # where all would take minutes
# Sizes that build in an instant; a backbone that is not named here is built as it is by default.
SMALL: dict[str, dict[str, int]] = {
    "mmformer": {"width": 2, "token_channels": 16, "num_heads": 2, "mlp_channels": 32},
    "rfnet": {"width": 4},
    "m2ftrans": {"width": 2, "num_heads": 2, "mlp_channels": 32},
    "fusionunet": {"width": 4},
}


def build(name: str, spatial_dims: int, num_modalities: int, **kwargs: int) -> Backbone:
    torch.manual_seed(0)
    network = BACKBONES[name](spatial_dims, num_modalities, 3, img_size=32, **SMALL.get(name, {}), **kwargs).eval()
    # Position embeddings start at zero: give them values, or mistakes with them would not show.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.double()


def random_image(spatial_dims: int, num_modalities: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(
        batch, num_modalities, *[32] * spatial_dims, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def patterns(num_modalities: int) -> torch.Tensor:
    """Three rows of presence: the first modality alone, all but the first, all."""
    one_hot = torch.arange(num_modalities) == 0
    return torch.stack([one_hot, ~one_hot, torch.ones_like(one_hot)])


@pytest.mark.parametrize(("name", "spatial_dims", "num_modalities"), CASES)
class TestContract:
    def test_output_shapes(self, name: str, spatial_dims: int, num_modalities: int):
        network = build(name, spatial_dims, num_modalities)
        image, presence = random_image(spatial_dims, num_modalities, 3), patterns(num_modalities)
        with torch.no_grad():
            features = network.encode(image, presence)
            output = network.decode(features, presence)
            own = network.decode_modality(features[1])
            logits = network(image)
        size = [32] * spatial_dims
        assert list(output.logits.shape) == list(own.shape) == list(logits.shape) == [3, 3, *size]
        assert list(output.features.shape[2:]) == size
        assert all(level.shape[:2] == (3, 3) for level in output.auxiliary)
        widths = [level.shape[-1] for level in output.auxiliary]
        assert widths == sorted(widths, reverse=True)

    def test_absent_modalities_have_no_influence(self, name: str, spatial_dims: int, num_modalities: int):
        network = build(name, spatial_dims, num_modalities)
        image, presence = random_image(spatial_dims, num_modalities, 3), patterns(num_modalities)
        garbage = image.clone()
        garbage[~presence] = torch.nan
        with torch.no_grad():
            assert torch.equal(network(garbage, presence), network(image, presence))

    def test_absent_encoders_are_not_run(self, name: str, spatial_dims: int, num_modalities: int):
        network = build(name, spatial_dims, num_modalities)
        seen: list[tuple[int, int]] = []
        original = network.encode_modality

        def spy(image: torch.Tensor, modality: int) -> tuple[torch.Tensor, ...]:
            seen.append((modality, len(image)))
            return original(image, modality)

        network.encode_modality = spy
        network.encode(random_image(spatial_dims, num_modalities, 2), patterns(num_modalities)[:1].expand(2, -1))
        assert seen == [(0, 2)]

    def test_absent_features_are_zero(self, name: str, spatial_dims: int, num_modalities: int):
        network = build(name, spatial_dims, num_modalities)
        presence = patterns(num_modalities)
        with torch.no_grad():
            features = network.encode(random_image(spatial_dims, num_modalities, 3), presence)
        for modality, maps in enumerate(features):
            there = presence[:, modality]
            assert all(float(map_[~there].abs().max()) == 0 for map_ in maps if not there.all())
            assert all(float(map_[there].abs().max()) > 0 for map_ in maps)

    def test_a_modality_that_was_not_encoded_cannot_be_decoded(self, name: str, spatial_dims: int, num_modalities: int):
        network = build(name, spatial_dims, num_modalities)
        first, _, both = patterns(num_modalities)
        features = network.encode(random_image(spatial_dims, num_modalities), first[None])
        assert [maps is not None for maps in features] == first.tolist()
        with pytest.raises(ValueError, match="presence has modality 1, which was not encoded"):
            network.decode(features, both[None])

    def test_every_combination_comes_from_one_encoding(self, name: str, spatial_dims: int, num_modalities: int):
        network = build(name, spatial_dims, num_modalities)
        image = random_image(spatial_dims, num_modalities)
        with torch.no_grad():
            features = network.encode(image, torch.ones(1, num_modalities, dtype=torch.bool))
            for row in torch.from_numpy(combinations(num_modalities)):
                combination = network.decode(features, row[None]).logits
                torch.testing.assert_close(combination, network(image, row[None]))

    def test_mixed_presence_in_a_batch_equals_single_samples(self, name: str, spatial_dims: int, num_modalities: int):
        network = build(name, spatial_dims, num_modalities)
        image, presence = random_image(spatial_dims, num_modalities, 3), patterns(num_modalities)
        with torch.no_grad():
            together = network(image, presence)
            single = torch.cat([network(image[n : n + 1], presence[n : n + 1]) for n in range(3)])
        torch.testing.assert_close(together, single)

    def test_gradients_reach_exactly_the_encoders_of_present_modalities(
        self, name: str, spatial_dims: int, num_modalities: int
    ):
        network = build(name, spatial_dims, num_modalities)
        logits = network(random_image(spatial_dims, num_modalities), patterns(num_modalities)[1:2])
        logits.square().mean().backward()
        touched = [
            any(parameter.grad is not None for parameter in encoder.parameters()) for encoder in network.encoders
        ]
        assert touched == [False] + [True] * (num_modalities - 1)

    def test_state_dict_round_trip(self, name: str, spatial_dims: int, num_modalities: int):
        network, other = build(name, spatial_dims, num_modalities), build(name, spatial_dims, num_modalities)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(network.state_dict())
        image = random_image(spatial_dims, num_modalities)
        with torch.no_grad():
            assert torch.equal(network(image), other(image))

    def test_distillation_runs_each_pass_once_from_one_encoding(
        self, name: str, spatial_dims: int, num_modalities: int
    ):
        network = build(name, spatial_dims, num_modalities)
        image, presence = random_image(spatial_dims, num_modalities, 3), patterns(num_modalities)
        with torch.no_grad():
            output = SelfDistillation(network, own_predictions="all")(image, presence)
            fused = network(image, presence)
        torch.testing.assert_close(output.fused.logits, fused)
        # Only samples with two or more modalities have students: of the three, the first has one modality.
        rows = presence & (presence.sum(dim=1, keepdim=True) > 1)
        sizes = [0 if student is None else len(student.logits) for student in output.students]
        assert sizes == rows.sum(dim=0).tolist()
        own_sizes = [0 if own is None else len(own) for own in output.own_predictions]
        assert own_sizes == presence.sum(dim=0).tolist()


@pytest.mark.parametrize(("name", "spatial_dims", "num_modalities"), SLOW_CASES)
def test_activation_checkpointing_keeps_less_and_changes_nothing(name: str, spatial_dims: int, num_modalities: int):
    network = build(name, spatial_dims, num_modalities).train()  # dropout must be drawn alike in both computations
    image, presence = random_image(spatial_dims, num_modalities), torch.ones(1, num_modalities, dtype=torch.bool)
    results, kept = [], []
    for activation_checkpointing in (False, True):
        sizes: dict[int, int] = {}

        def remember(saved: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        torch.manual_seed(2)
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda saved: saved):
            distillation = SelfDistillation(
                network, own_predictions="all", activation_checkpointing=activation_checkpointing
            )
            output = distillation(image, presence)
        passes = [output.fused.logits, *(student.logits for student in output.students), *output.own_predictions]
        total = sum(logits.square().mean() for logits in passes)
        results.append((total, torch.autograd.grad(total, list(network.parameters()), allow_unused=True)))
        kept.append(sum(sizes.values()))
    torch.testing.assert_close(*results)
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize("name", sorted({*BACKBONES} - {"fusionunet"}))  # the layers of blocks.py are faster so
def test_maps_of_a_network_have_channels_last_and_logits_first(name: str):
    network = build(name, 3, 2).float()
    with torch.no_grad():
        features = network.encode(random_image(3, 2).float(), torch.tensor([[True, False]]))
        output = network.decode(features, torch.tensor([[True, False]]))
    assert features[0][0].is_contiguous(memory_format=torch.channels_last_3d)
    assert output.features.is_contiguous(memory_format=torch.channels_last_3d)
    assert all(logits.is_contiguous() for logits in (output.logits, *output.auxiliary))


OTHER_SIZE = "built for img_size"
BAD_CALLS = [
    ((1, 2, 32, 32), [[True, True, True]], r"image must be \[B, 3, H, W\]"),
    ((1, 3, 48, 32), [[True, True, True]], OTHER_SIZE),
    ((1, 3, 32, 32), [[True, True]], r"presence must be bool \[1, 3\]"),
    ((1, 3, 32, 32), [[False, False, False]], "a sample without any modality"),
]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("shape", "presence", "message"), BAD_CALLS)
def test_bad_calls_are_refused(name: str, shape: tuple[int, ...], presence: list[list[bool]], message: str):
    if BACKBONES[name].takes_any_size and message == OTHER_SIZE:
        shape, message = (1, 3, 40, 32), r"spatial size must be multiples of 16, at least 32, got \(40, 32\)"
    with pytest.raises(ValueError, match=message):
        build(name, 2, 3)(torch.zeros(shape), torch.tensor(presence))


BAD_ARGUMENTS = [
    ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, got 1"),
    ({"num_modalities": 0}, "num_modalities must be at least 1, got 0"),
    ({"num_classes": 1}, "num_classes counts the background and must be at least 2, got 1"),
    ({"img_size": 36}, "img_size must be multiples of"),
    ({"img_size": 0}, r"at least \d+, got \(0, 0\)"),
]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("changed", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(name: str, changed: dict[str, int], message: str):
    arguments = {"spatial_dims": 2, "num_modalities": 3, "num_classes": 3, "img_size": 32} | changed
    with pytest.raises(ValueError, match=message):
        BACKBONES[name](**arguments)


def combinations_with_garbage(
    spatial_dims: int, num_modalities: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For every combination: the complete image, the image with NaN where a modality is absent, and the presence."""
    image = random_image(spatial_dims, num_modalities)
    for row in combinations(num_modalities):
        presence = torch.from_numpy(row)[None]
        garbage = image.clone()
        garbage[~presence] = torch.nan
        yield image, garbage, presence


@torch.no_grad()
@pytest.mark.parametrize(("name", "spatial_dims", "num_modalities"), SLOW_CASES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # torch's own instance norm compares sizes
def test_traced_network_serves_every_combination(name: str, spatial_dims: int, num_modalities: int, tmp_path: Path):
    network = build(name, spatial_dims, num_modalities)
    example = (random_image(spatial_dims, num_modalities), torch.ones(1, num_modalities, dtype=torch.bool))
    torch.jit.trace(network, example, check_trace=False).save(tmp_path / "model.ts")
    traced = torch.jit.load(tmp_path / "model.ts")
    for image, garbage, presence in combinations_with_garbage(spatial_dims, num_modalities):
        torch.testing.assert_close(traced(garbage, presence), network(image, presence))


@torch.no_grad()
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("spatial_dims", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_network_serves_every_combination(name: str, spatial_dims: int, tmp_path: Path):
    exact = build(name, spatial_dims, 2)  # in float64: what single precision rounds differs between the two
    network = copy.deepcopy(exact).float()
    example = (random_image(spatial_dims, 2).float(), torch.ones(1, 2, dtype=torch.bool))
    path = tmp_path / "model.onnx"
    torch.onnx.export(network, example, path, input_names=["image", "presence"], dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for image, garbage, presence in combinations_with_garbage(spatial_dims, 2):
        feed = {"image": garbage.float().numpy(), "presence": presence.numpy()}
        (logits,) = session.run(None, feed)
        expected = exact(image.float().double(), presence).float()
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize(("name", "spatial_dims", "num_modalities"), SLOW_CASES)
def test_bfloat16_autocast_is_finite(name: str, spatial_dims: int, num_modalities: int):
    network = build(name, spatial_dims, num_modalities).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for row in patterns(num_modalities):
            assert bool(torch.isfinite(network(random_image(spatial_dims, num_modalities).float(), row[None])).all())


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile itself
def test_compiled_network_gives_the_same(name: str):
    network = build(name, 2, 3)
    compiled = torch.compile(network, backend="aot_eager")
    image = random_image(2, 3)
    for row in patterns(3):
        torch.testing.assert_close(compiled(image, row[None]), network(image, row[None]))
