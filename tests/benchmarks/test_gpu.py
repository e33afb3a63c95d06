from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import gpu


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *options: str) -> list[dict[str, object]]:
    monkeypatch.setattr("sys.argv", ["gpu", "--output", str(path), "--device", "cpu", "--small", *options])
    gpu.main()
    return rows(path)


def test_all_rows_are_there_when_time_is_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    written = run(monkeypatch, tmp_path / "gpu.jsonl", "--seconds", "0")
    kinds = Counter((row["kind"], row.get("form")) for row in written)
    expected = {("step", "sparse"): 4, ("step", "dense"): 2, ("volume", None): 4, ("data", None): 1}
    assert kinds == {**expected, **{("step", form): 4 for form in ("batched", "graph", "compiled")}}
    assert {row["error"] for row in written} == {"TimeoutError: out of time"}
    assert all(str(row["card"]).startswith("no card") for row in written)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.usefixtures("bfloat16")
def test_every_row_has_numbers_or_says_why_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    *tasks, _, _, _ = gpu.tasks(small=True)  # with one that compiles, for minutes
    monkeypatch.setattr(gpu, "tasks", lambda **_: tasks)
    written = run(monkeypatch, tmp_path / "gpu.jsonl", "--row_seconds", "90")
    assert len(written) == len(tasks)
    for row in written:
        if row.get("form") == "graph":
            assert row["error"] == "ValueError: a CUDA graph needs a card, and this is a cpu"
        elif row.get("form") == "compiled":
            assert row.get("error", "TimeoutError: out of time") == "TimeoutError: out of time"
            assert ("error" in row) != ("seconds" in row)
        else:
            assert "error" not in row
            assert row["kind"] == "data" or row["seconds"] > 0


@pytest.mark.slow
def test_a_row_of_each_kind_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    every = list(gpu.tasks(small=True))
    chosen = [next(task for task in every if task[0].get("form") == form) for form in ("sparse", "dense", None)]
    monkeypatch.setattr(gpu, "tasks", lambda **_: chosen)
    sparse, dense, volume = run(monkeypatch, tmp_path / "gpu.jsonl")
    assert sparse["seconds"] > 0
    assert 0 < sparse["share_of_convolutions"] < 1
    assert dense["seconds"] > 0
    assert volume["kind"] == "volume"
    assert volume["seconds"] > 0


def test_a_row_that_takes_too_long_does_not_take_the_time_of_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def compile_forever(_: object) -> dict[str, object]:
        try:
            time.sleep(60)
        except TimeoutError as error:
            raise RuntimeError("the compiler was ended") from error
        return {}

    rows_ = [({"kind": "a"}, compile_forever), ({"kind": "b"}, lambda _: {"seconds": 1.0})]
    monkeypatch.setattr(gpu, "tasks", lambda **_: rows_)
    stopped, measured = run(monkeypatch, tmp_path / "gpu.jsonl", "--row_seconds", "0.1")
    assert stopped["error"] == "TimeoutError: out of time"
    assert measured["seconds"] == 1.0


def test_a_row_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(_: object) -> dict[str, object]:
        raise RuntimeError("no memory\nmore about it")

    monkeypatch.setattr(gpu, "tasks", lambda **_: [({"kind": "a"}, fail), ({"kind": "b"}, lambda _: {"seconds": 1.0})])
    failed, measured = run(monkeypatch, tmp_path / "gpu.jsonl")
    assert failed["error"] == "RuntimeError: no memory"
    assert measured["seconds"] == 1.0
