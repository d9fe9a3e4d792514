"""The accuracy laboratory: problems, codecs, and the cache that quantizes page by page, against slow loops."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from helpers import randomized

from kvarn_triton import PUBLISHED, Encoder, PageLayout
from kvarn_triton.testing import relative_error

sys.path.insert(0, str(Path(__file__).parent.parent / "perf"))
import accuracy
import accuracy_sweeps
import kv_codecs
import lm
import lm_tasks
import variants

CONFIG = lm.LMConfig(num_layers=2, model_dim=64, mlp_dim=96, num_q_heads=4, num_kv_heads=2, head_dim=64, seq_len=96, tasks=True)
PAGES = {"page_size": 16, "sink_len": 8, "dtype": torch.float64}


pytestmark = pytest.mark.usefixtures("without_kernels")


@pytest.fixture(scope="module")
def model() -> lm.TinyLM:
    """An untrained model whose logits are far from flat."""
    torch.manual_seed(0)
    return randomized(lm.TinyLM(dataclasses.replace(CONFIG, qk_norm=True)).double())


def draw_tokens(batch: int, n: int) -> torch.Tensor:
    """Return random tokens [batch, n]."""
    return torch.randint(CONFIG.vocab_size, (batch, n), generator=torch.Generator().manual_seed(1))


def test_chain_is_what_a_loop_says():
    """States are those of a slow walk; the prompt has every line once, and the number to begin with."""
    prompts, answers = lm_tasks.chain(3, 40, torch.Generator().manual_seed(0))
    for prompt, answer in zip(prompts.tolist(), answers.tolist(), strict=True):
        assert (prompt[0], prompt[-2], answer[-1]) == (lm_tasks.START, lm_tasks.ANSWER, lm_tasks.END)
        lines = {prompt[i]: tuple(prompt[i + 1 : i + 3]) for i in range(1, len(prompt) - 2, 3)}
        states = dict.fromkeys(range(ord("a"), ord("a") + lm_tasks.NUM_REGISTERS), 0)
        expected = []
        for label in range(256 + 39, 255, -1):
            register, digit = lines[label]
            old, states[register] = states[register], (states[register] + digit - ord("0")) % 10
            expected += [label, register, digit, old + ord("0"), states[register] + ord("0")]
        assert [prompt[-1], *answer[:-1]] == expected


def test_lines_are_found():
    """Every answered line is one of the prompt, whose keys differ."""
    prompts, answers = lm_tasks.retrieval(3, 30, 9, torch.Generator().manual_seed(0))
    for prompt, answer in zip(prompts, answers, strict=True):
        lines = [tuple(line) for line in prompt[1:-1].view(-1, 7).tolist()]
        assert len({line[0] for line in lines}) == len(lines) == 30
        assert all(tuple(line) in lines for line in answer[:-1].view(-1, 7).tolist())


def test_answers_are_learnt():
    """Of rows with problems nothing but answers is learnt, of lines only the digits; the other rows stay text."""
    tokens, targets = torch.zeros(20, 200, dtype=torch.int64), torch.zeros(20, 200, dtype=torch.int64)
    rows = lm_tasks.write_problems(tokens, targets, torch.Generator().manual_seed(0))
    assert rows == {"chain": slice(0, 8), "retrieval": slice(8, 13), "text": slice(13, 20)}
    assert (tokens[:13, 0] == lm_tasks.START).all() and (tokens[13:] == 0).all() and (targets[13:] == 0).all()
    for row in range(13):
        first = tokens[row].tolist().index(lm_tasks.ANSWER) + (row < 8)
        end = tokens[row].tolist().index(lm_tasks.END)
        assert (targets[row, :first] == lm_tasks.IGNORED).all() and (targets[row, end:] == lm_tasks.IGNORED).all()
        learnt = targets[row, first:end]
        known = learnt != lm_tasks.IGNORED
        assert torch.equal(learnt[known], tokens[row, first + 1 : end + 1][known]) and learnt[-1] == lm_tasks.END
        assert known.all() if row < 8 else 0.8 < known.float().mean() < 0.9


def test_best_levels():
    """The levels for normal numbers are those of the literature (Max 1960)."""
    torch.testing.assert_close(kv_codecs.lloyd_max_levels(2), torch.tensor([-1.510, -0.4528, 0.4528, 1.510]), atol=1e-3, rtol=0)
    torch.testing.assert_close(kv_codecs.lloyd_max_levels(1), torch.tensor([-0.7979, 0.7979]), atol=1e-3, rtol=0)


def test_fp8():
    """Numbers of e4m3 stay, numbers between them go to the nearest, and what is too large becomes the largest."""
    x = torch.tensor([[[1.0, 1.125, 1.06, -440.0, 1e4, 0.0, 2.0**-9, -3.3]]])
    expected = torch.tensor([[[1.0, 1.125, 1.0, -448.0, 448.0, 0.0, 2.0**-9, -3.25]]])
    assert all(torch.equal(read, expected) for read in kv_codecs.fp8().read_back(x, x))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_codec_gains_from_bits(head_dim):
    """More bits lessen the error of every method, and bits count codes and scales."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 128, head_dim), torch.randn(2, 128, head_dim)
    few, many = (accuracy_sweeps.methods(bits, 128, head_dim) for bits in ("k2v2", "k4v4"))
    for low, high in zip(few, many, strict=True):
        assert low.name == high.name and high.bits - low.bits == pytest.approx(2.0)
        assert 2.1 <= low.bits <= 3.0
        for i, x in enumerate((k, v)):
            errors = [relative_error(codec.read_back(k, v)[i], x) for codec in (low, high)]
            assert 0.05 < errors[1] < 0.4 * errors[0]


