"""The attention backend: what vLLM asks before it allocates blocks, once a step, and in every layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import vllm

from . import releases

releases.check(vllm.__version__)

from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none  # noqa: E402
from vllm.logger import init_logger  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.attention.backend import (  # noqa: E402
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout  # noqa: E402

from ...checks import require  # noqa: E402
from ...layout import SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES  # noqa: E402
from ...serving.attention import attend  # noqa: E402
from ...serving.write import write_tokens  # noqa: E402
from .capacity import advice  # noqa: E402
from .choice import PREFIX, Choice, asked, choice_of  # noqa: E402
from .plans import Heads, Planner, Plans  # noqa: E402

logger = init_logger("vllm.kvarn_triton")  # vLLM shows its own loggers only

_chosen: Choice | None = None
"""Of this process: vLLM asks for the spec of layers without saying by which configuration."""


def current_choice() -> Choice | None:
    """Return what the current configuration asks for, or else the last one that did."""
    global _chosen
    config = get_current_vllm_config_or_none()
    if config is not None and asked(config):
        _chosen = choice_of(config)
    return _chosen


class KVarNBackend(AttentionBackend):
    """Pages of kvarn_triton as blocks of vLLM: a block of `page_size` tokens is `[heads, 1, page_bytes]` of uint8."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """Return the member of vLLM's registry that this is."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        """Return the class of a layer's part."""
        return KVarNImpl

    @staticmethod
    def get_builder_cls() -> type:
        """Return the class that plans steps."""
        return KVarNBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        """Return the one size of a block that kernels take: a page."""
        choice = current_choice()
        return list(SUPPORTED_PAGE_SIZES) if choice is None else [choice.page_size]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Return the head_dims that a page may have."""
        return list(SUPPORTED_HEAD_DIMS)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        """Return whether a cache dtype is ours, or leaves the layout to `additional_config`."""
        choice = current_choice()
        named = set() if choice is None else {PREFIX + choice.layout_name}
        return kv_cache_dtype in {None, "auto"} | named

    @classmethod
    def supports_sink(cls) -> bool:
        """Return whether models with logits of attention sinks are served: yes."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Return whether layers with a window are served: no, they are left to another backend."""
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Return whether blocks can be sent elsewhere: no, 16-bit tokens are not in them."""
        return False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the orders of dimensions, the preferred one first: layers, blocks, heads, pages of a block, bytes."""
        return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Return a layer's spec with the bytes of pages; as it is, if it isn't of full attention or of whole pages."""
        choice = current_choice()
        if not isinstance(spec, FullAttentionSpec) or spec.state_content_bytes is not None or choice is None:
            return spec
        if spec.block_size % choice.page_size:
            return spec
        layout = choice.layout(spec.head_size, spec.head_size_v)
        return replace(spec, dtype=torch.uint8, tokens_per_state=layout.page_size, state_content_bytes=layout.page_bytes)


class KVarNBuilder(AttentionMetadataBuilder[Plans]):
    """Plans a step for all layers with the same spec."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold: int | None = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.choice = choice_of(vllm_config)
        size = self.choice.page_size
        require(kv_cache_spec.block_size % size == 0, "block_size", f"a multiple of {size}", kv_cache_spec.block_size)
        require(kv_cache_spec.uses_slot_mapping, "uses_slot_mapping", "True, by which dummy steps are known", False)
        device = torch.device(device)
        require(
            self.choice.known_rows or device.type == "cpu",
            "VLLM_USE_V2_MODEL_RUNNER",
            "1 on a GPU: V1 doesn't name requests",
            0,
        )
        layout = self.choice.layout(kv_cache_spec.head_size, kv_cache_spec.head_size_v)
        layers = vllm_config.compilation_config.static_forward_context
        counts = frozenset(layers[name].impl.num_heads for name in layer_names)
        heads = Heads(counts, kv_cache_spec.num_kv_heads, vllm_config.model_config.dtype)
        self.planner = Planner(self.choice, layout, device, fixed=device.type != "cpu", heads=heads)
        self.reported = False

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Plans:
        """Plan the step; nothing is read back from a GPU."""
        if not self.reported:
            self._report()
        num_decodes, _, num_decode_tokens, _ = split_decodes_and_prefills(common_attn_metadata, decode_threshold=1)
        return self.planner.plan(common_attn_metadata, num_decodes, num_decode_tokens)

    def _report(self) -> None:
        """Log what the cache holds, once vLLM has allocated it."""
        config, spec = self.vllm_config.cache_config, self.kv_cache_spec  # the spec is that of kernels: of a page
        impl = self.vllm_config.compilation_config.static_forward_context[self.layer_names[0]].impl
        if not config.num_gpu_blocks:
            return
        self.reported = True
        choice, count, mib = self.choice, len(self.layer_names), 2.0**20
        raw = count * impl.raw_pages.numel() * impl.raw_pages.element_size()
        tokens = config.num_gpu_blocks * config.block_size
        pages = tokens * spec.page_size_bytes * count / spec.block_size
        logger.info(
            "kvarn_triton: %d layers in %s: blocks of %d tokens in %.0f MiB (%.0f bytes a token), beside %.0f MiB of 16-bit "
            "tokens for %d requests (%d of sink, %d of tail each). With those, a token of %d takes %.0f bytes.",
            count, choice.layout_name, tokens, pages / mib, pages / tokens, raw / mib, choice.num_slots, choice.sink_len,
            choice.tail_slots * choice.page_size, tokens, (pages + raw) / tokens,
        )  # fmt: skip
        told = advice(choice, raw, pages)
        if told is not None:
            logger.warning(told)


