from __future__ import annotations

import sys
from pathlib import Path

import pytest

from passion_monai.config import (
    check_calibrated,
    check_device,
    check_flips,
    check_paths,
    check_switches,
    find_bundle_root,
)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundles" / "my_bundle"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "metadata.json").write_text("{}")
    return folder


@pytest.mark.parametrize("cwd", [".", "bundles", "bundles/my_bundle"])
def test_from_the_working_directory(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cwd: str):
    monkeypatch.chdir(tmp_path / cwd)
    monkeypatch.setattr(sys, "argv", ["program"])
    assert find_bundle_root("my_bundle") == str(bundle)


@pytest.mark.parametrize("form", ["{}", "['{}','other.yaml']", "--config_file={}"])
def test_from_the_configuration_on_the_command_line(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = form.format(bundle / "configs" / "train.yaml")
    monkeypatch.setattr(sys, "argv", ["program", "run", "--config_file", config])
    assert find_bundle_root("my_bundle") == str(bundle)


def test_not_found_names_the_way_out(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(FileNotFoundError, match="give it as --bundle_root"):
        find_bundle_root("my_bundle")


@pytest.mark.parametrize("value", ["false", "True", 0, None])
def test_switches_are_true_or_false(value: object):
    check_switches(a=True, b=False)
    with pytest.raises(ValueError, match=f"b must be True or False .*, got {value!r}"):
        check_switches(a=True, b=value)


def test_paths_are_text():
    check_paths(a="x", b=None)
    with pytest.raises(ValueError, match="b must be a path, got 2020; what looks like a number"):
        check_paths(a="x", b=2020)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 1.5])
def test_devices_that_are_not_there(device: str):
    check_device("cpu")
    with pytest.raises(ValueError, match=f"device must be cpu, .* got {device!r}: "):
        check_device(device)


def test_flips_need_an_axis():
    check_flips(flip_test=False, flip_axes=[])
    check_flips(flip_test=True, flip_axes=[0])
    with pytest.raises(ValueError, match="flip_axes must not be empty"):
        check_flips(flip_test=True, flip_axes=[])


def test_calibrated_probabilities_must_be_shown():
    check_calibrated(calibrated=False, save_probabilities=False)
    check_calibrated(calibrated=True, save_probabilities=True)
    with pytest.raises(ValueError, match="set save_probabilities True"):
        check_calibrated(calibrated=True, save_probabilities=False)
    with pytest.raises(ValueError, match="calibrated must be True or False"):
        check_calibrated(calibrated="true", save_probabilities=True)
