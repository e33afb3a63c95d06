"""Tables of the report, for HTML and LaTeX."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["cells", "header", "is_best", "nothing_bold", "pivot", "to_latex", "with_interval"]

_DECIMALS = 2
_LATEX = {
    "●": r"$\bullet$",
    "○": r"$\circ$",
    "✓": r"$\checkmark$",
    "±": r"$\pm$",
    "δ": r"$\delta$",
    "β": r"$\beta$",
    "λ": r"$\lambda$",
}


def with_interval(numbers: pd.DataFrame, *, sign: str = "") -> pd.Series:
    """Means as text, with the interval and, if there are several seeds, their spread below.

    Args:
        numbers: columns ``mean, low, high``, and ``seed_std`` if there are several seeds.
        sign: "+" also writes the sign of positive numbers.
    """

    def text(row: Mapping[Any, float]) -> str:
        lines = [_number(row["mean"], sign)]
        if pd.notna(row["low"]):
            lines.append(f"[{_number(row['low'], sign)}, {_number(row['high'], sign)}]")
        if pd.notna(row.get("seed_std", np.nan)):
            lines.append(f"± {_number(row['seed_std'])}")
        return "\n".join(lines)

    return pd.Series([text(row) for row in numbers.to_dict("records")], index=numbers.index, dtype=object)


def is_best(numbers: pd.DataFrame, within: list[str]) -> pd.Series:
    """Whether a mean, as rounded in the table, is the best of its group; False if all are equal.

    Args:
        numbers: columns ``mean`` and ``sign``; sign is 1 if higher is better, -1 if lower is.
        within: columns with equal values within a group.
    """
    shown = numbers["mean"].round(_DECIMALS) * numbers["sign"]
    groups = shown.groupby([numbers[key] for key in within])
    return shown.eq(groups.transform("max")) & (groups.transform("nunique") > 1)


def pivot(numbers: pd.DataFrame, value: str, rows: list[str], columns: list[str]) -> pd.DataFrame:
    """Pivot one column of a long table by other columns.

    Args:
        numbers: the long table.
        value: name of the column to show.
        rows: names of the columns that label the rows, in order of appearance.
        columns: likewise for the columns; the first of them groups the others.
    """
    table = numbers.set_index([*rows, *columns])[value].unstack(columns)
    shown = numbers[columns].drop_duplicates(ignore_index=True)
    ranks = pd.DataFrame({key: pd.factorize(shown[key])[0] for key in columns})
    ordered = shown.loc[ranks.sort_values(columns).index]
    return table.reindex(index=_index(numbers[rows].drop_duplicates()), columns=_index(ordered))


def nothing_bold(text: pd.DataFrame) -> pd.DataFrame:
    """False for every cell of a table."""
    return pd.DataFrame(False, index=text.index, columns=text.columns)


def header(text: pd.DataFrame) -> list[list[tuple[str, int]]]:
    """Lines of a table's header: each label and the number of columns it spans."""
    names = [(str(name), 1) for name in text.index.names]
    columns = [key if isinstance(key, tuple) else (key,) for key in text.columns]
    lines = []
    for level in range(text.columns.nlevels - 1):
        groups = itertools.groupby(columns, key=lambda key: key[: level + 1])
        lines.append([("", len(names)), *((str(key[-1]), len([*some])) for key, some in groups)])
    return [*lines, [*names, *((str(key[-1]), 1) for key in columns)]]


def cells(text: pd.DataFrame, bold: pd.DataFrame) -> Iterator[tuple[list[str], list[tuple[str, bool]]]]:
    """Rows of a table: their keys, and the text of each cell with whether it is bold."""
    for key, row, marks in zip(text.index, text.to_numpy(), bold.to_numpy(), strict=True):
        keys = key if isinstance(key, tuple) else (key,)
        yield [str(part) for part in keys], [(str(part), bool(mark)) for part, mark in zip(row, marks, strict=True)]


def to_latex(text: pd.DataFrame, bold: pd.DataFrame) -> str:
    """A LaTeX table, which needs the packages booktabs and amssymb.

    Args:
        text: text of the cells.
        bold: which cells are bold.
    """
    css = np.where(bold, "font-weight: bold;", "")
    escaped = text.rename_axis(index=lambda name: str(name).replace("_", r"\_")).rename_axis(columns=lambda _: None)
    style = escaped.style.apply(lambda _: css, axis=None).format(escape="latex")
    style = style.format_index(escape="latex", axis=0).format_index(escape="latex", axis=1)
    code = style.to_latex(hrules=True, convert_css=True, sparse_index=False, multicol_align="c")
    for symbol, command in _LATEX.items():
        code = code.replace(symbol, command)
    return code


def _number(value: float, sign: str = "") -> str:
    return "-" if pd.isna(value) else f"{round(value, _DECIMALS) + 0.0:{sign}.{_DECIMALS}f}"  # + 0.0: no "-0.00"


def _index(keys: pd.DataFrame) -> pd.Index:
    return pd.MultiIndex.from_frame(keys) if keys.shape[1] > 1 else pd.Index(keys.iloc[:, 0])
