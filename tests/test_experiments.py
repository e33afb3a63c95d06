"""The grid of experiments: what its files name is there."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from passion_monai.config import check_numbers
from passion_monai.datasets import get_spec
from passion_monai.objectives import OBJECTIVES
from passion_monai.report.runs import method_name

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


METHODS = load(EXPERIMENTS / "methods.yaml")
SCALES = {name: load(EXPERIMENTS / f"{name}.yaml") for name in ("cpu", "paper", "real", "strong")}
SNAKEFILE = (EXPERIMENTS / "Snakefile").read_text(encoding="utf-8")
NAMES = {
    "baseline": "Baseline",
    "moddrop": "+ModDrop",
    "pmr": "+PMR",
    "passion": "PASSION",
    "released": "PASSION (released)",
    "reweighted": "re-weighted control",
    "pixel": "pixel",
    "prototype": "prototype",
    "both": "pixel + prototype",
    "both_delta": "pixel + prototype + δ",
    "pdt": "+ModDrop",
    "segmentation": "without distillation",
    "lambda_0": "prototype + δ",
    "lambda_1_16": "PASSION (λ 0.03125, 0.1)",
    "lambda_1_4": "PASSION (λ 0.125, 0.1)",
    "lambda_4": "PASSION (λ 2, 0.1)",
    "lambda_16": "PASSION (λ 8, 0.1)",
    # Reports know these by the names that the workflow hands over.
    **{name: "PASSION" for name in METHODS if name.startswith("strong")},
    **dict.fromkeys(("strong", "strong_dropout"), "PASSION +ModDrop"),
}
PARTS = [(scale, part) for scale, content in SCALES.items() for parts in content["tables"].values() for part in parts]


@functools.cache
def config(cohort: str, backbone: str, workflow: str = "train") -> dict[str, Any]:
    return dict(load(ROOT / "bundles" / f"{cohort}_{backbone}_passion" / "configs" / f"{workflow}.yaml"))


def ids(cohort: str, backbone: str, workflow: str = "train") -> set[str]:
    return set(config(cohort, backbone, workflow))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_sets_ids_of_a_training_and_is_what_reports_call_it(method: str):
    training = config("brats", "mmformer")
    assert set(METHODS[method]) <= set(training)
    assert METHODS[method]["objective"] in OBJECTIVES
    assert method_name(training | METHODS[method]) == NAMES[method]


@pytest.mark.parametrize(("scale", "part"), PARTS)
def test_a_table_is_made_of_what_there_is(scale: str, part: dict[str, Any]):
    assert part["cohort"] in SCALES[scale]["cohorts"]
    assert {*part["methods"]} <= {*METHODS}
    assert {*part["missing_rates"]} <= {*SCALES[scale]["missing_rates"][part["cohort"]]}
    for backbone in part["backbones"]:
        cohort = SCALES[scale]["cohorts"][part["cohort"]]
        settings = {name.split("::")[0] for name in cohort.get("settings", {})}
        assert settings <= ids(part["cohort"], backbone) & ids(part["cohort"], backbone, "evaluate")
        assert {*cohort.get("training", {})} <= ids(part["cohort"], backbone)


@pytest.mark.parametrize("scale", SCALES)
def test_there_is_a_missing_rate_for_each_modality(scale: str):
    for cohort, rates in SCALES[scale]["missing_rates"].items():
        for values in rates.values():
            check_numbers(minimum=0, below=1, length=len(get_spec(cohort).modalities), missing_rates=values)


@functools.cache
def functions(scale: str) -> dict[str, Any]:
    """What the workflow computes in Python, without what is snakemake's own."""
    python = re.sub(
        r"(?m)^(rule \w+|use rule \w+ as \w+ with|localrules|wildcard_constraints):\n(( .*)?\n)+", "", SNAKEFILE
    )
    names: dict[str, Any] = {"workflow": SimpleNamespace(basedir=EXPERIMENTS), "config": {"scale": scale}}
    exec(compile(python, "Snakefile", "exec"), names)
    return names


@pytest.mark.parametrize(("scale", "table"), [(scale, table) for scale in SCALES for table in SCALES[scale]["tables"]])
def test_every_training_of_a_table_has_a_folder_of_its_own(scale: str, table: str):
    axes = ("backbones", "missing_rates", "methods")
    count = sum(part["seeds"] * math.prod(len(part[axis]) for axis in axes) for part in SCALES[scale]["tables"][table])
    folders = functions(scale)["runs"](table)
    assert len({*folders}) == len(folders) == count


