from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, NormalizeIntensityd, Orientationd, RandRotated, Spacingd, SpatialPadd

from passion_monai.presence import combination_name, combinations
from passion_monai.transforms import (
    FULL_CONFIDENCE,
    AlignModalitiesd,
    CropToForegroundd,
    LabelsToClassesd,
    LoadCased,
    MaskModalitiesd,
    RandMaskModalitiesd,
    ReplaceSmallClassesd,
    RestoreClassesd,
    SaveSegmentationd,
    SelectSliced,
    StackModalitiesd,
)

MODALITIES = ("a", "b", "c")
VALUES = (0, 2, 4)
MakeCase = Callable[..., dict[str, Any]]


def pipeline(spacing: float = 1.0) -> Compose:
    """The preprocessing of the bundles."""
    return Compose(
        [
            MaskModalitiesd(MODALITIES),
            LoadCased(MODALITIES),
            AlignModalitiesd(MODALITIES, label_key="label"),
            LabelsToClassesd("label", values=VALUES),
            Orientationd(MODALITIES, axcodes="RAS", labels=None, allow_missing_keys=True),
            Spacingd(MODALITIES, pixdim=[spacing] * 3, allow_missing_keys=True),
            CropToForegroundd(MODALITIES),
            NormalizeIntensityd(MODALITIES, nonzero=True, allow_missing_keys=True),
            StackModalitiesd(MODALITIES),
        ]
    )


def rewrite(path: str, change: Callable[[np.ndarray], np.ndarray], *, affine: np.ndarray | None = None) -> None:
    image = nib.load(path)
    changed = change(np.asarray(image.dataobj, dtype=np.float32))
    nib.save(nib.Nifti1Image(changed, image.affine if affine is None else affine), path)


class TestMaskModalitiesd:
    def test_removes_what_the_row_says(self):
        data = {"case": "x", "a": "1", "b": "2", "c": "3", "presence": [True, False, True]}
        assert MaskModalitiesd(MODALITIES)(data) == {"case": "x", "a": "1", "c": "3"}

    def test_keeps_all_without_a_row(self):
        assert MaskModalitiesd(MODALITIES)({"a": "1", "c": "3"}) == {"a": "1", "c": "3"}

    def test_refuses_a_row_of_another_length(self):
        with pytest.raises(ValueError, match="Case x: presence must have 3 entries"):
            MaskModalitiesd(MODALITIES)({"case": "x", "a": "1", "presence": [True]})

    def test_refuses_to_leave_nothing(self):
        with pytest.raises(ValueError, match="Case x: none of the modalities a, b, c"):
            MaskModalitiesd(MODALITIES)({"case": "x", "a": "1", "b": "2", "presence": [False, False, True]})


class TestRandMaskModalitiesd:
    def test_draws_every_subset_equally_often(self):
        transform = RandMaskModalitiesd(MODALITIES).set_random_state(0)
        counts: dict[str, int] = {}
        for _ in range(3000):
            kept = "".join(transform({"a": 1, "c": 3}))
            counts[kept] = counts.get(kept, 0) + 1
        assert set(counts) == {"a", "c", "ac"}
        assert all(abs(count - 1000) < 120 for count in counts.values())

    def test_prob_zero_keeps_all(self):
        transform = RandMaskModalitiesd(MODALITIES, prob=0.0).set_random_state(0)
        assert all(transform({"a": 1, "c": 3}) == {"a": 1, "c": 3} for _ in range(20))

    def test_calls_its_deterministic_twin(self):
        transform = RandMaskModalitiesd(MODALITIES).set_random_state(1)
        data = {"a": 1, "b": 2, "c": 3}
        result = transform(data)
        assert result == MaskModalitiesd(MODALITIES)({**data, "presence": transform.row})

    def test_is_seeded(self):
        rows = []
        for _ in range(2):
            transform = RandMaskModalitiesd(MODALITIES).set_random_state(7)
            rows.append([tuple(transform({"a": 1, "b": 2, "c": 3})) for _ in range(10)])
        assert rows[0] == rows[1]


