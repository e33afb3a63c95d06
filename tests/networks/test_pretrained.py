"""Taking weights over to other modalities: the same for every backbone."""

from __future__ import annotations

import itertools
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from passion_monai.networks import BACKBONES, Backbone
from passion_monai.networks.pretrained import bundle_channels, load_pretrained, transfer_weights
from passion_monai.run_record import _SETTINGS

ROOT = Path(__file__).parents[2]
SMALL: dict[str, dict[str, int]] = {
    "mmformer": {"width": 2, "token_channels": 16, "num_heads": 2, "mlp_channels": 32},
    "rfnet": {"width": 4},
    "m2ftrans": {"width": 2, "num_heads": 2, "mlp_channels": 32},
}
CASES = list(itertools.product(BACKBONES, (2, 3)))


def build(
    name: str,
    spatial_dims: int = 2,
    *,
    modalities: int = 3,
    classes: int = 3,
    size: int | tuple[int, ...] = 32,
    seed: int = 0,
) -> Backbone:
    torch.manual_seed(seed)
    network = BACKBONES[name](spatial_dims, modalities, classes, img_size=size, **SMALL.get(name, {})).eval().double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def transfer(source: Backbone, target: Backbone, modalities: str, pretrained: str, **kwargs: Any):
    """With classes called 0, 1, ..., if not said otherwise."""
    settings = {"classes": digits(target.num_classes), "pretrained_classes": digits(source.num_classes)} | kwargs
    return transfer_weights(
        target, source.state_dict(), modalities=list(modalities), pretrained_modalities=list(pretrained), **settings
    )


def digits(number: int) -> list[str]:
    return [str(index) for index in range(number)]


def image(spatial_dims: int, modalities: int) -> torch.Tensor:
    return torch.randn(
        2, modalities, *[32] * spatial_dims, dtype=torch.double, generator=torch.Generator().manual_seed(1)
    )


@torch.no_grad()
@pytest.mark.parametrize(("name", "spatial_dims"), CASES)
def test_the_same_modalities_give_the_same_network(name: str, spatial_dims: int):
    source, target = build(name, spatial_dims), build(name, spatial_dims, seed=1)
    report = transfer(source, target, "abc", "abc")
    assert (report.partial, report.fresh) == ((), {})
    x = image(spatial_dims, 3)
    torch.testing.assert_close(target(x), source(x))


@pytest.mark.parametrize("name", BACKBONES)
def test_the_same_crop_keeps_positions_as_they_are_if_its_sides_differ(name: str):
    """8 x 2 positions are as many as 4 x 4."""
    source, target = build(name, size=(128, 32)), build(name, size=(128, 32), seed=1)
    transfer(source, target, "abc", "abc")
    before, after = source.state_dict(), target.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


@torch.no_grad()
@pytest.mark.parametrize(("name", "spatial_dims"), CASES)
def test_a_dropped_modality_is_as_an_absent_one(name: str, spatial_dims: int):
    source, target = build(name, spatial_dims), build(name, spatial_dims, modalities=2, seed=1)
    report = transfer(source, target, "ca", "abc")
    assert set(report.fresh.values()) <= {"mixes the modalities, which are others"}
    x = image(spatial_dims, 3)
    if report.fresh:
        features = source.encode(x, torch.tensor([[True, False, True]]))
        permuted = target.encode(x[:, [2, 0]], torch.ones(1, 2, dtype=torch.bool))
        torch.testing.assert_close(permuted, (features[2], features[0]))
    else:
        expected = source(x, torch.tensor([[True, False, True]] * 2))
        torch.testing.assert_close(target(x[:, [2, 0]]), expected)


def test_only_mmformer_has_to_learn_the_fusion_anew():
    """Of the others every value has its place when a modality is dropped."""
    fresh = {name: transfer(build(name), build(name, modalities=2), "ab", "abc").fresh for name in BACKBONES}
    assert [name for name in fresh if fresh[name]] == ["mmformer"]


@pytest.mark.parametrize(("name", "spatial_dims"), CASES)
def test_a_new_modality_starts_fresh(name: str, spatial_dims: int):
    source, target = build(name, spatial_dims), build(name, spatial_dims, modalities=4, seed=1)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    report = transfer(source, target, "abxc", "abc")
    after, theirs = target.state_dict(), source.state_dict()
    for key in (key for key in after if key.startswith("encoders.")):
        index = int(key.split(".")[1])
        expected = before[key] if index == 2 else theirs[key.replace("encoders.3", "encoders.2")]
        assert torch.equal(after[key], expected)
        assert (report.fresh.get(key) == "belongs to a modality that is new") == (index == 2)


@pytest.mark.parametrize(("name", "spatial_dims"), CASES)
def test_every_parameter_is_accounted_for(name: str, spatial_dims: int):
    source, target = build(name, spatial_dims), build(name, spatial_dims, modalities=4, classes=2, seed=1)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    report = transfer(source, target, "cxab", "abc")
    assert sorted([*report.transferred, *report.partial, *report.fresh]) == sorted(before)
    after = target.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in report.fresh)
    assert all(not torch.equal(after[key], before[key]) for key in report.partial)


@torch.no_grad()
@pytest.mark.parametrize(("name", "spatial_dims"), CASES)
def test_classes_in_another_order_are_the_same_classes(name: str, spatial_dims: int):
    source, target = build(name, spatial_dims, classes=4), build(name, spatial_dims, classes=4, seed=1)
    report = transfer(source, target, "abc", "abc", classes=["0", "3", "1", "2"])
    assert report.fresh == {}
    x = image(spatial_dims, 3)
    torch.testing.assert_close(target(x), source(x)[:, [0, 3, 1, 2]])


