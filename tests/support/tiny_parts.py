"""What random tiny models of every family are made of, and what tests must know of their pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from support import tiny_sdxl
from support.tiny_sdxl import EDGE, TOKENS, WIDTHS, text_config


def image_states(output: Any, positions: int) -> Any:
    """The image's states from the output of a block: of a UNet, of two streams of which the image's is the second, or
    of one stream in which it comes first.
    """
    if not isinstance(output, tuple):
        return output if output.ndim == 4 else output[:, :positions]
    return output[0] if output[0] is not None and output[0].ndim == 4 else output[1]


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
        read: Takes the noised latents, as the pipeline has them, from the arguments of a call of the network.
        written: Takes our prediction, as the pipeline has its latents, from what the network returned.
        halves: How a guided call is made: both halves in one batch, the unconditional first or last, or one call after
            the other.
        off_by: What is added to the pipeline's guidance scale to make it ours.
        encoded: The pipeline's own encoding, where its parts are no tensors.
        kinks: Whether the network is not differentiable everywhere.
        alone: Whether the pipeline's images depend on the other prompts of a call, so that each is asked for alone.
        autoencoded: What the autoencoder makes of images (B, 3, H, W), as :func:`plain_latents` does.
        times: Our times of the pipeline's steps, where it tells its network others than noise levels.
        sized: Further arguments of a call that say the sizes which the tests give.
        states: Takes the image's states (B, positions, D), or (B, D, h, w), from the output of a block, the
            conditioning and the number of positions.
    """

    family: str
    write: Callable[[Path], Path]
    settings: dict[str, Any] = field(default_factory=dict)
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 4.0})
    unguided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    scale_key: str = "guidance_scale"
    embedded: bool = False
    read: Callable[[Any, Any], Any] = lambda args, kwargs: args[0] if args else kwargs["hidden_states"]
    written: Callable[[Any], Any] = lambda output: output
    halves: Literal["batched", "batched, conditional first", "in turn"] = "batched"
    off_by: float = 0.0
    encoded: Callable[[Any, list[str]], dict[str, Any]] | None = None
    kinks: bool = False
    alone: bool = False
    autoencoded: Callable[[Any, Any], tuple[Any, Any, Any]] = lambda vae, pixels: plain_latents(vae, pixels)
    times: Callable[[Any], Any] | None = None
    sized: dict[str, Any] = field(default_factory=dict)
    states: Callable[[Any, dict[str, Any], int], Any] = lambda output, cond, positions: image_states(output, positions)

    def scale(self, arguments: dict[str, Any]) -> float:
        """The guidance scale of a plain call with these arguments."""
        return arguments[self.scale_key] + self.off_by

    def told(self, arguments: dict[str, Any]) -> float | None:
        """The paper's w that the network is told in such a call, if it is."""
        return self.scale(arguments) - 1 if self.embedded else None

    def parts(self, number: int, cond: Any, uncond: Any, *, guided: bool) -> list[Any]:
        """What the rows of the `number`-th call of the network in the pipeline's loop are conditioned on, in halves."""
        if not guided or self.embedded:
            return [cond]
        if self.halves == "batched":
            return [uncond, cond]
        if self.halves == "batched, conditional first":
            return [cond, uncond]
        return [uncond if number % 2 else cond]

    def make(self, folder: Path, config: dict[str, Any] | None = None, **settings: Any) -> Any:
        """The family on the model in `folder`."""
        from distill.core.plugin_api.family import ModelSettings
        from distill.core.registry.registry import Registry

        kind = Registry.load(installed=False).get("family", self.family)
        own = kind.Config(**{**self.settings, **(config or {})})
        return kind(own, ModelSettings(source=str(folder), resolution=(EDGE, EDGE), **settings))


def last(output: Any, cond: Any, positions: int) -> Any:
    """The image's states where they come after the text's in one stream, or second of two."""
    return output[1] if isinstance(output, tuple) else output[:, -positions:]


def plain_latents(vae: Any, pixels: Any) -> tuple[Any, Any, Any]:
    """Scaled latents of images, their mode and a sample of seed 5 (equal where there is but one); the mode decoded."""
    import torch

    shift = vae.config.shift_factor or 0.0
    posterior = vae.encode(pixels).latent_dist
    mode, sample = posterior.mode(), posterior.sample(generator=torch.Generator().manual_seed(5))
    scaled = [(each - shift) * vae.config.scaling_factor for each in (mode, sample)]
    return scaled[0], scaled[1], vae.decode(mode).sample


def on_white(images: Any) -> Any:
    """Images (B, 3, H, W) in [0, 1], from such with a channel of opacity or without."""
    return images if images.shape[1] == 3 else 1 - images[:, 3:] + images[:, :3] * images[:, 3:]


def seeded(build: Callable[[], Any], *, seed: int = 0) -> Any:
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


def clip_encoder(kind: str, width: int, activation: str) -> Any:
    import torch
    import transformers

    encoder = seeded(lambda: getattr(transformers, kind)(text_config(width, activation)), seed=width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=0.3)
    return encoder


CHANNELS = 8
"""Of the latents of models on a flow."""
T5_WIDTH = sum(WIDTHS) + 16
"""More than both CLIP encoders together, so that their states are padded."""


def flow_vae(levels: int = 2, **changes: Any) -> Any:
    from diffusers import AutoencoderKL

    own = {"latent_channels": CHANNELS, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    config = {**tiny_sdxl.vae_config(), **own, "use_quant_conv": False, "use_post_quant_conv": False, **changes}
    for key in ("block_out_channels", "down_block_types", "up_block_types"):
        config[key] = (config[key][0],) * (levels - 1) + config[key][1:]
    return seeded(lambda: AutoencoderKL(**config))


def t5_parts(folder: Path, width: int) -> tuple[Any, Any]:
    """(tokenizer, encoder): a token per letter, two layers."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((each, -3.0) for each in letters)]
    T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return T5TokenizerFast.from_pretrained(folder), seeded(lambda: T5EncoderModel(config))


SIZES: dict[str, Any] = {"original_size": (64, 48), "crops_coords_top_left": (3, 5)}
"""Heights and widths, tops and lefts that the tests give, beside the size of the image."""
SHORT: dict[str, Any] = {"max_sequence_length": TOKENS}
"""As few tokens for T5 as for CLIP."""


def flow(family: str, write: Callable[[Path], Path], **changes: Any) -> Tiny:
    calls = {"guided": {"guidance_scale": 4.0}, "unguided": {"guidance_scale": 1.0}, **changes}
    for name in ("guided", "unguided"):
        calls[name] = {**calls[name], **SHORT}
    return Tiny(family, write, settings=SHORT, **calls)
