"""What `check` says of cases that can all be read; tests/bundles/test_faults.py has those that cannot."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from passion_monai.datasets import discover, get_spec
from passion_monai.datasets.check import check_dataset
from passion_monai.datasets.datalist import write_datalist
from passion_monai.datasets.phantom import write_phantom
from passion_monai.transforms import LoadCased


@pytest.mark.parametrize(("hidden", "sequences"), [(("t2",), "t2"), (("t1", "t2"), "t1, t2"), ((), None)])
def test_sequences_that_no_validation_case_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, hidden: tuple[str, ...], sequences: str | None
) -> None:
    spec = get_spec("brats")
    write_phantom("brats", tmp_path, num_cases=3, shape=(16, 16, 16), spacing=(9.0, 9.0, 9.0))
    complete, also_complete, other = discover("brats", tmp_path)
    validation = {name: value for name, value in other.items() if name not in hidden}
    path, sections = tmp_path / "datalist.json", {"training": [complete, also_complete], "validation": [validation]}
    write_datalist(path, sections, spec=spec, root=tmp_path)
    with caplog.at_level(logging.INFO):
        check_dataset(path, modalities=spec.modalities, transform=LoadCased(keys=spec.modalities))
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    said = f"No validation case has {sequences}: the best weights are chosen without them."
    assert warnings == ([said] if hidden else [])
    assert "All 3 cases can be used." in caplog.messages
