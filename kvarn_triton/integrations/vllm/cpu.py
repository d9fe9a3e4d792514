"""The attention backend on CPUs, where vLLM takes one member of its registry whatever is selected: ours if a configuration asks
for it, else vLLM's own."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Return the class `Backend`, each time by the configuration that is current."""
    if name != "Backend":
        raise AttributeError(name)
    from vllm.config import get_current_vllm_config_or_none
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from .choice import asked

    if not asked(get_current_vllm_config_or_none()):
        return resolve_obj_by_qualname(AttentionBackendEnum.CPU_ATTN.value)
    from .backend import KVarNBackend

    return KVarNBackend
