"""Where a prediction lies, for grids of any orientation, obliquity, spacing and size: a bundle's inference, end to end.

The network is one that needs no training: a voxel is of a modality's class where that modality is bright.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigWorkflow
from monai.data import DataLoader
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from passion_monai.datasets import get_spec
from passion_monai.datasets.cohort import inference_cases
from passion_monai.faults import TolerantDataset
from passion_monai.networks.base import Backbone, DecoderOutput, Features, masked_features

DATASETS = ("brats", "myops")
PLACES = {"output_dir": "", "datalist": "list.json", "ckpt_path": "weights.pt"}
SPACING, ROI = 1.5, 32
ANY_SPACING = st.floats(0.7, 3.0)
both = pytest.mark.parametrize("dataset", DATASETS)
some = settings(max_examples=settings.default.max_examples // 5)


class Thresholds(Backbone):
    """The class of the first modality that is bright."""

    def __init__(self, spatial_dims: int, num_modalities: int, num_classes: int) -> None:
        super().__init__(spatial_dims, num_modalities, num_classes, ROI, stride=1)

    def encode_modality(self, image: Tensor, modality: int) -> tuple[Tensor, ...]:
        return (image,)

    def decode(self, features: Features, presence: Tensor) -> DecoderOutput:
        present = masked_features(features, presence)
        classes = torch.zeros_like(next(iter(present.values()))[0][:, 0], dtype=torch.int64)
        for modality in reversed(present):
            classes[present[modality][0][:, 0] > 1] = class_of(modality, self.num_classes)
        # The background is less sure, so that no place in the middle of two voxels is a tie.
        certainty = torch.tensor([3.0] + [5.0] * (self.num_classes - 1))
        logits = (torch.nn.functional.one_hot(classes, self.num_classes) * certainty).movedim(-1, 1)
        return DecoderOutput(logits, (), logits)

    def decode_modality(self, maps: tuple[Tensor, ...]) -> Tensor:
        raise NotImplementedError


def class_of(modality: int, num_classes: int) -> int:
    return modality % (num_classes - 1) + 1


class Volumes(NamedTuple):
    """A case in memory: of each modality its voxels, the affine of them all, and the classes that must be found."""

    images: dict[str, np.ndarray]
    affine: np.ndarray
    classes: np.ndarray


def rotation(angles: Sequence[float]) -> np.ndarray:
    turned = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        turned = turned @ turn
    return turned


@st.composite
def orientations(draw: st.DrawFn) -> np.ndarray:
    """Where nibabel moves each axis, and whether it turns it round."""
    return np.column_stack([draw(st.permutations(range(3))), [draw(st.sampled_from([-1, 1])) for _ in range(3)]])


@st.composite
def affines(draw: st.DrawFn, spacings: st.SearchStrategy[float]) -> np.ndarray:
    """Any rotation, axes in any order and direction, any voxel size and origin; in float32, as NIfTI has it."""
    axes = nib.orientations.inv_ornt_aff(draw(orientations()), (1, 1, 1))[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = rotation([draw(st.floats(-3, 3)) for _ in range(3)]) @ axes
    affine[:3, :3] *= [draw(spacings) for _ in range(3)]
    affine[:3, 3] = [draw(st.floats(-200, 200)) for _ in range(3)]
    return affine.astype(np.float32).astype(np.float64)


@st.composite
def volumes(draw: st.DrawFn, dataset: str, spacings: st.SearchStrategy[float] = ANY_SPACING) -> Volumes:
    """Modalities that each show a box of their own, in a brain with nothing around it or in a full heart image."""
    spec = get_spec(dataset)
    shape = [draw(st.integers(11, 16)) for _ in range(3)]
    present = [name for name in spec.modalities if draw(st.booleans())] or [draw(st.sampled_from(spec.modalities))]
    tissue = np.zeros(shape, dtype=np.int16)
    tissue[2:-2, 2:-2, 2:-2] = 100
    images, classes = {}, np.zeros(shape, dtype=np.uint8)
    for index, name in reversed(list(enumerate(spec.modalities))):
        if name in present:
            starts = [draw(st.integers(3, size - 7)) for size in shape]
            box = tuple(slice(start, start + draw(st.integers(3, 4))) for start in starts)
            images[name] = np.where(tissue > 0, tissue, 0 if dataset == "brats" else 100)
            images[name][box] = 300
            classes[box] = class_of(index, len(spec.label_values))
    return Volumes(images, draw(affines(spacings)), classes)


def workflow(dataset: str, name: str, **overrides: Any) -> ConfigWorkflow:
    """A bundle's workflow with the network above, on coarse grids, ready to run."""
    spec, dims = get_spec(dataset), 3 if dataset == "brats" else 2
    bundle = Path(__file__).parents[1] / "bundles" / f"{dataset}_rfnet_passion"
    network = Thresholds(dims, len(spec.modalities), len(spec.label_values))
    settings = {"bundle_root": str(bundle), "num_workers": 0, "spacing": [SPACING] * dims, "roi_size": [ROI] * dims}
    config = ConfigWorkflow(
        str(bundle / "configs" / f"{name}.yaml"),
        workflow_type=None,
        logging_file=False,
        network=network,
        **settings,
        **overrides,
    )
    config.initialize()
    return config


