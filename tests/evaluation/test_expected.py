from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from passion_monai.evaluation.expected import (
    FILE_NAME,
    check_replaceable,
    checksum,
    read_expected_scores,
    write_expected_scores,
)


def make_scores() -> pd.DataFrame:
    """Of "a" two cases have a distance, of "a+b" one; a third case has no such region, and found or not, scores so."""
    rows = [("1", "a", 0.2, 5.0), ("2", "a", 0.6, 7.0), ("1", "a+b", 0.8, np.nan), ("2", "a+b", 1.0, 1.0)]
    without = [("3", "a", 1.0, 0.0), ("3", "a+b", 0.0, np.nan)]
    table = pd.DataFrame(rows + without, columns=["case", "combination", "dice", "hd95_mm"])
    return table.assign(region="whole", label_ml=[9.0] * len(rows) + [0.0] * len(without))


def make_run(folder: Path) -> Path:
    """Weights, and the scores that an evaluation of them wrote."""
    weights = folder / "models" / "model.pt"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    path = folder / "evaluation" / FILE_NAME
    write_expected_scores(path, make_scores(), weights_sha256=checksum(weights), data="two cases")
    return weights


def test_scores_are_told_by_combination_with_the_number_of_cases(tmp_path: Path) -> None:
    expected = read_expected_scores(make_run(tmp_path))
    assert expected is not None
    assert expected["data"] == "two cases"
    single = expected["combinations"]["a"]["whole"]
    assert single["dice"] == {"mean": 0.4, "low": 0.2, "high": 0.6, "cases": 2}
    assert single["hd95_mm"]["mean"] == 6.0
    both = expected["combinations"]["a+b"]["whole"]
    assert both["dice"]["mean"] == 0.9
    # One case says nothing of how cases differ.
    assert both["hd95_mm"] == {"mean": 1.0, "low": None, "high": None, "cases": 1}


def test_other_weights_have_no_scores(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = make_run(tmp_path)
    weights.write_bytes(b"others")
    with caplog.at_level(logging.WARNING):
        assert read_expected_scores(weights) is None
    assert f"is of other weights than {weights}" in caplog.text


def test_what_was_not_evaluated_has_none(tmp_path: Path) -> None:
    assert read_expected_scores(tmp_path / "models" / "model.pt") is None


def test_several_networks_have_the_scores_of_their_mean(tmp_path: Path) -> None:
    weights = make_run(tmp_path)
    both = [weights, weights.with_name("other.pt")]
    both[1].write_bytes(b"others")
    assert read_expected_scores(both) is None
    path = tmp_path / "evaluation" / FILE_NAME
    write_expected_scores(path, make_scores(), weights_sha256=checksum(both), data="two cases")
    assert read_expected_scores(both) is not None
    assert read_expected_scores(both[::-1]) is None
    assert read_expected_scores(weights) is None


def test_scores_that_came_with_a_bundles_weights_are_not_replaced(tmp_path: Path) -> None:
    weights = make_run(tmp_path)
    folder = tmp_path / "evaluation"
    check_replaceable(folder)
    (tmp_path / "weights.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"came with the weights .* another --output_dir; .* --ckpt_path .*model\.pt"):
        check_replaceable(folder)
    check_replaceable(tmp_path / "elsewhere" / "evaluation")
    weights.write_bytes(b"of a new training")
    check_replaceable(folder)


@pytest.mark.parametrize("content", ["{", "{}", "[]", json.dumps({"weights_sha256": ""})])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    weights = make_run(tmp_path)
    (tmp_path / "evaluation" / FILE_NAME).write_text(content)
    with pytest.raises(ValueError, match=rf"{FILE_NAME} cannot be read .*run the evaluation again"):
        read_expected_scores(weights)
