"""The bundles, and a way to run them as users do: a new folder in bundles/ is tested because it is there."""

from __future__ import annotations

import copy
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from monai_command import printed, run_command

ROOT = Path(__file__).parents[2]
# Grids, cohorts and networks of a size that trains in seconds.
SMALL_GRIDS: dict[str, dict[str, Any]] = {
    "brats": {
        "roi_size": [32, 32, 32],
        "spacing": [6.0, 6.0, 6.0],
        "phantom": {"num_cases": 6, "shape": [32, 32, 32], "spacing": [6.0, 6.0, 6.0], "seed": 0},
    },
    "myops": {
        "roi_size": [32, 32],
        "spacing": [6.0, 6.0],
        "phantom": {"num_cases": 6, "shape": [40, 40, 3], "spacing": [5.0, 5.0, 10.0], "seed": 0},
    },
}
SMALL_NETWORKS: dict[str, dict[str, Any]] = {
    "mmformer": {"width": 2, "token_channels": 16, "num_heads": 2, "mlp_channels": 32},
    "rfnet": {"width": 4},
    "m2ftrans": {"width": 2, "num_heads": 2, "mlp_channels": 32},
    "fusionunet": {"width": 4},
}


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder, its parts, and its commands with the small settings."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def dataset(self) -> str:
        return self.name.split("_")[0]

    @property
    def small(self) -> dict[str, Any]:
        network = SMALL_NETWORKS.get(self.name.split("_")[1], {})
        grid = copy.deepcopy(SMALL_GRIDS[self.dataset])  # a configuration writes into what it is given
        return {"num_workers": 0, **grid, **{f"network_def::{name}": value for name, value in network.items()}}

    def config(self, *workflows: str) -> str:
        """The argument for one configuration file or several."""
        files = [str(self.folder / "configs" / f"{workflow}.yaml") for workflow in workflows]
        return files[0] if len(files) == 1 else str(files)

    def run(self, *workflows: str, cwd: Path = ROOT, **overrides: Any) -> subprocess.CompletedProcess[str]:
        """`python -m monai.bundle run` of one or several configuration files; None leaves an id as it is there."""
        command = ["run", "training"] if "train" in workflows else ["run"]
        given = {name: value for name, value in (self.small | overrides).items() if value is not None}
        return self.monai(*command, cwd=cwd, config_file=self.config(*workflows), **given)

    def monai(self, *words: str, cwd: Path = ROOT, **arguments: Any) -> subprocess.CompletedProcess[str]:
        """Any command of `python -m monai.bundle`."""
        options = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
        return run_command([*words, *options], cwd)

    def succeed(self, *workflows: str, **kwargs: Any) -> str:
        """What a run printed, which must not fail."""
        return printed(self.run(*workflows, **kwargs))


# One in 3-D and one in 2-D, for what would take too long on every bundle.
TWO_BUNDLES = ("brats_rfnet_passion", "myops_m2ftrans_passion")
BY_NAME = {path.parent.name: Bundle(path.parent) for path in sorted(ROOT.glob("bundles/*/bundle.yaml"))}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `two_bundles` are slow tests on the others."""
    for item in items:
        if item.get_closest_marker("two_bundles") and item.callspec.params["bundle"] not in TWO_BUNDLES:
            item.add_marker("slow")


@pytest.fixture(scope="session", params=BY_NAME)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """Every bundle, or those that a test asks for by name."""
    return BY_NAME[request.param]


@pytest.fixture(scope="session")
def one_bundle() -> Bundle:
    """A bundle, for what does not differ between them."""
    return BY_NAME["brats_mmformer_passion"]


@pytest.fixture(scope="session")
def trained(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a bundle that was trained for two epochs, stopped, and resumed for a third."""
    output_dir = tmp_path_factory.mktemp(bundle.name)
    log = bundle.succeed("train", cwd=output_dir, output_dir=output_dir, epochs=2, val_interval=1)
    assert "PHANTOM" in log
    bundle.succeed("train", output_dir=output_dir, epochs=3, val_interval=1, resume=True)
    return output_dir
