"""What queries see of the keys before them, and how scores become weights: as calls are given it, and as kernels take it.

A feature of a mask is a field of `Mask` and of `Masking`, and what computes with it here. Calls, kernels and loops hand both on
whole. Scores are kept times log2(e), in base 2.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .checks import check_tensor, require
from .launch import aligned
from .reference import attention

INT32_MAX = 2**31 - 1
MOST_DRAFTS = tl.constexpr(attention.MOST_DRAFTS)
"""New tokens of a sequence that a word of a tree mask has bits for."""
_LOG2E = tl.constexpr(math.log2(math.e))


class Windows(NamedTuple):
    """How many of the last tokens a query sees, its own among them: numbers as `changing` returns them; None: all."""

    sink: int | None
    body: int | None


class Among(NamedTuple):
    """What new tokens see of each other; None: as it is without the argument of that name."""

    tree_mask: torch.Tensor | None
    span_ends: torch.Tensor | None


class Scores(NamedTuple):
    """How products of queries and keys become scores."""

    scale: float  # times log2(e)
    cap: float | None  # times log2(e)


class Masking(NamedTuple):
    """A mask, as an argument of kernels."""

    scores: Scores
    windows: Windows
    among: Among


@dataclass(eq=False)
class Mask:
    """What queries see of the keys before them, and how scores become weights: arguments of the same names."""

    sm_scale: float | None
    window: int | None
    soft_cap: float | None
    sinks: torch.Tensor | None
    keep_sink: bool
    tree_mask: torch.Tensor | None = None
    span_ends: torch.Tensor | None = None
    past_only: bool = False

    @property
    def windows(self) -> Windows:
        """Which tokens are seen, as an argument of kernels."""
        if self.window is None:
            return Windows(None, None)
        size = changing(self.window)
        return Windows(None if self.keep_sink else size, size)

    @property
    def shows_runs(self) -> bool:
        """Whether queries see tokens in a row, but for a sink, and scores rise with products: what `attention.plain` does."""
        return self.soft_cap is None and self.tree_mask is None and (self.sm_scale is None or self.sm_scale > 0)

    def masking(self, head_dim: int) -> Masking:
        """Return the mask as an argument of kernels."""
        scale = head_dim**-0.5 if self.sm_scale is None else self.sm_scale
        cap = None if self.soft_cap is None else self.soft_cap * _LOG2E.value
        among = Among(*(x if x is None else aligned(x) for x in (self.tree_mask, self.span_ends)))
        return Masking(Scores(scale * _LOG2E.value, cap), self.windows, among)


def changing(n: int) -> int:
    """Return an integer as a part of an argument of kernels, where exemptions from specialization don't reach (`launch`).

    It is odd and has 64 bits, whatever `n` is, so that no value chooses another binary. `size_of` takes the upper half.
    """
    return n << 32 | 1


def check_mask(mask: Mask, num_q_heads: int, device: torch.device) -> None:
    """Check what queries see and how scores become weights; `sm_scale` becomes a Python number.

    A tensor is refused as a scale, because reading its number would wait for the GPU.
    """
    window, soft_cap, sm_scale = mask.window, mask.soft_cap, mask.sm_scale
    if window is not None:
        fits = isinstance(window, int) and not isinstance(window, bool) and 1 <= window <= INT32_MAX
        require(fits, "window", f"None or an integer from 1 to {INT32_MAX}", window)
    if soft_cap is not None:
        # Times log2(e), and one over it, are float32 numbers that are neither 0 nor infinite.
        fits = isinstance(soft_cap, (int, float)) and not isinstance(soft_cap, bool) and 1e-30 <= soft_cap <= 1e30
        require(fits, "soft_cap", "None or a number above 0 (from 1e-30 to 1e30)", soft_cap)
    for name in ("keep_sink", "past_only"):
        require(isinstance(getattr(mask, name), bool), name, "a bool", getattr(mask, name))
    if mask.sinks is not None:
        check_tensor("sinks", mask.sinks, [num_q_heads], torch.float32, device=device)
    if sm_scale is None:
        return
    if not isinstance(sm_scale, numbers.Real) or isinstance(sm_scale, bool) or not -1e30 <= float(sm_scale) <= 1e30:
        raise ValueError(f"sm_scale: expected None or a finite number (up to 1e30), got {sm_scale!r}")
    mask.sm_scale = float(sm_scale)


def check_among(mask: Mask, num_tokens: int, has_new: bool, device: torch.device) -> None:
    """Check what new tokens see of each other; `has_new`: whether their keys and values are given."""
    for name, dtype in (("tree_mask", torch.int64), ("span_ends", torch.int32)):
        tensor = getattr(mask, name)
        if tensor is not None:
            require(has_new, name, "None without k and v", "a tensor")
            check_tensor(name, tensor, [num_tokens], dtype, device=device)


@triton.jit
def weighed(scores, masking):
    """Return the scores that the softmax takes of products of queries and keys, times their scale."""
    return capped(scores, masking.scores.cap)


@triton.jit
def capped(scores, cap):
    """Return cap * tanh(scores / cap), to the last places of float32 for small and large scores alike; scores if cap is None.

    Scores and cap may be in any unit, but in the same one: natural ones, or times log2(e). Below 0.625 tanh is an odd
    polynomial, that of tanhf in the Cephes library; above it follows from the exponential.
    """
    if cap is None:
        result = scores
    else:
        x = scores * (1.0 / cap)
        size = tl.abs(x)
        far = 1.0 - 2.0 / (tl.exp2(size * (2.0 * _LOG2E)) + 1.0)
        square = x * x
        odd = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square
        odd = ((odd + 1.33314422036e-1) * square - 3.33332819422e-1) * square
        result = cap * tl.where(size < 0.625, x + x * odd, tl.where(x < 0, -far, far))
    return result


@triton.jit
def size_of(window):
    """Return the size of a window of `Windows` that is there."""
    return (window >> 32).to(tl.int32)


@triton.jit
def clamped(window, seq_len):
    """Return a window that is no larger than a sequence: a larger one shows no more, and less it a position could overflow."""
    return (tl.minimum(size_of(window), tl.maximum(seq_len, 1)).to(tl.int64) << 32) | 1


@triton.jit
def first_seen(end, window):
    """Return the first position that the query before position `end` sees."""
    return tl.maximum(end - size_of(window), 0)


@triton.jit
def first_of_sink(first, windows):
    """Return the first token of the sink that is seen, of a query that sees those of the body from position `first` on."""
    return 0 if windows.sink is None else first


@triton.jit
def first_of_new(first_query, num_sinks, windows):
    """Return the first new token that some query from `first_query` on sees, if the first num_sinks of them are sinks."""
    first = 0
    if windows.body is not None:
        first = first_seen(first_query + 1, windows.body)
        if windows.sink is None:
            first = tl.where(num_sinks > 0, 0, first)
    return first


@triton.jit
def hides(window, start, last_position):
    """Return whether a window hides the token at `start` from a query at `last_position`."""
    return start <= last_position - size_of(window)


@triton.jit
def recent(token, position, window, windows, sink_end):
    """Return which tokens [rows, tokens] a window, one of `windows`, shows to queries at `position` [rows].

    Those before `sink_end` are of the sink; None: none of them.
    """
    seen = token[None, :] > position[:, None] - size_of(window)
    if windows.sink is None and sink_end is not None:
        seen = seen | (token < sink_end)[None, :]
    return seen


@triton.jit
def visible(position, key, window):
    """Return which keys [tokens] the queries at `position` [rows] see: those up to its own and within the window, if any."""
    seen = key[None, :] <= position[:, None]
    if window is not None:
        seen = seen & (key[None, :] > position[:, None] - size_of(window))
    return seen


@triton.jit
def words_of(tree_ptr, token, mask, num_tokens):
    """Return the words of query tokens [rows] of one sequence; 0 where none says which new tokens are seen."""
    known = ~(tl.full((), -2, tl.int64) << (tl.minimum(num_tokens, MOST_DRAFTS) - 1).to(tl.int64))
    return tl.where(num_tokens <= MOST_DRAFTS, tl.load(tree_ptr + token, mask, other=0) & known, 0)


@triton.jit
def num_bits(words):
    """Return how many bits are set in integers of 64."""
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((words * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def reach_of(among, query, token, mask, num_tokens):
    """Return the words of query tokens [rows], and the number of the new token before which all are that each of them sees.

    `query` counts new tokens of their sequence, `token` those of the call. Rows without `mask` see none.
    """
    words = tl.zeros_like(token)
    ends = query + 1
    if among.span_ends is not None:
        ends = tl.maximum(ends, tl.minimum(tl.load(among.span_ends + token, mask, other=0), num_tokens))
    if among.tree_mask is not None:
        words = words_of(among.tree_mask, token, mask, num_tokens)
        ends = tl.where(words != 0, num_tokens, ends)
    return words, tl.where(mask, ends, 0)


@triton.jit
def shown(words, token):
    """Return which new tokens [rows, tokens] words [rows] show; a word of 0 hides none."""
    bits = words[:, None] >> tl.minimum(token, MOST_DRAFTS - 1).to(tl.int64)[None, :]
    return (words == 0)[:, None] | ((bits & 1) != 0)
