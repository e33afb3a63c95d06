"""The workflows of every bundle, run as its users run them."""

from __future__ import annotations

import csv
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from monai.bundle import ConfigWorkflow

from passion_monai.datasets import discover, get_spec
from passion_monai.datasets.phantom import write_phantom
from passion_monai.evaluation.kept_maps import read_kept_case
from passion_monai.networks import BACKBONES
from passion_monai.presence import missing_rates

WORKFLOW_TYPES = {"train": "train", "evaluate": "infer", "inference": "infer"}
CONFIGS = sorted({path.stem for path in Path(__file__).parents[2].glob("bundles/*/configs/*.yaml")})
# Overlays of a training, but for those that need weights or several processes before they can be looked at.
RECIPES = sorted({*CONFIGS} - {*WORKFLOW_TYPES, "calibrate", "finetune", "multi_gpu_train"})


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class TestTraining:
    def test_leaves_checkpoints_and_logs(self, trained: Path):
        assert {path.name for path in (trained / "models").iterdir()} == {"model.pt", "last.pt", "last.previous.pt"}
        assert list((trained / "tensorboard").glob("events*"))

    def test_says_what_it_was(self, bundle: Any, trained: Path):
        record, datalist = (json.loads((trained / f"{name}.json").read_text()) for name in ("run", "datalist"))
        spec = get_spec(bundle.dataset)
        assert record == {
            "bundle": bundle.name,
            "modalities": datalist["modalities"],
            "dataset": bundle.dataset,
            "phantom": True,
            "backbone": BACKBONES[bundle.name.split("_")[1]].__name__,
            "label_values": list(spec.label_values),
            "class_names": list(spec.class_names),
            "regions": {name: list(classes) for name, classes in spec.regions.items()},
            "spacing": bundle.small["spacing"],
            "roi_size": bundle.small["roi_size"],
            "missing_rates": yaml.safe_load(Path(bundle.config("train")).read_text())["missing_rates"],
            "seed": 0,
            "objective": "passion",
            "modality_dropout": False,
            "foreground_crops": 0.0,
            "augmentation": "paper",
            "warmup_epochs": 0,
            "ema_decay": 0.0,
            "lambda_pixel": 0.5,
            "lambda_prototype": 0.1,
            "use_task_mask": True,
            "adaptive_beta": True,
            "epochs": 3,
            "batch_size": 1,
            "learning_rate": 2e-4,
            "precision": "float32",
        }

    @pytest.mark.two_bundles
    def test_says_what_each_case_had_as_the_log_does(self, bundle: Any, tmp_path: Path):
        """A resumed training says the same."""
        arguments: dict[str, Any] = {"output_dir": tmp_path, "epochs": 1, "val_interval": 2}
        log = bundle.succeed("train", **arguments)
        names = ("run.json", "presence.json")
        before = [(tmp_path / name).read_bytes() for name in names]
        presence = json.loads(before[1])
        datalist = json.loads((tmp_path / "datalist.json").read_text())
        assert list(presence["cases"]) == [case["case"] for case in datalist["training"]]
        rates = ", ".join(
            f"{name} {rate:.3f}"
            for name, rate in zip(datalist["modalities"], missing_rates(list(presence["cases"].values())), strict=True)
        )
        assert f"missing rates: {rates}" in log
        bundle.succeed("train", resume=True, **arguments)
        assert [(tmp_path / name).read_bytes() for name in names] == before

    def test_weights_are_a_bare_state_dict_of_tensors(self, trained: Path):
        state = torch.load(trained / "models" / "model.pt", weights_only=True)
        assert all(isinstance(value, torch.Tensor) for value in state.values())

    def test_log_follows_every_modality(self, trained: Path):
        rows = read_csv(trained / "training.csv")
        assert [row["epoch"] for row in rows] == ["1", "2", "3"]
        datalist = json.loads((trained / "datalist.json").read_text())
        for name in ("loss_pixel", "loss_prototype", "relative_preference", "beta", "gap"):
            assert all(f"{name}_{modality}" in rows[0] for modality in datalist["modalities"])
        if datalist["validation"]:
            assert all(float(row["val_mean_dice"]) >= 0 for row in rows)
        else:
            assert "val_mean_dice" not in rows[0]

    def test_beta_follows_equation_13_through_the_resumed_run(self, trained: Path):
        rows = read_csv(trained / "training.csv")
        for before, after in itertools.pairwise(rows):
            for modality in json.loads((trained / "datalist.json").read_text())["modalities"]:
                expected = float(before[f"beta_{modality}"]) - 0.01 * float(after[f"relative_preference_{modality}"])
                assert float(after[f"beta_{modality}"]) == pytest.approx(expected, rel=1e-5)

    def test_checkpoint_holds_the_beta_of_the_log(self, trained: Path):
        state = torch.load(trained / "models" / "last.pt", weights_only=True)
        last = read_csv(trained / "training.csv")[-1]
        modalities = json.loads((trained / "datalist.json").read_text())["modalities"]
        assert state["loss"]["beta"].tolist() == pytest.approx([float(last[f"beta_{name}"]) for name in modalities])


