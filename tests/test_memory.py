from __future__ import annotations

import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys, torch
from passion_monai.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(20):
    torch.empty(2**24).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is one of the GNU C library")
def test_freed_memory_is_not_mapped_again():
    def faults(allocator: str) -> int:
        result = subprocess.run([sys.executable, "-c", COUNT_FAULTS, allocator], capture_output=True, check=True)
        return int(result.stdout)

    # 64 MiB are 16384 pages; by default each of the 20 tensors has its own.
    assert faults("default") - faults("kept") > 10 * 16384
