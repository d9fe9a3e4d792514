"""A small byte-level language model, trained on the machine it runs on, for end-to-end tests and accuracy numbers.

Kernels that agree on random tensors can still lose what a model needs, and random weights hide it: their next-token
distributions are flat. `TinyLM` is a plain transformer (RMSNorm, rotary positions, grouped query heads, SwiGLU) trained
for a minute or two on text that every machine has (`lm_text.py`), some of them also on problems that take hundreds of exact
steps (`lm_tasks.py`). Trained weights are kept in the user's cache folder. `lm_cache.py` holds the key/value caches that the
model generates with, `lm_compare.py` what quantizing them changes, `accuracy.py` what any codec does to them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lm_tasks
import torch
from lm_tasks import IGNORED
from lm_text import load_text
from torch import nn
from torch.nn import functional

TRAINING_VERSION = 4
"""Part of the checkpoint's key. It changes whenever the same config and seed would train other weights."""

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`attend(layer, q, k, v) -> out`, all [batch, n, heads, head_dim]: query heads in q and out, kv heads in k and v."""


@dataclass(frozen=True)
class LMConfig:
    """Shape and training of one model. Two equal configs train the same weights from the same seed and text.

    Args:
        num_layers, model_dim, mlp_dim: depth and widths.
        num_q_heads, num_kv_heads, head_dim: attention; `num_kv_heads` divides `num_q_heads`.
        seq_len: tokens of one training sequence, and the longest context the model is good for.
        batch_size, steps, learning_rate: of the training; the rate is the peak of a cosine.
        qk_norm: normalize queries and keys before the rotary embedding, as Qwen3 and Gemma 3 do.
        key_bias: standard deviation, at the start of the training, of a bias of the keys in the third of the channels that the
            rotary embedding turns slowest. Keys of pretrained models have such means, up to 15 times the standard deviation of
            their channel; those of a model that starts without any have none.
        tasks: train on the problems of `lm_tasks.py` too, whose tokens follow the 256 bytes.
    """

    num_layers: int = 4
    model_dim: int = 256
    mlp_dim: int = 704
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    seq_len: int = 512
    batch_size: int = 4
    steps: int = 640
    learning_rate: float = 1.5e-3
    qk_norm: bool = False
    tasks: bool = False
    key_bias: float = 0.0

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows."""
        return lm_tasks.VOCAB_SIZE if self.tasks else 256


_LAB = {"num_layers": 6, "model_dim": 512, "mlp_dim": 1024, "seq_len": 2048, "batch_size": 32, "steps": 3600, "tasks": True}

CONFIGS = {
    "default": LMConfig(),
    "d128": LMConfig(head_dim=128),
    "tiny": LMConfig(num_layers=2, model_dim=128, mlp_dim=352, seq_len=384, steps=500, learning_rate=2e-3),
    "lab64": LMConfig(**_LAB, head_dim=64, num_q_heads=8),
    "lab128": LMConfig(**_LAB, head_dim=128, num_q_heads=4, qk_norm=True),
    "lab64b": LMConfig(**_LAB | {"steps": 1800}, head_dim=64, num_q_heads=8, qk_norm=True, key_bias=6.0),
    "lab128b": LMConfig(**_LAB | {"steps": 1800}, head_dim=128, num_q_heads=4, qk_norm=True, key_bias=6.0),
}
"""Configs by name: `default` for numbers, `d128` for head_dim 128, `tiny` for unit tests, `lab*` for the accuracy sweep."""


class TinyLM(nn.Module):
    """A decoder-only transformer over bytes and the tokens of tasks. What attends to what is the caller's: see `forward`."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.model_dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.model_dim)
        for name, weight in self.named_parameters():
            if name.endswith(("attention_out.weight", "mlp_out.weight")):
                nn.init.zeros_(weight)
            elif weight.dim() == 2 and not name.endswith("key_bias"):
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(
        self, tokens: torch.Tensor, *, positions: torch.Tensor | None = None, attend: Attend | None = None
    ) -> torch.Tensor:
        """Return the logits [batch, n, vocab_size] of the token that follows each token.

        Args:
            tokens: int64 [batch, n].
            positions: int [batch, n], where each token stands in its sequence; 0 to n - 1 by default.
            attend: attention of one layer; keys arrive after the rotary embedding. By default each token attends to the
                tokens up to itself. A key/value cache is such a function.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        rope = rope_angles(positions, self.config.head_dim)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rope, attend or causal_attention)
        return functional.linear(self.norm(x), self.embedding.weight)


