"""For tests and benchmarks: random caches and measures of error; `testing.compiler` compiles for GPUs that are not here."""

from .cases import CacheCase, attention_in, cache_case, decode_bytes, relative_error

__all__ = ["CacheCase", "attention_in", "cache_case", "decode_bytes", "relative_error"]
