from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.loop import main


def test_the_parts_of_an_epoch_are_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = ["--cases", "4", "--shape", "40", "40", "40", "--spacing", "5", "--size", "16", "--workers", "0"]
    words += ["--epochs", "1", "--history", "2000", "--settings", '{"network_def::width": 4}']
    words += ["--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["loop", *words])
    main()
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["epoch_seconds"] > 0
    assert {"steps", "TrainingLog._write, EPOCH_COMPLETED", "waiting for data"} <= {*row["shares"]}
    assert sum(row["shares"].values()) == pytest.approx(1, abs=0.02)
    lines = (tmp_path / "workers_0" / "training.csv").read_text().splitlines()
    assert len(lines) == 1 + 2000 + 1
