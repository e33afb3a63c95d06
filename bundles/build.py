"""Makes the bundles' `configs/*.yaml` by concatenating YAML fragments: `python bundles/build.py [--check]`.

Every bundle folder holds a `bundle.yaml` with what is its own; `_shared/` holds the rest. With --check nothing is
written, and the exit code is 1 when a committed file is not what its fragments make.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent
SHARED = ROOT / "_shared"
WORKFLOWS = {
    "train": "Trains one network on incomplete cases. Run it, from anywhere, with",
    "evaluate": "Scores every modality combination on complete cases. Run it, from anywhere, with",
    "inference": "Segments patients, whatever modalities they have. Run it, from anywhere, with",
}


def compose(bundle: Path, workflow: str) -> str:
    """The text of one configuration file.

    Raises:
        ValueError: when two fragments have the same top-level key.
    """
    run_id = "training " if workflow == "train" else ""
    banner = (
        f"# {WORKFLOWS[workflow]}\n"
        f"#   python -m monai.bundle run {run_id}--config_file bundles/{bundle.name}/configs/{workflow}.yaml "
        "--dataset_dir <folder>\n"
        "# Every id below can be overridden in the same way. Made from fragments by `make bundles`: do not edit.\n"
    )
    fragments = [bundle / "bundle.yaml", SHARED / "common.yaml", SHARED / f"{workflow}.yaml"]
    owner: dict[str, Path] = {}
    for fragment in fragments:
        for key in yaml.safe_load(fragment.read_text(encoding="utf-8")):
            if key in owner:
                raise ValueError(f"{fragment} and {owner[key]} both have the key {key!r}; one of them must go.")
            owner[key] = fragment
    return "\n".join([banner, *(fragment.read_text(encoding="utf-8") for fragment in fragments)])


def configurations() -> Iterator[tuple[Path, str]]:
    """Path and text of every configuration file of every bundle."""
    for source in sorted(ROOT.glob("*/bundle.yaml")):
        for workflow in WORKFLOWS:
            yield source.parent / "configs" / f"{workflow}.yaml", compose(source.parent, workflow)


def main() -> int:
    """Write the files, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare, write nothing")
    check = parser.parse_args().check
    stale = [(path, text) for path, text in configurations() if not path.is_file() or path.read_text("utf-8") != text]
    for path, text in stale:
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        print(f"{'differs from its fragments' if check else 'written'}: {path.relative_to(ROOT.parent)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
