"""What runs were: ``run.json`` and ``presence.json`` in their folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from passion_monai.datasets.datalist import datalist_presence
from passion_monai.datasets.phantom import is_phantom
from passion_monai.files import complete_file
from passion_monai.presence import write_presence

__all__ = ["write_run"]


def write_run(
    output_dir: str | Path,
    *,
    bundle: str,
    cases: Sequence[Mapping[str, Any]],
    modalities: Sequence[str],
    settings: Mapping[str, Any],
) -> None:
    """Write ``run.json``, what a training was, and ``presence.json``, which training case has which modality.

    A training that is resumed writes them again, the same as before.

    Args:
        output_dir: folder of the run.
        bundle: folder of the bundle, whose name is kept.
        cases: the training cases; of one that is there slice by slice, any slice says what it has.
        modalities: names of the M modalities.
        settings: whatever else there is to say of the run, for JSON.
    """
    folder = Path(output_dir)
    phantom = is_phantom(cases[0]["label"])
    record = {"bundle": Path(bundle).name, "modalities": list(modalities), "phantom": phantom, **settings}
    with complete_file(folder / "run.json") as unfinished:
        unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    by_id = {case["case"]: dict(case) for case in cases}
    presence = datalist_presence(list(by_id.values()), modalities)
    write_presence(folder / "presence.json", list(by_id), presence, modalities=modalities)
