from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from passion_monai.evaluation.statistics import (
    compare,
    confidence_interval,
    contributions,
    overall,
    rank_biserial,
    summarise,
)
from passion_monai.evaluation.tables import SCORE_COLUMNS
from passion_monai.report.compare import main

CASES, COMBINATIONS, REGIONS = [f"c{n}" for n in range(12)], ("y", "x", "x+y"), ("whole", "core")


def make_scores(seed: int = 0, *, gain: float = 0.0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = list(itertools.product(CASES, COMBINATIONS, REGIONS))
    scores = pd.DataFrame(rows, columns=["case", "combination", "region"])
    return scores.assign(dice=0.4 + gain + rng.normal(0, 0.1, len(rows)))


class TestConfidenceInterval:
    def test_is_about_that_of_the_normal_distribution(self):
        values = np.random.default_rng(1).normal(3.0, 2.0, 400)
        half = 1.96 * values.std(ddof=1) / 20
        assert confidence_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)

    def test_is_wider_at_a_higher_level_and_the_same_each_time(self):
        values = [0.1, 0.4, 0.5, 0.9, 0.7]
        low, high = confidence_interval(values)
        wide_low, wide_high = confidence_interval(values, level=0.99)
        assert wide_low < low < np.mean(values) < high < wide_high
        assert confidence_interval(values) == (low, high)
        assert confidence_interval([*values, np.nan]) == (low, high)

    def test_of_hardly_anything(self):
        assert confidence_interval([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3))
        assert np.isnan(confidence_interval([0.3])).all()
        assert np.isnan(confidence_interval([np.nan, 0.3])).all()
        assert np.isnan(confidence_interval([])).all()


class TestSummarise:
    def test_means_and_intervals_of_each_group_in_order(self):
        scores = make_scores()
        scores.loc[(scores["case"] == "c3") & (scores["combination"] == "x"), "dice"] = np.nan
        result = summarise(scores, "dice")
        assert list(result) == ["combination", "region", "mean", "low", "high", "cases"]
        assert list(zip(result["combination"], result["region"], strict=True)) == [
            (name, region) for name in COMBINATIONS for region in REGIONS
        ]
        for row in result.itertuples(index=False):
            values = scores[(scores["combination"] == row.combination) & (scores["region"] == row.region)]["dice"]
            assert row.mean == pytest.approx(values.mean())
            assert (row.low, row.high) == pytest.approx(confidence_interval(values))
            assert row.cases == (11 if row.combination == "x" else 12)

    def test_seeds_are_averaged_and_their_spread_is_told(self):
        first, second = make_scores(0), make_scores(1)
        both = pd.concat([first.assign(seed=0), second.sample(frac=1, random_state=0).assign(seed=1)])
        averaged = first.assign(dice=(first["dice"] + second["dice"]) / 2)
        for function in (summarise, overall):
            result, expected = function(both, "dice"), function(averaged, "dice")
            pd.testing.assert_frame_equal(result.drop(columns="seed_std"), expected)
            means = [function(scores, "dice")["mean"] for scores in (first, second)]
            assert result["seed_std"].tolist() == pytest.approx(np.std(means, axis=0, ddof=1).tolist())
        assert overall(first.assign(seed=7), "dice")["seed_std"].isna().all()

    def test_says_what_is_wrong(self):
        scores = make_scores()
        with pytest.raises(ValueError, match=r"\['iou'\] are missing"):
            summarise(scores, "iou")
        with pytest.raises(ValueError, match=r"a row twice: .*'c0'.* need a column 'seed'"):
            overall(pd.concat([scores, scores]), "dice")
        with pytest.raises(ValueError, match=r"Every seed must have scored the same; .*'c2'.* is not there for each"):
            summarise(pd.concat([scores.assign(seed=0), scores[scores["case"] != "c2"].assign(seed=1)]), "dice")


def slow_overall(scores: dict[tuple[str, str, str], float], cases: list[str]) -> float:
    """Mean over regions and combinations of means over cases, which may be there several times."""
    means = []
    for region in REGIONS:
        by_combination = []
        for combination in COMBINATIONS:
            keys = [(case, combination, region) for case in cases]
            values = [scores[key] for key in keys if key in scores]
            if values:
                by_combination.append(np.mean(values))
        means.append(np.mean(by_combination))
    return float(np.mean(means))


