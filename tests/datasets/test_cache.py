from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, NormalizeIntensityd, RandScaleIntensityd
from monai.utils import set_determinism
from torch.utils.data import DataLoader

from passion_monai.datasets.cache import FileCacheDataset, _hash_case
from passion_monai.transforms import LoadCased

MODALITIES = ("x", "y")
AFFINE = np.diag([2.0, 1.0, 3.0, 1.0])


class CountLoads(MapTransform):
    """Counts in a file, so that threads and other processes are counted too."""

    def __init__(self, log: Path) -> None:
        super().__init__(MODALITIES)
        self.log = log

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        with self.log.open("a") as file:
            file.write(f"{data['case']}\n")
        return dict(data)


@pytest.fixture
def cases(tmp_path: Path) -> list[dict[str, Any]]:
    """Two cases, of which the second lacks y."""
    generator = np.random.default_rng(0)
    cases = []
    for case, names in (("a", MODALITIES), ("b", ("x",))):
        paths = {name: str(tmp_path / f"{case}_{name}.nii.gz") for name in names}
        for path in paths.values():
            nib.save(nib.Nifti1Image(generator.random((4, 5, 6), dtype=np.float32), AFFINE), path)
        cases.append({"case": case, **paths})
    return cases


def make_dataset(
    cases: list[dict[str, Any]], folder: Path, *, factor: float = 0.0, **arguments: Any
) -> FileCacheDataset:
    transforms = [
        CountLoads(folder / "loads.txt"),
        LoadCased(MODALITIES),
        NormalizeIntensityd(MODALITIES, subtrahend=factor, allow_missing_keys=True),
        RandScaleIntensityd(MODALITIES, factors=0.5, prob=1.0, allow_missing_keys=True),
    ]
    return FileCacheDataset(cases, Compose(transforms), cache_dir=folder / "cache", **arguments)


def loads(folder: Path) -> list[str]:
    return sorted((folder / "loads.txt").read_text().split())


def test_items_are_those_of_the_transforms(cases: list[dict[str, Any]], tmp_path: Path) -> None:
    dataset = make_dataset(cases, tmp_path)
    set_determinism(0)
    expected = [dataset.transform(case) for case in cases]
    set_determinism(0)
    dataset.transform.set_random_state(0)
    for item, wanted in zip((dataset[0], dataset[1]), expected, strict=True):
        assert set(item) == set(wanted)
        assert item["case"] == wanted["case"]
        for name in set(MODALITIES) & set(wanted):
            assert isinstance(item[name], MetaTensor)
            torch.testing.assert_close(item[name].affine, wanted[name].affine)
            assert item[name].shape == wanted[name].shape
    set_determinism(None)


def test_files_are_read_once_by_all_runs_and_workers(cases: list[dict[str, Any]], tmp_path: Path) -> None:
    for _ in range(2):
        dataset = make_dataset(cases, tmp_path, num_workers=2)
        for _ in range(2):
            list(DataLoader(dataset, batch_size=None, num_workers=1))
    assert loads(tmp_path) == ["a", "b"]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_random_transforms_are_drawn_anew_and_leave_the_cache_alone(
    cases: list[dict[str, Any]], tmp_path: Path
) -> None:
    dataset = make_dataset(cases, tmp_path)
    before = [path.read_bytes() for path in sorted((tmp_path / "cache").iterdir())]
    first, second = dataset[0]["x"].clone(), dataset[0]["x"]
    assert not torch.equal(first, second)
    second.zero_()  # in place: of this copy only
    assert bool(dataset[0]["x"].any())
    assert [path.read_bytes() for path in sorted((tmp_path / "cache").iterdir())] == before


def test_missing_modalities_take_no_space(cases: list[dict[str, Any]], tmp_path: Path) -> None:
    dataset = make_dataset(cases, tmp_path)
    kept = [torch.load(dataset._path(case), weights_only=True)[0] for case in cases]
    assert [set(MODALITIES) & set(values) for values in kept] == [{"x", "y"}, {"x"}]


@pytest.mark.parametrize("change", ["file", "case", "transform"])
def test_what_changes_is_made_anew(cases: list[dict[str, Any]], tmp_path: Path, change: str) -> None:
    make_dataset(cases, tmp_path)
    if change == "file":
        os.utime(cases[0]["x"], ns=(0, 0))
    elif change == "case":
        del cases[0]["y"]
    dataset = make_dataset(cases, tmp_path, factor=1.0 if change == "transform" else 0.0)
    assert loads(tmp_path) == (["a", "a", "b", "b"] if change == "transform" else ["a", "a", "b"])
    assert ("y" in dataset[0]) == (change != "case")


def test_voxels_beside_a_header_are_looked_at_too(tmp_path: Path) -> None:
    header, voxels, other = (tmp_path / name for name in ("x [1].mhd", "x [1].raw", "y.raw"))
    for path in (header, voxels, other):
        path.write_bytes(b"0")
    before = _hash_case({"x": str(header)})
    other.write_bytes(b"00")
    assert _hash_case({"x": str(header)}) == before
    voxels.write_bytes(b"00")
    assert _hash_case({"x": str(header)}) != before


def test_another_version_of_the_package_makes_all_anew(
    cases: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(cases, tmp_path)
    monkeypatch.setattr("passion_monai.datasets.cache.__version__", "another")
    make_dataset(cases, tmp_path)
    assert loads(tmp_path) == ["a", "a", "b", "b"]


def test_ranks_share_the_work(cases: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: 1)
    make_dataset(cases, tmp_path)
    assert (tmp_path / "loads.txt").read_text().split() == ["b", "a"]


def test_all_cases_that_fail_are_named_and_leave_the_others(cases: list[dict[str, Any]], tmp_path: Path) -> None:
    Path(cases[1]["x"]).write_bytes(b"no image")
    Path(cases[0]["y"]).unlink()
    good = cases[1] | {"case": "c", "x": cases[0]["x"]}
    dataset = make_dataset([*cases, good], tmp_path, num_workers=2)
    assert [(fault.case, fault.file) for fault in dataset.faults] == [("a", cases[0]["y"]), ("b", cases[1]["x"])]
    assert "Case b: x file" in dataset.faults[1].reason
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert dataset[2]["case"] == "c"
    with pytest.raises(RuntimeError, match="applying transform"):
        dataset[0]


def test_a_case_that_memory_does_not_suffice_for_is_named_with_the_remedy(
    cases: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    normalise = NormalizeIntensityd.__call__

    def fail(transform: NormalizeIntensityd, data: Mapping[Hashable, Any]) -> Any:
        if data["case"] == "a":
            raise MemoryError("Unable to allocate 7.00 GiB")
        return normalise(transform, data)

    monkeypatch.setattr(NormalizeIntensityd, "__call__", fail)
    (fault,) = make_dataset(cases, tmp_path).faults
    assert fault.reason.startswith("Case a: MemoryError: Unable to allocate 7.00 GiB")
    assert "fewer num_workers leave more for each" in fault.reason
    monkeypatch.undo()
    assert not make_dataset(cases, tmp_path).faults
    assert loads(tmp_path) == ["a", "a", "b"]


def test_a_broken_file_is_named_with_the_remedy(cases: list[dict[str, Any]], tmp_path: Path) -> None:
    dataset = make_dataset(cases, tmp_path)
    path = dataset._path(cases[0])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RuntimeError, match=r"Case a: .*\.pt cannot be read; delete it"):
        dataset[0]
    path.unlink()
    assert dataset[0]["case"] == "a"
