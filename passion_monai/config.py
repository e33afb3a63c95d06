"""What bundle configurations need beyond MONAI's language: the path of the bundle, and checks of user settings."""

from __future__ import annotations

import difflib
import inspect
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import monai.bundle
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, ReferenceResolver
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS, DEFAULT_HANDLERS_ID

__all__ = [
    "check_calibrated",
    "check_choices",
    "check_device",
    "check_flips",
    "check_ids",
    "check_numbers",
    "check_paths",
    "check_switches",
    "find_bundle_root",
    "similar_id",
]


def check_switches(**switches: object) -> None:
    """Refuse anything but True and False for the ids of a configuration that turn something on or off.

    On the command line, ``--resume false`` gives the text "false", which would count as true.

    Raises:
        ValueError: naming the id and what it was given.
    """
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False (with a capital on the command line), got {value!r}.")


def check_calibrated(*, calibrated: object, **shown: object) -> None:
    """Refuse `calibrated` when no output would show its effect.

    Args:
        calibrated: the id to check.
        shown: the id that writes the calibrated output.

    Raises:
        ValueError: when `calibrated` is not a bool, or is on while the other id is off.
    """
    check_switches(calibrated=calibrated)
    for name, value in shown.items():
        if calibrated and not value:
            raise ValueError(f"calibrated True has no effect with {name} False; set {name} True.")


def check_flips(*, flip_test: object, flip_axes: Sequence[int]) -> None:
    """Refuse `flip_test` when there is no axis to flip.

    Raises:
        ValueError: when `flip_test` is not a bool, or is on while there is no axis.
    """
    check_switches(flip_test=flip_test)
    if flip_test and not flip_axes:
        raise ValueError("flip_test needs axes to flip along: flip_axes must not be empty, got [].")


def check_choices(allowed: Sequence[str], **choices: object) -> None:
    """Refuse a value that is not one of the allowed names.

    Raises:
        ValueError: naming the id, what is allowed and what it was given.
    """
    for name, value in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")


def check_paths(**paths: object) -> None:
    """Refuse anything but text and None for ids that are files or folders.

    On the command line, ``--output_dir 2020`` gives a number.

    Raises:
        ValueError: naming the id and what it was given.
    """
    for name, value in paths.items():
        if value is not None and not isinstance(value, (str, Path)):
            raise ValueError(f"{name} must be a path, got {value!r}; what looks like a number is a path as ./{value}.")


def check_device(device: str | torch.device) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ValueError: naming the device and why it cannot be used.
    """
    try:
        torch.empty(0, device=device)
    # torch raises AssertionError where it was built without the device.
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be cpu, cuda, cuda:1 or the like, got {device!r}: {reason}") from error
    if torch.device(device).type == "mps":
        raise ValueError("device must not be mps, Apple's GPU, which lacks float64: use --device cpu.")


def check_numbers(
    minimum: float, *, below: float = math.inf, whole: bool = False, length: int | None = None, **numbers: object
) -> None:
    """Refuse values that are not numbers, or out of range, for ids that are numbers or lists of numbers.

    Args:
        minimum: smallest allowed value.
        below: exclusive upper limit.
        whole: allow whole numbers only.
        length: required length of each list; None for single numbers.
        numbers: the values by id.

    Raises:
        ValueError: naming the id, what is allowed and what it was given.
    """
    kind = f"{'whole number' if whole else 'number'} of at least {minimum:g}"
    kind += f" and below {below:g}" if below < math.inf else ""
    for name, value in numbers.items():
        parts = [value] if length is None else value
        if not isinstance(parts, (list, tuple)) or len(parts) != (length or 1):
            raise ValueError(f"{name} must be a list of {length}, each a {kind}, got {value!r}.")
        for part in parts:
            if isinstance(part, str) and _is_scientific(part):
                raise ValueError(f"{name} is the text {part!r}: YAML takes it for a number if written like 1.0e-4.")
            if not _is_number(part, whole) or not minimum <= part < below:
                raise ValueError(f"{name} must be a {kind}, got {value!r}.")


def _is_number(value: object, whole: bool) -> bool:
    return isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)


def _is_scientific(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "e" in text.lower()


def check_ids(config: str) -> None:
    """Refuse unknown ids in the running configuration, such as misspelt ones.

    MONAI accepts any id: ``--epoch 3`` instead of ``epochs`` adds an unused id and does not change the training. An id
    is known if the workflow's own file has it. Any other id, from the command line, Python or further files, must be
    referred to as ``@id``, or be the one that is run. Arguments of an object are left to that object to check.

    Args:
        config: the workflow's file; the folder of the run's first file is searched too.

    Raises:
        FileNotFoundError: when the file is in neither place.
        ValueError: naming the ids and, for each, the file that has it or the most similar id.
    """
    workflow = _running_workflow()
    if workflow is None:
        return
    path = next(
        (path for path in (workflow.config_root_path / Path(config).name, Path(config)) if path.is_file()), None
    )
    if path is None:
        raise FileNotFoundError(f"{config} does not exist; give the folder of the bundle as --bundle_root.")
    known = ConfigParser.load_config_file(str(path))
    content: dict[str, Any] = workflow.parser.config  # type: ignore[assignment]
    if workflow.run_id not in content:
        raise ValueError(f"There is nothing called {workflow.run_id} to run ({_hint(workflow.run_id, known, path)}).")
    used = _references(content) | {workflow.run_id, workflow.init_id, workflow.final_id, *_ids_of_monai()}
    unknown = list(_unused(content, known, used))
    if unknown:
        raise ValueError(
            f"Unknown ids: {', '.join(f'{name} ({_hint(name, known, path)})' for name in unknown)}. Known are those of "
            f"{path}; an id of your own must be referred to as @id."
        )


def _running_workflow() -> ConfigWorkflow | None:
    """The workflow that evaluates the expression from which this is called; MONAI gives no other access to it."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, ConfigWorkflow):
            return caller
        frame = frame.f_back
    return None


