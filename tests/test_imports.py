"""How the modules of the package build on each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from pydoc import locate

import pytest

PACKAGE = Path(__file__).parents[1] / "passion_monai"
MODULES = {
    ".".join([PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a module names, for types and within functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield from {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES) or {node.module}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (
            "passion_monai.evaluation.metrics.CombinationDiceMetric",
            "passion_monai.evaluation.dice.CombinationDiceMetric",
        ),
        ("passion_monai.distillation.DistillationOutput", "passion_monai.passes.DistillationOutput"),
        ("passion_monai.evaluation.runs.write_run", "passion_monai.run_record.write_run"),
        ("passion_monai.evaluation.runs.trained_settings", "passion_monai.run_record.trained_settings"),
        ("passion_monai.transforms.LoadCased", "passion_monai.transforms.loading.LoadCased"),
        ("passion_monai.transforms.SaveSegmentationd", "passion_monai.transforms.writing.SaveSegmentationd"),
    ],
)
def test_what_configurations_name_is_found_where_it_was(before: str, now: str):
    assert locate(before) is locate(now) is not None


def test_no_module_needs_itself_in_a_roundabout_way():
    graph = {name: {*imported(path)} for name, path in MODULES.items()}
    assert graph["passion_monai.losses.pixel"] >= {"passion_monai.passes", "passion_monai.losses.columns"}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")
