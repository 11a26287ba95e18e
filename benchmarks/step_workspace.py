"""What the step benchmark runs on: a random miniature SDXL of 7.8M parameters, 16 random images, two config files."""

from __future__ import annotations

import json
from pathlib import Path

BATCH, EDGE, FACTOR, RANK = 4, 16, 8, 64
TEXT_WIDTH = 128


def write_workspace(folder: Path) -> Path:
    """Write model, images and configuration into `folder` and return it."""
    write_model(folder / "model")
    write_images(folder / "images")
    run = {
        "model_type": "lora",
        "model_family": "sdxl",
        "pretrained_model_name_or_path": str(folder / "model"),
        "distillation_method": "lcm",
        "resolution": EDGE * FACTOR,
        "aspect_bucket_alignment": FACTOR,
        "train_batch_size": BATCH,
        "lora_rank": RANK,
        "mixed_precision": "no",
        "gradient_checkpointing": False,
        "validation_step_interval": 0,
        "evaluation_num_samples": 0,
        "checkpoint_step_interval": 0,
    }
    data = [
        {"id": "images", "instance_data_dir": str(folder / "images"), "cache_dir_vae": str(folder / "vae")},
        {"id": "text", "dataset_type": "text_embeds", "default": True, "cache_dir": str(folder / "text")},
    ]
    (folder / "config.json").write_text(json.dumps(run, indent=2))
    (folder / "multidatabackend.json").write_text(json.dumps(data, indent=2))
    return folder


def write_images(folder: Path, *, count: int = 16, edge: int = EDGE * FACTOR) -> None:
    """Random images with captions."""
    import numpy
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = numpy.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (edge, edge, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"image number {number}")


def write_model(folder: Path) -> None:
    """SDXL's architecture with random weights, in diffusers layout."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=EDGE,
        block_out_channels=(64, 96, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(2, 3, 5),
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + TEXT_WIDTH,
        norm_num_groups=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        scaling_factor=0.13025,
    )
    pipeline = StableDiffusionXLPipeline(
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(_text_config()),
        tokenizer=_tokenizer(folder / "tokenizer"),
        tokenizer_2=_tokenizer(folder / "tokenizer_2"),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)


def _vocabulary() -> list[str]:
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    return [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]


def _text_config() -> object:
    from transformers import CLIPTextConfig

    end = len(_vocabulary()) - 1
    return CLIPTextConfig(
        vocab_size=end + 1,
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )


def _tokenizer(folder: Path) -> object:
    """A token per letter: no merges."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(_vocabulary())}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
    specials = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **specials}))
    return CLIPTokenizer.from_pretrained(folder)
