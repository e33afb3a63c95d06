"""Splits cases into training, validation and test: at random, by lists of ids, or as folds of a cross-validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from passion_monai.datasets.datalist import SECTIONS, UNLABELLED_SECTION

__all__ = ["fold_cases", "split_cases"]

Case = dict[str, Any]


def split_cases(
    cases: Sequence[Case], *, sizes: Sequence[int], seed: int, ids: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[Case]]:
    """Split cases into training, validation and test, keeping all cases of a patient together.

    Without ``ids``, patients are drawn at random in the proportions of ``sizes`` (largest remainder; no section is
    empty if there are enough patients). The result depends on the patients and the seed, not on the order of
    ``cases``.

    Args:
        cases: the output of ``discover``.
        sizes: three numbers, the proportions of training, validation and test patients.
        seed: seed of the random split.
        ids: case ids of each section, instead of a random split. Sections may be missing; cases in no section are
            left out.

    Returns:
        Cases by section, ordered by id. Cases without a label, if there are any, are in another section,
        ``inference``.

    Raises:
        ValueError: ``sizes`` is invalid, or ``ids`` names an unknown section, an unknown or unlabelled case, a case
            twice, or a patient in two sections.
    """
    ordered = sorted(cases, key=lambda case: str(case["case"]))
    labelled = [case for case in ordered if "label" in case]
    section_of = _drawn_sections(labelled, sizes, seed) if ids is None else _listed_sections(labelled, ids)
    splits = {name: [case for case in labelled if section_of.get(case["case"]) == name] for name in SECTIONS}
    unlabelled = [case for case in ordered if "label" not in case]
    return {**splits, UNLABELLED_SECTION: unlabelled} if unlabelled else splits


def fold_cases(cases: Sequence[Case], *, fold: int, folds: int, seed: int) -> dict[str, list[Case]]:
    """One fold of a cross-validation: its cases are the test section, all others the training section.

    Args:
        cases: the output of ``discover``; cases without a label are left out.
        fold: 0 to folds - 1.
        folds: number K of folds. Their numbers of patients differ by at most one; each patient is tested once.
        seed: seed of the random split; use the same for all folds.

    Returns:
        Cases by section, ordered by id; the validation section is empty.

    Raises:
        ValueError: there is no such fold, or there are fewer patients than folds.
    """
    labelled = sorted((case for case in cases if "label" in case), key=lambda case: str(case["case"]))
    patients = sorted({case["patient"] for case in labelled})
    if not 2 <= folds <= len(patients) or not 0 <= fold < folds:
        raise ValueError(
            f"fold must be 0 to {folds - 1} of 2 to {len(patients)} folds, as many as there are patients with a label, "
            f"got fold {fold} of {folds}."
        )
    tested = set(np.array_split(np.random.default_rng(seed).permutation(patients), folds)[fold])
    test = [case for case in labelled if case["patient"] in tested]
    return {"training": [case for case in labelled if case not in test], "validation": [], "test": test}


def _drawn_sections(cases: Sequence[Case], sizes: Sequence[int], seed: int) -> dict[str, str]:
    """Section of each case id, drawn at random by patient."""
    patients = sorted({case["patient"] for case in cases})
    counts = _proportional_counts(len(patients), sizes)
    sections = [name for name, count in zip(SECTIONS, counts, strict=True) for _ in range(count)]
    order = np.random.default_rng(seed).permutation(len(patients))
    section_of = {patients[index]: section for index, section in zip(order, sections, strict=True)}
    return {case["case"]: section_of[case["patient"]] for case in cases}


def _proportional_counts(total: int, sizes: Sequence[int]) -> list[int]:
    """Integers in the proportions of ``sizes`` that add up to ``total``, by the largest remainder."""
    if len(sizes) != len(SECTIONS) or min(sizes) < 0 or sum(sizes) == 0:
        raise ValueError(f"sizes must be three numbers >= 0 for {list(SECTIONS)}, not all 0, got {list(sizes)}.")
    counts = [total * size // sum(sizes) for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda part: -(total * sizes[part] % sum(sizes)))
    for part in by_remainder[: total - sum(counts)]:
        counts[part] += 1
    for part, size in enumerate(sizes):
        if size > 0 and counts[part] == 0 and max(counts) > 1:
            counts[counts.index(max(counts))] -= 1
            counts[part] = 1
    return counts


def _listed_sections(cases: Sequence[Case], ids: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Section of each case id in the given lists."""
    patient_of = {case["case"]: case["patient"] for case in cases}
    section_of: dict[str, str] = {}
    section_of_patient: dict[str, str] = {}
    for section, names in ids.items():
        if section not in SECTIONS:
            raise ValueError(f"ids is for the sections {list(SECTIONS)}, got {section!r}.")
        unknown = [name for name in names if name not in patient_of]
        if unknown:
            raise ValueError(
                f"ids[{section!r}] names {len(unknown)} of {len(names)} cases that were not found or have no label, "
                f"the first is {unknown[0]!r}; ids look like {next(iter(patient_of), None)!r}."
            )
        for name in names:
            if name in section_of:
                raise ValueError(f"ids names case {name!r} twice, in {section_of[name]!r} and in {section!r}.")
            section_of[name] = section
            other = section_of_patient.setdefault(patient_of[name], section)
            if other != section:
                raise ValueError(f"ids puts patient {patient_of[name]!r} into two sections, {other!r} and {section!r}.")
    return section_of
