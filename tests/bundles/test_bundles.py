"""Every bundle, run as its users run it: a new folder in bundles/ is tested because it is there."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigWorkflow

from passion_monai.datasets.phantom import write_brain_phantom

ROOT = Path(__file__).parents[2]
BUNDLES = [path.parent.name for path in sorted(ROOT.glob("bundles/*/bundle.yaml"))]
# A network and a cohort of a size that trains in seconds.
SMALL: dict[str, Any] = {
    "roi_size": [32, 32, 32],
    "spacing": [6.0, 6.0, 6.0],
    "num_workers": 0,
    "phantom": {"num_cases": 6, "shape": [32, 32, 32], "spacing": [6.0, 6.0, 6.0], "seed": 0},
    "network_def::width": 2,
    "network_def::token_channels": 16,
    "network_def::num_heads": 2,
    "network_def::mlp_channels": 32,
}
WORKFLOW_TYPES = {"train": "train", "evaluate": "infer", "inference": "infer"}


def run(bundle: str, workflow: str, *, cwd: Path = ROOT, **overrides: Any) -> subprocess.CompletedProcess[str]:
    """`python -m monai.bundle run`, with the small settings."""
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run"]
    command += ["training"] if workflow == "train" else []
    command += ["--config_file", str(ROOT / "bundles" / bundle / "configs" / f"{workflow}.yaml")]
    for name, value in (SMALL | overrides).items():
        command += [f"--{name}", str(value)]
    environment = os.environ | {"MONAI_FAIL_ON_DUPLICATE_CONFIG": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600)


def succeed(bundle: str, workflow: str, **kwargs: Any) -> str:
    result = run(bundle, workflow, **kwargs)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-12000:]
    return result.stdout + result.stderr


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", params=BUNDLES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A bundle trained for three epochs, in a run that was stopped after the second and resumed."""
    output_dir = tmp_path_factory.mktemp(request.param)
    log = succeed(request.param, "train", cwd=output_dir, output_dir=str(output_dir), epochs=2, val_interval=1)
    assert "PHANTOM" in log
    succeed(request.param, "train", output_dir=str(output_dir), epochs=3, val_interval=1, resume=True)
    return request.param, output_dir


class TestTraining:
    def test_leaves_checkpoints_and_logs(self, trained: tuple[str, Path]):
        _, output_dir = trained
        assert {path.name for path in (output_dir / "models").iterdir()} == {"model.pt", "last.pt"}
        assert list((output_dir / "tensorboard").glob("events*"))

    def test_weights_are_a_bare_state_dict_of_tensors(self, trained: tuple[str, Path]):
        state = torch.load(trained[1] / "models" / "model.pt", weights_only=True)
        assert all(isinstance(value, torch.Tensor) for value in state.values())

    def test_log_follows_every_modality(self, trained: tuple[str, Path]):
        rows = read_csv(trained[1] / "training.csv")
        assert [row["epoch"] for row in rows] == ["1", "2", "3"]
        modalities = json.loads((trained[1] / "datalist.json").read_text())["modalities"]
        for name in ("loss_pixel", "loss_prototype", "relative_preference", "beta", "gap"):
            assert all(f"{name}_{modality}" in rows[0] for modality in modalities)
        assert all(float(row["val_mean_dice"]) >= 0 for row in rows)

    def test_beta_follows_equation_13_through_the_resumed_run(self, trained: tuple[str, Path]):
        rows = read_csv(trained[1] / "training.csv")
        modalities = json.loads((trained[1] / "datalist.json").read_text())["modalities"]
        for before, after in itertools.pairwise(rows):
            for modality in modalities:
                expected = float(before[f"beta_{modality}"]) - 0.01 * float(after[f"relative_preference_{modality}"])
                assert float(after[f"beta_{modality}"]) == pytest.approx(expected, rel=1e-5)

    def test_checkpoint_holds_the_beta_of_the_log(self, trained: tuple[str, Path]):
        state = torch.load(trained[1] / "models" / "last.pt", weights_only=True)
        last = read_csv(trained[1] / "training.csv")[-1]
        modalities = json.loads((trained[1] / "datalist.json").read_text())["modalities"]
        assert state["loss"]["beta"].tolist() == pytest.approx([float(last[f"beta_{name}"]) for name in modalities])


class TestEvaluation:
    def test_scores_every_combination(self, trained: tuple[str, Path]):
        bundle, output_dir = trained
        succeed(bundle, "evaluate", output_dir=str(output_dir))
        rows = read_csv(output_dir / "evaluation" / "scores.csv")
        datalist = json.loads((output_dir / "datalist.json").read_text())
        combinations = 2 ** len(datalist["modalities"]) - 1
        assert {row["case"] for row in rows} == {case["case"] for case in datalist["test"]}
        assert len({row["combination"] for row in rows}) == combinations
        regions = {row["region"] for row in rows}
        assert len(rows) == len(datalist["test"]) * combinations * len(regions)
        assert "●" in (output_dir / "evaluation" / "table.md").read_text()

    def test_without_weights_it_stops(self, trained: tuple[str, Path], tmp_path: Path):
        result = run(trained[0], "evaluate", output_dir=str(trained[1]), ckpt_path=str(tmp_path / "none.pt"))
        assert result.returncode != 0
        assert "none.pt" in result.stderr


