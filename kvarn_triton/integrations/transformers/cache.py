"""`KVarNCache`: a cache object for `generate` and `forward`, whose layers of full attention are in pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from ...checks import check_count, require
from ...encoder import DEFAULT, Encoder
from ...layout import PageLayout
from ...serving.move import copy_raw_pages
from .layer import KVarNLayer
from .rows import Rows, Settings
from .shared import Shared


def _layers_of(config: Any, max_len: int | None) -> tuple[list[Any], list[int]]:
    """Return transformers' own layers for a model, and the numbers of those that are of full attention."""
    cache = DynamicCache(config=config) if max_len is None else StaticCache(config=config, max_cache_len=max_len)
    plain = DynamicLayer if max_len is None else StaticLayer
    # transformers 5.0 has plain layers for types that it keeps in other caches.
    types = getattr(config, "layer_types", None) or ["full_attention"] * len(cache.layers)
    full = [i for i, layer in enumerate(cache.layers) if type(layer) is plain and types[i] == "full_attention"]
    return cache.layers, full


def _head_dims(config: Any) -> tuple[int, int]:
    """Return head_dim of keys and of values, as configurations have it; a layer looks at the tensors it gets."""
    nope, rope = getattr(config, "qk_nope_head_dim", None), getattr(config, "qk_rope_head_dim", None)
    if nope is not None and rope is not None:
        return nope + rope, config.v_head_dim
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim, head_dim


