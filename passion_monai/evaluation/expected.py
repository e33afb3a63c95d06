"""Scores of a network for each combination of modalities, kept beside its weights and recorded with each prediction."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passion_monai.files import complete_file
from passion_monai.networks.checkpoints import checkpoint_paths, run_folder

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "FILE_NAME",
    "check_replaceable",
    "checksum",
    "evaluation_folder",
    "read_expected_scores",
    "write_expected_scores",
]

logger = logging.getLogger(__name__)

FILE_NAME = "expected_scores.json"
_METRICS = ("dice", "hd95_mm")
_DIGITS = 4


def checksum(weights: str | Path | Sequence[str | Path]) -> str | None:
    """SHA-256 of a file of weights, or of several; None where one is not there."""
    paths = checkpoint_paths(weights)
    if not all(path.is_file() for path in paths):  # what loads them says so, when the run starts
        return None
    return " ".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)


def evaluation_folder(weights: str | Path | Sequence[str | Path]) -> Path:
    """Where the evaluation of a run puts its files: ``evaluation`` beside the folder of the (first) weights."""
    return run_folder(weights) / "evaluation"


def check_replaceable(folder: str | Path) -> None:
    """Refuse to evaluate into a bundle whose weights came with the scores of a cross-validation.

    Args:
        folder: where the evaluation puts its files.

    Raises:
        ValueError: when the scores there belong to weights that a bundle's ``weights.json`` is about.
    """
    bundle = Path(folder).parent
    weights = bundle / "models" / "model.pt"
    if (bundle / "weights.json").is_file() and read_expected_scores(weights) is not None:
        raise ValueError(
            f"{Path(folder) / FILE_NAME} came with the weights of the bundle, and would be replaced. Give another "
            f"--output_dir; to evaluate these weights, also --ckpt_path {weights}."
        )


def write_expected_scores(path: str | Path, scores: pd.DataFrame, *, weights_sha256: str | None, data: str) -> None:
    """Write the mean scores of each combination and region, with their 95 % intervals over the cases, as JSON.

    A case counts for the regions that its label has (the convention "excluded" of
    :mod:`passion_monai.evaluation.tables`): without a region it scores 1 or 0 there, which says nothing of a patient
    who has it. Distances are means over those in which the prediction has the region too.

    Args:
        path: the file, called `FILE_NAME` in the folder ``evaluation`` beside the weights' folder.
        scores: rows with `SCORE_COLUMNS` of :mod:`passion_monai.evaluation.tables`.
        weights_sha256: of the weights that were evaluated, see :func:`checksum`; no others have these scores.
        data: which cases were scored, for people to read.
    """
    # Pandas and scipy, which an inference does not need.
    from passion_monai.evaluation.statistics import summarise
    from passion_monai.evaluation.tables import without_empty_labels

    combinations: dict[str, Any] = {}
    for metric in _METRICS:
        for row in summarise(without_empty_labels(scores), metric).to_dict("records"):
            regions = combinations.setdefault(row["combination"], {})
            numbers = {name: _number(row[name]) for name in ("mean", "low", "high")}
            regions.setdefault(row["region"], {})[metric] = numbers | {"cases": row["cases"]}
    content = {"weights_sha256": weights_sha256, "data": data, "combinations": combinations}
    with complete_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_expected_scores(weights: str | Path | Sequence[str | Path]) -> dict[str, Any] | None:
    """The scores written for these weights, or None if they were not evaluated.

    Args:
        weights: path of the checkpoint, or of several; see :func:`evaluation_folder`.

    Returns:
        ``data`` and ``combinations``, as :func:`write_expected_scores` has them.

    Raises:
        ValueError: when the file is there and cannot be read.
    """
    path = evaluation_folder(weights) / FILE_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known, found = content["weights_sha256"], {key: content[key] for key in ("data", "combinations")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); delete it, or run the evaluation again.") from error
    if known != checksum(weights):
        logger.warning(f"{path} is of other weights than {weights}: no scores are told. Run the evaluation again.")
        return None
    return found


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, _DIGITS)
