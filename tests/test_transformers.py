"""The cache for Hugging Face transformers, on tiny random models. CPU tensors run the reference.

An oracle is the same model with a plain cache, or with a cache of the same options that was filled in another way.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ON_GPU

from kvarn_triton import gpu

transformers = pytest.importorskip(
    "transformers", reason="transformers isn't installed: pip install 'kvarn_triton[transformers]'"
)
# The models come with the package; where one of them isn't there, that is an error.
from transformers import DynamicCache, GenerationConfig  # noqa: E402

from kvarn_triton.integrations.transformers import KVarNCache, register_attention  # noqa: E402
from kvarn_triton.integrations.transformers.attention import attention_without_pages, kvarn_attention, kvarn_mask  # noqa: E402
from kvarn_triton.integrations.transformers.layer import Scores  # noqa: E402
from kvarn_triton.integrations.transformers.shared import PAGES  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 64, "vocab_size": 128, "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
HYBRID = {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"query_pre_attn_scalar": 64, "attn_logit_softcapping": 2.0, **HYBRID}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"query_pre_attn_scalar": 64, **HYBRID}),
    "gemma3n": (  # layers share keys and values
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            "num_hidden_layers": 5,
            "num_kv_shared_layers": 2,
            "sliding_window": 48,
            "hidden_size_per_layer_input": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": 128,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "intermediate_size": [64] * 5,
            "activation_sparsity_pattern": [0.0] * 5,
        },
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {"num_local_experts": 2, "num_experts_per_tok": 1, **HYBRID}),
}
LAYOUT = "k8v8_g64"
"""Eight bits: then a model says what it says with 16 bits, but for near ties."""
SMALL = {"sink_len": 64}
NEAR = 1e-3
"""Largest difference of logits, which are about 4, where the same pages are read in another way: attention in another order."""


@pytest.fixture(autouse=True)
def reference_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run CPU tensors through the reference, not through Triton's interpreter."""
    monkeypatch.setattr(gpu, "on_device", lambda tensor: tensor.is_cuda)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Tiny models by family, made once, always with the attention that they began with."""
    register_attention()
    made = {}
    for name, (model, config, options) in FAMILIES.items():
        torch.manual_seed(0)
        made[name] = getattr(transformers, model)(getattr(transformers, config)(**SIZES | options)).eval()
        if name == "gpt_oss":
            for layer in made[name].model.layers:
                torch.nn.init.normal_(layer.self_attn.sinks)
    return made


@pytest.fixture
def llama(models: dict[str, Any]) -> Any:
    """Return a Llama whose attention reads pages."""
    models["llama"].set_attn_implementation("kvarn")
    return models["llama"]


KEY = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
"""What models call the argument; `generate` takes both names where this is the new one."""


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Return random tokens."""
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def feed(model: Any, ids: torch.Tensor, cache: Any, chunks: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits of tokens that are fed in chunks."""
    parts, first = [], 0 if mask is None else mask.shape[1] - ids.shape[1]
    offset = first
    for count in chunks:
        options: dict[str, Any] = {KEY: cache}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            options |= {"attention_mask": mask[:, : first + count], "position_ids": positions[:, first : first + count]}
        parts.append(model(input_ids=ids[:, first - offset : first - offset + count], **options).logits)
        first += count
    return torch.cat(parts, dim=1)


def singles(prompt: int, count: int) -> list[int]:
    """Return the chunks of a prompt and of single tokens behind it."""
    return [prompt, *[1] * count]


def generate(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    """Return what a model generates, greedily unless told otherwise."""
    options = {"max_new_tokens": 24, "do_sample": False, KEY: cache} | options
    return model.generate(ids, **options)


def new(model: Any, layout: str = LAYOUT, **options: Any) -> KVarNCache:
    """Return a cache with small pages."""
    return KVarNCache(model.config, layout, **SMALL | options)


@pytest.mark.parametrize("attention", ["kvarn", "own"])
@pytest.mark.parametrize("name", FAMILIES)
def test_16_bits(name, attention, models):
    """While nothing is quantized, a model says what it says with its own cache and attention: windows, sinks and caps included.

    With 8 bits it says nearly that.
    """
    model, ids = models[name], tokens(2, 150)
    own = "eager" if name in ("gemma2", "gpt_oss") else "sdpa"
    model.set_attn_implementation(own)
    chunks = [100, 20, *[1] * 30]
    exact = feed(model, ids, DynamicCache(config=model.config), chunks)
    model.set_attn_implementation("kvarn" if attention == "kvarn" else own)
    torch.testing.assert_close(feed(model, ids, new(model, sink_len=256), chunks), exact, atol=NEAR, rtol=0)
    cache = new(model, sink_len=20)
    assert cache.attends_pages == (attention == "kvarn")
    assert (feed(model, ids, cache, chunks) - exact).abs().mean() < 0.02 * exact.abs().mean()
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    if attention == "kvarn":  # a plain cache under this attention, with padding
        got = feed(model, ids, DynamicCache(config=model.config), chunks, mask)
        model.set_attn_implementation(own)
        expected = feed(model, ids, DynamicCache(config=model.config), chunks, mask)
        kept = mask.bool()
        torch.testing.assert_close(got[kept], expected[kept], atol=NEAR, rtol=0)


@pytest.mark.parametrize(
    ("name", "layout"), [("llama", "k4v2_g64"), ("llama", "k6v5_g64"), ("gemma3", "k4v2_g64"), ("gpt_oss", "k4v2_g64")]
)
def test_attention_reads_the_same_pages(name, layout, models):
    """Attention over pages, and attention over what the same pages are dequantized to, are the same."""
    model, ids = models[name], tokens(2, 260)
    chunks = [180, 50, *[1] * 30]  # the second completes a page, which its own tokens don't see yet
    model.set_attn_implementation("kvarn")
    paged = feed(model, ids, new(model, layout), chunks)
    model.set_attn_implementation("eager")
    read = feed(model, ids, new(model, layout), chunks)
    # Where a chunk completes its page, decode attention reads the last token's keys and values from the page.
    difference = (paged - read).abs()
    assert difference.mean() < 0.01
    torch.testing.assert_close(paged[:, :230], read[:, :230], atol=NEAR, rtol=0)


def test_growth(llama):
    """Memory that grows keeps what it has: logits are those of a cache that was allocated at once."""
    ids, chunks = tokens(2, 1003), [150, 1, 200, 350, 1, 300, 1]
    grown, whole = new(llama, "k4v2_g64"), new(llama, "k4v2_g64", max_len=1003)
    assert torch.equal(feed(llama, ids, grown, chunks), feed(llama, ids, whole, chunks))
    assert grown.layers[0].pages.shape[0] > 2 * 14


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_padding(name, models):
    """A row of a padded batch is what it is alone, whether padding is at the left, in the middle or behind its prompt."""
    model = models[name]
    model.set_attn_implementation("kvarn")
    ids, mask = tokens(3, 220), torch.ones(3, 220, dtype=torch.long)
    mask[0, :37] = 0
    if name == "llama":  # a window of transformers counts padding in the middle as positions
        mask[1, 150:160] = 0
        mask[2, 190:193] = 0  # single tokens, of which one row has none
    chunks = [180, *[1] * 40]
    cache = new(model, "k4v2_g64", rollback=8)
    batch = feed(model, ids, cache, chunks, mask)
    for row in range(3):
        kept = mask[row].bool()
        own_chunks = [int(kept[:180].sum()), *[1] * int(kept[180:].sum())]
        alone = feed(model, ids[row : row + 1, kept], new(model, "k4v2_g64", rollback=8), own_chunks)
        torch.testing.assert_close(batch[row : row + 1, kept], alone, atol=NEAR, rtol=0)


def test_padding_in_generate(llama):
    """Left-padded prompts generate what each generates alone, with tokens of padding that differ."""
    ids, mask = tokens(2, 150), torch.ones(2, 150, dtype=torch.long)
    mask[1, :70] = 0
    ids[1, :70] = 0
    both = generate(llama, ids, new(llama), attention_mask=mask)
    assert torch.equal(both[:1], generate(llama, ids[:1], new(llama)))
    assert torch.equal(both[1:, 70:], generate(llama, ids[1:, 70:], new(llama)))


@pytest.mark.parametrize("attend_pages", [True, False])
def test_generate(attend_pages, models):
    """Greedy search, both names of the argument, samples, several answers, chunks of a prompt, turns on one cache.

    Nothing is quantized here, so that answers are those of a plain cache, token by token.
    """
    model, ids = models["llama"], tokens(2, 150)
    model.set_attn_implementation("kvarn" if attend_pages else "sdpa")
    plain = generate(model, ids, DynamicCache(config=model.config))
    cache = new(model, sink_len=256)
    assert torch.equal(generate(model, ids, cache), plain)
    assert cache.get_seq_length() == 173
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        again = model.generate(ids, past_key_values=new(model, sink_len=256), max_new_tokens=24, do_sample=False)
    assert torch.equal(again, plain)
    assert torch.equal(generate(model, ids, new(model, sink_len=256), prefill_chunk_size=70), plain)
    samples = []
    for each in (new(model, sink_len=256), DynamicCache(config=model.config)):
        torch.manual_seed(0)
        samples.append(generate(model, ids, each, do_sample=True, num_return_sequences=3))
    assert torch.equal(*samples)
    more = torch.cat((plain, tokens(2, 20, seed=2)), dim=1)
    expected = generate(model, more, DynamicCache(config=model.config))
    assert torch.equal(generate(model, more, cache), expected)
    assert cache.get_seq_length() == more.shape[1] + 23
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, ids[:1], cache), plain[:1])


@pytest.mark.parametrize("attend_pages", [True, False])
def test_beams(attend_pages, models):
    """Beams have the tokens that their scores are of, though pages are completed and shared on the way."""
    model, ids = models["llama"], tokens(2, 110)
    model.set_attn_implementation("kvarn" if attend_pages else "sdpa")
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 60, "length_penalty": 0.0}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    plain = generate(model, ids, DynamicCache(config=model.config), **options)
    assert torch.equal(generate(model, ids, new(model, sink_len=256), **options).sequences, plain.sequences)
    beams = generate(model, ids, new(model), **options)
    with torch.no_grad():
        chances = model(beams.sequences[:, :-1]).logits[:, 109:].log_softmax(-1)
    scores = chances.gather(2, beams.sequences[:, 110:, None]).sum((1, 2))
    # A step errs by about 0.003 with 8 bits, and a wrong row by about 1.
    torch.testing.assert_close(beams.sequences_scores, scores, atol=0.1, rtol=0)


def test_rows_move(llama):
    """Rows of different lengths that go on as others, twice, once or not at all, are what their own history makes of them."""
    count, generator = 5, torch.Generator().manual_seed(3)
    histories, mask = tokens(count, 120), torch.ones(count, 120, dtype=torch.long)
    for row in range(count):
        mask[row, : 17 * row] = 0
    cache = new(llama, "k4v2_g64", sink_len=10)
    feed(llama, histories, cache, [120], mask)
    for step in range(90):
        if step % 3 == 0:
            order = torch.randint(0, count, (count,), generator=generator)
            (cache.reorder_cache if step % 2 else cache.batch_select_indices)(order)
            histories, mask = histories[order], mask[order]
        histories = torch.cat((histories, tokens(count, 1, seed=100 + step)), dim=1)
        mask = torch.cat((mask, torch.ones(count, 1, dtype=torch.long)), dim=1)
        last = feed(llama, histories[:, -1:], cache, [1], mask)
    expected = feed(llama, histories, new(llama, "k4v2_g64", sink_len=10), singles(120, 90), mask)
    torch.testing.assert_close(last, expected[:, -1:], atol=NEAR, rtol=0)


def test_batch_changes(llama):
    """A batch becomes smaller and larger, and goes on with each row's own tokens."""
    ids = tokens(3, 150)
    cache = new(llama, "k4v2_g64", rollback=4)
    feed(llama, ids, cache, [150])
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    ids = torch.cat((ids[[2, 2, 0, 0]], tokens(4, 60, seed=5)), dim=1)
    got = feed(llama, ids[:, 150:], cache, [1] * 60)
    expected = feed(llama, ids, new(llama, "k4v2_g64", rollback=4), singles(150, 60))
    torch.testing.assert_close(got, expected[:, 150:], atol=NEAR, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", ["prompt lookup", "assistant"])
def test_drafts(name, kind, models):
    """Prompt lookup and an assistant model generate what they do with a plain cache; nothing is quantized here."""
    model = models[name]
    model.set_attn_implementation("kvarn")
    ids = tokens(1, 60).repeat(1, 3)
    until: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": 2}
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 7}
    if kind == "assistant":
        draft = models["qwen3"] if name == "gemma3" else models["llama"]
        draft.set_attn_implementation("kvarn")
        options = {"assistant_model": draft}
    if name == "gemma3" and not hasattr(DynamicCache, "activate_past_recording"):
        pytest.skip("this version of transformers takes no drafts back from layers with a window")
    assisted = generate(model, ids, new(model, sink_len=256, rollback=32), **until, **options)
    assert torch.equal(assisted, generate(model, ids, DynamicCache(config=model.config), **until, **options))


def test_rollback_is_named(llama):
    """Drafts without a rollback, and more than it has, are errors that name it."""
    ids = tokens(1, 60).repeat(1, 3)
    with pytest.raises(ValueError, match="rollback"):
        generate(llama, ids, new(llama), prompt_lookup_num_tokens=7, max_new_tokens=40, eos_token_id=2)
    cache = new(llama, rollback=5)
    feed(llama, ids, cache, [150])
    cache.crop(-3)
    feed(llama, ids, cache, [1])
    with pytest.raises(ValueError, match="rollback: expected at least 6 "):
        cache.crop(-4)
    cache.crop(-3)


def test_crop(llama):
    """After tokens were taken back, rows of different lengths go on as if they had never been there."""
    ids, mask = tokens(2, 190), torch.ones(2, 190, dtype=torch.long)
    mask[1, :30] = 0
    mask[0, 140:143] = 0
    kept = torch.cat((torch.arange(150), torch.arange(160, 190)))
    cache = new(llama, "k4v2_g64", rollback=20)
    feed(llama, ids[:, :150], cache, [139, *[1] * 11], mask[:, :150])
    feed(llama, ids[:, 150:160], cache, [10], mask[:, :160])
    cache.crop(-6)
    cache.crop(150)
    got = feed(llama, ids[:, 160:], cache, [1] * 30, mask[:, kept])
    expected = feed(llama, ids[:, kept], new(llama, "k4v2_g64", rollback=20), [139, *[1] * 41], mask[:, kept])
    torch.testing.assert_close(got, expected[:, 150:], atol=NEAR, rtol=0)
    # Taking back what a row has as padding takes none of its tokens.
    cache = new(llama, "k4v2_g64", rollback=20)
    feed(llama, ids[:, :150], cache, [150], mask[:, :150])
    cache.crop(torch.tensor(-4))
    cache.crop(-6)
    got = feed(llama, ids[:, 140:170], cache, [1] * 30, torch.cat((mask[:, :140], torch.ones_like(mask[:, :30])), dim=1))
    whole = torch.cat((mask[:, :140], torch.ones_like(mask[:, :30])), dim=1)
    expected = feed(llama, ids[:, :170], new(llama, "k4v2_g64", rollback=20), singles(140, 30), whole)
    torch.testing.assert_close(got, expected[:, 140:], atol=NEAR, rtol=0)


def compiled(model: Any, ids: torch.Tensor, cache: Any, fullgraph: bool = True, **options: Any) -> torch.Tensor:
    """Return what compiled decode steps generate."""
    config = transformers.CompileConfig(backend="aot_eager", fullgraph=fullgraph, mode=None)
    config._compile_all_devices = True
    return generate(model, ids, cache, generation_config=GenerationConfig(compile_config=config), **options)


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow("the compiler"))])
def test_compiled_decode(name, models):
    """Decode steps are one graph, with padding too and after a reset; chunks of a prompt are compiled as well."""
    model = models[name]
    model.set_attn_implementation("kvarn")
    ids, mask = tokens(2, 150), torch.ones(2, 150, dtype=torch.long)
    mask[1, :40] = 0
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    cache = new(model, max_len=200, rollback=3)
    assert torch.equal(compiled(model, ids, cache), generate(model, ids, new(model, rollback=3)))
    assert int(cache.get_seq_length()) == 173
    graphs = counters["stats"]["unique_graphs"]
    cache.reset()
    other = tokens(2, 130, seed=9)
    assert torch.equal(compiled(model, other, cache), generate(model, other, new(model, rollback=3)))
    if name == "llama":
        assert graphs == counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
    cache.reset()
    expected = generate(model, ids, new(model, rollback=3), attention_mask=mask)
    assert torch.equal(compiled(model, ids, cache, attention_mask=mask), expected)
    if name == "llama":
        torch._dynamo.reset()
        expected = generate(model, ids, new(model, sink_len=256), attention_mask=mask)
        cache = new(model, sink_len=256, max_len=200)
        options = {"attention_mask": mask, "prefill_chunk_size": 70, "fullgraph": False}
        for _ in range(2):  # memory is allocated in the first chunk of the first time
            assert torch.equal(compiled(model, ids, cache, **options), expected)
            cache.reset()


