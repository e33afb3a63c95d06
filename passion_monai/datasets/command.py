"""The command line by which a data set's cases are found, split and written to a datalist."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from passion_monai.datasets import DATASETS, DatasetSpec, get_spec
from passion_monai.datasets.datalist import SECTIONS, modality_counts, write_datalist
from passion_monai.datasets.splitting import fold_cases, split_cases

__all__ = ["datalist_command", "datalist_parser"]

Case = dict[str, Any]


def datalist_parser(name: str, *, sizes: Sequence[int], description: str, epilog: str) -> argparse.ArgumentParser:
    """The arguments that all data sets have.

    Args:
        name: of the module that is run.
        sizes: proportions of the split, unless others are given.
        description: what is found, for ``--help``.
        epilog: examples, for ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m passion_monai.datasets.{name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, required=True, help="folder that is searched, with all its subfolders")
    parser.add_argument("--output", type=Path, required=True, help="datalist to write (.json)")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs=len(SECTIONS),
        default=sizes,
        metavar=("TRAINING", "VALIDATION", "TEST"),
        help="proportions of the drawn split, counted in patients (default: %(default)s)",
    )
    parser.add_argument(
        "--fold",
        type=int,
        nargs=2,
        metavar=("FOLD", "FOLDS"),
        help="instead of --sizes: one fold of a cross-validation, counted from 0; its patients are the test section, "
        "all others are trained on",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawn split (default: %(default)s)")
    for section in SECTIONS:
        parser.add_argument(
            f"--{section}-ids",
            type=Path,
            metavar="FILE",
            help=f"text file with the {section} cases, one id a line, instead of drawing",
        )
    return parser


def datalist_command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    *,
    find: Callable[[argparse.Namespace], tuple[DatasetSpec, list[Case]]],
) -> None:
    """Find the cases below a folder, split them, write the datalist, and say how to go on.

    Args:
        parser: what :func:`datalist_parser` gives, and arguments of `find`.
        argv: the arguments; those of the process if None.
        find: finds the cases, and says what they are of.
    """
    arguments = parser.parse_args(argv)
    lists = {section: getattr(arguments, f"{section}_ids") for section in SECTIONS}
    try:
        ids = {section: _read_ids(path) for section, path in lists.items() if path is not None}
        spec, cases = find(arguments)
        if arguments.fold is None:
            splits = split_cases(cases, sizes=arguments.sizes, seed=arguments.seed, ids=ids or None)
        else:
            fold, folds = arguments.fold
            splits = fold_cases(cases, fold=fold, folds=folds, seed=arguments.seed)
        write_datalist(arguments.output, splits, spec=spec, root=arguments.root)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(_summary(cases, splits, spec))
    print(f"Wrote {arguments.output}")
    print(_next_step(splits, spec, arguments.output))


def _read_ids(path: Path) -> list[str]:
    ids = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not ids:
        raise ValueError(f"{path} holds no case id, expected one a line.")
    return ids


def _summary(cases: Sequence[Case], splits: Mapping[str, Sequence[Case]], spec: DatasetSpec) -> str:
    """What was found and where it went, to be printed."""
    counts = {**modality_counts(cases, spec.modalities), "label": sum("label" in case for case in cases)}
    unused = len(cases) - sum(map(len, splits.values()))
    parts = {**{section: len(members) for section, members in splits.items()}, **({"unused": unused} if unused else {})}
    return "\n".join(
        [
            f"Found {len(cases)} cases of {len({case['patient'] for case in cases})} patients",
            *(f"  with {name}: {count}" for name, count in counts.items()),
            "Split into " + ", ".join(f"{name} {count}" for name, count in parts.items()),
        ]
    )


def _next_step(splits: Mapping[str, Sequence[Case]], spec: DatasetSpec, datalist: Path) -> str:
    """The command that trains on the datalist, or segments the cases of one without labels."""
    known = spec.name if spec.name in DATASETS else "brats"
    configs = f"bundles/{known}_mmformer_passion/configs"
    training = splits["training"]
    if not training:
        return (
            "No case to train on. Segment them by\n"
            f"python -m monai.bundle run --config_file {configs}/inference.yaml \\\n"
            f"    --datalist {_quoted(datalist)} --ckpt_path runs/first/models/model.pt --output_dir results"
        )
    counts = modality_counts(training, spec.modalities)
    modalities = [name for name, count in counts.items() if count]
    ids = "".join(f" \\\n    --{name} {_quoted(value)}" for name, value in _own_ids(spec, modalities, get_spec(known)))
    # Complete cases of a known data set may have sequences hidden, as in the paper.
    whole = spec.name == known and min(counts.values()) == len(training)
    return (
        "Train on it with this command; with `check` in place of `training`, it only reads and checks all files:\n"
        f"python -m monai.bundle run training --config_file {configs}/train.yaml \\\n"
        f"    --datalist {_quoted(datalist)} --output_dir {_quoted(f'runs/{datalist.stem}')}"
        f"{'' if whole else ' --simulate_missing False'}{ids}"
    )


def _own_ids(spec: DatasetSpec, modalities: Sequence[str], known: DatasetSpec) -> Iterable[tuple[str, Any]]:
    """What the bundle has to be told, since it is not as in the data set that the bundle is for."""
    if list(modalities) != list(known.modalities):
        yield "modalities", list(modalities)
    for name in ("label_values", "class_names"):
        if getattr(spec, name) != getattr(known, name):
            yield name, list(getattr(spec, name))
    if spec.regions != known.regions:
        yield "regions", {region: list(classes) for region, classes in spec.regions.items()}


def _quoted(value: object) -> str:
    """One word of a shell's command, in double quotes where it needs any."""
    text = str(value)
    if not set(text) & set(" '\"$`\\[]{}()&;|<>*?!#~"):
        return text
    return '"' + "".join(f"\\{letter}" if letter in '"$`\\' else letter for letter in text) + '"'
