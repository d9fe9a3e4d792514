"""How a tile becomes codes: the options of the encoder. The page format and every reader are the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import check_choice, require


@dataclass(frozen=True)
class Encoder:
    """Options of the encoder (`docs/method.md`); `docs/accuracy.md` says what each of them is worth.

    Args:
        iterations: rounds of the balancing, 0 to 64; 8 in the paper.
        equivariant: divide each tile by its root mean square before it is balanced, so that `encode(a * tile)` gives the
            codes of `encode(tile)`, up to rounding where `a` is no power of two. False is the method as published, whose
            floor on the log scales leaves tiles of small magnitude unbalanced.
        clip: start from a part of the range between minimum and maximum that is better for the bits of a code: 0.7 of it at
            2 bits, 0.9 at 3 bits, all of it at 4 and 8. False starts from all of it, as published.
        fits: how often scale and zero are fitted to the codes by least squares and the codes assigned anew, 0 to 16; 0 as
            published.
        norm: "balance" stores the balancing factors as norms, as published. "length" stores those with which every token of
            the keys and every channel of the values that is read back has the length of the exact one.
    """

    iterations: int = 2
    equivariant: bool = True
    clip: bool = True
    fits: int = 1
    norm: Literal["balance", "length"] = "length"

    def __post_init__(self) -> None:
        for name, largest in (("iterations", 64), ("fits", 16)):
            value = getattr(self, name)
            valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest
            require(valid, name, f"an integer from 0 to {largest}", value)
        for name in ("equivariant", "clip"):
            require(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        check_choice("norm", self.norm, ("balance", "length"))


DEFAULT = Encoder()
PUBLISHED = Encoder(iterations=8, equivariant=False, clip=False, fits=0, norm="balance")
"""The method as published (arXiv 2606.03458)."""
