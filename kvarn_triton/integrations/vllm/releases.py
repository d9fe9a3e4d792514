"""The releases of vLLM that this plug-in is for, and all of theirs that it uses, to be compared with what is installed."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

RELEASES = ("0.32", "0.33")
"""Minor releases, the older one first."""

_BACKEND = "vllm.v1.attention.backend"
_CACHE = "vllm.v1.kv_cache_interface"

SIGNATURES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("vllm.v1.attention.backends.registry", "register_backend", ("backend", "class_path")),
    ("vllm.v1.attention.backends.utils", "split_decodes_and_prefills", ("common_attn_metadata", "decode_threshold")),
    ("vllm.config", "get_current_vllm_config", ()),
    ("vllm.config", "get_current_vllm_config_or_none", ()),
    ("vllm.logger", "init_logger", ("name",)),
    (
        "vllm.platforms.interface",
        "Platform.get_attn_backend_cls",
        ("selected_backend", "attn_selector_config", "num_heads"),
    ),
    (_BACKEND, "AttentionBackend.get_name", ()),
    (_BACKEND, "AttentionBackend.get_impl_cls", ()),
    (_BACKEND, "AttentionBackend.get_builder_cls", ()),
    (_BACKEND, "AttentionBackend.get_supported_kernel_block_sizes", ("kv_cache_spec",)),
    (_BACKEND, "AttentionBackend.get_supported_head_sizes", ()),
    (_BACKEND, "AttentionBackend.supports_kv_cache_dtype", ("kv_cache_dtype",)),
    (_BACKEND, "AttentionBackend.supports_sink", ()),
    (_BACKEND, "AttentionBackend.supports_kv_connector", ()),
    (_BACKEND, "AttentionBackend.supports_sliding_window", ()),
    (_BACKEND, "AttentionBackend.supported_kv_cache_layouts", ()),
    (_BACKEND, "AttentionBackend.customize_spec", ("spec",)),
    (_BACKEND, "AttentionMetadataBuilder.__init__", ("self", "kv_cache_spec", "layer_names", "vllm_config", "device")),
    (_BACKEND, "AttentionMetadataBuilder.build", ("self", "common_prefix_len", "common_attn_metadata", "fast_build")),
    (
        _BACKEND,
        "AttentionImpl.__init__",
        (
            "self", "num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window", "kv_cache_dtype",
            "logits_soft_cap", "attn_type", "kv_sharing_target_layer_name",
        ),
    ),
    (
        _BACKEND,
        "AttentionImpl.forward",
        (
            "self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output", "output_scale",
            "output_block_scale",
        ),
    ),
    (_BACKEND, "AttentionImpl.process_weights_after_loading", ("self", "act_dtype")),
)  # fmt: skip
"""Functions: the module, the name in it, and the parameters, the first ones in this order."""

FIELDS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        _BACKEND,
        "CommonAttentionMetadata",
        (
            "query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens", "max_query_len",
            "block_table_tensor", "slot_mapping", "req_idx",
        ),
    ),
    (
        _CACHE,
        "FullAttentionSpec",
        (
            "block_size", "num_kv_heads", "head_size", "head_size_v", "dtype", "tokens_per_state", "state_content_bytes",
            "page_size_bytes", "uses_slot_mapping",
        ),
    ),
    (_CACHE, "KVCacheLayout", ("LBHNC", "BLHNC")),
    (_BACKEND, "AttentionBackend", ("supported_dtypes", "forward_includes_kv_cache_update")),
    (_BACKEND, "AttentionMetadataBuilder", ("_cudagraph_support", "reorder_batch_threshold")),
    (_BACKEND, "AttentionCGSupport", ("UNIFORM_SINGLE_TOKEN_DECODE",)),
    (_BACKEND, "AttentionType", ("DECODER",)),
    ("vllm.v1.attention.backends.registry", "AttentionBackendEnum", ("CUSTOM", "get_path")),
    ("vllm.platforms.interface", "Platform", ("is_cpu", "device_type")),
    (
        "vllm.config",
        "VllmConfig",
        (
            "additional_config", "attention_config", "cache_config", "compilation_config", "kv_transfer_config",
            "model_config", "parallel_config", "scheduler_config", "speculative_config", "use_v2_model_runner",
        ),
    ),
    ("vllm.config", "AttentionConfig", ("backend", "backend_per_kind")),
    ("vllm.config", "CacheConfig", ("block_size", "cache_dtype", "enable_prefix_caching", "num_gpu_blocks")),
    ("vllm.config", "CompilationConfig", ("static_forward_context",)),
    ("vllm.config", "ModelConfig", ("dtype",)),
    (
        "vllm.config",
        "ParallelConfig",
        ("decode_context_parallel_size", "prefill_context_parallel_size", "use_ubatching"),
    ),
    ("vllm.config", "SchedulerConfig", ("max_num_seqs",)),
    ("vllm.config", "SpeculativeConfig", ("method", "num_speculative_tokens")),
)  # fmt: skip
"""Classes: the module, the name in it, and its attributes, fields or members."""

SIGNATURES_OF_NAMES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("vllm.config.cache", "register_kv_cache_dtype", ("name",)),
)
"""As `SIGNATURES`, from 0.33 on: what names cache dtypes."""


def refusal(version: str) -> str | None:
    """Return why a version of vLLM is refused, in a sentence; None if it isn't."""
    if ".".join(version.split(".")[:2]) in RELEASES:
        return None
    return f"kvarn_triton's plug-in is for vLLM {' and '.join(RELEASES)}, and this is vLLM {version}."


def differences(version: str) -> list[str]:
    """Return what the installed vLLM lacks or has otherwise, each with its name; imports vLLM.

    Args:
        version: of the installed vLLM.
    """
    signatures = SIGNATURES + (() if version.startswith("0.32") else SIGNATURES_OF_NAMES)
    found = []
    for module, name, expected in signatures:
        function = _find(module, name)
        if function is None:
            found.append(f"{module}.{name}: not there")
            continue
        parameters = tuple(inspect.signature(function).parameters)[: len(expected)]
        if parameters != expected:
            found.append(f"{module}.{name}: begins with the parameters {parameters}, expected {expected}")
    for module, name, fields in FIELDS:
        owner = _find(module, name)
        if owner is None:
            found.append(f"{module}.{name}: not there")
            continue
        known = {field.name for field in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else set()
        known |= {each for base in getattr(owner, "__mro__", ()) for each in getattr(base, "__annotations__", {})}
        found += [f"{module}.{name}.{field}: not there" for field in fields if field not in known and not hasattr(owner, field)]
    return found


def check(version: str) -> None:
    """Raise if the installed vLLM isn't one that this plug-in is for.

    Raises:
        ImportError: in one sentence for a release, or with the names of what has changed.
    """
    reason = refusal(version)
    if reason is None:
        changed = differences(version)
        reason = f"kvarn_triton's plug-in needs of vLLM {version} what isn't so: {'; '.join(changed)}" if changed else None
    if reason is not None:
        raise ImportError(reason)


def _find(module: str, name: str) -> Any:
    """Return what a module has by a name with dots; None if it isn't there."""
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found
