"""The tutorials run, and the outputs that they were committed with are fit to be shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.ipynb"))
ABSOLUTE_PATH = re.compile(r"(?<![\w.)\]}<])/[A-Za-z_][\w.-]*/|\b[A-Z]:\\")

for_each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook: nbformat.NotebookNode) -> Iterator[str]:
    for cell in code_cells(notebook):
        for output in cell.outputs:
            yield output.get("text", "")
            yield from (str(content) for kind, content in output.get("data", {}).items() if kind.startswith("text/"))


@for_each_notebook
def test_a_committed_notebook_was_run_from_start_to_end(path: Path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"]


@for_each_notebook
def test_a_committed_notebook_is_small_and_tells_nothing_of_the_machine(path: Path):
    assert path.stat().st_size < 1_000_000
    assert not [text for text in texts(nbformat.read(path, as_version=4)) if ABSOLUTE_PATH.search(text)]


@pytest.mark.slow
@for_each_notebook
def test_a_notebook_runs(path: Path, tmp_path: Path):
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
