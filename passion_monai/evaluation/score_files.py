"""Score files that grow case by case, so that an interrupted evaluation can continue."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from passion_monai.files import complete_file, make_folder, writing

__all__ = ["ScoreFiles"]

logger = logging.getLogger(__name__)


class ScoreFiles:
    """CSV files with rows for each case, and ``scores.json``, which says for which cases they are complete.

    ``scores.json`` lists a case once all its rows are written, so incomplete rows of a killed run do not count. It also
    holds the settings; scores from other settings do not count either.

    Args:
        folder: of the files; it is made.
        columns: those of each CSV file by its name; ``case`` is one of them.
        settings: all that decides on the scores, for JSON.
    """

    def __init__(
        self, folder: str | Path, *, columns: Mapping[str, Sequence[str]], settings: Mapping[str, Any]
    ) -> None:
        self.folder = Path(folder)
        self.columns = dict(columns)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings, default=str))  # as they will be read back
        self.cases: list[str] = []

    @property
    def record_path(self) -> Path:
        """The file of settings and complete cases."""
        return self.folder / "scores.json"

    def complete_cases(self) -> list[str]:
        """Cases of an earlier run with the same settings; a warning says in what settings one differs."""
        if not all(path.is_file() for path in (self.record_path, *map(self.folder.joinpath, self.columns))):
            return []
        record = json.loads(self.record_path.read_text(encoding="utf-8"))
        names = {**record["settings"], **self.settings}
        changed = [name for name in names if record["settings"].get(name) != self.settings.get(name)]
        if changed:
            logger.warning(f"Scoring all cases in {self.folder} again, because the settings {changed} have changed.")
        return [] if changed else list(record["cases"])

    def start(self, keep: Collection[str] = ()) -> None:
        """Begin to write, keeping the rows of some complete cases."""
        make_folder(self.folder)
        self.cases = [case for case in self.complete_cases() if case in keep] if keep else []
        for name, columns in self.columns.items():
            rows = _read_rows(self.folder / name, self.cases) if self.cases else []
            _replace(self.folder / name, pd.DataFrame(rows, columns=list(columns)).to_csv(index=False))
        self._write_record()

    def append(self, case: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Write a case's rows for each file.

        Raises:
            OSError: when they cannot be written, with the path and the remedy; the case is then none that is complete.
        """
        for name, columns in self.columns.items():
            frame = pd.DataFrame(rows[name], columns=list(columns))
            path = self.folder / name
            with writing(path), path.open("a", newline="", encoding="utf-8") as file:
                frame.to_csv(file, header=False, index=False)
                file.flush()
                os.fsync(file.fileno())  # before the record names the case, lest a power cut leave the name alone
        self.cases.append(case)
        self._write_record()

    def _write_record(self) -> None:
        record = {"settings": self.settings, "cases": self.cases}
        _replace(self.record_path, json.dumps(record, indent=2) + "\n")


def _read_rows(path: Path, cases: Collection[str]) -> list[dict[str, str]]:
    """The rows of some cases, as text, so that no number changes."""
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["case"] in cases]


def _replace(path: Path, text: str) -> None:
    with complete_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="")
