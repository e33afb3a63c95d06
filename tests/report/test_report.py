from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from monai.data import MetaTensor

from passion_monai.evaluation.kept_maps import keep_case
from passion_monai.evaluation.tables import read_scores
from passion_monai.presence import combination_name, combinations, write_presence
from passion_monai.report import calibration, scores, writing
from passion_monai.report.__main__ import main
from passion_monai.report.groups import Group
from passion_monai.report.pictures import kept_cases

MODALITIES = ("flair", "t1")
REGIONS = {"whole": [1, 2], "core": [2]}
CASES = ("001", "002", "003")
COMBINATIONS = [combination_name(row, MODALITIES) for row in combinations(2)]
PASSION = {"objective": "passion", "lambda_pixel": 0.5, "lambda_prototype": 0.1, "use_task_mask": True}


def make_run(
    folder: Path, *, seed: int = 0, dice: float = 0.5, files: bool = True, scores: bool = True, **settings: Any
) -> Path:
    """The files of a run whose Dice is `dice`, and a little more for each case, combination and region."""
    record = {
        "modalities": MODALITIES,
        "phantom": True,
        "dataset": "brats",
        "backbone": "RFNet",
        "class_names": ["background", "edema", "core"],
        "regions": REGIONS,
        "missing_rates": [0.5, 0.25],
        "seed": seed,
        "objective": "baseline",
        "modality_dropout": False,
        **dict.fromkeys(("lambda_pixel", "lambda_prototype"), 0),
        "use_task_mask": False,
        "adaptive_beta": True,
        "epochs": 3,
        **settings,
    }
    (folder / "evaluation").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    if scores:
        make_scores(dice).to_csv(folder / "evaluation" / "scores.csv", index=False)
    if files:
        make_files(folder, seed)
    return folder


def make_scores(dice: float) -> pd.DataFrame:
    rows = []
    for i, case in enumerate(CASES):
        for j, combination in enumerate(COMBINATIONS):
            for k, region in enumerate(REGIONS):
                names = ("hd95_mm", "hd95_brats", "hd95_released", "assd_mm")
                distances = {name: 1.0 + i + j + 10 * n for n, name in enumerate(names)}
                values = {"dice": dice + 0.01 * i + 0.1 * j - 0.05 * k, **distances, "prediction_ml": 1, "label_ml": 1}
                rows.append({"case": case, "combination": combination, "region": region, **values})
    return pd.DataFrame(rows)