@pytest.mark.parametrize(("scale", "table"), [(scale, table) for scale in SCALES for table in SCALES[scale]["tables"]])
def test_a_report_can_tell_the_methods_of_a_table_apart(scale: str, table: str):
    training, names = config("brats", "mmformer"), {}
    for argument, folder in zip(
        functions(scale)["report_arguments"](table), functions(scale)["runs"](table), strict=True
    ):
        method = Path(folder).parent.name
        name, _, rest = argument.partition("=")
        assert (rest or name) == folder
        names[method] = (
            name if rest else (method_name(training | METHODS[method]), METHODS[method].get("simulate_missing"))
        )
    assert len({*names.values()}) == len(names)


def test_the_strong_method_is_all_parts_of_the_recipe_that_a_cpu_has_use_for():
    parts = {
        name: value for method in METHODS if method.startswith("strong_") for name, value in METHODS[method].items()
    }
    assert METHODS["strong"] == {name: value for name, value in parts.items() if name != "precision"}
    recipe = config("brats", "rfnet", "strong")
    assert {*METHODS["strong"]} - {"objective"} == {*recipe} - {"bfloat16_gpu", "precision"}
    assert all(
        METHODS["strong"][name] == recipe[name] for name in METHODS["strong"] if name not in ("objective", "roi_size")
    )


@pytest.mark.parametrize(("scale", "part"), PARTS)
def test_a_training_has_the_seed_the_rates_and_the_ids_of_its_method(scale: str, part: dict[str, Any]):
    for method, rates in itertools.product(part["methods"], part["missing_rates"]):
        training = SimpleNamespace(cohort=part["cohort"], rates=rates, method=method, seed="3")
        words = shlex.split(functions(scale)["training_settings"](training))
        asked = {"seed": 3, "missing_rates": SCALES[scale]["missing_rates"][part["cohort"]][rates], **METHODS[method]}
        assert {f"--{name}": str(value) for name, value in asked.items()}.items() <= {
            *zip(words[::2], words[1::2], strict=True)
        }


@pytest.mark.parametrize("name", re.findall(r"(?m)^ {8}\w+=([a-z]\w+),$", SNAKEFILE))
def test_a_value_of_a_rule_takes_nothing_but_what_it_uses(name: str):
    # snakemake hands a function every keyword that it takes: input, output, threads ...
    assert {*inspect.signature(functions("cpu")[name]).parameters} <= {"wildcards", "input"}


@pytest.mark.parametrize("workflow", ["train", "evaluate"])
def test_a_command_sets_ids_of_its_workflow(workflow: str):
    (rule,) = re.findall(rf"(?m)^rule {workflow}:\n((?: .*\n|\n)+)", SNAKEFILE)
    assert {*re.findall(r"--(\w+)", rule)} - {"config_file"} <= ids("brats", "mmformer", workflow)
    assert f'config_files("{workflow}")' in rule
    assert ("--resume True" in rule) == (workflow == "train")  # what was stopped goes on


class TestWeights:
    @pytest.fixture
    def training(self) -> Any:
        return SimpleNamespace(cohort="brats", backbone="rfnet", use="length")

    def test_the_length_of_the_training_on_all_cases_is_that_of_the_first_ones_best_validation(self, tmp_path: Path):
        log = tmp_path / "training.csv"
        log.write_text("epoch,val_mean_dice\n33,\n34,0.4\n68,0.6\n102,0.5\n", encoding="utf-8")
        assert functions("real")["best_epoch"](log) == 68

    def test_the_first_is_validated_and_the_second_as_long_as_it_gained(self, training: Any):
        settings = functions("real")["weights_settings"]
        asked = SCALES["real"]["weights"]["brats_rfnet"]
        first = settings(training, None)
        assert f"--epochs {asked['epochs']} --val_interval {asked['val_interval']}" in first
        training.use = "all"
        second = settings(training, SimpleNamespace(epochs="some/epochs.txt"))
        assert second.endswith("--epochs $(cat some/epochs.txt)")
        assert second.count("--epochs") == 1

    def test_finished_runs_of_other_cases_are_not_taken_for_folds_of_these(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "run" / "evaluation").mkdir(parents=True)
        (tmp_path / "run" / "evaluation" / "scores.csv").write_text("case,dice\nx,1\nx,1\n")
        unfinished = functions("real")["unfinished"]
        monkeypatch.setitem(unfinished.__globals__["config"], "dataset_dir", str(tmp_path))
        assert unfinished(["run", "other"]) == ["run/evaluated", "other/evaluated"]
        (tmp_path / "run" / "evaluated").touch()
        with pytest.raises(ValueError, match="run tested x, which is not in"):
            unfinished(["run", "other"])
        (tmp_path / "site" / "x").mkdir(parents=True)
        assert unfinished(["run", "other"]) == ["other/evaluated"]

    def test_scores_are_of_a_cross_validation_with_the_same_settings(self, training: Any):
        folds = functions("real")["folds_of_weights"](SimpleNamespace(bundle="brats_rfnet"))
        assert len(folds) == SCALES["real"]["cohorts"]["brats"]["folds"]
        assert set(folds) <= set(functions("real")["runs"]("main"))
