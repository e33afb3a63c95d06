"""The presence matrix C of the paper: ``C[n, m]`` is true when modality m of sample n exists.

Everything here works on plain boolean arrays ``[N, M]`` (N samples, M modalities); the names and the order of the
modalities are arguments. A *combination* is one row of such an array, named after the modalities it holds:
``"flair+t1"``.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from passion_monai.files import complete_file

__all__ = [
    "check_presence",
    "combination_name",
    "combinations",
    "missing_rates",
    "parse_combination",
    "read_presence",
    "selected_combinations",
    "simulate_presence",
    "write_presence",
]

BoolArray = NDArray[np.bool_]

SELECTIONS = ("all", "single_and_complete")
_MATRIX_NDIM = 2
_SEPARATOR = "+"
_CSV_MASK = re.compile(r"\[\s*(True|False)(\s*,\s*(True|False))*\s*\]")


def combinations(num_modalities: int) -> BoolArray:
    """All non-empty combinations of modalities, in a fixed order.

    Ordered by the number of modalities present, then lexicographically by modality index: single modalities first, in
    the dataset's order, then pairs (0, 1), (0, 2), ..., and the complete set last.

    Args:
        num_modalities: M, at least 1.

    Returns:
        Boolean array ``[2^M - 1, M]``.

    Raises:
        ValueError: when ``num_modalities`` is below 1.

    Example:
        >>> combinations(2).astype(int).tolist()
        [[1, 0], [0, 1], [1, 1]]
    """
    if num_modalities < 1:
        raise ValueError(f"num_modalities must be at least 1, got {num_modalities}.")
    indices = range(num_modalities)
    subsets = [subset for size in indices for subset in itertools.combinations(indices, size + 1)]
    presence = np.zeros((len(subsets), num_modalities), dtype=bool)
    for row, subset in enumerate(subsets):
        presence[row, list(subset)] = True
    return presence


def selected_combinations(num_modalities: int, selection: str = "all") -> BoolArray:
    """Which of the :func:`combinations` are meant: all of them, or each modality alone and all modalities together.

    Args:
        num_modalities: M, at least 1.
        selection: "all" or "single_and_complete".

    Returns:
        Boolean array ``[2^M - 1]``.

    Raises:
        ValueError: when ``num_modalities`` is below 1 or the selection is unknown.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {SELECTIONS}, got {selection!r}.")
    counts = combinations(num_modalities).sum(axis=1)
    return np.ones(len(counts), dtype=bool) if selection == "all" else np.isin(counts, (1, num_modalities))


def combination_name(presence: ArrayLike, modalities: Sequence[str]) -> str:
    """Name of one combination: its modalities joined by ``+`` in the order of ``modalities``.

    Args:
        presence: one row of C, ``[M]``.
        modalities: the M modality names.

    Raises:
        ValueError: when the row has another length than ``modalities`` or holds no modality.

    Example:
        >>> combination_name([True, False, True], ("flair", "t1ce", "t1"))
        'flair+t1'
    """
    row = check_presence(np.asarray(presence)[None], modalities)[0]
    return _SEPARATOR.join(name for name, present in zip(modalities, row, strict=True) if present)


def parse_combination(name: str, modalities: Sequence[str]) -> BoolArray:
    """The combination with this name; the inverse of :func:`combination_name`, in any order of the parts.

    Args:
        name: modality names joined by ``+``.
        modalities: the M modality names.

    Returns:
        Boolean array ``[M]``.

    Raises:
        ValueError: when a part of the name is no modality or is there twice.
    """
    parts = name.split(_SEPARATOR)
    for part in parts:
        if part not in modalities:
            raise ValueError(f"Combination {name!r}: {part!r} is not a modality, expected some of {list(modalities)}.")
    if len(set(parts)) < len(parts):
        raise ValueError(f"Combination {name!r} names a modality twice.")
    return np.array([modality in parts for modality in modalities])


def check_presence(presence: ArrayLike, modalities: Sequence[str]) -> BoolArray:
    """Check that an array is a presence matrix of these modalities.

    Args:
        presence: array or tensor of booleans, or of 0 and 1.
        modalities: the M modality names.

    Returns:
        Boolean array ``[N, M]``.

    Raises:
        ValueError: when the shape is not ``[N, M]``, a value is neither 0 nor 1, or a sample has no modality at all.
    """
    matrix = np.asarray(presence)
    if matrix.ndim != _MATRIX_NDIM or matrix.shape[1] != len(modalities):
        raise ValueError(
            f"presence must be [N, {len(modalities)}] for modalities {list(modalities)}, got {matrix.shape}."
        )
    if not np.isin(matrix, (0, 1)).all():
        raise ValueError(f"presence must hold booleans or 0 and 1 only, got {matrix.tolist()}.")
    matrix = matrix.astype(bool)
    empty = np.flatnonzero(~matrix.any(axis=1))
    if empty.size:
        raise ValueError(f"presence must have a modality in every row, but row {empty[0]} has none.")
    return matrix


