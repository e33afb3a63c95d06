"""Scores per subject volume: Dice and surface distances for every modality combination, and calibration.

:mod:`passion_monai.evaluation.tables` says what a row of scores holds and how empty masks count.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.utils import convert_to_tensor
from torch import Tensor

from passion_monai import __version__
from passion_monai.claim import lock_folder
from passion_monai.evaluation.calibration import expected_calibration_error
from passion_monai.evaluation.case_scores import score_case
from passion_monai.evaluation.dice import CombinationDiceMetric
from passion_monai.evaluation.expected import FILE_NAME, check_replaceable, checksum, write_expected_scores
from passion_monai.evaluation.kept_maps import keep_case
from passion_monai.evaluation.lesions import check_panoptica
from passion_monai.evaluation.score_files import ScoreFiles
from passion_monai.evaluation.statistics import overall
from passion_monai.evaluation.tables import (
    LESION_COLUMNS,
    SCORE_COLUMNS,
    calibration_table,
    read_scores,
    report,
)
from passion_monai.files import complete_file
from passion_monai.presence import combination_name, combinations

__all__ = [
    "CombinationDiceMetric",  # at home in dice.py; configurations of before know it here
    "CombinationScores",
]

logger = logging.getLogger(__name__)
_PENDING_PER_WORKER = 2  # cases that wait in memory for a worker
_SCORES, _CALIBRATION = "scores.csv", "calibration.csv"
Row = dict[str, Any]


class CombinationScores:
    """Writes the scores of every case and modality combination while an evaluator runs, and a table of them at the end.

    For an evaluator with decollated output, as MONAI's are by default: ``pred`` int [P, H, W(, D)] with the class maps
    of all P combinations in the order of :func:`passion_monai.presence.combinations`, and ``label`` int [1, H, W(, D)],
    both on the file's grid, which gives the spacing; ``case`` and ``presence`` bool [M] in the batch. Combinations of
    modalities that a case does not have are left out.

    A run writes ``scores.csv`` case by case, and at the end ``table.md`` and ``expected_scores.json``, see
    :mod:`passion_monai.evaluation.expected`. To continue an interrupted run, give the evaluator only the
    :meth:`remaining` cases.

    Args:
        output_dir: folder for the files; it is made.
        modalities: names of the M modalities.
        regions: class indices of each region by its name.
        num_workers: processes that compute scores while the network predicts the next case; with 0 it waits for them.
        calibration: write ``calibration.csv`` too, the expected calibration error of each case and combination, from
            ``confidence`` int16 [P, H, W(, D)] as :class:`passion_monai.transforms.RestoreClassesd` gives it.
        calibrated: write the error of calibrated probabilities beside it, from ``calibrated_confidence``, likewise, and
            a table of both.
        lesionwise: score lesion by lesion too, see :mod:`passion_monai.evaluation.lesions`.
        weights: checkpoint, or list of them, to evaluate. Scores of another checkpoint are not continued.
        keep_cases: number of cases, from the first, whose images (``image`` in the batch), label and class maps are
            kept in ``maps/<case>.npz``, see :mod:`passion_monai.evaluation.kept_maps`.
        data: which cases these are, for people to read.
        settings: whatever else the scores depend on, likewise.

    Raises:
        ImportError: when lesions are to be scored and the package for it is missing.
        RuntimeError: when another process evaluates into the folder; on attaching it in one of several processes, which
            would write to the same file.
        ValueError: when the folder has scores that came with a bundle's weights; during the run, when an item lacks
            something or does not fit.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        modalities: Sequence[str],
        regions: Mapping[str, Sequence[int]],
        num_workers: int = 0,
        calibration: bool = False,
        calibrated: bool = False,
        lesionwise: bool = False,
        weights: str | Path | Sequence[str | Path] | None = None,
        keep_cases: int = 0,
        data: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        check_replaceable(self.output_dir)
        self.modalities = tuple(modalities)
        self.regions = dict(regions)
        self.num_workers = num_workers
        # Keys of confidences by the columns of what they give.
        self.confidences = {"ece": "confidence"} if calibration else {}
        self.confidences |= {"ece_calibrated": "calibrated_confidence"} if calibrated else {}
        self.lesionwise = lesionwise
        if lesionwise:
            check_panoptica()
        self.keep_cases = keep_cases
        self.data = data
        self.presence = torch.from_numpy(combinations(len(self.modalities)))  # [P, M]
        self.names = [combination_name(row, self.modalities) for row in self.presence.numpy()]
        columns: dict[str, tuple[str, ...]] = {_SCORES: (*SCORE_COLUMNS, *(LESION_COLUMNS if lesionwise else ()))}
        if self.confidences:
            columns[_CALIBRATION] = ("case", "combination", *self.confidences)
        made_with = {
            "version": __version__,
            "weights_sha256": None if weights is None else checksum(weights),
            "modalities": self.modalities,
            "regions": self.regions,
            **(settings or {}),
        }
        lock_folder(self.output_dir, "evaluation", go_on="repeat the command: cases that were scored are kept")
        self.files = ScoreFiles(self.output_dir, columns=columns, settings=made_with)
        self._kept: set[str] = set()
        self._shown: set[str] = set()
        self._pool: ProcessPoolExecutor | None = None
        self._pending: deque[tuple[str, Future[list[Row]], list[Row]]] = deque()

    def remaining(self, cases: Sequence[Mapping[Any, Any]]) -> list[Mapping[Any, Any]]:
        """The cases that no earlier run with the same weights and settings has scored.

        The scores of the others are kept. If no case remains, the table is written here, since an evaluator without
        cases does not run.

        Args:
            cases: dictionaries with the name as ``case``.
        """
        names = [case["case"] for case in cases]
        self._shown = set(names[: self.keep_cases])
        without_maps = {name for name in self._shown if not self._maps_path(name).is_file()}
        self._kept = set(names).intersection(self.files.complete_cases()) - without_maps
        remaining = [case for case in cases if case["case"] not in self._kept]
        if self._kept:
            logger.info(
                f"{len(self._kept)} of {len(cases)} cases were scored before, with the same weights and settings; "
                f"delete {self.output_dir} to score them again."
            )
            self.files.start(self._kept)
        if not remaining:
            self._write_table()
        return remaining

    def attach(self, engine: Engine) -> None:
        """Listen to an evaluator."""
        if idist.get_world_size() > 1:
            raise RuntimeError("CombinationScores writes one file; evaluate with one process, not with torchrun.")
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._score_batch)
        engine.add_event_handler(Events.COMPLETED, self._finish)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._stop)

    def _maps_path(self, case: str) -> Path:
        return self.output_dir / "maps" / f"{case}.npz"

    def _start(self) -> None:
        self.files.start(self._kept)
        outdated = {*self._maps_path("*").parent.glob("*.npz")} - {*map(self._maps_path, self._kept)}
        for path in outdated:  # of other weights, perhaps
            path.unlink()
        if self.num_workers:
            # A forked copy of a process that computes with several threads may hang.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.num_workers, context, torch.set_num_threads, (1,))

    def _score_batch(self, engine: Engine) -> None:
        if not isinstance(engine.state.output, list) or not isinstance(engine.state.batch, list):
            raise ValueError("CombinationScores needs an evaluator with decollate=True: lists of one dict per case.")
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            self._score_item({**item, **output})
        self._write_pending(_PENDING_PER_WORKER * self.num_workers)

    def _score_item(self, item: Mapping[str, Any]) -> None:
        predictions, label, settings = self._checked(item)
        if settings["case"] in self._shown:
            self._keep_maps(item, predictions, settings)
        # Here, since confidences are as large as the class maps: they need not wait for a worker.
        calibration = self._calibration_rows(item, predictions, label, settings["names"])
        if self._pool is None:
            self._write(settings["case"], score_case(predictions, label, **settings), calibration)
        else:
            # As arrays: sharing memory between processes, as torch's tensors do, may run out of file handles.
            future = self._pool.submit(_score_arrays, predictions.numpy(), label.numpy(), settings)
            self._pending.append((settings["case"], future, calibration))

    def _keep_maps(self, item: Mapping[str, Any], predictions: Tensor, settings: Mapping[str, Any]) -> None:
        keep_case(
            self._maps_path(settings["case"]),
            image=item["image"],
            presence=torch.as_tensor(item["presence"]).tolist(),
            modalities=self.modalities,
            label=item["label"],
            predictions=predictions,
            combinations=settings["names"],
        )

    def _calibration_rows(
        self, item: Mapping[str, Any], predictions: Tensor, label: Tensor, names: Sequence[str]
    ) -> list[Row]:
        rows = [{"case": item["case"], "combination": name} for name in names] if self.confidences else []
        for column, key in self.confidences.items():
            confidences = item[key][self._available(item)]
            for row, confidence, prediction in zip(rows, confidences, predictions, strict=True):
                row[column] = expected_calibration_error(confidence, prediction == label)
        return rows

    def _write_pending(self, keep: int) -> None:
        """Write finished cases in their order, and wait until no more than `keep` are pending."""
        while self._pending and (len(self._pending) > keep or self._pending[0][1].done()):
            case, future, calibration = self._pending.popleft()
            self._write(case, future.result(), calibration)

    def _write(self, case: str, scores: list[Row], calibration: list[Row]) -> None:
        self.files.append(case, {_SCORES: scores, _CALIBRATION: calibration})

    def _finish(self) -> None:
        try:
            self._write_pending(keep=0)
        finally:
            self._shut_down()
        self._write_table()

    def _write_table(self) -> None:
        path, expected = self.output_dir / "table.md", self.output_dir / FILE_NAME
        if not self.files.cases:  # all have failed
            path.unlink(missing_ok=True)
            expected.unlink(missing_ok=True)
            return
        scores = read_scores(self.output_dir / _SCORES)
        table = report(scores, modalities=self.modalities, regions=self.regions)
        if "ece_calibrated" in self.confidences:
            errors = pd.read_csv(self.output_dir / _CALIBRATION, dtype={"combination": str}, keep_default_na=False)
            table += "\n" + calibration_table(errors, modalities=self.modalities)
        with complete_file(path) as unfinished:
            unfinished.write_text(table, encoding="utf-8")
        means = overall(scores, "dice")[:-1]  # as in the table; the last row is the mean of the regions
        named = zip(means["region"], 100 * means["mean"], strict=True)
        logger.info(f"Mean Dice [%] of all combinations: {', '.join(f'{name} {mean:.1f}' for name, mean in named)}.")
        weights = self.files.settings["weights_sha256"]
        write_expected_scores(expected, scores, weights_sha256=weights, data=self.data)

    def _stop(self, _engine: Engine, error: Exception) -> None:
        """Write what was predicted before an error, then let the error go on: it is the first, and the one to mend."""
        with contextlib.suppress(Exception):
            self._write_pending(keep=0)
        self._shut_down()
        raise error

    def _shut_down(self) -> None:
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _checked(self, item: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """A case's class maps [P, ...] of the combinations that it has, its label, and the settings of score_case."""
        needed = ["case", "presence", "pred", "label", *self.confidences.values()]
        missing = [key for key in needed if item.get(key) is None]
        if missing:
            raise ValueError(f"Case {item.get('case')}: {missing} is missing; scores need {', '.join(needed)}.")
        case, predictions, label = item["case"], item["pred"], item["label"]
        if len(predictions) != len(self.names) or len(label) != 1:
            raise ValueError(
                f"Case {case}: pred must be [{len(self.names)}, ...], a map for each combination of {self.modalities}, "
                f"and label [1, ...], got {tuple(predictions.shape)} and {tuple(label.shape)}."
            )
        available = self._available(item)
        settings = {
            "case": case,
            "names": [name for name, there in zip(self.names, available.tolist(), strict=True) if there],
            "regions": self.regions,
            "spacing": _spacing(case, predictions, label),
            "lesionwise": self.lesionwise,
        }
        maps = convert_to_tensor(predictions)[available.to(predictions.device)].cpu()
        return maps, convert_to_tensor(label)[0].cpu(), settings

    def _available(self, item: Mapping[str, Any]) -> Tensor:
        """Which combinations a case has the modalities for, bool [P]."""
        present = torch.as_tensor(item["presence"]).cpu().bool()
        return ~(self.presence & ~present).any(dim=1)


def _score_arrays(predictions: np.ndarray, label: np.ndarray, settings: dict[str, Any]) -> list[dict[str, Any]]:
    return score_case(torch.from_numpy(predictions), torch.from_numpy(label), **settings)


def _spacing(case: str, *maps: Tensor) -> list[float]:
    """Voxel size in mm from the first map [C, H, W(, D)] that has an affine."""
    for classes in maps:
        if isinstance(classes, MetaTensor):
            return [float(size) for size in affine_to_spacing(classes.affine, r=classes.ndim - 1)]
    raise ValueError(f"Case {case}: neither pred nor label is a MetaTensor, so the voxel size in mm is not known.")
