from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest

from passion_monai.datasets.cohort import inference_cases, prepare_datalist, training_cases, validation_cases
from passion_monai.datasets.datalist import datalist_presence
from passion_monai.presence import write_presence

PHANTOM = {"num_cases": 8, "shape": (16, 16, 16), "spacing": (12.0, 12.0, 12.0), "seed": 0}
MODALITIES = ("flair", "t1ce", "t1", "t2")
MYOPS = ("bssfp", "lge", "t2")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a phantom cohort and its datalist."""
    folder = tmp_path_factory.mktemp("run")
    prepare(folder)
    return folder


def prepare(output_dir: Path, **changed: Any) -> str:
    arguments = {"dataset_dir": None, "datalist": None, "phantom": PHANTOM, "seed": 0} | changed
    return prepare_datalist("brats", output_dir=str(output_dir), **arguments)


class TestPrepareDatalist:
    def test_without_a_folder_it_says_phantom(self, run_dir: Path, caplog: pytest.LogCaptureFixture):
        with caplog.at_level(logging.WARNING):
            path = prepare(run_dir)
        assert "PHANTOM" in caplog.text
        content = json.loads(Path(path).read_text())
        assert [len(content[section]) for section in ("training", "validation", "test")] == [5, 1, 2]

    def test_a_given_datalist_is_used_as_it_is(self, tmp_path: Path):
        assert prepare(tmp_path, datalist="/some/list.json") == "/some/list.json"
        assert not list(tmp_path.iterdir())

    def test_the_split_stays_when_the_folder_grows(self, run_dir: Path, tmp_path: Path):
        data = tmp_path / "data"
        shutil.copytree(run_dir / "phantom", data)
        removed = shutil.move(data / "BraTS20_Training_008", tmp_path / "aside")
        first = Path(prepare(tmp_path / "out", dataset_dir=str(data))).read_text()
        shutil.move(removed, data / "BraTS20_Training_008")
        assert Path(prepare(tmp_path / "out", dataset_dir=str(data))).read_text() == first

    def test_a_folder_in_the_home_may_be_given_by_a_tilde(
        self, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """The shell leaves it as it is after `=` and within quotes."""
        monkeypatch.setenv("HOME", str(run_dir))
        for _ in range(2):  # the second time the split is there
            path = prepare(tmp_path, dataset_dir="~/phantom")
        assert json.loads(Path(path).read_text())["root"] == str((run_dir / "phantom").resolve())

    def test_says_each_time_what_it_does_not_know(
        self, run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        """With a split made before too: so training, evaluation and check all say it."""
        shutil.copytree(run_dir / "phantom", tmp_path / "data")
        case = tmp_path / "data" / "BraTS20_Training_001"
        (case / f"{case.name}_t1.nii.gz").rename(case / f"{case.name}_t1w.nii.gz")
        for _ in range(2):
            caplog.clear()
            prepare(tmp_path / "out", dataset_dir=str(tmp_path / "data"))
            assert f"1 other image(s): {case.name}/{case.name}_t1w.nii.gz" in caplog.text

    def test_refuses_the_datalist_of_another_folder(self, run_dir: Path, tmp_path: Path):
        data = tmp_path / "data"
        shutil.copytree(run_dir / "phantom", data)
        with pytest.raises(ValueError, match=r"was made from .*but the cases are now in"):
            prepare(run_dir, dataset_dir=str(data))


class TestTrainingCases:
    def cases(self, run_dir: Path, **changed: Any) -> list[dict[str, Any]]:
        datalist = str(run_dir / "datalist.json")
        return training_cases(datalist, dataset="brats", modalities=MODALITIES, **changed)

    def test_simulates_the_rates_exactly(self, run_dir: Path):
        cases = self.cases(run_dir, missing_rates=[0.6, 0.4, 0.2, 0.8], seed=1)
        assert datalist_presence(cases, MODALITIES).sum(axis=0).tolist() == [2, 3, 4, 1]

    def test_a_moved_folder_is_given_as_root(self, run_dir: Path, tmp_path: Path):
        shutil.copytree(run_dir / "phantom", tmp_path / "moved")
        cases = self.cases(run_dir, root=str(tmp_path / "moved"))
        assert all(Path(case["t1"]).is_relative_to(tmp_path / "moved") for case in cases)

    def test_takes_the_presence_from_a_file(self, run_dir: Path, tmp_path: Path):
        ids = [case["case"] for case in self.cases(run_dir)]
        presence = [[n % 2 == 0, True, n == 2, n == 1] for n in range(len(ids))]
        write_presence(tmp_path / "presence.json", ids, presence, modalities=MODALITIES)
        cases = self.cases(run_dir, presence_file=str(tmp_path / "presence.json"))
        assert [case["presence"] for case in cases] == presence

    def test_names_cases_that_the_file_lacks(self, run_dir: Path, tmp_path: Path):
        write_presence(tmp_path / "presence.json", ["other"], [[True] * 4], modalities=MODALITIES)
        with pytest.raises(ValueError, match="has no row for the training cases"):
            self.cases(run_dir, presence_file=str(tmp_path / "presence.json"))

    @pytest.mark.parametrize("rates", [None, [0.5] * 4])
    def test_names_a_modality_that_no_case_has(self, run_dir: Path, tmp_path: Path, rates: list[float] | None):
        content = json.loads((run_dir / "datalist.json").read_text())
        for entry in content["training"]:
            del entry["t2"]
        path = str(tmp_path / "list.json")
        Path(path).write_text(json.dumps(content))
        said = rf"{path}: no training case has t2, .* --modalities \"\['flair', 't1ce', 't1'\]\", and by missing_rates"
        with pytest.raises(ValueError, match=said):
            training_cases(path, dataset="brats", modalities=MODALITIES, missing_rates=rates)
        assert len(training_cases(path, dataset="brats", modalities=MODALITIES[:3])) == 5

    def test_names_a_modality_that_the_file_hides_everywhere(self, run_dir: Path, tmp_path: Path):
        path, ids = tmp_path / "presence.json", [case["case"] for case in self.cases(run_dir)]
        write_presence(path, ids, [[True, False, True, False]] * len(ids), modalities=MODALITIES)
        with pytest.raises(ValueError, match=rf"{path}: no training case has t1ce, t2, .*\['flair', 't1'\]"):
            self.cases(run_dir, presence_file=str(path))

    def test_refuses_rates_and_a_file_together(self, run_dir: Path):
        with pytest.raises(ValueError, match="not both"):
            self.cases(run_dir, missing_rates=[0.0] * 4, presence_file="presence.json")


@pytest.fixture(scope="module")
def datalist(tmp_path_factory: pytest.TempPathFactory) -> str:
    arguments: dict[str, Any] = {"dataset_dir": None, "datalist": None, "seed": 0}
    arguments["phantom"] = {"num_cases": 5, "shape": (16, 16, 5), "spacing": (12.0, 12.0, 10.0), "seed": 0}
    return prepare_datalist("myops", output_dir=str(tmp_path_factory.mktemp("run")), **arguments)


class TestSlices:
    """MyoPS: networks are trained on slices, and the paper's split has no validation cases."""

    def test_every_slice_is_a_sample_with_its_patients_modalities(self, datalist: str):
        arguments: dict[str, Any] = {"dataset": "myops", "modalities": MYOPS, "missing_rates": [0.25, 0.5, 0.75]}
        volumes = training_cases(datalist, **arguments)
        slices = training_cases(datalist, slices=True, **arguments)
        assert [case["case"] for case in volumes] == list(dict.fromkeys(case["case"] for case in slices))
        for volume in volumes:
            own = [case for case in slices if case["case"] == volume["case"]]
            assert [case["slice"] for case in own] == list(range(nib.load(volume["bssfp"]).shape[2]))
            assert all(case["presence"] == volume["presence"] for case in own)
        assert len({len([case for case in slices if case["case"] == volume["case"]]) for volume in volumes}) > 1

    def test_a_hidden_modality_is_not_read_for_the_number_of_slices(self, datalist: str, tmp_path: Path):
        content = json.loads(Path(datalist).read_text())
        entry = content["training"][0]
        bad = Path(content["root"]) / "broken.nii.gz"
        bad.write_bytes(b"no image")
        entry |= {"bssfp": bad.name, "presence": [False, True, True]}
        (tmp_path / "list.json").write_text(json.dumps(content))
        cases = training_cases(str(tmp_path / "list.json"), dataset="myops", modalities=MYOPS, slices=True)
        assert cases[0]["slice"] == 0

    def test_without_validation_cases_it_goes_on_and_says_so(self, datalist: str, caplog: pytest.LogCaptureFixture):
        with caplog.at_level(logging.WARNING):
            assert validation_cases(datalist, modalities=MYOPS) == []
        assert "the weights of the last epoch are kept" in caplog.text

    def test_validation_cases_are_read_where_there_are_some(self, run_dir: Path):
        assert len(validation_cases(str(run_dir / "datalist.json"), modalities=MODALITIES)) == 1

    @pytest.mark.parametrize("count", [1, 2, None])
    def test_validation_may_be_of_the_first_cases_only(self, run_dir: Path, tmp_path: Path, count: int | None):
        content = json.loads((run_dir / "datalist.json").read_text())
        content["validation"] += content["training"]
        content["training"] = []
        (tmp_path / "list.json").write_text(json.dumps(content))
        cases = validation_cases(str(tmp_path / "list.json"), modalities=MODALITIES, count=count)
        expected = [entry["case"] for entry in content["validation"]]
        assert len(expected) > 2
        assert [case["case"] for case in cases] == expected[:count]