class TestOverall:
    def test_bootstraps_cases_with_all_they_have(self):
        scores = make_scores()
        scores = scores.drop(scores.index[(scores["case"].isin(CASES[:4])) & scores["combination"].str.contains("x")])
        result = overall(scores, "dice")
        assert result["region"].tolist() == [*REGIONS, "all"]
        everything = result.iloc[-1]
        values = scores.set_index(["case", "combination", "region"])["dice"].to_dict()
        assert everything["mean"] == pytest.approx(slow_overall(values, CASES))
        rng = np.random.default_rng(5)
        drawn = [slow_overall(values, rng.choice(CASES, len(CASES)).tolist()) for _ in range(1000)]
        width = np.subtract(*np.quantile(drawn, [0.975, 0.025]))
        assert everything["high"] - everything["low"] == pytest.approx(width, rel=0.15)

    def test_rows_of_one_case_are_no_independent_values(self):
        """Each case has one value everywhere: nine times as many rows must not make the interval a third as wide."""
        values = np.random.default_rng(0).random(len(CASES))
        scores = make_scores()
        scores["dice"] = scores["case"].map(dict(zip(CASES, values, strict=True)))
        assert overall(scores, "dice").iloc[-1][["low", "high"]].tolist() == pytest.approx(confidence_interval(values))

    def test_a_metric_that_nobody_has(self):
        result = overall(make_scores().assign(hd95_mm=np.nan), "hd95_mm")
        assert result[["mean", "low", "high"]].isna().all(axis=None)
        assert result["cases"].tolist() == [0, 0, 0]


class TestCompare:
    def test_rows_are_what_scipy_says(self):
        first, second = make_scores(0), make_scores(1, gain=0.05)
        result = compare(first, second.sample(frac=1, random_state=0), "dice")
        columns = ["combination", "region", "difference", "low", "high", "p", "p_holm", "effect_size", "cases"]
        assert list(result) == columns
        assert len(result) == 6 + 3
        differences = second["dice"] - first["dice"]
        for row in result.iloc[:6].itertuples(index=False):
            values = differences[(first["combination"] == row.combination) & (first["region"] == row.region)]
            assert row.difference == pytest.approx(values.mean())
            assert (row.low, row.high) == pytest.approx(confidence_interval(values))
            assert row.p == pytest.approx(stats.wilcoxon(values).pvalue)
            assert row.cases == 12

    def test_all_is_of_means_per_case(self):
        first, second = make_scores(0), make_scores(1, gain=0.05)
        result = compare(first, second, "dice").iloc[6:]
        assert list(zip(result["combination"], result["region"], strict=True)) == [
            ("all", "whole"),
            ("all", "core"),
            ("all", "all"),
        ]
        by_case = (second["dice"] - first["dice"]).groupby(first["case"]).mean()
        assert result.iloc[-1]["difference"] == pytest.approx(by_case.mean())
        assert result.iloc[-1]["p"] == pytest.approx(stats.wilcoxon(by_case).pvalue)
        estimates = [overall(scores, "dice")["mean"].iloc[-1] for scores in (first, second)]
        assert result.iloc[-1]["difference"] == pytest.approx(estimates[1] - estimates[0])

    def test_holm_within_combinations_and_within_all(self):
        result = compare(make_scores(0), make_scores(1, gain=0.05), "dice")
        for family in (result.iloc[:6], result.iloc[6:]):
            ordered = sorted(family["p"])
            expected, largest = {}, 0.0
            for rank, p in enumerate(ordered):
                largest = max(largest, min(1.0, p * (len(ordered) - rank)))
                expected[p] = largest
            assert family["p_holm"].tolist() == pytest.approx([expected[p] for p in family["p"]])

    def test_equal_runs_do_not_differ(self):
        scores = make_scores()
        result = compare(scores, scores, "dice")
        assert (result[["p", "p_holm"]] == 1).all(axis=None)
        assert (result[["difference", "low", "high", "effect_size"]] == 0).all(axis=None)

    def test_pairs_without_a_value_are_left_out(self):
        first, second = make_scores(0), make_scores(1)
        first.loc[(first["case"] == "c0") & (first["region"] == "core"), "dice"] = np.nan
        second.loc[second["combination"] == "y", "dice"] = np.nan
        result = compare(first, second, "dice").set_index(["combination", "region"])
        assert result["cases"].tolist() == [0, 0, 12, 11, 12, 11, 12, 11, 12]
        assert result.loc[("y", "whole"), ["difference", "p", "p_holm", "effect_size"]].isna().all()
        assert result["p_holm"].notna().sum() == 7

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            ("case", "c3", r"same cases; only the first has \[\], only the second \['c3'\]"),
            ("combination", "x+y", r"same combinations; .*only the second \['x\+y'\]"),
            ("region", "core", r"same regions; .*only the second \['core'\]"),
        ],
    )
    def test_names_what_does_not_match(self, column: str, value: str, message: str):
        scores = make_scores()
        with pytest.raises(ValueError, match=message):
            compare(scores[scores[column] != value], scores, "dice")

    def test_names_single_rows_that_do_not_match(self):
        scores = make_scores()
        with pytest.raises(ValueError, match=r"same rows; only the first has \[\('c0', 'y', 'whole'\)\]"):
            compare(scores, scores[1:], "dice")


