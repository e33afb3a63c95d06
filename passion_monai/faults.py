"""Cases that cannot be used: all of them are found and named, and none of them stops the others.

A case or sample with the key ``fault`` is such a case; under the key stands what is wrong with it, in words.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.data import Dataset
from monai.engines import SupervisedEvaluator

from passion_monai.errors import causes
from passion_monai.files import complete_file, make_folder

__all__ = ["FAULT_KEY", "Fault", "FaultReport", "TolerantDataset", "explain", "find_fault", "raise_faults"]

logger = logging.getLogger(__name__)

FAULT_KEY = "fault"
_DEAD_WORKER = "DataLoader worker"  # torch raises it at once, in whatever the main process does
_REMEDIES = {
    _DEAD_WORKER.lower(): "A process that loads cases was ended, often for lack of memory: try fewer num_workers, or "
    "more shared memory for a container. ",
    "memory": "Try a smaller batch_size or roi_size, or activation_checkpointing. ",
}
"""What may help where an error has the text."""


class Fault(NamedTuple):
    """A case that cannot be used.

    Attributes:
        case: its id.
        file: the file that is the reason; empty where it is none, or not a single one.
        reason: what is wrong and what to do, in words.
    """

    case: str
    file: str
    reason: str


def find_fault(case: Mapping[Hashable, Any], error: BaseException) -> Fault:
    """Describe an error that a transform or the network raised for a case."""
    while "applying transform" in str(error) and error.__cause__ is not None:
        error = error.__cause__  # MONAI's Compose wraps what its transforms raise
    name = str(case.get("case"))
    reason = str(error) if str(error).startswith("Case ") else f"Case {name}: {type(error).__name__}: {error}"
    if isinstance(error, MemoryError):
        reason += " It needs more memory than there is; fewer num_workers leave more for each."
    if isinstance(error, torch.OutOfMemoryError):
        reason += " Try a smaller window_batch_size or roi_size, or the CPU."
    named = [value for key, value in case.items() if key != "case" and isinstance(value, str) and value in reason]
    return Fault(name, max(named, key=len, default=""), reason)


def explain(error: Exception) -> str:
    """What ended a whole run and, where something is known that may help, that; with a blank to go on after."""
    named = f"{type(error).__name__}: {error}".lower()
    remedy = next((remedy for text, remedy in _REMEDIES.items() if text in named), "")
    return f"{str(error) or type(error).__name__} {remedy}"


def raise_faults(
    faults: Iterable[Fault],
    *,
    others: Sequence[str] = (),
    outcome: str = "Mend or remove these; nothing was computed yet.",
) -> None:
    """Name all cases that cannot be used in one error; what is the same for several samples of a case comes once.

    Args:
        faults: of the cases.
        others: what is wrong with all cases together, in words.
        outcome: what follows, in words.

    Raises:
        ValueError: when there is a fault, or something else is wrong.
    """
    different = list(dict.fromkeys(faults))
    count = len({fault.case for fault in different})
    cases = [f"{count} case(s) cannot be used:", *(fault.reason for fault in different)] if different else []
    if cases or others:
        raise ValueError("\n".join([*cases, *others, outcome]))


class TolerantDataset(Dataset):
    """MONAI's dataset, in which a case that fails is a sample with the fault instead of an error.

    So the loader, whose workers an error would end, goes on with the next case; :class:`FaultReport` takes note.

    Args:
        data: the cases; one may have the key ``fault`` already.
        transform: what makes samples of them, a :class:`monai.transforms.Compose`.
    """

    def _transform(self, index: int) -> Any:
        case = self.data[index]
        if FAULT_KEY in case:
            return {"case": case["case"], "file": "", FAULT_KEY: case[FAULT_KEY]}
        try:
            return super()._transform(index)
        except RuntimeError as error:
            fault = find_fault(case, error)
            return {"case": fault.case, "file": fault.file, FAULT_KEY: fault.reason}


class FaultReport:
    """Lets an evaluator go on after a case that failed, and names all such cases in the end.

    Give it to MONAI's evaluator as ``iteration_update``, over a loader of a :class:`TolerantDataset` with batches of
    one case, and run the evaluator by it. Failures of the network, and of what comes after it, count too; but a disk
    that cannot be written to, or the end of a process that loads cases, stops the run. For handlers, a case that failed
    is an empty batch.

    Args:
        path: CSV file with ``case``, ``file`` and ``reason``, written with every fault; there is none without faults.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.faults: list[Fault] = []

    def run(self, evaluator: SupervisedEvaluator) -> None:
        """Run an evaluator over all cases.

        Raises:
            ValueError: when there was a fault, naming all of them.
        """
        self.faults = []
        make_folder(self.path.parent)
        self.path.unlink(missing_ok=True)
        try:
            evaluator.run()
        except Exception as error:
            written = evaluator.state.iteration > 0
            go_on = "What was written before is complete; run the same command again." if written else ""
            logger.error(f"{explain(error)}{go_on}".rstrip())
            raise
        raise_faults(self.faults, outcome=f"These are listed in {self.path}; all other cases are complete.")
        logger.info(f"Done. The results are in {self.path.parent}.")

    def __call__(self, engine: SupervisedEvaluator, batch: dict[str, Any]) -> Any:
        if FAULT_KEY in batch:
            return self._skip(engine, Fault(batch["case"][0], batch["file"][0], batch[FAULT_KEY][0]))
        try:
            return engine._iteration(engine, batch)
        except (MemoryError, RuntimeError, ValueError) as error:
            if any(isinstance(cause, OSError) for cause in causes(error)) or _DEAD_WORKER in str(error):
                raise
            return self._skip(engine, find_fault({"case": batch["case"][0]}, error))

    def _skip(self, engine: SupervisedEvaluator, fault: Fault) -> list[Any]:
        logger.error(f"Left out: {fault.reason}")
        self.faults.append(fault)
        with complete_file(self.path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([Fault._fields, *self.faults])
        engine.state.batch = []
        return []