class TestEvaluation:
    def test_scores_every_combination(self, bundle: Any, trained: Path):
        log = bundle.succeed("evaluate", output_dir=trained, keep_cases=1, spacing=None, roi_size=None)
        assert f"run.json: spacing {bundle.small['spacing']}, roi_size {bundle.small['roi_size']}.\n" in log
        rows = read_csv(trained / "evaluation" / "scores.csv")
        datalist = json.loads((trained / "datalist.json").read_text())
        combinations = 2 ** len(datalist["modalities"]) - 1
        assert {row["case"] for row in rows} == {case["case"] for case in datalist["test"]}
        assert len({row["combination"] for row in rows}) == combinations
        assert {row["region"] for row in rows} == set(get_spec(bundle.dataset).regions)
        assert len(rows) == len(datalist["test"]) * combinations * len({row["region"] for row in rows})
        assert "●" in (trained / "evaluation" / "table.md").read_text()
        dice = {
            name: [float(row["dice"]) for row in rows if row["region"] == name]
            for name in get_spec(bundle.dataset).regions
        }
        means = ", ".join(f"{name} {100 * np.mean(values):.1f}" for name, values in dice.items())
        assert f"Mean Dice [%] of all combinations: {means}." in log
        assert f"Done. The results are in {trained / 'evaluation'}." in log
        errors = read_csv(trained / "evaluation" / "calibration.csv")
        assert len(errors) == len(datalist["test"]) * combinations
        assert all(0 <= float(row["ece"]) <= 1 for row in errors)
        kept = read_kept_case(trained / "evaluation" / "maps" / f"{datalist['test'][0]['case']}.npz")
        assert kept.label.shape == nib.load(trained / "phantom" / datalist["test"][0]["label"]).shape
        assert kept.predictions.shape == (combinations, *kept.label.shape)

    @pytest.mark.slow
    def test_goes_on_with_the_cases_that_are_left(self, bundle: Any, trained: Path):
        bundle.succeed("evaluate", output_dir=trained)
        folder = trained / "evaluation"
        before, record = (folder / "scores.csv").read_bytes(), json.loads((folder / "scores.json").read_text())
        number = len(record["cases"])
        del record["cases"][-1]
        (folder / "scores.json").write_text(json.dumps(record))
        log = bundle.succeed("evaluate", output_dir=trained)
        assert (f"{number - 1} of {number} cases were scored before" in log) == (number > 1)
        assert (folder / "scores.csv").read_bytes() == before
        log = bundle.succeed("evaluate", output_dir=trained)
        assert f"{number} of {number} cases were scored before" in log
        log = bundle.succeed(
            "evaluate", output_dir=trained, minimum_voxels={1: 10**6, 2: 10**6}, replacement={1: 0, 2: 0}
        )
        assert "the settings ['minimum_voxels', 'replacement'] have changed" in log
        regions = {name for name, classes in get_spec(bundle.dataset).regions.items() if set(classes) <= {1, 2}}
        rows = [row for row in read_csv(folder / "scores.csv") if row["region"] in regions]
        assert all(float(row["prediction_ml"]) == 0 for row in rows)
        assert len(read_csv(folder / "scores.csv")) == before.count(b"\n") - 1

    def test_without_weights_it_stops(self, one_bundle: Any, tmp_path: Path):
        result = one_bundle.run("evaluate", output_dir=tmp_path)
        assert result.returncode != 0
        assert "model.pt" in result.stderr


