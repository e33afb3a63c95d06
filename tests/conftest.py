"""Small cases written as NIfTI, and what processors can do, for all tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import settings

# `pytest --hypothesis-profile=long` searches; without it, the same few examples run every time.
settings.register_profile("quick", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=2000, deadline=None)
settings.load_profile("quick")

MODALITIES = ("a", "b", "c")
BFLOAT16_STEPS = """
import torch
from passion_monai.networks import BACKBONES

for name, spatial_dims in [*[(name, 2) for name in BACKBONES], ("rfnet", 3)]:
    network = BACKBONES[name](spatial_dims, 2, 2, img_size=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(torch.randn(1, 2, *[32] * spatial_dims))
    logits.float().sum().backward()
"""


@pytest.fixture(scope="session")
def bfloat16() -> None:
    """Skips where a processor, as some virtual machines show it, kills the process at bfloat16 instructions."""
    process = subprocess.run([sys.executable, "-c", BFLOAT16_STEPS], capture_output=True, text=True, check=False)
    if process.returncode < 0:
        pytest.skip(f"bfloat16 ends the process with signal {-process.returncode} on this processor")
    assert process.returncode == 0, process.stderr


@pytest.fixture
def make_case(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Writes one case: a bright box in a zero background, one file per modality and a label."""

    def make(
        name: str = "case1",
        modalities: tuple[str, ...] = MODALITIES,
        *,
        shape: tuple[int, ...] = (12, 14, 10),
        spacing: float | tuple[float, ...] = 1.0,
        label: bool = True,
    ) -> dict[str, Any]:
        folder = tmp_path / name
        folder.mkdir()
        affine = np.diag([*np.broadcast_to(spacing, 3) * [-1, -1, 1], 1.0])
        affine[:3, 3] = 5.0, -3.0, 2.0
        rng = np.random.default_rng(len(name))
        inside = np.zeros(shape, dtype=bool)
        inside[2:-1, 3:-3, 1:-2] = True
        case: dict[str, Any] = {"case": name}
        for index, modality in enumerate(modalities):
            image = np.where(inside, 100 * (index + 1) + rng.normal(0, 10, shape), 0).astype(np.float32)
            case[modality] = str(folder / f"{modality}.nii.gz")
            nib.save(nib.Nifti1Image(image, affine), case[modality])
        if label:
            classes = np.zeros(shape, dtype=np.uint8)
            classes[4:8, 5:9, 3:6] = 2
            classes[5:7, 6:8, 4:5] = 4
            case["label"] = str(folder / "label.nii.gz")
            nib.save(nib.Nifti1Image(classes, affine), case["label"])
        return case

    return make