def test_max_len(llama):
    """A cache that is preallocated moves rows and takes tokens back in place, and says so when it is full."""
    ids = tokens(2, 100)
    cache = new(llama, "k4v2_g64", max_len=140, rollback=4)
    feed(llama, ids, cache, [100])
    layer = cache.paged_layers[0]
    memory = [x.data_ptr() for x in (layer.pages, layer.raw_pages, layer.rows.block_table, layer.rows.lens)]
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.crop(-3)
    got = feed(llama, ids[:, 60:100], cache, [1] * 40)
    assert memory == [x.data_ptr() for x in (layer.pages, layer.raw_pages, layer.rows.block_table, layer.rows.lens)]
    history = torch.cat((ids[[1, 1], :97], ids[:, 60:100]), dim=1)
    expected = feed(llama, history, new(llama, "k4v2_g64", rollback=4), singles(97, 40))
    torch.testing.assert_close(got, expected[:, 97:], atol=NEAR, rtol=0)
    with pytest.raises(ValueError, match="max_len"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(RuntimeError, match="max_len"):
        feed(llama, ids, cache, [4])


def test_bytes(llama):
    """Bytes are those of all tensors; with a long prompt they are fewer than 16 bits take."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval().to(torch.bfloat16)
    model.set_attn_implementation("kvarn")
    cache = KVarNCache(model.config, "k4v2_g64", sink_len=64)
    assert cache.nbytes == 0
    feed(model, tokens(1, 2000), cache, [2000])
    assert cache.nbytes_16bit == 2 * 2 * 2000 * 2 * 64
    assert cache.nbytes < 0.45 * cache.nbytes_16bit
    assert "2 of 2 layers in pages, attention reads pages" in repr(cache)


def test_shared_keys(llama):
    """A layer that attends to the keys and values of another one reads that layer's pages; it isn't the step's first reader."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 131, 64, generator=generator) for heads in (2, 1, 1))
    cache = new(llama, sink_len=256)
    first, second = (layer.self_attn for layer in llama.model.layers)
    for span in (slice(0, 90), slice(90, 130), slice(130, 131)):
        key, value = cache.update(k[:, :, span], v[:, :, span], 0)
        kvarn_attention(first, q[:, :, span] + 1, key, value)
        got = kvarn_attention(second, q[:, :, span], key, value)[0]
        seen = torch.ones(131, 131, dtype=torch.bool).tril()[span, : span.stop]
        tokens_seen = [x[:, :, : span.stop].expand(-1, 2, -1, -1) for x in (k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, span], *tokens_seen, attn_mask=seen)
        torch.testing.assert_close(got, expected.transpose(1, 2), atol=1e-4, rtol=0)
    key, value = cache.update(k[:, :, :1], v[:, :, :1], 0)
    with pytest.raises(RuntimeError, match="layer 1: expected attention to the 1 tokens"):
        kvarn_attention(second, q[:, :, :1], key, value)


def test_lost_handle(models):
    """Attention to new tokens alone never goes unnoticed: not in the same step, nor after it where there is one layer."""
    model, ids = models["llama"], tokens(1, 80)
    model.set_attn_implementation("kvarn")
    other = copy.deepcopy(model.config)
    model.set_attn_implementation("sdpa")
    cache = KVarNCache(other, LAYOUT, **SMALL)
    with pytest.raises(RuntimeError, match="attn_implementation: layer 0 "):
        feed(model, ids, cache, [80])
    single = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1})).eval()
    other.num_hidden_layers = 1
    if other.layer_types if hasattr(other, "layer_types") else None:
        other.layer_types = other.layer_types[:1]
    cache = KVarNCache(other, LAYOUT, **SMALL)
    feed(single, ids[:, :79], cache, [79])
    with pytest.raises(RuntimeError, match="attn_implementation: layer 0 "):
        feed(single, ids[:, 79:], cache, [1])
    cache.reset()
    single.set_attn_implementation("kvarn")
    feed(single, ids, cache, [79, 1])