def simulate_presence(num_samples: int, missing_rates: Sequence[float], *, seed: int) -> BoolArray:
    """Draw a presence matrix with exact missing rates, for imperfect data training (the paper's IDT).

    Modality m is present in exactly ``floor(num_samples * (1 - missing_rates[m]) + 0.5)`` samples (halves round up),
    and every sample has at least one modality. Each modality is first drawn on its own; then every sample left
    without any receives a random entry of a sample that has more than one, which changes no modality's count.

    Args:
        num_samples: N, at least 1.
        missing_rates: MR of each of the M modalities, in [0, 1).
        seed: the same seed gives the same matrix.

    Returns:
        Boolean array ``[N, M]``.

    Raises:
        ValueError: when a rate is outside [0, 1), leaves a modality without a sample, or when the rates together
            leave fewer entries than samples.
    """
    counts = _present_counts(num_samples, missing_rates)
    rng = np.random.default_rng(seed)
    presence = np.zeros((num_samples, len(counts)), dtype=bool)
    for modality, count in enumerate(counts):
        presence[rng.permutation(num_samples)[:count], modality] = True
    for sample in np.flatnonzero(~presence.any(axis=1)):
        # sum(counts) >= N: as long as one row is empty, another holds more than one entry.
        donors, modalities = np.nonzero(presence & (presence.sum(axis=1, keepdims=True) > 1))
        pick = rng.integers(len(donors))
        presence[donors[pick], modalities[pick]] = False
        presence[sample, modalities[pick]] = True
    return presence


def _present_counts(num_samples: int, missing_rates: Sequence[float]) -> list[int]:
    """Number of samples that have each modality, checked to be possible."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    if not len(missing_rates):
        raise ValueError("missing_rates must hold one rate per modality, got none.")
    for modality, rate in enumerate(missing_rates):
        if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ValueError(f"missing_rates must be in [0, 1), got {rate!r} for modality {modality}.")
    counts = [math.floor(num_samples * (1 - rate) + 0.5) for rate in missing_rates]
    if 0 in counts:
        modality = counts.index(0)
        raise ValueError(
            f"missing_rates[{modality}] = {missing_rates[modality]} leaves modality {modality} in none of "
            f"{num_samples} samples; every modality needs at least one: lower the rate or use more samples."
        )
    if sum(counts) < num_samples:
        raise ValueError(
            f"missing_rates {list(missing_rates)} leave {sum(counts)} images for {num_samples} samples, so some "
            "sample would have no modality; lower the rates until the sum of (1 - rate) is at least 1."
        )
    return counts


def missing_rates(presence: ArrayLike) -> NDArray[np.float64]:
    """Realised missing rates, MR_m = (N - sum_n C[n, m]) / N.

    Args:
        presence: C, ``[N, M]``.

    Returns:
        Array ``[M]`` in [0, 1].

    Raises:
        ValueError: when ``presence`` is not a matrix with at least one sample and one modality.
    """
    matrix = np.asarray(presence, dtype=bool)
    if matrix.ndim != _MATRIX_NDIM or not matrix.size:
        raise ValueError(f"presence must be [N, M] with N, M >= 1, got shape {matrix.shape}.")
    rates: NDArray[np.float64] = (len(matrix) - matrix.sum(axis=0)) / len(matrix)
    return rates


def write_presence(
    path: str | Path, case_ids: Sequence[str], presence: ArrayLike, *, modalities: Sequence[str]
) -> None:
    """Write a presence matrix as JSON: ``{"modalities": [...], "cases": {case id: [1, 0, ...]}}``.

    Args:
        path: a ``.json`` file; its folder is made.
        case_ids: the N case ids, in the order of the rows.
        presence: C, ``[N, M]``.
        modalities: the M modality names, in the order of the columns.

    Raises:
        ValueError: when the suffix is not ``.json``, an id is there twice, or ids, rows and modalities do not fit
            together.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"path must end in .json, got {path}.")
    matrix = check_presence(presence, modalities)
    if len(case_ids) != len(matrix) or len(set(case_ids)) != len(case_ids):
        raise ValueError(
            f"case_ids must be {len(matrix)} different ids, one per row of presence, got {len(case_ids)} ids of which "
            f"{len(set(case_ids))} are different."
        )
    rows = [f"    {json.dumps(case)}: {row.astype(int).tolist()}" for case, row in zip(case_ids, matrix, strict=True)]
    header = f'{{\n  "modalities": {json.dumps(list(modalities))},\n  "cases": {{\n'
    with complete_file(path) as unfinished:
        unfinished.write_text(header + ",\n".join(rows) + "\n  }\n}\n", encoding="utf-8")


