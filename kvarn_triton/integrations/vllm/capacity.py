"""How many tokens a cache has room for, beside the 16-bit tokens of the most requests that may run."""

from __future__ import annotations

from dataclasses import dataclass

from .choice import Choice

SHARE = 0.1
"""Of the memory of a cache: what 16-bit tokens may take before a user is told."""


@dataclass(frozen=True)
class Capacity:
    """The cache of all layers, which are alike.

    Args:
        choice: how it is laid out.
        num_layers: layers.
        num_kv_heads: kv heads of a layer, those of one rank.
        head_dim: channels of a head.
        raw_bytes_per_number: of 16-bit tokens: 2, or 4 if a model runs in float32.
    """

    choice: Choice
    num_layers: int
    num_kv_heads: int
    head_dim: int
    raw_bytes_per_number: int = 2

    @property
    def request_bytes(self) -> int:
        """Bytes of the 16-bit tokens of a slot: a sink and a tail."""
        tokens = self.choice.columns * self.choice.page_size
        channels = self.choice.layout(self.head_dim).raw_head_dim
        return self.num_layers * self.num_kv_heads * tokens * 2 * channels * self.raw_bytes_per_number

    @property
    def raw_bytes(self) -> int:
        """Bytes of the 16-bit tokens of all slots."""
        return self.choice.num_slots * self.request_bytes

    @property
    def token_bytes(self) -> float:
        """Bytes of a token in pages."""
        layout = self.choice.layout(self.head_dim)
        return self.num_layers * self.num_kv_heads * layout.page_bytes / layout.page_size

    def tokens(self, memory: int) -> int:
        """Return how many tokens pages have room for in a number of bytes, 16-bit tokens included."""
        pages = max(memory - self.raw_bytes, 0) // int(self.token_bytes * self.choice.page_size)
        return pages * self.choice.page_size


def advice(choice: Choice, raw_bytes: float, page_bytes: float) -> str | None:
    """Return what to set if 16-bit tokens take a large share of the memory of a cache; None if they don't.

    Args:
        choice: how the cache is laid out.
        raw_bytes: bytes of 16-bit tokens.
        page_bytes: bytes of pages.
    """
    share = raw_bytes / (raw_bytes + page_bytes)
    if share <= SHARE:
        return None
    requests = int(choice.max_requests * SHARE / share)
    smaller = "; pages of 64 tokens (a layout that ends in _g64) need half of it" if choice.page_size > 64 else ""
    fewer = f"If fewer run at once, set --max-num-seqs: with {requests} it is {SHARE:.0%}"
    if not requests:
        fewer = "The cache needs more memory"
    of_all = f"kvarn_triton: {share:.0%} of the cache's memory is for the 16-bit tokens of {choice.max_requests} requests."
    return f"{of_all} {fewer}{smaller}."
