"""Tables of the report: estimates laid out in rows and columns, for HTML and for LaTeX."""

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
    """Means as text, and below each its interval and the spread of the seeds, where there is one.

    Args:
        numbers: columns ``mean, low, high`` and perhaps ``seed_std``.
        sign: "+" to write the sign of positive numbers too.
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
    """Whether a mean, as it is shown, is the best of a group in which not all are equal.

    Args:
        numbers: columns ``mean`` and ``sign``, 1 where more is better and -1 where less is.
        within: columns that are the same in a group.
    """
    shown = numbers["mean"].round(_DECIMALS) * numbers["sign"]
    groups = shown.groupby([numbers[key] for key in within])
    return shown.eq(groups.transform("max")) & (groups.transform("nunique") > 1)


def pivot(numbers: pd.DataFrame, value: str, rows: list[str], columns: list[str]) -> pd.DataFrame:
    """One column of a long table, laid out by other columns.

    Args:
        numbers: the long table.
        value: name of the column.
        rows: names of the columns whose values are rows, in the order in which they appear.
        columns: likewise; the values of the first are groups of columns.
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
    """Lines of a table's header: labels and over how many columns each reaches."""
    names = [(str(name), 1) for name in text.index.names]
    columns = [key if isinstance(key, tuple) else (key,) for key in text.columns]
    lines = []
    for level in range(text.columns.nlevels - 1):
        groups = itertools.groupby(columns, key=lambda key: key[: level + 1])
        lines.append([("", len(names)), *((str(key[-1]), len([*some])) for key, some in groups)])
    return [*lines, [*names, *((str(key[-1]), 1) for key in columns)]]


def cells(text: pd.DataFrame, bold: pd.DataFrame) -> Iterator[tuple[list[str], list[tuple[str, bool]]]]:
    """Rows of a table: keys, and text and whether it is bold."""
    for key, row, marks in zip(text.index, text.to_numpy(), bold.to_numpy(), strict=True):
        keys = key if isinstance(key, tuple) else (key,)
        yield [str(part) for part in keys], [(str(part), bool(mark)) for part, mark in zip(row, marks, strict=True)]


def to_latex(text: pd.DataFrame, bold: pd.DataFrame) -> str:
    """A table for LaTeX, with its packages booktabs and amssymb.

    Args:
        text: what stands in the cells.
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
    return "-" if pd.isna(value) else f"{value:{sign}.{_DECIMALS}f}"


def _index(keys: pd.DataFrame) -> pd.Index:
    return pd.MultiIndex.from_frame(keys) if keys.shape[1] > 1 else pd.Index(keys.iloc[:, 0])