def read_presence(
    path: str | Path,
    modalities: Sequence[str],
    *,
    csv_modalities: Sequence[str] | None = None,
    csv_prefixes: Sequence[str] = (),
) -> dict[str, BoolArray]:
    """Read which modalities each case has, from this project's JSON or from a split file of PASSION's authors.

    Args:
        path: ``.json`` as :func:`write_presence` makes it, or ``.csv`` with the authors' header
            ``data_name,mask_id,mask,pos_mask_ids`` and masks like ``"[True, False, True, True]"``. The two id columns
            number the same combination in the authors' own order and are not used.
        modalities: the M modality names in the order wanted; the file must have the same ones, in any order.
        csv_modalities: what the entries of a CSV's ``mask`` stand for; ``modalities`` if not given. See the dataset's
            spec.
        csv_prefixes: what the authors put before a case's id in a CSV; removed. See the dataset's spec.

    Returns:
        For each case id, in the file's order, a boolean array ``[M]``.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file, the line and the case, when the content is something else than described.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".json", ".csv"):
        raise ValueError(f"path must end in .json or .csv, got {path}.")
    if not path.is_file():
        raise FileNotFoundError(f"Presence file {path} does not exist; write_presence writes one.")
    if suffix == ".json":
        return _read_json(path, modalities)
    return _read_csv(path, modalities, csv_modalities=csv_modalities or modalities, csv_prefixes=csv_prefixes)


def _read_json(path: Path, modalities: Sequence[str]) -> dict[str, BoolArray]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if (
        not isinstance(content, dict)
        or content.keys() != {"modalities", "cases"}
        or not isinstance(content["modalities"], list)
        or not isinstance(content["cases"], dict)
    ):
        raise ValueError(f'{path} must hold {{"modalities": [...], "cases": {{case id: [1, 0, ...]}}}}.')
    order = _order(path, content["modalities"], modalities)
    return {case: _row(f"{path}, case {case!r}", entries, order) for case, entries in content["cases"].items()}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Object hook of JSON: a repeated key would silently hide the first one."""
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"{repeated[0]!r} is there twice.")
    return dict(pairs)


def _read_csv(
    path: Path, modalities: Sequence[str], *, csv_modalities: Sequence[str], csv_prefixes: Sequence[str]
) -> dict[str, BoolArray]:
    order = _order(path, csv_modalities, modalities)
    presence: dict[str, BoolArray] = {}
    for number, name, mask in _csv_rows(path):
        case = _without_prefix(name or "", csv_prefixes)
        where = f"{path}, line {number}, case {case!r}"
        if case in presence:
            raise ValueError(f"{where}: the case is there twice.")
        if mask is None or not _CSV_MASK.fullmatch(mask):
            raise ValueError(f"{where}: mask must look like [True, False, ...], got {mask!r}.")
        entries = [word == "True" for word in re.findall("True|False", mask)]
        presence[case] = _row(where, entries, order)
    return presence


def _csv_rows(path: Path) -> list[tuple[int, str | None, str | None]]:
    """Line, name and mask of every row, None where a row is too short."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames
            rows = [(reader.line_num, row) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from error
    if not {"data_name", "mask"} <= set(columns or ()):
        raise ValueError(f"{path} must have the columns data_name and mask, got {columns}.")
    return [(number, row["data_name"], row["mask"]) for number, row in rows]


def _without_prefix(case: str, prefixes: Sequence[str]) -> str:
    for prefix in prefixes:
        if case.startswith(prefix):
            return case.removeprefix(prefix)
    return case


def _order(path: Path, found: Sequence[Any], wanted: Sequence[str]) -> list[int]:
    """Where each wanted modality stands in a row of the file."""
    names = list(map(str, found))
    if sorted(names) != sorted(wanted):
        raise ValueError(f"{path} has the modalities {found}, expected {list(wanted)} in any order.")
    return [names.index(modality) for modality in wanted]


def _row(where: str, entries: Any, order: Sequence[int]) -> BoolArray:
    """One row of the file, checked and brought into the order wanted."""
    if not isinstance(entries, list) or len(entries) != len(order):
        raise ValueError(f"{where}: expected {len(order)} entries, one per modality, got {entries}.")
    if any(entry not in (0, 1) for entry in entries):
        raise ValueError(f"{where}: entries must be 0 or 1, got {entries}.")
    if not any(entries):
        raise ValueError(f"{where}: the case has no modality at all; remove the case.")
    return np.array(entries, dtype=bool)[list(order)]
