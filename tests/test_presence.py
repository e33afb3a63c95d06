"""The presence matrix: order and names of combinations, exact simulated missing rates, files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from passion_monai.presence import (
    check_presence,
    combination_name,
    combinations,
    missing_rates,
    parse_combination,
    read_presence,
    selected_combinations,
    simulate_presence,
    write_presence,
)

MODALITIES = ("a", "b", "c", "d")
CSV_HEADER = "data_name,mask_id,mask,pos_mask_ids\r\n"


class TestCombinations:
    def test_order_of_four_modalities(self) -> None:
        names = [combination_name(row, MODALITIES) for row in combinations(4)]
        expected = "a b c d a+b a+c a+d b+c b+d c+d a+b+c a+b+d a+c+d b+c+d a+b+c+d"
        assert names == expected.split()

    @pytest.mark.parametrize("num_modalities", [1, 2, 3, 4, 5, 7])
    def test_every_combination_once(self, num_modalities: int) -> None:
        presence = combinations(num_modalities)
        assert presence.dtype == bool
        assert presence.shape == (2**num_modalities - 1, num_modalities)
        assert len(np.unique(presence, axis=0)) == len(presence)
        assert presence.any(axis=1).all()

    def test_each_alone_and_all_together(self) -> None:
        selected = combinations(3)[selected_combinations(3, "single_and_complete")]
        assert selected.astype(int).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]
        assert selected_combinations(3).tolist() == [True] * 7
        with pytest.raises(ValueError, match=r"selection must be one of .*, got 'some'"):
            selected_combinations(3, "some")

    def test_error_without_modalities(self) -> None:
        with pytest.raises(ValueError, match=r"num_modalities must be at least 1, got 0\."):
            combinations(0)

    def test_parse_is_the_inverse_of_name(self) -> None:
        for row in combinations(4):
            assert parse_combination(combination_name(row, MODALITIES), MODALITIES).tolist() == row.tolist()

    def test_parse_takes_any_order(self) -> None:
        assert parse_combination("d+a", MODALITIES).tolist() == [True, False, False, True]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("a+e", r"'a\+e': 'e' is not a modality, expected some of \['a', 'b', 'c', 'd'\]"),
            ("", "'' is not a modality"),
            ("a+", "'' is not a modality"),
            ("ab", "'ab' is not a modality"),
            ("a+b+a", "names a modality twice"),
        ],
    )
    def test_parse_errors(self, name: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parse_combination(name, MODALITIES)

    def test_name_of_a_tensor(self) -> None:
        assert combination_name(torch.tensor([False, True, False, True]), MODALITIES) == "b+d"

    @pytest.mark.parametrize("row", [[False] * 4, [True] * 3])
    def test_name_errors(self, row: list[bool]) -> None:
        with pytest.raises(ValueError, match="presence must"):
            combination_name(row, MODALITIES)


class TestCheckPresence:
    def test_numbers_become_booleans(self) -> None:
        presence = check_presence([[1, 0, 0, 1]], MODALITIES)
        assert presence.dtype == bool
        assert presence.tolist() == [[True, False, False, True]]

    @pytest.mark.parametrize(
        ("presence", "message"),
        [
            ([1, 0, 0, 1], r"must be \[N, 4\].*got \(4,\)"),
            ([[1, 0, 1]], r"must be \[N, 4\].*got \(1, 3\)"),
            ([[1, 0, 2, 0]], "booleans or 0 and 1 only"),
            ([[1, 0, 0, 0], [0, 0, 0, 0]], "row 1 has none"),
        ],
    )
    def test_errors(self, presence: list, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            check_presence(presence, MODALITIES)


def grid_of_rates(num_modalities: int) -> list[tuple[float, ...]]:
    return list(itertools.product((0.0, 0.1, 0.25, 0.5, 0.7, 0.95), repeat=num_modalities))


def half_up(value: float) -> int:
    return int(np.floor(value + 0.5))


class TestSimulatePresence:
    @pytest.mark.parametrize("num_modalities", [1, 2, 3, 4])
    @pytest.mark.parametrize("num_samples", [1, 2, 3, 7, 10, 31])
    def test_exact_counts_or_a_clear_error(self, num_samples: int, num_modalities: int) -> None:
        for seed, rates in enumerate(grid_of_rates(num_modalities)):
            counts = [half_up(num_samples * (1 - rate)) for rate in rates]
            if min(counts) == 0 or sum(counts) < num_samples:
                with pytest.raises(ValueError, match="missing_rates"):
                    simulate_presence(num_samples, rates, seed=seed)
                continue
            presence = simulate_presence(num_samples, rates, seed=seed)
            assert presence.dtype == bool
            assert presence.shape == (num_samples, num_modalities)
            assert presence.sum(axis=0).tolist() == counts
            assert presence.any(axis=1).all()

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("rates", [(0.6, 0.4, 0.2, 0.8), (0.5, 0.8, 0.2, 0.2), (0.8, 0.8, 0.8, 0.6), (0.0,) * 4])
    def test_reference_cohort(self, rates: tuple[float, ...], seed: int) -> None:
        presence = simulate_presence(219, rates, seed=seed)
        assert presence.sum(axis=0).tolist() == [half_up(219 * (1 - rate)) for rate in rates]
        assert presence.any(axis=1).all()

    def test_every_entry_needed(self) -> None:
        presence = simulate_presence(40, (0.75, 0.75, 0.75, 0.75), seed=3)
        assert (presence.sum(axis=1) == 1).all()
        assert presence.sum(axis=0).tolist() == [10] * 4

    def test_deterministic_in_the_seed(self) -> None:
        first, again, other = (simulate_presence(50, (0.5, 0.6, 0.7), seed=seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()

    def test_modalities_are_drawn_independently(self) -> None:
        """Without repairs (the last modality is always there) the others overlap as often as independent draws do."""
        presence = simulate_presence(4000, (0.5, 0.5, 0.0), seed=0)
        assert np.mean(presence[:, 0] & presence[:, 1]) == pytest.approx(0.25, abs=0.03)

    def test_repaired_samples_are_not_favoured(self) -> None:
        """Every sample is as likely as any other to have a modality, wherever it stands."""
        draws = np.mean([simulate_presence(12, (0.75, 0.5, 0.5), seed=seed) for seed in range(1500)], axis=0)
        np.testing.assert_allclose(draws, np.tile([0.25, 0.5, 0.5], (12, 1)), atol=0.06)

    @pytest.mark.parametrize(
        ("num_samples", "rates", "message"),
        [
            (0, (0.5,), "num_samples must be at least 1, got 0"),
            (10, (), "missing_rates must hold one rate per modality, got none"),
            (10, (0.0, 1.0), r"missing_rates must be in \[0, 1\), got 1.0 for modality 1"),
            (10, (-0.1, 0.5), r"missing_rates must be in \[0, 1\), got -0.1 for modality 0"),
            (10, (float("nan"), 0.5), r"missing_rates must be in \[0, 1\), got nan"),
            (4, (0.0, 0.9), r"missing_rates\[1\] = 0.9 leaves modality 1 in none of 4 samples"),
            (100, (0.8, 0.8, 0.8), r"missing_rates \[0.8, 0.8, 0.8\] leave 60 images for 100 samples"),
        ],
    )
    def test_errors(self, num_samples: int, rates: tuple[float, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            simulate_presence(num_samples, rates, seed=0)


class TestMissingRates:
    def test_values(self) -> None:
        presence = [[1, 0, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]]
        assert missing_rates(presence).tolist() == [0.0, 0.8, 0.8]

    def test_of_a_simulation(self) -> None:
        rates = (0.2, 0.4, 0.6, 0.8)
        np.testing.assert_allclose(missing_rates(simulate_presence(100, rates, seed=0)), rates)

    @pytest.mark.parametrize("presence", [[True, False], np.zeros((0, 3)), np.zeros((3, 0))])
    def test_errors(self, presence: list[bool] | np.ndarray) -> None:
        with pytest.raises(ValueError, match=r"presence must be \[N, M\]"):
            missing_rates(presence)


class TestJson:
    def test_round_trip(self, tmp_path: Path) -> None:
        presence = simulate_presence(9, (0.2, 0.5, 0.5, 0.7), seed=0)
        cases = [f"case {index} \u00e4" for index in range(9)]
        write_presence(tmp_path / "presence.json", cases, presence, modalities=MODALITIES)
        back = read_presence(tmp_path / "presence.json", MODALITIES)
        assert list(back) == cases
        np.testing.assert_array_equal(np.stack(list(back.values())), presence)

    def test_content(self, tmp_path: Path) -> None:
        write_presence(tmp_path / "p.json", ["x", "y"], torch.tensor([[1, 0], [1, 1]]), modalities=("a", "b"))
        content = json.loads((tmp_path / "p.json").read_text())
        assert content == {"modalities": ["a", "b"], "cases": {"x": [1, 0], "y": [1, 1]}}

    def test_read_in_another_order(self, tmp_path: Path) -> None:
        write_presence(tmp_path / "p.json", ["x"], [[1, 0, 0, 1]], modalities=MODALITIES)
        assert read_presence(tmp_path / "p.json", ("d", "c", "a", "b"))["x"].tolist() == [True, False, True, False]

    @pytest.mark.parametrize(
        ("name", "case_ids", "presence", "message"),
        [
            ("p.csv", ["x"], [[1, 0]], "path must end in .json"),
            ("p.json", ["x", "x"], [[1, 0], [1, 0]], "2 different ids.*got 2 ids of which 1 are different"),
            ("p.json", ["x"], [[1, 0], [1, 0]], "2 different ids.*got 1 ids"),
            ("p.json", ["x"], [[0, 0]], "row 0 has none"),
        ],
    )
    def test_write_errors(
        self, tmp_path: Path, name: str, case_ids: list[str], presence: list[list[int]], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            write_presence(tmp_path / name, case_ids, presence, modalities=("a", "b"))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "cannot be read as JSON"),
            ('{"modalities": ["a", "b"], "cases": {"x": [1, 0], "x": [0, 1]}}', "'x' is there twice"),
            ("[]", "must hold"),
            ('{"modalities": ["a", "b"]}', "must hold"),
            ('{"modalities": ["a", "c"], "cases": {"x": [1, 0]}}', r"\['a', 'c'\], expected \['a', 'b'\]"),
            ('{"modalities": ["a", "b"], "cases": {"x": [1]}}', "case 'x': expected 2 entries"),
            ('{"modalities": ["a", "b"], "cases": {"x": "10"}}', "case 'x': expected 2 entries"),
            ('{"modalities": ["a", "b"], "cases": {"x": [1, 2]}}', "case 'x': entries must be 0 or 1"),
            ('{"modalities": ["a", "b"], "cases": {"x": [0, 0]}}', "case 'x': the case has no modality"),
        ],
    )
    def test_read_errors(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            read_presence(tmp_path / "p.json", ("a", "b"))
        assert "p.json" in str(error.value)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"p\.json does not exist"):
            read_presence(tmp_path / "p.json", MODALITIES)

    def test_unknown_suffix(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"must end in .json or .csv"):
            read_presence(tmp_path / "p.txt", MODALITIES)


class TestCsv:
    """The authors' split files. In them pos_mask_ids lists all combinations that the sample could be reduced to."""

    def write(self, folder: Path, rows: str, header: str = CSV_HEADER) -> Path:
        path = folder / "split.csv"
        path.write_bytes((header + rows).encode())
        return path

    def test_values(self, tmp_path: Path) -> None:
        rows = 'HG_1,10,"[True, True, True, False]","[1, 2, 3, 5, 6, 9, 10]"\r\n'
        rows += 'LG_2,2,"[False, False, True, False]",[2]\r\n'
        presence = read_presence(self.write(tmp_path, rows), MODALITIES)
        assert {case: row.tolist() for case, row in presence.items()} == {
            "HG_1": [True, True, True, False],
            "LG_2": [False, False, True, False],
        }

    def test_order_and_prefixes(self, tmp_path: Path) -> None:
        path = self.write(
            tmp_path, 'HG_LG_1,9,"[True, True, False, False]","[1, 3, 9]"\n2,2,"[False,False,True,False]",[2]\n'
        )
        presence = read_presence(path, MODALITIES, csv_modalities=("d", "b", "a", "c"), csv_prefixes=("LG_", "HG_"))
        assert presence["LG_1"].tolist() == [False, True, False, True]
        assert presence["2"].tolist() == [True, False, False, False]

    def test_byte_order_mark(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, '1,2,"[False, False, True, False]",[2]\n', header="\ufeff" + CSV_HEADER)
        assert list(read_presence(path, MODALITIES)) == ["1"]

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (
                "__import__('os').getcwd()",
                r"line 3, case 'y': mask must look like \[True, False, ...\], got .__import__",
            ),
            ("[True, False, 1, True]", "line 3, case 'y': mask must look like"),
            ("[True, True, True]", "line 3, case 'y': expected 4 entries"),
            ("[False, False, False, False]", "line 3, case 'y': the case has no modality"),
            ("", "line 3, case 'y': mask must look like"),
        ],
    )
    def test_mask_errors(self, tmp_path: Path, mask: str, message: str) -> None:
        path = self.write(tmp_path, f'x,2,"[False, False, True, False]",[2]\r\ny,0,"{mask}",[0]\r\n')
        with pytest.raises(ValueError, match=message) as error:
            read_presence(path, MODALITIES)
        assert "split.csv" in str(error.value)

    @pytest.mark.parametrize(
        ("header", "rows", "message"),
        [
            ("name,mask\n", "x,[True]\n", r"columns data_name and mask, got \['name', 'mask'\]"),
            ("", "", "columns data_name and mask, got None"),
            (CSV_HEADER, "x\n", "line 2, case 'x': mask must look like .* got None"),
            (CSV_HEADER, 'x,0,"[True, True, True, True]",[0]\n' * 2, "line 3, case 'x': the case is there twice"),
        ],
    )
    def test_table_errors(self, tmp_path: Path, header: str, rows: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_presence(self.write(tmp_path, rows, header), MODALITIES)

    def test_other_modalities(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "")
        with pytest.raises(ValueError, match=r"modalities \('a', 'b'\), expected \['a', 'b', 'c', 'd'\]"):
            read_presence(path, MODALITIES, csv_modalities=("a", "b"))


def test_a_presence_file_may_have_its_extension_in_capitals(tmp_path: Path) -> None:
    write_presence(tmp_path / "p.json", ["x"], [[1, 0]], modalities=("a", "b"))
    (tmp_path / "p.json").rename(tmp_path / "p.JSON")
    assert read_presence(tmp_path / "p.JSON", ("a", "b"))["x"].tolist() == [True, False]
