"""A plug-in for vLLM: its KV cache in pages of 2 to 8 bits. vLLM finds it by an entry point; nothing is to be imported.

vllm serve MODEL --attention-backend CUSTOM --additional-config '{"kvarn_layout": "k4v2_g64"}'
"""

from __future__ import annotations

from typing import Any

from .choice import names

__all__ = ["register"]

_HERE = "kvarn_triton.integrations.vllm"


def register() -> None:
    """Tell vLLM of the attention backend CUSTOM and of the cache dtypes `kvarn_*`. vLLM calls it in each of its processes.

    Nothing changes for a configuration that doesn't select CUSTOM. A release that the plug-in isn't for is refused in one
    sentence as soon as one does.
    """
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from .releases import refusal

    register_backend(AttentionBackendEnum.CUSTOM, f"{_HERE}.backend.KVarNBackend")
    if current_platform.is_cpu() and refusal(vllm.__version__) is None:
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{_HERE}.cpu.Backend")
    _register_names()


def _register_names() -> None:
    """Tell vLLM of the cache dtypes, if it takes any: from 0.33 on."""
    try:
        from vllm.config.cache import KV_CACHE_DTYPES, register_kv_cache_dtype
        from vllm.v1.kv_cache_interface import KVQuantMode
    except ImportError:
        return
    import torch

    for each in names():
        if each not in KV_CACHE_DTYPES:
            methods: dict[str, Any] = {
                "name": each,
                "torch_dtype": lambda self: torch.uint8,
                "quant_mode": lambda self: KVQuantMode.CUSTOM,
            }
            register_kv_cache_dtype(each)(type("KVarNDtype", (), methods))
