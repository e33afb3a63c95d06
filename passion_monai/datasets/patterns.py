"""The layouts that people have, as tables of names, and any other one by patterns given on the command line.

- nnU-Net's raw format and the Medical Segmentation Decathlon, whose ``dataset.json`` names modalities and classes;
- BIDS, raw or derivatives;
- UCSF-PDGM and UPENN-GBM, as The Cancer Imaging Archive has them.

References:
    F. Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
    Nature Methods 18, 2021.
    M. Antonelli et al., "The Medical Segmentation Decathlon", Nature Communications 13, 2022.
    K. J. Gorgolewski et al., "The brain imaging data structure", Scientific Data 3, 2016.
    E. Calabrese et al., "The University of California San Francisco Preoperative Diffuse Glioma MRI Dataset",
    Radiology: Artificial Intelligence 4(6), 2022.
    S. Bakas et al., "The University of Pennsylvania glioblastoma (UPenn-GBM) cohort", Scientific Data 9, 2022.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from passion_monai.datasets import DatasetSpec
from passion_monai.datasets.brats import SPEC as BRATS
from passion_monai.datasets.command import datalist_command, datalist_parser
from passion_monai.datasets.datalist import check_modalities, read_json
from passion_monai.datasets.discovery import (
    EXTENSIONS,
    IMAGE_KEY,
    Naming,
    compile_pattern,
    discover_cases,
    strip_extension,
)
from passion_monai.transforms.loading import make_loader

__all__ = ["LAYOUTS", "find_cases", "main"]

Case = dict[str, Any]

_SIZES = (70, 10, 20)
_MOST_VALUES = 64  # of a label; more are those of an image
_BACKGROUND = "background"


@dataclass(frozen=True)
class Layout:
    """How a cohort's files are called, and what they hold.

    Args:
        title: for messages.
        naming: the table of names; without ``label_values`` these are read from the labels.
        spec: modalities and classes.
        patient: what of a case's id is the patient's, as a pattern with ``{patient}``; other ids are the patient's.
    """

    title: str
    naming: Naming
    spec: DatasetSpec
    patient: str = "{patient}"


def _layout(title: str, naming: Naming, patient: str = "{patient}", **changed: Any) -> Layout:
    """A layout, with the modalities and classes of BraTS but for what is changed."""
    spec = replace(
        BRATS, reference_split=_SIZES, csv_modalities=None, csv_prefixes=(), **{"name": "patterns"} | changed
    )
    return Layout(title, naming, spec, patient)


_BIDS = _layout(
    "BIDS",
    Naming(
        {
            "{case}*_FLAIR": "flair",
            "{case}*_ce-*_T1w": "t1ce",
            "{case}*_T1w": "t1",
            "{case}*_T2w": "t2",
            "{case}*_dseg": "label",
            "{case}*_label-*_mask": "label",
        },
        label_values=(),
        case="sub-[^_/]+(?:_ses-[^_/]+)?",
    ),
    "{patient}_ses-*",
    name="bids",
)
_UCSF_PDGM = _layout(
    "UCSF-PDGM",
    Naming(
        {
            "{case}_FLAIR": "flair",
            "{case}_T1c": "t1ce",
            "{case}_T1": "t1",
            "{case}_T2": "t2",
            "{case}_tumor_segmentation": "label",
        },
        BRATS.label_values,
        case=r"UCSF-PDGM-\d+(?:_FU\w+?)?",
    ),
    "{patient}_FU*",
    name="ucsf_pdgm",
)
_UPENN_GBM = _layout(
    "UPENN-GBM",
    Naming(
        {
            "{case}_FLAIR": "flair",
            "{case}_T1GD": "t1ce",
            "{case}_T1": "t1",
            "{case}_T2": "t2",
            "{case}_segm": "label",
            "{case}_automated_approx_segm": "label",
        },
        BRATS.label_values,
        case=r"UPENN-GBM-\d+_\d+",
        second_choice=("{case}_automated_approx_segm",),
    ),
    "{patient}_*",
    name="upenn_gbm",
)


def _nnunet(root: Path) -> Layout:
    """The raw format of nnU-Net, of either version: one file per channel, by its number."""
    classes = _described_classes(root)
    keys = {
        f"images{part}/{{case}}_{index:04d}": name
        for part in ("Tr", "Ts")
        for index, name in enumerate(classes["modalities"])
    } | {f"labels{part}/{{case}}": "label" for part in ("Tr", "Ts")}
    return _layout("nnU-Net", Naming(keys, classes["label_values"]), name="nnunet", **classes)


def _decathlon(root: Path) -> Layout:
    """The Decathlon's: one file per case, 4-D where there are several modalities."""
    classes = _described_classes(root)
    modalities = classes["modalities"]
    volumes = modalities if len(modalities) > 1 else ()
    keys = {f"images{part}/{{case}}": IMAGE_KEY if volumes else modalities[0] for part in ("Tr", "Ts")}
    naming = Naming(keys | {"labelsTr/{case}": "label"}, classes["label_values"], volumes=volumes)
    return _layout("Decathlon", naming, name="decathlon", **classes)