class KVarNCache(Cache):
    """Keys and values of 2 to 8 bits for a model of transformers.

    Layers of full attention are in pages: the first tokens in 16 bits, then quantized pages, then the last tokens in 16 bits.
    Other layers (sliding windows, linear attention, layers that share keys) are transformers' own.

    With the attention implementation of `register_attention`, kernels read the pages. With any other one a layer returns all
    of its keys and values, dequantized: memory is saved, time is not, and padding is stored like tokens. `attends_pages` says
    which.

    Args:
        config: `model.config`.
        layout: name of a page format, such as "k4v2_g128": bits of keys, of values, tokens of a page.
        sink_len: tokens at the start of each row that stay in 16 bits.
        rollback: most tokens at the end that can be taken back: drafts of prompt lookup and assistant models, `crop`. It costs
            that many more tokens in 16 bits, twice.
        max_len: positions of the longest row, padding included. Memory is then allocated at once, at fixed addresses, and
            `generate` captures decode steps as it does with `StaticCache`. None: memory grows.
        encoder: options of the encoder.
        attend_pages: False to return all keys and values in any case.

    Raises:
        ValueError: for an option, or a model that `supports` refuses.
    """

    def __init__(
        self,
        config: Any,
        layout: str = "k4v2_g128",
        *,
        sink_len: int = 128,
        rollback: int = 0,
        max_len: int | None = None,
        encoder: Encoder = DEFAULT,
        attend_pages: bool = True,
    ) -> None:
        reason = self.supports(config, layout)
        if reason is not None:
            raise ValueError(f"config: {reason}")
        check_count("sink_len", sink_len)
        check_count("rollback", rollback)
        if max_len is not None:
            check_count("max_len", max_len, least=1)
        require(isinstance(encoder, Encoder), "encoder", "an Encoder", type(encoder).__name__)
        require(isinstance(attend_pages, bool), "attend_pages", "a bool", attend_pages)
        config = config.get_text_config(decoder=True)
        self.shared = Shared(config, Settings(layout, sink_len, rollback, max_len, encoder), attend_pages)
        layers, full = _layers_of(config, max_len)
        self.paged_layers = [KVarNLayer(self.shared, i) for i in full]
        self.shared.num_layers = len(full)
        for layer in self.paged_layers:
            layers[layer.index] = layer
        super().__init__(layers=layers)

    @staticmethod
    def supports(config: Any, layout: str = "k4v2_g128") -> str | None:
        """Return why a model can't have such a cache; None if it can.

        Args:
            config: `model.config`.
            layout: as for the class.
        """
        if getattr(config, "is_encoder_decoder", False):
            return "expected a decoder, got an encoder-decoder model"
        config = config.get_text_config(decoder=True)
        full = _layers_of(config, None)[1]
        if not full:
            return "expected a model with layers of full attention, got one without"
        each = getattr(config, "per_layer_config", None)  # for models whose layers differ
        for i in full:
            head_dim, v_head_dim = _head_dims(config if each is None else each[i])
            try:
                PageLayout.from_name(layout, head_dim=head_dim, v_head_dim=v_head_dim)
            except ValueError as error:
                return str(error)
        return None

    def __repr__(self) -> str:
        """Say what is in pages, and who reads them."""
        settings, how = self.shared.settings, "attention reads pages" if self.attends_pages else "attention gets all tokens"
        return f"KVarNCache({settings.layout}, {len(self.paged_layers)} of {len(self.layers)} layers in pages, {how})"

    @property
    def attends_pages(self) -> bool:
        """Whether attention reads pages; otherwise it gets all keys and values, dequantized in every step."""
        return self.shared.attends_pages

    @property
    def nbytes(self) -> int:
        """Bytes of the cache: pages, tokens in 16 bits, tables, and transformers' own layers."""
        tables = sum(rows.nbytes for rows in self.shared.rows.values())
        return tables + sum(layer.nbytes for layer in self.paged_layers) + self._other_nbytes()

    @property
    def nbytes_16bit(self) -> int:
        """Bytes that the same positions take in a cache of transformers of 16 bits."""
        return sum(layer.nbytes_16bit for layer in self.paged_layers) + self._other_nbytes()

    def _other_nbytes(self) -> int:
        """Return the bytes of layers without pages."""
        values: list[Any] = [value for layer in self._others() for value in vars(layer).values()]
        values += [each for value in values if isinstance(value, dict) for each in value.values()]
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))

    def _others(self) -> Iterator[Any]:
        """Return transformers' own layers."""
        return (layer for layer in self.layers if not isinstance(layer, KVarNLayer))

    def _layers_with_rows(self) -> Iterator[tuple[Rows, list[KVarNLayer]]]:
        """Return what layers share on each device, and those layers."""
        for rows in self.shared.rows.values():
            yield rows, [layer for layer in self.paged_layers if layer.is_initialized and layer.rows is rows]

    def activate_past_recording(self) -> None:
        """Get ready for drafts, which `generate` announces here.

        Raises:
            ValueError: without `rollback`.
        """
        if self.shared.settings.rollback == 0:
            raise ValueError("rollback: expected the most drafts of a step, got 0; say KVarNCache(..., rollback=N)")
        if hasattr(Cache, "activate_past_recording"):
            super().activate_past_recording()

    def crop(self, tokens_to_remove: int | torch.Tensor) -> None:
        """Take the last tokens of every row back.

        Args:
            tokens_to_remove: how many, as a number below 0, as transformers has it from 5.24 on; above 0 how many to keep.

        Raises:
            ValueError: if `rollback` is smaller; it counts from the longest that rows were since `reset`.
        """
        tokens_to_remove = int(tokens_to_remove)  # a tensor on the GPU, where transformers counts matches there
        for rows in self.shared.rows.values():
            length = int(rows.length)
            count = -tokens_to_remove if tokens_to_remove <= 0 else max(length - tokens_to_remove, 0)
            rows.crop(count)
            tokens_to_remove = -count
        for layer in self._others():
            # A layer that records its past drops it at crop(0); older ones would drop everything.
            if tokens_to_remove or hasattr(layer, "record_past"):
                layer.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens. With `max_len` memory stays where it is, for graphs that were captured."""
        self.shared.waiting = None
        for rows in self.shared.rows.values():
            rows.reset()
        if self.shared.settings.max_len is None:
            self.shared.rows.clear()
        super().reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row i go on as row beam_idx[i]: quantized pages are shared, raw ones are copied where a row goes on twice.

        Args:
            beam_idx: int64 [batch].
        """
        for rows, layers in self._layers_with_rows():
            require(len(beam_idx) == rows.batch, "beam_idx", f"{rows.batch} rows", len(beam_idx))
            sources, targets = rows.reorder(beam_idx.to(rows.device).long())
            for layer in layers:
                copy_raw_pages(layer.raw_pages, sources, targets)
        for layer in self._others():
            layer.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Become a batch of these rows, in this order, each any number of times.

        Args:
            indices: int64 [rows].

        Raises:
            ValueError: with `max_len`, if the number of rows changes.
        """
        for rows, layers in self._layers_with_rows():
            chosen = indices.to(rows.device).long()
            if len(chosen) == rows.batch:
                moved = rows.reorder(chosen)
                for layer in layers:
                    copy_raw_pages(layer.raw_pages, *moved)
                continue
            moved = rows.select(chosen)
            for layer in layers:
                layer.move(*moved)
        for layer in self._others():
            layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every row `repeats` times, one after the other.

        Args:
            repeats: how often, 1 or more.

        Raises:
            ValueError: with `max_len`, if the number of rows changes.
        """
        for rows, layers in self._layers_with_rows():
            if repeats == 1:
                break
            moved = rows.select(torch.arange(rows.batch, device=rows.device).repeat_interleave(repeats))
            for layer in layers:
                layer.move(*moved)
        for layer in self._others():
            layer.batch_repeat_interleave(repeats)
