"""Medical image segmentation with missing modalities under imbalanced missing rates (PASSION), built on MONAI.

Reference: Shi et al., "PASSION: Towards Effective Incomplete Multi-Modal Medical Image Segmentation with Imbalanced
Missing Rates", ACM Multimedia 2024, https://doi.org/10.1145/3664647.3681543.
"""

__version__ = "0.1.0"
