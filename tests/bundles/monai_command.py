"""`python -m monai.bundle`, in processes forked from one that has imported what all commands need.

An import takes longer than most of the commands that are tested.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
IMPORTS = """
monai.bundle monai.engines monai.handlers
passion_monai.distillation passion_monai.evaluation.metrics passion_monai.handlers passion_monai.losses
passion_monai.networks passion_monai.transforms
"""
PROCESSES.set_forkserver_preload(IMPORTS.split())
TIMEOUT = 600


def run_command(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run it with the words that follow it, in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = PROCESSES.Process(target=_command, args=(words, cwd, outputs))
        process.start()
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, TIMEOUT)
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in outputs))


def printed(result: subprocess.CompletedProcess[str]) -> str:
    """All that a command printed; it must have succeeded."""
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-12000:]
    return result.stdout + result.stderr


def _command(words: list[str], cwd: Path, outputs: list[Path]) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        with path.open("w") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(cwd)
    os.environ["MONAI_FAIL_ON_DUPLICATE_CONFIG"] = "1"
    warnings.simplefilter("ignore")
    sys.argv[1:] = words
    try:
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
    except Exception:  # noqa: BLE001 - whatever ends it
        sys.excepthook(*sys.exc_info())  # as Python does by itself, and multiprocessing does not
        sys.exit(1)
