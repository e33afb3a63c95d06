"""Datalists: JSON files with the files of each case and its part of the split.

A case is a dictionary with the keys

- ``case``: its id; ``patient``: the patient's id, which several cases share if a patient was scanned more than once;
- one key per modality *that exists*, holding a path: a missing modality is a missing key. ``x.nii.gz[2]`` is the third
  volume of a 4-D file;
- ``label``: path of the label file, missing where there is none;
- ``label_values``: the value of class 0, 1, ... in label files of this kind;
- ``presence``: optionally the case's row of C, which may hide modalities that exist.

A datalist is ``{"dataset", "modalities", "root", "training": [case, ...], "validation": [...], "test": [...]}`` with
paths relative to ``root``. Cases without a label are in a fourth section, ``inference``. It may have ``class_names``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from passion_monai.datasets import DatasetSpec
from passion_monai.faults import FAULT_KEY
from passion_monai.files import complete_file, split_volume
from passion_monai.presence import check_presence

__all__ = [
    "SECTIONS",
    "UNLABELLED_SECTION",
    "apply_presence",
    "check_every_modality",
    "check_modalities",
    "datalist_presence",
    "modality_counts",
    "read_datalist",
    "read_json",
    "write_datalist",
]

Case = dict[str, Any]

SECTIONS = ("training", "validation", "test")
UNLABELLED_SECTION = "inference"
_HEADER_KEYS = ("dataset", "modalities", "root")
_CLASSES_KEY = "class_names"  # which datalists may lack
_CASE_KEYS = ("case", "patient", "label", "label_values", "presence")
# What transforms add to a case, and what they make of the modalities.
_SAMPLE_KEYS = ("image", "pred", "files", "slice", FAULT_KEY)


def check_modalities(modalities: Sequence[str]) -> None:
    """Check that names can be the keys of modalities in a datalist.

    Raises:
        ValueError: when there is none, a name occurs twice, or a name equals another key of a case.
    """
    reserved = (*_CASE_KEYS, *_SAMPLE_KEYS)
    names = modalities if isinstance(modalities, (list, tuple)) else []
    if not names or len(set(names)) < len(names) or any(not isinstance(name, str) or not name for name in names):
        raise ValueError(f"modalities must be a list of different names, got {modalities!r}.")
    if set(names) & set(reserved):
        raise ValueError(f"modalities must not have one of the names {list(reserved)}, got {modalities!r}.")


def write_datalist(
    path: str | Path, splits: Mapping[str, Sequence[Case]], *, spec: DatasetSpec, root: str | Path
) -> None:
    """Write a datalist; either the whole file appears or nothing changes.

    Args:
        path: the JSON file; its folder is made where needed.
        splits: cases by section, as :func:`passion_monai.datasets.splitting.split_cases` returns them.
        spec: the dataset.
        root: folder below which all files lie; paths are stored relative to it, so that the data can move.

    Raises:
        ValueError: naming the case when one of its files is not below ``root``.
    """
    path, root = Path(path), Path(root).expanduser()
    content: dict[str, Any] = {"dataset": spec.name, "modalities": list(spec.modalities), "root": str(root.resolve())}
    content[_CLASSES_KEY] = list(spec.class_names)
    for section, cases in splits.items():
        content[section] = [_with_relative_paths(case, spec.modalities, root) for case in cases]
    with complete_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _with_relative_paths(case: Case, modalities: Sequence[str], root: Path) -> Case:
    relative = dict(case)
    for key in _file_keys(case, modalities):
        # The root is tried as given and with links resolved; links below it are kept as they are.
        file = Path(case[key]).absolute()
        base = next((base for base in (root.absolute(), root.resolve()) if file.is_relative_to(base)), None)
        if base is None:
            raise ValueError(
                f"Case {case['case']!r}: {key} {file} is not below root {root}; pass the folder that holds it."
            )
        relative[key] = file.relative_to(base).as_posix()
    return relative


def _file_keys(case: Mapping[str, Any], modalities: Sequence[str]) -> list[str]:
    return [key for key in (*modalities, "label") if key in case]


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file, with or without a byte order mark.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file and the place when it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Datalist {path} does not exist; python -m passion_monai.datasets.<name> writes one (see its --help)."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(_shape_of_a_datalist(path, type(content).__name__))
    return content


def _shape_of_a_datalist(path: Path, found: object) -> str:
    sections = [*SECTIONS, UNLABELLED_SECTION]
    return f"{path} must be an object with {list(_HEADER_KEYS)} and sections {sections}, got {found}."


def read_datalist(
    path: str | Path, section: str, *, modalities: Sequence[str], root: str | Path | None = None
) -> list[Case]:
    """Read and check one section of a datalist.

    A missing file is not an error here: the transform that reads it reports it together with all other unreadable ones.
    It is an error if every case lacks a file.

    Args:
        path: the JSON file.
        section: ``training``, ``validation``, ``test`` or ``inference``.
        modalities: the modalities to read, some or all of the datalist's; other modalities of a case are left out.
        root: folder that the paths are relative to, where it is no longer the one in the file.

    Returns:
        The section's cases, with absolute paths and, where a case has it, ``presence`` in the order of ``modalities``.

    Raises:
        FileNotFoundError: when the datalist does not exist, or every case lacks a file.
        ValueError: naming the datalist and all cases that do not conform to this module's description.
    """
    path = Path(path)
    content = _load(path, section)
    absent = [modality for modality in modalities if modality not in content["modalities"]]
    if absent:
        raise ValueError(
            f"{path} has the modalities {content['modalities']}, but {absent[0]!r} is asked for; give --modalities "
            "with those to use."
        )
    folder = _root(path, content["root"] if root is None else root)
    cases, problems = [], []
    for entry in content[section]:
        where = f"{path}, section {section!r}, case {entry['case']!r}"
        try:
            _check_case(entry, where, content["modalities"], labelled=section in SECTIONS)
            cases.append(
                _with_absolute_paths(
                    _select_modalities(entry, where, content["modalities"], modalities), modalities, folder
                )
            )
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    _check_root(f"{path}, section {section!r}", cases, modalities, folder)
    return cases


def _check_root(where: str, cases: Sequence[Case], modalities: Sequence[str], root: Path) -> None:
    """Tell a wrong root, with which no case is complete, from single files that are missing."""
    absent = [[case[key] for key in _file_keys(case, modalities) if not _exists(case[key])] for case in cases]
    if all(absent):
        raise FileNotFoundError(
            f"{where}: no case has all of its files; of {cases[0]['case']!r}, {absent[0][0]} does not exist. If the "
            f"data lie somewhere else than {root}, pass that folder as root (dataset_dir of a bundle); if a modality "
            "is missing, leave out its key."
        )


def _root(path: Path, root: str | Path) -> Path:
    """The folder that the datalist's paths are relative to."""
    try:
        return Path(root).expanduser().absolute()
    except RuntimeError as error:  # the home of a user who is not there
        raise ValueError(f"{path}: root {root} is no folder ({error}); pass the folder of the data as root.") from error


