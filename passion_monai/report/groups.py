"""Groups the runs of each method and averages their scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from passion_monai.evaluation.statistics import overall, summarise
from passion_monai.evaluation.tables import without_empty_labels
from passion_monai.report.runs import Run, pooled_scores

__all__ = ["AVERAGE", "DICE", "DICE_EXCLUDED", "LESION_METRICS", "METRICS", "Group", "Metric", "grouped"]

AVERAGE = "Avg."


@dataclass(frozen=True)
class Metric:
    """A column of the scores, and how the report shows it."""

    column: str
    title: str
    factor: float
    sign: int  # 1 if higher is better, -1 if lower is
    exclude_empty: bool = False  # leave out regions that a case's label lacks

    def of(self, scores: pd.DataFrame) -> pd.DataFrame:
        """The scores that count."""
        return without_empty_labels(scores) if self.exclude_empty else scores


METRICS = (
    Metric("dice", "Dice [%]", 100, 1),
    Metric("hd95_brats", "HD95 [mm]", 1, -1),
    Metric("hd95_released", "HD95 as in the paper [mm]", 1, -1),
)
DICE = METRICS[0]
DICE_EXCLUDED = Metric("dice", "Dice of regions in the label [%]", 100, 1, exclude_empty=True)
LESION_METRICS = (
    Metric("lesion_dice", "lesion-wise Dice [%]", 100, 1),
    Metric("lesion_hd95", "lesion-wise HD95 [mm]", 1, -1),
)


@dataclass(frozen=True)
class Group:
    """The runs of one method, backbone and missing rates: several seeds, or the folds of a cross-validation."""

    label: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @cached_property
    def scores(self) -> pd.DataFrame:
        return pooled_scores(self.runs)

    def estimates(self, metrics: Iterable[Metric], *, by_combination: bool = False) -> pd.DataFrame:
        """Means over all combinations, "Avg." over the regions; `by_combination` adds those of each combination."""
        tables = []
        for metric in metrics:
            scores = metric.of(self.scores)
            means = overall(scores, metric.column).assign(combination=AVERAGE)
            means.loc[means.index[-1], "region"] = AVERAGE
            if by_combination:
                means = pd.concat([summarise(scores, metric.column), means[:-1]])
            tables.append(_shown(means, metric))
        return self._named(tables)

    def estimates_by_count(self, metric: Metric) -> pd.DataFrame:
        """Means over all regions and all combinations of as many modalities, see the column ``given``."""
        counted = metric.of(self.scores)
        counts = counted["combination"].str.count(r"\+") + 1
        tables = []
        for count, scores in counted.groupby(counts):
            mean = overall(scores, metric.column)[-1:]
            tables.append(_shown(mean, metric).assign(given=f"{count} of {len(self.first.settings['modalities'])}"))
        return self._named(tables)

    def _named(self, tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
        rates, method, backbone = self.first.rates, self.first.method, self.first.settings["backbone"]
        keys = {"label": self.label, "missing rates": rates, "method": method, "backbone": backbone}
        return pd.concat(tables, ignore_index=True).assign(**keys)


def _shown(means: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Means of a metric in the unit of the report."""
    numbers = [name for name in ("mean", "low", "high", "seed_std") if name in means]
    return means.assign(
        **{name: means[name] * metric.factor for name in numbers}, metric=metric.title, sign=metric.sign
    )


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Group runs by method, backbone and missing rates, and give each group a distinct label."""
    several = [len({key(run) for run in runs}) > 1 for key in (_backbone, _rates)]
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, _backbone(run), run.rates), []).append(run)
    return [
        Group(", ".join([name[0], *(part for part, tell in zip(name[1:], several, strict=True) if tell)]), some)
        for name, some in groups.items()
    ]


def _backbone(run: Run) -> str:
    return str(run.settings["backbone"])


def _rates(run: Run) -> str:
    return run.rates
