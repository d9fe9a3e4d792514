"""Low-bit KV-cache kernels in Triton: the KVarN method (arXiv 2606.03458) from activations to attention output."""

from . import reference
from .append import append_tokens, raw_slots
from .balance import variance_normalize
from .commit import commit_pages
from .cut import cut_back
from .debugging import check_cache
from .decode import decode_attention
from .encoder import DEFAULT, PUBLISHED, Encoder
from .gather import dequantize_pages
from .layout import FORMAT_VERSION, PRESETS, PageLayout
from .merge import merge_states
from .packing import pack, unpack
from .prefill import prefill_attention, prefill_workspace_size
from .quantization import dequantize, quantize
from .rotation import hadamard
from .store import store_pages
from .tables import DecodeConfig, DecodeTable, load_table, save_table
from .warmup import CompilationError, no_compilation, warmup
from .workspace import decode_workspace_size

__version__ = "0.2.0"

__all__ = [
    "DEFAULT",
    "FORMAT_VERSION",
    "PRESETS",
    "PUBLISHED",
    "CompilationError",
    "DecodeConfig",
    "DecodeTable",
    "Encoder",
    "PageLayout",
    "append_tokens",
    "check_cache",
    "commit_pages",
    "cut_back",
    "decode_attention",
    "decode_workspace_size",
    "dequantize",
    "dequantize_pages",
    "hadamard",
    "load_table",
    "merge_states",
    "no_compilation",
    "pack",
    "prefill_attention",
    "prefill_workspace_size",
    "quantize",
    "raw_slots",
    "reference",
    "save_table",
    "store_pages",
    "unpack",
    "variance_normalize",
    "warmup",
]
