"""Tables of scores in Markdown, in the layout of the paper's Table 3: one column per modality combination.

Scores are rows in long form, one per case, combination and region, with the columns `SCORE_COLUMNS`:

- ``dice`` in 0..1: 1 where both masks are empty, 0 where exactly one is;
- ``hd95_mm``, the 95th percentile of the Hausdorff distance: 0 where both masks are empty, NaN where exactly one is;
- ``hd95_<convention>``, the same with a distance in place of NaN, one of `EMPTY_DISTANCE`;
- ``prediction_ml`` and ``label_ml``, the volumes of the two masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from passion_monai.presence import combination_name, combinations

__all__ = ["EMPTY_DISTANCE", "SCORE_COLUMNS", "combination_table", "read_scores", "report", "summary"]

# What a Hausdorff distance counts, in mm, where exactly one of the two masks is empty. "brats": the diagonal of a BraTS
# image (240 x 240 x 155 mm), as the challenge's evaluation does. "released": as the authors' released code does.
EMPTY_DISTANCE = {"brats": 373.13, "released": 1.0}

SCORE_COLUMNS = (
    "case",
    "combination",
    "region",
    "dice",
    "hd95_mm",
    *(f"hd95_{convention}" for convention in EMPTY_DISTANCE),
    "prediction_ml",
    "label_ml",
)

_PRESENT_MARK, _ABSENT_MARK = "●", "○"


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
    scores = pd.read_csv(path, dtype=text, keep_default_na=False, na_values={"hd95_mm": [""]})
    missing = [column for column in SCORE_COLUMNS if column not in scores]
    if missing:
        raise ValueError(f"{path}: columns {missing} are missing, scores have {list(SCORE_COLUMNS)}.")
    return scores


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean scores over the cases.

    Args:
        scores: rows with `SCORE_COLUMNS`.

    Returns:
        One row per combination and region, in order of appearance, with the columns ``combination, region, dice,
        hd95_mm, hd95_brats, hd95_released`` (means over cases), ``cases`` (how many) and ``hd95_mm_cases`` (over how
        many of them ``hd95_mm`` is the mean: those in which not exactly one mask is empty).
    """
    groups = scores.groupby(["combination", "region"], sort=False)
    metrics = [column for column in SCORE_COLUMNS if column == "dice" or column.startswith("hd95")]
    means = groups[metrics].mean()
    means["cases"] = groups["case"].count()
    means["hd95_mm_cases"] = groups["hd95_mm"].count()
    return means.reset_index()


def combination_table(
    scores: pd.DataFrame, *, modalities: Sequence[str], regions: Iterable[str], metric: str = "dice"
) -> str:
    """Mean scores per region and modality combination, in the layout of the paper's Table 3.

    A row of circles per modality says which combination a column is (● present, ○ missing). Then follow a row per
    region, their mean, and the number of cases that have all modalities of the combination. "Avg." is the mean over the
    columns.

    Args:
        scores: rows with `SCORE_COLUMNS`.
        modalities: names of the M modalities, in the order that the combinations' names use.
        regions: names of the regions, one row each.
        metric: ``dice`` (shown in %) or one of ``hd95_mm``, ``hd95_brats`` and ``hd95_released`` (in mm).

    Returns:
        A Markdown table.

    Raises:
        ValueError: when the metric is unknown.
    """
    allowed = [column for column in SCORE_COLUMNS if column == "dice" or column.startswith("hd95")]
    if metric not in allowed:
        raise ValueError(f"metric must be one of {allowed}, got {metric!r}.")
    presence = combinations(len(modalities))
    names = [combination_name(row, modalities) for row in presence]
    means = summary(scores).pivot(index="region", columns="combination", values=metric)
    means = means.reindex(index=list(regions), columns=names) * (100 if metric == "dice" else 1)
    means.loc["mean"] = means.mean(skipna=False)
    means["Avg."] = means.mean(axis=1)
    cases = scores.groupby("combination")["case"].nunique().reindex(names, fill_value=0)

    circles = [[_PRESENT_MARK if present else _ABSENT_MARK for present in column] for column in presence.T]
    lines = [[modality, *row, ""] for modality, row in zip(modalities, circles, strict=True)]
    lines[0][-1] = "Avg."
    lines.insert(1, ["---", *[":-:"] * len(names), "--:"])
    lines += [[str(region), *map(_number, row)] for region, row in zip(means.index, means.to_numpy(), strict=True)]
    lines.append(["cases", *map(str, cases), ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(scores: pd.DataFrame, *, modalities: Sequence[str], regions: Iterable[str]) -> str:
    """Everything there is to say of an evaluation, as Markdown: Dice, and HD95 under each convention for empty masks.

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
    empties = (
        f"Of {len(scores)} pairs of masks, both are empty in {both_empty} (Dice 100 %, distance 0 mm) and exactly one "
        f"in {one_empty} (Dice 0 %, the distance is not defined: the title of each table says what it counts)."
    )
    parts = [
        "# Scores per modality combination",
        legend,
        empties,
        "## Dice [%]",
        combination_table(scores, modalities=modalities, regions=regions),
    ]
    for convention, distance in EMPTY_DISTANCE.items():
        parts += [
            f"## HD95 [mm], convention {convention!r}: {distance:g} mm where exactly one mask is empty",
            combination_table(scores, modalities=modalities, regions=regions, metric=f"hd95_{convention}"),
        ]
    return "\n\n".join(parts) + "\n"


def _number(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:.2f}"
