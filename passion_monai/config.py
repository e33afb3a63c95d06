"""What bundle configurations need beyond MONAI's language."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["check_choice", "check_switches", "find_bundle_root"]


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse anything but the choices for an id of a configuration.

    Raises:
        ValueError: naming the id, the choices and what it was given.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}.")


def check_switches(**switches: object) -> None:
    """Refuse anything but True and False for the ids of a configuration that turn something on or off.

    The command line takes ``--resume false`` for the text "false", which would count as true.

    Raises:
        ValueError: naming the id and what it was given.
    """
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False (with a capital on the command line), got {value!r}.")


def find_bundle_root(name: str) -> str:
    """Absolute path of the bundle `name`, wherever the command is run from.

    MONAI does not tell a configuration where it lies, and its usual default, the working directory, scatters output.
    Looked at are, in this order: the configuration files named on the command line, the working directory, and in
    there ``name`` and ``bundles/name``.

    Raises:
        FileNotFoundError: when none of them is the bundle.
    """
    words = [word for argument in sys.argv for word in argument.removeprefix("--config_file=").split(",")]
    named = [Path(word.strip("[]'\" ")) for word in words]
    configs = [path.resolve() for path in named if path.suffix in (".yaml", ".yml", ".json")]
    here = Path.cwd()
    for folder in [*(path.parent.parent for path in configs), here, here / name, here / "bundles" / name]:
        if folder.name == name and (folder / "configs" / "metadata.json").is_file():
            return str(folder)
    raise FileNotFoundError(f"The folder of the bundle {name} was not found from {here}; give it as --bundle_root.")
