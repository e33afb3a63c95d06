"""How sure scores are: intervals of means over cases, and paired comparisons of two runs.

Functions of scores in long form, one row per case, combination and region, see
:mod:`passion_monai.evaluation.tables`. A metric is any column of them; where it is NaN, the row counts for nothing, and
the number of cases that did count is part of every result. Give what
:func:`passion_monai.evaluation.tables.without_empty_labels` leaves to exclude cases whose label lacks the region.

The replicate is the case: a bootstrap draws cases, each with all its combinations, and a test pairs them. Runs of one
method with other seeds are no further replicates. Put them together with a column ``seed``, and each case gets its mean
over the seeds first; their spread is told apart, in a column ``seed_std``: the standard deviation of the seeds' own
results.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from passion_monai.presence import combination_name, combinations

__all__ = ["ALL", "compare", "confidence_interval", "contributions", "overall", "rank_biserial", "summarise"]

ALL = "all"
"""Stands for the mean over all combinations, or over all regions."""

_KEYS = ["case", "combination", "region"]
_RESAMPLES = 9999
_BATCH = 1000  # resamples in memory at a time
_DECIMALS = 12  # of differences: rounding errors of means must not make or break ties
_NAMES_IN_ERROR = 5


def confidence_interval(values: ArrayLike, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over cases.

    Of few cases it is too narrow: of six, a 95 % interval covers the mean about 87 % of the time.

    Args:
        values: one value for each case; NaN is left out.
        level: share of intervals that cover the mean.
        seed: of the resampling.

    Returns:
        Lower and upper end. NaN for fewer than two values, which say nothing of how cases differ; both ends are the
        value where all are equal.
    """
    array = np.asarray(values, dtype=float)
    return _interval(array[~np.isnan(array)].reshape(-1, 1, 1), level=level, seed=seed)


