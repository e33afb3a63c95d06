"""The record of a training, ``run.json`` and ``presence.json``, by which evaluations and reports know what it was."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from passion_monai.datasets.datalist import datalist_presence
from passion_monai.datasets.phantom_mark import is_phantom
from passion_monai.files import complete_file
from passion_monai.networks.checkpoints import run_folder
from passion_monai.presence import write_presence

__all__ = ["FREE_SETTINGS", "read_settings", "trained_settings", "write_run"]

logger = logging.getLogger(__name__)

FREE_SETTINGS = ("epochs", "batch_size", "precision")
"""What may change when a training is resumed; a batch size, at the end of an epoch only."""
_SETTINGS = (
    *("modalities", "phantom", "dataset", "backbone", "class_names", "regions", "missing_rates", "seed", "objective"),
    *("modality_dropout", "lambda_pixel", "lambda_prototype", "use_task_mask", "adaptive_beta", "epochs"),
)


def write_run(
    output_dir: str | Path,
    *,
    resume: bool,
    bundle: str,
    cases: Sequence[Mapping[str, Any]],
    modalities: Sequence[str],
    settings: Mapping[str, Any],
) -> None:
    """Write ``run.json``, what a training was, and ``presence.json``, which training case has which modality.

    A training that is resumed writes them again, the same as before but for `FREE_SETTINGS`.

    Args:
        output_dir: folder of the run.
        resume: whether the training may go on with an earlier one in that folder.
        bundle: folder of the bundle, whose name is kept.
        cases: the training cases; of one that is there slice by slice, any slice says what it has.
        modalities: names of the M modalities.
        settings: whatever else there is to say of the run, for JSON.

    Raises:
        ValueError: when the earlier training had other settings.
    """
    folder = Path(output_dir)
    phantom = is_phantom(cases[0]["label"])
    record = {"bundle": Path(bundle).name, "modalities": list(modalities), "phantom": phantom, **settings}
    if resume:
        _check_that_settings_stayed(folder / "run.json", json.loads(json.dumps(record)))
    with complete_file(folder / "run.json") as unfinished:
        unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    by_id = {case["case"]: dict(case) for case in cases}
    presence = datalist_presence(list(by_id.values()), modalities)
    write_presence(folder / "presence.json", list(by_id), presence, modalities=modalities)


def _check_that_settings_stayed(path: Path, record: Mapping[str, Any]) -> None:
    """Some would have no effect on what goes on, others from here on only; the file would say neither."""
    if not path.is_file():
        return
    before = _read_json(path)
    names = [name for name in record if name in before and name not in FREE_SETTINGS]
    changed = [f"{name} {before[name]}, now {record[name]}" for name in names if before[name] != record[name]]
    if changed:
        raise ValueError(
            f"The training in {path.parent} has other settings: {'; '.join(changed)}. Give those it was started with; "
            "or train anew, with another --output_dir or with --overwrite True instead of --resume True."
        )


def trained_settings(weights: str | Path | Sequence[str | Path], **defaults: Any) -> dict[str, Any]:
    """What predictions need to know of a training, such as its voxel size, crop, sequences and classes.

    Args:
        weights: path of the checkpoint, or of several. ``run.json`` in the folder above the first one's is read.
        defaults: the settings to read, each with its value where the file or the entry is missing.

    Returns:
        The settings, by the names of `defaults`.

    Raises:
        ValueError: when ``run.json`` is there and cannot be read.
    """
    path = run_folder(weights) / "run.json"
    if not path.is_file():
        return defaults
    known = read_settings(path.parent)
    settings = {name: known.get(name, default) for name, default in defaults.items()}
    other = [f"{name} {value}" for name, value in settings.items() if value != json.loads(json.dumps(defaults[name]))]
    if other:
        logger.info(f"As in {path}: {', '.join(other)}.")
    return settings


def read_settings(folder: Path) -> dict[str, Any]:
    """What the ``run.json`` of a run says.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it cannot be read, or lacks something.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no run.json, which says what the run was; its training command with --resume True writes it."
        )
    settings = _read_json(path)
    missing = [key for key in _SETTINGS if key not in settings]
    if missing:
        raise ValueError(f"{path} lacks {missing}; the training command with --resume True writes it anew.")
    return settings


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
