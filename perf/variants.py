"""Encoders that were tried: balancing and range fitting with every option, in plain PyTorch and in log space as published.

`Variant()` is the method as published. The page format is that of the package for all of them, so a variant costs the bytes of
its layout. Those that the package offers are options of `Encoder`; the rest are here so that the accuracy sweep can say what
they are worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from kv_codecs import Codec, half, layout_bits, lloyd_max_levels

from kvarn_triton import PageLayout, reference

Per = Literal["channel", "token"]

CLIPPED_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}
"""Step of the evenly spaced values of least squared error for normal numbers of standard deviation 1, by bits."""


@dataclass(frozen=True)
class Variant:
    """Options of an encoder.

    Args:
        iterations: rounds of balancing.
        divide: divide a tile by its size first: "rms", its root mean square; "roots", the square of the mean of the roots of
            its tokens' lengths, which one large token hardly moves.
        statistic: what balancing makes equal: standard deviations, or root mean squares.
        tokens_first: balance tokens before channels in values too, as in keys.
        floor: least logarithm of a balancing scale.
        damping: how much of the logarithm of a deviation one step takes.
        clip: start from the range that is best for normal numbers instead of minimum and maximum.
        shrink: start from this part of the range, around its middle.
        rounds: times that scale and zero are fitted to the codes, and the codes assigned anew.
        slope: what the fitted scale keeps: 0 the least squared error, 1 the covariance of a row with what is read back, 0.5 the
            variance of a row; between them the geometric mean.
        weight: power of the distance from the middle of the range with which numbers count in fits.
        keep: don't assign codes after the last fit.
        rescale: `slope` of one more fit to the last codes, after which none is assigned; None leaves it out.
        norm: what the other axis's factor is in the end: "balance" as it was balanced with; or fitted to what is read back,
            by "squares" (least squared error), "length" (same length as the exact vector) or "projection" (the same
            projection on the exact vector). "even length" and "even projection" are those of the balanced tile, in which one
            large token counts as much as any other.
        feedback: part of the error that the tokens before have left in a channel, which is added before a number is rounded, at
            most a quarter of a step; errors of values then cancel where attention is spread over neighbours.
        normal: levels that are best for normal numbers instead of evenly spaced ones, between the same two ends. No page format
            has them; the bytes are the same.
    """

    iterations: int = 8
    divide: Literal["rms", "roots"] | None = None
    statistic: Literal["std", "rms"] = "std"
    tokens_first: bool = False
    floor: float = -0.3
    damping: float = 1.0
    clip: bool = False
    shrink: float = 1.0
    rounds: int = 0
    slope: float = 0.0
    weight: float = 0.0
    keep: bool = False
    rescale: float | None = None
    norm: Literal["balance", "squares", "length", "projection", "even length", "even projection"] = "balance"
    feedback: float = 0.0
    normal: bool = False


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
        if per == "channel" or variant.tokens_first:
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


def fit(x: torch.Tensor, bits: int, dim: int, variant: Variant, own: torch.Tensor) -> torch.Tensor:
    """Return x rounded to `scale * level + zero`, with one scale and zero along `dim`; `own` is the balancing's along it."""
    levels = 2**bits - 1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    if variant.clip:
        mean, reach = x.mean(dim, keepdim=True), x.std(dim, keepdim=True) * CLIPPED_STEP[bits] * levels / 2
        low, high = torch.maximum(low, mean - reach), torch.minimum(high, mean + reach)
    middle, span = (low + high) / 2, (high - low).clamp_min(1e-10)
    weight = ((x - middle) * 2 / span).abs().pow(variant.weight).clamp_min(1e-3) if variant.weight else torch.ones_like(x)
    weight = weight / weight.sum(dim, keepdim=True)
    low, high = middle - variant.shrink / 2 * span, middle + variant.shrink / 2 * span
    scale, zero = ((high - low) / levels).clamp_min(1e-10), low
    points = _points(bits, x.device) if variant.normal else torch.arange(levels + 1.0, device=x.device)
    codes = _nearest((x - zero) / scale, points)
    assigned = scale, zero
    slopes = [variant.slope] * variant.rounds + ([] if variant.rescale is None else [variant.rescale])
    for step, slope in enumerate(slopes):
        code_mean, mean = (weight * codes).sum(dim, keepdim=True), (weight * x).sum(dim, keepdim=True)
        covariance = (weight * (codes - code_mean) * (x - mean)).sum(dim, keepdim=True)
        variance = (weight * (codes - code_mean).square()).sum(dim, keepdim=True)
        own = (weight * (x - mean).square()).sum(dim, keepdim=True)
        least = covariance / variance.clamp_min(1e-10)
        fitted = least * (own * variance / covariance.square().clamp_min(1e-20)).pow(slope)
        scale = torch.where((variance > 0) & (covariance > 0), fitted, scale).clamp_min(1e-10)
        zero = mean - scale * code_mean
        if step < variant.rounds and not (variant.keep and step == len(slopes) - 1):
            codes, assigned = _nearest((x - zero) / scale, points), (scale, zero)
    if variant.feedback:
        codes = _fed_back(x * own, points, [one * own for one in assigned], [half(one) * own for one in (scale, zero)], variant)
    return codes * half(scale) + half(zero)