def _ids_of_monai() -> set[str]:
    """What MONAI adds by itself; its federated client gives the run a name whether there is a tracking or not."""
    all_settings: Iterable[Any] = DEFAULT_EXP_MGMT_SETTINGS.values()
    tracking = {name for settings in all_settings for name in settings["configs"]}
    return tracking - DEFAULT_HANDLERS_ID.keys() | {ConfigParser.meta_key}


def _references(config: Any) -> set[str]:
    """All ids that a configuration refers to."""
    if isinstance(config, str):
        return set(ReferenceResolver.match_refs_pattern(config))
    parts = config.values() if isinstance(config, dict) else config if isinstance(config, list) else ()
    return set().union(*map(_references, parts))


def _unused(content: Mapping[str, Any], known: Mapping[str, Any], used: set[str], section: str = "") -> Iterator[str]:
    """The ids that are neither known nor used, of a configuration or of a section like ``train``."""
    for name, value in content.items():
        full = f"{section}{name}"
        if full in used:
            continue
        parts = known.get(name, {})
        is_section = isinstance(value, dict) and isinstance(parts, dict) and "_target_" not in value
        if is_section and (name in known or any(other.startswith(f"{full}::") for other in used)):
            yield from _unused(value, parts, used, f"{full}::")
        elif name not in known:
            yield full


def _hint(unknown: str, known: Mapping[str, Any], path: Path) -> str:
    # train.yaml comes before its overlays, which repeat some of its ids.
    for other in sorted(path.parent.glob("*.yaml"), reverse=True):
        if other != path and unknown in ConfigParser.load_config_file(str(other)):
            return f"it is an id of {other.name}"
    sections = [f"{name}::{part}" for name, value in known.items() if isinstance(value, dict) for part in value]
    return similar_id(unknown, [*known, *sections, *inspect.signature(monai.bundle.run).parameters])


def similar_id(unknown: str, known: Iterable[str]) -> str:
    """What an unknown id may have been meant to be, in words."""
    similar = difflib.get_close_matches(unknown, list(known), n=1)
    return f"did you mean {similar[0]}?" if similar else "nothing is called like it"


def find_bundle_root(name: str) -> str:
    """Absolute path of the bundle `name`, wherever the command is run from.

    MONAI does not tell a configuration its own path, and its default, the working directory, scatters output. This
    searches, in this order, beside the configuration files of the running workflow, beside those named on the command
    line, in the working directory, and in its subfolders ``name`` and ``bundles/name``.

    Raises:
        FileNotFoundError: when none of these is the bundle.
    """
    words = [word for argument in sys.argv for word in argument.removeprefix("--config_file=").split(",")]
    named = [Path(word.strip("[]'\" ")) for word in words]
    configs = [path.resolve() for path in named if path.suffix in (".yaml", ".yml", ".json")]
    workflow = _running_workflow()
    running = [] if workflow is None else [workflow.config_root_path.resolve().parent]
    here = Path.cwd()
    for folder in [*running, *(path.parent.parent for path in configs), here, here / name, here / "bundles" / name]:
        if folder.name == name and (folder / "configs" / "metadata.json").is_file():
            return str(folder)
    raise FileNotFoundError(f"The folder of the bundle {name} was not found from {here}; give it as --bundle_root.")
