"""Finding the cases of a data set by the names of its files, for all data sets alike.

A file is called ``<case><separator><suffix>.nii[.gz]``, or has the extension of another format that is read; a modality
may also be the folder of a DICOM series, called ``<case><separator><suffix>``.
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
_IMAGE = re.compile("|".join(f"{re.escape(extension)}$" for extension in EXTENSIONS))


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

    Hidden files and folders are left out; linked folders are not followed, which is logged.

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
            named in two ways, have a label only, a broken link, a pipe or a folder called like an image.
    """
    root = Path(root).expanduser().absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"root {root} is not a folder; pass the folder that holds the {title} cases.")
    found: dict[str, list[_File]] = {}
    for path in _walk(root, namings):
        stem = rename(strip_extension(path.name))
        for naming in namings:
            identity = naming.identify(stem)
            if identity is not None:
                found.setdefault(identity[0], []).append(_File(path, *identity, naming))
                break
    if not found:
        names = [f"*{naming.separator}{suffix}.nii[.gz]" for naming in namings for suffix in naming.keys]
        raise FileNotFoundError(
            f"root {root} holds no {title} case; looked for files named {', '.join(dict.fromkeys(names))}, for "
            f"{', '.join(EXTENSIONS[2:])}, and for folders of a DICOM series."
        )
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


def _walk(root: Path, namings: Sequence[Naming]) -> Iterator[Path]:
    """All image files below ``root``, and folders of a DICOM series or called like an image, in a stable order."""
    for folder, subfolders, names in os.walk(root, onerror=lambda error: logger.warning("Left out: %s", error)):
        visible = sorted(name for name in subfolders if not name.startswith("."))
        for name in visible:
            if (Path(folder) / name).is_symlink():
                logger.warning("Left out: %s is a link, links to folders are not followed.", Path(folder) / name)
        taken = [name for name in visible if _is_image(name, namings) or _is_series(Path(folder) / name, namings)]
        subfolders[:] = [name for name in visible if name not in taken]
        files = sorted(name for name in names if not name.startswith(".") and _IMAGE.search(name))
        yield from (Path(folder) / name for name in [*taken, *files])


def _is_image(name: str, namings: Sequence[Naming]) -> bool:
    """Whether something, which ought to be no folder then, is called like the image of a modality."""
    return bool(_IMAGE.search(name)) and any(naming.identify(strip_extension(name)) for naming in namings)


def _is_series(folder: Path, namings: Sequence[Naming]) -> bool:
    """Whether a folder is called like a modality and holds files, none of them an image of another format."""
    if folder.is_symlink() or not any(naming.identify(folder.name) for naming in namings):
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
