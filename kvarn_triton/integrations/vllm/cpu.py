"""The attention backend on CPUs, where vLLM takes its own one whatever is selected: here CUSTOM is taken at its word."""

from __future__ import annotations

from typing import Any

from ...checks import require


def take(platform: type, custom: Any) -> None:
    """Let a platform return the backend CUSTOM for the layers for which it is selected, and else what it returns by itself.

    Args:
        platform: the class of a CPU's platform; changed once.
        custom: CUSTOM, of vLLM's registry.
    """
    own = vars(platform).get("get_attn_backend_cls", platform.get_attn_backend_cls)  # type: ignore[attr-defined]
    own = getattr(own, "__func__", own)
    if getattr(own, "takes_custom", False):
        return

    def get_attn_backend_cls(cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
        if selected_backend is not custom:
            return own(cls, selected_backend, attn_selector_config, num_heads)
        latent = attn_selector_config.use_mla or attn_selector_config.use_sparse
        require(not latent, "attention_backend", "another one than CUSTOM for MLA and sparse attention", custom.name)
        return custom.get_path()

    get_attn_backend_cls.takes_custom = True  # type: ignore[attr-defined]
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)  # type: ignore[attr-defined]