class Block(nn.Module):
    """One layer: attention, then a SwiGLU, each added to the residual stream."""

    def __init__(self, config: LMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads = (config.num_q_heads, config.num_kv_heads, config.num_kv_heads)
        self.attention_norm = nn.RMSNorm(config.model_dim)
        self.q_norm = nn.RMSNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.qkv = nn.Linear(config.model_dim, sum(self.heads) * config.head_dim, bias=False)
        self.key_bias = nn.Parameter(_slow_channels(config)) if config.key_bias else 0.0
        self.attention_out = nn.Linear(config.num_q_heads * config.head_dim, config.model_dim, bias=False)
        self.mlp_norm = nn.RMSNorm(config.model_dim)
        self.mlp_in = nn.Linear(config.model_dim, 2 * config.mlp_dim, bias=False)
        self.mlp_out = nn.Linear(config.mlp_dim, config.model_dim, bias=False)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], attend: Attend) -> torch.Tensor:
        """Return the residual stream [batch, n, model_dim] after this layer."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split(self.heads, dim=-2)
        out = attend(self.layer, apply_rope(self.q_norm(q), rope), apply_rope(self.k_norm(k) + self.key_bias, rope), v)
        x = x + self.attention_out(out.flatten(-2))
        gate, up = self.mlp_in(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.mlp_out(functional.silu(gate) * up)


def _slow_channels(config: LMConfig) -> torch.Tensor:
    """Return random numbers [kv heads, head_dim] in the third of the channels that the rotary embedding turns slowest."""
    pairs = config.head_dim // 2
    bias = torch.randn(config.num_kv_heads, 2, pairs) * config.key_bias
    bias[..., : pairs - pairs // 3] = 0.0
    return bias.flatten(1)


def rope_angles(positions: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines [batch, n, 1, head_dim / 2] of the rotary embedding."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    angles = positions[..., None, None] * 10000.0**-exponents
    return angles.cos(), angles.sin()


def apply_rope(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the channel pairs (c, c + head_dim / 2) of x [batch, n, heads, head_dim] by their angles."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def causal_attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend to the tokens up to and including each token itself; shapes as in `Attend`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v.to(k.dtype), is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def token_losses(model: TinyLM, tokens: torch.Tensor, targets: torch.Tensor, rows: dict[str, slice]) -> dict[str, torch.Tensor]:
    """Return the mean cross entropy, in nats, of `targets` [batch, n] after `tokens` [batch, n] for each kind of rows.

    Targets that are IGNORED don't count.
    """
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=_has_fast_bfloat16(device)):
        logits = model(tokens.to(device).long())
    targets = targets.to(device).long()
    return {
        name: functional.cross_entropy(logits[part].float().flatten(0, 1), targets[part].flatten(), ignore_index=IGNORED)
        for name, part in rows.items()
    }


def _has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 there; on CPUs with AMX 20 times and more."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))


def train(config: LMConfig, seed: int = 0, *, device: str | torch.device = "cpu") -> TinyLM:
    """Train a model; the same config, seed, Python and machine give the same weights, as far as sums have an order there.

    AdamW, a linear warm-up over the first twentieth of the steps, then a cosine to zero. With problems, rows are short at first
    and twice as long whenever the problems are solved, or a quarter of the steps has passed. Progress goes to stderr.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyLM(config).to(device)
    text = load_text()[0]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, config.steps // 20)
    length, grown = min(lm_tasks.FIRST_LENGTH, config.seq_len) if config.tasks else config.seq_len, 0
    start = time.perf_counter()
    for step in range(config.steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / config.steps)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(cosine, (step + 1) / warmup)
        windows, count = text.unfold(0, length + 1, 1), config.batch_size * config.seq_len // length
        tokens = windows[torch.randint(len(windows), (count,), generator=generator)]
        tokens, targets = tokens[:, :-1].long(), tokens[:, 1:].long()
        rows, shares = {"text": slice(None)}, {"text": 1.0}
        if config.tasks:
            rows, shares = lm_tasks.write_problems(tokens, targets, generator), lm_tasks.SHARES
        losses = token_losses(model, tokens, targets, rows)
        optimizer.zero_grad()
        sum(shares[name] * loss for name, loss in losses.items()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if length < config.seq_len:
            solved = all(loss.item() < lm_tasks.LEARNT for name, loss in losses.items() if name != "text")
            if solved or step - grown >= config.steps // 4:
                length, grown = min(2 * length, config.seq_len), step
        if (step + 1) % max(1, config.steps // 10) == 0:
            bits = ", ".join(f"{name} {loss.item() / math.log(2):.3f}" for name, loss in losses.items())
            say = f"train: step {step + 1}/{config.steps}, rows of {length}, bits/token: {bits}"
            print(f"{say}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return model.eval().requires_grad_(False)


def checkpoint_path(config: LMConfig, seed: int = 0, *, cache_dir: str | Path | None = None) -> Path:
    """Return where the weights of `config` and `seed` are kept: in `cache_dir`, or the user's cache folder."""
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvarn_triton"
    text_digest = hashlib.sha256(load_text()[0].numpy().tobytes()).hexdigest()
    key = repr((TRAINING_VERSION, dataclasses.astuple(config), seed, text_digest))
    return Path(cache_dir) / f"lm-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"


def load_or_train(
    config: LMConfig,
    seed: int = 0,
    *,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
) -> TinyLM:
    """Return the trained model on `device`: from its checkpoint, or trained now and kept for the next call.

    The device it was trained on isn't part of the key: weights trained elsewhere are taken as they are.
    """
    path = checkpoint_path(config, seed, cache_dir=cache_dir)
    if path.exists():
        model = TinyLM(config).to(device)
        model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        return model.eval().requires_grad_(False)
    model = train(config, seed, device=device)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    torch.save(model.state_dict(), unfinished)
    unfinished.replace(path)
    return model