def make_files(folder: Path, seed: int) -> None:
    """What a run leaves beside its scores; of another seed, its calibration error is 2 % higher."""
    write_presence(
        folder / "presence.json", ["a", "b", "c", "d"], [[1, 0], [1, 1], [0, 1], [0, 1]], modalities=MODALITIES
    )
    log = pd.DataFrame({"epoch": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "beta_flair": [2.0, 2.1, 2.2]})
    log.assign(relative_preference_flair=0.1, relative_preference_t1=-0.1, beta_t1=1.3).to_csv(
        folder / "training.csv", index=False
    )
    errors = [(case, name, 0.1 + 0.1 * j + 0.02 * seed) for case in CASES for j, name in enumerate(COMBINATIONS)]
    pd.DataFrame(errors, columns=["case", "combination", "ece"]).to_csv(
        folder / "evaluation" / "calibration.csv", index=False
    )
    label = torch.zeros(1, 8, 8, 3, dtype=torch.int16)
    label[0, 2:5, 2:6, 1] = 1
    label[0, 3, 3, 1] = 2
    image = MetaTensor(torch.linspace(-1, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3), affine=torch.eye(4))
    keep_case(
        folder / "evaluation" / "maps" / "001.npz",
        image=image,
        presence=[True, True],
        modalities=MODALITIES,
        label=MetaTensor(label, affine=torch.eye(4)),
        predictions=label.expand(3, -1, -1, -1),
        combinations=COMBINATIONS,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two seeds of a Baseline and of PASSION, a part of it, other missing rates, and one with a name of its own."""
    folder = tmp_path_factory.mktemp("runs")
    arguments: dict[str, dict[str, Any]] = {
        "baseline_0": {"dice": 0.4},
        "baseline_1": {"dice": 0.5, "seed": 1},
        "passion_0": {"dice": 0.6, **PASSION},
        "passion_1": {"dice": 0.7, "seed": 1, **PASSION},
        "pixel": {"dice": 0.55, **PASSION, "lambda_prototype": 0},
        "baseline_other": {"dice": 0.3, "missing_rates": [0.25, 0.5]},
    }
    paths = [str(make_run(folder / name, **values)) for name, values in arguments.items()]
    mine = make_run(folder / "mine", dice=0.45, files=False, missing_rates=None, phantom=False)
    return [*paths, f"mine & <others>={mine}"]


@pytest.fixture(scope="module")
def report(runs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    main([*runs, "--output", str(folder)])
    return folder


class Page(HTMLParser):
    """What a browser would load, and the rows of each table by the name of its files."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.in_cell = False
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.append(tag)
        self.sources += [str(values[name]) for name in ("src", "srcset", "data", "action") if name in values]
        self.links += [str(values["href"])] if "href" in values else []
        if tag == "img":
            assert values["alt"]
        if tag == "table":
            self.rows[str(values["aria-labelledby"]).removesuffix("_caption")] = []
        elif tag == "tr":
            next(reversed(self.rows.values())).append([])
        elif tag in ("td", "th"):
            next(reversed(self.rows.values()))[-1].append("")
            self.in_cell = True
        elif tag == "strong" and self.in_cell:
            next(reversed(self.rows.values()))[-1][-1] += "*"

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            next(reversed(self.rows.values()))[-1][-1] += data


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page(report / "index.html")


def first_lines(row: list[str], number: int = 0) -> list[str]:
    return [cell.split("\n")[0] for cell in row[number:]]


def test_the_page_loads_nothing_and_runs_nothing(page: Page, report: Path) -> None:
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    files = [link for link in page.links if not link.startswith("#")]
    assert len(files) > 20
    assert all((report / link).stat().st_size for link in files)
    ids = re.findall(r'<section id="(\w+)"', page.text)
    assert [link for link in page.links if link.startswith("#")] == [f"#{name}" for name in ids]
    assert not re.search(r"@import|url\(|http", page.text)


def test_runs_that_differ_in_their_seed_are_one_method(page: Page) -> None:
    rows = [row[:5] for row in page.rows["runs"]]
    assert rows[1:] == [
        ["Baseline", "RFNet", "(0.5, 0.25)", "0, 1", "3"],
        ["PASSION", "RFNet", "(0.5, 0.25)", "0, 1", "3"],
        ["pixel + β", "RFNet", "(0.5, 0.25)", "0", "3"],
        ["Baseline", "RFNet", "(0.25, 0.5)", "0", "3"],
        ["mine & <others>", "RFNet", "as the cases are", "0", "3"],
    ]
    assert "PHANTOM" in page.text
    assert "7 runs of 4 methods" in page.text
    assert "scored on 3 test cases." in page.text


def test_table_1_has_the_means_of_each_method(page: Page) -> None:
    head, names, *rows = page.rows["table1"]
    assert head == ["", "Dice [%]", "HD95 [mm]", "HD95 as in the paper [mm]"]
    assert names == ["missing rates", "method", *["whole", "core", "Avg."] * 3]
    # Mean over cases (+1 %), combinations (+10 %) and the seeds 40 % and 50 %; the core has 5 % less.
    assert rows[0][:5] == [
        *("(0.5, 0.25)", "Baseline", "56.00\n[55.00, 57.00]\n± 7.07", "51.00\n[50.00, 52.00]\n± 7.07"),
        "53.50\n[52.50, 54.50]\n± 7.07",
    ]
    assert first_lines(rows[1], 2) == ["*76.00", "*71.00", "*73.50", *["13.00"] * 3, *["23.00"] * 3]
    assert first_lines(rows[4], 2)[:3] == ["56.00", "51.00", "53.50"]  # alone with its rates: best of nothing


def test_few_and_many_modalities_are_told_apart(page: Page) -> None:
    metrics, names, *rows = page.rows["by_count"]
    assert metrics == ["", "Dice [%]"]
    assert names == ["missing rates", "method", "1 of 2", "2 of 2"]
    assert rows[0][:3] == ["(0.5, 0.25)", "Baseline", "48.50\n[47.50, 49.50]\n± 7.07"]  # 43.5 and 53.5 % from one
    assert first_lines(rows[1], 2) == ["*68.50", "*83.50"]


def test_regions_that_a_label_lacks_are_left_out_in_a_column_of_their_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", files=False)

    def without_core(table: pd.DataFrame) -> pd.DataFrame:
        lacking = (table["case"] == CASES[0]) & (table["region"] == "core")
        return table.assign(label_ml=table["label_ml"].mask(lacking, 0), dice=table["dice"].mask(lacking, 1.0))

    change_scores(run, without_core)
    main([str(run), "--output", str(tmp_path / "report")])
    page = Page(tmp_path / "report" / "index.html")
    metrics, regions, first = page.rows["table1"]
    assert metrics[1:3] == ["Dice [%]", "Dice of regions in the label [%]"]
    assert regions[2:8] == ["whole", "core", "Avg."] * 2
    # The cores of the other two cases have 56 and 57 %.
    assert first_lines(first)[2:8] == ["61.00", "71.00", "66.00", "61.00", "56.50", "58.75"]
    assert page.rows["by_count"][0] == ["", "Dice [%]", "Dice of regions in the label [%]"]
    assert "table3_dice_excluded" in page.rows


def test_table_2_ticks_the_parts(page: Page) -> None:
    assert page.rows["table2"][1][:6] == ["missing rates", "pixel", "prototype", "δ", "β", "method"]
    ticks = {tuple(row[:1] + row[5:6]): row[1:5] for row in page.rows["table2"][2:]}
    assert ticks["(0.5, 0.25)", "Baseline"] == [""] * 4
    assert ticks["(0.5, 0.25)", "PASSION"] == ["✓"] * 4
    assert ticks["(0.5, 0.25)", "pixel + β"] == ["✓", "", "", "✓"]


def test_table_3_has_a_row_for_each_combination(page: Page) -> None:
    head, names, *rows = page.rows["table3_dice"]
    assert head == ["", "whole", "core"]
    assert names[:4] == ["flair", "t1", "Baseline, (0.5, 0.25)", "PASSION, (0.5, 0.25)"]
    assert [row[:2] for row in rows] == [["●", "○"], ["○", "●"], ["●", "●"], ["Avg.", ""]]
    assert [first_lines(row)[2:4] for row in rows] == [
        ["46.00", "*66.00"],
        ["56.00", "*76.00"],
        ["66.00", "*86.00"],
        ["56.00", "*76.00"],
    ]
    for table, tens in (("table3_hd95", 10), ("table3_hd95_released", 20)):
        distances = [first_lines(row)[2] for row in page.rows[table][2:]]
        assert distances == [f"{tens + ones}.00" for ones in (2, 3, 4, 3)]


def test_methods_are_tested_against_the_baseline_with_their_rates(page: Page, report: Path) -> None:
    rows = page.rows["tests"][1:]
    assert {tuple(row[:2]) for row in rows} == {
        ("PASSION, (0.5, 0.25)", "Baseline, (0.5, 0.25)"),
        ("pixel + β, (0.5, 0.25)", "Baseline, (0.5, 0.25)"),
    }
    # Three cases that all differ by 20 %: p is 0.25, three times that for three tests.
    assert rows[0][2:] == ["whole", "+20.00\n[+20.00, +20.00]", "0.75", "+1.00", "3", "0 better, 0 worse"]
    table = pd.read_csv(report / "tests.csv")
    assert len(table) == 2 * (3 * 2 + 3)


def test_what_each_modality_adds(page: Page) -> None:
    rows = {tuple(row[:2]): row[2:] for row in page.rows["contributions"][1:]}
    # flair on top of t1 is x+y minus y: 10 %; t1 on top of flair is 20 %.
    assert rows["PASSION, (0.5, 0.25)", "flair"] == ["10.00\n[10.00, 10.00]"] * 2
    assert rows["PASSION, (0.5, 0.25)", "t1"] == ["20.00\n[20.00, 20.00]"] * 2


def test_missing_rates_are_those_of_the_cases(page: Page) -> None:
    rows = page.rows["missing_rates"][1:]
    assert rows[0] == ["Baseline, (0.5, 0.25)", "0", "4", "0.500 (0.5)", "0.250 (0.25)"]
    assert len(rows) == 6


def test_calibration_in_percent(page: Page) -> None:
    rows = page.rows["calibration"][1:]
    # Each case's mean over two seeds, which differ by 2 %; the cases do not differ.
    assert [row[:3] for row in rows] == [
        ["●", "○", "11.00\n[11.00, 11.00]"],
        ["○", "●", "21.00\n[21.00, 21.00]"],
        ["●", "●", "31.00\n[31.00, 31.00]"],
    ]


def test_calibration_after_temperature_scaling_stands_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SECTIONS", [calibration.calibration])
    run = make_run(tmp_path / "run")
    path = run / "evaluation" / "calibration.csv"
    errors = pd.read_csv(path, dtype={"case": str})
    errors.assign(ece_calibrated=errors["ece"] / 2).to_csv(path, index=False)
    main([str(run), "--output", str(tmp_path / "report")])
    page = Page(tmp_path / "report" / "index.html")
    assert page.rows["calibration"][0][2:] == ["Baseline", "Baseline, calibrated"]
    assert first_lines(page.rows["calibration"][1])[2:] == ["10.00", "*5.00"]


def test_lesion_wise_scores_stand_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SECTIONS", [scores.methods, scores.combinations])
    runs = [make_run(tmp_path / name, files=False, objective=name) for name in ("baseline", "pmr")]
    change_scores(runs[0], lambda table: table.assign(lesion_dice=0.25, lesion_hd95=50.0))
    main([*map(str, runs), "--output", str(tmp_path / "one")])
    page = Page(tmp_path / "one" / "index.html")
    assert not any("lesion" in cell for rows in page.rows.values() for row in rows for cell in row)
    change_scores(runs[1], lambda table: table.assign(lesion_dice=0.75, lesion_hd95=20.0))
    main([*map(str, runs), "--output", str(tmp_path / "both")])
    page = Page(tmp_path / "both" / "index.html")
    assert "lesion-wise Dice [%]" in page.rows["table1"][0]
    assert first_lines(page.rows["table3_lesion_dice"][-1])[2:4] == ["25.00", "*75.00"]
    assert first_lines(page.rows["table3_lesion_hd95"][-1])[2:4] == ["50.00", "*20.00"]
    assert "Lesion-wise scores are means over the lesions" in (tmp_path / "both" / "index.html").read_text("utf-8")


def test_methods_are_compared_with_those_of_their_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with the Baseline, wherever it stands."""
    monkeypatch.setattr(writing, "SECTIONS", [scores.methods, scores.tests])  # figures take seconds
    values = ({"dice": 0.6, **PASSION}, {"dice": 0.4}, {"dice": 0.8, "backbone": "MMFormer"})
    runs = [str(make_run(tmp_path / str(index), files=False, **some)) for index, some in enumerate(values)]
    main([*runs, "--output", str(tmp_path / "report")])
    page = Page(tmp_path / "report" / "index.html")
    assert [first_lines(row)[1:4] for row in page.rows["table1"][2:]] == [
        ["PASSION", "RFNet", "*71.00"],
        ["Baseline", "RFNet", "51.00"],
        ["Baseline", "MMFormer", "91.00"],
    ]
    assert {tuple(row[:2]) for row in page.rows["tests"][1:]} == {("PASSION, RFNet", "Baseline, RFNet")}


def test_of_several_seeds_the_first_that_was_kept_is_shown(tmp_path: Path) -> None:
    runs = [SimpleNamespace(folder=tmp_path / name) for name in ("first", "second")]
    for run, cases in zip(runs, (["001"], ["001", "002"]), strict=True):
        (run.folder / "evaluation" / "maps").mkdir(parents=True)
        for case in cases:
            (run.folder / "evaluation" / "maps" / f"{case}.npz").touch()
    kept = kept_cases(Group("any", runs))
    assert {case: path.relative_to(tmp_path).parts[0] for case, path in kept.items()} == {
        "001": "first",
        "002": "second",
    }


def test_what_the_runs_lack_is_left_out_and_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", files=False, phantom=False)
    main([str(run), "--output", str(tmp_path / "report")])
    page = Page(tmp_path / "report" / "index.html")
    assert "PHANTOM" not in page.text
    missing = re.findall(r'class="missing">(.*?)</p>', page.text)
    text = " ".join(re.sub("<.*?>", "", line) for line in missing)
    for remedy in (
        "--lambda_pixel 0",
        "another method",
        "--keep_cases 2",
        "training.csv",
        "--resume True",
        "--calibration",
    ):
        assert remedy in text
    tables = {"runs", "table1", "by_count", "table3_dice", "table3_hd95", "table3_hd95_released", "contributions"}
    assert set(page.rows) == tables


def test_only_signs_that_a_table_has_are_explained(tmp_path: Path) -> None:
    single = make_run(tmp_path / "single", files=False)
    change_scores(single, lambda table: table[table["case"] == CASES[0]])
    runs = [make_run(tmp_path / f"seed{seed}", files=False, seed=seed) for seed in range(2)]
    other = make_run(tmp_path / "other", files=False, objective="pmr")
    signs = ("In brackets", "± is", "is bold")
    for name, some in {"": [single], "[]": [other], "[]±": runs, "[]±b": [*runs, other]}.items():
        output = tmp_path / f"report {name}"
        main([*map(str, some), "--output", str(output)])
        text = Page(output / "index.html").text
        assert [sign in text for sign in signs] == [sign in name for sign in ("[]", "±", "b")]


def make_folds(folder: Path, *, seeds: Sequence[int] = range(9), **settings: Any) -> list[str]:
    """Runs of one method, of which each has scored one of the cases; together they have what `make_run` has."""
    named = zip(CASES, seeds, strict=False)
    folds = [make_run(folder / case, seed=seed, files=False, **settings) for case, seed in named]
    for fold, case in zip(folds, CASES, strict=True):
        change_scores(fold, lambda table, case=case: table[table["case"] == case])
    return list(map(str, folds))


@pytest.mark.parametrize("same_seed", [False, True])
def test_folds_are_one_run_of_all_cases(tmp_path: Path, same_seed: bool) -> None:
    whole = [make_run(tmp_path / "whole"), make_run(tmp_path / "better", dice=0.6, objective="pmr")]
    seeds = [0] * len(CASES) if same_seed else range(len(CASES))
    folds = make_folds(tmp_path / "a", seeds=seeds) + make_folds(tmp_path / "b", seeds=seeds, dice=0.6, objective="pmr")
    for runs, name in ((whole, "whole_report"), (folds, "fold_report")):
        main([*map(str, runs), "--output", str(tmp_path / name)])
    for table in ("table1", "table3_dice", "tests"):
        expected, found = ((tmp_path / name / f"{table}.csv").read_text() for name in ("whole_report", "fold_report"))
        assert found == expected, table


def test_methods_with_other_folds_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folds = make_folds(tmp_path / "a") + make_folds(tmp_path / "b", objective="pmr")
    with pytest.raises(SystemExit):
        main([*folds[:-1], "--output", str(tmp_path / "report")])
    assert "the same folds for each method" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "evaluation" / "scores.csv").unlink(), r"other has no evaluation/scores\.csv; .*evaluate"),
        (lambda run: (run / "run.json").unlink(), r"other has no run\.json.*--resume True"),
        (lambda run: (run / "run.json").write_text("{"), r"run\.json cannot be read"),
        (lambda run: (run / "run.json").write_text("{}"), r"run\.json lacks \['modalities'"),
        (lambda run: change_scores(run, lambda table: table.drop(columns="dice")), r"scores\.csv.*'dice'.*missing"),
        (lambda run: change_scores(run, lambda table: table.assign(dice="x")), r"scores\.csv cannot be read.*again"),
        (lambda run: change_scores(run, lambda table: table[:0]), r"has no scores yet"),
        (lambda run: (run / "evaluation" / "scores.csv").write_bytes(b"\xff\n"), r"scores\.csv cannot be read"),
        (lambda run: change_scores(run, lambda table: table.assign(region="x")), r"other modalities or regions.*'x'"),
        (
            lambda run: change_scores(run, lambda table: table.replace("flair", "x")),
            r"other modalities or regions.*'x'",
        ),
        (lambda run: change_scores(run, lambda table: table.replace("001", "009")), r"'001', '009'.*same --datalist"),
        (lambda run: change_settings(run, regions={"core": [2], "whole": [1]}), r"their regions are .* for each"),
        (lambda run: change_settings(run, seed=0), r"both 'Baseline' with seed 0; .*NAME=.*other"),
        (lambda run: (run / "training.csv").write_text("x\n1\n"), r"training\.csv is not a training log"),
        (lambda run: (run / "evaluation" / "calibration.csv").write_text("x\n1\n"), r"calibration\.csv must have"),
        (lambda run: (run / "evaluation" / "maps" / "001.npz").write_text("x"), r"001\.npz is no kept case"),
    ],
)
def test_errors_name_the_folder_and_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    first, other = make_run(tmp_path / "first"), make_run(tmp_path / "other", seed=1)
    change(other)
    if "npz" in message:  # of the first run's seeds, one is looked at
        first.rename(tmp_path / "unused")
        first = make_run(tmp_path / "first", files=False)
    with pytest.raises(SystemExit):
        main([str(first), str(other), "--output", str(tmp_path / "report")])
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def change_scores(run: Path, change: Any) -> None:
    path = run / "evaluation" / "scores.csv"
    change(read_scores(path)).to_csv(path, index=False)


def change_settings(run: Path, **settings: Any) -> None:
    path = run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