def test_refusals(llama):
    """What can't work is an error that names the option."""
    ids = tokens(2, 20)
    with pytest.raises(ValueError, match=r"attention_mask: expected None or \[batch, positions\]"):
        llama(input_ids=ids, attention_mask=torch.zeros(2, 1, 20, 20), **{KEY: new(llama)})
    with pytest.raises(ValueError, match="training"):
        llama.train()(input_ids=ids, **{KEY: new(llama)})
    llama.eval()
    with pytest.raises(ValueError, match="attention mask: expected a causal one"):
        kvarn_mask(kv_length=3, kv_offset=-1, mask_function=lambda *_: True)
    cache = new(llama)
    feed(llama, ids, cache, [20])
    with pytest.raises(ValueError, match="batch: expected 2 rows"):
        feed(llama, ids[:1], cache, [1])
    k, cache_of_two = torch.zeros(2, 1, 3, 64), new(llama, attend_pages=False)
    for layer in (0, 1, 0, 0):
        cache_of_two.update(k, k, layer)
    with pytest.raises(RuntimeError, match="layer 1: expected one step"):
        cache_of_two.update(k, k, 1)
    with pytest.raises(NotImplementedError, match="expected this call of the cache"):
        cache.layers[0].crop(-1)
    with pytest.raises(NotImplementedError, match="offloading"):
        cache.layers[0].offload()
    for option in ({"sink_len": -1}, {"rollback": -1}, {"max_len": 0}, {"encoder": None}, {"attend_pages": None}):
        with pytest.raises(ValueError, match=next(iter(option))):
            new(llama, **option)


