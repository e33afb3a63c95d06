"""Calibrated probabilities: one temperature for each combination of modalities, fitted on cases with labels.

C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, Sec. 4.2: all logits are divided by one number
T > 0, so that the most likely class stays what it is. A network is not equally sure with all combinations, hence a
number for each. Windows, flips and checkpoints are averages of probabilities, so their logarithms stand for the logits.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.transforms import MapTransform
from torch import Tensor

from passion_monai.evaluation.expected import checksum, evaluation_folder
from passion_monai.files import complete_file
from passion_monai.presence import combination_name, combinations
from passion_monai.transforms import resample_probabilities, seen_voxels

__all__ = ["FILE_NAME", "SampleVoxelsd", "TemperatureFit", "fit_temperature", "read_temperatures"]

logger = logging.getLogger(__name__)

FILE_NAME = "temperatures.json"
_LIMITS = (0.05, 20.0)
_LEAST = 1e-6  # a probability below, which float32 hardly tells from 0, counts as this: one voxel must not decide
_DIGITS = 4
_REMEDY = (
    "Fit them by the evaluate workflow, with its configuration and calibrate.yaml as --config_file "
    "\"['evaluate.yaml','calibrate.yaml']\", or leave calibrated False."
)


def fit_temperature(probabilities: Tensor, classes: Tensor) -> float:
    """The temperature that makes the labels most likely.

    ``T = argmin -mean_n log softmax_k(log(p[k, n]) / T)[classes[n]]``, which has one minimum, being convex in 1 / T.

    Args:
        probabilities: of the K classes for each of N voxels; a factor of a voxel's does not matter.
        classes: the label's class of each voxel.

    Shape:
        - probabilities: float [K, N]; classes: int [N].

    Returns:
        A number from 0.05 to 20; above 1 for a network that is too sure.

    Raises:
        ValueError: when there is no voxel.
    """
    from scipy.optimize import minimize_scalar  # an inference reads temperatures, and does without

    if not classes.numel():
        raise ValueError("A temperature needs at least one voxel to be fitted on, got none.")
    logits = probabilities.double().clamp_min(_LEAST).log()

    def loss(log_temperature: float) -> float:
        scaled = logits.T / math.exp(log_temperature)
        return float(torch.nn.functional.cross_entropy(scaled, classes.long()))

    bounds = [math.log(limit) for limit in _LIMITS]
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


class SampleVoxelsd(MapTransform):
    """Keep class probabilities of a few voxels only, on the label's grid, where predictions are written and scored.

    Drawn at random from those that the network saw, the same of all combinations: a single number can be fitted on
    thousands, and all voxels of all validation cases would take gigabytes.

    Args:
        keys: key of the probabilities, [P, K, ...] for P combinations, on the grid of `image_key`.
        image_key: the image that they were computed from.
        label_key: class map, int [1, ...]; it is replaced by the voxels' classes.
        number: how many voxels of a case, N, unless it has fewer.
        seed: of the drawing.

    Shape:
        - Output: float32 [P, K, N], NaN for a combination whose probabilities are; the label int [N].
    """

    def __init__(
        self, keys: str = "pred", *, number: int, image_key: str = "image", label_key: str = "label", seed: int = 0
    ) -> None:
        super().__init__(keys)
        self.number = number
        self.image_key = image_key
        self.label_key = label_key
        self.seed = seed

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sampled = dict(data)
        label, source = data[self.label_key], data[self.image_key].affine
        for key in self.keys:
            there = torch.stack([~volume.isnan().all() for volume in torch.as_tensor(data[key])]).cpu()
            # One combination at a time: those of a large case would be gigabytes once more.
            volumes = (resample_probabilities(p, source, label.affine, label.shape[1:]) for p in data[key][there])
            voxels = None
            samples = []
            for volume in volumes:
                voxels = self._draw(seen_voxels(volume)) if voxels is None else voxels
                samples.append(volume.flatten(1)[:, voxels])
            sampled[key] = torch.full((len(there), *samples[0].shape), torch.nan)
            sampled[key][there] = torch.stack(samples)
            sampled[self.label_key] = label.as_tensor().cpu().flatten()[voxels]
        return sampled

    def _draw(self, seen: Tensor) -> Tensor:
        """Places of voxels in the flattened volume."""
        (places,) = seen.flatten().nonzero(as_tuple=True)
        return places[torch.randperm(len(places), generator=torch.Generator().manual_seed(self.seed))[: self.number]]


class TemperatureFit:
    """Fits the temperatures while an evaluator runs over cases with labels, and writes them when it has ended.

    For an evaluator whose output :class:`SampleVoxelsd` has made: ``pred`` float [P, K, N] in the order of
    :func:`passion_monai.presence.combinations`, NaN where a case does not have the modalities, and ``label`` int [N].

    Args:
        path: JSON file to write.
        modalities: names of the M modalities.
        weights: checkpoint, or list of them; others do not have these temperatures.
        flip_test: whether the probabilities are means over flips, which are less sure.
        data: which cases these are, for people to read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        modalities: Sequence[str],
        weights: str | Path | Sequence[str | Path],
        flip_test: bool,
        data: str,
    ) -> None:
        self.path = Path(path)
        self.names = [combination_name(row, modalities) for row in combinations(len(modalities))]
        self.content = {"weights_sha256": checksum(weights), "flip_test": flip_test, "data": data}
        self._samples: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def attach(self, engine: Engine) -> None:
        """Listen to an evaluator."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _start(self) -> None:
        self._samples.clear()

    def _collect(self, engine: Engine) -> None:
        output: Any = engine.state.output
        for item in output:
            for name, probabilities in zip(self.names, item["pred"], strict=True):
                if not bool(probabilities.isnan().all()):
                    self._samples.setdefault(name, []).append((probabilities, item["label"]))

    def _write(self) -> None:
        if not self._samples:
            return  # all cases have failed, which the run ends with
        fitted = {name: self._fit(self._samples[name]) for name in self.names if name in self._samples}
        with complete_file(self.path) as unfinished:
            text = json.dumps(self.content | {"combinations": fitted}, indent=2)
            unfinished.write_text(text + "\n", encoding="utf-8")
        missing = [name for name in self.names if name not in fitted]
        if missing:
            logger.warning(f"No case has the modalities of {', '.join(missing)}: these get no temperature.")

    def _fit(self, samples: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
        probabilities, classes = (torch.cat(parts, dim=-1) for parts in zip(*samples, strict=True))
        return {"temperature": round(fit_temperature(probabilities, classes), _DIGITS), "cases": len(samples)}


def read_temperatures(
    weights: str | Path | Sequence[str | Path], *, flip_test: bool, path: str | Path | None = None
) -> dict[str, Any]:
    """What :class:`TemperatureFit` wrote for these weights.

    Args:
        weights: path of the checkpoint, or of several.
        flip_test: whether the probabilities to calibrate are means over flips.
        path: the file; if None, the one in the folder ``evaluation`` beside the first one's folder.

    Returns:
        ``data``, which cases they were fitted on, and ``combinations``: for each by its name ``temperature`` and
        ``cases``, on how many.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it cannot be read, or is of other weights or not of the same use of flips.
    """
    path = evaluation_folder(weights) / FILE_NAME if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There are no temperatures for calibration at {path}. {_REMEDY}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known, flips = content["weights_sha256"], content["flip_test"]
        found = {"data": content["data"], "combinations": dict(content["combinations"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}). {_REMEDY}") from error
    if known != checksum(weights):
        raise ValueError(f"{path} is of other weights than {weights}. {_REMEDY}")
    if flips != flip_test:
        raise ValueError(f"{path} was fitted with flip_test {flips}, not with {flip_test}. {_REMEDY}")
    return found
