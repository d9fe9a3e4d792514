"""A plug-in for vLLM: its KV cache in pages of 2 to 8 bits. vLLM finds it by an entry point.

vllm serve MODEL --attention-backend CUSTOM --additional-config '{"kvarn_layout": "k4v2_g64"}'
"""

from __future__ import annotations

import logging
from typing import Any

from .choice import names

__all__ = ["register"]

_HERE = "kvarn_triton.integrations.vllm"


def register() -> None:
    """Tell vLLM of the attention backend CUSTOM and of the cache dtypes `kvarn_*`. vLLM calls it in each of its processes.

    Nothing changes for a configuration that doesn't select CUSTOM. On a release that the plug-in isn't for, a sentence of the
    log says so, and selecting CUSTOM is an error with the same sentence where vLLM asks for it (not on CPUs).
    """
    import vllm

    from .releases import refusal

    reason = refusal(vllm.__version__)
    if reason is not None:
        logging.getLogger("vllm.kvarn_triton").warning(reason)
    try:
        _register(reason is None)
    except (ImportError, AttributeError):
        if reason is None:
            raise  # a release may lack what is used here only if it is one that the plug-in isn't for


def _register(taken: bool) -> None:
    """Tell vLLM of the backend, and of the rest if the release is one that the plug-in is for."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, f"{_HERE}.backend.KVarNBackend")
    if taken and current_platform.is_cpu():
        from .cpu import take

        take(type(current_platform), AttentionBackendEnum.CUSTOM)
    if taken:
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