class TestInference:
    def test_patients_who_lack_modalities(self, trained: tuple[str, Path], tmp_path: Path):
        bundle, output_dir = trained
        patients = tmp_path / "patients"
        shape, spacing = (30, 34, 26), (6.0, 5.0, 7.0)
        first, second = write_brain_phantom(patients, num_cases=2, shape=shape, spacing=spacing, seed=5)
        files = sorted(first.glob("*.nii.gz"))
        kept, *removed = [path for path in files if "seg" not in path.name]
        for path in [*removed, *second.glob("*_seg.nii.gz"), *first.glob("*_seg.nii.gz")]:
            path.unlink()
        succeed(
            bundle,
            "inference",
            output_dir=str(tmp_path / "out"),
            dataset_dir=str(patients),
            ckpt_path=str(output_dir / "models" / "model.pt"),
        )
        predictions = tmp_path / "out" / "predictions"
        record = json.loads((predictions / f"{first.name}_seg.json").read_text())
        assert [path for path in record["files"].values() if path] == [str(kept)]
        assert len(record["modalities_missing"]) == len(removed)
        written, source = nib.load(predictions / f"{first.name}_seg.nii.gz"), nib.load(kept)
        assert written.shape == source.shape
        np.testing.assert_allclose(written.affine, source.affine)
        assert set(np.unique(written.dataobj)) <= set(record["labels"].values())
        assert (predictions / f"{second.name}_seg.nii.gz").is_file()

    def test_one_case_given_by_its_files(self, trained: tuple[str, Path], tmp_path: Path):
        bundle, output_dir = trained
        case = json.loads((output_dir / "datalist.json").read_text())["test"][0]
        name = json.loads((output_dir / "datalist.json").read_text())["modalities"][-1]
        path = output_dir / "phantom" / case[name]
        succeed(
            bundle,
            "inference",
            output_dir=str(tmp_path),
            files={name: str(path), "case": "patient 7"},
            ckpt_path=str(output_dir / "models" / "model.pt"),
        )
        record = json.loads((tmp_path / "predictions" / "patient 7_seg.json").read_text())
        assert record["modalities_used"] == [name]


@pytest.mark.parametrize("bundle", BUNDLES)
class TestConfigurations:
    @pytest.mark.parametrize("workflow", WORKFLOW_TYPES)
    def test_properties_are_those_that_monai_looks_up(self, bundle: str, workflow: str, tmp_path: Path):
        config = ROOT / "bundles" / bundle / "configs" / f"{workflow}.yaml"
        overrides = SMALL | {"output_dir": str(tmp_path), "bundle_root": str(config.parents[1])}
        parsed = ConfigWorkflow(str(config), workflow_type=WORKFLOW_TYPES[workflow], logging_file=False, **overrides)
        parsed.initialize()
        assert parsed.check_properties() == []

    @pytest.mark.parametrize("workflow", WORKFLOW_TYPES)
    def test_numbers_are_numbers(self, bundle: str, workflow: str):
        """YAML reads 1e-4 as a text."""

        def walk(value: Any) -> None:
            if isinstance(value, dict):
                for item in value.values():
                    walk(item)
            elif isinstance(value, list):
                for item in value:
                    walk(item)
            elif isinstance(value, str):
                with pytest.raises(ValueError, match="could not convert"):
                    float(value)

        walk(yaml.safe_load((ROOT / "bundles" / bundle / "configs" / f"{workflow}.yaml").read_text()))

    def test_network_format_agrees_with_the_network(self, bundle: str):
        folder = ROOT / "bundles" / bundle / "configs"
        network_format = json.loads((folder / "metadata.json").read_text())["network_data_format"]
        workflow = ConfigWorkflow(
            str(folder / "inference.yaml"),
            workflow_type="infer",
            logging_file=False,
            bundle_root=str(folder.parent),
        )
        workflow.initialize()
        image, pred = network_format["inputs"]["image"], network_format["outputs"]["pred"]
        assert list(image["channel_def"].values()) == workflow.parser.get_parsed_content("modalities")
        assert image["spatial_shape"] == workflow.parser.get_parsed_content("roi_size")
        network = workflow.parser.get_parsed_content("network_def").eval()
        assert (network.num_modalities, network.num_classes) == (image["num_channels"], pred["num_channels"])


def test_configurations_are_what_their_fragments_make():
    result = subprocess.run(
        [sys.executable, str(ROOT / "bundles" / "build.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(("objective", "column"), [("baseline", "loss_regularisation_"), ("released", "beta_")])
def test_other_objectives_train_too(tmp_path: Path, objective: str, column: str):
    succeed(BUNDLES[0], "train", output_dir=str(tmp_path), epochs=1, val_interval=2, objective=objective)
    assert column in (tmp_path / "training.csv").read_text()


def test_a_switch_that_is_neither_true_nor_false_is_refused(tmp_path: Path):
    result = run(BUNDLES[0], "train", output_dir=str(tmp_path), resume="false")
    assert result.returncode != 0
    assert "resume must be True or False" in result.stderr


def test_modality_dropout_trains_on_complete_cases(tmp_path: Path):
    overrides = {"modality_dropout": True, "simulate_missing": False}
    log = succeed(BUNDLES[0], "train", output_dir=str(tmp_path), epochs=1, val_interval=1, **overrides)
    rates = re.search(r"missing rates: (.*)", log)
    assert rates is not None
    assert set(re.findall(r"\d\.\d+", rates[1])) == {"0.000"}