LAYOUTS: Mapping[str, Callable[[Path], Layout]] = {
    "bids": lambda _: _BIDS,
    "decathlon": _decathlon,
    "nnunet": _nnunet,
    "ucsf_pdgm": lambda _: _UCSF_PDGM,
    "upenn_gbm": lambda _: _UPENN_GBM,
}


def _described_classes(root: Path) -> dict[str, Any]:
    """Modalities and classes as ``dataset.json`` has them, under the names of :class:`DatasetSpec`."""
    path = root / "dataset.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; root is the folder that holds it, beside imagesTr.")
    content = read_json(path)
    ending = content.get("file_ending", EXTENSIONS[0])
    if ending not in EXTENSIONS:
        raise ValueError(
            f"{path}: file_ending {ending!r} is not read here, only {', '.join(EXTENSIONS)}; convert them."
        )
    channels = content.get("channel_names", content.get("modality"))
    labels = content.get("labels")
    if not isinstance(channels, dict) or not all(key.isdigit() for key in channels) or not isinstance(labels, dict):
        raise ValueError(
            f"{path} must have 'labels', and 'channel_names' or 'modality' with a name for each number, got {content}."
        )
    modalities = tuple(str(channels[key]) for key in sorted(channels, key=int))
    check_modalities(modalities)
    if all(key.isdigit() for key in labels):  # as the Decathlon and the first nnU-Net have them
        labels = {name: int(value) for value, name in labels.items()}
    return {"modalities": modalities, **_classes(labels, path)}


