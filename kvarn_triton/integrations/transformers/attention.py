"""The attention implementation "kvarn": over pages where a layer has some, else what "sdpa" and "eager" compute.

transformers calls a layer's `update`, and then the attention function without the cache. The layer that was updated last in a
thread is handed over by `take_layer`; a model that attends to the same keys again, in another layer, is known by the tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from .layer import KVarNLayer, Scores
from .shared import ATTENTION_NAMES, HANDOVER, LAYERS, PAGES, take_layer

SCORES = 2**26
"""Most scores that attention without pages has in memory at once, where PyTorch has no kernel for it."""


def register_attention(name: str = "kvarn") -> None:
    """Add the attention implementation, for `model.set_attn_implementation(name)`.

    Layers of a `KVarNCache` are then read by kernels, page by page. Layers without pages, and models without such a cache, are
    computed as the implementation "sdpa" does, with the soft caps and attention sinks that "sdpa" doesn't know.

    Args:
        name: what the implementation is called.
    """
    AttentionInterface.register(name, kvarn_attention)
    AttentionMaskInterface.register(name, kvarn_mask)
    ATTENTION_NAMES.add(name)


def kvarn_mask(
    *, kv_length: int, kv_offset: int = 0, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """Return the mask of a step, from what transformers gives such a function.

    Args:
        kv_length: keys that attention gets: the new ones if it reads pages.
        kv_offset: position of the first of them. `PAGES`: attention reads pages.
        attention_mask: bool [batch, positions], which of all positions are tokens and no padding; None: all.
        kwargs: as `sdpa_mask` takes them.

    Returns:
        For pages bool [batch, 1, 1, n], which of the n new positions are tokens, or None: all. Four dimensions let it pass
        through a model as it is, and its shape is the same in every decode step. If tokens of a prompt see later ones, as those
        of an image do, what `_spans` returns. Without pages the mask of "sdpa".

    Raises:
        ValueError: if a layer with pages is to have another mask than a causal one, or one of spans in a prompt.
    """
    if "local_size" not in kwargs and not torch.compiler.is_compiling():
        HANDOVER.paged = kv_offset == PAGES
    if kv_offset != PAGES:
        return sdpa_mask(kv_length=kv_length, kv_offset=kv_offset, attention_mask=attention_mask, **kwargs)
    if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        return _spans(kv_length, attention_mask, **kwargs)
    if attention_mask is None:
        return None
    # A copy, because strides of a view grow with the mask, and graphs are compiled for strides.
    return attention_mask[:, None, None, -kv_length:].bool().clone(memory_format=torch.contiguous_format)


def _spans(count: int, attention_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
    """Return the mask of a prompt in which tokens see later ones, with all before those: int32 [batch, 1, 1 or 2, count].

    The first row has how many tokens each position sees, padding not counted, as `span_ends` of `attend`; the second one, there
    if there may be padding, has 1 for tokens. Nothing may be in the cache: what a mask says of older tokens is not known.
    """
    seen, tokens = None, None if attention_mask is None else attention_mask[:, -count:].bool()
    positions = kwargs.get("cache_position")  # what transformers 5.0 gives instead of q_offset
    first = kwargs.get("q_offset") if positions is None else positions[0]
    if first == 0 and not torch.compiler.is_compiling():
        kwargs["allow_is_causal_skip"] = False
        seen = sdpa_mask(kv_length=count, kv_offset=0, attention_mask=attention_mask, **kwargs)
    if seen is not None and seen.shape[2:] == (count, count):
        seen = seen[:, 0]
        places = torch.arange(count, device=seen.device)
        last = count - 1 - seen.flip(2).view(torch.uint8).argmax(dim=2)  # no copy of the mask takes more than a byte a number
        number = (seen.new_ones(seen.shape[:2]) if tokens is None else tokens).cumsum(1)
        ends = number.gather(1, last)
        fits = (seen.sum(2) == ends) & (last >= places)
        if bool((fits if tokens is None else fits | ~tokens).all()):
            rows = [ends] if tokens is None else [ends, tokens]
            return torch.stack([row.int() for row in rows], dim=1)[:, None]
    raise ValueError(
        "attention mask: expected a causal one with padding for pages, or tokens of a whole prompt (images) that see all up to "
        "a later one, got another one; say KVarNCache(..., attend_pages=False) and another attention implementation"
    )


def kvarn_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers wants it of an attention function.

    Args:
        module: the attention module.
        query: [batch, num_q_heads, n, head_dim].
        key: what `update` returned: [batch, num_kv_heads, n or all, head_dim].
        value: like `key`.
        attention_mask: what `kvarn_mask` returned.
        scaling: factor of the scores.
        dropout: 0 with pages.
        kwargs: `sliding_window`, `softcap`, `s_aux` (attention sinks), and others that don't matter here.

    Returns:
        [batch, n, num_q_heads, v_head_dim], and None for the weights.
    """
    soft_cap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    scores = Scores(
        query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("sliding_window"), soft_cap,
        None if sinks is None else sinks.float(),
    )  # fmt: skip
    layer = take_layer()
    sharing: KVarNLayer | None = None if layer else getattr(key, "kvarn_layer", None)
    if layer is None and sharing is None:
        if getattr(module, "is_kv_shared_layer", False) and HANDOVER.paged and kwargs.get("sliding_window") is None:
            raise RuntimeError(
                "a layer that shares keys: expected the tensor that update() returned, got a copy (device_map?); say "
                "KVarNCache(..., attend_pages=False)"
            )
        if soft_cap is None and sinks is None:
            kwargs.pop("softcap", None)
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return attention_without_pages(query, key, value, attention_mask, scores), None
    if module.training or dropout:
        raise ValueError("training: expected model.eval() and no dropout with pages, which have no gradients")
    for name in ("position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None with pages, got a tensor; say KVarNCache(..., attend_pages=False)")
    if kwargs.get("is_causal") is False or kwargs.get("output_attentions"):
        raise ValueError("is_causal, output_attentions: expected causal attention without weights, as pages have no others")
    mask, span_ends = new_tokens_of(attention_mask, query)
    scores = scores._replace(span_ends=span_ends)
    if sharing is not None:
        if span_ends is not None:
            raise ValueError("attention mask: expected a causal one where layers share keys, got spans (images)")
        return sharing.read(query, scores), None
    assert layer is not None
    index = getattr(module, "layer_idx", layer.index)
    if index != layer.index or key.shape[2] != query.shape[2]:
        raise RuntimeError(
            f"layer {index}: expected attention to the {query.shape[2]} tokens that update() returned for layer {layer.index}, "
            f"got {key.shape[2]} tokens; say KVarNCache(..., attend_pages=False)"
        )
    if torch.compiler.is_compiling():
        scales, window = [scores.sm_scale, soft_cap or 0.0], scores.window
        return attend_captured(query, key, value, mask, scores.sinks, scales, window, layer.number), None
    return layer.attend(query, key, value, mask, scores), None


