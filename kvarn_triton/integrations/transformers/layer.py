"""One layer of a cache: its pools, what transformers asks a layer, and attention over pages."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin

from ... import configs
from ...layout import PageLayout
from ...serving.attention import attend
from ...serving.read import read_tokens
from ...serving.write import write_tokens
from .rows import Rows
from .shared import HANDOVER, LAYERS, PAGES, TRACED, Shared

SCRATCH_BYTES = 2**30
"""Most memory for dequantized pages that a long chunk gets; `attend` itself takes less."""
_NUMBERS = itertools.count()


class Scores(NamedTuple):
    """How scores become weights, as `attend` takes it."""

    sm_scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks: torch.Tensor | None = None
    span_ends: torch.Tensor | None = None
    """int32 [batch, n], how many tokens each new one sees; None: those up to itself."""


class KVarNLayer(CacheLayerMixin):
    """Keys and values of one layer of full attention: 16-bit sink, quantized pages, 16-bit tail.

    Rows move, and tokens are taken back, by the methods of `KVarNCache`: all layers of a device share lengths and tables.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, shared: Shared, index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index
        self.number = next(_NUMBERS)
        LAYERS[self.number] = self

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether a decode step can be a captured graph: memory stays where it is, and lengths are on the device."""
        # Layers that share keys know them by the tensor, which graphs don't have.
        return self.shared.settings.max_len is not None and self.shared.attends_pages and not self.shared.shares_keys

    @torch.compiler.disable
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate pools for keys and values of these shapes [batch, num_kv_heads, n, channels], dtypes and devices."""
        shared, device, batch = self.shared, key_states.device, key_states.shape[0]
        self.dtype, self.device, self.num_kv_heads = key_states.dtype, device, key_states.shape[1]
        self.layout = PageLayout.from_name(
            shared.settings.layout, head_dim=key_states.shape[-1], v_head_dim=value_states.shape[-1]
        )
        key = device, self.layout
        if key not in shared.rows:
            shared.rows[key] = Rows(self.layout, batch, device, shared.settings)
        self.rows = shared.rows[key]
        self.is_first, self.epoch = self.rows.num_layers == 0, self.rows.epoch
        if not self.is_first and self.rows.epoch:
            self.epoch -= 1  # the step that the first layer began
        self.place = self.rows.num_layers
        self.rows.num_layers += 1
        raw_shape = batch * self.rows.columns, 2, self.num_kv_heads, self.layout.page_size, self.layout.raw_head_dim
        self.raw_pages = torch.empty(raw_shape, dtype=self.dtype, device=device)
        self.pages = self._pool(self.rows.num_pages)
        self.is_initialized = True

    def _pool(self, num_pages: int) -> torch.Tensor:
        """Return memory for quantized pages."""
        return torch.empty(self.layout.pages_shape(num_pages, self.num_kv_heads), dtype=torch.uint8, device=self.device)

    @property
    def batch_size(self) -> int:
        """Rows of the batch; an AttributeError before the first token."""
        if not self.is_initialized:
            raise AttributeError("batch_size")
        return self.rows.batch

    @property
    def nbytes(self) -> int:
        """Bytes of pages and raw tokens."""
        return self.pages.nbytes + self.raw_pages.nbytes if self.is_initialized else 0

    @property
    def nbytes_16bit(self) -> int:
        """Bytes that the same tokens take in 16 bits."""
        if not self.is_initialized:
            return 0
        channels = self.layout.head_dim + self.layout.v_head_dim
        return 2 * self.rows.batch * int(self.rows.length) * self.num_kv_heads * channels

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys and values [batch, num_kv_heads, n, channels]; return what attention is to be called with.

        That is the new ones if the attention function reads pages, which writes them, too. Otherwise they are written here,
        and all keys and values are returned, dequantized.
        """
        self.shared.check_answered()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.rows.batch:
            raise ValueError(f"batch: expected {self.rows.batch} rows, as the cache has, got {key_states.shape[0]}")
        if self.shared.attends_pages:
            self.shared.waiting, TRACED.layer = self.index, self
            if torch.compiler.is_compiling():
                if not self.is_compileable:
                    raise ValueError("max_len: expected a number, and layers that share no keys, where a model is compiled")
            else:
                HANDOVER.layer, key_states = self, key_states.view(key_states.shape)
                key_states.kvarn_layer = self  # type: ignore[attr-defined]
            return key_states, value_states
        return self._write_and_read(key_states, value_states)

    def fill(self, k: torch.Tensor, v: torch.Tensor) -> Rows:
        """Write new keys and values [batch, num_kv_heads, n, channels] without attention; call it for all layers in turn."""
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        rows = self._begin(k.shape[2], None)
        self._write(k, v)
        return rows

    def _write_and_read(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new tokens; return all tokens, the new ones as they are."""
        if self.rows.padded:
            raise ValueError("attn_implementation: expected 'kvarn' for the whole of a padded batch, got another one")
        rows, count = self.fill(k, v), k.shape[2]
        if rows.fresh:
            return k, v
        assert rows.step is not None
        length = int(rows.length)
        tokens = k.new_empty(*k.shape[:2], length, k.shape[3]), v.new_empty(*v.shape[:2], length, v.shape[3])
        read_tokens(self.pages, self.raw_pages, rows.step, *tokens)
        for all_tokens, new in zip(tokens, (k, v), strict=True):
            all_tokens[:, :, length - count :] = new
        return tokens

    def _begin(self, count: int, mask: torch.Tensor | None) -> Rows:
        """Plan the step if this is the first layer of its device, and have memory for it."""
        rows = self.rows
        if self.is_first:
            rows.begin(count, mask)
        if self.epoch + 1 != rows.epoch or rows.count != count:
            raise RuntimeError(f"layer {self.index}: expected one step of {rows.count} tokens after the other in all layers")
        self.epoch = rows.epoch
        if self.pages.shape[0] < rows.num_pages:
            pages = self._pool(rows.num_pages)
            pages[: self.pages.shape[0]] = self.pages
            self.pages = pages
        return rows

    def _write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the keys and values of the step."""
        assert self.rows.step is not None
        write_tokens(k, v, self.pages, self.raw_pages, self.rows.step, encoder=self.shared.settings.encoder)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scores: Scores,
        captured: bool = False,
    ) -> torch.Tensor:
        """Write k and v [batch, num_kv_heads, n, channels], and attend with q [batch, num_q_heads, n, head_dim].

        Args:
            q: queries of the new tokens.
            k: keys of the new tokens.
            v: values of the new tokens.
            mask: bool [batch, n], which new positions are tokens; None: all.
            scores: how scores become weights.
            captured: whether this call may be replayed, so that nothing may depend on what the host knows.

        Returns:
            [batch, n, num_q_heads, v_head_dim]; zeros for padding.
        """
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        rows = self._begin(k.shape[2], mask)
        if rows.order is not None:
            k, v = (x.transpose(1, 2)[rows.order] for x in (k, v))
        self._write(k, v)
        if rows.fresh and not captured and k.dim() == 4 and self._is_plain(q, v, scores):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scores.sm_scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            return out.transpose(1, 2)
        return self.read(q, scores, (k, v))

    def attend_captured(self, **arguments: Any) -> torch.Tensor:
        """Call `attend` where the call may be replayed: what a graph's memory is used for isn't kept after its last layer."""
        out = self.attend(**arguments, captured=True)
        rows, shared = self.rows, self.shared
        everywhere = sum(each.num_layers for each in shared.rows.values())
        if rows.count > 1 and self.is_last and everywhere == shared.num_layers:
            rows.step = rows.order = None
        return out

    @property
    def is_last(self) -> bool:
        """Whether this is the last layer of its device."""
        return self.place == self.rows.num_layers - 1

    def _is_plain(self, q: torch.Tensor, v: torch.Tensor, scores: Scores) -> bool:
        """Return whether PyTorch has a kernel for a whole prompt that needs no memory for scores."""
        fits = q.shape[-1] == v.shape[-1] <= 256 and (q.dtype != torch.float32 or q.device.type == "cpu")
        return fits and q.shape[2] > 1 and all(option is None for option in scores[1:])

    def read(self, q: torch.Tensor, scores: Scores, new: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Attend with q [batch, num_q_heads, n, head_dim] to what was written; `new` are the keys and values of the step."""
        rows, (batch, num_q_heads, count) = self.rows, q.shape[:3]
        if rows.step is None or rows.count != count or self.epoch != rows.epoch:
            raise RuntimeError(f"layer {self.index}: expected queries of its last step, got {count} tokens of another one")
        k, v = (None, None) if new is None or count == 1 else new
        options = {"sm_scale": scores.sm_scale, "window": scores.window, "soft_cap": scores.soft_cap, "sinks": scores.sinks}
        options["scratch"] = self._scratch(q)
        packed = q if rows.order is None else q.transpose(1, 2)[rows.order]
        if scores.span_ends is not None and count > 1:
            options["span_ends"] = scores.span_ends.flatten() if rows.order is None else scores.span_ends[rows.order]
        result = attend(packed, self.pages, self.raw_pages, rows.step, k=k, v=v, **options)  # type: ignore[arg-type]
        assert isinstance(result, torch.Tensor)
        if rows.order is None:
            return result.view(batch, count, num_q_heads, -1)
        out = result.new_empty(batch, count, num_q_heads, result.shape[-1])
        out[rows.order] = result
        return out

    def _scratch(self, q: torch.Tensor) -> torch.Tensor | None:
        """Return memory for dequantized pages, where a chunk of a prompt is worth it and it isn't much."""
        shape = self.rows.num_pages, 2, *self.raw_pages.shape[2:]
        size = q.element_size() * math.prod(shape)
        if q.shape[2] < configs.SCRATCH_TOKENS or not q.is_cuda or not 0 < size <= SCRATCH_BYTES:
            return None
        return torch.empty(shape, dtype=q.dtype, device=q.device)

    def move(self, page_ids: torch.Tensor, raw_ids: torch.Tensor) -> None:
        """Make new pools of these pages, after `Rows.select`."""
        self.pages, self.raw_pages = self.pages[page_ids], self.raw_pages[raw_ids]

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Return how many keys attention gets, and where they begin: new ones only, from `PAGES` on, if it reads pages.

        transformers 5.0 gives the positions of the queries instead of their number.
        """
        self.shared.check_answered()
        count = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        if self.shared.attends_pages:
            return count, PAGES
        return (int(self.rows.length) if self.is_initialized else 0) + count, 0

    def get_seq_length(self) -> int:
        """Return how many positions a row has, padding included; with `max_len` a tensor."""
        self.shared.check_answered()
        return self.rows.length if self.is_initialized else 0  # type: ignore[return-value]

    def get_max_length(self) -> int:
        """Return how many positions a row can have; -1: any number."""
        return -1 if self.shared.settings.max_len is None else self.shared.settings.max_len

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget all tokens, and memory too unless it was preallocated."""
        if self.is_initialized and self.shared.settings.max_len is not None:
            self.epoch = 0
        else:
            self.is_initialized = False
            self.pages = self.raw_pages = None  # type: ignore[assignment]

    def _refuse(self, *args: Any) -> None:
        """Refuse what only the cache can do."""
        raise NotImplementedError("a layer of KVarNCache: expected this call of the cache, whose layers share their tables")

    crop = reorder_cache = batch_select_indices = batch_repeat_interleave = _refuse  # type: ignore[assignment]

    def offload(self) -> None:
        """Refuse: kernels read pages where they are."""
        raise NotImplementedError("offloading: expected False with KVarNCache")

    prefetch = offload
