"""Tiny random models of transformers, and what tests do with them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="transformers isn't installed: pip install 'kvarn_triton[transformers]'"
)
# The models come with the package; where one of them isn't there, that is an error.
from kvarn_triton.integrations.transformers import KVarNCache, register_attention  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 64, "vocab_size": 128, "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
HYBRID = {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"query_pre_attn_scalar": 64, "attn_logit_softcapping": 2.0, **HYBRID}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"query_pre_attn_scalar": 64, **HYBRID}),
    "gemma3n": (  # layers share keys and values
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            "num_hidden_layers": 5,
            "num_kv_shared_layers": 2,
            "sliding_window": 48,
            "hidden_size_per_layer_input": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": 128,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "intermediate_size": [64] * 5,
            "activation_sparsity_pattern": [0.0] * 5,
        },
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {"num_local_experts": 2, "num_experts_per_tok": 1, **HYBRID}),
}
LAYOUT = "k8v8_g64"
"""Eight bits: then a model says what it says with 16 bits, but for near ties."""
SMALL = {"sink_len": 64}
NEAR = 1e-3
"""Largest difference of logits, which are about 4, where the same pages are read in another way: attention in another order."""


def make_models() -> dict[str, Any]:
    """Return tiny models by family, with the attention that they begin with."""
    register_attention()
    made = {}
    for name, (model, config, options) in FAMILIES.items():
        torch.manual_seed(0)
        made[name] = getattr(transformers, model)(getattr(transformers, config)(**SIZES | options)).eval()
        if name == "gpt_oss":
            for layer in made[name].model.layers:
                torch.nn.init.normal_(layer.self_attn.sinks)
    return made


KEY = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
"""What models call the argument; `generate` takes both names where this is the new one."""


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Return random tokens."""
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def feed(model: Any, ids: torch.Tensor, cache: Any, chunks: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits of tokens that are fed in chunks."""
    parts, first = [], 0 if mask is None else mask.shape[1] - ids.shape[1]
    offset = first
    for count in chunks:
        options: dict[str, Any] = {KEY: cache}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            options |= {"attention_mask": mask[:, : first + count], "position_ids": positions[:, first : first + count]}
        parts.append(model(input_ids=ids[:, first - offset : first - offset + count], **options).logits)
        first += count
    return torch.cat(parts, dim=1)


def singles(prompt: int, count: int) -> list[int]:
    """Return the chunks of a prompt and of single tokens behind it."""
    return [prompt, *[1] * count]


def generate(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    """Return what a model generates, greedily unless told otherwise."""
    options = {"max_new_tokens": 24, "do_sample": False, KEY: cache} | options
    return model.generate(ids, **options)


def new(model: Any, layout: str = LAYOUT, **options: Any) -> KVarNCache:
    """Return a cache with small pages."""
    return KVarNCache(model.config, layout, **SMALL | options)
