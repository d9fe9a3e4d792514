"""The cache for Hugging Face transformers: what models compute and generate with it.

An oracle is the same model with a plain cache, or with a cache of the same options that was filled in another way.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers_models import FAMILIES, NEAR, feed, generate, new, singles, tokens, transformers

pytestmark = pytest.mark.usefixtures("without_kernels")


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
    exact = feed(model, ids, transformers.DynamicCache(config=model.config), chunks)
    model.set_attn_implementation("kvarn" if attention == "kvarn" else own)
    torch.testing.assert_close(feed(model, ids, new(model, sink_len=256), chunks), exact, atol=NEAR, rtol=0)
    cache = new(model, sink_len=20)
    assert cache.attends_pages == (attention == "kvarn")
    assert (feed(model, ids, cache, chunks) - exact).abs().mean() < 0.02 * exact.abs().mean()
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    if attention == "kvarn":  # a plain cache under this attention, with padding
        got = feed(model, ids, transformers.DynamicCache(config=model.config), chunks, mask)
        model.set_attn_implementation(own)
        expected = feed(model, ids, transformers.DynamicCache(config=model.config), chunks, mask)
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
    plain = generate(model, ids, transformers.DynamicCache(config=model.config))
    cache = new(model, sink_len=256)
    assert torch.equal(generate(model, ids, cache), plain)
    assert cache.get_seq_length() == 173
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        again = model.generate(ids, past_key_values=new(model, sink_len=256), max_new_tokens=24, do_sample=False)
    assert torch.equal(again, plain)
    assert torch.equal(generate(model, ids, new(model, sink_len=256), prefill_chunk_size=70), plain)
    samples = []
    for each in (new(model, sink_len=256), transformers.DynamicCache(config=model.config)):
        torch.manual_seed(0)
        samples.append(generate(model, ids, each, do_sample=True, num_return_sequences=3))
    assert torch.equal(*samples)
    more = torch.cat((plain, tokens(2, 20, seed=2)), dim=1)
    expected = generate(model, more, transformers.DynamicCache(config=model.config))
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
    plain = generate(model, ids, transformers.DynamicCache(config=model.config), **options)
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
    if name == "gemma3" and not hasattr(transformers.DynamicCache, "activate_past_recording"):
        pytest.skip("this version of transformers takes no drafts back from layers with a window")
    assisted = generate(model, ids, new(model, sink_len=256, rollback=32), **until, **options)
    assert torch.equal(assisted, generate(model, ids, transformers.DynamicCache(config=model.config), **until, **options))


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