class KVarNImpl(AttentionImpl[Plans]):
    """One layer. Its 16-bit tokens are allocated while the model loads, so that vLLM's memory profiling counts them."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        choice = choice_of(get_current_vllm_config())
        current_choice()
        named = PREFIX + choice.layout_name
        require(kv_cache_dtype in ("auto", named), "kv_cache_dtype", f"auto or {named} in all layers", kv_cache_dtype)
        require(alibi_slopes is None, "alibi_slopes", "none", alibi_slopes)
        require(attn_type == AttentionType.DECODER, "attn_type", "attention of a decoder", attn_type)
        require(
            kv_sharing_target_layer_name is None, "kv sharing", "layers with keys of their own", kv_sharing_target_layer_name
        )
        expected = "none; leave such layers to vLLM: attention_config.backend_per_kind={'full_attention': 'CUSTOM'}"
        require(sliding_window is None, "sliding_window", expected, sliding_window)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.soft_cap, self.sinks = logits_soft_cap or None, sinks
        self.layout, self.num_raw_pages = choice.layout(head_size), choice.num_raw_pages
        self.raw_pages = torch.empty(0)
        self.checked = False

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Allocate the layer's 16-bit tokens."""
        shape = self.num_raw_pages, 2, self.num_kv_heads, self.layout.page_size, self.layout.raw_head_dim
        self.raw_pages = torch.zeros(shape, dtype=act_dtype, device=current_platform.device_type)
        if self.sinks is not None:
            self.sinks = self.sinks.float().to(self.raw_pages.device)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Plans | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the tokens of all rows, then attend: a row may hit pages that another one of the same step completes."""
        if not self.checked:
            self._check(layer, output_scale)
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        pages = kv_cache.squeeze(2)
        parts = attn_metadata.parts()
        for step, span in parts:
            write_tokens(key[span], value[span], pages, self.raw_pages, step)
        for step, span in parts:
            attend(
                query[span], pages, self.raw_pages, step, k=key[span], v=value[span], sm_scale=self.scale,
                soft_cap=self.soft_cap, sinks=self.sinks, out=output[span],
                schedule=attn_metadata.schedule(step, self.num_heads),
            )  # fmt: skip
        return output

    def _check(self, layer: Any, output_scale: torch.Tensor | None) -> None:
        """Refuse what only a layer knows."""
        scales = [getattr(layer, f"_{name}_scale_float", 1.0) for name in "kv"]
        require(scales == [1.0, 1.0], "k_scale and v_scale", "none: pages have scales of their own", scales)
        size = getattr(layer, "head_size_v", self.head_size)
        require(size == self.head_size, "head_size_v", f"{self.head_size}, that of keys", size)
        require(output_scale is None, "output_scale", "none: outputs are not quantized", "one")
        self.checked = True
