"""Random tiny ControlNets and IP-Adapters, and students in the pipelines that take them or an image to begin with."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .tiny_clip import write_tiny_clip
from .tiny_families import MODELS
from .tiny_sdxl import EDGE, write_tiny_sdxl

TOKENS = 4
"""Number of tokens that an IP-Adapter makes of an image, as the libraries' loaders take it to be."""
IP_ADAPTERS: dict[bool, dict[str, str]] = {
    False: {"subfolder": "sdxl_models", "weight_name": "ip-adapter_sdxl.safetensors"},
    True: {"weight_name": "ip_adapter.safetensors"},
}
"""Whether it is for FLUX.1 -> where the weights lie in its repository."""
CLASSES = {"sdxl": "StableDiffusionXL", "sd1x": "StableDiffusion", "flux": "Flux"}
"""Family -> how the names of its pipelines begin."""


def make_controlnet(denoiser: Any, *, seed: int = 0) -> Any:
    """A ControlNet of a tiny UNet or FLUX.1 transformer whose last layers, zero at first, are random."""
    from diffusers import ControlNetModel, FluxControlNetModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if hasattr(denoiser, "transformer_blocks"):
            size = {key: denoiser.config[key] for key in ("attention_head_dim", "num_attention_heads")}
            made = FluxControlNetModel.from_transformer(denoiser, num_layers=1, num_single_layers=1, **size)
            ends = [*made.controlnet_blocks, *made.controlnet_single_blocks, made.controlnet_x_embedder]
        else:
            made = ControlNetModel.from_unet(denoiser)
            hint = made.controlnet_cond_embedding
            ends = [*made.controlnet_down_blocks, made.controlnet_mid_block]
            for layer in (hint.conv_in, *hint.blocks, hint.conv_out):
                torch.nn.init.normal_(layer.weight, std=0.2)
            # the control image is scaled down by 8 inside; the tiny autoencoder scales by 2
            for block in hint.blocks:
                block.stride = (1, 1)
            hint.conv_in.stride = (2, 2)
        for end in ends:
            torch.nn.init.normal_(end.weight, std=0.05)
    return made.eval()


