"""Writes a table of what can be set in each workflow of the bundles, from the comments of their configurations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

BUNDLES = Path(__file__).parents[1] / "bundles"
WORKFLOWS = {"train": "Training", "evaluate": "Evaluation", "inference": "Inference"}
LINE = re.compile(r"(?P<id>[A-Za-z_]+):(?: (?P<default>[^#\s].*?))??(?: # (?P<comment>.*))?")


def settings(config: str) -> Iterator[tuple[str, str, str]]:
    """Id, comment and default of all that stands between the headings "Settings" and "Pipeline"."""
    above: list[str] = []
    for line in config.split(" Settings ")[1].split(" Pipeline ")[0].splitlines():
        if line.startswith("# ") and "----" not in line:
            above.append(line.removeprefix("# "))
        elif match := LINE.fullmatch(line):
            yield match["id"], " ".join([*above, match["comment"] or ""]).strip(), match["default"] or ""
            above = []
        elif not line.startswith(" "):
            above = []


def table(bundle: str, workflow: str) -> str:
    """The settings of a bundle's workflow, as Markdown."""
    config = (BUNDLES / bundle / "configs" / f"{workflow}.yaml").read_text(encoding="utf-8")
    rows = ["| id | | default |", "|---|---|---|"]
    for name, comment, default in settings(config):
        cells = (f"`{name}`", comment, f"`{default}`" if default else "")
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows)


def write(path: Path, bundle: str = "brats_mmformer_passion") -> None:
    """Write the page, if it is not what it should be."""
    introduction = (
        f"Every id that stands before the pipeline in the configurations of `{bundle}`; the other bundles differ in "
        "their data and their network. Each is set on the command line, as in `--epochs 100`."
    )
    parts = ["# What can be set", introduction]
    for workflow, title in WORKFLOWS.items():
        parts += [f"## {title}", table(bundle, workflow)]
    text = "\n\n".join(parts) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
