"""Random tiny models of every family in diffusers layout, and what tests must know of their pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from support import tiny_sdxl
from support.tiny_sdxl import EDGE, SCALE_FACTOR, TOKENS, WIDTHS, text_config, write_tokenizer


@dataclass(frozen=True)
class Tiny:
    """One model of one family.

    Attributes:
        family: Name of the family.
        write: Writes the model into a folder.
        settings: Of the family's configuration.
        guided: Arguments of the plain pipeline's call that guide it.
        unguided: Arguments that do not.
        scale_key: Which of them is the guidance scale.
        embedded: Whether the network takes the scale as an input.
        time_unit: What the network's own time is a fraction of.
        halves: How a guided call is made: both halves in one batch, or one call after the other.
    """

    family: str
    write: Callable[[Path], Path]
    settings: dict[str, Any] = field(default_factory=dict)
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 4.0})
    unguided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    scale_key: str = "guidance_scale"
    embedded: bool = False
    time_unit: float = 1.0
    halves: Literal["batched", "in turn"] = "batched"

    def scale(self, arguments: dict[str, Any]) -> float:
        """The guidance scale of a plain call with these arguments."""
        return arguments[self.scale_key]

    def told(self, arguments: dict[str, Any]) -> float | None:
        """The paper's w that the network is told in such a call, if it is."""
        return self.scale(arguments) - 1 if self.embedded else None

    def parts(self, number: int, cond: Any, uncond: Any, *, guided: bool) -> list[Any]:
        """What the rows of the `number`-th call of the network in the pipeline's loop are conditioned on, in halves."""
        if not guided or self.embedded:
            return [cond]
        if self.halves == "batched":
            return [uncond, cond]
        return [uncond if number % 2 else cond]

    def make(self, folder: Path, config: dict[str, Any] | None = None, **settings: Any) -> Any:
        """The family on the model in `folder`."""
        from distill.core.plugin_api.family import ModelSettings
        from distill.core.registry.registry import Registry

        kind = Registry.load(installed=False).get("family", self.family)
        own = kind.Config(**{**self.settings, **(config or {})})
        return kind(own, ModelSettings(source=str(folder), resolution=(EDGE, EDGE), **settings))


