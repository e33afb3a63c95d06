from __future__ import annotations

import pandas as pd
import pytest

from benchmarks.table import BACKBONES, commands, pattern_weights, step_table, variant_table, window_table


def test_shares_of_patterns_are_those_of_the_papers_rates() -> None:
    one, two, three, four = pattern_weights()
    assert four == pytest.approx(0.8 * 0.6 * 0.4 * 0.2 / (1 - 0.2 * 0.4 * 0.6 * 0.8))
    assert one + two + three + four == pytest.approx(1)
    assert one * 1 + two * 2 + three * 3 + four * 4 == pytest.approx(2 / (1 - 0.2 * 0.4 * 0.6 * 0.8))


def steps() -> pd.DataFrame:
    """A step takes as many seconds as there are modalities, the dense form ten, whatever is there."""
    common = {"allocator": "kept", "objective": "released", "size": 80, "checkpointing": False, "form": "sparse"}
    common |= {"peak_rss_gib": 1.0, "flops": 1e9, "fraction_of_conv_peak": 0.5}
    rows = []
    for name in BACKBONES:
        row = {**common, "backbone": name}
        rows += [{**row, "present": present, "cpu_seconds": float(present)} for present in (1, 2, 3, 4)]
        rows.append({**row, "form": "dense", "present": 4, "cpu_seconds": 10.0})
        rows.append({**row, "checkpointing": True, "present": 4, "cpu_seconds": 6.0, "peak_rss_gib": 0.5})
        rows.append({**row, "objective": "paper", "present": 2, "cpu_seconds": 1.5})
        rows.append({**row, "allocator": "default", "present": 2, "cpu_seconds": 2.5})
        rows += [{**row, "size": size, "present": 2, "cpu_seconds": (size / 80) ** 3} for size in (48, 64)]
    return pd.DataFrame(rows)


def test_a_ratio_is_of_rows_of_one_run() -> None:
    table = step_table(steps())
    mean = sum(present * share for present, share in enumerate(pattern_weights(), start=1))
    assert table["mean"].tolist() == pytest.approx([mean] * len(BACKBONES))
    assert table["times faster"].tolist() == pytest.approx([10 / mean] * len(BACKBONES))


def test_variants_are_multiples_of_the_step_that_they_vary() -> None:
    for row in variant_table(steps()).to_dict("records"):
        assert row == pytest.approx(
            {
                "paper's objective": 0.75,
                "default allocator": 1.25,
                "checkpointing": 1.5,
                "checkpointing, GiB": 0.5,
                "48^3, by voxel": 0.5,
                "64^3, by voxel": 0.5,
            }
        )


def test_combinations_are_compared_with_passes() -> None:
    rows = [
        {"backbone": name, "present": present, "cpu_seconds": seconds, "combinations": every, "separate": apart}
        for name in BACKBONES
        for present, seconds, every, apart in [(4, 3, False, False), (1, 1, False, False), (4, 5, 1, 0), (4, 10, 0, 1)]
    ]
    assert window_table(pd.DataFrame(rows))["times faster"].tolist() == [2] * len(BACKBONES)


def test_every_row_is_measured_once() -> None:
    texts = [" ".join(command) for command in commands()]
    assert len(set(texts)) == len(texts)
    assert sum("--form dense" in text for text in texts) == len(BACKBONES)
