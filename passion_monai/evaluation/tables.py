"""Tables of scores in Markdown, in the layout of the paper's Table 3: one column per modality combination.

Scores are rows in long form, one per case, combination and region, with the columns `SCORE_COLUMNS`:

- ``dice`` in 0..1: 1 where both masks are empty, 0 where exactly one is;
- ``hd95_mm``, the 95th percentile of the Hausdorff distance, the larger one of both directions: 0 where both masks are
  empty, NaN where exactly one is;
- ``hd95_brats``, the same with a distance in place of NaN, see `EMPTY_DISTANCE`;
- ``hd95_released``, the percentile of the distances of both directions together, likewise;
- ``assd_mm``, the average symmetric surface distance: 0 and NaN as ``hd95_mm``;
- ``prediction_ml`` and ``label_ml``, the volumes of the two masks.

Where lesions were scored, `LESION_COLUMNS` follow, see :mod:`passion_monai.evaluation.lesions`: ``lesion_dice`` and
``lesion_hd95``, means over the lesions of a case, and how many of these were matched, missed and false.

So there are three conventions for empty masks: those of `EMPTY_DISTANCE`, which count every case, and "excluded", see
:func:`without_empty_labels`, by which a case whose label lacks a region is none of that region's, and a distance is the
mean over the cases in which there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from passion_monai.evaluation.statistics import ALL, overall
from passion_monai.presence import combination_name, combinations

__all__ = [
    "EMPTY_DISTANCE",
    "LESION_COLUMNS",
    "LESION_METRICS",
    "METRICS",
    "SCORE_COLUMNS",
    "calibration_table",
    "combination_table",
    "overall_table",
    "read_scores",
    "report",
    "shown_factor",
    "summary",
    "without_empty_labels",
]

# What a Hausdorff distance counts, in mm, where exactly one of the two masks is empty. "brats": the diagonal of a BraTS
# image (240 x 240 x 155 mm), as the challenge's evaluation does. "released": as the authors' released code does, and
# with it the paper's tables.
EMPTY_DISTANCE = {"brats": 373.13, "released": 1.0}
_PERCENTILE_OF = {"brats": "the larger one of both directions", "released": "both directions together, as in MedPy"}

METRICS = ("dice", "hd95_mm", *(f"hd95_{convention}" for convention in EMPTY_DISTANCE), "assd_mm")
SCORE_COLUMNS = ("case", "combination", "region", *METRICS, "prediction_ml", "label_ml")
LESION_METRICS = ("lesion_dice", "lesion_hd95")
LESION_COLUMNS = (*LESION_METRICS, "lesions_matched", "lesions_missed", "lesions_false")

_PRESENT_MARK, _ABSENT_MARK, _UNKNOWN = "●", "○", "-"
# The tables of a report: title, metric, and whether cases are left out whose label lacks the region.
_TABLES = (
    ("Dice [%]", "dice", False),
    *(
        (
            f"HD95 [mm], convention {name!r}: {_PERCENTILE_OF[name]}; {distance:g} mm where exactly one mask is empty",
            f"hd95_{name}",
            False,
        )
        for name, distance in EMPTY_DISTANCE.items()
    ),
    ("Dice [%], convention 'excluded'", "dice", True),
    ("HD95 [mm], convention 'excluded'", "hd95_mm", True),
    ("ASSD [mm], convention 'excluded'", "assd_mm", True),
)
_LESION_TABLES = (
    ("Lesion-wise Dice [%]: mean over lesions, 0 for one that is missed or false", "lesion_dice", False),
    (
        f"Lesion-wise HD95 [mm]: mean over lesions, {EMPTY_DISTANCE['brats']:g} mm for one that is missed or false",
        "lesion_hd95",
        False,
    ),
)


def read_scores(path: str | Path) -> pd.DataFrame:
    """Read a file of scores.

    Args:
        path: CSV file that :class:`passion_monai.evaluation.metrics.CombinationScores` wrote.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when a column is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No scores at {path}; run the evaluate workflow first.")
    # A case may be called 001 and a modality NA; as text they stay what they are.
    text = dict.fromkeys(("case", "combination", "region"), str)
    scores = pd.read_csv(path, dtype=text, keep_default_na=False, na_values={"hd95_mm": [""], "assd_mm": [""]})
    missing = [column for column in SCORE_COLUMNS if column not in scores]
    if missing:
        raise ValueError(f"{path}: columns {missing} are missing, scores have {list(SCORE_COLUMNS)}.")
    return scores


