from __future__ import annotations

import itertools

import pandas as pd
import pytest

from benchmarks.table import BACKBONES, commands, pattern_weights, step_table


def test_shares_of_patterns_are_those_of_the_papers_rates() -> None:
    one, two, three, four = pattern_weights()
    assert four == pytest.approx(0.8 * 0.6 * 0.4 * 0.2 / (1 - 0.2 * 0.4 * 0.6 * 0.8))
    assert one + two + three + four == pytest.approx(1)
    assert one * 1 + two * 2 + three * 3 + four * 4 == pytest.approx(2 / (1 - 0.2 * 0.4 * 0.6 * 0.8))


def test_a_ratio_is_of_rows_of_one_run() -> None:
    """A step takes as many seconds as there are modalities, the dense form ten, whatever is there."""
    common = {"allocator": "kept", "objective": "released", "size": 80, "checkpointing": False, "peak_rss_gib": 1.0}
    rows = [
        {**common, "backbone": backbone, "form": "sparse", "present": present, "cpu_seconds": float(present)}
        for backbone, present in itertools.product(BACKBONES, (1, 2, 3, 4))
    ]
    rows += [{**common, "backbone": name, "form": "dense", "present": 4, "cpu_seconds": 10.0} for name in BACKBONES]
    rows += [{**row, "checkpointing": True, "cpu_seconds": 99.0} for row in rows]
    table = step_table(pd.DataFrame(rows), "kept", "released")
    mean = sum(present * share for present, share in enumerate(pattern_weights(), start=1))
    assert table["mean"].tolist() == pytest.approx([mean] * 3)
    assert table["times faster"].tolist() == pytest.approx([10 / mean] * 3)


def test_every_row_is_measured_once() -> None:
    texts = [" ".join(command) for command in commands()]
    assert len(set(texts)) == len(texts)
    assert sum("--form dense" in text for text in texts) == 2 * len(BACKBONES)
