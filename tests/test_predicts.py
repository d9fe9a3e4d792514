"""The sweep that compares how models trained here and a pretrained one rank encoders, on an untrained model."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from helpers import randomized

sys.path.insert(0, str(Path(__file__).parent.parent / "perf"))
import accuracy
import lm
import lm_tasks
import predict_sweeps

CONFIG = lm.LMConfig(
    num_layers=2, model_dim=64, mlp_dim=96, num_q_heads=4, num_kv_heads=2, head_dim=64, seq_len=320, qk_norm=True, tasks=True,
    key_bias=6.0,
)  # fmt: skip
SIZE = dataclasses.replace(predict_sweeps.SMALL, problems=3, text_len=250)
OPTIONS = {"page_size": 64, "sink_len": 64, "dtype": torch.float32, "device": "cpu"}


pytestmark = pytest.mark.usefixtures("without_kernels")


@pytest.fixture(scope="module")
def model() -> lm.TinyLM:
    """An untrained model whose logits are far from flat."""
    torch.manual_seed(0)
    return randomized(lm.TinyLM(CONFIG))


def test_nats_of_lines_are_those_of_answers(model):
    """Without a codec they are those of feeding prompts and answers; the keys of the biased model have channel means."""
    asked = predict_sweeps.ask_lines(model, SIZE, 0, OPTIONS)
    nats, right = predict_sweeps.found(model, asked, None)
    problems = lm_tasks.retrieval(SIZE.problems, SIZE.lines, SIZE.queries, torch.Generator().manual_seed(3000))
    options = {key: value for key, value in OPTIONS.items() if key != "device"}
    said, expected = accuracy.answer_tokens(model, None, *problems, **options)
    digits = [x[:, :-1].unflatten(1, (-1, 7))[..., 1:] for x in (expected, said)]
    assert torch.allclose(nats, digits[0].double().mean((1, 2)), rtol=1e-4)
    assert torch.equal(right, digits[1].all(-1))
    assert predict_sweeps.channel_means(asked.cache) > 3


def test_nats_of_passages_are_those_of_a_whole_row(model):
    """Without a codec a question costs what it costs at the end of its context; its bytes stand in the quantized part."""
    asked = predict_sweeps.ask_passages(model, SIZE, 0, OPTIONS)
    nats, right = predict_sweeps.found(model, asked, None)
    contexts, _ = predict_sweeps.lm_text.heldout_prompts([250] * SIZE.texts, 1, seed=4000)
    for i, question in enumerate(asked.questions.flatten(0, 1)):
        context = contexts[i % SIZE.texts]
        row = torch.cat((context, question))
        logits = model(row[None])[0, len(context) :].log_softmax(-1)
        lost = -logits[:-1].gather(1, question[1:, None])[23:, 0]
        assert nats[i] == pytest.approx(lost.mean().item(), rel=1e-4)
        assert right[i].item() == (logits[:-1].argmax(-1) == question[1:])[23:].all()
        places = [p for p in range(250 - 56) if torch.equal(context[p : p + 56], question)]
        assert any(64 <= p < 250 - 64 - 56 for p in places)


def test_pages_are_quantized_behind_the_sink(model):
    """A codec sees whole pages of keys behind the sink, of every layer; the unfinished page stays as it is."""
    asked = predict_sweeps.ask_lines(model, SIZE, 0, OPTIONS)
    seen = []

    def read_back(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(k.clone())
        return torch.zeros_like(k), v

    exact, _ = predict_sweeps.found(model, asked, None)
    lost, _ = predict_sweeps.found(model, asked, accuracy.Codec("zeros", 2.0, 4.0, read_back))
    pages = (asked.cache.length - 64) // 64
    expected = [asked.cache.k[i, :, :, 64 * p : 64 * p + 64].flatten(0, 1) for p in range(1, pages + 1) for i in range(2)]
    assert len(seen) == len(expected) and all(map(torch.equal, seen, expected))
    assert (lost != exact).all()


def test_each_encoder_is_in_the_results():
    """The pretrained model has a row for each, the published encoder loses nothing against itself."""
    rows = predict_sweeps.real_rows()
    assert rows.keys() == predict_sweeps.ENCODERS.keys()
    assert (rows["published"]["code_more"], rows["published"]["kl_relative"]) == (0, 1)


def test_rank_correlation():
    """It follows order alone."""
    assert predict_sweeps.rank_correlation([1, 2, 3, 9], [0.1, 0.2, 5, 6]) == pytest.approx(1)
    assert predict_sweeps.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert predict_sweeps.rank_correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)


def test_rows_and_table(model, monkeypatch):
    """Rows have what the table shows; a model that ranks as the pretrained one gets 1."""
    names = ("published", "default", "nobal", "s0.8 r1 re1")
    monkeypatch.setattr(predict_sweeps, "ENCODERS", {name: predict_sweeps.ENCODERS[name] for name in names})
    run = {"model": "lab", "seed": 0, "device": "cpu"}
    rows = list(predict_sweeps.measured(model, run, predict_sweeps.real_rows(), quick=True))
    assert [row["method"] for row in rows] == ["16 bits", *names]
    assert (rows[1]["lines_more"], rows[1]["passages_more"], rows[1]["kl_relative"]) == (0, 0, 1)
    (table,) = predict_sweeps.tabulated(rows)
    assert table.keys() == predict_sweeps.HEADERS.keys()
    for row in rows[1:]:
        row["lines_more"] = row["real"]["code_more"]
    (table,) = predict_sweeps.tabulated(rows)
    assert table["lines_codes"] == pytest.approx(1) and table["lines_signs"] == "2 of 2"
