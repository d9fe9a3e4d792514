"""Latent attention (MLA) in models of transformers: DeepSeek V3 and V3.2 with pages, beside the models as they are.

Needs `transformers`, 5.17 or later. The weights are random ones, large enough that attention is sharp. What an engine does is
in `decode`: it absorbs the up-projection of keys into the query, attends to latents, and multiplies the result by the
up-projection of values. V3.2 attends to the tokens on a list, which its indexer makes for each token. Here they are the lists
of the run without pages, because an indexer that sees other roundings puts other tokens on its list.
"""

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    DynamicCache,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, apply_rotary_pos_emb_interleave
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention

from kvarn_triton import MLALayout, mla_attend, mla_write_tokens, plan_step

device = "cuda" if torch.cuda.is_available() else "cpu"
ints = {"dtype": torch.int32, "device": device}
layout = MLALayout(bits=8, page_size=64)
prompt_len, num_new = 250, 12


class Paged:
    """One layer, and its pages: a prompt is computed as before, then stored; a decode step attends to pages and the tail."""

    step = None  # planned once for all layers

    def prepare(self):
        """Allocate memory for one sequence."""
        self.pages = layout.empty_pages(8, device)
        self.raw_pages = torch.empty(2, layout.page_size, 576, dtype=torch.float16, device=device)

    def forward(self, hidden_states, position_embeddings, *args, **kwargs):
        q, latents, rope = self.projected(hidden_states, position_embeddings)
        mla_write_tokens(latents, rope, self.pages, self.raw_pages, Paged.step, layout)
        position = kwargs["position_ids"][0, 0].item()
        if position == 0:
            return super().forward(hidden_states, position_embeddings, *args, **kwargs)
        out = self.decode(q, lists.get((self.layer_idx, position)))
        return self.o_proj(out.flatten(1)[None]), None

    def projected(self, hidden_states, position_embeddings):
        """Return queries [tokens, heads, 192], latents [tokens, 512] and rotary channels [tokens, 64]: what MLA caches."""
        n, width = hidden_states.shape[1], self.kv_lora_rank
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states))).view(1, n, self.num_heads, -1).transpose(1, 2)
        q_plain, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latents, rope = self.kv_a_proj_with_mqa(hidden_states).split([width, self.qk_rope_head_dim], dim=-1)
        q_rope, rope = apply_rotary_pos_emb_interleave(q_rope, rope[:, None], *position_embeddings)
        return torch.cat([q_plain, q_rope], dim=-1)[0].transpose(0, 1), self.kv_a_layernorm(latents)[0], rope[0, 0]

    def decode(self, q, indices):
        """Return what the heads of one token attend to, [1, heads, v_head_dim]; `indices` [1, 1, n] are on its list."""
        # The up-projection has a matrix for keys and one for values of each head, of 512 columns.
        up = self.kv_b_proj.weight.view(self.num_heads, -1, self.kv_lora_rank)
        up_k, up_v = up.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        q_plain, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        absorbed = torch.cat([torch.einsum("thd,hdc->thc", q_plain, up_k), q_rope], dim=-1).half()
        listed = None if indices is None else indices[:, 0]
        out = mla_attend(absorbed, self.pages, self.raw_pages, Paged.step, layout, sm_scale=self.scaling, indices=listed)
        return torch.einsum("thc,hdc->thd", out.to(up.dtype), up_v)


class PagedV3(Paged, DeepseekV3Attention):
    """A layer of DeepSeek V3."""


class PagedV32(Paged, DeepseekV32Attention):
    """A layer of DeepSeek V3.2."""


lists = {}


def keep_list(indexer, arguments, result):
    """Keep the list of a token [1, 1, topk], by layer and position."""
    lists[indexer.layer_idx, arguments[4][0, 0].item()] = result


@torch.no_grad()
def logits_of_steps(model, tokens):
    """Return the logits of `num_new` decode steps behind a prompt, [num_new, vocabulary]."""
    cache, found, seq_lens = DynamicCache(config=model.config), [], torch.zeros(1, **ints)
    block_table, raw_table = torch.arange(8, **ints)[None], torch.arange(2, **ints)[None]
    for ids in tokens.split([prompt_len, *[1] * num_new], dim=1):
        n, first = ids.shape[1], seq_lens.item()
        seq_lens += n
        ends = torch.tensor([0, n], **ints)
        Paged.step = plan_step(layout.keys, seq_lens, ends, block_table, raw_table, num_tokens=n)
        positions = torch.arange(first, first + n, device=device)[None]
        found.append(model(ids, position_ids=positions, past_key_values=cache).logits[0, -1])
    return torch.stack(found[1:])


sizes = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "initializer_range": 0.08, "attn_implementation": "eager",
}  # fmt: skip
models = {
    "DeepSeek V3": (DeepseekV3ForCausalLM, DeepseekV3Config(**sizes, first_k_dense_replace=3), PagedV3),
    "DeepSeek V3.2, 64 tokens on a list": (
        DeepseekV32ForCausalLM,
        DeepseekV32Config(**sizes, first_k_dense_replace=3, index_topk=64, index_n_heads=4, index_head_dim=128),
        PagedV32,
    ),
}
for name, (architecture, config, layer) in models.items():
    torch.manual_seed(0)
    model = architecture(config).to(device).eval()
    tokens = torch.randint(512, (1, prompt_len + num_new), device=device)
    for each in model.model.layers:
        if hasattr(each.self_attn, "indexer"):
            each.self_attn.indexer.register_forward_hook(keep_list)
    expected = logits_of_steps(model, tokens)
    for each in model.model.layers:
        each.self_attn.__class__ = layer
        each.self_attn.prepare()
    logits = logits_of_steps(model, tokens)
    error = ((logits - expected).norm() / expected.norm()).item()
    equal = (logits.argmax(1) == expected.argmax(1)).sum().item()
    print(f"{name}: relative error {error:.4f} of logits, {equal} of {num_new} best tokens are equal")
    assert error < 0.02 and equal == num_new
