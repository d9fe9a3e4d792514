"""The cache for Hugging Face transformers: image tokens of a prompt, which see each other."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers_models import KEY, LAYOUT, SIZES, SMALL, tokens, transformers

from kvarn_triton.integrations.transformers import KVarNCache, register_attention
from kvarn_triton.integrations.transformers.attention import kvarn_mask
from kvarn_triton.integrations.transformers.shared import PAGES

pytestmark = pytest.mark.usefixtures("without_kernels")


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
        cache = (
            KVarNCache(config, LAYOUT, **SMALL)
            if attention == "kvarn"
            else transformers.DynamicCache(config=config.get_text_config())
        )
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
