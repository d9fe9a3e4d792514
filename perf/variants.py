"""Encoders that were tried: balancing and range fitting with every option, in plain PyTorch and in log space as published.

`Variant()` is the method as published. The page format is that of the package for all of them, so a variant costs the bytes of
its layout. Those that the package offers are options of `Encoder`; the rest are here so that the accuracy sweep can say what
they are worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from kv_codecs import Codec, half, layout_bits

from kvarn_triton import PageLayout, reference

Per = Literal["channel", "token"]

CLIPPED_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.0308}
"""Step of the evenly spaced values of least squared error for normal numbers of standard deviation 1, by bits."""


@dataclass(frozen=True)
class Variant:
    """Options of an encoder.

    Args:
        iterations: rounds of balancing.
        divide: divide a tile by its root mean square first.
        statistic: what balancing makes equal: standard deviations, or root mean squares.
        floor: least logarithm of a balancing scale.
        damping: how much of the logarithm of a deviation one step takes.
        clip: start from the range that is best for normal numbers instead of minimum and maximum.
        shrink: start from this part of the range, around its middle.
        rounds: times that scale and zero are fitted to the codes by least squares, and the codes assigned anew.
        norm: what the other axis's factor is in the end: "balance" as it was balanced with; or fitted to what is read back,
            by "squares" (least squared error), "length" (same length as the exact vector) or "projection" (the same
            projection on the exact vector).
    """

    iterations: int = 8
    divide: bool = False
    statistic: Literal["std", "rms"] = "std"
    floor: float = -0.3
    damping: float = 1.0
    clip: bool = False
    shrink: float = 1.0
    rounds: int = 0
    norm: Literal["balance", "squares", "length", "projection"] = "balance"


def balance(tile: torch.Tensor, per: Per, variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales of tokens [..., tokens, 1] and of channels [..., 1, channels]."""
    token, channel = torch.zeros_like(tile[..., :1]), torch.zeros_like(tile[..., :1, :])

    def deviation(x: torch.Tensor, dim: int) -> torch.Tensor:
        if variant.statistic == "std":
            return x.std(dim, keepdim=True)
        return x.square().mean(dim, keepdim=True).sqrt()

    def current() -> torch.Tensor:
        return tile / token.exp() / channel.exp()

    def imbalance(x: torch.Tensor) -> torch.Tensor:
        ratio = torch.zeros_like(tile[..., :1, :1])
        for dim in (-1, -2):
            spread = deviation(x, dim)
            ratio = ratio + spread.amax((-2, -1), keepdim=True) / spread.amin((-2, -1), keepdim=True).clamp_min(1e-8)
        return ratio

    def step(log_scale: torch.Tensor, dim: int) -> torch.Tensor:
        change = deviation(current(), dim).clamp(1e-3, 1e3).log() * variant.damping
        return (log_scale + change).clamp(variant.floor, 10.0)

    best, best_token, best_channel = imbalance(tile), token, channel
    for _ in range(variant.iterations):
        if per == "channel":
            token = step(token, -1)
            channel = step(channel, -2)
        else:
            channel = step(channel, -2)
            token = step(token, -1)
        now = imbalance(current())
        better = now <= best
        best = torch.where(better, now, best)
        best_token, best_channel = torch.where(better, token, best_token), torch.where(better, channel, best_channel)
    return best_token.exp(), best_channel.exp()


def fit(x: torch.Tensor, bits: int, dim: int, variant: Variant) -> torch.Tensor:
    """Return x rounded to `scale * code + zero`, with one scale and zero along `dim`."""
    levels = 2**bits - 1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    if variant.clip:
        mean, reach = x.mean(dim, keepdim=True), x.std(dim, keepdim=True) * CLIPPED_STEP[bits] * levels / 2
        low, high = torch.maximum(low, mean - reach), torch.minimum(high, mean + reach)
    cut = (1 - variant.shrink) / 2 * (high - low)
    low, high = low + cut, high - cut
    scale, zero = ((high - low) / levels).clamp_min(1e-10), low
    for _ in range(variant.rounds):
        codes = ((x - zero) / scale).round().clamp(0, levels)
        code_mean, mean = codes.mean(dim, keepdim=True), x.mean(dim, keepdim=True)
        covariance = ((codes - code_mean) * (x - mean)).sum(dim, keepdim=True)
        variance = (codes - code_mean).square().sum(dim, keepdim=True)
        scale = torch.where(variance > 0, covariance / variance.clamp_min(1e-10), scale).clamp_min(1e-10)
        zero = mean - scale * code_mean
    return ((x - zero) / scale).round().clamp(0, levels) * half(scale) + half(zero)


