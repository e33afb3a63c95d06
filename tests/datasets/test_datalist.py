"""Datalists: splitting by patient, writing, reading with all checks, and the presence matrix of a list."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from passion_monai.datasets import DATASETS, DatasetSpec, discover, get_spec
from passion_monai.datasets.datalist import (
    apply_presence,
    datalist_presence,
    modality_counts,
    read_datalist,
    write_datalist,
)
from passion_monai.datasets.splitting import fold_cases, split_cases

MODALITIES = ("a", "b", "c")
SPEC = DatasetSpec(
    name="toy",
    spatial_dims=3,
    modalities=MODALITIES,
    label_values=(0, 7),
    class_names=("background", "thing"),
    regions={"thing": (1,)},
    reference_split=(3, 1, 1),
)
SIZES = (219, 50, 100)


def make_case(name: str, *, patient: str | None = None, keys: str = "abc", label: bool = True) -> dict[str, Any]:
    case: dict[str, Any] = {"case": name, "patient": patient or name, **{key: f"/data/{name}_{key}" for key in keys}}
    return {**case, "label": f"/data/{name}_label"} if label else case


def make_cases(number: int, **kwargs: Any) -> list[dict[str, Any]]:
    return [make_case(f"case{index:03d}", **kwargs) for index in range(number)]


def ids_of(splits: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    return {section: [case["case"] for case in cases] for section, cases in splits.items()}


class TestSpec:
    def test_all_datasets_have_a_spec_of_their_name(self) -> None:
        assert [get_spec(name).name for name in DATASETS] == list(DATASETS)

    @pytest.mark.parametrize("name", ["toy", "datalist", "", "brats.brats"])
    def test_unknown_dataset(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"Unknown dataset .*, expected one of \['brats'"):
            get_spec(name)
        with pytest.raises(ValueError, match="Unknown dataset"):
            discover(name, tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"label_values": (0, 1, 2)}, "label_values and class_names"),
            ({"regions": {"thing": (2,)}}, r"regions\['thing'\] must hold class indices from 1 to 1"),
            ({"regions": {"thing": (0, 1)}}, r"regions\['thing'\]"),
            ({"csv_modalities": ("a", "b")}, "csv_modalities must be a reordering"),
        ],
    )
    def test_contradictions(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DatasetSpec(**{**vars(SPEC), **change})


class TestDrawnSplit:
    @pytest.mark.parametrize(
        ("number", "sizes", "expected"),
        [
            (369, SIZES, (219, 50, 100)),
            (738, SIZES, (438, 100, 200)),
            (285, SIZES, (169, 39, 77)),  # quotas 169.15, 38.62, 77.24
            (8, SIZES, (5, 1, 2)),  # quotas 4.75, 1.08, 2.17
            (3, SIZES, (1, 1, 1)),
            (2, SIZES, (1, 0, 1)),
            (1, SIZES, (1, 0, 0)),
            (0, SIZES, (0, 0, 0)),
            (10, (80, 20, 0), (8, 2, 0)),
            (10, (1, 1, 1), (4, 3, 3)),
        ],
    )
    def test_proportions(self, number: int, sizes: tuple[int, ...], expected: tuple[int, ...]) -> None:
        splits = split_cases(make_cases(number), sizes=sizes, seed=0)
        assert list(splits) == ["training", "validation", "test"]
        assert tuple(map(len, splits.values())) == expected

    def test_every_case_once_and_ordered(self) -> None:
        ids = ids_of(split_cases(make_cases(50), sizes=SIZES, seed=4))
        assert sorted(name for names in ids.values() for name in names) == [case["case"] for case in make_cases(50)]
        assert all(names == sorted(names) for names in ids.values())

    def test_depends_on_the_seed_only(self) -> None:
        cases = make_cases(40)
        shuffled = random.Random(0).sample(cases, k=len(cases))
        first = split_cases(cases, sizes=SIZES, seed=1)
        assert split_cases(shuffled, sizes=SIZES, seed=1) == first
        assert split_cases(cases, sizes=SIZES, seed=2) != first

    def test_is_not_in_order(self) -> None:
        training = ids_of(split_cases(make_cases(40), sizes=SIZES, seed=0))["training"]
        assert training != [case["case"] for case in make_cases(len(training))]

    def test_patients_stay_together(self) -> None:
        cases = [make_case(f"{patient}-{time}", patient=patient) for patient in "pqrstuvw" for time in range(3)]
        splits = split_cases(cases, sizes=(2, 1, 1), seed=0)
        patients = {section: Counter(case["patient"] for case in members) for section, members in splits.items()}
        assert [len(counter) for counter in patients.values()] == [4, 2, 2]
        assert all(set(counter.values()) == {3} for counter in patients.values())

    def test_cases_without_label_are_set_apart(self) -> None:
        splits = split_cases([*make_cases(5), make_case("new", label=False)], sizes=(3, 1, 1), seed=0)
        assert {section: len(cases) for section, cases in splits.items()} == {
            "training": 3,
            "validation": 1,
            "test": 1,
            "inference": 1,
        }
        assert splits["inference"][0]["case"] == "new"

    @pytest.mark.parametrize("sizes", [(1, 1), (0, 0, 0), (2, -1, 1)])
    def test_errors(self, sizes: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="sizes must be three numbers"):
            split_cases(make_cases(5), sizes=sizes, seed=0)


class TestListedSplit:
    def test_values(self) -> None:
        ids = {"test": ["case004"], "training": ["case003", "case000"]}
        splits = split_cases(make_cases(5), sizes=SIZES, seed=0, ids=ids)
        assert ids_of(splits) == {"training": ["case000", "case003"], "validation": [], "test": ["case004"]}

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ({"train": ["case000"]}, r"\['training', 'validation', 'test'\], got 'train'"),
            (
                {"training": ["case000", "x", "y"]},
                r"ids\['training'\] names 2 of 3 cases .* first is 'x'; ids look like 'c",
            ),
            ({"training": ["unlabelled"]}, "names 1 of 1 cases that were not found or have no label"),
            ({"training": ["case000"], "test": ["case000"]}, "'case000' twice, in 'training' and in 'test'"),
            ({"training": ["case000", "case000"]}, "'case000' twice"),
            ({"training": ["p-0"], "test": ["p-1"]}, "patient 'p' into two sections, 'training' and 'test'"),
        ],
    )
    def test_errors(self, ids: dict[str, list[str]], message: str) -> None:
        cases = [*make_cases(2), make_case("p-0", patient="p"), make_case("p-1", patient="p")]
        cases.append(make_case("unlabelled", label=False))
        with pytest.raises(ValueError, match=message):
            split_cases(cases, sizes=SIZES, seed=0, ids=ids)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the files of three cases; the second has no modality b, the third no label."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("x_a", "x_b", "x_c", "x_label", "y_a", "y_c", "y_label", "z_b"):
        (folder / name).touch()
    return folder


def content_of(root: Path) -> dict[str, Any]:
    return {
        "dataset": "toy",
        "modalities": list(MODALITIES),
        "root": str(root),
        "training": [
            {
                "case": "x",
                "patient": "x",
                "a": "x_a",
                "b": "x_b",
                "c": "x_c",
                "label": "x_label",
                "label_values": [0, 7],
            },
            {"case": "y", "patient": "y", "a": "y_a", "c": "y_c", "label": "y_label", "presence": [1, 0, 0]},
        ],
        "test": [],
        "inference": [{"case": "z", "patient": "z", "b": "z_b"}],
    }


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


class TestWrite:
    def test_round_trip(self, root: Path, tmp_path: Path) -> None:
        x = {
            "case": "x",
            "patient": "x",
            **{key: str(root / f"x_{key}") for key in "abc"},
            "label": str(root / "x_label"),
        }
        y = {
            "case": "y",
            "patient": "y",
            "a": str(root / "y_a"),
            "label": str(root / "y_label"),
            "label_values": [0, 9],
        }
        path = tmp_path / "new" / "folder" / "list.json"
        write_datalist(path, {"training": [x], "validation": [y], "test": []}, spec=SPEC, root=root)
        assert read_datalist(path, "training", modalities=MODALITIES) == [x]
        assert read_datalist(path, "validation", modalities=MODALITIES) == [y]
        content = json.loads(path.read_text())
        assert list(content) == ["dataset", "modalities", "root", "class_names", "training", "validation", "test"]
        assert content["dataset"] == "toy"
        assert content["modalities"] == list(MODALITIES)
        assert content["root"] == str(root.resolve())
        assert content["validation"] == [{**y, "a": "y_a", "label": "y_label"}]

    def test_arguments_are_not_changed(self, root: Path, tmp_path: Path) -> None:
        case = {"case": "x", "patient": "x", "a": str(root / "x_a")}
        write_datalist(tmp_path / "list.json", {"inference": [case]}, spec=SPEC, root=root)
        assert case["a"] == str(root / "x_a")

    def test_relative_root(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        write_datalist("list.json", {"inference": [{"case": "z", "b": "data/z_b"}]}, spec=SPEC, root="data")
        monkeypatch.chdir("/")
        [case] = read_datalist(tmp_path / "list.json", "inference", modalities=MODALITIES)
        assert Path(case["b"]).samefile(root / "z_b")

    def test_linked_root(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(root)
        for given, stored in ((tmp_path / "link", tmp_path / "link"), (tmp_path / "link", root)):
            case = {"case": "z", "b": str(stored / "z_b")}
            write_datalist(tmp_path / "list.json", {"inference": [case]}, spec=SPEC, root=given)
            assert json.loads((tmp_path / "list.json").read_text())["inference"][0]["b"] == "z_b"

    def test_file_elsewhere_changes_nothing(self, root: Path, tmp_path: Path) -> None:
        path = tmp_path / "list.json"
        path.write_text("before")
        with pytest.raises(ValueError, match=r"Case 'z': b /elsewhere/z_b is not below root .*data"):
            write_datalist(path, {"inference": [{"case": "z", "b": "/elsewhere/z_b"}]}, spec=SPEC, root=root)
        assert path.read_text() == "before"

    def test_interrupted_write_changes_nothing(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "list.json"
        path.write_text("before")

        def write_half(self: Path, text: str, **kwargs: Any) -> None:
            with self.open("w") as file:
                file.write(text[: len(text) // 2])
            raise OSError("No space left on device")

        monkeypatch.setattr(Path, "write_text", write_half)
        with pytest.raises(OSError, match="No space left"):
            write_datalist(path, {"training": []}, spec=SPEC, root=root)
        assert path.read_text() == "before"
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data", "list.json"]


class TestRead:
    def test_values(self, root: Path, tmp_path: Path) -> None:
        path = write(tmp_path / "list.json", content_of(root))
        x, y = read_datalist(path, "training", modalities=MODALITIES)
        assert x["c"] == str(root / "x_c")
        assert x["label_values"] == [0, 7]
        assert "b" not in y
        assert y["presence"] == [True, False, False]
        [z] = read_datalist(path, "inference", modalities=MODALITIES)
        assert z == {"case": "z", "patient": "z", "b": str(root / "z_b")}

    def test_some_modalities_in_another_order(self, root: Path, tmp_path: Path) -> None:
        x, y = read_datalist(write(tmp_path / "list.json", content_of(root)), "training", modalities=("c", "a"))
        assert "b" not in x
        assert y["presence"] == [False, True]

    def test_a_modality_left_out_need_not_exist(self, root: Path, tmp_path: Path) -> None:
        (root / "x_b").unlink()
        path = write(tmp_path / "list.json", content_of(root))
        assert len(read_datalist(path, "training", modalities=("a", "c"))) == 2

    def test_moved_data(self, root: Path, tmp_path: Path) -> None:
        path = write(tmp_path / "list.json", content_of(root))
        root.rename(tmp_path / "moved")
        with pytest.raises(
            FileNotFoundError,
            match=r"list.json, section 'training': no case has all .* of 'x', .*/data/x_a does not exist.* as root",
        ):
            read_datalist(path, "training", modalities=MODALITIES)
        x, _ = read_datalist(path, "training", modalities=MODALITIES, root=tmp_path / "moved")
        assert x["a"] == str(tmp_path / "moved" / "x_a")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"a": None}, "'a' must be a path, got None; leave out"),
            ({"segmentation": "x_label"}, r"unknown keys \['segmentation'\], expected modalities \['a', 'b', 'c'\]"),
            ({"presence": [True, True]}, "'presence' must be 3 booleans"),
            ({"presence": [1, 0, 2]}, "'presence' must be 3 booleans"),
            ({"presence": [0, 0, 0]}, r"none of \['a', 'b', 'c'\] is present"),
        ],
    )
    def test_case_errors(self, root: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        content = content_of(root)
        content["training"][0].update(change)
        with pytest.raises(ValueError, match=f"list.json, section 'training', case 'x': {message}"):
            read_datalist(write(tmp_path / "list.json", content), "training", modalities=("a", "b", "c"))

    @pytest.mark.parametrize(
        ("section", "removed", "message"),
        [
            ("training", ["label"], "case 'x': has no label; add one or move the case to section 'inference'"),
            ("training", ["a", "b", "c"], r"case 'x': none of \['a', 'b', 'c'\] is present"),
            ("training", ["case"], "'case' must be the case's id, got None"),
            ("inference", ["b"], "case 'z': none of"),
        ],
    )
    def test_incomplete_case(self, root: Path, tmp_path: Path, section: str, removed: list[str], message: str) -> None:
        content = content_of(root)
        for key in removed:
            del content[section][0][key]
        with pytest.raises(ValueError, match=f"list.json, section '{section}'.*{message}"):
            read_datalist(write(tmp_path / "list.json", content), section, modalities=MODALITIES)

    @pytest.mark.parametrize("case", ["site/x", "../x", "/x", ""])
    def test_an_id_that_cannot_name_a_file(self, root: Path, tmp_path: Path, case: str) -> None:
        content = content_of(root)
        content["training"][0]["case"] = case
        with pytest.raises(ValueError, match=r"must be the case's id, got .* it has no folders"):
            read_datalist(write(tmp_path / "list.json", content), "training", modalities=MODALITIES)

    @pytest.mark.parametrize("key", ["a", "label"])
    def test_a_missing_file_is_left_to_its_reader(self, root: Path, tmp_path: Path, key: str) -> None:
        (root / f"x_{key}").unlink()
        path = write(tmp_path / "list.json", content_of(root))
        assert len(read_datalist(path, "training", modalities=MODALITIES)) == 2

    @pytest.mark.parametrize("section", ["training", "inference"])
    def test_duplicate_case(self, root: Path, tmp_path: Path, section: str) -> None:
        content = content_of(root)
        content[section].append(content["training"][0])
        with pytest.raises(ValueError, match=f"list.json: case 'x' is there twice, in 'training' and in '{section}'"):
            read_datalist(write(tmp_path / "list.json", content), "training", modalities=MODALITIES)

    @pytest.mark.parametrize("section", ["training", "test"])
    def test_without_unlabelled_cases_the_test_cases_can_be_segmented(
        self, root: Path, tmp_path: Path, section: str
    ) -> None:
        content = content_of(root)
        path = write(tmp_path / "list.json", content | {"inference": [], section: content["training"]})
        with pytest.raises(ValueError, match="no case in section 'inference'") as error:
            read_datalist(path, "inference", modalities=MODALITIES)
        assert ("--section test" in str(error.value)) == (section == "test")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"train": []}, r"must be an object with \['dataset', 'modalities', 'root'\] .*'train'"),
            ({"training": {"x": 1}}, "section 'training': must be a list of objects"),
            ({"training": ["x"]}, "section 'training': must be a list of objects"),
            ({"training": []}, r"no case in section 'training'\. The sections with cases are \['inference'\]"),
            ({"modalities": "abc"}, "'modalities' must be a list"),
            ({"modalities": ["a", "c"]}, "'b' is asked for"),
            ({"root": None}, "'root' a folder, got .* None"),
        ],
    )
    def test_datalist_errors(self, root: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        path = write(tmp_path / "list.json", {**content_of(root), **change})
        with pytest.raises(ValueError, match=f"list.json.*{message}"):
            read_datalist(path, "training", modalities=MODALITIES)

    @pytest.mark.parametrize("content", [[], "x", {"training": []}])
    def test_something_else(self, tmp_path: Path, content: Any) -> None:
        with pytest.raises(ValueError, match=r"list\.json must be an object with"):
            read_datalist(write(tmp_path / "list.json", content), "training", modalities=MODALITIES)

    def test_unknown_section(self, root: Path, tmp_path: Path) -> None:
        path = write(tmp_path / "list.json", content_of(root))
        with pytest.raises(ValueError, match=r"section must be one of .*'inference'.*, got 'root'"):
            read_datalist(path, "root", modalities=MODALITIES)

    def test_broken_json(self, tmp_path: Path) -> None:
        (tmp_path / "list.json").write_text('{"dataset": ')
        with pytest.raises(ValueError, match=r"list\.json cannot be read as JSON: .*line 1"):
            read_datalist(tmp_path / "list.json", "training", modalities=MODALITIES)

    def test_no_datalist(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"list\.json does not exist; python -m"):
            read_datalist(tmp_path / "list.json", "training", modalities=MODALITIES)


class TestPresence:
    cases = (make_case("x"), make_case("y", keys="ac"), {**make_case("z", keys="ab"), "presence": [False, True, True]})

    def test_presence_is_what_exists_and_is_not_hidden(self) -> None:
        expected = [[True, True, True], [True, False, True], [False, True, False]]
        assert datalist_presence(self.cases, MODALITIES).tolist() == expected

    def test_counts(self) -> None:
        assert modality_counts(self.cases, MODALITIES) == {"a": 2, "b": 2, "c": 2}
        assert modality_counts(self.cases[:2], MODALITIES) == {"a": 2, "b": 1, "c": 2}
        assert modality_counts([], MODALITIES) == {"a": 0, "b": 0, "c": 0}

    def test_row_of_another_length(self) -> None:
        with pytest.raises(ValueError, match="Case 'z': presence must have 2 entries"):
            datalist_presence(self.cases, MODALITIES[:2])

    def test_apply(self) -> None:
        presence = np.array([[1, 0, 0], [1, 0, 1], [0, 1, 0]], dtype=bool)
        before = [dict(case) for case in self.cases]
        applied = apply_presence(self.cases, presence, MODALITIES)
        np.testing.assert_array_equal(datalist_presence(applied, MODALITIES), presence)
        assert applied[0] == {**self.cases[0], "presence": [True, False, False]}
        assert all(type(value) is bool for value in applied[0]["presence"])
        assert [dict(case) for case in self.cases] == before

    @pytest.mark.parametrize(
        ("presence", "message"),
        [
            ([[1, 1, 1], [1, 1, 0], [0, 1, 0]], "case 'y' has 'b', but the case does not have it"),
            ([[1, 1, 1], [1, 0, 0], [1, 0, 0]], "case 'z' has 'a', but"),
            ([[1, 1, 1], [0, 0, 0], [0, 1, 0]], "row 1 has none"),
            ([[1, 1, 1], [1, 0, 0]], "one row for each of 3 cases, got 2 rows"),
            ([[1, 1]] * 3, r"must be \[N, 3\]"),
        ],
    )
    def test_apply_errors(self, presence: list[list[int]], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            apply_presence(self.cases, presence, MODALITIES)


@pytest.mark.parametrize(("number", "folds"), [(14, 7), (10, 3), (3, 3)])
def test_each_patient_is_tested_in_one_fold(number: int, folds: int):
    cases = make_cases(number)
    splits = [fold_cases(cases, fold=fold, folds=folds, seed=1) for fold in range(folds)]
    tested = [case["case"] for split in splits for case in split["test"]]
    assert sorted(tested) == sorted(case["case"] for case in cases)
    for split in splits:
        assert len(split["test"]) in (number // folds, -(-number // folds))
        assert not split["validation"]
        assert {case["case"] for case in split["training"]} == {case["case"] for case in cases} - {
            case["case"] for case in split["test"]
        }
    other_seed = fold_cases(cases, fold=0, folds=folds, seed=2)["test"]
    assert number == folds or other_seed != splits[0]["test"]


def test_a_patient_scanned_twice_is_in_one_fold_and_cases_without_label_in_none():
    cases = [{**case, "patient": case["case"][:-1]} for case in make_cases(20)]
    unlabelled = {key: value for key, value in cases[0].items() if key != "label"} | {"case": "z"}
    for fold in range(2):
        split = fold_cases([*cases, unlabelled], fold=fold, folds=2, seed=0)
        patients = [{case["patient"] for case in split[section]} for section in ("training", "test")]
        assert not patients[0] & patients[1]
        assert all(case["case"] != "z" for section in split.values() for case in section)


@pytest.mark.parametrize(("fold", "folds"), [(-1, 2), (2, 2), (0, 1), (0, 5)])
def test_a_fold_that_is_none_is_an_error(fold: int, folds: int):
    with pytest.raises(ValueError, match=f"fold must be 0 to .* got fold {fold} of {folds}"):
        fold_cases(make_cases(4), fold=fold, folds=folds, seed=0)
