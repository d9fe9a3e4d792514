"""For tests and benchmarks: random caches and measures of error; `testing.compiler` compiles for GPUs that are not here."""

from .cases import *  # noqa: F403
