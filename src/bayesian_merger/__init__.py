"""Finds the merge of Stable Diffusion checkpoints that makes the best images."""

__version__ = "0.1.0"