def without_empty_labels(scores: pd.DataFrame) -> pd.DataFrame:
    """The scores of regions that a case's label has: the convention "excluded" for empty masks.

    Args:
        scores: rows with `SCORE_COLUMNS`.
    """
    return scores[scores["label_ml"] > 0]


def summary(scores: pd.DataFrame, *, exclude_empty: bool = False) -> pd.DataFrame:
    """Mean scores over the cases.

    Args:
        scores: rows with `SCORE_COLUMNS`.
        exclude_empty: leave out regions that a case's label lacks.

    Returns:
        One row per combination and region, in order of appearance, with the columns ``combination, region``, means over
        cases of `METRICS` and, where they were scored, of `LESION_METRICS`, ``cases`` (how many) and ``distance_cases``
        (over how many of them ``hd95_mm`` and ``assd_mm`` are the means: those in which not exactly one mask is empty).
    """
    counted = without_empty_labels(scores) if exclude_empty else scores
    groups = counted.groupby(["combination", "region"], sort=False)
    means = groups[[name for name in (*METRICS, *LESION_METRICS) if name in scores]].mean()
    means["cases"] = groups["case"].count()
    means["distance_cases"] = groups["hd95_mm"].count()
    return means.reset_index()


def combination_table(
    scores: pd.DataFrame,
    *,
    modalities: Sequence[str],
    regions: Iterable[str],
    metric: str = "dice",
    exclude_empty: bool = False,
) -> str:
    """Mean scores per region and modality combination, in the layout of the paper's Table 3.

    A row of circles per modality says which combination a column is (● present, ○ missing). Then follow a row per
    region, their mean, and the number of cases that have all modalities of the combination. "Avg." is the mean over the
    columns.

    Args:
        scores: rows with `SCORE_COLUMNS`.
        modalities: names of the M modalities, in the order that the combinations' names use.
        regions: names of the regions, one row each.
        metric: one of `METRICS` or, where they were scored, `LESION_METRICS`; Dice is shown in %, the others are in mm.
        exclude_empty: leave out regions that a case's label lacks. How many cases a mean is of then depends on the
            region, and each has a row of these numbers.

    Returns:
        A Markdown table.

    Raises:
        ValueError: when the metric is unknown, or was not scored.
    """
    known = [name for name in (*METRICS, *LESION_METRICS) if name in scores]
    if metric not in known:
        raise ValueError(f"metric must be one of {known}, got {metric!r}.")
    rows = list(regions)
    presence = combinations(len(modalities))
    names = [combination_name(row, modalities) for row in presence]
    means = summary(scores, exclude_empty=exclude_empty).pivot(index="region", columns="combination", values=metric)
    means = means.reindex(index=rows, columns=names) * shown_factor(metric)
    means.loc["mean"] = means.mean(skipna=False)
    means["Avg."] = means.mean(axis=1)
    means.loc["mean", "Avg."] = means.loc[rows, "Avg."].mean(skipna=False)  # where a column lacks a region too
    cases = _excluded_cases(scores, metric, rows) if exclude_empty else _all_cases(scores)
    cases = cases.reindex(columns=names).fillna(0).astype(int)

    lines = _circles(modalities)
    lines += [[str(region), *map(_number, row)] for region, row in zip(means.index, means.to_numpy(), strict=True)]
    lines += [[str(name), *map(str, row), ""] for name, row in zip(cases.index, cases.to_numpy(), strict=True)]
    return _markdown(lines)


def calibration_table(errors: pd.DataFrame, *, modalities: Sequence[str]) -> str:
    """The expected calibration error of each combination before and after temperature scaling, as Markdown.

    Args:
        errors: rows with ``case, combination, ece, ece_calibrated``, the last NaN or empty where a combination has no
            temperature.
        modalities: names of the M modalities, in the order that the combinations' names use.
    """
    columns = {"ece": "before", "ece_calibrated": "after"}
    values = errors[list(columns)].apply(pd.to_numeric)
    names = [combination_name(row, modalities) for row in combinations(len(modalities))]
    means = 100 * values.groupby(errors["combination"]).mean().rename(columns=columns).T.reindex(columns=names)
    means["Avg."] = means.mean(axis=1, skipna=False)
    lines = _circles(modalities)
    lines += [[str(name), *map(_number, row)] for name, row in zip(means.index, means.to_numpy(), strict=True)]
    legend = (
        "Before and after the probabilities are calibrated by one temperature per combination (Guo et al., ICML 2017), "
        "fitted on validation cases. Which class is the most likely one does not change, and no score above does."
    )
    return f"## Expected calibration error [%]\n\n{legend}\n\n{_markdown(lines)}\n"