def read_back(tiles: torch.Tensor, bits: int, per: Per, variant: Variant) -> torch.Tensor:
    """Return rotated tiles [..., tokens, channels] as they would be read back."""
    size = tiles.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-20) if variant.divide else 1.0
    tiles = tiles / size
    token, channel = balance(tiles, per, variant)
    read = fit(tiles / token / channel, bits, -2 if per == "channel" else -1, variant)
    own, norm, dim = (channel, token, -1) if per == "channel" else (token, channel, -2)
    read = read * own
    if variant.norm != "balance":
        both = (read * tiles).sum(dim, keepdim=True)
        exact, squares = tiles.square().sum(dim, keepdim=True), read.square().sum(dim, keepdim=True).clamp_min(1e-20)
        if variant.norm == "squares":
            norm = both / squares
        elif variant.norm == "length":
            norm = (exact / squares).sqrt()
        else:
            norm = torch.where(both > 0, exact / both.clamp_min(1e-20), norm)
    return read * half(norm) * size


def codec(layout: PageLayout, k: Variant, v: Variant, name: str) -> Codec:
    """Return encoders of keys and values as one codec."""

    def both(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys = read_back(reference.hadamard(keys), layout.k_bits, "channel", k)
        values = read_back(reference.hadamard(values), layout.v_bits, "token", v)
        return reference.hadamard(keys), reference.hadamard(values)

    return Codec(name, *layout_bits(layout), both)


def _both(**options) -> tuple[Variant, Variant]:
    return Variant(**options), Variant(**options)


def _one(**options) -> dict[str, tuple[Variant, Variant]]:
    """Return a change of range fitting and norms for keys only, for values only, and for both."""
    base, changed = Variant(divide=True), Variant(divide=True, **options)
    return {"K": (changed, base), "V": (base, changed), "K and V": (changed, changed)}


TRIED: dict[str, tuple[Variant, Variant]] = {
    "published": _both(),
    "no balancing": _both(iterations=0),
    "divided": _both(divide=True),
    **{f"divided, {n} iterations": _both(divide=True, iterations=n) for n in (1, 2, 4, 16)},
    "divided, no floor": _both(divide=True, floor=-10.0),
    "divided, floor -1": _both(divide=True, floor=-1.0),
    "divided, damped": _both(divide=True, damping=0.5),
    "rms": _both(divide=True, statistic="rms"),
    "rms, no floor": _both(divide=True, statistic="rms", floor=-10.0),
    "rms, no floor, 2 iterations": _both(divide=True, statistic="rms", floor=-10.0, iterations=2),
    **{f"clipped: {name}": pair for name, pair in _one(clip=True).items()},
    **{f"clipped, 2 fits: {name}": pair for name, pair in _one(clip=True, rounds=2).items()},
    "1 fit": _both(divide=True, rounds=1),
    "4 fits": _both(divide=True, rounds=4),
    "clipped, 1 fit": _both(divide=True, clip=True, rounds=1),
    "clipped, 8 fits": _both(divide=True, clip=True, rounds=8),
    **{
        f"norm by {norm}: {name}": pair
        for norm in ("squares", "length", "projection")
        for name, pair in _one(norm=norm).items()
    },
    **{
        f"clipped, 2 fits, norm by {norm}: {name}": pair
        for norm in ("squares", "length", "projection")
        for name, pair in _one(clip=True, rounds=2, norm=norm).items()
    },
    "rms, no floor, clipped, 2 fits": _both(divide=True, statistic="rms", floor=-10.0, clip=True, rounds=2),
    "no balancing, clipped, 2 fits, norm by squares": _both(divide=True, iterations=0, clip=True, rounds=2, norm="squares"),
    "1 iteration, clipped, 2 fits, norm by squares": _both(divide=True, iterations=1, clip=True, rounds=2, norm="squares"),
    "2 iterations, clipped, 2 fits, norm by squares": _both(divide=True, iterations=2, clip=True, rounds=2, norm="squares"),
}
"""Encoders of keys and of values by name, as the sweep shows them."""