def _load(path: Path, section: str) -> dict[str, Any]:
    """The datalist's content, checked as far as it does not concern single cases."""
    content = read_json(path)
    sections = (*SECTIONS, UNLABELLED_SECTION)
    if section not in sections:
        raise ValueError(f"section must be one of {list(sections)}, got {section!r}.")
    if not set(_HEADER_KEYS) <= content.keys() <= {*_HEADER_KEYS, _CLASSES_KEY, *sections}:
        raise ValueError(_shape_of_a_datalist(path, sorted(content)))
    if not _is_list_of(content["modalities"], str) or not isinstance(content["root"], str):
        raise ValueError(
            f"{path}: 'modalities' must be a list of names and 'root' a folder, got {content['modalities']!r} "
            f"and {content['root']!r}."
        )
    filled = {name: content[name] for name in sections if content.get(name)}
    if section not in filled:
        only_labelled = section == UNLABELLED_SECTION and "test" in filled
        remedy = "All cases have labels: add --section test to segment the test cases. " if only_labelled else ""
        raise ValueError(
            f"{path} has no case in section {section!r}. {remedy}The sections with cases are {list(filled)}."
        )
    _check_unique(path, filled)
    return content


def _check_unique(path: Path, sections: Mapping[str, Any]) -> None:
    """Check that every case has an id, none is there twice, and no patient is in two of the labelled sections."""
    section_of: dict[str, str] = {}
    section_of_patient: dict[str, str] = {}
    for section, entries in sections.items():
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path}, section {section!r}: must be a list of objects, one per case.")
        for entry in entries:
            case = entry.get("case")
            if not isinstance(case, str) or not case or case != Path(case).name:
                raise ValueError(
                    f"{path}, section {section!r}: 'case' must be the case's id, got {case!r} in {entry}. Files are "
                    "named by it, so it has no folders."
                )
            if case in section_of:
                raise ValueError(f"{path}: case {case!r} is there twice, in {section_of[case]!r} and in {section!r}.")
            section_of[case] = section
            patient = str(entry.get("patient", case))
            other = section_of_patient.setdefault(patient, section) if section in SECTIONS else section
            if other != section:
                raise ValueError(
                    f"{path}, case {case!r}: patient {patient!r} is in {other!r} and in {section!r}, so that scores "
                    "would be of a patient who was learned from; keep all cases of a patient in one section."
                )


def _check_case(entry: Mapping[str, Any], where: str, modalities: Sequence[str], *, labelled: bool) -> None:
    """Check the keys and values of one entry, without looking at the disk."""
    unknown = sorted(entry.keys() - {*_CASE_KEYS, *modalities})
    if unknown:
        raise ValueError(
            f"{where}: unknown keys {unknown}, expected modalities {list(modalities)} and {list(_CASE_KEYS)}."
        )
    if labelled and "label" not in entry:
        raise ValueError(f"{where}: has no label; add one or move the case to section {UNLABELLED_SECTION!r}.")
    _check_paths(entry, where, modalities)
    if not _is_list_of(entry.get("label_values", []), int):
        raise ValueError(f"{where}: 'label_values' must be a list of whole numbers, got {entry['label_values']!r}.")
    row = entry.get("presence", [True] * len(modalities))
    if not isinstance(row, list) or len(row) != len(modalities) or any(value not in (0, 1) for value in row):
        raise ValueError(f"{where}: 'presence' must be {len(modalities)} booleans, one per modality, got {row!r}.")


