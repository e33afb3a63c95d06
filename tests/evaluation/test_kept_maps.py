from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from passion_monai.evaluation.kept_maps import keep_case, read_kept_case


def keep(path: Path) -> None:
    """A case whose second modality is missing, with images on half the label's resolution along the first axis.

    The label's second axis runs to the back.
    """
    image = torch.zeros(2, 2, 4, 1)
    image[0] = torch.tensor([[-1.0] * 4, [3.0] * 4])[..., None]
    image[0, 0, 3] = 0.0
    label = torch.arange(16).reshape(1, 4, 4, 1) % 3
    to_the_back = torch.diag(torch.tensor([1.0, -1, 1, 1]))
    to_the_back[1, 3] = 3
    keep_case(
        path,
        image=MetaTensor(image, affine=torch.diag(torch.tensor([2.0, 1, 1, 1]))),
        presence=[True, False],
        modalities=["flair", "t1"],
        label=MetaTensor(label, affine=to_the_back),
        predictions=label.flip(1).to(torch.int16),
        combinations=["flair"],
    )


def test_a_kept_case_is_on_the_grid_of_its_label(tmp_path: Path) -> None:
    keep(tmp_path / "maps" / "001.npz")
    case = read_kept_case(tmp_path / "maps" / "001.npz")
    assert case.images.shape == (2, 4, 4, 1)
    assert (case.images.dtype, case.label.dtype, case.predictions.dtype) == (np.uint8,) * 3
    # Half way between the darkest and the brightest row lies half the grey; what the image does not cover is black.
    assert case.images[0, :, 0, 0].tolist() == [0, 128, 255, 128]
    assert case.images[0, 0, 3, 0] == 0
    assert not case.images[1].any()
    assert case.presence.tolist() == [True, False]
    assert case.modalities.tolist() == ["flair", "t1"]
    assert case.combinations.tolist() == ["flair"]
    assert case.spacing.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(case.label[:, ::-1, 0], np.arange(16).reshape(4, 4) % 3)
    np.testing.assert_array_equal(case.predictions[0], case.label[::-1])


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04", None])
def test_what_is_no_kept_case_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "001.npz"
    if content is None:
        np.savez(path, label=np.zeros(3))
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"001\.npz is no kept case .*; evaluate with --keep_cases again"):
        read_kept_case(path)
