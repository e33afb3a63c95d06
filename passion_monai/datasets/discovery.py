"""Finding the cases of a data set by the names of its files, for all data sets alike.

A file is called ``<case><separator><suffix>.nii[.gz]``, or has the extension of another format that is read; a modality
may also be the folder of a DICOM series, called ``<case><separator><suffix>``. An extension may be in capitals. Images
that are called otherwise are never left out in silence: one of them may be the modality that seems to be missing.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passion_monai.faults import FAULT_KEY, Fault, raise_faults

__all__ = ["Naming", "discover_cases", "strip_extension"]

logger = logging.getLogger(__name__)

EXTENSIONS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
_IMAGE = re.compile("|".join(f"{re.escape(extension)}$" for extension in EXTENSIONS), re.IGNORECASE)
_DICOM = re.compile(r"\.(dcm|ima)$", re.IGNORECASE)
# How the name of an image ends that people derive from others, and that is no modality called differently.
_DERIVED = re.compile(r"(mask|seg|label|lesion|roi|pred|prob)[a-z]*\d*$", re.IGNORECASE)
_SHOWN = 5  # of the files that a message lists


def strip_extension(name: str) -> str:
    """The name of an image file without the extension of its format."""
    return _IMAGE.sub("", name)


@dataclass(frozen=True)
class Naming:
    """One way in which a data set's files are called.

    Args:
        separator: what stands between case and suffix.
        keys: for each suffix the modality, or ``label``.
        label_values: the value of each class in label files of this kind.
    """

    separator: str
    keys: Mapping[str, str]
    label_values: tuple[int, ...]

    def identify(self, stem: str) -> tuple[str, str] | None:
        """Case and key of a file name without its extension; None if it is called otherwise."""
        case, separator, suffix = stem.rpartition(self.separator)
        return (case, self.keys[suffix]) if case and separator and suffix in self.keys else None


@dataclass(frozen=True)
class _File:
    """A file whose name says what it is."""

    path: Path
    case: str
    key: str
    naming: Naming


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

    Hidden files and folders are left out; linked folders are not followed, which is logged, as are images that are
    called like no modality.

    Args:
        root: the folder that is searched.
        namings: the ways in which the data set's files are called.
        title: the data set's name, for messages.
        modalities: names of the M modalities, in their order.
        patient: whom a case shows, by its id.
        rename: the name, without extension, under which a file counts, for files that were released misnamed.
        labels_apart: whether a case's label may lie in another folder than its images.
        keep_faulty: keep cases whose files contradict each other, with the reason under the key ``fault`` and without
            files, instead of an error.

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
        stem = rename(strip_extension(path.name))
        for naming in namings:
            identity = naming.identify(stem)
            if identity is not None:
                found.setdefault(identity[0], []).append(_File(path, *identity, naming))
                break
        else:
            unknown.append(path)
    if not found:
        names = [f"*{naming.separator}{suffix}.nii[.gz]" for naming in namings for suffix in naming.keys]
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
    """Say which images are called like no modality; an error where they may be one that seems to be missing."""
    if not unknown:
        return
    names = "; ".join(
        ", ".join(f"{naming.separator}{suffix} ({key})" for suffix, key in naming.keys.items()) for naming in namings
    )
    remedy = (
        f"Names end in {names}, where capitals count. Rename the images that are one of these, or say which "
        "file is what in a datalist (datalist of a bundle; files for a single patient)"
    )
    folders = {file.path.parent for file in known}
    doubtful = [path for path in unknown if path.parent in folders and not _DERIVED.search(strip_extension(path.name))]
    absent = [name for name in modalities if name not in {file.key for file in known}]
    if doubtful and absent:
        raise ValueError(
            f"No case below {root} has {', '.join(absent)}, but there are {_first(doubtful, root)}, which are called "
            f"like no modality. {remedy}; and move those that are none out of the folder."
        )
    logger.warning(
        "Not used: below %s there are %s, which are called like no modality. %s; where they are none, such as masks, "
        "all is well.",
        root,
        _first(unknown, root),
        remedy,
    )


def _first(paths: Sequence[Path], root: Path) -> str:
    """How many images there are, and the first few of them."""
    shown = ", ".join(str(path.relative_to(root)) for path in paths[:_SHOWN])
    return f"{len(paths)} other image(s)" + (f": {shown}" if paths else "") + ", ..." * (len(paths) > _SHOWN)


def _walk(root: Path, namings: Sequence[Naming]) -> Iterator[Path]:
    """All image files below ``root``, and folders of DICOM files or called like an image, in a stable order."""
    for folder, subfolders, names in os.walk(root, onerror=lambda error: logger.warning("Left out: %s", error)):
        visible = sorted(name for name in subfolders if not name.startswith("."))
        for name in visible:
            if (Path(folder) / name).is_symlink():
                logger.warning("Left out: %s is a link, links to folders are not followed.", Path(folder) / name)
        taken = [name for name in visible if _is_image(name, namings) or _is_series(Path(folder) / name, namings)]
        subfolders[:] = [name for name in visible if name not in taken]
        files = sorted(name for name in names if not name.startswith(".") and _IMAGE.search(name))
        yield from (Path(folder) / name for name in [*taken, *files])
        if any(_DICOM.search(name) for name in names) and not _identify(Path(folder).name, namings):
            yield Path(folder)


def _is_image(name: str, namings: Sequence[Naming]) -> bool:
    """Whether something, which ought to be no folder then, is called like the image of a modality."""
    return bool(_IMAGE.search(name)) and _identify(strip_extension(name), namings)


def _identify(stem: str, namings: Sequence[Naming]) -> bool:
    """Whether a name without extension is that of a modality or label."""
    return any(naming.identify(stem) for naming in namings)


def _is_series(folder: Path, namings: Sequence[Naming]) -> bool:
    """Whether a folder is called like a modality and holds files, none of them an image of another format."""
    if folder.is_symlink() or not _identify(folder.name, namings):
        return False
    content = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return bool(content) and all(path.is_file() and not _IMAGE.search(path.name) for path in content)


def _paths(case: str, files: Sequence[_File], *, labels_apart: bool) -> dict[str, str]:
    """Path of each key of a case, after a check that the files fit together."""
    together = [file for file in files if not (labels_apart and file.key == "label")]
    folders = sorted({str(file.path.parent) for file in together})
    if len(folders) > 1:
        raise ValueError(
            f"Case {case!r} lies in {len(folders)} folders, {', '.join(folders)}; keep one or change root."
        )
    if len({file.naming.separator for file in files}) > 1:
        names = sorted(file.path.name for file in files)
        raise ValueError(f"Case {case!r} mixes the namings of different years in {folders[0]}: {', '.join(names)}.")
    paths: dict[str, str] = {}
    for file in files:
        if file.key in paths:
            raise ValueError(
                f"Case {case!r} has two files for {file.key}, {paths[file.key]} and {file.path}; remove one."
            )
        # Not exists(): reading a pipe would wait for ever.
        if not (file.path.is_file() or file.path.is_dir()):
            raise ValueError(f"Case {case!r}: {file.path} is a broken link or no file; restore or remove it.")
        if file.path.is_dir() and _IMAGE.search(file.path.name):
            raise ValueError(f"Case {case!r}: {file.path} is a folder, not a file; move the file in it to its place.")
        paths[file.key] = str(file.path)
    if paths.keys() == {"label"}:
        raise ValueError(f"Case {case!r} has a label but no image, only {paths['label']}; move it out of root.")
    return paths
