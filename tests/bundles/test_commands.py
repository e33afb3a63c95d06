"""Every way in that MONAI has, as the real command."""

from __future__ import annotations

import contextlib
import copy
import csv
import functools
import importlib.util
import json
import re
import shutil
import sqlite3
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
import yaml
from monai.bundle import create_workflow, load
from monai.data import load_net_with_metadata
from monai_command import printed
from safetensors import safe_open

from passion_monai.evaluation.expected import read_expected_scores
from passion_monai.networks.checkpoints import load_weights
from passion_monai.presence import write_presence
from passion_monai.report.runs import read_runs

SCHEMA = Path(__file__).with_name("metadata_schema.json")


def network_settings(bundle: Any) -> dict[str, Any]:
    """The small network, without what concerns data; the crop is the network's too."""
    kept = ("roi_size", "network_def::")
    return {name: value for name, value in bundle.small.items() if name.startswith(kept)}


def build_network(bundle: Any, weights: Path) -> torch.nn.Module:
    settings = network_settings(bundle) | {"bundle_root": str(bundle.folder)}
    workflow = create_workflow(config_file=bundle.config("inference"), logging_file=False, **settings)
    network = workflow.parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network


def tolerance(network: torch.nn.Module, image: torch.Tensor, row: torch.Tensor, logits: torch.Tensor) -> float:
    """What exports may differ by: 1e-3, or by some of the network's own rounding where that is more."""
    exact = copy.deepcopy(network).double()(image.double(), row)
    return max(1e-3, 5 * float((exact - logits).abs().max()))


def random_image(bundle: Any) -> torch.Tensor:
    channels = len(
        json.loads((bundle.folder / "configs" / "metadata.json").read_text())["network_data_format"]["inputs"]["image"][
            "channel_def"
        ]
    )
    return torch.randn(1, channels, *bundle.small["roi_size"], generator=torch.Generator().manual_seed(0))