def _seeded(build: Callable[[], Any], *, seed: int = 0) -> Any:
    """What `build` makes from a seed, the global generator left as it was; all of it differs from its start.

    Networks of these families begin with layers of zeros, which would hide what comes after them.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build()
        with torch.no_grad():
            for parameter in module.parameters():
                if not parameter.any() or parameter.ndim < 2:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
    return module


def _text_encoder(kind: str, width: int, activation: str) -> Any:
    import torch
    import transformers

    encoder = _seeded(lambda: getattr(transformers, kind)(text_config(width, activation)), seed=width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=0.3)
    return encoder


def write_tiny_sd(folder: Path, *, linear: bool, prediction_type: str = "epsilon", zero_snr: bool = False) -> Path:
    """A random tiny Stable Diffusion of the first generation, or of the second (`linear` projections)."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    config = tiny_sdxl.unet_config()
    for key in ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        del config[key]
    config |= {"cross_attention_dim": WIDTHS[0], "use_linear_projection": linear}
    StableDiffusionPipeline(
        unet=_seeded(lambda: UNet2DConditionModel(**config)),
        vae=_seeded(lambda: AutoencoderKL(**{**tiny_sdxl.vae_config(), "scaling_factor": 0.18215})),
        text_encoder=_text_encoder("CLIPTextModel", WIDTHS[0], "gelu" if linear else "quick_gelu"),
        tokenizer=write_tokenizer(folder / "tokenizer", pad="!" if linear else "<|endoftext|>"),
        scheduler=tiny_sdxl.scheduler(prediction_type, zero_snr),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


CHANNELS = 8
"""Of the latents of models on a flow."""
T5_WIDTH = sum(WIDTHS) + 16
"""More than both CLIP encoders together, so that their states are padded."""


def _flow_vae() -> Any:
    from diffusers import AutoencoderKL

    own = {"latent_channels": CHANNELS, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    config = {**tiny_sdxl.vae_config(), **own, "use_quant_conv": False, "use_post_quant_conv": False}
    return _seeded(lambda: AutoencoderKL(**config))


def _t5(folder: Path, width: int) -> tuple[Any, Any]:
    """(tokenizer, encoder): a token per letter, two layers."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((each, -3.0) for each in letters)]
    T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return T5TokenizerFast.from_pretrained(folder), _seeded(lambda: T5EncoderModel(config))


def write_tiny_sd3(folder: Path, *, t5: bool = True, newer: bool = False) -> Path:
    """A random tiny Stable Diffusion 3, or 3.5 (`newer`: normed queries, dual attention), with or without T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    config: dict[str, Any] = {
        "sample_size": EDGE // SCALE_FACTOR,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": T5_WIDTH,
        "caption_projection_dim": 32,
        "pooled_projection_dim": sum(WIDTHS),
        "pos_embed_max_size": EDGE // SCALE_FACTOR,
    }
    config |= {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)} if newer else {}
    tokenizer_3, text_encoder_3 = _t5(folder / "tokenizer_3", T5_WIDTH) if t5 else (None, None)
    StableDiffusion3Pipeline(
        transformer=_seeded(lambda: SD3Transformer2DModel(**config)),
        vae=_flow_vae(),
        text_encoder=_text_encoder("CLIPTextModelWithProjection", WIDTHS[0], "quick_gelu"),
        text_encoder_2=_text_encoder("CLIPTextModelWithProjection", WIDTHS[1], "gelu"),
        text_encoder_3=text_encoder_3,
        tokenizer=write_tokenizer(folder / "tokenizer", pad="<|endoftext|>"),
        tokenizer_2=write_tokenizer(folder / "tokenizer_2", pad="!"),
        tokenizer_3=tokenizer_3,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def write_tiny_flux(folder: Path, *, guidance: bool) -> Path:
    """A random tiny FLUX.1: dev, with `guidance` as an input and a shift by the resolution, or schnell."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    config: dict[str, Any] = {
        "in_channels": 4 * CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": T5_WIDTH,
        "pooled_projection_dim": WIDTHS[0],
        "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": guidance,
    }
    tokenizer_2, text_encoder_2 = _t5(folder / "tokenizer_2", T5_WIDTH)
    dev: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 16, "max_shift": 2.0}
    FluxPipeline(
        transformer=_seeded(lambda: FluxTransformer2DModel(**config)),
        vae=_flow_vae(),
        text_encoder=_text_encoder("CLIPTextModel", WIDTHS[0], "quick_gelu"),
        text_encoder_2=text_encoder_2,
        tokenizer=write_tokenizer(folder / "tokenizer", pad="<|endoftext|>"),
        tokenizer_2=tokenizer_2,
        scheduler=FlowMatchEulerDiscreteScheduler(**(dev if guidance else {"shift": 1.0})),
    ).save_pretrained(folder)
    return folder


SHORT: dict[str, Any] = {"max_sequence_length": TOKENS}
"""As few tokens for T5 as for CLIP."""


def _flow(family: str, write: Callable[[Path], Path], **changes: Any) -> Tiny:
    calls = {"guided": {"guidance_scale": 4.0}, "unguided": {"guidance_scale": 1.0}, **changes}
    for name in ("guided", "unguided"):
        calls[name] = {**calls[name], **SHORT}
    return Tiny(family, write, settings=SHORT, **calls)


MODELS = {
    "sd1x": Tiny("sd1x", lambda folder: write_tiny_sd(folder, linear=False)),
    "sd1x-v-zero-snr": Tiny(
        "sd1x", lambda folder: write_tiny_sd(folder, linear=False, prediction_type="v_prediction", zero_snr=True)
    ),
    "sd2x-v": Tiny("sd2x", lambda folder: write_tiny_sd(folder, linear=True, prediction_type="v_prediction")),
    "sd3": _flow("sd3", write_tiny_sd3),
    "sd3.5-without-t5": _flow("sd3", lambda folder: write_tiny_sd3(folder, t5=False, newer=True)),
    "flux-dev": _flow(
        "flux",
        lambda folder: write_tiny_flux(folder, guidance=True),
        unguided={"guidance_scale": 3.5},
        embedded=True,
        time_unit=1000.0,
    ),
    "flux-schnell": _flow(
        "flux",
        lambda folder: write_tiny_flux(folder, guidance=False),
        scale_key="true_cfg_scale",
        time_unit=1000.0,
        guided={"true_cfg_scale": 4.0, "negative_prompt": ["", ""]},
        unguided={"true_cfg_scale": 1.0},
        halves="in turn",
    ),
}
"""Name of a variant -> model."""
