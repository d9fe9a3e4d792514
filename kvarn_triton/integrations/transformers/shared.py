"""What the layers of a cache share on all devices, and how the attention function finds the layer that it is called for."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch

from ...layout import PageLayout
from .rows import Rows, Settings

if TYPE_CHECKING:
    from .layer import KVarNLayer

ATTENTION_NAMES: set[str] = set()
"""Attention implementations that `register_attention` added."""

PAGES = -1
"""Where keys begin that attention gets from a layer with pages: no other layer says so."""


class Handover(threading.local):
    """What `update` leaves for the attention function of the same thread, which gets no cache."""

    layer: KVarNLayer | None = None
    """The layer that was updated last."""
    paged = False
    """Whether the last mask of full attention was one for pages."""


class Traced:
    """The layer that was updated last, for compilers: they don't know what a thread has of its own."""

    layer: KVarNLayer | None = None


HANDOVER = Handover()
TRACED = Traced()
LAYERS: weakref.WeakValueDictionary[int, KVarNLayer] = weakref.WeakValueDictionary()
"""Layers by their numbers: operators take numbers."""


class Shared:
    """What the layers of a cache share on all devices."""

    def __init__(self, config: Any, settings: Settings, attend_pages: bool) -> None:
        self.config, self.settings, self.attend_pages = config, settings, attend_pages
        self.rows: dict[tuple[torch.device, PageLayout], Rows] = {}
        self.num_layers = 0
        modes = getattr(config, "kv_sharing_modes", None) or ()
        self.shares_keys = "reuse" in modes or bool(getattr(config, "num_kv_shared_layers", 0))
        self.waiting: int | None = None
        """The layer that returned new tokens only, until attention asks it for the others."""

    @property
    def attends_pages(self) -> bool:
        """Whether layers leave reading pages to the attention function."""
        return self.attend_pages and getattr(self.config, "_attn_implementation", None) in ATTENTION_NAMES

    def check_answered(self) -> None:
        """Refuse to go on after attention to new tokens alone."""
        if self.waiting is not None:
            raise RuntimeError(
                f"attn_implementation: layer {self.waiting} expected attention that reads pages, and none asked for them; call "
                "register_attention() and model.set_attn_implementation('kvarn'), or say KVarNCache(..., attend_pages=False). "
                "reset() the cache before you use it again"
            )


def take_layer() -> KVarNLayer | None:
    """Return the layer whose `update` was called last, if it still waits for attention, and don't return it again."""
    if torch.compiler.is_compiling():
        layer, TRACED.layer = TRACED.layer, None
    else:
        layer, HANDOVER.layer = HANDOVER.layer, None
    if layer is None or layer.shared.waiting != layer.index:
        return None
    layer.shared.waiting = None
    return layer
