"""A KV cache of 2 to 4 bits for Hugging Face transformers, and an attention function that reads it where it is.

from kvarn_triton.integrations.transformers import KVarNCache, register_attention
register_attention(); model.set_attn_implementation("kvarn")
cache = KVarNCache(model.config, "k4v2_g128")
model.generate(**inputs, cache=cache)
"""

from .attention import register_attention
from .cache import KVarNCache

__all__ = ["KVarNCache", "register_attention"]
