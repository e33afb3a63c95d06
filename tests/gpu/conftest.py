"""Each test runs on a GPU, where there is one, and in `make test-all` on the CPU too, so that it is known to work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(
    params=[pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU]), pytest.param("cpu", marks=pytest.mark.slow)]
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Without TF32, which has three digits."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield torch.device(request.param)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
