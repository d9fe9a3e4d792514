"""What a user chose, read from vLLM's configuration: the page format, the sink, and what of vLLM's features is on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...checks import require
from ...layout import SUPPORTED_BITS, SUPPORTED_PAGE_SIZES, PageLayout
from ...step import slots_for

PREFIX = "kvarn_"
"""How the names of our layouts begin among those of vLLM's cache dtypes."""

LAYOUT_KEY, SINK_KEY = "kvarn_layout", "kvarn_sink_pages"
"""Keys of `additional_config`."""

SPARE = 3
"""How many times more raw slots than requests there are where requests are known by their blocks only."""


def names() -> list[str]:
    """Return the cache dtypes that are layouts, such as `kvarn_k4v2_g64`."""
    return [f"{PREFIX}k{k}v{v}_g{size}" for size in SUPPORTED_PAGE_SIZES for k in SUPPORTED_BITS for v in SUPPORTED_BITS]


@dataclass(frozen=True)
class Choice:
    """How the cache of a server is laid out."""

    layout_name: str
    """Such as `k4v2_g64`."""
    sink_pages: int
    """Pages at the start of a sequence that stay in 16 bits: 0 or 1."""
    max_drafts: int
    """Most tokens of a step that may be taken back."""
    max_requests: int
    """Most requests of a step."""
    prefix_caching: bool
    """Whether a request may begin with pages of another one."""
    known_rows: bool
    """Whether vLLM says which row of its table a request has (model runner V2)."""

    def layout(self, head_dim: int, v_head_dim: int | None = None) -> PageLayout:
        """Return the format of the pages of a layer."""
        return PageLayout.from_name(self.layout_name, head_dim, v_head_dim)

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return int(self.layout_name.rpartition("_g")[2])

    @property
    def sink_len(self) -> int:
        """Tokens of a sink."""
        return self.sink_pages * self.page_size

    @property
    def tail_slots(self) -> int:
        """Raw pages of the ring of a tail."""
        return slots_for(self.max_drafts, self.page_size)

    @property
    def columns(self) -> int:
        """Columns of a raw table: the sink, then the tail."""
        return self.sink_pages + self.tail_slots

    @property
    def num_slots(self) -> int:
        """Requests that the raw pool has room for."""
        return self.max_requests * (1 if self.known_rows else SPARE)

    @property
    def num_raw_pages(self) -> int:
        """Raw pages of a layer."""
        return self.num_slots * self.columns


def asked(config: Any) -> bool:
    """Return whether a `VllmConfig` selects the attention backend CUSTOM, for all layers or for those of full attention."""
    attention = getattr(config, "attention_config", None)
    per_kind = getattr(attention, "backend_per_kind", None) or {}
    chosen = getattr(attention, "backend", None), per_kind.get("full_attention")
    return any(getattr(backend, "name", None) == "CUSTOM" for backend in chosen)


def layout_name_of(config: Any) -> str:
    """Return the layout that a `VllmConfig` names, by its cache dtype or by `additional_config`.

    Raises:
        ValueError: if there is none, or it is no layout.
    """
    dtype = str(config.cache_config.cache_dtype)
    options = config.additional_config if isinstance(config.additional_config, dict) else {}
    name = dtype.removeprefix(PREFIX) if dtype.startswith(PREFIX) else options.get(LAYOUT_KEY)
    known = [each.removeprefix(PREFIX) for each in names()]
    expected = f"a layout of kvarn_triton in additional_config, such as {{'{LAYOUT_KEY}': 'k4v2_g64'}}"
    require(name in known, LAYOUT_KEY, expected, name)
    assert name is not None
    fits = dtype.startswith(PREFIX) or dtype == "auto"
    require(fits, "kv_cache_dtype", f"'auto' or a layout's name beside {LAYOUT_KEY}", dtype)
    return name


def choice_of(config: Any) -> Choice:
    """Return what a `VllmConfig` asks for.

    Raises:
        ValueError: for what is not there, by the name that a user knows it by.
    """
    name = layout_name_of(config)
    options = config.additional_config if isinstance(config.additional_config, dict) else {}
    sink_pages = options.get(SINK_KEY, 1)
    require(sink_pages in (0, 1), SINK_KEY, "0 or 1", sink_pages)
    drafts = config.speculative_config
    if drafts is not None:
        method = drafts.method
        require(method in ("ngram", "ngram_gpu"), "speculative method", "ngram or ngram_gpu (no draft models)", method)
    require(config.kv_transfer_config is None, "kv_transfer_config", "none: 16-bit tokens are not in blocks", "one")
    parallel = config.parallel_config
    for field in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, field, 1)
        require(size == 1, field, "1", size)
    require(not getattr(parallel, "use_ubatching", False), "ubatches", "none", "some")
    return Choice(
        layout_name=name,
        sink_pages=int(sink_pages),
        max_drafts=0 if drafts is None else int(drafts.num_speculative_tokens),
        max_requests=int(config.scheduler_config.max_num_seqs),
        prefix_caching=bool(config.cache_config.enable_prefix_caching),
        known_rows=bool(config.use_v2_model_runner),
    )