def test_rank_biserial_is_the_share_of_favourable_ranks_minus_the_others():
    assert rank_biserial([1.0, 2.0, 3.0]) == 1
    assert rank_biserial([-1.0, 2.0, 0.0, 3.0]) == pytest.approx((2 + 3 - 1) / 6)
    assert rank_biserial([-1.0, 1.0]) == 0
    assert rank_biserial([0.0, 0.0]) == 0


class TestCommand:
    def write(self, folder: Path, scores: pd.DataFrame) -> Path:
        rest = dict.fromkeys([column for column in SCORE_COLUMNS if column not in scores], 1.0)
        (folder / "evaluation").mkdir(parents=True)
        scores.assign(**rest)[list(SCORE_COLUMNS)].to_csv(folder / "evaluation" / "scores.csv", index=False)
        return folder

    def test_prints_a_table_and_writes_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        runs = [self.write(tmp_path / name, make_scores(seed)) for seed, name in enumerate("ab")]
        output = tmp_path / "new" / "compare.csv"
        main([*map(str, runs), "--output", str(output)])
        written = pd.read_csv(output)
        pd.testing.assert_frame_equal(written, compare(make_scores(0), make_scores(1), "dice"))
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].split() == list(written)
        assert f"{100 * written['difference'].iloc[0]:+.2f}" in printed[1]
        main([str(runs[0] / "evaluation" / "scores.csv"), str(runs[1]), "--metric", "assd_mm"])
        assert "+0.00" in capsys.readouterr().out

    def test_ends_with_what_is_wrong(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        run = self.write(tmp_path / "a", make_scores())
        with pytest.raises(SystemExit, match="2"):
            main([str(run), str(tmp_path / "b")])
        assert "No scores at" in capsys.readouterr().err
        other = self.write(tmp_path / "b", make_scores()[6:])
        with pytest.raises(SystemExit, match="2"):
            main([str(run), str(other)])
        assert "must have the same cases; only the first has ['c0']" in capsys.readouterr().err


class TestContributions:
    def test_is_what_is_gained_over_all_combinations_without_the_modality(self):
        names = ["x", "y", "z", "x+y", "x+z", "y+z", "x+y+z"]
        worth = {"x": 0.1, "y": 0.2, "z": 0.0}
        rows = [
            (case, name, region, offset + scale * sum(worth[part] for part in name.split("+")))
            for case, offset, scale in (("a", 0.0, 1.0), ("b", 0.3, 2.0))
            for name in names
            for region in ("whole", "core")
        ]
        scores = pd.DataFrame(rows, columns=["case", "combination", "region", "dice"])
        table = contributions(scores, "dice", modalities=("x", "y", "z"))
        assert list(zip(table["modality"], table["region"], strict=True))[:3] == [
            ("x", "whole"),
            ("x", "core"),
            ("y", "whole"),
        ]
        assert table["mean"].tolist() == pytest.approx([0.15, 0.15, 0.3, 0.3, 0, 0])
        assert table.loc[2, ["low", "high"]].tolist() == pytest.approx([0.2, 0.4])
        assert (table["cases"] == 2).all()

    def test_a_case_without_a_modality_says_nothing_of_it(self):
        rows = [("a", "x", 0.1), ("a", "y", 0.2), ("a", "x+y", 0.5), ("b", "x", 0.9)]
        scores = pd.DataFrame(rows, columns=["case", "combination", "dice"]).assign(region="whole")
        table = contributions(scores, "dice", modalities=("x", "y"))
        assert table["mean"].tolist() == pytest.approx([0.3, 0.4])
        assert table["cases"].tolist() == [1, 1]
