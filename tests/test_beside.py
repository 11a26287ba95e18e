"""Students beside ControlNets and IP-Adapters, and on images to begin with, in the pipelines of plain diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from distill.core.diffusion import Prediction
from distill.core.diffusion.flow_map import FlowMapScheduler
from distill.core.diffusion.sampler import Sampler
from distill.core.plugin_api.family import ExportInfo, LoraSettings
from support.beside import IP_ADAPTER, Base, smooth_image
from support.second_time import trained
from support.tiny_sdxl import EDGE

FIXED = {"shift": 1.0, "use_dynamic_shifting": False}
SIGMAS = [1.0, 0.9, 0.75, 0.5]
LCM = Sampler("LCMScheduler", {"original_inference_steps": 50}, 4, 0.0)
SAMPLERS = {
    "lcm": LCM,
    "told": LCM,
    "ddim": Sampler("DDIMScheduler", {"timestep_spacing": "trailing"}, 4, 0.0),
    "tcd": Sampler("TCDScheduler", {"original_inference_steps": 50}, 4, 0.0, {"eta": 0.0}),
    "flow-map": Sampler("FlowMapScheduler", {}, 4, 0.0),
    "euler": Sampler("FlowMatchEulerDiscreteScheduler", FIXED, 4, 0.0, {"sigmas": SIGMAS}),
    "flow-lcm": Sampler("FlowMatchLCMScheduler", FIXED, 4, 0.0, {"sigmas": SIGMAS}),
}
"""What methods export; `told` is a full student that takes its guidance scale as an input."""
SHIFT = 1.6487
"""exp(mu), of the tiny FLUX.1 dev at its 64 positions: mu = 0.5 at 16, 2 at 4096."""
UNSHIFTED = [1.0, 0.75, 0.5, 0.25]
TIMES: dict[str, list[tuple[float, ...]]] = {
    "lcm": [(999,), (759,), (499,), (259,)],
    "tcd": [(999,), (759,), (499,), (259,)],
    "told": [(999,), (759,), (499,), (259,)],
    "ddim": [(999,), (749,), (499,), (249,)],
    "flow-map": [(999, 749), (749, 499), (499, 249), (249, 0)],
    "euler": [(1000,), (900,), (750,), (500,)],
    "flow-lcm": [(1000,), (900,), (750,), (500,)],
}
"""Sampler -> the times at which the network is called in four steps, with the second time where there is one."""


@dataclass(frozen=True)
class Student:
    """An exported student.

    Attributes:
        base: What it was made from.
        folder: Where it is.
        kind: ``lora`` or ``full``.
        name: Of its sampler.
    """

    base: Base
    folder: Path
    kind: str
    name: str

    @property
    def sampler(self) -> Sampler:
        return SAMPLERS[self.name]

    @property
    def flow_map(self) -> bool:
        return self.name == "flow-map"

    def load(self, pipeline: str, **parts: Any) -> Any:
        """The pipeline with the student, loaded by the lines of its model card."""
        import diffusers

        if self.kind == "lora":
            pipe = self.base.load(pipeline, **parts)
            pipe.load_lora_weights(self.folder)
            if not self.flow_map:
                scheduler = getattr(diffusers, self.sampler.scheduler)
                pipe.scheduler = scheduler.from_pretrained(self.folder, subfolder="scheduler")
        else:
            pipe = self.base.load(pipeline, self.folder, **parts, **({"scheduler": None} if self.flow_map else {}))
        return run_path(str(self.folder / "flow_map.py"))["attach"](pipe, self.folder) if self.flow_map else pipe

    def call(self, pipe: Any, **given: Any) -> torch.Tensor:
        """Images, by the arguments of its model card."""
        return self.base.call(pipe, **self.arguments, **given)

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.sampler.call, **({"guidance_scale": 8.0} if self.name == "told" else {})}

    @cached_property
    def text_to_image(self) -> torch.Tensor:
        return self.call(self.load(""), **self.base.start())

    @cached_property
    def times(self) -> list[tuple[float, ...]]:
        """Of four steps: on the tiny FLUX.1 dev a flow map's are shifted by the resolution."""
        if self.base.family != "flux" or not self.flow_map:
            return TIMES[self.name]
        shift = self.base.make().scheduler(self.sampler).config.shift
        grid = [round(1000 * shift * s / (1 + (shift - 1) * s), 2) for s in UNSHIFTED]
        return list(zip(grid, [*grid[1:], 0.0], strict=True))


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Base]:
    return {family: Base.write(family, tmp_path_factory.mktemp(family)) for family in ("sdxl", "sd1x", "flux")}


@pytest.fixture(scope="module")
def students(bases, tmp_path_factory):
    """(family, kind, sampler) -> the student, made when it is first asked for."""
    made: dict[tuple[str, str, str], Student] = {}

    def find(family: str, kind: str, name: str) -> Student:
        key = family, kind, name
        if key not in made:
            made[key] = export(bases[family], tmp_path_factory.mktemp("student"), kind, name)
        return made[key]

    return find


def export(base: Base, folder: Path, kind: str, name: str) -> Student:
    """A student whose trained weights are random: an adapter, or all of them."""
    from peft import LoraConfig

    family = base.make()
    network = family.load_network()
    if kind == "lora":
        lora = LoraConfig(r=4, lora_alpha=8.0, target_modules=list(family.lora_targets), init_lora_weights=False)
        network.add_adapter(lora, adapter_name="student")
        for key, parameter in network.named_parameters():
            if ".student." in key:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05
    else:
        network = family.student_network(network, guidance_embedding=name == "told")
        generator = torch.Generator().manual_seed(1)
        for parameter in network.parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    if name == "flow-map":
        trained(family.add_second_time(network), std=0.3)
    info = ExportInfo(SAMPLERS[name], kind, LoraSettings(4, 8.0) if kind == "lora" else None)
    family.export(network, folder, info)
    return Student(base, folder, kind, name)