def summarise(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean over the cases for each combination and region, with its 95 % interval.

    Args:
        scores: rows with ``case, combination, region`` and the metric, perhaps of several seeds.
        metric: name of the column.

    Returns:
        Columns ``combination, region, mean, low, high, cases``, and ``seed_std`` for several seeds; rows in order of
        appearance.

    Raises:
        ValueError: when there is no such column, or a row is there twice or not for every seed.
    """
    return _estimates(
        scores, metric, ["combination", "region"], lambda values: _groups(values, "combination", "region")
    )


def overall(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean over the combinations of the means over cases, for each region and over all, with its 95 % interval.

    Every combination has the same weight, however many cases have its modalities. The bootstrap draws cases with all
    their combinations and regions, which are not independent of each other.

    Args:
        scores: rows with ``case, combination, region`` and the metric, perhaps of several seeds.
        metric: name of the column.

    Returns:
        Columns ``region, mean, low, high, cases``, and ``seed_std`` for several seeds. The last row is the region
        `ALL`, the mean of the others.

    Raises:
        ValueError: when there is no such column, or a row is there twice or not for every seed.
    """
    return _estimates(scores, metric, ["region"], lambda values: [*_groups(values, "region"), (ALL, values)])


def compare(first: pd.DataFrame, second: pd.DataFrame, metric: str) -> pd.DataFrame:
    """What the second run scores more than the first on the same cases.

    Cases are paired. The test is Wilcoxon's signed-rank test, two-sided, on the differences that are not 0 (Wilcoxon's
    own way with zeros; exact for few cases, scipy chooses); if all are 0, p is 1. Rows of the combination `ALL` are of
    each case's mean over its combinations, that of the region `ALL` of its mean over these and the regions. Holm's
    correction takes the rows of single combinations as one family, and those of `ALL` as another.

    Args:
        first: scores of a run, or of several seeds of it.
        second: those of the other, of the same cases, combinations and regions.
        metric: name of the column. Pairs in which either is NaN are left out.

    Returns:
        Columns ``combination, region, difference`` (mean of second - first), ``low, high`` (its 95 % interval),
        ``p, p_holm, effect_size`` (see :func:`rank_biserial`) and ``cases``.

    Raises:
        ValueError: when there is no such column, a row is there twice or not for every seed, or the two runs do not
            have the same cases, combinations and regions; the message names what does not match.
    """
    before, after = _case_scores(first, metric), _case_scores(second, metric)
    _check_pairs(before, after)
    differences = (after.reindex(before.index) - before).round(_DECIMALS)
    by_region = differences.groupby(["case", "region"], sort=False).mean().round(_DECIMALS)
    by_case = by_region.groupby("case", sort=False).mean().round(_DECIMALS)
    families = [
        _groups(differences, "combination", "region"),
        [*((ALL, *row) for row in _groups(by_region, "region")), (ALL, ALL, by_case)],
    ]
    tables = [pd.DataFrame([_comparison(*row) for row in family]) for family in families]
    for table in tables:
        table.insert(6, "p_holm", _holm(table["p"]))
    return pd.concat(tables, ignore_index=True)


def contributions(scores: pd.DataFrame, metric: str, *, modalities: Sequence[str]) -> pd.DataFrame:
    """What each modality adds to each region: the metric with it minus without it, all else given being the same.

    The difference of a case is the mean over all combinations without the modality, each against the combination that
    has it too.

    Args:
        scores: rows with ``case, combination, region`` and the metric, perhaps of several seeds.
        metric: name of the column.
        modalities: names of the M modalities, M at least 2.

    Returns:
        Columns ``modality, region, mean, low, high`` (its 95 % interval over the cases) and ``cases``.

    Raises:
        ValueError: when there is no such column, or a row is there twice or not for every seed.
    """
    table = _case_scores(scores, metric).unstack("combination")
    presence = combinations(len(modalities))
    rows = []
    for index, modality in enumerate(modalities):
        # Pairs of combinations, of which the second is the first and this modality.
        without = [row for row in presence if not row[index]]
        names = [combination_name(row, modalities) for row in without]
        more = [combination_name(row | (np.arange(len(row)) == index), modalities) for row in without]
        before, after = table.reindex(columns=names), table.reindex(columns=more)
        differences = pd.DataFrame(after.to_numpy() - before.to_numpy(), index=table.index).mean(axis=1)
        for region in scores["region"].unique():
            values = differences.xs(region, level="region").dropna()
            rows.append((modality, region, values.mean(), *confidence_interval(values), len(values)))
    return pd.DataFrame(rows, columns=["modality", "region", "mean", "low", "high", "cases"])


def rank_biserial(differences: ArrayLike) -> float:
    """Matched-pairs rank-biserial correlation: (R+ - R-) / (R+ + R-), from -1 to 1.

    R+ and R- are the sums of the ranks of the positive and the negative differences by size, zeros left out; 0 if
    there is no other. D. S. Kerby, "The Simple Difference Formula", Comprehensive Psychology 3, 2014.

    Args:
        differences: one for each pair.
    """
    values = np.asarray(differences, dtype=float)
    values = values[values != 0]
    ranks = stats.rankdata(np.abs(values))
    return float(np.sum(ranks * np.sign(values)) / np.sum(ranks)) if values.size else 0.0


def _case_scores(scores: pd.DataFrame, metric: str) -> pd.Series:
    """The metric by case, combination and region, its mean over seeds where there are several."""
    keys = [*_KEYS, *(["seed"] if "seed" in scores else [])]
    missing = [column for column in (*keys, metric) if column not in scores]
    if missing:
        raise ValueError(f"scores must have the columns {[*keys, metric]}, {missing} are missing from {list(scores)}.")
    twice = scores[scores.duplicated(keys)]
    if len(twice):
        raise ValueError(
            f"scores have a row twice: {twice.iloc[0][keys].to_dict()}. Scores of several seeds need a column 'seed'."
        )
    groups = scores.groupby(_KEYS, sort=False)[metric]
    if "seed" in keys and groups.size().nunique() > 1:
        raise ValueError(f"Every seed must have scored the same; {groups.size().idxmin()} is not there for each.")
    return groups.mean()


def _groups(values: pd.Series, *levels: str) -> list[tuple[Any, ...]]:
    """Names and values of each group, in order of appearance."""
    return [(*names, rows) for names, rows in values.groupby(list(levels), sort=False)]


def _estimates(
    scores: pd.DataFrame, metric: str, names: list[str], split: Callable[[pd.Series], list[tuple[Any, ...]]]
) -> pd.DataFrame:
    """Mean and interval of each group, and how far the means of the seeds are spread."""
    case_scores = _case_scores(scores, metric)
    rows = []
    for *group, values in split(case_scores):
        array = _array(values)
        rows.append((*group, _mean(array), *_interval(array), len(array)))
    result = pd.DataFrame(rows, columns=[*names, "mean", "low", "high", "cases"])
    if "seed" in scores:
        seeds = [_case_scores(one, metric).reindex(case_scores.index) for _, one in scores.groupby("seed")]
        means = [[_mean(_array(values)) for *_, values in split(seed)] for seed in seeds]
        result["seed_std"] = pd.DataFrame(means).std()
    return result


def _array(case_scores: pd.Series) -> NDArray[np.float64]:
    """[N, R, C]: cases that have a score, regions, combinations; NaN where a case does not have one."""
    case_scores = case_scores.dropna()
    # Every case with every region and combination, so that the table is a box; what is not there becomes NaN.
    levels = [case_scores.index.unique(level) for level in ("case", "region", "combination")]
    index = pd.MultiIndex.from_product(levels)
    table = case_scores.swaplevel("combination", "region").reindex(index)
    return table.to_numpy(dtype=float).reshape([len(level) for level in levels])


def _mean(array: NDArray[np.float64]) -> float:
    return float(_mean_of_means(array, np.ones(len(array))))


def _mean_of_means(array: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over cases with weights [..., N], then over combinations, then over regions; NaN is left out of each."""
    there = ~np.isnan(array)
    # Of each region and combination, over the cases that have a score there: [..., R, C].
    totals, counts = (np.tensordot(weights, values, axes=1) for values in (np.where(there, array, 0), there))
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.asarray(np.nanmean(np.nanmean(totals / counts, axis=-1), axis=-1))


def _interval(array: NDArray[np.float64], *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the mean of means of scores [N, R, C], drawing cases, of which each has a score."""
    number = len(array)
    if number < 2:
        return np.nan, np.nan

    def statistic(drawn: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
        # A row is a resample: which cases were drawn. Its weights are how often each of them was: a mean with these
        # weights needs no copy of the scores. Resample r counts in its own cells, r * number and those that follow,
        # so that one bincount serves all.
        rows = np.moveaxis(drawn, axis, -1).astype(int).reshape(-1, number)
        cells = rows + number * np.arange(len(rows))[:, None]
        weights = np.bincount(cells.ravel(), minlength=cells.size).reshape(cells.shape)
        return _mean_of_means(array, weights.astype(float))

    result = stats.bootstrap(
        (np.arange(number),),
        statistic,
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        vectorized=True,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _comparison(combination: Hashable, region: Hashable, differences: pd.Series) -> dict[str, Any]:
    values = differences.dropna().to_numpy()
    low, high = confidence_interval(values)
    return {
        "combination": combination,
        "region": region,
        "difference": values.mean() if values.size else np.nan,
        "low": low,
        "high": high,
        "p": _wilcoxon(values),
        "effect_size": rank_biserial(values) if values.size else np.nan,
        "cases": len(values),
    }


def _wilcoxon(differences: NDArray[np.float64]) -> float:
    if not differences.size:
        return np.nan
    others = differences[differences != 0]  # Wilcoxon's own way with zeros
    return float(stats.wilcoxon(others).pvalue) if others.size else 1.0


def _holm(p: pd.Series) -> pd.Series:
    """Holm's step-down correction: the i-th smallest of n times n - i + 1, and no less than the one before."""
    ordered = p.dropna().sort_values()
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1).reindex(p.index)


def _check_pairs(first: pd.Series, second: pd.Series) -> None:
    for level in (*_KEYS, None):
        rows = [series.index if level is None else series.index.unique(level) for series in (first, second)]
        only = [sorted(one.difference(other))[:_NAMES_IN_ERROR] for one, other in (rows, rows[::-1])]
        if any(only):
            raise ValueError(
                f"The two runs must have the same {level or 'row'}s; only the first has {only[0]}, only the second "
                f"{only[1]}."
            )