class TestPipeline:
    def test_stacks_with_zeros_where_missing(self, make_case: MakeCase):
        result = pipeline()(make_case(modalities=("a", "c")))
        assert result["image"].shape == (3, 9, 8, 7)
        assert result["presence"].tolist() == [True, False, True]
        assert float(result["image"][1].abs().max()) == 0
        assert set(result["label"].unique().tolist()) == {0, 1, 2}

    def test_normalises_each_modality_inside_the_foreground(self, make_case: MakeCase):
        image = pipeline()(make_case())["image"].as_tensor()
        for channel in image:
            assert float(channel.mean()) == pytest.approx(0, abs=1e-5)
            assert float(channel.std(correction=0)) == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize("how", ["removed", "garbage", "changed"])
    def test_a_masked_modality_has_no_influence(self, make_case: MakeCase, how: str):
        case = make_case() | {"presence": [True, False, True]}
        before = pipeline()(case)
        path = Path(case["b"])
        if how == "removed":
            path.unlink()
        elif how == "garbage":
            path.write_bytes(b"not an image")
        else:
            rewrite(case["b"], lambda image: np.full_like(image, 7) + np.arange(image.shape[0])[:, None, None])
        after = pipeline()(case)
        assert torch.equal(before["image"].as_tensor(), after["image"].as_tensor())
        assert torch.equal(before["label"].as_tensor(), after["label"].as_tensor())

    def test_a_missing_key_equals_a_masked_one(self, make_case: MakeCase):
        case = make_case()
        masked = pipeline()(case | {"presence": [False, True, True]})
        del case["a"]
        assert torch.equal(masked["image"].as_tensor(), pipeline()(case)["image"].as_tensor())

    def test_the_crop_is_the_union_of_the_modalities_present(self, make_case: MakeCase):
        case = make_case()
        rewrite(case["b"], lambda image: np.pad(image[:, :, 1:], ((0, 0), (0, 0), (0, 1)), constant_values=5))
        assert pipeline()(case)["image"].shape == (3, 12, 14, 10)
        assert pipeline()(case | {"presence": [True, False, True]})["image"].shape == (3, 9, 8, 7)