CELLS = [
    ("sdxl", "lora", "lcm"), ("sdxl", "lora", "ddim"), ("sdxl", "lora", "tcd"), ("sdxl", "lora", "flow-map"),
    ("sdxl", "full", "told"), ("sd1x", "full", "lcm"), ("sd1x", "lora", "tcd"), ("sd1x", "full", "flow-map"),
    ("flux", "lora", "euler"), ("flux", "full", "flow-lcm"), ("flux", "lora", "flow-map"),
]  # fmt: skip
"""Every sampler, and every family with both kinds; `slow` runs the rest."""
REST = [
    (family, kind, name)
    for family, names in (
        ("sdxl", ("lcm", "told", "ddim", "tcd", "flow-map")), ("sd1x", ("lcm", "told", "ddim", "tcd", "flow-map")),
        ("flux", ("euler", "flow-lcm", "flow-map")),
    )
    for kind in ("lora", "full")
    for name in names
    if (family, kind, name) not in CELLS and (kind, name) != ("lora", "told")
]  # fmt: skip
ALL = [*CELLS, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in REST)]
every_student = pytest.mark.parametrize(("family", "kind", "name"), ALL)


def far(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) > 1e-3


@every_student
def test_a_controlnet_steers_a_student(students, family, kind, name):
    """By its image; not at scale 0; and the student is not its teacher there."""
    student = students(family, kind, name)
    pipe = student.load("ControlNet")
    start = student.base.start()
    one, other = (student.call(pipe, control=seed, **start) for seed in (5, 6))
    assert far(one, other)
    off = student.call(pipe, control=5, controlnet_conditioning_scale=0.0, **start)
    torch.testing.assert_close(off, student.text_to_image, rtol=0, atol=2e-5)
    assert far(one, off)
    setattr(pipe, student.base.part, student.base.teacher)
    assert far(one, student.call(pipe, control=5, **start))


@every_student
def test_an_ip_adapter_steers_a_student(students, family, kind, name):
    """By its image; not at scale 0; and the student is not its teacher there."""
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    student = students(family, kind, name)
    encoder = student.base.ip_adapter / "image_encoder"
    pipe = student.load(
        "",
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(encoder),
        feature_extractor=CLIPImageProcessor.from_pretrained(encoder),
    )
    own = {"image_encoder_pretrained_model_name_or_path": None} if family == "flux" else {"image_encoder_folder": None}
    pipe.load_ip_adapter(str(student.base.ip_adapter), subfolder="", weight_name=IP_ADAPTER, **own)
    start = student.base.start()
    one, other = (student.call(pipe, ip_adapter_image=smooth_image(seed), **start) for seed in (5, 6))
    assert far(one, other)
    pipe.set_ip_adapter_scale(0.0)
    off = student.call(pipe, ip_adapter_image=smooth_image(5), **start)
    torch.testing.assert_close(off, student.text_to_image, rtol=0, atol=2e-5)
    assert far(one, off)


# -- images to begin with ---------------------------------------------------------------------------------------------


@every_student
@pytest.mark.parametrize("pipeline", ["Img2Img", "Inpaint"])
def test_strength_leaves_a_student_the_last_of_its_times(students, family, kind, name, pipeline):
    """Half of four steps: the last two of the four, none made for the occasion; and all of them at strength 1."""
    student = students(family, kind, name)
    pipe = student.load(pipeline)
    half, seen = student.base.calls_at(pipe, **student.arguments)
    assert seen == student.times[2:]
    whole, seen = student.base.calls_at(pipe, strength=1.0, **student.arguments)
    assert seen == student.times
    assert far(half, whole)
    setattr(pipe, student.base.part, student.base.teacher)
    assert far(half, student.call(pipe))


@every_student
def test_inpainting_keeps_what_the_mask_leaves(students, family, kind, name):
    """The left half is the image's own latents, bit for bit, and the right half is not."""
    student = students(family, kind, name)
    pipe = student.load("Inpaint")
    encode, encoded = pipe._encode_vae_image, []
    pipe._encode_vae_image = lambda *args, **kwargs: encoded.append(encode(*args, **kwargs)) or encoded[-1]
    made, own = student.call(pipe, output_type="latent"), encoded[0]
    if family == "flux":  # (B, 16 x 16 / 4, 4 C) -> (B, C, h, w)
        made = pipe._unpack_latents(made, EDGE, EDGE, pipe.vae_scale_factor)
    half = made.shape[-1] // 2
    assert torch.equal(made[..., :half], own[..., :half])
    assert far(made[..., half:], own[..., half:])


@every_student
@pytest.mark.parametrize("pipeline", ["ControlNetImg2Img", "ControlNetInpaint"])
def test_a_controlnet_steers_a_student_that_begins_with_an_image(students, family, kind, name, pipeline):
    if name == "told":
        pytest.skip("these pipelines do not tell the scale: test_a_scale_that_a_pipeline_does_not_tell_...")
    student = students(family, kind, name)
    pipe = student.load(pipeline)
    one, seen = student.base.calls_at(pipe, control=5, **student.arguments)
    assert seen == student.times[2:]
    assert far(one, student.call(pipe, control=6))
    off = student.call(pipe, control=5, controlnet_conditioning_scale=0.0)
    if family == "flux":  # encoding a control image draws numbers first: no pipeline without one has this noise
        without = student.call(pipe, control=6, controlnet_conditioning_scale=0.0)
    else:
        without = student.call(student.load(pipeline.removeprefix("ControlNet")))
    torch.testing.assert_close(off, without, rtol=0, atol=2e-5)
    assert far(one, off)
