"""A random tiny PixArt-Sigma: a learned variance beside eps, T5 with a mask, positions that no file has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support import tiny_sdxl
from support.tiny_parts import T5_WIDTH, Tiny, seeded, t5_parts
from support.tiny_sdxl import TOKENS


def write_tiny_pixart(folder: Path, *, alpha: bool = False, **noise: Any) -> Path:
    """A random tiny PixArt-Sigma; `alpha`: with sizes among its inputs, as PixArt-alpha."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    config: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 3, "cross_attention_dim": 48,
        "sample_size": 32, "caption_channels": T5_WIDTH, "interpolation_scale": 2, "use_additional_conditions": alpha,
    }  # fmt: skip
    tokenizer, text_encoder = t5_parts(folder / "tokenizer", T5_WIDTH)
    PixArtSigmaPipeline(
        transformer=seeded(lambda: PixArtTransformer2DModel(**config)),
        vae=seeded(lambda: AutoencoderKL(**tiny_sdxl.vae_config())),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, **noise),
    ).save_pretrained(folder)
    return folder


def encoded(pipeline: Any, prompts: list[str]) -> dict[str, Any]:
    """The pipeline's states, those of the padding zero, and their mask."""
    states, mask, *_ = pipeline.encode_prompt(prompts, False, device="cpu", max_sequence_length=TOKENS)
    return {"prompt_embeds": states * mask[..., None], "prompt_attention_mask": mask.bool()}


PLAIN = {"max_sequence_length": TOKENS, "clean_caption": False, "use_resolution_binning": False}
PIXART = Tiny(
    "pixart-sigma",
    write_tiny_pixart,
    settings={"max_sequence_length": TOKENS},
    guided={"guidance_scale": 4.5, **PLAIN},
    unguided={"guidance_scale": 1.0, **PLAIN},
    written=lambda output: output.chunk(2, dim=1)[0],
    encoded=encoded,
)
