"""The cache for Hugging Face transformers: compiled steps, what it bounds, refuses and is measured by, and devices."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ON_GPU
from transformers_models import (
    KEY,
    LAYOUT,
    NEAR,
    SIZES,
    SMALL,
    feed,
    generate,
    new,
    singles,
    tokens,
    transformers,
)

from kvarn_triton.integrations.transformers import KVarNCache
from kvarn_triton.integrations.transformers.attention import attention_without_pages, kvarn_attention, kvarn_mask
from kvarn_triton.integrations.transformers.layer import Scores

pytestmark = pytest.mark.usefixtures("without_kernels")


def compiled(model: Any, ids: torch.Tensor, cache: Any, fullgraph: bool = True, **options: Any) -> torch.Tensor:
    """Return what compiled decode steps generate."""
    config = transformers.CompileConfig(backend="aot_eager", fullgraph=fullgraph, mode=None)
    config._compile_all_devices = True
    return generate(model, ids, cache, generation_config=transformers.GenerationConfig(compile_config=config), **options)


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
