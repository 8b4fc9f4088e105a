"""LoRA adapters of a bundle, which requests select: low-rank changes of weights (Hu et al. 2021, arXiv:2106.09685)."""
