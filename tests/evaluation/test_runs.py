from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from passion_monai.evaluation.runs import write_run
from passion_monai.presence import read_presence

MODALITIES = ("flair", "t1")


@pytest.mark.parametrize("slices", [1, 3])
def test_write_run_says_what_the_run_was_and_what_each_case_had(tmp_path: Path, slices: int) -> None:
    cases = [
        {"case": "001", "flair": "a", "t1": "b", "presence": [False, True]},
        {"case": "002", "flair": "a"},
    ]
    samples = [{**case, "slice": index} for case in cases for index in range(slices)]
    settings = {"seed": 3, "regions": {"whole": (1, 2)}, "missing_rates": None}
    for _ in range(2):  # as a resumed training does
        write_run(tmp_path, bundle="/some/where/my_bundle/", cases=samples, modalities=MODALITIES, settings=settings)
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record == {
        "bundle": "my_bundle",
        "modalities": ["flair", "t1"],
        "seed": 3,
        "regions": {"whole": [1, 2]},
        "missing_rates": None,
    }
    rows = read_presence(tmp_path / "presence.json", MODALITIES)
    assert list(rows) == ["001", "002"]
    np.testing.assert_array_equal(list(rows.values()), [[False, True], [True, False]])
