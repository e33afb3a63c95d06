"""What a training and an inference on NIfTI files do without: a machine for training has little more than torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from passion_monai.datasets.phantom import write_phantom

CONFIGS = Path(__file__).parents[1] / "bundles" / "myops_rfnet_passion" / "configs"
# What setup.cfg installs, or an extra of it, beyond monai[ignite,nibabel,fire,pyyaml,tqdm], torch, numpy and jinja2.
BLOCKED = ("itk", "scipy", "pandas", "matplotlib", "tensorboard", "nilearn", "mlflow", "onnx")
# None stands for a package that is not there.
BLOCK = f"""
import json, sys, warnings

sys.modules |= dict.fromkeys({BLOCKED})
warnings.simplefilter("ignore")
"""
WORKFLOWS = """
import monai.bundle

for run_id, config_file, settings in json.loads(sys.argv[1]):
    monai.bundle.run(run_id, config_file=config_file, **settings)
"""
READ_NRRD = """
from passion_monai.transforms import LoadCased

LoadCased(["a"])({"case": "Jo", "a": sys.argv[1]})
"""


def run(code: str, argument: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCK + code, argument], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    write_phantom("myops", folder, num_cases=5, shape=(40, 40, 2), spacing=(5.0, 5.0, 10.0))
    return folder


def test_training_and_inference_on_nifti_need_no_other_package(cohort: Path, tmp_path: Path):
    common = {"dataset_dir": str(cohort), "output_dir": str(tmp_path), "num_workers": 0, "roi_size": [32, 32]}
    common |= {"spacing": [6.0, 6.0], "network_def::width": 4}
    runs = [
        ("training", str(CONFIGS / "train.yaml"), {**common, "epochs": 1}),
        (None, str(CONFIGS / "inference.yaml"), {**common, "ckpt_path": str(tmp_path / "models" / "model.pt")}),
    ]
    process = run(WORKFLOWS, json.dumps(runs))
    assert process.returncode == 0, process.stderr[-8000:]
    assert (tmp_path / "training.csv").is_file()
    assert not (tmp_path / "tensorboard").exists()
    assert len(list((tmp_path / "predictions").glob("*_seg.nii.gz"))) == 5


def test_a_file_that_needs_itk_names_the_remedy(tmp_path: Path):
    (tmp_path / "a.nrrd").write_bytes(b"NRRD0004")
    process = run(READ_NRRD, str(tmp_path / "a.nrrd"))
    assert "NRRD, MetaImage and DICOM need ITK: pip install itk" in process.stderr