def write(drawn: Volumes, folder: Path, turns: Mapping[str, np.ndarray | None]) -> dict[str, str]:
    """One file for each modality, and of the label if it is asked for, each with its axes turned in its own way."""
    folder.mkdir()
    paths = {}
    for name, turn in turns.items():
        image = nib.Nifti1Image(drawn.images[name], drawn.affine)
        paths[name] = str(folder / f"{name}.nii")
        nib.save(image if turn is None else image.as_reoriented(turn), paths[name])
    return paths


class Segmenter:
    """The inference of a bundle, with cases one by one."""

    def __init__(self, dataset: str, folder: Path) -> None:
        self.dataset, self.folder, self.spec = dataset, folder, get_spec(dataset)
        one_case = {self.spec.modalities[0]: "any"}
        parser = workflow(dataset, "inference", output_dir=str(folder), handlers=[], files=one_case).parser
        self.evaluator, self.preprocessing = map(parser.get_parsed_content, ("evaluator", "preprocessing"))
        self.numbers = map(str, itertools.count())

    def write(self, drawn: Volumes, turns: Mapping[str, np.ndarray | None] | None = None) -> dict[str, str]:
        """The files of a case."""
        return write(drawn, self.folder / f"files{next(self.numbers)}", turns or dict.fromkeys(drawn.images))

    def run(self, files: Mapping[str, str]) -> Any:
        """The segmentation of a case that is given by its files."""
        case = next(self.numbers)
        arguments: dict[str, Any] = {"dataset_dir": None, "output_dir": "", "phantom": {}, "missing_rates": None}
        arguments |= {"modalities": self.spec.modalities, "seed": 0}
        cases = inference_cases(self.dataset, files={**files, "case": case}, **arguments)
        self.evaluator.data_loader = DataLoader(TolerantDataset(cases, self.preprocessing), batch_size=1)
        self.evaluator.run()
        return nib.load(self.folder / "predictions" / f"{case}_seg.nii.gz")

    def values(self, classes: np.ndarray) -> np.ndarray:
        """What files hold for classes."""
        return np.asarray(self.spec.label_values)[classes]


@pytest.fixture(scope="module")
def segmenters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Segmenter]:
    return {dataset: Segmenter(dataset, tmp_path_factory.mktemp(dataset)) for dataset in DATASETS}


def voxels(image: Any) -> np.ndarray:
    return np.asarray(image.dataobj)