def test_supports(models):
    """A model that can't have such a cache is refused with the reason, before its first token."""
    assert all(KVarNCache.supports(model.config) is None for model in models.values())
    small = transformers.LlamaConfig(**SIZES | {"head_dim": 48})
    assert "head_dim" in KVarNCache.supports(small)
    with pytest.raises(ValueError, match="head_dim"):
        KVarNCache(small)
    windows = transformers.MistralConfig(**SIZES, sliding_window=32)
    assert "full attention" in KVarNCache.supports(windows)
    assert "encoder" in KVarNCache.supports(transformers.T5Config())
    assert "k4v9" in KVarNCache.supports(models["llama"].config, "k4v9_g64")


def test_attention_without_pages():
    """Soft caps, attention sinks and masks, a few queries at a time, are what the formula says."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 37, 16, generator=generator) for heads in (4, 2, 2))
    sinks = torch.randn(4, generator=generator)
    mask = torch.rand(2, 1, 37, 37, generator=generator) < 0.5
    mask[..., 0] = True
    scores = 3 * torch.tanh(torch.einsum("bhnd,bhmd->bhnm", q, k.repeat_interleave(2, 1)) * 0.3 / 3)
    for seen in (mask, None):
        weights = scores.masked_fill(~(torch.ones(37, 37, dtype=torch.bool).tril() if seen is None else seen), -torch.inf).exp()
        expected = weights @ v.repeat_interleave(2, 1) / (weights.sum(3, keepdim=True) + sinks.exp()[None, :, None, None])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kvarn_triton.integrations.transformers.attention.SCORES", 2000)
            got = attention_without_pages(q, k, v, seen, Scores(0.3, None, 3.0, sinks))
        torch.testing.assert_close(got, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_document(llama):
    """The lines that the document begins with run as they are."""
    text = (Path(__file__).parent.parent / "docs" / "transformers.md").read_text()
    program = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0].replace("cache=cache", f"{KEY}=cache")
    scope = {"model": llama, "inputs": {"input_ids": tokens(1, 20), "max_new_tokens": 4}}
    exec(program, scope)
    assert scope["cache"].nbytes_16bit > 0


def test_measurement(tmp_path):
    """The measurement of `perf/hf.py` runs with a tiny model."""
    if KEY == "past_key_values":
        pytest.skip("it passes cache=, which this version of transformers doesn't have")
    file = tmp_path / "hf.json"
    command = [
        sys.executable,
        str(Path(__file__).parent.parent / "perf" / "hf.py"),
        "--tiny",
        "--layers",
        "1",
        "--json",
        str(file),
    ]
    options = ["--point", "2x200", "--context", "150", "--cache", "max_len", "--cache", "dynamic"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    subprocess.run([*command, *options], check=True, env=environment, capture_output=True)
    rows = json.loads(file.read_text())["sweeps"]["transformers"]
    assert len(rows) == 4
    assert all(row.get("tokens_per_s", 1) > 0 and row.get("largest_batch", 1) > 0 for row in rows)


def test_import():
    """The package itself doesn't import transformers."""
    code = "import sys, kvarn_triton, kvarn_triton.integrations; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_devices():
    """Layers on two GPUs have tables of their own."""
    accelerate = pytest.importorskip("accelerate")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    ids = tokens(2, 150)
    model.set_attn_implementation("kvarn")
    expected = generate(model, ids, new(model))
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "model.rotary_emb": 0}
    model = accelerate.dispatch_model(model, places | {"lm_head": 1}, main_device=0)
    cache = new(model)
    assert (generate(model, ids.cuda(), cache).cpu() == expected).float().mean() > 0.9
    assert len(cache.shared.rows) == 2


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_captured_decode():
    """`generate` captures decode steps on a GPU, and replays them."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval().cuda()
    model.set_attn_implementation("kvarn")
    ids = tokens(2, 150).cuda()
    cache = new(model, max_len=260)
    for _ in range(2):
        got = generate(model, ids, cache, max_new_tokens=100)
        assert (got == generate(model, ids, new(model), max_new_tokens=100)).float().mean() > 0.9
        cache.reset()


@pytest.fixture(scope="module")
def gemma3_with_images() -> Any:
    """Return a tiny Gemma 3 whose images are four tokens that see each other."""
    torch.manual_seed(0)
    options = SIZES | {"query_pre_attn_scalar": 64, "num_hidden_layers": 3, "sliding_window": 48}
    layers = ["full_attention", "sliding_attention", "full_attention"]
    text = transformers.Gemma3TextConfig(**options, layer_types=layers)
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=2)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    register_attention()
    return model


def image_prompt(batch: int, length: int, padding: int) -> dict[str, torch.Tensor]:
    """Return inputs with two images in each row, the second row padded on the left."""
    ids = tokens(batch, length)
    mask = torch.ones_like(ids)
    mask[1:, :padding] = 0
    ids[mask == 0] = 0
    for first in (padding + 3, length - 20):
        ids[:, first : first + 4] = 2
    pixels = torch.randn(2 * batch, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    kinds = (ids == 2).int()
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "token_type_ids": kinds,
        "mm_token_type_ids": kinds,
        "attention_mask": mask,
    }


@pytest.mark.parametrize("padding", [0, 9])
def test_images_see_each_other(gemma3_with_images: Any, padding: int):
    """A prompt with images gives the logits of the same model without pages, and so do steps behind it."""
    inputs = image_prompt(2, 150, padding)
    answer = tokens(2, 6, seed=3)
    if not padding:
        del inputs["attention_mask"]
    known = inspect.signature(gemma3_with_images.forward).parameters
    inputs = {name: value for name, value in inputs.items() if name in known}
    logits = {}
    for attention in ("sdpa", "kvarn"):
        gemma3_with_images.set_attn_implementation(attention)
        config = gemma3_with_images.config
        cache = KVarNCache(config, LAYOUT, **SMALL) if attention == "kvarn" else DynamicCache(config=config.get_text_config())
        with torch.no_grad():
            steps = [gemma3_with_images(**inputs, **{KEY: cache}).logits]
            for i in range(answer.shape[1]):
                options: dict[str, Any] = {KEY: cache}
                if padding:
                    mask = torch.cat((inputs["attention_mask"], torch.ones_like(answer[:, : i + 1])), dim=1)
                    options |= {"attention_mask": mask, "position_ids": mask.cumsum(1)[:, -1:] - 1}
                steps.append(gemma3_with_images(input_ids=answer[:, i : i + 1], **options).logits)
        logits[attention] = torch.cat(steps, dim=1)
    error = (logits["kvarn"] - logits["sdpa"]).abs().amax(dim=2) / logits["sdpa"].std()
    error[1:, :padding] = 0
    assert error[:, :150].max() < 1e-4 and error.max() < 0.05  # a prompt is exact, steps behind it read 8 bits


def test_images_that_are_refused():
    """Masks that are no spans of a whole prompt are refused: images behind older tokens, too."""

    def mask(first: int, function: Any) -> torch.Tensor | None:
        old = "cache_position" in inspect.signature(transformers.masking_utils.sdpa_mask).parameters
        places = {"cache_position": torch.arange(first, first + 4)} if old else {"q_length": 4, "q_offset": first}
        return kvarn_mask(batch_size=1, kv_length=4, kv_offset=PAGES, mask_function=function, **places)

    everything = lambda b, h, q, k: k >= 0
    ends = mask(0, everything)
    assert ends is not None and ends.tolist() == [[[[4] * 4]]]
    for first, function in (
        (70, everything),
        (0, lambda b, h, q, k: (k <= q) & ((k != 1) | (q == 1))),
        (0, lambda b, h, q, k: k < q),
    ):
        with pytest.raises(ValueError, match="tokens of a whole prompt"):
            mask(first, function)
