"""The cases of a workflow: a user's folder or datalist, or otherwise the embedded phantom."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from passion_monai.datasets import discover, get_spec
from passion_monai.datasets.datalist import (
    UNLABELLED_SECTION,
    apply_presence,
    check_every_modality,
    datalist_presence,
    read_datalist,
    read_json,
    write_datalist,
)
from passion_monai.datasets.discovery import strip_extension
from passion_monai.datasets.splitting import split_cases
from passion_monai.files import split_volume
from passion_monai.presence import missing_rates as realised_missing_rates
from passion_monai.presence import read_presence, simulate_presence
from passion_monai.transforms import LoadCased

__all__ = ["inference_cases", "prepare_datalist", "single_case", "training_cases", "validation_cases"]

logger = logging.getLogger(__name__)

Case = dict[str, Any]


def prepare_datalist(
    dataset: str,
    *,
    dataset_dir: str | None,
    datalist: str | None,
    output_dir: str,
    phantom: Mapping[str, Any],
    seed: int,
) -> str:
    """Path of the datalist to use, which is written if there is none.

    A `datalist` that is given is used as it is. Otherwise the cases of `dataset_dir`, or of a phantom written to
    ``<output_dir>/phantom`` when that is None, are split and written to ``<output_dir>/datalist.json``. A datalist that
    is already there is used again, so that training and evaluation share one split even if the folder grows.

    Args:
        dataset: name of the data set's layout, see :func:`passion_monai.datasets.get_spec`.
        dataset_dir: folder of the cases.
        datalist: path of a datalist.
        output_dir: folder of the run.
        phantom: arguments of :func:`passion_monai.datasets.phantom.write_phantom` but name and folder.
        seed: of the split.

    Raises:
        ValueError: when the datalist of the run was made from another folder.
    """
    if datalist is not None:
        return datalist
    path = Path(output_dir) / "datalist.json"
    root = Path(dataset_dir).expanduser() if dataset_dir is not None else _phantom(dataset, output_dir, phantom)
    if path.is_file():
        _check_root(path, root)
        discover(dataset, root, keep_faulty=True)  # for what it says of images that it does not know
        return str(path)
    spec = get_spec(dataset)
    splits = split_cases(discover(dataset, root), sizes=spec.reference_split, seed=seed)
    write_datalist(path, splits, spec=spec, root=root)
    sizes = ", ".join(f"{len(cases)} {section}" for section, cases in splits.items())
    logger.info(f"Cases of {root} split into {sizes}: {path}")
    return str(path)


def training_cases(
    datalist: str,
    *,
    dataset: str,
    modalities: Sequence[str],
    root: str | None = None,
    missing_rates: Sequence[float] | None = None,
    presence_file: str | None = None,
    slices: bool = False,
    seed: int = 0,
) -> list[Case]:
    """The training cases, each with its row of the presence matrix where missing modalities are simulated.

    With `slices` each slice of a case is a separate sample, with its number under the key ``slice``; a modality that
    the patient lacks is missing in all slices.

    Args:
        datalist: path of the datalist.
        dataset: name of the data set's layout.
        modalities: names of the M modalities.
        root: folder that the datalist's paths are relative to, where it is no longer the one in the file.
        missing_rates: rate in [0, 1) per modality to simulate on complete cases; None to use all modalities.
        presence_file: JSON or CSV file with the presence of each case, instead of `missing_rates`.
        slices: whether to train on slices, along the last axis of the files, instead of volumes.
        seed: of the simulation.

    Raises:
        ValueError: when both are given, rates cannot be met, a case is not in the file, or no case has a modality.
    """
    cases = read_datalist(datalist, "training", modalities=modalities, root=root)
    check_every_modality(cases, modalities, source=datalist)
    if missing_rates is not None and presence_file is not None:
        raise ValueError("Give missing_rates or presence_file, not both.")
    if missing_rates is not None:
        cases = _simulate(cases, missing_rates, modalities, seed)
    elif presence_file is not None:
        spec = get_spec(dataset)
        rows = read_presence(
            presence_file, modalities, csv_modalities=spec.csv_modalities, csv_prefixes=spec.csv_prefixes
        )
        unknown = [case["case"] for case in cases if case["case"] not in rows]
        if unknown:
            raise ValueError(
                f"{presence_file} has no row for the training cases {unknown[:5]} ({len(unknown)} in all)."
            )
        cases = apply_presence(cases, [rows[case["case"]] for case in cases], modalities)
        check_every_modality(cases, modalities, source=presence_file)
    presence = datalist_presence(cases, modalities)
    rates = ", ".join(
        f"{name} {rate:.3f}" for name, rate in zip(modalities, realised_missing_rates(presence), strict=True)
    )
    logger.info(f"{len(cases)} training cases, missing rates: {rates}")
    return _expand_slices(cases, modalities) if slices else cases


def validation_cases(
    datalist: str, *, modalities: Sequence[str], root: str | None = None, count: int | None = None
) -> list[Case]:
    """The validation cases; none if the datalist's split has none, as for MyoPS. Training then skips validation.

    Args:
        datalist: path of the datalist.
        modalities: names of the M modalities.
        root: folder that the datalist's paths are relative to, where it is no longer the one in the file.
        count: how many of them, the first in the datalist; None for all.
    """
    if not read_json(datalist).get("validation"):
        logger.warning(f"{datalist} has no validation cases: the weights of the last epoch are kept, not the best.")
        return []
    return read_datalist(datalist, "validation", modalities=modalities, root=root)[:count]


def inference_cases(
    dataset: str,
    *,
    dataset_dir: str | None,
    files: Mapping[str, str] | None,
    output_dir: str,
    modalities: Sequence[str],
    phantom: Mapping[str, Any],
    missing_rates: Sequence[float] | None,
    seed: int,
    datalist: str | None = None,
    section: str = UNLABELLED_SECTION,
) -> list[Case]:
    """The cases to segment: one given by its files, those of a datalist or folder, or phantoms that lack modalities.

    Args:
        dataset: name of the data set's layout.
        dataset_dir: folder of the cases, or that a datalist's paths are relative to; None for phantoms.
        files: path per modality of a single case, and optionally its name as ``case``.
        output_dir: folder of the run.
        modalities: names of the M modalities.
        phantom: see :func:`prepare_datalist`.
        missing_rates: rates to simulate on the phantoms; None for complete ones. Real cases keep all modalities.
        seed: of the simulation.
        datalist: path of a datalist.
        section: which of its cases.

    Raises:
        ValueError: when `files` names something else than modalities, or both `files` and a datalist are given.
    """
    if files is not None and datalist is not None:
        raise ValueError("Give files or datalist, not both.")
    if files is not None:
        return [single_case(files, modalities)]
    if datalist is not None:
        return _without_labels(read_datalist(datalist, section, modalities=modalities, root=dataset_dir))
    if dataset_dir is not None:
        return _without_labels(discover(dataset, dataset_dir, keep_faulty=True))
    cases = _without_labels(discover(dataset, _phantom(dataset, output_dir, phantom)))
    return cases if missing_rates is None else _simulate(cases, missing_rates, modalities, seed)


def _simulate(cases: Sequence[Case], rates: Sequence[float], modalities: Sequence[str], seed: int) -> list[Case]:
    """The cases with rows of a presence matrix that is drawn for them."""
    if not isinstance(rates, (list, tuple)) or len(rates) != len(modalities):
        raise ValueError(
            f"missing_rates must be a list of one rate for each of {list(modalities)}, got {rates!r}. For a cohort "
            "that really lacks sequences, use --simulate_missing False instead."
        )
    return apply_presence(cases, simulate_presence(len(cases), rates, seed=seed), modalities)


def _expand_slices(cases: Sequence[Case], modalities: Sequence[str]) -> list[Case]:
    """One sample per slice, counted in the first modality that a case has, on whose grid the others are brought."""
    load = LoadCased(modalities)
    samples = []
    for case in cases:
        first = modalities[int(datalist_presence([case], modalities)[0].argmax())]
        try:
            slices = load({"case": case["case"], first: case[first]})[first].shape[-1]
        except ValueError:
            slices = 1  # which will fail in the same way, beside all other cases that do
        samples += [{**case, "slice": index} for index in range(slices)]
    logger.info(f"They have {len(samples)} slices.")
    return samples


def _without_labels(cases: Sequence[Case]) -> list[Case]:
    """Inference needs no labels, and must not fail for a broken one."""
    return [{key: value for key, value in case.items() if key != "label"} for case in cases]


def _phantom(dataset: str, output_dir: str, phantom: Mapping[str, Any]) -> Path:
    folder = Path(output_dir) / "phantom"
    logger.warning(
        f"No dataset_dir is given: this runs on the PHANTOM cohort in {folder}, which is not patients' data."
    )
    # Here, since no other case needs what phantoms are made with.
    from passion_monai.datasets.phantom import write_phantom

    write_phantom(dataset, folder, **phantom)
    return folder


def _check_root(datalist: Path, root: Path) -> None:
    made_from = Path(str(read_json(datalist).get("root")))
    if made_from != root.resolve():
        raise ValueError(
            f"{datalist} was made from {made_from}, but the cases are now in {root.resolve()}; give another "
            "output_dir, or that file as datalist, or delete it to split anew."
        )


def single_case(files: Mapping[str, str], modalities: Sequence[str]) -> Case:
    """The case of a patient given by the path of each modality and, optionally, a name as ``case``.

    Raises:
        ValueError: when `files` names something else, or the name is none for a file.
    """
    unknown = sorted(map(str, set(files) - {*modalities, "case"})) if isinstance(files, Mapping) else []
    if unknown:
        raise ValueError(f"files: unknown key {unknown[0]!r}; the keys are {[*modalities, 'case']}, case is the name.")
    if not isinstance(files, Mapping) or not set(files) & set(modalities):
        raise ValueError(f"files must give a path for one or more of {list(modalities)}, got {files!r}.")
    first = next(Path(files[name]) for name in modalities if name in files)
    case = {"case": strip_extension(split_volume(first)[0].name), **files}
    if not isinstance(case["case"], str) or case["case"] != Path(case["case"]).name:
        raise ValueError(
            f"files: 'case' names the files to write and must be a name without folders, got {case['case']!r}."
        )
    return case