def _check_paths(entry: Mapping[str, Any], where: str, modalities: Sequence[str]) -> None:
    key_of: dict[str, str] = {}
    for key in _file_keys(entry, modalities):
        path = entry[key]
        if not isinstance(path, str) or not path:
            raise ValueError(f"{where}: {key!r} must be a path, got {path!r}; leave out the key of a missing modality.")
        other = key_of.setdefault(path, key)
        if other != key:
            raise ValueError(f"{where}: {other!r} and {key!r} are the same file, {path}; give each its own.")


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(entry) is kind for entry in value)


def _select_modalities(entry: Mapping[str, Any], where: str, modalities: Sequence[str], wanted: Sequence[str]) -> Case:
    """The case with the wanted modalities only, its row of C in their order."""
    case = {key: value for key, value in entry.items() if key in wanted or key not in modalities}
    if "presence" in entry:
        row = dict(zip(modalities, entry["presence"], strict=True))
        case["presence"] = [bool(row[modality]) for modality in wanted]
    if not datalist_presence([case], wanted).any():
        raise ValueError(f"{where}: none of {list(wanted)} is present; remove the case.")
    return case


def _with_absolute_paths(case: Case, modalities: Sequence[str], root: Path) -> Case:
    return case | {key: str(root / case[key]) for key in _file_keys(case, modalities)}


def _exists(path: str) -> bool:
    try:
        return split_volume(path)[0].exists()
    except OSError:  # such as a name that is too long
        return False


def datalist_presence(cases: Sequence[Case], modalities: Sequence[str]) -> NDArray[np.bool_]:
    """The presence matrix of a list of cases.

    Args:
        cases: N cases.
        modalities: names of the M modalities.

    Returns:
        Boolean array ``[N, M]``: true where the modality's key is there and the case's ``presence`` row, if any,
        agrees.

    Raises:
        ValueError: naming the case when its ``presence`` row does not have M entries.
    """
    presence = np.zeros((len(cases), len(modalities)), dtype=bool)
    for index, case in enumerate(cases):
        row = case.get("presence", [True] * len(modalities))
        if len(row) != len(modalities):
            raise ValueError(f"Case {case['case']!r}: presence must have {len(modalities)} entries, got {list(row)}.")
        presence[index] = [key in case and bool(value) for key, value in zip(modalities, row, strict=True)]
    return presence


def check_every_modality(cases: Sequence[Case], modalities: Sequence[str], *, source: str | Path) -> None:
    """Check that at least one case has each modality, so that each can be learned.

    Args:
        cases: the training cases.
        modalities: names of the M modalities.
        source: the file that says what they have.

    Raises:
        ValueError: naming the modalities that no case has, and how to train without them.
    """
    absent = [name for name, count in modality_counts(cases, modalities).items() if count == 0]
    if absent:
        others = [name for name in modalities if name not in absent]
        raise ValueError(
            f"{source}: no training case has {', '.join(absent)}, so that nothing can be learned of it. Train without "
            f'it by --modalities "{others}", and by missing_rates for these alone if they are simulated; or add cases '
            "that have it."
        )


def apply_presence(cases: Sequence[Case], presence: ArrayLike, modalities: Sequence[str]) -> list[Case]:
    """Give each case its row of C, so that the modalities it hides are never read.

    The paths stay in the case; the transform that masks modalities removes them before anything is loaded.

    Args:
        cases: N cases; they are not changed.
        presence: C, ``[N, M]``, its rows in the order of ``cases``.
        modalities: names of the M modalities.

    Returns:
        New cases with ``presence``, a list of M booleans.

    Raises:
        ValueError: when the shapes do not fit, a row is empty, or C claims a modality that a case does not have.
    """
    matrix = check_presence(presence, modalities)
    if len(matrix) != len(cases):
        raise ValueError(f"presence must have one row for each of {len(cases)} cases, got {len(matrix)} rows.")
    for index, modality in np.argwhere(matrix & ~datalist_presence(cases, modalities)):
        raise ValueError(
            f"presence says that case {cases[index]['case']!r} has {modalities[modality]!r}, but the case does not "
            "have it; set the entry to false or leave the case out."
        )
    return [{**case, "presence": row.tolist()} for case, row in zip(cases, matrix, strict=True)]


def modality_counts(cases: Sequence[Case], modalities: Sequence[str]) -> dict[str, int]:
    """How many of the cases have each modality."""
    counts = datalist_presence(cases, modalities).sum(axis=0).tolist()
    return dict(zip(modalities, counts, strict=True))
