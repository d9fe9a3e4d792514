"""Small random models for `vllm_text.py`, written in Hugging Face's format: weights alone, no tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "head_dim": 64, "initializer_range": 0.1,
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, 4 kv heads": ("Llama", {"num_key_value_heads": 4}),
    "soft caps": (
        "Gemma2",
        {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 64, "layer_types": [FULL] * 4, "sliding_window": 64},
    ),
    "windows, soft caps": (
        "Gemma2",
        {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 64, "layer_types": [SLIDING, FULL] * 2, "sliding_window": 64},
    ),
    "sinks": (
        "GptOss",
        {"num_local_experts": 2, "num_experts_per_tok": 2, "layer_types": [FULL] * 4, "sliding_window": None},
    ),
    "windows, sinks": (
        "GptOss",
        {"num_local_experts": 2, "num_experts_per_tok": 2, "layer_types": [SLIDING, FULL] * 2, "sliding_window": 64},
    ),
}
"""By name: the classes of transformers, and what they have beside `SIZES`."""


def write_model(name: str, folder: Path) -> None:
    """Write a model with random weights, the same every time."""
    import torch
    import transformers

    kind, changes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for each, weights in model.named_parameters():
            if each.endswith("sinks"):  # of the size of scores
                weights.normal_(1.0, 1.0)
    model.to(torch.bfloat16).save_pretrained(folder)
