"""Random tiny FLUX.2 models: klein, told the prompt by Qwen3, and dev, by Mistral and with guidance as an input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tiny_llm import llm, write_llm_tokenizer
from support.tiny_parts import CHANNELS, Tiny, last, seeded
from support.tiny_sdxl import EDGE, vae_config

WIDTH = 16
"""Of the language model's states."""
LENGTH = 48
"""Tokens that are read of a prompt, its template included."""
TEMPLATE = (
    "<s>{% for message in messages %}[{{ message.role }}]{% for part in message.content %}{{ part.text }}"
    "{% endfor %}[/{{ message.role }}]{% endfor %}"
)
"""In the shape of Mistral's."""
SYSTEM = 300
"""More tokens than the system prompt of dev has."""


def flux2_vae() -> Any:
    """An autoencoder of one level, whose patches of 2 x 2 make it two pixels per latent, with a norm that is no norm
    of these latents.
    """
    import torch
    from diffusers import AutoencoderKLFlux2

    own = {"block_out_channels": (32,), "latent_channels": CHANNELS // 4, "norm_num_groups": 8}
    own |= {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    config = {key: value for key, value in vae_config().items() if key in ("layers_per_block", "sample_size")}
    vae = seeded(lambda: AutoencoderKLFlux2(**config, **own))
    steps = torch.arange(CHANNELS, dtype=torch.float32)
    vae.bn.running_mean.copy_(0.1 * steps - 0.3)
    vae.bn.running_var.copy_(0.5 + 0.2 * steps)
    return vae


def transformer(*, guidance: bool) -> Any:
    from diffusers import Flux2Transformer2DModel

    config: dict[str, Any] = {
        "in_channels": CHANNELS, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 3 * WIDTH, "axes_dims_rope": (4, 4, 4, 4),
        "timestep_guidance_channels": 64, "guidance_embeds": guidance,
    }  # fmt: skip
    return seeded(lambda: Flux2Transformer2DModel(**config))


def scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def write_tiny_klein(folder: Path, *, distilled: bool = False) -> Path:
    """A random tiny FLUX.2 klein, base or distilled."""
    from diffusers import Flux2KleinPipeline

    Flux2KleinPipeline(
        transformer=transformer(guidance=False),
        vae=flux2_vae(),
        text_encoder=llm("Qwen3ForCausalLM", WIDTH, num_hidden_layers=28),
        tokenizer=write_llm_tokenizer(folder / "tokenizer"),
        scheduler=scheduler(),
        is_distilled=distilled,
    ).save_pretrained(folder)
    return folder


def mistral() -> Any:
    """A language model that sees images, both halves of it tiny."""
    import transformers

    text = transformers.MistralConfig(
        vocab_size=300, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=31, num_attention_heads=2,
        num_key_value_heads=1, head_dim=WIDTH // 2, max_position_embeddings=1024, use_cache=False,
    )  # fmt: skip
    eyes = transformers.PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, head_dim=16, image_size=28,
        patch_size=14,
    )  # fmt: skip
    config = transformers.Mistral3Config(text_config=text, vision_config=eyes)
    return seeded(lambda: transformers.Mistral3ForConditionalGeneration(config))


def write_tiny_dev(folder: Path) -> Path:
    """A random tiny FLUX.2 dev."""
    from diffusers import Flux2Pipeline

    Flux2Pipeline(
        transformer=transformer(guidance=True),
        vae=flux2_vae(),
        text_encoder=mistral(),
        tokenizer=write_llm_tokenizer(folder / "tokenizer", chat_template=TEMPLATE, padding_side="left"),
        scheduler=scheduler(),
    ).save_pretrained(folder)
    return folder


def encoder(length: int) -> Any:
    def encoded(pipeline: Any, prompts: list[str]) -> dict[str, Any]:
        """The pipeline's states."""
        return {"prompt_embeds": pipeline.encode_prompt(prompts, device="cpu", max_sequence_length=length)[0]}

    return encoded


def unpacked(tokens: Any) -> Any:
    """Patches (B, C, h, w) of the network's tokens (B, h w, C)."""
    edge = EDGE // 2
    return tokens.transpose(1, 2).unflatten(2, (edge, edge))


def as_klein_has_them(tokens: Any) -> Any:
    """Latents (B, C / 4, 2 h, 2 w), in which the pipeline of klein returns them."""
    from distill.model_families.calls.autoencoders import unpatched

    return unpatched(unpacked(tokens))


def autoencoded(vae: Any, pixels: Any) -> tuple[Any, Any, Any]:
    """What `tiny_parts.plain_latents` returns, in patches that the autoencoder's running statistics norm."""
    import torch
    from diffusers import Flux2Pipeline

    posterior = vae.encode(pixels).latent_dist
    own = posterior.mode(), posterior.sample(generator=torch.Generator().manual_seed(5))
    mean, variance = (each.view(1, -1, 1, 1) for each in (vae.bn.running_mean, vae.bn.running_var))
    std = (variance + vae.config.batch_norm_eps).sqrt()
    mode, sample = ((Flux2Pipeline._patchify_latents(latents) - mean) / std for latents in own)
    return mode, sample, vae.decode(own[0]).sample


def calls(length: int, *, guided: float, unguided: float) -> dict[str, Any]:
    short = {"max_sequence_length": length}
    return {
        "settings": short, "guided": {"guidance_scale": guided, **short},
        "unguided": {"guidance_scale": unguided, **short}, "encoded": encoder(length),
        "autoencoded": autoencoded, "states": last,
    }  # fmt: skip


KLEIN = Tiny(
    "flux2",
    write_tiny_klein,
    read=lambda args, kwargs: as_klein_has_them(kwargs["hidden_states"]),
    written=as_klein_has_them,
    halves="in turn",
    **calls(LENGTH, guided=4.0, unguided=1.0),
)
DEV = Tiny(
    "flux2-dev",
    write_tiny_dev,
    embedded=True,
    **calls(SYSTEM, guided=6.0, unguided=4.0),
)