def inside(classes: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Voxels so far from those of another class that resampling to the network's grid and back cannot change them."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    distances = [distance_transform_edt(classes == value, spacing) for value in np.unique(classes)]
    return np.max(distances, axis=0) > SPACING * 3**0.5 + np.linalg.norm(spacing)


@both
@some
@given(data=st.data())
def test_a_prediction_overlays_the_truth_on_the_grid_of_the_input(
    segmenters: dict[str, Segmenter], dataset: str, data: st.DataObject
):
    segmenter, drawn = segmenters[dataset], data.draw(volumes(dataset))
    found = segmenter.run(segmenter.write(drawn))
    assert np.array_equal(found.affine, drawn.affine)
    assert found.shape == drawn.classes.shape
    sure = inside(drawn.classes, drawn.affine)
    assert np.array_equal(voxels(found)[sure], segmenter.values(drawn.classes)[sure])


@both
@some
@given(data=st.data())
def test_on_the_spacing_of_the_network_every_voxel_is_exact(
    segmenters: dict[str, Segmenter], dataset: str, data: st.DataObject
):
    """However the axes lie: nothing needs to be interpolated."""
    segmenter, drawn = segmenters[dataset], data.draw(volumes(dataset, st.just(SPACING)))
    found = segmenter.run(segmenter.write(drawn))
    assert np.array_equal(found.affine, drawn.affine)
    assert np.array_equal(voxels(found), segmenter.values(drawn.classes))


@both
@some
@given(data=st.data())
def test_modalities_with_their_axes_in_other_orders_give_the_same(
    segmenters: dict[str, Segmenter], dataset: str, data: st.DataObject
):
    segmenter, drawn = segmenters[dataset], data.draw(volumes(dataset))
    expected = segmenter.run(segmenter.write(drawn))
    first = next(name for name in segmenter.spec.modalities if name in drawn.images)
    turns = {name: data.draw(orientations(), label=name) for name in drawn.images}
    turns[first] = None  # its grid is that of the segmentation, to which the others are turned
    files = segmenter.write(drawn, turns)
    found = segmenter.run(files)
    assert np.array_equal(found.affine, drawn.affine)
    assert np.array_equal(voxels(found), voxels(expected))


@both
@some
@given(data=st.data())
def test_the_order_in_which_files_are_given_changes_nothing(
    segmenters: dict[str, Segmenter], dataset: str, data: st.DataObject
):
    segmenter, drawn = segmenters[dataset], data.draw(volumes(dataset))
    files = segmenter.write(drawn)
    names = data.draw(st.permutations(list(files)))
    found, expected = segmenter.run({name: files[name] for name in names}), segmenter.run(files)
    assert np.array_equal(found.affine, expected.affine)
    assert np.array_equal(voxels(found), voxels(expected))


def scores(dataset: str, files: Mapping[str, str], folder: Path) -> pd.DataFrame:
    """What evaluate.yaml finds for a case."""
    (folder / "weights.pt").touch()
    content = {"dataset": dataset, "modalities": list(get_spec(dataset).modalities), "root": str(folder)}
    content |= {"training": [], "validation": [], "test": [{"case": "x", "patient": "x", **files}]}
    (folder / "list.json").write_text(json.dumps(content))
    places = {name: str(folder / path) for name, path in PLACES.items()}
    workflow(dataset, "evaluate", handlers=["@scores"], **places).run()
    return pd.read_csv(folder / "evaluation" / "scores.csv")


@both
@settings(max_examples=5)
@given(data=st.data())
def test_scores_are_those_of_an_exact_overlay_however_the_label_lies(
    tmp_path_factory: pytest.TempPathFactory, dataset: str, data: st.DataObject
):
    folder, drawn = tmp_path_factory.mktemp(dataset), data.draw(volumes(dataset, st.just(SPACING)))
    labels = np.asarray(get_spec(dataset).label_values, dtype=np.int16)[drawn.classes]
    drawn.images["label"] = labels
    files = write(drawn, folder / "files", dict.fromkeys(drawn.images) | {"label": data.draw(orientations())})
    found = scores(dataset, files, folder)
    whole = found[found["combination"] == "+".join(name for name in get_spec(dataset).modalities if name in files)]
    assert len(whole) == len(get_spec(dataset).regions)
    assert (whole["label_ml"] > 0).any()
    assert (whole["dice"] == 1).all()
    assert (whole["hd95_mm"] == 0).all()
