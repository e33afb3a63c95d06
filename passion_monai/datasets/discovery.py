"""Finds the cases of a data set by the names of its files, for all layouts.

A layout is a table of patterns such as ``{case}_flair``. Any supported extension matches, in small letters or
capitals. A modality may also be the folder of a DICOM series with that name. Images with other names are always
reported, since one of them may be the modality that seems to be missing.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from passion_monai.faults import FAULT_KEY, Fault, raise_faults
from passion_monai.files import volume_name

__all__ = ["EXTENSIONS", "IMAGE_KEY", "Naming", "compile_pattern", "discover_cases", "strip_extension"]

logger = logging.getLogger(__name__)

EXTENSIONS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
_IMAGE = re.compile("|".join(f"{re.escape(extension)}$" for extension in EXTENSIONS), re.IGNORECASE)
_DICOM = re.compile(r"\.(dcm|ima)$", re.IGNORECASE)
# How the name of an image ends that people derive from others, and that is no modality called differently.
_DERIVED = re.compile(r"(mask|seg|label|lesion|roi|pred|prob)[a-z]*\d*$", re.IGNORECASE)
IMAGE_KEY = "image"
"""In a table of names, a file that holds several modalities."""
_SHOWN = 5  # of the files that a message lists


def strip_extension(name: str) -> str:
    """The name of an image file without the extension of its format."""
    return _IMAGE.sub("", name)


@dataclass(frozen=True)
class Naming:
    """One way of naming a data set's files.

    In a pattern ``{case}`` stands for the case's id and ``*`` for anything but a slash. A pattern with a slash also
    matches the folders above the file. If several patterns match a name, the one with the most literal letters wins.

    Args:
        keys: for each pattern, without extension, the modality, or ``label``, or ``image`` for `volumes`.
        label_values: the value of each class in label files of this kind.
        case: regular expression of the ids, if patterns alone are ambiguous.
        second_choice: patterns of files that are used only if the case has no other file for the key.
        volumes: the modalities in a 4-D file, in the order of its last axis.
    """

    keys: Mapping[str, str]
    label_values: tuple[int, ...]
    case: str = "[^/]+"
    second_choice: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()

    def identify(self, stem: str) -> tuple[str, str] | None:
        """Case and pattern of a path below the root, without its extension; None if it is called otherwise."""
        for pattern, expression in self._expressions:
            if match := expression.fullmatch(stem):
                return match["case"], pattern
        return None

    @cached_property
    def _expressions(self) -> list[tuple[str, re.Pattern[str]]]:
        """The patterns, those that say most first."""
        ordered = sorted(self.keys, key=lambda pattern: len(pattern.replace("{case}", "").replace("*", "")))
        return [(pattern, compile_pattern(pattern, case=self.case)) for pattern in reversed(ordered)]


def compile_pattern(pattern: str, **parts: str) -> re.Pattern[str]:
    """What a pattern matches, as a regular expression over a path below the root.

    Args:
        pattern: with ``*`` for anything but a slash, and names in braces.
        parts: for each name in braces, the regular expression of what it stands for.
    """
    places = {f"{{{name}}}": f"(?P<{name}>{expression})" for name, expression in parts.items()} | {"*": "[^/]*"}
    pieces = re.split("(" + "|".join(map(re.escape, places)) + ")", pattern)
    return re.compile("(?:.*/)?" + "".join(places.get(piece, re.escape(piece)) for piece in pieces))


@dataclass(frozen=True)
class _File:
    """A file whose name says what it is."""

    path: Path
    case: str
    pattern: str
    naming: Naming

    @property
    def key(self) -> str:
        return self.naming.keys[self.pattern]


def discover_cases(
    root: str | Path,
    namings: Sequence[Naming],
    *,
    title: str,
    modalities: Sequence[str],
    patient: Callable[[str], str] = str,
    rename: Callable[[str], str] = str,
    labels_apart: bool = False,
    keep_faulty: bool = False,
) -> list[dict[str, Any]]:
    """Find all cases below a folder, which may also be the folder of a single case.

    Hidden files and folders are left out; linked folders are not followed, which is logged, as are images
    whose name fits no modality.

    Args:
        root: the folder that is searched.
        namings: the ways in which the data set names its files.
        title: the data set's name, for messages.
        modalities: names of the M modalities, in their order.
        patient: gives the patient of a case, from its id.
        rename: gives the right name, without extension, of a file, for files released under a wrong name.
        labels_apart: whether a case's label may lie in another folder than its images. Files matched by a pattern with
            a slash may do so in any case.
        keep_faulty: keep cases whose files contradict each other, with the reason under the key ``fault`` and without
            files, instead of raising an error.

    Returns:
        One case per id, ordered by id: ``case``, ``patient``, the absolute path of each modality there is, ``label``
        if there is one, and the ``label_values`` of its naming.

    Raises:
        FileNotFoundError: when ``root`` is no folder or holds no case.
        ValueError: naming all cases, and their files, that have two files for one modality, lie in two folders, are
            named in two ways, have a label only, a broken link, a pipe or a folder called like an image; or when no
            case has a modality, while images called otherwise lie beside the cases.
    """
    root = Path(root).expanduser().absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"root {root} is not a folder; pass the folder that holds the {title} cases.")
    found: dict[str, list[_File]] = {}
    unknown = []
    for path in _walk(root, namings):
        file = _identify(path, root, namings, rename)
        if file is None:
            unknown.append(path)
        else:
            found.setdefault(file.case, []).append(file)
    if not found:
        names = [f"{_shown(pattern)}.nii[.gz]" for naming in namings for pattern in naming.keys]
        raise FileNotFoundError(
            f"root {root} holds no {title} case; looked for files named {', '.join(dict.fromkeys(names))}, for "
            f"{', '.join(EXTENSIONS[2:])}, and for folders of a DICOM series; found {_first(unknown, root)}."
        )
    _report_unknown(unknown, [file for files in found.values() for file in files], modalities, namings, root=root)
    cases = []
    for case in sorted(found):
        entry: dict[str, Any] = {"case": case, "patient": patient(case)}
        try:
            paths = _paths(case, found[case], labels_apart=labels_apart)
            entry |= {key: paths[key] for key in (*modalities, "label") if key in paths}
            entry["label_values"] = list(found[case][0].naming.label_values)
        except ValueError as error:
            entry[FAULT_KEY] = str(error)
        cases.append(entry)
    if not keep_faulty:
        raise_faults(Fault(case["case"], "", case[FAULT_KEY]) for case in cases if FAULT_KEY in case)
    return cases


def _report_unknown(
    unknown: Sequence[Path],
    known: Sequence[_File],
    modalities: Sequence[str],
    namings: Sequence[Naming],
    *,
    root: Path,
) -> None:
    """Warn of images whose names fit no modality; an error if one of them may be a modality that no case has."""
    if not unknown:
        return
    names = "; ".join(
        ", ".join(f"{_shown(pattern)} ({key})" for pattern, key in naming.keys.items()) for naming in namings
    )
    remedy = (
        f"Names are {names}; case matters. Rename the images that are one of these, or assign them by "
        "--modality NAME=PATTERN of python -m passion_monai.datasets.patterns (for a single patient, use files)"
    )
    folders = {file.path.parent for file in known}
    doubtful = [path for path in unknown if path.parent in folders and not _DERIVED.search(strip_extension(path.name))]
    absent = [name for name in modalities if name not in {file.key for file in known}]
    if doubtful and absent:
        raise ValueError(
            f"No case below {root} has {', '.join(absent)}, but there are {_first(doubtful, root)}, whose names fit no "
            f"modality. {remedy}; move all other images out of the folder. If no case has the modality, leave it out "
            "(--without of that command)."
        )
    logger.warning(
        "Not used: below %s there are %s, whose names fit no modality. %s. Ignore this if they are something else, "
        "such as masks.",
        root,
        _first(unknown, root),
        remedy,
    )


def _shown(pattern: str) -> str:
    """A pattern as users would write it in a shell."""
    return re.sub(r"\*+", "*", pattern.replace("{case}", "*"))


def _first(paths: Sequence[Path], root: Path) -> str:
    """How many images there are, and the first few of them."""
    shown = ", ".join(str(path.relative_to(root)) for path in paths[:_SHOWN])
    return f"{len(paths)} other image(s)" + (f": {shown}" if paths else "") + ", ..." * (len(paths) > _SHOWN)


def _walk(root: Path, namings: Sequence[Naming]) -> Iterator[Path]:
    """All image files below ``root``, and folders of DICOM files or called like an image, in a stable order."""
    for folder, subfolders, names in os.walk(root, onerror=lambda error: logger.warning("Left out: %s", error)):
        here = Path(folder)
        visible = sorted(name for name in subfolders if not name.startswith("."))
        for name in visible:
            if (here / name).is_symlink():
                logger.warning("Left out: %s is a link, links to folders are not followed.", here / name)
        taken = [name for name in visible if _is_taken(here / name, root, namings)]
        subfolders[:] = [name for name in visible if name not in taken]
        files = sorted(name for name in names if not name.startswith(".") and _IMAGE.search(name))
        yield from (here / name for name in [*taken, *files])
        if any(_DICOM.search(name) for name in names) and _identify(here, root, namings) is None:
            yield here


def _identify(path: Path, root: Path, namings: Sequence[Naming], rename: Callable[[str], str] = str) -> _File | None:
    """What a file or folder is by its name; None if its name fits no modality or label."""
    stem = rename(strip_extension(path.name))
    relative = "" if path == root else (path.relative_to(root).parent / stem).as_posix()
    for naming in namings:
        if identity := naming.identify(relative or stem):
            return _File(path, *identity, naming)
    return None


def _is_taken(folder: Path, root: Path, namings: Sequence[Naming]) -> bool:
    """Whether a folder is called like a modality, and like a file, which it ought not to be then, or is its series."""
    if _identify(folder, root, namings) is None:
        return False
    return bool(_IMAGE.search(folder.name)) or _is_series(folder)


def _is_series(folder: Path) -> bool:
    """Whether a folder holds files, none of them an image of another format."""
    if folder.is_symlink():
        return False
    content = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return bool(content) and all(path.is_file() and not _IMAGE.search(path.name) for path in content)


def _paths(case: str, files: Sequence[_File], *, labels_apart: bool) -> dict[str, str]:
    """Path of each key of a case, after a check that the files fit together."""
    together = [file for file in files if "/" not in file.pattern and not (labels_apart and file.key == "label")]
    folders = sorted({str(file.path.parent) for file in together})
    if len(folders) > 1:
        raise ValueError(
            f"Case {case!r} lies in {len(folders)} folders, {', '.join(folders)}; keep one or change root."
        )
    if len({id(file.naming) for file in files}) > 1:
        names = sorted(file.path.name for file in files)
        raise ValueError(f"Case {case!r} mixes the namings of different years in {folders[0]}: {', '.join(names)}.")
    paths: dict[str, str] = {}
    for file in _first_choice(files):
        if file.key in paths:
            raise ValueError(
                f"Case {case!r} has two files for {file.key}, {paths[file.key]} and {file.path}; remove one."
            )
        _check_file(case, file.path)
        paths[file.key] = str(file.path)
    if paths.keys() == {"label"}:
        raise ValueError(f"Case {case!r} has a label but no image, only {paths['label']}; move it out of root.")
    if IMAGE_KEY in paths:
        whole = paths.pop(IMAGE_KEY)
        paths |= {name: volume_name(whole, index) for index, name in enumerate(files[0].naming.volumes)}
    return paths


def _first_choice(files: Sequence[_File]) -> list[_File]:
    """The files without those that only stand in for others that are there."""
    found = {file.key for file in files if file.pattern not in file.naming.second_choice}
    return [file for file in files if file.pattern not in file.naming.second_choice or file.key not in found]


def _check_file(case: str, path: Path) -> None:
    # Not exists(): reading a pipe would wait for ever.
    if not (path.is_file() or path.is_dir()):
        raise ValueError(f"Case {case!r}: {path} is a broken link or no file; restore or remove it.")
    if path.is_dir() and _IMAGE.search(path.name):
        raise ValueError(f"Case {case!r}: {path} is a folder, not a file; move the file in it to its place.")