BAD_FILES = [
    (lambda path: Path(path).write_bytes(b"\x1f\x8b broken"), "b file .*b.nii.gz cannot be read"),
    (lambda path: Path(path).write_bytes(Path(path).read_bytes()[:200]), "cannot be read"),
    (lambda path: Path(path).unlink(), "cannot be read"),
    (lambda path: rewrite(path, lambda image: image[..., 0]), "must have 3 axes, got shape"),
    (lambda path: rewrite(path, lambda image: np.where(image > 100, np.nan, image)), "holds NaN or infinite values"),
    (lambda path: rewrite(path, np.zeros_like), "is 0.0 everywhere"),
    (lambda path: rewrite(path, lambda image: image[1:]), "b lies on another grid than a"),
    (lambda path: rewrite(path, lambda image: image, affine=np.eye(4)), "b lies on another grid than a"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_FILES)
def test_bad_files_are_named(make_case: MakeCase, spoil: Callable[[str], None], message: str):
    case = make_case()
    spoil(case["b"])
    with pytest.raises(RuntimeError) as error:  # MONAI's Compose wraps what its transforms raise
        pipeline()(case)
    assert isinstance(error.value.__cause__, ValueError)
    assert "Case case1" in str(error.value.__cause__)
    with pytest.raises(ValueError, match=message):
        raise error.value.__cause__


def test_an_unknown_label_value_is_named(make_case: MakeCase):
    case = make_case()
    rewrite(case["label"], lambda label: np.where(label == 4, 3, label))
    with pytest.raises(ValueError, match=r"Case case1: the label holds the values \[3.0\], known are \[0, 2, 4\]"):
        LabelsToClassesd("label", values=VALUES)(LoadCased(MODALITIES)(case))


def test_a_case_may_bring_its_own_label_values(make_case: MakeCase):
    case = make_case() | {"label_values": [0, 4, 2]}
    label = LabelsToClassesd("label", values=VALUES)(LoadCased(MODALITIES)(case))["label"]
    assert int(label[0, 5, 6, 4]) == 1
    assert int(label[0, 4, 5, 3]) == 2


def test_classes_that_the_data_set_lacks_are_declared_by_the_values_for_all(make_case: MakeCase):
    case = make_case() | {"label_values": [0, 2]}
    label = LabelsToClassesd("label", values=VALUES)(LoadCased(MODALITIES)(case))["label"]
    assert int(label[0, 5, 6, 4]) == 2
    with pytest.raises(ValueError, match=r"label_values must be 3 values, one for each class, got \[0, 4\]"):
        LabelsToClassesd("label", values=VALUES)(LoadCased(MODALITIES)(case | {"label_values": [0, 4]}))


@pytest.mark.parametrize(("unit", "millimetres"), [("meter", 1000), ("micron", 0.001), ("mm", 1), ("unknown", 1)])
def test_lengths_are_in_millimetres_whatever_the_header_has(make_case: MakeCase, unit: str, millimetres: float):
    case = make_case(spacing=4)
    image = nib.load(case["a"])
    moved = nib.Nifti1Image(image.get_fdata(), np.diag([1 / millimetres] * 3 + [1]) @ image.affine)
    moved.header.set_xyzt_units(unit)
    nib.save(moved, case["a"])
    loaded = LoadCased(MODALITIES)(case)["a"]
    for affine in (loaded.affine, loaded.meta["original_affine"]):
        np.testing.assert_allclose(affine, image.affine, rtol=1e-6)


class TestAlignModalitiesd:
    @pytest.mark.parametrize(("shift", "logged"), [(1e-5, False), (0.002, True), (0.039, True), (0.041, None)])
    def test_a_hundredth_of_a_voxel_is_rounding(
        self, make_case: MakeCase, caplog: pytest.LogCaptureFixture, shift: float, logged: bool | None
    ):
        case = make_case(spacing=4)
        affine = nib.load(case["b"]).affine
        rewrite(case["b"], lambda image: image, affine=affine + np.eye(4)[:, ::-1] * [0, 0, 0, shift])
        loaded, align = LoadCased(MODALITIES)(case), AlignModalitiesd(MODALITIES, label_key="label")
        if logged is None:
            with pytest.raises(ValueError, match="Case case1: b lies on another grid than a"):
                align(loaded)
            return
        aligned = align(loaded)
        assert torch.equal(aligned["b"].affine, aligned["a"].affine)
        assert torch.equal(aligned["b"].as_tensor(), loaded["b"].as_tensor())
        assert ("Case case1: the grid of b is up to" in caplog.text) is logged

    def test_what_is_rounded_is_measured_at_the_far_corner(self, make_case: MakeCase):
        """A spacing a thousandth too long moves the last of 14 voxels by over a hundredth, and that of 10 not."""
        case = make_case()
        affine = nib.load(case["b"]).affine
        align = AlignModalitiesd(MODALITIES)
        rewrite(case["b"], lambda image: image, affine=affine @ np.diag([1, 1, 1.001, 1]))
        align(LoadCased(MODALITIES)(case))
        rewrite(case["b"], lambda image: image, affine=affine @ np.diag([1, 1.001, 1, 1]))
        with pytest.raises(ValueError, match="b lies on another grid than a"):
            align(LoadCased(MODALITIES)(case))

    def test_resamples_to_the_first_modality_present(self, make_case: MakeCase):
        case = make_case()
        image = nib.load(case["b"])
        original = np.asarray(image.dataobj)
        shifted = image.affine.copy()
        shifted[:3, 3] += image.affine[:3, :3] @ [0, 0, 1]
        rewrite(case["b"], lambda values: values[:, :, 1:], affine=shifted)  # one slice less, the same anatomy
        aligned = AlignModalitiesd(MODALITIES, on_mismatch="resample")(LoadCased(MODALITIES)(case))
        assert aligned["b"].shape == aligned["a"].shape
        np.testing.assert_allclose(aligned["b"][0, :, :, 1:].numpy(), original[:, :, 1:], rtol=1e-3, atol=0.1)

    def test_checks_its_argument(self):
        with pytest.raises(ValueError, match="on_mismatch must be"):
            AlignModalitiesd(MODALITIES, on_mismatch="ignore")


def one_hot_probabilities(label: torch.Tensor) -> torch.Tensor:
    return torch.stack([(label[0] == k).float() for k in range(3)])


class TestRestoreClassesd:
    def restore(self, case: dict[str, Any], spacing: float = 1.0) -> tuple[dict[Any, Any], torch.Tensor]:
        """A perfect prediction on the network's grid, restored; and the label on the grid of the file."""
        data = pipeline(spacing)(case)
        on_grid = AlignModalitiesd(["image"], label_key="label", on_mismatch="resample")
        moved = on_grid(data | {"image": data["image"][:1]})["label"]
        probabilities = one_hot_probabilities(moved)
        result = RestoreClassesd()(data | {"pred": torch.stack([probabilities, probabilities.flip(0)])})
        return result, data["label"]

    def test_a_perfect_prediction_comes_back_exactly(self, make_case: MakeCase):
        result, label = self.restore(make_case())
        assert result["pred"].shape == (2, 12, 14, 10)
        assert torch.equal(result["pred"][0].as_tensor(), label[0].as_tensor().to(torch.int16))
        torch.testing.assert_close(result["pred"].affine, label.affine)

    def test_without_a_label_the_image_gives_the_grid(self, make_case: MakeCase):
        case = make_case(label=False)
        data = pipeline()(case)
        result = RestoreClassesd()(data | {"pred": torch.zeros(3, *data["image"].shape[1:])})
        assert result["pred"].shape == (1, 12, 14, 10)
        np.testing.assert_allclose(result["pred"].affine.numpy(), nib.load(case["a"]).affine)

    def test_from_another_spacing_it_comes_back_almost(self, make_case: MakeCase):
        result, label = self.restore(make_case(shape=(24, 24, 24), spacing=1.0), spacing=0.5)
        assert float((result["pred"][0].as_tensor() == label[0].as_tensor()).float().mean()) > 0.99

    def test_unavailable_combinations_are_marked(self, make_case: MakeCase):
        data = pipeline()(make_case())
        probabilities = torch.full((2, 3, *data["image"].shape[1:]), torch.nan)
        probabilities[1] = 0
        result = RestoreClassesd()(data | {"pred": probabilities})["pred"]
        assert result[0].unique().tolist() == [-1]
        assert result[1].unique().tolist() == [0]

    @pytest.mark.parametrize(("combinations", "voxels"), [(False, "all"), (False, "one"), (True, "all"), (True, "one")])
    def test_a_network_that_puts_out_nan_is_refused(self, make_case: MakeCase, combinations: bool, voxels: str):
        """Not taken for background, nor for a combination that the case does not have."""
        data = pipeline()(make_case())
        probabilities = torch.full((3, *data["image"].shape[1:]), torch.nan if voxels == "all" else 0.3)
        probabilities[:, 3, 3, 3] = torch.nan
        given = probabilities.repeat(2, 1, 1, 1, 1) if combinations else probabilities
        with pytest.raises(ValueError, match="The network puts out NaN"):
            RestoreClassesd()(data | {"pred": given})

    def test_confidence_is_that_of_the_most_likely_class(self, make_case: MakeCase):
        data = pipeline()(make_case())
        probabilities = torch.rand(3, 3, *data["image"].shape[1:], generator=torch.Generator().manual_seed(0))
        probabilities /= probabilities.sum(dim=1, keepdim=True)
        probabilities[2] = torch.nan
        result = RestoreClassesd(confidence_key="confidence")(data | {"pred": probabilities})
        confidence = result["confidence"]
        assert confidence.dtype == torch.int16
        assert confidence.shape == (3, 12, 14, 10)
        assert not confidence[2].any()
        # What was cropped away was not seen. (The file's first two axes point the other way.)
        inside = confidence[:2, 2:-1, 3:-3, 1:-2]
        assert int(confidence.count_nonzero()) == int(inside.count_nonzero()) == inside.numel()
        expected = probabilities[:2].amax(dim=1).flip(1, 2)
        torch.testing.assert_close(inside / FULL_CONFIDENCE, expected, rtol=0, atol=1e-4)
        plain = RestoreClassesd()(data | {"pred": probabilities})
        assert "confidence" not in plain
        assert torch.equal(plain["pred"].as_tensor(), result["pred"].as_tensor())

    def test_probabilities_between_two_voxels_are_between_theirs(self, make_case: MakeCase):
        """A sure class wins against a doubtful one nearer by: the boundary is not half way between the voxels."""
        data = pipeline(2.0)(make_case(shape=(24, 24, 24)))
        shape = data["image"].shape[1:]
        probabilities = torch.zeros(3, *shape)
        probabilities[1], probabilities[0] = 0.4, 0.6
        probabilities[1, : shape[0] // 2], probabilities[0, : shape[0] // 2] = 1, 0
        restored = RestoreClassesd(probabilities_key="p")(data | {"pred": probabilities})["p"].as_tensor()
        middle = restored[1, :, 12, 12]
        # By nearest neighbours there would be nothing but 0 beyond the brain, 0.4 and 1.
        assert ((middle > 0.45) & (middle < 0.95)).any()

    def test_confidence_on_another_grid_is_one_where_the_network_was_sure(self, make_case: MakeCase):
        data = pipeline(2.0)(make_case(shape=(24, 24, 24)))
        probabilities = torch.zeros(3, *data["image"].shape[1:])
        probabilities[1] = 1
        confidence = RestoreClassesd(confidence_key="c")(data | {"pred": probabilities})["c"]
        assert confidence.unique().tolist() == [0, FULL_CONFIDENCE]
        # Half a voxel of 2 mm beyond its outermost centres, fewer at the corners.
        assert 0.8 < float(confidence.count_nonzero()) / (21 * 18 * 21) < 1

    def test_temperatures_change_confidences_and_no_class(self, make_case: MakeCase):
        data = pipeline(1.5)(make_case(modalities=("a", "b"), shape=(24, 24, 24)))
        probabilities = torch.rand(7, 3, *data["image"].shape[1:], generator=torch.Generator().manual_seed(0)) ** 3
        probabilities /= probabilities.sum(dim=1, keepdim=True)
        probabilities[3:] = torch.nan
        names = {"a": 2.0, "a+b": 0.5}  # none of "b", the second
        temperatures = {"data": "", "combinations": {name: {"temperature": value} for name, value in names.items()}}
        plain = RestoreClassesd(confidence_key="c")(data | {"pred": probabilities})
        restore = RestoreClassesd(confidence_key="c", temperatures=temperatures, modalities=MODALITIES)
        rows = combinations(3)
        order = [combination_name(row, MODALITIES) for row in rows]
        there = [order.index("a"), order.index("b"), order.index("a+b")]
        mixed = torch.full_like(probabilities, torch.nan)
        mixed[there] = probabilities[:3]
        result = restore(data | {"pred": mixed})
        assert torch.equal(result["pred"].as_tensor()[there], plain["pred"].as_tensor()[:3])
        assert torch.equal(result["c"][there], plain["c"][:3])
        before, (a, b, both) = plain["c"][:3], result["calibrated_c"][there]
        seen = before[0] > 0
        assert not b.any()  # is not known
        assert bool((a <= before[0])[seen].all())
        assert bool((both >= before[2])[seen].all())
        assert float((a < before[0])[seen].float().mean()) > 0.9
        assert float((both > before[2])[seen].float().mean()) > 0.9
        assert not a[~seen].any()

    def test_temperatures_scale_the_logarithms_of_probabilities(self, make_case: MakeCase):
        data = pipeline()(make_case(modalities=("a", "b"), label=False))
        probabilities = torch.rand(3, *data["image"].shape[1:], generator=torch.Generator().manual_seed(0))
        probabilities[1] *= 3
        probabilities /= probabilities.sum(dim=0)
        settings: dict[str, Any] = {"probabilities_key": "p", "modalities": MODALITIES}
        fitted = {"data": "", "combinations": {"a+b": {"temperature": 2.5}}}
        results = [
            RestoreClassesd(**settings, temperatures=temperatures)(data | {"pred": probabilities})
            for temperatures in (None, fitted, {"data": "", "combinations": {"b": {"temperature": 2.5}}})
        ]
        plain, scaled, other = (result["p"].as_tensor() for result in results)
        torch.testing.assert_close(scaled, (plain.log() / 2.5).softmax(dim=0))
        assert torch.equal(other, plain)
        assert all(torch.equal(result["pred"], results[0]["pred"]) for result in results)
        assert torch.equal(scaled.argmax(dim=0), plain.argmax(dim=0))


class TestReplaceSmallClassesd:
    def maps(self) -> MetaTensor:
        """Two maps, of three voxels of class 2 and of one; in a third no voxel is of any class."""
        maps = torch.tensor([[0, 1, 2, 2, 2], [0, 1, 1, 1, 2], [-1] * 5], dtype=torch.int16)
        return MetaTensor(maps, affine=torch.eye(4))

    def test_each_map_is_taken_by_itself(self):
        data = {"pred": self.maps()}
        result = ReplaceSmallClassesd(minimum_voxels={2: 3}, replacement={2: 1})(data)["pred"]
        assert result.tolist() == [[0, 1, 2, 2, 2], [0, 1, 1, 1, 1], [-1] * 5]
        assert result.dtype == torch.int16
        assert torch.equal(data["pred"], self.maps())

    def test_in_the_order_given_and_from_json(self):
        rule = ReplaceSmallClassesd(minimum_voxels={"2": 4, "1": 5}, replacement={"2": 1, "1": 0})  # type: ignore[dict-item]
        assert rule({"pred": self.maps()})["pred"].tolist() == [[0] * 5, [0] * 5, [-1] * 5]

    def test_without_a_class_nothing_changes(self):
        data = {"pred": self.maps()}
        assert torch.equal(ReplaceSmallClassesd(minimum_voxels={}, replacement={})(data)["pred"], data["pred"])

    @pytest.mark.parametrize(("minimum", "replacement"), [({1: 5}, {}), ({1: 5}, {2: 1}), ({1: 5}, {1: 1})])
    def test_refuses_rules_that_do_not_fit(self, minimum: dict[int, int], replacement: dict[int, int]):
        with pytest.raises(ValueError, match="must be of the same classes, and none be replaced by itself, got"):
            ReplaceSmallClassesd(minimum_voxels=minimum, replacement=replacement)


class TestSaveSegmentationd:
    def save(self, case: dict[str, Any], folder: Path, **settings: Any) -> None:
        data = pipeline()(case)
        data = RestoreClassesd()(data | {"pred": one_hot_probabilities(data["image"][:1].round().clamp(0, 2))})
        self.writer(folder, **settings)(data)

    def writer(self, folder: Path, **settings: Any) -> SaveSegmentationd:
        return SaveSegmentationd(
            output_dir=folder,
            modalities=MODALITIES,
            values=VALUES,
            class_names=("none", "edge", "core"),
            regions={"whole": (1, 2), "core": (2,)},
            **settings,
        )

    def test_writes_label_values_on_the_grid_of_the_input(self, make_case: MakeCase, tmp_path: Path):
        case = make_case(modalities=("b", "c"), spacing=2.0)
        self.save(case, tmp_path / "out")
        written, source = nib.load(tmp_path / "out" / "case1_seg.nii.gz"), nib.load(case["b"])
        np.testing.assert_allclose(written.affine, source.affine)
        assert written.shape == source.shape
        assert written.get_data_dtype() == np.uint8
        assert set(np.unique(written.dataobj)) <= set(VALUES)

    def test_says_which_modalities_were_used(self, make_case: MakeCase, tmp_path: Path):
        case = make_case(modalities=("b", "c"), spacing=2.0)
        self.save(case, tmp_path / "out")
        record = json.loads((tmp_path / "out" / "case1_seg.json").read_text())
        assert record["modalities_used"] == ["b", "c"]
        assert record["modalities_missing"] == ["a"]
        assert record["labels"] == {"none": 0, "edge": 2, "core": 4}
        assert record["files"] == {"a": None, "b": case["b"], "c": case["c"]}
        written = np.asarray(nib.load(tmp_path / "out" / "case1_seg.nii.gz").dataobj)
        assert record["region_volumes_ml"]["whole"] == pytest.approx((written > 0).sum() * 8 / 1000, abs=1e-3)
        assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]

    def test_volumes_are_those_of_voxels_with_three_different_edges(self, make_case: MakeCase, tmp_path: Path):
        case = make_case(spacing=(1.0, 2.0, 4.0))
        data = pipeline()(case)
        classes = torch.zeros(1, 12, 14, 10, dtype=torch.int16)
        classes[0, 2:5, 3:5, 1] = 2
        affine = torch.from_numpy(nib.load(case["a"]).affine)
        self.writer(tmp_path)(data | {"pred": MetaTensor(classes, affine=affine)})
        record = json.loads((tmp_path / "case1_seg.json").read_text())
        assert record["region_volumes_ml"] == {"whole": 0.048, "core": 0.048}  # 6 voxels of 8 mm3

    def test_writes_the_label_values_that_the_case_brings(self, make_case: MakeCase, tmp_path: Path):
        values = {"label_values": [0, 2, 3]}
        self.save(make_case(label=False) | values, tmp_path)
        written = np.asarray(nib.load(tmp_path / "case1_seg.nii.gz").dataobj)
        assert set(np.unique(written)) == {0, 2, 3}
        record = json.loads((tmp_path / "case1_seg.json").read_text())
        assert record["labels"] == {"none": 0, "edge": 2, "core": 3}

    def test_values_of_more_or_fewer_classes_than_the_network_has_are_not_for_it(
        self, make_case: MakeCase, tmp_path: Path
    ):
        """As those of a data set's layout are not, after a fine-tuning on other classes."""
        self.save(make_case(label=False) | {"label_values": [0, 1, 2, 3]}, tmp_path)
        record = json.loads((tmp_path / "case1_seg.json").read_text())
        assert record["labels"] == {"none": 0, "edge": 2, "core": 4}

    def test_tells_the_scores_of_the_case_s_combination(self, make_case: MakeCase, tmp_path: Path):
        scores = {"data": "two cases", "combinations": {"b+c": {"whole": {"dice": 0.5}}, "b": {"whole": {"dice": 0.1}}}}
        case = make_case()
        case_bc, case_ac = ({name: case[name] for name in case if name != missing} for missing in ("a", "b"))
        self.save(case_bc, tmp_path / "b+c", expected_scores=scores)
        self.save(case_ac, tmp_path / "a+c", expected_scores=scores)
        self.save(case_bc, tmp_path / "none")
        records = [json.loads((tmp_path / name / "case1_seg.json").read_text()) for name in ("b+c", "a+c", "none")]
        told = {"data": "two cases", "regions": {"whole": {"dice": 0.5}}}
        assert [record["expected_scores"] for record in records] == [told, None, None]

    def test_tells_the_temperature_or_why_there_is_none(
        self, make_case: MakeCase, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        temperatures = {"data": "four cases", "combinations": {"b+c": {"temperature": 1.5, "cases": 4}}}
        case = make_case()
        case_bc, case_ac = ({name: case[name] for name in case if name != missing} for missing in ("a", "b"))
        self.save(case_bc, tmp_path / "b+c", temperatures=temperatures)
        self.save(case_ac, tmp_path / "a+c", temperatures=temperatures)
        self.save(case_bc, tmp_path / "none")
        files = [tmp_path / name / "case1_seg.json" for name in ("b+c", "a+c", "none")]
        told, unknown, none = (json.loads(file.read_text())["calibration"] for file in files)
        assert told == {"temperature": 1.5, "data": "four cases"}
        assert none is None
        assert unknown["temperature"] is None
        note = r"NOT CALIBRATED: no temperature was fitted for a\+c, .* four cases .*calibrate\.yaml"
        assert re.match(note, unknown["note"])
        assert f"Case case1: {unknown['note']}" in caplog.text


def test_stacking_refuses_different_shapes():
    data = {"case": "x", "a": MetaTensor(torch.ones(1, 2, 2, 2)), "b": MetaTensor(torch.ones(1, 2, 2, 3))}
    with pytest.raises(ValueError, match="Case x: the modalities differ in shape"):
        StackModalitiesd(MODALITIES)(data)


class TestSelectSliced:
    def load(self, make_case: MakeCase, **more: Any) -> dict[Any, Any]:
        return LoadCased(MODALITIES)(make_case(modalities=("a", "c")) | more)

    def test_takes_the_slice_of_images_and_label(self, make_case: MakeCase):
        case = self.load(make_case)
        selected = SelectSliced(MODALITIES)(case | {"slice": 4})
        assert "slice" not in selected
        for key in ("a", "c", "label"):
            assert type(selected[key]) is torch.Tensor
            assert torch.equal(selected[key], case[key].as_tensor()[..., 4])

    def test_slices_go_through_the_random_transforms(self, make_case: MakeCase):
        selected = SelectSliced(MODALITIES)(self.load(make_case) | {"slice": 4})
        keys = [*MODALITIES, "label"]
        augment = Compose(
            [
                SpatialPadd(keys, spatial_size=(16, 16), allow_missing_keys=True),
                RandRotated(keys, prob=1.0, range_x=0.1745, allow_missing_keys=True),
                StackModalitiesd(MODALITIES),
            ]
        )
        sample = augment(selected)
        assert sample["image"].shape == (3, 16, 16)
        assert sample["presence"].tolist() == [True, False, True]
        assert not sample["image"][1].any()

    @pytest.mark.parametrize("index", [-1, 10])
    def test_names_the_case_that_has_no_such_slice(self, make_case: MakeCase, index: int):
        with pytest.raises(ValueError, match=f"Case case1: a has 10 slices, none is number {index}"):
            SelectSliced(MODALITIES)(self.load(make_case) | {"slice": index})


def test_label_values_that_need_two_bytes_are_written(make_case: MakeCase, tmp_path: Path):
    case = pipeline()(make_case())
    classes = MetaTensor(torch.zeros(1, 12, 14, 10, dtype=torch.int16), affine=case["image"].affine)
    classes[0, 3, 3, 3] = 1
    names = ("background", "scar")
    save = SaveSegmentationd(
        output_dir=tmp_path, modalities=MODALITIES, values=(0, 2221), class_names=names, regions={}
    )
    save(case | {"pred": classes})
    assert np.unique(nib.load(tmp_path / "case1_seg.nii.gz").dataobj).tolist() == [0, 2221]