def new_tokens_of(mask: torch.Tensor | None, query: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return what a mask of `kvarn_mask` says of the n new positions.

    Returns:
        Which are tokens, bool [batch, n]; None: all. And how many tokens each sees, int32 [batch, n]; None: those up to itself.
    """
    if mask is None:
        return None, None
    batch, count = query.shape[0], query.shape[2]
    if mask.dtype == torch.bool and tuple(mask.shape) == (batch, 1, 1, count):
        return mask[:, 0, 0], None
    if mask.dtype == torch.int32 and tuple(mask.shape) in ((batch, 1, 1, count), (batch, 1, 2, count)):
        return (mask[:, 0, 1].bool() if mask.shape[2] == 2 else None), mask[:, 0, 0]
    raise ValueError(
        f"attention_mask: expected None or [batch, positions] with pages, got {mask.dtype} {list(mask.shape)}; say "
        "KVarNCache(..., attend_pages=False) and another attention implementation"
    )


@torch.library.custom_op("kvarn_triton_transformers::attend", mutates_args=())
def attend_captured(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scales: list[float],
    window: int | None,
    layer: int,
) -> torch.Tensor:
    """Write and attend in a compiled graph: as an operator, whose layer is known by its number.

    Pools and lengths are no arguments: their addresses are fixed, and each layer's operator waits for the one before it, whose
    result its queries come from.
    """
    scores = Scores(scales[0], window, scales[1] or None, sinks)
    return LAYERS[layer].attend_captured(q=query, k=key, v=value, mask=mask, scores=scores).contiguous()


@attend_captured.register_fake
def _(query, key, value, mask, sinks, scales, window, layer):
    """Return an empty result."""
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def attention_without_pages(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scores: Scores
) -> torch.Tensor:
    """Attend with soft caps and attention sinks, in float32 and some queries at a time.

    Args:
        q: [batch, num_q_heads, n, head_dim].
        k: [batch, num_kv_heads, num_keys, head_dim].
        v: [batch, num_kv_heads, num_keys, v_head_dim].
        mask: bool [batch, 1, n, num_keys]. None: causal; one query is the last token, several are the first ones.
        scores: how scores become weights; the window is in the mask.

    Returns:
        [batch, n, num_q_heads, v_head_dim].
    """
    batch, num_q_heads, count = q.shape[:3]
    if mask is None:
        k, v = (k, v) if count == 1 else (k[:, :, :count], v[:, :, :count])
        mask = torch.ones(count, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - count)[None, None]
    k, v = (x.repeat_interleave(num_q_heads // x.shape[1], dim=1).float() for x in (k, v))
    out = q.new_empty(batch, num_q_heads, count, v.shape[3])
    size = max(SCORES // max(batch * num_q_heads * k.shape[2], 1), 1)
    for first in range(0, count, size):
        part = slice(first, first + size)
        logits = q[:, :, part].float() @ k.transpose(2, 3) * scores.sm_scale
        if scores.soft_cap is not None:
            logits = scores.soft_cap * torch.tanh(logits / scores.soft_cap)
        logits = logits.masked_fill(~mask[:, :, part], torch.finfo(torch.float32).min)
        if scores.sinks is not None:
            logits = torch.cat((logits, scores.sinks[None, :, None, None].expand(*logits.shape[:3], 1)), dim=3)
        out[:, :, part] = (logits.softmax(dim=3)[..., : k.shape[2]] @ v).to(q.dtype)
    return out.transpose(1, 2)
