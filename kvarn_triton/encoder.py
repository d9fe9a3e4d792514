"""How a tile becomes codes: the options of the encoder. The page format and every reader are the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import check_choice, require


@dataclass(frozen=True)
class Encoder:
    """Options of the encoder (`docs/method.md`); `docs/accuracy.md` says what each of them is worth.

    Args:
        iterations: rounds of the balancing, 0 to 64; 8 in the published code.
        equivariant: divide each tile by the size of its tokens before it is balanced, and balance tokens first. Then
            `encode(a * tile)` gives the codes of `encode(tile)`, up to rounding where `a` is no power of two, and one token of
            any magnitude does not change how the others of its page are rounded. False is the method as published: its floor
            on the log scales leaves tiles of small magnitude unbalanced.
        clip: start from 0.8 of the range between minimum and maximum at 2 bits. At more bits all of it is better. False starts
            from all of it, as published.
        fits: how often scale and zero are fitted to the codes by least squares and the codes assigned anew, 0 to 16; 0 as
            published. Values of 2 to 5 bits are fitted, and keys of 2 bits. Keys of more bits never are: their extremes are
            what a model finds things by, and rounding between minimum and maximum keeps those exactly.
        norm: "balance" stores the balancing factors as norms, as published. "projection" does so too, and stretches what
            rounding made too short, so that scores have no bias towards zero: the scale of every row that was fitted, about
            the row's mean, until the row has the same covariance with what is read back as with itself; and the norm of every
            token of keys that were not fitted, until the balanced token has the same projection. "length" stores norms with
            which every token of the keys and every channel of the values that is read back has the length of the exact one.
    """

    iterations: int = 2
    equivariant: bool = True
    clip: bool = True
    fits: int = 2
    norm: Literal["balance", "length", "projection"] = "projection"

    def __post_init__(self) -> None:
        for name, largest in (("iterations", 64), ("fits", 16)):
            value = getattr(self, name)
            valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest
            require(valid, name, f"an integer from 0 to {largest}", value)
        for name in ("equivariant", "clip"):
            require(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        check_choice("norm", self.norm, ("balance", "length", "projection"))


DEFAULT = Encoder()
PUBLISHED = Encoder(iterations=8, equivariant=False, clip=False, fits=0, norm="balance")
"""The method as published (arXiv 2606.03458, with the options of its code)."""