class TestInference:
    def test_patients_who_lack_modalities(self, bundle: Any, trained: Path, tmp_path: Path):
        grid = {"brats": ((30, 34, 26), (6.0, 5.0, 7.0)), "myops": ((40, 44, 3), (5.0, 4.5, 9.0))}[bundle.dataset]
        patients = tmp_path / "patients"
        write_phantom(bundle.dataset, patients, num_cases=2, shape=grid[0], spacing=grid[1], seed=5)
        first, second = discover(bundle.dataset, patients)
        present = [name for name in get_spec(bundle.dataset).modalities if name in first]
        for path in [*(first[name] for name in present[1:]), first["label"], second["label"]]:
            Path(path).unlink()
        log = bundle.succeed(
            "inference",
            output_dir=tmp_path / "out",
            dataset_dir=patients,
            ckpt_path=trained / "models" / "model.pt",
        )
        predictions = tmp_path / "out" / "predictions"
        assert f"Done. The results are in {predictions}." in log
        record = json.loads((predictions / f"{first['case']}_seg.json").read_text())
        assert [path for path in record["files"].values() if path] == [first[present[0]]]
        assert record["modalities_missing"] == present[1:]
        scores = pd.read_csv(trained / "evaluation" / "scores.csv")
        scores = scores.query(f"combination == '{present[0]}' and label_ml > 0")
        assert record["expected_scores"]["data"] == "phantom"
        for region, rows in scores.groupby("region"):
            expected = record["expected_scores"]["regions"][region]["dice"]
            assert expected["mean"] == pytest.approx(rows["dice"].mean(), abs=1e-4)
            assert expected["cases"] == len(rows)
        written, source = nib.load(predictions / f"{first['case']}_seg.nii.gz"), nib.load(first[present[0]])
        assert written.shape == source.shape
        np.testing.assert_allclose(written.affine, source.affine, atol=1e-4)
        assert set(np.unique(written.dataobj)) <= set(record["labels"].values())
        assert (predictions / f"{second['case']}_seg.nii.gz").is_file()

    @pytest.mark.two_bundles
    def test_one_case_given_by_its_files(self, bundle: Any, trained: Path, tmp_path: Path):
        datalist = json.loads((trained / "datalist.json").read_text())
        name = datalist["modalities"][-1]
        path = trained / "phantom" / datalist["test"][0][name]
        bundle.succeed(
            "inference",
            output_dir=tmp_path,
            files={name: str(path), "case": "patient 7"},
            ckpt_path=trained / "models" / "model.pt",
        )
        record = json.loads((tmp_path / "predictions" / "patient 7_seg.json").read_text())
        assert record["modalities_used"] == [name]


class TestConfigurations:
    @pytest.mark.two_bundles
    @pytest.mark.parametrize("workflow", WORKFLOW_TYPES)
    def test_properties_are_those_that_monai_looks_up(self, bundle: Any, workflow: str, tmp_path: Path):
        overrides = bundle.small | {"output_dir": str(tmp_path), "bundle_root": str(bundle.folder)}
        parsed = ConfigWorkflow(
            bundle.config(workflow), workflow_type=WORKFLOW_TYPES[workflow], logging_file=False, **overrides
        )
        parsed.initialize()
        assert parsed.check_properties() == []

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_a_recipe_has_the_properties_of_a_training(self, bundle: Any, recipe: str, tmp_path: Path):
        """Its ids are all known, too, and what it sets is allowed."""
        overrides = bundle.small | {"output_dir": str(tmp_path), "bundle_root": str(bundle.folder)}
        files = [bundle.config(name) for name in ("train", recipe)]
        parsed = ConfigWorkflow(files, workflow_type="train", logging_file=False, **overrides)
        parsed.initialize()
        assert parsed.check_properties() == []

    @pytest.mark.parametrize("workflow", CONFIGS)
    def test_numbers_are_numbers(self, bundle: Any, workflow: str):
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

        walk(yaml.safe_load(Path(bundle.config(workflow)).read_text()))

    def test_network_format_agrees_with_the_network(self, bundle: Any):
        network_format = json.loads((bundle.folder / "configs" / "metadata.json").read_text())["network_data_format"]
        workflow = ConfigWorkflow(
            bundle.config("inference"), workflow_type="infer", logging_file=False, bundle_root=str(bundle.folder)
        )
        workflow.initialize()
        image, pred = network_format["inputs"]["image"], network_format["outputs"]["pred"]
        assert list(image["channel_def"].values()) == workflow.parser.get_parsed_content("modalities")
        assert image["spatial_shape"] == workflow.parser.get_parsed_content("roi_size")
        network = workflow.parser.get_parsed_content("network_def").eval()
        assert (network.num_modalities, network.num_classes) == (image["num_channels"], pred["num_channels"])


