from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from passion_monai.evaluation.score_files import ScoreFiles

COLUMNS = {"scores.csv": ("case", "dice"), "calibration.csv": ("case", "ece")}


def make_files(folder: Path, **settings: Any) -> ScoreFiles:
    return ScoreFiles(folder, columns=COLUMNS, settings={"section": "test", "spacing": (1.0, 2.0), **settings})


def write(files: ScoreFiles, *cases: str) -> None:
    for case in cases:
        scores = [{"case": case, "dice": 1 / 3}, {"case": case, "dice": float("nan")}]
        files.append(case, {"scores.csv": scores, "calibration.csv": [{"case": case, "ece": 0.1}]})


def texts(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in (*COLUMNS, "scores.json")]


def test_goes_on_with_complete_cases(tmp_path: Path):
    whole = make_files(tmp_path / "whole")
    whole.start()
    write(whole, "001", "b,c", "d")

    part = make_files(tmp_path / "part")
    part.start()
    write(part, "001", "b,c")
    with (tmp_path / "part" / "scores.csv").open("a") as file:
        file.write('d,0.3333333333333333\n"d')  # killed while it wrote
    again = make_files(tmp_path / "part")
    assert again.complete_cases() == ["001", "b,c"]
    again.start(keep={"001", "b,c"})
    write(again, "d")
    assert texts(tmp_path / "part") == texts(tmp_path / "whole")
    assert not list((tmp_path / "part").glob(".unfinished*"))


def test_keeps_only_what_is_asked_for(tmp_path: Path):
    files = make_files(tmp_path)
    files.start()
    write(files, "a", "b")
    make_files(tmp_path).start(keep={"b", "z"})
    assert json.loads((tmp_path / "scores.json").read_text())["cases"] == ["b"]
    assert [text.splitlines()[1][0] for text in texts(tmp_path)[:2]] == ["b", "b"]
    make_files(tmp_path).start()
    assert texts(tmp_path)[0] == "case,dice\n"


def test_other_settings_count_for_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    files = make_files(tmp_path)
    files.start()
    write(files, "a")
    with caplog.at_level(logging.WARNING):
        assert make_files(tmp_path).complete_cases() == ["a"]
        assert not caplog.records
        assert make_files(tmp_path, section="validation", more=1).complete_cases() == []
    assert "again, because the settings ['section', 'more'] have changed" in caplog.text


@pytest.mark.parametrize("name", ["scores.csv", "calibration.csv", "scores.json"])
def test_without_one_of_the_files_there_is_nothing(tmp_path: Path, name: str):
    files = make_files(tmp_path)
    files.start()
    write(files, "a")
    (tmp_path / name).unlink()
    assert make_files(tmp_path).complete_cases() == []


def test_rows_reach_the_disk_before_the_record_that_names_their_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files, fsync = make_files(tmp_path), os.fsync
    files.start()
    there: list[tuple[int, int]] = []

    def note(descriptor: int) -> None:
        rows = sum((tmp_path / name).read_text().count("\n") for name in COLUMNS)
        there.append((rows, len(json.loads((tmp_path / "scores.json").read_text())["cases"])))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write(files, "a")
    assert there[:2] == [(4, 0), (5, 0)]
