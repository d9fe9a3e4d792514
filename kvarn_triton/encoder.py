"""How a tile becomes codes: the options of the encoder. The page format and every reader are the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import require


@dataclass(frozen=True)
class Encoder:
    """Options of the encoder.

    Args:
        iterations: rounds of the balancing (section 2 of `docs/method.md`); 0 to 64, 8 by default as in the paper.
        equivariant: divide each tile by its root mean square before it is balanced, so that `encode(a * tile)` gives the
            codes of `encode(tile)`, up to rounding where `a` is no power of two. False is the method as published, whose
            floor on the log scales leaves tiles of small magnitude unbalanced.
    """

    iterations: int = 8
    equivariant: bool = True

    def __post_init__(self) -> None:
        valid = isinstance(self.iterations, int) and 0 <= self.iterations <= 64
        require(valid, "iterations", "an integer from 0 to 64", self.iterations)
        require(isinstance(self.equivariant, bool), "equivariant", "True or False", self.equivariant)


DEFAULT = Encoder()
PUBLISHED = Encoder(equivariant=False)
"""The method as published (arXiv 2606.03458)."""