@torch.no_grad()
@pytest.mark.parametrize("name", BACKBONES)
def test_what_predicts_a_class_goes_to_the_class_of_that_name(name: str):
    source, target = build(name, classes=4), build(name, classes=3, seed=1)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    report = transfer(source, target, "abc", "abc", classes=["0", "2", "new"])
    assert all("class that is new" in reason for reason in report.fresh.values())
    heads = {key for key in before if key.endswith((".head.weight", ".heads.0.weight", ".head.1.weight"))}
    assert heads
    assert heads <= set(report.partial)
    for key in heads:
        ours, theirs = target.state_dict()[key], source.state_dict()[key]
        torch.testing.assert_close(ours, torch.stack([theirs[0], theirs[2], before[key][2]]))


@pytest.mark.parametrize("name", BACKBONES)
def test_classes_of_other_names_leave_all_but_the_predictions(name: str):
    target = build(name, classes=4, seed=1)
    transfer(build(name), target, "abc", "abc", classes=["0", "x", "y", "z"])
    before = build(name, classes=4, seed=1).state_dict()
    same = {key for key, value in target.state_dict().items() if torch.equal(value, before[key])}
    assert not any(key.startswith("encoders.") for key in same)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("modalities", ["abc", "ca"])
def test_positions_are_interpolated_to_another_crop(name: str, modalities: str):
    target = build(name, modalities=len(modalities), size=64, seed=1)
    report = transfer(build(name), target, modalities, "abc")
    assert not any("shape" in reason for reason in report.fresh.values())


def test_interpolated_positions_stay_with_their_modality():
    source, target = build("mmformer"), build("mmformer", modalities=2, size=64)
    with torch.no_grad():
        for index in range(3):
            source.position_embeddings[index] = index + 1.0
    transfer(source, target, "ca", "abc")
    torch.testing.assert_close(target.position_embeddings[0], torch.full_like(target.position_embeddings[0], 3.0))
    torch.testing.assert_close(target.position_embeddings[1], torch.full_like(target.position_embeddings[1], 1.0))


@torch.no_grad()
def test_modalities_that_are_called_otherwise():
    source, target = build("rfnet"), build("rfnet", modalities=2, seed=1)
    report = transfer(source, target, "zb", "abc", modality_names={"z": "a"})
    assert report.fresh == {}
    x = image(2, 3)
    torch.testing.assert_close(target(x[:, :2]), source(x, torch.tensor([[True, True, False]] * 2)))


@pytest.mark.parametrize(
    ("modalities", "names", "message"),
    [
        ("xyz", {}, r"None of the modalities .* say with modality_names"),
        ("abc", {"q": "a"}, "modality_names must map names of"),
        ("abc", {"a": "q"}, "modality_names must map names of"),
        ("abz", {"z": "a"}, r"must not map two modalities to one"),
        ("ab", {}, r"modalities must name 3 channels"),
    ],
)
def test_names_that_do_not_fit(modalities: str, names: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        transfer(build("rfnet"), build("rfnet"), modalities, "abc", modality_names=names)


def test_weights_of_another_backbone_are_refused():
    with pytest.raises(ValueError, match="no encoder that fits this RFNet"):
        transfer(build("mmformer"), build("rfnet"), "abc", "abc")


def test_weights_come_with_their_bundle(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    channels = {"channel_def": {"0": "a", "1": "b", "2": "c"}}
    classes = {"channel_def": {"0": "background", "1": "tumour", "2": "edema"}}
    (tmp_path / "configs").mkdir()
    metadata = {"network_data_format": {"inputs": {"image": channels}, "outputs": {"pred": classes}}}
    (tmp_path / "configs" / "metadata.json").write_text(json.dumps(metadata))
    torch.save(build("rfnet").state_dict(), tmp_path / "model.pt")
    target = build("rfnet", modalities=2, classes=2, seed=1)
    names = {"modalities": ["c", "n"], "classes": ["background", "edema"]}
    with caplog.at_level(logging.INFO):
        load_pretrained(target, bundle=tmp_path, weights=tmp_path / "model.pt", **names)
    assert "c from c, n is new, background from background, edema from edema" in caplog.text
    said = (
        r"Not transferred: \d+ parameters, such as encoders\.1\.\S+, each because it belongs to a modality that is new"
    )
    assert re.search(said, caplog.text)
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        load_pretrained(target, bundle=tmp_path, weights=tmp_path / "none.pt", **names)


def test_weights_trained_on_other_sequences_and_classes_than_the_bundle_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """As a fine-tuning leaves them: their run.json says what they are for."""
    record = dict.fromkeys(_SETTINGS) | {"modalities": ["x", "flair"], "class_names": ["background", "lesion", "cyst"]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "models").mkdir()
    weights = tmp_path / "models" / "model.pt"
    torch.save(build("rfnet", modalities=2).state_dict(), weights)
    target = build("rfnet", modalities=2, seed=1)
    names = {"modalities": ["flair", "x"], "classes": ["background", "cyst", "lesion"]}
    with caplog.at_level(logging.INFO):
        load_pretrained(target, bundle=ROOT / "bundles" / "brats_rfnet_passion", weights=weights, **names)
    assert "flair from flair, x from x, background from background, cyst from cyst, lesion from lesion" in caplog.text


def test_a_folder_that_is_no_bundle(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="give the folder of a bundle"):
        bundle_channels(tmp_path, "inputs", "image")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "metadata.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say what the channels of image are"):
        bundle_channels(tmp_path, "inputs", "image")
