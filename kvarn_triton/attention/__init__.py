"""Attention over a cache: calls, kernels, and what one program does with pages, tokens and partial results."""
