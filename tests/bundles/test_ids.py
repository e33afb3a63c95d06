"""Ids of configurations: what is misspelt is an error, in every bundle and however it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from monai.bundle import create_workflow

WRONG = {
    "train": ("epoch", "did you mean epochs"),
    "evaluate": ("epochs", "it is an id of train.yaml"),
    "inference": ("num_worker", "did you mean num_workers"),
}


def initialise(bundle: Any, *files: str, **overrides: Any) -> Any:
    config = [str(bundle.folder / "configs" / f"{name}.yaml") if "/" not in name else name for name in files]
    return create_workflow(config_file=config, logging_file=False, bundle_root=str(bundle.folder), **overrides)


def cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


@pytest.mark.parametrize("workflow", WRONG)
def test_a_misspelt_override_is_refused(bundle: Any, workflow: str):
    name, hint = WRONG[workflow]
    with pytest.raises(RuntimeError) as error:
        initialise(bundle, workflow, **{name: 3})
    assert f"Unknown ids: {name} ({hint}" in cause(error.value)


@pytest.mark.parametrize(
    ("name", "hint"), [("train::dataloadr", "train::dataloader"), ("trackng", "tracking"), ("xyz", "nothing is called")]
)
def test_hints(one_bundle: Any, name: str, hint: str):
    with pytest.raises(RuntimeError) as error:
        initialise(one_bundle, "train", **{name: 3})
    assert f"{name} (" in cause(error.value)
    assert hint in cause(error.value)


def test_a_misspelt_id_in_a_file_of_ones_own(one_bundle: Any, tmp_path: Path):
    (tmp_path / "own.yaml").write_text("learning_rat: 0.1\nown_rate: 0.2\nlearning_rate: '@own_rate'\n")
    with pytest.raises(RuntimeError) as error:
        initialise(one_bundle, "train", str(tmp_path / "own.yaml"))
    assert "Unknown ids: learning_rat (did you mean learning_rate?). Known" in cause(error.value)


def test_what_is_meant_is_taken(one_bundle: Any, tmp_path: Path):
    (tmp_path / "own.yaml").write_text(
        "own: {rate: 0.2}\nlearning_rate: '@own::rate'\ntrain::own: 2\nbatch_size: '@train::own'\n"
    )
    nested = {"phantom::num_cases": 3, "train::dataloader::num_workers": 0, "network_def::width": 4}
    nested["pretraining::_disabled_"] = True
    initialise(
        one_bundle,
        "train",
        "finetune",
        str(tmp_path / "own.yaml"),
        tracking="mlflow",
        output_dir=str(tmp_path),
        **nested,
    )


def test_the_real_command(one_bundle: Any, tmp_path: Path):
    result = one_bundle.run("train", output_dir=tmp_path, epoch=3)
    assert result.returncode != 0
    assert "epoch (did you mean epochs?)" in result.stderr
    assert not list(tmp_path.iterdir())
