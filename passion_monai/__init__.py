"""Medical image segmentation with missing modalities under imbalanced missing rates (PASSION), built on MONAI.

Reference: Shi et al., "PASSION: Towards Effective Incomplete Multi-Modal Medical Image Segmentation with Imbalanced
Missing Rates", ACM Multimedia 2024, https://doi.org/10.1145/3664647.3681543.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passion_monai.segmenter import Segmenter

__all__ = ["Segmenter", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`Segmenter`, for which MONAI is imported only if it is asked for."""
    if name != "Segmenter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from passion_monai.segmenter import Segmenter

    return Segmenter
