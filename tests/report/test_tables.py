from __future__ import annotations

import numpy as np
import pandas as pd

from passion_monai.report.tables import cells, header, is_best, pivot, to_latex, with_interval

NUMBERS = pd.DataFrame(
    {
        "method": ["b", "b", "a", "a"],
        "metric": ["Dice [%]", "HD95", "Dice [%]", "HD95"],
        "region": ["x"] * 4,
        "mean": [50.0, 3.0, 49.999, 2.0],
        "low": [40.0, np.nan, 45.0, 1.0],
        "high": [60.0, np.nan, 55.0, 4.0],
        "sign": [1, -1, 1, -1],
    }
)


def test_with_interval_leaves_out_what_is_not_there() -> None:
    assert with_interval(NUMBERS)[:2].tolist() == ["50.00\n[40.00, 60.00]", "3.00"]
    assert with_interval(NUMBERS.assign(seed_std=0.5), sign="+")[1] == "+3.00\n± 0.50"
    assert with_interval(NUMBERS.assign(mean=np.nan))[1] == "-"
    assert with_interval(NUMBERS.assign(mean=-0.001))[1] == "0.00"  # and not -0.00


def test_the_best_is_the_highest_or_the_lowest_unless_all_look_the_same() -> None:
    assert is_best(NUMBERS, ["metric"]).tolist() == [False, False, False, True]
    higher = NUMBERS.assign(mean=[50.0, 3.0, 50.1, 3.0])
    assert is_best(higher, ["metric"]).tolist() == [False, False, True, False]


def test_pivot_keeps_the_order_and_puts_groups_of_columns_together() -> None:
    table = pivot(pd.concat([NUMBERS, NUMBERS.assign(region="w")]), "mean", ["method"], ["metric", "region"])
    assert list(table.index) == ["b", "a"]
    assert list(table.columns) == [("Dice [%]", "x"), ("Dice [%]", "w"), ("HD95", "x"), ("HD95", "w")]
    assert table.loc["b", ("HD95", "w")] == 3
    assert header(table) == [
        [("", 1), ("Dice [%]", 2), ("HD95", 2)],
        [("method", 1), ("x", 1), ("w", 1), ("x", 1), ("w", 1)],
    ]
    rows = list(cells(table, table > 49.9995))
    assert rows[0] == (["b"], [("50.0", True), ("50.0", True), ("3.0", False), ("3.0", False)])


def test_latex_has_symbols_and_no_character_that_means_something() -> None:
    index = pd.MultiIndex.from_tuples([("●", "○", "x & y_1")], names=["t_1", "t2", "method"])
    text = pd.DataFrame({"a_b %": ["1\n± 2"]}, index=index)
    code = to_latex(text, pd.DataFrame(True, index=text.index, columns=text.columns))
    assert r"a\_b \%" in code
    assert r"t\_1 & t2" in code
    assert r"$\bullet$ & $\circ$ & x \& y\_1 & \bfseries 1" in code
    assert r"$\pm$ 2" in code
    assert r"\toprule" in code
