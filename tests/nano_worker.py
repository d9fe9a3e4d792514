"""nano-vllm on a CPU with a small random Qwen3, in a process of its own: what it generated and did, as JSON on the last line.

Usage: nano_worker.py LAYOUT SINK_PAGES
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "perf"))

import nano_cpu
import nano_vllm
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

BLOCK, EOS, VOCABULARY = 256, 255, 256


class Tokenizer:
    """All that the engine asks of one."""

    eos_token_id = EOS


def make_model(folder: str) -> Qwen3ForCausalLM:
    """Save a model in float16 (in float32 nano-vllm's norms overwrite what they are given) and return it in float32."""
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=False, eos_token_id=EOS,
        initializer_range=0.06, dtype="float16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).half().eval()
    model.save_pretrained(folder)
    return model.float()


def prompts() -> list[list[int]]:
    """Return prompts; the first, third and fifth have 300 tokens in common."""
    generator = torch.Generator().manual_seed(1)
    common, other = (torch.randint(0, 250, (count,), generator=generator).tolist() for count in (300, 400))
    # The fourth grows into a block of its own; the sixth to the eighth come when blocks have to be used again.
    return [
        common + other[:3], other[:70], common + other[100:230], other[50:300], common + other[300:310],
        other[200:390], other[7:330], other[:5],
    ]  # fmt: skip


class Watch:
    """Looks on: which sequence hit which blocks, and who had a block before."""

    def __init__(self, engine) -> None:
        self.engine, self.owners = engine, {}
        self.same_step = self.other_step = self.reused = self.most = 0
        self.logits: dict[int, list[torch.Tensor]] = {}
        self.batch: list = []
        self.schedule = engine.scheduler.schedule
        engine.scheduler.schedule = self.scheduled
        engine.model_runner.sampler = self.greedy

    def scheduled(self):
        """Schedule, and look at what was."""
        self.batch, is_prefill = self.schedule()
        self.most = max(self.most, len(self.engine.scheduler.running))
        if is_prefill:
            begun = set()
            for seq in self.batch:
                hits = seq.block_table[: seq.num_cached_tokens // BLOCK]
                self.same_step += sum(block in begun for block in hits)
                self.other_step += sum(block not in begun for block in hits)
                begun |= set(seq.block_table)
        for seq in self.batch:
            for block in seq.block_table[seq.num_cached_tokens // BLOCK :]:
                self.reused += self.owners.get(block, seq.seq_id) != seq.seq_id
                self.owners[block] = seq.seq_id
        return self.batch, is_prefill

    def greedy(self, logits, temperatures, **options):
        """Take the best token, in place of nano-vllm's sampler, which has no greedy mode."""
        for seq, row in zip(self.batch, logits, strict=True):
            self.logits.setdefault(seq.seq_id, []).append(row.float())
        return logits.argmax(-1)


def main() -> None:
    """Generate, and compare each token's logits with those of the model of transformers, given the same tokens before it."""
    layout, sink_pages = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    folder = tempfile.TemporaryDirectory()
    model = make_model(folder.name)
    nano_cpu.install()
    nano_vllm.install(layout, sink_pages)
    from nanovllm import LLM, SamplingParams

    engine = LLM(
        folder.name, tokenizer=Tokenizer(), enforce_eager=True, max_model_len=1024, max_num_batched_tokens=1024, max_num_seqs=4,
        num_kvcache_blocks=7,
    )  # fmt: skip
    watch, requests = Watch(engine), prompts()
    first = None
    for prompt, count in zip(requests, (80, 20, 72, 40, 50, 40, 30, 70), strict=True):
        engine.add_request(prompt, SamplingParams(max_tokens=count, ignore_eos=True))
        first = first if first is not None else engine.scheduler.waiting[0].seq_id
    tokens = {}
    while not engine.is_finished():
        tokens |= dict(engine.step()[0])
    rows = []
    for index, prompt in enumerate(requests):
        got, logits = tokens[first + index], torch.stack(watch.logits[first + index])
        with torch.no_grad():
            wanted = model(torch.tensor([prompt + got])).logits[0, len(prompt) - 1 : -1]
        chosen = torch.tensor(got)
        gaps = wanted.max(-1).values - wanted.gather(1, chosen[:, None])[:, 0]
        rows.append({
            "tokens": len(got), "equal": int((wanted.argmax(-1) == chosen).sum()), "gap": gaps.max().item(),
            "error": (logits - wanted).abs().max().item(), "spread": wanted.std().item(), "distinct": len(set(got)),
        })  # fmt: skip
    cache = nano_vllm.CACHE
    print(json.dumps({
        "rows": rows, "same_step": watch.same_step, "other_step": watch.other_step, "reused": watch.reused,
        "used_at_end": len(engine.scheduler.block_manager.used_block_ids), "free": len(cache.free), "most": watch.most,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