class TestMetadata:
    @pytest.mark.two_bundles
    def test_it_keeps_the_schema(self, bundle: Any):
        meta_file = bundle.folder / "configs" / "metadata.json"
        printed(bundle.monai("verify_metadata", meta_file=meta_file, filepath=SCHEMA))

    def test_a_key_that_is_missing_is_noticed(self, one_bundle: Any, tmp_path: Path):
        metadata = json.loads((one_bundle.folder / "configs" / "metadata.json").read_text())
        del metadata["network_data_format"]["inputs"]["image"]["dtype"]
        (tmp_path / "metadata.json").write_text(json.dumps(metadata))
        result = one_bundle.monai("verify_metadata", meta_file=tmp_path / "metadata.json", filepath=SCHEMA)
        assert "'dtype' is a required property" in result.stderr

    def test_the_changelog_has_the_version(self, bundle: Any):
        metadata = json.loads((bundle.folder / "configs" / "metadata.json").read_text())
        assert metadata["version"] in metadata["changelog"]

    @pytest.mark.two_bundles
    def test_network_takes_and_gives_what_it_says(self, bundle: Any, tmp_path: Path):
        metadata = json.loads((bundle.folder / "configs" / "metadata.json").read_text())
        for tensor in (
            metadata["network_data_format"][side][name] for side, name in (("inputs", "image"), ("outputs", "pred"))
        ):
            tensor["spatial_shape"] = bundle.small["roi_size"]
        (tmp_path / "metadata.json").write_text(json.dumps(metadata))
        files = {"meta_file": tmp_path / "metadata.json", "config_file": bundle.config("inference")}
        printed(bundle.monai("verify_net_in_out", "network_def", **files, **network_settings(bundle)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestExport:
    def export(self, bundle: Any, command: str, net_id: str, trained: Path, path: Path, **more: Any) -> None:
        arguments = {"filepath": path, "ckpt_file": trained / "models" / "model.pt"}
        arguments |= {
            "meta_file": bundle.folder / "configs" / "metadata.json",
            "config_file": bundle.config("inference"),
        }
        printed(bundle.monai(command, net_id, **arguments, **network_settings(bundle), **more))

    @pytest.mark.two_bundles
    @torch.no_grad()
    def test_torchscript_takes_image_and_presence(self, bundle: Any, trained: Path, tmp_path: Path):
        self.export(bundle, "ckpt_export", "network_script", trained, tmp_path / "model.ts")
        script, metadata, extra = load_net_with_metadata(
            str(tmp_path / "model.ts"), more_extra_files=["inference.json"]
        )
        assert metadata["version"]
        assert json.loads(extra["inference.json"])["network_def"]
        network, image = build_network(bundle, trained / "models" / "model.pt"), random_image(bundle)
        for row in torch.eye(image.shape[1], dtype=torch.bool)[:, None]:
            for given in (row, ~row):
                expected = network(image, given)
                atol = tolerance(network, image, given, expected)
                torch.testing.assert_close(script.eval()(image, given), expected, rtol=1e-3, atol=atol)

    @pytest.mark.two_bundles
    @torch.no_grad()
    def test_the_network_itself_can_be_traced(self, bundle: Any, trained: Path, tmp_path: Path):
        image = random_image(bundle)
        shape = str(list(image.shape)).replace(" ", "")
        path = tmp_path / "model.ts"
        self.export(bundle, "ckpt_export", "network_def", trained, path, use_trace=True, input_shape=shape)
        network = build_network(bundle, trained / "models" / "model.pt")
        torch.testing.assert_close(torch.jit.load(path).eval()(image), network(image), rtol=1e-3, atol=1e-3)

    @pytest.mark.two_bundles
    @torch.no_grad()
    def test_onnx_gives_the_same_labels(self, bundle: Any, trained: Path, tmp_path: Path):
        image = random_image(bundle)
        shape = str(list(image.shape)).replace(" ", "")
        self.export(bundle, "onnx_export", "network_onnx", trained, tmp_path / "model.onnx", input_shape=shape)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        network = build_network(bundle, trained / "models" / "model.pt")
        for row in torch.eye(image.shape[1], dtype=torch.bool)[:, None]:
            masked = image * row.view(1, -1, *[1] * (image.ndim - 2))
            (logits,) = session.run(None, {session.get_inputs()[0].name: masked.numpy()})
            expected = network(image, row)
            atol = tolerance(network, image, row, expected)
            torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=atol)
            assert (torch.from_numpy(logits).argmax(1) == expected.argmax(1)).float().mean() > 0.999


@pytest.fixture(scope="module")
def pack() -> Iterator[ModuleType]:
    """bundles/pack.py, which is a command and no part of the package."""
    folder = Path(__file__).parents[2] / "bundles"
    sys.path.insert(0, str(folder))
    specification = importlib.util.spec_from_file_location("pack", folder / "pack.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    yield module
    sys.path.remove(str(folder))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server on this machine, for the files in `tmp_path / "dist"`."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "dist"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.two_bundles
def test_download_infer_and_load(
    bundle: Any, pack: ModuleType, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The path of somebody who knows only MONAI: a zip from a server, unpacked and run from somewhere else."""
    dist, elsewhere = tmp_path / "dist", tmp_path / "elsewhere"
    monkeypatch.setattr(pack, "DIST", dist)
    pack.write_bundle(bundle.folder, dist / bundle.name)
    elsewhere.mkdir()
    workflow = create_workflow(
        config_file=str(dist / bundle.name / "configs" / "inference.yaml"), logging_file=False, bundle_root=str(dist)
    )
    (dist / bundle.name / "models").mkdir()
    torch.save(
        workflow.parser.get_parsed_content("network_def").state_dict(), dist / bundle.name / "models" / "model.pt"
    )
    (tmp_path / "package.whl").touch()
    archive = pack.pack(bundle.folder, tmp_path / "package.whl")
    assert archive.name.startswith(f"{bundle.name}_v")
    assert "phantom" in archive.name
    shutil.rmtree(dist / bundle.name)

    url = f"{server}/{archive.name}"
    printed(bundle.monai("download", cwd=elsewhere, name=bundle.name, url=url, bundle_dir=elsewhere))
    folder = elsewhere / bundle.name
    assert "PHANTOM" in (folder / "docs" / "README.md").read_text()
    config = folder / "configs" / "inference.yaml"
    printed(bundle.monai("run", cwd=elsewhere, config_file=config, num_workers=0, **{"phantom::num_cases": 3}))
    predictions = list((folder / "predictions").glob("*_seg.nii.gz"))
    assert len(predictions) == 3
    assert all(nib.load(path).shape[2] > 1 for path in predictions)
    network = load(bundle.name, bundle_dir=str(elsewhere), workflow_type="inference")
    expected = torch.load(folder / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


def test_packing_without_weights_says_what_to_do(
    one_bundle: Any, pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pack, "DIST", tmp_path)
    with pytest.raises(FileNotFoundError, match="make weights"):
        pack.pack(one_bundle.folder, tmp_path / "package.whl")


def test_what_may_identify_patients_is_not_packed(
    one_bundle: Any, pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pack, "DIST", tmp_path)
    bundle = tmp_path / one_bundle.name
    (bundle / "models").mkdir(parents=True)
    (bundle / "models" / "model.pt").touch()
    (bundle / "predictions").mkdir()
    with pytest.raises(FileExistsError, match="holds predictions, no part of the bundle"):
        pack.pack(one_bundle.folder, tmp_path / "package.whl")


def make_run(folder: Path, seed: int, cases: Sequence[str]) -> Path:
    """What is left of a training with an evaluation, as far as weights for everybody are made of it."""
    (folder / "models").mkdir(parents=True)
    torch.save({"weight": torch.arange(6.0).view(2, 3).T}, folder / "models" / "model.pt")
    (folder / "evaluation").mkdir()
    settings = {
        "bundle": "brats_rfnet_passion",
        "modalities": ["flair", "t1ce", "t1", "t2"],
        "phantom": False,
        "dataset": "brats",
        "backbone": "RFNet",
        "class_names": ["background", "tumour"],
        "regions": {"WT": [1]},
        "spacing": [2.0] * 3,
        "roi_size": [48] * 3,
        "missing_rates": [0.6, 0.4, 0.2, 0.8],
        "seed": seed,
        "objective": "passion",
        "modality_dropout": False,
        "lambda_pixel": 0.5,
        "lambda_prototype": 0.1,
        "use_task_mask": True,
        "adaptive_beta": True,
        "epochs": 100,
        "batch_size": 1,
        "learning_rate": 1e-3,
        "precision": "bfloat16",
    }
    (folder / "run.json").write_text(json.dumps(settings))
    write_presence(
        folder / "presence.json", list(cases), np.ones((len(cases), 4), bool), modalities=settings["modalities"]
    )
    scores = pd.DataFrame(
        {"case": cases, "combination": "flair", "region": "WT", "dice": np.linspace(0.5, 0.6, len(cases))}
    )
    numbers = ("hd95_mm", "hd95_brats", "hd95_released", "assd_mm", "prediction_ml", "label_ml")
    scores.assign(**dict.fromkeys(numbers, 4.0)).to_csv(folder / "evaluation" / "scores.csv", index=False)
    return folder


def test_weights_of_patients_get_a_model_card_and_tell_the_scores_of_their_cross_validation(
    pack: ModuleType, tmp_path: Path
):
    source = tmp_path / "brats_rfnet_passion"
    source.mkdir()
    shutil.copy(Path(pack.ROOT) / source.name / "bundle.yaml", source)
    folds = [make_run(tmp_path / f"fold{seed}", seed, [f"{seed}a", f"{seed}b"]) for seed in range(2)]
    run = make_run(tmp_path / "all", 0, ["0a", "0b", "1a", "1b"])
    pack.put_weights(source, run)
    pack.put_scores(source, read_runs(map(str, folds)))
    stranger = make_run(tmp_path / "fold2", 2, ["2a"])
    with pytest.raises(ValueError, match=r"fold2 tested \['2a'\], which are not among the cases of the weights"):
        pack.put_scores(source, read_runs(map(str, [*folds, stranger])))
    expected = read_expected_scores(source / "models" / "model.pt")
    assert expected is not None
    assert expected["combinations"]["flair"]["WT"]["dice"]["mean"] == 0.55
    assert expected["combinations"]["flair"]["WT"]["dice"]["cases"] == 4
    made = dict(pack.bundle_files(source))
    card = made["docs/README.md"]
    assert "Hidden: flair in 60%" in card
    assert "4 cases: 0a, 0b, 1a, 1b." in card
    assert "400 steps of 1 crop, 48 x 48 x 48 voxels of 2 x 2 x 2 mm" in card
    assert "CC-BY-4.0" in card
    assert "Cross-validation: 2 networks," in card
    assert re.search(r"\| flair \| 55 \[\d+, \d+\] \| 4 \|", card)
    assert "trained on 4 patients" in json.loads(made["configs/metadata.json"])["description"]


def test_a_model_hub_gets_the_bundle_with_safetensors_that_say_what_they_are(
    pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pack, "DIST", tmp_path / "dist")
    source = tmp_path / "brats_rfnet_passion"
    source.mkdir()
    shutil.copy(Path(pack.ROOT) / source.name / "bundle.yaml", source)
    with pytest.raises(FileNotFoundError, match="make weights-real"):
        pack.write_hub_folder(source)
    pack.put_weights(source, make_run(tmp_path / "all", 0, ["0a", "0b"]))
    pack.put_scores(source, read_runs([str(make_run(tmp_path / "fold", 0, ["0a", "0b"]))]))
    folder = pack.write_hub_folder(source)
    weights = folder / "models" / "model.safetensors"
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    assert metadata["license"] == "CC-BY-4.0"
    assert "Baid" in metadata["citation"]
    assert "2 cases: 0a, 0b." in metadata["training_data"]
    network = torch.nn.Module()
    network.register_buffer("weight", torch.zeros(3, 2))
    load_weights(network, weights)
    assert network.weight.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert read_expected_scores(folder / "models" / "model.pt") is not None
    _, fields, card = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(fields)["license"] == "cc-by-4.0"
    assert "## Model card" in card
    assert (folder / "configs" / "inference.yaml").is_file()


@pytest.mark.two_bundles
@pytest.mark.parametrize("workflow", ["train", "inference"])
def test_create_workflow_finds_all_properties(bundle: Any, workflow: str, tmp_path: Path):
    overrides = bundle.small | {"output_dir": str(tmp_path), "bundle_root": str(bundle.folder)}
    created = create_workflow(
        config_file=bundle.config(workflow), workflow_type=workflow, logging_file=False, **overrides
    )
    assert created.check_properties() == []


def test_mlflow_tracks_what_the_log_says(one_bundle: Any, tmp_path: Path):
    one_bundle.succeed("train", output_dir=tmp_path, epochs=2, val_interval=1, tracking="mlflow")
    with (tmp_path / "training.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with contextlib.closing(sqlite3.connect(tmp_path / "mlruns.db")) as database:
        tracked = dict(database.execute("select step, value from metrics where key = 'beta_flair'").fetchall())
    assert tracked == {int(row["epoch"]): pytest.approx(float(row["beta_flair"])) for row in rows}
