"""Sparse fine-tuning of language models, tracked from mask to merged checkpoint."""

__version__ = "0.1.0"