@pytest.mark.parametrize("bits", ["k2v2", "k4v2"])
def test_variants_and_package_agree(bits):
    """`Variant()` in log space is the published encoder of the package, and the default has its counterpart."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 64, 64) * torch.randn(2, 64, 1).exp() * 3, torch.randn(2, 64, 64) * torch.randn(64).exp() * 3
    layout = PageLayout.from_name(f"{bits}_g64", head_dim=64)
    both = {"iterations": 2, "divide": "roots", "tokens_first": True}
    fitted = variants.Variant(**both, shrink=0.8, rounds=2, rescale=1.0)
    new = [fitted if layout.k_bits == 2 else variants.Variant(**both, norm="even projection"), fitted]
    for encoder, pair in ((PUBLISHED, (variants.Variant(), variants.Variant())), (Encoder(), new)):
        plain = variants.codec(layout, *pair, "plain").read_back(k, v)
        for a, b in zip(plain, kv_codecs.kvarn(layout, encoder, "kernels").read_back(k, v), strict=True):
            assert relative_error(a, b) < 0.02  # a code here and there


def test_a_page_at_a_time_is_one_pass(model):
    """Without a codec the cache gives the logits of one causal pass, fed in pages or token by token."""
    tokens = draw_tokens(2, 75)
    expected = model(tokens).float()
    cache = accuracy.CodecCache(CONFIG, None, batch=2, capacity=75, **PAGES)
    parts = list(accuracy.feed(model, cache, tokens))
    assert [part.shape[1] for part in parts] == [8, 16, 16, 16, 16, 3]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-5)
    cache = accuracy.CodecCache(CONFIG, None, batch=2, capacity=75, **PAGES)
    single = [next(accuracy.feed(model, cache, tokens[:, i : i + 1])) for i in range(75)]
    torch.testing.assert_close(torch.cat(single, dim=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep_pages", [0, 1])
def test_pages_are_quantized_once_and_in_time(model, keep_pages):
    """A page changes when it is complete and stays; the sink, kept pages and the unfinished one never change."""
    halved = kv_codecs.Codec("half", 1.0, 1.0, lambda k, v: (k / 2, v / 2))
    tokens = draw_tokens(2, 75)
    exact = accuracy.exact_run(model, tokens, **PAGES)
    cache = accuracy.CodecCache(CONFIG, halved, batch=2, capacity=75, keep_pages=keep_pages, **PAGES)
    for _ in accuracy.feed(model, cache, tokens):
        pass
    assert cache.num_quantized == 4 - keep_pages
    body = slice(8, 8 + 16 * cache.num_quantized)
    expected = exact.cache.k[0].clone()  # keys of the first layer depend on no other token
    expected[:, :, body] /= 2
    torch.testing.assert_close(cache.k[0], expected)


def test_measures_of_known_errors(model):
    """A codec that halves keys has half their length; one that changes nothing has no error and no divergence."""
    text = accuracy.exact_run(model, draw_tokens(2, 72), **PAGES)
    same = kv_codecs.Codec("same", 16.0, 16.0, lambda k, v: (k, v))
    halved = kv_codecs.Codec("half", 16.0, 16.0, lambda k, v: (k / 2, v))
    errors = accuracy.static_errors(halved, text)
    assert errors["k_error"] == pytest.approx(0.5, rel=1e-5) and errors["v_error"] == 0
    assert errors["length_share"] == pytest.approx([1.0] * 4) and errors["length_error"] == pytest.approx(0.5)
    assert 0 < errors["attention_error"] < 1
    assert accuracy.static_errors(same, text)["attention_error"] == 0
    assert accuracy.accumulated_errors(model, same, text)["kl"] == pytest.approx(0, abs=1e-6)
    changed = accuracy.accumulated_errors(model, halved, text)
    assert changed["kl_by_page"][:2] == pytest.approx([0, 0], abs=1e-6) and changed["kl_by_page"][-1] > 1e-3


def test_exact_matches_are_those_of_generation(model):
    """What `exact_matches` calls right is what greedy generation says, up to its first error."""
    prompts = draw_tokens(3, 20)
    cache = accuracy.CodecCache(CONFIG, None, batch=3, capacity=60, **PAGES)
    said = accuracy.generate(model, cache, prompts, 30)
    assert accuracy.exact_matches(model, None, prompts, said, batch=2, **PAGES).all()
    said[1, 12] = (said[1, 12] + 1) % CONFIG.vocab_size
    right = accuracy.exact_matches(model, None, prompts, said, batch=2, **PAGES)
    assert right[0].all() and right[2].all() and right[1, :12].all() and not right[1, 12]
    fields = accuracy_sweeps.answer_fields("chain", right)
    assert fields["chain_exact"] == pytest.approx(2 / 3) and fields["chain_right_tokens"] == pytest.approx((30 + 12 + 30) / 3)


def test_answers_end_where_generation_says_so(model):
    """Lengths count tokens up to and with the first end; an answer without one has the longest."""
    prompts = draw_tokens(3, 20)
    cache = accuracy.CodecCache(CONFIG, None, batch=3, capacity=60, **PAGES)
    said = accuracy.generate(model, cache, prompts, 30).tolist()
    end = said[1][7]
    expected = [row.index(end) + 1 if end in row else 30 for row in said]
    assert accuracy.answer_lengths(model, None, prompts, end, 30, **PAGES).tolist() == expected and expected[1] <= 8
