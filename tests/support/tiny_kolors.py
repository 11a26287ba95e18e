"""A random tiny Kolors: SDXL's tiny UNet behind a projection, a language model with a tokenizer of its own."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from support import tiny_sdxl
from support.tiny_parts import SIZES, Tiny, seeded

WIDTH = 40
"""Of the language model's states."""
NARROW = 48
"""Of what the UNet's attention sees of them."""


def write_glm_tokenizer(folder: Path) -> Any:
    """A token per letter, and ChatGLM's marks; it pads on the left."""
    from diffusers.pipelines.kolors import ChatGLMTokenizer
    from sentencepiece import SentencePieceTrainer

    letters, model = "".join(chr(code) for code in range(ord("!"), ord("~") + 1)), io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([letters, " ".join(letters)]), model_writer=model, model_type="char", vocab_size=100,
        character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return ChatGLMTokenizer(str(folder / "tokenizer.model"))


def chatglm() -> Any:
    import torch
    from diffusers.pipelines.kolors import ChatGLMModel

    config = ChatGLMModel.config_class(
        num_layers=3, padded_vocab_size=128, hidden_size=WIDTH, ffn_hidden_size=64, kv_channels=20,
        num_attention_heads=2, multi_query_attention=True, multi_query_group_num=1, seq_length=512, add_qkv_bias=True,
        original_rope=True,
    )  # fmt: skip
    encoder = seeded(lambda: ChatGLMModel(config, empty_init=False))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for weight in encoder.parameters():
            torch.nn.init.normal_(weight, mean=float(weight.ndim < 2), std=0.2)
    return encoder


def write_tiny_kolors(folder: Path) -> Path:
    """A random tiny Kolors, of 1100 timesteps."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, KolorsPipeline, UNet2DConditionModel

    config = tiny_sdxl.unet_config()
    config |= {
        "cross_attention_dim": NARROW, "encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "text_proj",
        "projection_class_embeddings_input_dim": WIDTH + 6 * config["addition_time_embed_dim"],
    }  # fmt: skip
    KolorsPipeline(
        unet=seeded(lambda: UNet2DConditionModel(**config)),
        vae=seeded(lambda: AutoencoderKL(**tiny_sdxl.vae_config())),
        text_encoder=chatglm(),
        tokenizer=write_glm_tokenizer(folder / "tokenizer"),
        scheduler=EulerDiscreteScheduler(
            num_train_timesteps=1100, beta_start=0.00085, beta_end=0.014, beta_schedule="scaled_linear",
            timestep_spacing="leading", steps_offset=1,
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def encoded(pipeline: Any, prompts: list[str]) -> dict[str, Any]:
    """The pipeline's states and its pooled embedding."""
    states, _, pooled, _ = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}


KOLORS = Tiny("kolors", write_tiny_kolors, guided={"guidance_scale": 5.0}, encoded=encoded, sized=SIZES)