def write_ip_adapter(denoiser: Any, folder: Path, *, seed: int = 0) -> Path:
    """Write an IP-Adapter for a UNet or FLUX.1 transformer in its own layout, its image encoder beside it."""
    from safetensors.torch import save_file
    from transformers import CLIPModel, CLIPVisionModelWithProjection

    flux = hasattr(denoiser, "transformer_blocks")
    place = folder / IP_ADAPTERS[flux].get("subfolder", "")
    clip = CLIPModel.from_pretrained(write_tiny_clip(place / "image_encoder"))
    clip.config.vision_config.projection_dim = clip.config.projection_dim
    encoder = CLIPVisionModelWithProjection(clip.config.vision_config)
    encoder.vision_model.load_state_dict(clip.vision_model.state_dict())
    encoder.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    encoder.save_pretrained(place / "image_encoder")
    generator = torch.Generator().manual_seed(seed)
    shapes = (_flux_shapes if flux else _unet_shapes)(denoiser, clip.config.projection_dim)
    weights = {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    save_file(weights, place / IP_ADAPTERS[flux]["weight_name"])
    return folder


def _projection(prefix: str, width: int, projection: int) -> dict[str, tuple[int, ...]]:
    linear = {f"{prefix}.proj.weight": (TOKENS * width, projection), f"{prefix}.proj.bias": (TOKENS * width,)}
    return {**linear, f"{prefix}.norm.weight": (width,), f"{prefix}.norm.bias": (width,)}


def _unet_shapes(unet: Any, projection: int) -> dict[str, tuple[int, ...]]:
    """Tencent's layout, which counts all attentions; each second is a cross-attention."""
    width = unet.config.cross_attention_dim
    shapes = _projection("image_proj", width, projection)
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(names):
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        shapes |= {f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight": (hidden, width) for part in "kv"}
    return shapes


def _flux_shapes(transformer: Any, projection: int) -> dict[str, tuple[int, ...]]:
    """XLabs' layout, of the blocks of two streams."""
    width, hidden = transformer.config.joint_attention_dim, transformer.inner_dim
    shapes = _projection("ip_adapter_proj_model", width, projection)
    for number in range(len(transformer.transformer_blocks)):
        for part in "kv":
            name = f"double_blocks.{number}.processor.ip_adapter_double_stream_{part}_proj"
            shapes |= {f"{name}.weight": (hidden, width), f"{name}.bias": (hidden,)}
    return shapes


def smooth_image(seed: int) -> Any:
    """A random image of smooth colours."""
    from PIL import Image

    values = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(seed)) * 255
    return Image.fromarray(values.byte().numpy()).resize((EDGE, EDGE), Image.Resampling.BICUBIC)


def right_half() -> Any:
    """A mask: the right half is painted anew."""
    from PIL import Image

    mask = Image.new("L", (EDGE, EDGE), 0)
    mask.paste(255, (EDGE // 2, 0, EDGE, EDGE))
    return mask


INPUTS: dict[str, dict[str, Any]] = {
    "": {},
    "Img2Img": {"image": smooth_image(3), "strength": 0.5},
    "Inpaint": {"image": smooth_image(3), "mask_image": right_half(), "strength": 0.5},
}
"""What a pipeline begins with -> its inputs."""


@dataclass(frozen=True)
class Base:
    """A tiny model with what stands beside it.

    Attributes:
        family: Name of the family.
        folder: Where the model is.
    """

    family: str
    folder: Path

    @classmethod
    def write(cls, family: str, folder: Path) -> Base:
        if family == "sdxl":
            write_tiny_sdxl(folder / "model", layers_per_block=1)
        else:
            MODELS["flux-dev" if family == "flux" else family].write(folder / "model")
        return cls(family, folder / "model")

    @property
    def part(self) -> str:
        return "transformer" if self.family == "flux" else "unet"

    def make(self) -> Any:
        """The family on it."""
        from distill.core.plugin_api.family import ModelSettings
        from distill.core.registry.registry import Registry

        kind = Registry.load(installed=False).get("family", self.family)
        config = kind.Config(**({"max_sequence_length": 16} if self.family == "flux" else {}))
        return kind(config, ModelSettings(source=str(self.folder), resolution=(EDGE, EDGE)))

    @cached_property
    def teacher(self) -> Any:
        """Its denoiser."""
        return self._parts.pop(self.part)

    @cached_property
    def _parts(self) -> dict[str, Any]:
        """Its other parts, loaded once: every pipeline of it and of its students has them."""
        from diffusers import DiffusionPipeline

        parts = DiffusionPipeline.from_pretrained(self.folder).components
        return {name: part for name, part in parts.items() if part is not None and name != "scheduler"}

    @property
    def around(self) -> dict[str, Any]:
        """Everything but denoiser and scheduler."""
        return {name: part for name, part in self._parts.items() if name != self.part}

    @cached_property
    def controlnet(self) -> Any:
        return make_controlnet(self.teacher)

    @cached_property
    def ip_adapter(self) -> Path:
        return write_ip_adapter(self.teacher, self.folder.parent / "ip-adapter")

    def load(self, kind: str, folder: Path | None = None, **parts: Any) -> Any:
        """The pipeline of a `kind`, as "ControlNetInpaint", from this model or another folder."""
        import diffusers

        parts = {**self.around, **parts, **({"controlnet": self.controlnet} if "ControlNet" in kind else {})}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = getattr(diffusers, f"{CLASSES[self.family]}{kind}Pipeline").from_pretrained(
                folder or self.folder, **parts
            )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, pipe: Any, *, control: int | None = None, **given: Any) -> torch.Tensor:
        """Images (1, 3, H, W) of a pipeline on its inputs, those it does not take left out.

        Args:
            pipe: The pipeline.
            control: Seed of a control image.
            given: Other inputs than the usual ones.
        """
        takes = inspect.signature(type(pipe).__call__).parameters
        if control is not None:
            given["control_image" if "control_image" in takes else "image"] = smooth_image(control)
        begins = next((begin for begin in ("Img2Img", "Inpaint") if begin in type(pipe).__name__), "")
        usual = {"num_inference_steps": 4, "guidance_scale": 3.5 if self.family == "flux" else 1.0, "width": EDGE,
                 "height": EDGE, "max_sequence_length": 16, "output_type": "pt"}  # fmt: skip
        arguments = {key: value for key, value in (usual | INPUTS[begins]).items() if key in takes} | given
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)  # FLUX.1's pipelines draw the noise between steps from the global generator
            return pipe("a red fox", generator=torch.Generator().manual_seed(3), **arguments).images

    def start(self, *, seed: int = 0) -> dict[str, torch.Tensor]:
        """The noise to begin with as an input: FLUX.1's pipelines draw it after what encoding a control image draws."""
        if self.family != "flux":
            return {}
        shape = 1, (EDGE // 4) ** 2, self.teacher.config.in_channels
        return {"latents": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}

    def calls_at(self, pipe: Any, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(images, the time of each call of the denoiser beside the second time, if any: (N, 1 or 2))."""
        seen: list[tuple[float, ...]] = []

        def note(module: Any, args: Any, kwargs: Any) -> None:
            time = kwargs["timestep"] * 1000 if self.family == "flux" else args[1]
            second = getattr(pipe.scheduler, "pair", (0.0,))[1:]
            seen.append((float(time.flatten()[0]), *second))

        handle = getattr(pipe, self.part).register_forward_pre_hook(note, with_kwargs=True)
        try:
            return self.call(pipe, **given), torch.tensor(seen, dtype=torch.float64)
        finally:
            handle.remove()