class TestInferenceCases:
    def cases(self, **changed: Any) -> list[dict[str, Any]]:
        arguments: dict[str, Any] = {"dataset_dir": None, "files": None, "output_dir": "out", "missing_rates": None}
        arguments |= {"modalities": MODALITIES, "phantom": PHANTOM, "seed": 0}
        return inference_cases("brats", **(arguments | changed))

    def test_says_what_it_does_not_know(self, run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        shutil.copytree(run_dir / "phantom", tmp_path / "data")
        (tmp_path / "data" / "BraTS20_Training_001" / "BraTS20_Training_001_T1.nii.gz").touch()
        self.cases(dataset_dir=str(tmp_path / "data"))
        assert "1 other image(s): BraTS20_Training_001/BraTS20_Training_001_T1.nii.gz" in caplog.text

    def test_phantoms_lack_modalities_and_labels(self, run_dir: Path):
        cases = self.cases(output_dir=str(run_dir), missing_rates=[0.5] * 4)
        assert datalist_presence(cases, MODALITIES).sum(axis=0).tolist() == [4, 4, 4, 4]
        assert not any("label" in case for case in cases)

    def test_a_folder_is_taken_as_it_is(self, run_dir: Path):
        cases = self.cases(dataset_dir=str(run_dir / "phantom"), missing_rates=[0.5] * 4)
        assert datalist_presence(cases, MODALITIES).all()

    @pytest.mark.parametrize("section", ["test", "validation"])
    def test_a_section_of_a_datalist_may_be_given(self, run_dir: Path, section: str):
        datalist = run_dir / "datalist.json"
        cases = self.cases(datalist=str(datalist), section=section)
        assert [case["case"] for case in cases] == [case["case"] for case in json.loads(datalist.read_text())[section]]
        assert not any("label" in case for case in cases)

    def test_a_datalist_may_have_moved(self, run_dir: Path, tmp_path: Path):
        shutil.copytree(run_dir / "phantom", tmp_path / "moved")
        given = {"datalist": str(run_dir / "datalist.json"), "section": "test", "dataset_dir": str(tmp_path / "moved")}
        assert all(Path(case["t1"]).is_relative_to(tmp_path / "moved") for case in self.cases(**given))

    def test_refuses_files_and_a_datalist_together(self):
        with pytest.raises(ValueError, match="Give files or datalist, not both"):
            self.cases(files={"t2": "b.nii.gz"}, datalist="list.json")

    def test_a_single_case_is_named_after_its_first_file(self):
        assert self.cases(files={"t2": "/data/b_t2.nii.gz", "t1": "/data/b_t1.nii"})[0]["case"] == "b_t1"
        assert self.cases(files={"t2": "/data/b_t2.nii.gz", "case": "Jo"})[0]["case"] == "Jo"
        assert self.cases(files={"t2": "/data/b_t2.nrrd"})[0]["case"] == "b_t2"
        assert self.cases(files={"t2": "/data/b.nii.gz[1]"})[0]["case"] == "b"
        assert self.cases(files={"t2": "/data/series.1"})[0]["case"] == "series.1"

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, "files must give a path for one or more of"),
            ({"case": "x"}, "files must give a path for one or more of"),
            ({"t3": "a.nii"}, "unknown key 't3'"),
            ({"t1": "a.nii", "label": "b.nii"}, r"unknown key 'label'; the keys are \[.*'t1'.*'case'\]"),
        ],
    )
    def test_refuses_what_is_not_a_modality(self, files: dict[str, str], message: str):
        with pytest.raises(ValueError, match=message):
            self.cases(files=files)
