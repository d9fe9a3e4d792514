"""Low-bit KV-cache kernels in Triton: the KVarN method (arXiv 2606.03458) from activations to attention output."""

from . import reference
from .attention.decode import decode_attention
from .attention.decode_schedule import schedule_decode, schedule_step
from .attention.parts import DecodeSchedule
from .attention.prefill import prefill_attention
from .attention.states import merge_states
from .attention.tree import build_tree_mask
from .attention.workspace import decode_workspace_size, prefill_workspace_size
from .compilation import CompilationError, no_compilation
from .debugging import check_cache, check_step
from .encoder import DEFAULT, PUBLISHED, Encoder
from .header import PageHeader, page_header, read_page_header
from .layout import FORMAT_VERSION, PRESETS, PageLayout
from .mla.config import MLAConfig
from .mla.decode import mla_decode_attention
from .mla.dequantize import mla_dequantize_pages
from .mla.step import mla_attend, mla_write_tokens
from .mla.store import mla_store_pages
from .mla.tail import mla_append_tokens, mla_commit_pages
from .mla.warmup import mla_warmup
from .mla_layout import MLALayout
from .pages.append import append_tokens, raw_slots
from .pages.balance import variance_normalize
from .pages.commit import commit_pages
from .pages.cut import cut_back
from .pages.dequantize import dequantize_pages
from .pages.packing import pack, unpack
from .pages.quantization import dequantize, quantize
from .pages.rotation import hadamard
from .pages.store import store_pages
from .serving.attention import attend
from .serving.move import copy_raw_pages, cut_tokens
from .serving.plan import plan_step
from .serving.read import read_tokens
from .serving.write import write_tokens
from .step import Step
from .tables import DecodeConfig, DecodeTable, PrefillConfig, load_table, save_table
from .warmup import warmup

__version__ = "0.2.0"

__all__ = [
    "DEFAULT",
    "FORMAT_VERSION",
    "PRESETS",
    "PUBLISHED",
    "CompilationError",
    "DecodeConfig",
    "DecodeSchedule",
    "DecodeTable",
    "Encoder",
    "MLAConfig",
    "MLALayout",
    "PageHeader",
    "PageLayout",
    "PrefillConfig",
    "Step",
    "append_tokens",
    "attend",
    "build_tree_mask",
    "check_cache",
    "check_step",
    "commit_pages",
    "copy_raw_pages",
    "cut_back",
    "cut_tokens",
    "decode_attention",
    "decode_workspace_size",
    "dequantize",
    "dequantize_pages",
    "hadamard",
    "load_table",
    "merge_states",
    "mla_append_tokens",
    "mla_attend",
    "mla_commit_pages",
    "mla_decode_attention",
    "mla_dequantize_pages",
    "mla_store_pages",
    "mla_warmup",
    "mla_write_tokens",
    "no_compilation",
    "pack",
    "page_header",
    "plan_step",
    "prefill_attention",
    "prefill_workspace_size",
    "quantize",
    "raw_slots",
    "read_page_header",
    "read_tokens",
    "reference",
    "save_table",
    "schedule_decode",
    "schedule_step",
    "store_pages",
    "unpack",
    "variance_normalize",
    "warmup",
    "write_tokens",
]