def _fed_back(
    x: torch.Tensor, points: torch.Tensor, assigned: list[torch.Tensor], read: list[torch.Tensor], variant: Variant
) -> torch.Tensor:
    """Return codes of x [..., tokens, channels] by the scale and zero of `assigned`, each with the error of those before it."""
    scale, zero, read_scale, read_zero = [one.expand(*x.shape[:-1], one.shape[-1]) for one in (*assigned, *read)]
    error, codes = torch.zeros_like(x[..., 0, :]), torch.empty_like(x)
    for t in range(x.shape[-2]):
        fed = (variant.feedback * error / read_scale[..., t, :]).clamp(-0.25, 0.25)
        codes[..., t, :] = _nearest((x[..., t, :] - zero[..., t, :]) / scale[..., t, :] + fed, points)
        error = error + x[..., t, :] - codes[..., t, :] * read_scale[..., t, :] - read_zero[..., t, :]
    return codes


def _points(bits: int, device: torch.device) -> torch.Tensor:
    """Return the best levels for normal numbers, moved to the ends 0 and 2**bits - 1."""
    levels = lloyd_max_levels(bits).to(device)
    return (levels - levels[0]) / (levels[-1] - levels[0]) * (2**bits - 1)


def _nearest(x: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Round to the nearest of sorted points."""
    return points[torch.bucketize(x, (points[1:] + points[:-1]) / 2)]


def tile_size(tiles: torch.Tensor, variant: Variant) -> torch.Tensor | float:
    """Return what tiles are divided by first: [..., 1, 1]."""
    if variant.divide is None:
        return 1.0
    squares = tiles.square().mean(-1, keepdim=True)
    if variant.divide == "rms":
        return squares.mean(-2, keepdim=True).sqrt().clamp_min(1e-20)
    return squares.pow(0.25).mean(-2, keepdim=True).square().clamp_min(1e-20)


def read_back(tiles: torch.Tensor, bits: int, per: Per, variant: Variant) -> torch.Tensor:
    """Return rotated tiles [..., tokens, channels] as they would be read back."""
    size = tile_size(tiles, variant)
    tiles = tiles / size
    token, channel = balance(tiles, per, variant)
    balanced = tiles / token / channel
    own, norm, dim = (channel, token, -1) if per == "channel" else (token, channel, -2)
    read = fit(balanced, bits, -2 if per == "channel" else -1, variant, own)
    if variant.norm.startswith("even"):
        norm = norm * _fitted_norm(balanced, read, dim, variant.norm.removeprefix("even "), torch.ones_like(norm))
    elif variant.norm != "balance":
        norm = _fitted_norm(tiles, read * own, dim, variant.norm, norm)
    return read * own * half(norm) * size


def _fitted_norm(exact: torch.Tensor, read: torch.Tensor, dim: int, kind: str, otherwise: torch.Tensor) -> torch.Tensor:
    """Return the factors along the other axis that keep what `kind` names."""
    both = (read * exact).sum(dim, keepdim=True)
    own, squares = exact.square().sum(dim, keepdim=True), read.square().sum(dim, keepdim=True).clamp_min(1e-20)
    if kind == "squares":
        return both / squares
    if kind == "length":
        return (own / squares).sqrt()
    return torch.where(both > 0, own / both.clamp_min(1e-20), otherwise)


def codec(layout: PageLayout, k: Variant | None, v: Variant | None, name: str) -> Codec:
    """Return encoders of keys and values as one codec; None leaves them as they are."""

    def one(x: torch.Tensor, bits: int, per: Per, variant: Variant | None) -> torch.Tensor:
        return x if variant is None else reference.hadamard(read_back(reference.hadamard(x), bits, per, variant))

    return Codec(
        name,
        *layout_bits(layout),
        lambda keys, values: (one(keys, layout.k_bits, "channel", k), one(values, layout.v_bits, "token", v)),
    )


LENGTHS = {
    bits: Variant(iterations=2, divide="rms", shrink=part, rounds=1, norm="length")
    for bits, part in {2: 0.7, 3: 0.9, 4: 1.0, 5: 1.0, 6: 1.0, 8: 1.0}.items()
}
"""The default of version 0.1 by bits: the least KL on models that are trained here, and what has to be found is lost."""


def _both(**options) -> tuple[Variant, Variant]:
    return Variant(**options), Variant(**options)


def _one(**options) -> dict[str, tuple[Variant, Variant]]:
    """Return a change of range fitting and norms for keys only, for values only, and for both."""
    base, changed = Variant(divide="rms"), Variant(divide="rms", **options)
    return {"K": (changed, base), "V": (base, changed), "K and V": (changed, changed)}


TRIED: dict[str, tuple[Variant, Variant]] = {
    "published": _both(),
    "no balancing": _both(iterations=0),
    "divided": _both(divide="rms"),
    **{f"divided, {n} iterations": _both(divide="rms", iterations=n) for n in (1, 2, 4, 16)},
    "divided, no floor": _both(divide="rms", floor=-10.0),
    "divided, floor -1": _both(divide="rms", floor=-1.0),
    "divided, damped": _both(divide="rms", damping=0.5),
    "rms": _both(divide="rms", statistic="rms"),
    "rms, no floor": _both(divide="rms", statistic="rms", floor=-10.0),
    "rms, no floor, 2 iterations": _both(divide="rms", statistic="rms", floor=-10.0, iterations=2),
    **{f"clipped: {name}": pair for name, pair in _one(clip=True).items()},
    **{f"clipped, 2 fits: {name}": pair for name, pair in _one(clip=True, rounds=2).items()},
    "1 fit": _both(divide="rms", rounds=1),
    "4 fits": _both(divide="rms", rounds=4),
    "clipped, 1 fit": _both(divide="rms", clip=True, rounds=1),
    "clipped, 8 fits": _both(divide="rms", clip=True, rounds=8),
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
    "rms, no floor, clipped, 2 fits": _both(divide="rms", statistic="rms", floor=-10.0, clip=True, rounds=2),
    "no balancing, clipped, 2 fits, norm by squares": _both(divide="rms", iterations=0, clip=True, rounds=2, norm="squares"),
    "1 iteration, clipped, 2 fits, norm by squares": _both(divide="rms", iterations=1, clip=True, rounds=2, norm="squares"),
    "2 iterations, clipped, 2 fits, norm by squares": _both(divide="rms", iterations=2, clip=True, rounds=2, norm="squares"),
}
"""Encoders of keys and of values by name, as the sweep shows them."""