def _classes(labels: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Classes and regions, from the value of each name, or the values of one that is a region."""
    values = {name: value if isinstance(value, list) else [value] for name, value in labels.items()}
    known = sorted({value for members in values.values() for value in members}, key=str)
    if not all(type(value) is int for value in known) or 0 not in known or "ignore" in labels:
        raise ValueError(
            f"{where}: labels must be whole numbers, 0 for the background, got {dict(labels)}; a label to "
            "ignore is not supported: give it its own class."
        )
    ordered = sorted(known, key=lambda value: (value != 0, value))
    names = {members[0]: name for name, members in values.items() if len(members) == 1}
    regions = {name: tuple(map(ordered.index, members)) for name, members in values.items() if members != [0]}
    return {
        "label_values": tuple(ordered),
        "class_names": tuple(names.get(value, f"label {value}") for value in ordered),
        "regions": regions,
    }


def find_cases(
    root: Path,
    layout: str | None = None,
    *,
    modalities: Mapping[str, str] | None = None,
    label: str | None = None,
    patient: str | None = None,
    classes: Mapping[str, int] | None = None,
    without: Sequence[str] = (),
) -> tuple[DatasetSpec, list[Case]]:
    """Find the cases of a cohort by the names of a known layout, by patterns, or by both.

    Args:
        root: the folder.
        layout: one of `LAYOUTS`; None where patterns say all.
        modalities: the pattern of each modality that the layout does not have, or that is called otherwise.
        label: the pattern of the labels.
        patient: what of a case's id is the patient's, as a pattern with ``{patient}``.
        classes: the value of each class; by default the layout's, or what the labels hold.
        without: modalities of the layout to do without.

    Returns:
        What the cohort is of, and its cases, as :func:`passion_monai.datasets.discovery.discover_cases` finds them.

    Raises:
        FileNotFoundError: when ``root`` is no folder, or holds no case or no description that the layout needs.
        ValueError: when a pattern, a description or the files of a case make no sense.
    """
    if layout is None and not modalities:
        raise ValueError(f"Give --layout, one of {sorted(LAYOUTS)}, or a --modality NAME=PATTERN for each modality.")
    known = LAYOUTS[layout](root) if layout else _layout("such", Naming({}, ()), modalities=())
    changed = _with_patterns(_without(known, without), modalities or {}, label)
    if classes is not None:
        changed = _with_classes(changed, _classes({_BACKGROUND: 0, **classes}, "--classes"))
    check_modalities(changed.spec.modalities)
    naming, whom = changed.naming, compile_pattern(patient or changed.patient, patient="[^/]+")
    cases = discover_cases(
        root,
        [naming],
        title=changed.title,
        modalities=changed.spec.modalities,
        patient=lambda case: match["patient"] if (match := whom.fullmatch(case)) else case,
        labels_apart=True,
    )
    if not naming.label_values and any("label" in case for case in cases):
        changed = _with_classes(changed, _classes(_found_classes(cases), "the labels"))
    return changed.spec, [{**case, "label_values": list(changed.naming.label_values)} for case in cases]


def _without(layout: Layout, names: Sequence[str]) -> Layout:
    """The layout without some of its modalities."""
    there = layout.spec.modalities
    if not set(names) <= set(there) or (names and layout.naming.volumes):
        raise ValueError(
            f"--without takes modalities that the layout has in separate files, {list(there)}, got {names}."
        )
    keys = {pattern: key for pattern, key in layout.naming.keys.items() if key not in names}
    kept = tuple(name for name in there if name not in names)
    return replace(layout, naming=replace(layout.naming, keys=keys), spec=replace(layout.spec, modalities=kept))


def _with_patterns(layout: Layout, modalities: Mapping[str, str], label: str | None) -> Layout:
    """The layout with other patterns for these modalities and the label."""
    if modalities and layout.naming.volumes:
        raise ValueError("--modality does not apply to the volumes of 4-D files; dataset.json names them.")
    given = {**modalities, **({} if label is None else {"label": label})}
    kept = {pattern: key for pattern, key in layout.naming.keys.items() if key not in given}
    keys = kept | {_pattern(text): key for key, text in given.items()}
    if len(keys) < len(kept) + len(given):
        raise ValueError(f"Each modality and the label need a pattern of their own, got {given}.")
    names = tuple(dict.fromkeys([*layout.spec.modalities, *modalities]))
    return replace(layout, naming=replace(layout.naming, keys=keys), spec=replace(layout.spec, modalities=names))


def _with_classes(layout: Layout, classes: Mapping[str, Any]) -> Layout:
    naming = replace(layout.naming, label_values=classes["label_values"])
    return replace(layout, naming=naming, spec=replace(layout.spec, **classes))


def _pattern(text: str) -> str:
    """A pattern as users write it, with the extension of some format and perhaps no word on which part is the id."""
    pattern = strip_extension(text.removeprefix("./"))
    if "{case}" not in pattern and pattern.count("*") == 1:
        pattern = pattern.replace("*", "{case}")
    if pattern.count("{case}") != 1 or "**" in pattern:
        raise ValueError(
            f"The pattern {text!r} must say where the case's id stands: by its only *, or by {{case}} beside others. "
            "It fits at any depth below root, and needs no **."
        )
    return pattern


def _found_classes(cases: Sequence[Case]) -> dict[str, int]:
    """The values that the labels hold, each a class."""
    load, found = make_loader(), {0}
    for case in cases:
        if "label" not in case:
            continue
        try:
            values = np.unique(load(case["label"]).numpy())
        # Readers of several libraries stand behind this, each with errors of its own.
        except Exception as error:
            raise ValueError(f"Case {case['case']!r}: {case['label']} cannot be read ({error}); repair it.") from error
        found |= {round(float(value)) for value in values if np.isfinite(value)}
        if len(found) > _MOST_VALUES:
            raise ValueError(
                f"Case {case['case']!r}: {case['label']} holds more values than a label does; is it an image? Give "
                "another --label, or say which values there are by --classes."
            )
    return {_BACKGROUND if value == 0 else f"label {value}": value for value in sorted(found)}


_DESCRIPTION = """\
Find the cases of a cohort in whatever layout it has and write a datalist: a JSON file that says which
case has which files and whether it is for training, validation or test. The last lines printed are
the command that trains on it.

Every case may miss any of its modalities. All cases of a patient go into the same part. Cases without
a label go into the section "inference".
"""

_EPILOG = """\
examples:
  python -m passion_monai.datasets.patterns --layout nnunet --root nnUNet_raw/Dataset001_Brains --output ours.json
  python -m passion_monai.datasets.patterns --root /data/ours --output ours.json \\
      --modality flair='*_FLAIR.nii.gz' --modality t1='*_T1.nii.gz' --label '*_seg.nii.gz'

patterns:
  The * is the case's id. Where there are several, {case} is the id: 't1/{case}/*_T1.nii.gz'. A pattern fits at
  any depth below root, with the extension of any format that is read. Where several fit, the one with the most
  letters of its own holds.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Write a datalist from the command line; see ``python -m passion_monai.datasets.patterns --help``."""
    parser = datalist_parser("patterns", sizes=_SIZES, description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--layout", choices=sorted(LAYOUTS), help="a layout whose names are known")
    parser.add_argument(
        "--modality",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=PATTERN",
        help="what the files of a modality are called; once for each, in the order of the image channels",
    )
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="NAME", help="modalities of the layout to leave out"
    )
    parser.add_argument("--label", metavar="PATTERN", help="what the label files are called")
    parser.add_argument(
        "--patient",
        metavar="PATTERN",
        help="which part of a case's id is the patient's, where there are several scans of one: '{patient}_*'",
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        type=_assignment,
        metavar="NAME=VALUE",
        help="what the values of the labels stand for; by default those that the labels hold, without names",
    )
    datalist_command(parser, argv, find=_find)


def _find(arguments: argparse.Namespace) -> tuple[DatasetSpec, list[Case]]:
    classes = arguments.classes and {name: int(value) for name, value in arguments.classes}
    given = {"label": arguments.label, "patient": arguments.patient, "classes": classes}
    given["without"] = arguments.without
    return find_cases(arguments.root, arguments.layout, modalities=dict(arguments.modality), **given)


def _assignment(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not name or not sign or not value:
        raise argparse.ArgumentTypeError(f"expected NAME=..., got {text!r}")
    return name, value


if __name__ == "__main__":
    main()