def overall_table(scores: pd.DataFrame) -> str:
    """Means over all combinations with their 95 % intervals, as :func:`.statistics.overall` has them.

    Args:
        scores: rows with `SCORE_COLUMNS`.

    Returns:
        A Markdown table with a row per metric and convention, and a column per region and one for their mean.
    """
    regions = [*dict.fromkeys(scores["region"]), ALL]
    lines = [["", *regions], ["---", *["--:"] * len(regions)]]
    for title, metric, exclude_empty in _tables(scores):
        estimates = overall(without_empty_labels(scores) if exclude_empty else scores, metric)
        # By position, since a region may have the name of the last row.
        values = estimates[["mean", "low", "high"]].to_numpy() * shown_factor(metric)
        cells = dict(zip([*estimates["region"][:-1], None], map(_with_interval, values), strict=True))
        lines.append([title.split(":")[0], *(cells.get(region, "-") for region in [*regions[:-1], None])])
    return _markdown(lines)


def report(scores: pd.DataFrame, *, modalities: Sequence[str], regions: Iterable[str]) -> str:
    """The summary of an evaluation as Markdown: each metric under each convention for empty masks.

    Args:
        scores: rows with `SCORE_COLUMNS`.
        modalities: names of the M modalities, in the order that the combinations' names use.
        regions: names of the regions.
    """
    regions = list(regions)
    both_empty = int(((scores["prediction_ml"] == 0) & (scores["label_ml"] == 0)).sum())
    one_empty = int(scores["hd95_mm"].isna().sum())
    legend = (
        f"{scores['case'].nunique()} cases. ● the modality is given to the network, ○ it is not. A score is the mean "
        "over the cases that have all the given modalities; Avg. is the mean over the combinations."
    )
    conventions = f"""\
- Both masks are empty in {both_empty} of {len(scores)} pairs: Dice 100 %, distance 0 mm.
- Exactly one is empty in {one_empty}: Dice 0 %; the distance is not defined and counts what its table's title says.
- Tables marked 'excluded' leave out a case for a region that its label lacks. Their distances are means over the cases
  in which the prediction has the region too; a network that misses regions is averaged over fewer.
- HD95 is the 95th percentile of the distances between two surfaces: the larger of the two directions, as in the BraTS
  challenge, or, in 'released', that of both directions together, as in MedPy and in the paper's tables.
- ASSD is the average symmetric surface distance."""
    parts = [
        "# Scores per modality combination",
        legend,
        "## Over all combinations: Avg. with its 95 % interval",
        overall_table(scores),
    ]
    for title, metric, exclude_empty in _tables(scores):
        table = combination_table(
            scores, modalities=modalities, regions=regions, metric=metric, exclude_empty=exclude_empty
        )
        parts += [f"## {title}", table]
    parts += ["## How the scores count", conventions]
    return "\n\n".join(parts) + "\n"


def _tables(scores: pd.DataFrame) -> tuple[tuple[str, str, bool], ...]:
    return _TABLES + (_LESION_TABLES if "lesion_dice" in scores else ())


def _all_cases(scores: pd.DataFrame) -> pd.DataFrame:
    """How many cases each combination has, in one row."""
    return scores.groupby("combination")["case"].nunique().to_frame("cases").T


def _excluded_cases(scores: pd.DataFrame, metric: str, regions: list[str]) -> pd.DataFrame:
    """How many cases a metric is the mean of, a row per region and a column per combination."""
    counts = without_empty_labels(scores).groupby(["region", "combination"])[metric].count().unstack()
    return counts.reindex(index=regions).rename(index="cases, {}".format)


def _circles(modalities: Sequence[str]) -> list[list[str]]:
    """The lines of a table that say which combination a column is, with that of Markdown after the first."""
    columns = combinations(len(modalities)).T
    circles = [[_PRESENT_MARK if present else _ABSENT_MARK for present in column] for column in columns]
    lines = [[modality, *row, ""] for modality, row in zip(modalities, circles, strict=True)]
    lines[0][-1] = "Avg."
    lines.insert(1, ["---", *[":-:"] * len(circles[0]), "--:"])
    return lines


def shown_factor(metric: str) -> float:
    """The factor by which a metric is multiplied for display: Dice is shown in percent, distances in mm."""
    return 100 if metric in ("dice", "lesion_dice") else 1


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _with_interval(values: Iterable[float]) -> str:
    mean, low, high = map(_number, values)
    return mean if low == _UNKNOWN else f"{mean} [{low}, {high}]"


def _number(value: float) -> str:
    return _UNKNOWN if pd.isna(value) else f"{value:.2f}"