class TestStrongRecipe:
    @pytest.mark.two_bundles
    def test_trains_and_is_evaluated_with_the_average_of_the_weights(self, bundle: Any, tmp_path: Path):
        bundle.succeed("train", "strong", output_dir=tmp_path, epochs=1, val_interval=1)
        best, last = (torch.load(tmp_path / "models" / f"{name}.pt", weights_only=True) for name in ("model", "last"))
        assert best.keys() == last["model"].keys()
        assert all(torch.equal(value, last["weight_average"][name]) for name, value in best.items())
        assert not all(torch.equal(value, last["model"][name]) for name, value in best.items())
        record = json.loads((tmp_path / "run.json").read_text())
        assert record.items() >= {"augmentation": "nnunet", "modality_dropout": True, "ema_decay": 0.999}.items()
        assert (record["foreground_crops"] > 0) == (bundle.dataset == "brats")
        bundle.succeed("evaluate", output_dir=tmp_path, calibration=False)
        assert read_csv(tmp_path / "evaluation" / "scores.csv")

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            ({"augmentation": "nnU-Net"}, "augmentation must be one of ['paper', 'nnunet'], got 'nnU-Net'"),
            ({"foreground_crops": 1.5}, "foreground_crops must be a number of at least 0 and below 1"),
            ({"ema_decay": 1.0}, "ema_decay must be a number of at least 0 and below 1"),
            ({"warmup_epochs": -1}, "warmup_epochs must be a whole number of at least 0"),
        ],
    )
    def test_a_part_that_is_out_of_range_is_refused(
        self, one_bundle: Any, part: dict[str, Any], message: str, tmp_path: Path
    ):
        result = one_bundle.run("train", "strong", output_dir=tmp_path, **part)
        assert result.returncode != 0
        assert message in result.stderr


def test_files_are_what_their_fragments_make(one_bundle: Any):
    build = one_bundle.folder.parent / "build.py"
    result = subprocess.run([sys.executable, str(build), "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("objective", "column"),
    [("baseline", "relative_preference_"), ("released", "beta_"), ("reweighted", "beta_"), ("pmr", "loss_dce_")],
)
def test_other_objectives_train_too(one_bundle: Any, tmp_path: Path, objective: str, column: str):
    one_bundle.succeed(
        "train", output_dir=tmp_path, epochs=1, val_interval=2, objective=objective, measure_preference=True
    )
    assert column in (tmp_path / "training.csv").read_text()


def test_a_switch_that_is_neither_true_nor_false_is_refused(one_bundle: Any, tmp_path: Path):
    result = one_bundle.run("train", output_dir=tmp_path, resume="false")
    assert result.returncode != 0
    assert "resume must be True or False" in result.stderr


def test_modality_dropout_trains_on_complete_cases(one_bundle: Any, tmp_path: Path):
    overrides = {"modality_dropout": True, "simulate_missing": False}
    log = one_bundle.succeed("train", output_dir=tmp_path, epochs=1, val_interval=1, **overrides)
    rates = re.search(r"missing rates: (.*)", log)
    assert rates is not None
    assert set(re.findall(r"\d\.\d+", rates[1])) == {"0.000"}
