"""Students beside ControlNets and IP-Adapters, and on images to begin with, in the pipelines of plain diffusers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pytest
import torch
from distill.core.diffusion import Prediction
from distill.core.diffusion.flow_map import FlowMapScheduler
from distill.core.diffusion.sampler import Sampler
from distill.core.plugin_api.family import ExportInfo, LoraSettings, MicroConditioning
from support.beside import IP_ADAPTERS, Base, right_half, smooth_image
from support.pages import blocks, text
from support.second_time import trained
from support.tiny_sdxl import EDGE

PAGE = "docs/beside.md"
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
SHIFT = math.exp(0.5 + 1.5 * (64 - 16) / (4096 - 16))
"""Of the tiny FLUX.1 dev at its 64 positions: mu = 0.5 at 16 and 2 at 4096."""
TIMES: dict[str, list[tuple[float, ...]]] = {
    "lcm": [(999,), (759,), (499,), (259,)],
    "tcd": [(999,), (759,), (499,), (259,)],
    "told": [(999,), (759,), (499,), (259,)],
    "ddim": [(999,), (749,), (499,), (249,)],
    "flow-map": [(999, 749), (749, 499), (499, 249), (249, 0)],
    "euler": [(1000,), (900,), (750,), (500,)],
    "flow-lcm": [(1000,), (900,), (750,), (500,)],
    "flux flow-map": list(pairwise(1000 * SHIFT * s / (1 + (SHIFT - 1) * s) for s in (1.0, 0.75, 0.5, 0.25, 0.0))),
}
"""Sampler, or family and sampler -> the times of the network in four steps, beside the second times, if any."""


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

    @property
    def times(self) -> torch.Tensor:
        """Of four steps, (4, 1), or (4, 2) with the second times."""
        return torch.tensor(TIMES.get(f"{self.base.family} {self.name}", TIMES[self.name]), dtype=torch.float64)


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


def export(base: Base, folder: Path, kind: str, name: str, *, told: bool = False) -> Student:
    """A student whose trained weights are random: an adapter, or all of them; `told` takes its guidance scale."""
    from peft import LoraConfig

    family = base.make()
    network = family.load_network()
    if kind == "lora":
        lora = LoraConfig(r=4, lora_alpha=8.0, target_modules=["to_q", "to_k", "to_v", "conv1", "linear_1"])
        network.add_adapter(lora, adapter_name="student")
        for key, parameter in network.named_parameters():
            if ".student." in key:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2
    else:
        network = family.student_network(network, guidance_embedding=told or name == "told")
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
    ("sdxl", "full", "told"), ("sd1x", "lora", "lcm"), ("sd1x", "full", "flow-map"),
    ("flux", "lora", "euler"), ("flux", "full", "flow-lcm"), ("flux", "lora", "flow-map"),
]  # fmt: skip
"""Every sampler, and every family with both kinds."""
FEWER = [CELLS[number] for number in (0, 4, 6, 7, 9)]
"""What does not depend on the sampler is shown with these."""
SAMPLERS_OF = {
    "sdxl": ("lcm", "told", "ddim", "tcd", "flow-map"), "sd1x": ("lcm", "told", "ddim", "tcd", "flow-map"),
    "flux": ("euler", "flow-lcm", "flow-map"),
}  # fmt: skip
ALL = [
    (family, kind, name)
    for family, names in SAMPLERS_OF.items()
    for name in names
    for kind in ("lora", "full")
    if (kind, name) != ("lora", "told")
]


def students_of(cells: list[tuple[str, str, str]], *, told: bool = True) -> Any:
    """Parametrize a test by these students; `slow` runs the rest, those that are `told` their scale if asked."""
    cells = [cell for cell in cells if told or cell[2] != "told"]
    rest = [cell for cell in ALL if cell not in cells and (told or cell[2] != "told")]
    rest = [pytest.param(*cell, marks=pytest.mark.slow) for cell in rest]
    return pytest.mark.parametrize(("family", "kind", "name"), [*cells, *rest])


def far(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) > 1e-3


def load_ip_adapter(student: Student, pipe: Any) -> Any:
    """The pipeline with the IP-Adapter, loaded by the library's own loader."""
    folder, flux = student.base.ip_adapter, student.base.family == "flux"
    encoder = {"image_encoder_pretrained_model_name_or_path": str(folder / "image_encoder")} if flux else {}
    encoder |= {"image_encoder_dtype": torch.float32} if flux else {}
    pipe.load_ip_adapter(str(folder), **IP_ADAPTERS[flux], **encoder)
    return pipe


@students_of([*FEWER, CELLS[3], CELLS[5], CELLS[8]])
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


@students_of(FEWER)
def test_an_ip_adapter_steers_a_student(students, family, kind, name):
    """By its image; not at scale 0; and the student is not its teacher there."""
    student = students(family, kind, name)
    pipe = load_ip_adapter(student, student.load(""))
    start = student.base.start()
    one, other = (student.call(pipe, ip_adapter_image=smooth_image(seed), **start) for seed in (5, 6))
    assert far(one, other)
    pipe.set_ip_adapter_scale(0.0)
    off = student.call(pipe, ip_adapter_image=smooth_image(5), **start)
    torch.testing.assert_close(off, student.text_to_image, rtol=0, atol=2e-5)
    assert far(one, off)


# -- images to begin with ---------------------------------------------------------------------------------------------


@students_of(CELLS)
def test_strength_leaves_a_student_the_last_of_its_times(students, family, kind, name):
    """Half of four steps: the last two of the four, none made for the occasion; and all of them at strength 1."""
    student = students(family, kind, name)
    pipe = student.load("Img2Img")
    half, seen = student.base.calls_at(pipe, **student.arguments)
    torch.testing.assert_close(seen, student.times[2:], rtol=0, atol=1e-2)
    whole, seen = student.base.calls_at(pipe, strength=1.0, **student.arguments)
    torch.testing.assert_close(seen, student.times, rtol=0, atol=1e-2)
    assert far(half, whole)
    setattr(pipe, student.base.part, student.base.teacher)
    assert far(half, student.call(pipe))


@students_of(CELLS)
def test_inpainting_keeps_what_the_mask_leaves(students, family, kind, name):
    """The left half is the image's own latents, bit for bit, and the right half is the student's, of its last times."""
    student = students(family, kind, name)
    pipe = student.load("Inpaint")
    encode, encoded = pipe._encode_vae_image, []
    pipe._encode_vae_image = lambda *args, **kwargs: encoded.append(encode(*args, **kwargs)) or encoded[-1]
    made, seen = student.base.calls_at(pipe, output_type="latent", **student.arguments)
    torch.testing.assert_close(seen, student.times[2:], rtol=0, atol=1e-2)
    setattr(pipe, student.base.part, student.base.teacher)
    teachers = student.call(pipe, output_type="latent")
    if family == "flux":  # (B, 16 x 16 / 4, 4 C) -> (B, C, h, w)
        made, teachers = (pipe._unpack_latents(each, EDGE, EDGE, pipe.vae_scale_factor) for each in (made, teachers))
    half = made.shape[-1] // 2
    assert torch.equal(made[..., :half], encoded[0][..., :half])
    assert far(made[..., half:], encoded[0][..., half:])
    assert far(made[..., half:], teachers[..., half:])


@students_of(FEWER, told=False)
@pytest.mark.parametrize("pipeline", ["ControlNetImg2Img", "ControlNetInpaint"])
def test_a_controlnet_steers_a_student_that_begins_with_an_image(students, family, kind, name, pipeline):
    student = students(family, kind, name)
    pipe = student.load(pipeline)
    one, seen = student.base.calls_at(pipe, control=5, **student.arguments)
    torch.testing.assert_close(seen, student.times[2:], rtol=0, atol=1e-2)
    assert far(one, student.call(pipe, control=6))
    off = student.call(pipe, control=5, controlnet_conditioning_scale=0.0)
    if family == "flux":  # encoding a control image draws numbers first: no pipeline without one has this noise
        without = student.call(pipe, control=6, controlnet_conditioning_scale=0.0)
    else:
        without = student.call(student.load(pipeline.removeprefix("ControlNet")))
    torch.testing.assert_close(off, without, rtol=0, atol=2e-5)
    assert far(one, off)


@pytest.mark.parametrize(
    ("family", "kind", "name"),
    [
        ("sdxl", "lora", "ddim"), ("sdxl", "lora", "tcd"), ("sdxl", "lora", "flow-map"), ("sd1x", "full", "flow-map"),
        ("flux", "lora", "euler"), ("flux", "lora", "flow-map"),
    ],
)  # fmt: skip
def test_image_to_image_is_the_noised_image_and_the_students_last_steps(students, family, kind, name):
    student = students(family, kind, name)
    pipe = student.load("Img2Img")
    expected = pipe.image_processor.postprocess(by_hand(student, pipe), output_type="pt")
    torch.testing.assert_close(student.call(pipe), expected, rtol=0, atol=1e-4)


def by_hand(student: Student, pipe: Any) -> torch.Tensor:
    """Images (1, 3, H, W) in [-1, 1] by the family's predictions: from alpha_t x_0 + sigma_t eps to the next times."""
    family = student.base.make()
    network, generator = family.load_student(student.folder), torch.Generator().manual_seed(3)
    micro = MicroConditioning([(EDGE, EDGE)], [(0, 0)], [(EDGE, EDGE)])
    cond = family.condition(family.encode_prompts(["a red fox"]), micro)
    unit = 1000 if family.prediction_type == "flow" else 1
    last = [0.0] if student.name == "tcd" else [None]  # else it ends at the data
    times = [float(row[0]) for row in student.times[2:]]
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess(smooth_image(3), height=EDGE, width=EDGE)
        config = pipe.vae.config
        x = pipe.vae.encode(pixels).latent_dist.sample(generator) - (config.shift_factor or 0.0)
        x = x * config.scaling_factor
        noise = torch.randn(x.shape, generator=generator)
        x = family.schedule.add_noise(x, noise, torch.tensor([times[0] / unit]))
        for t, u in zip(times, [*times[1:], *last], strict=True):
            time, second = torch.tensor([t]), torch.tensor([u or 0.0]) if student.flow_map else None
            output = family.predict(network, x, time, cond, second_time=second)
            prediction = Prediction(output, x, time / unit, family.schedule, family.prediction_type)
            x = prediction.x0 if u is None else prediction.ddim_step(torch.tensor([u / unit]))
        return 2 * family.decode_latents(x) - 1


# -- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name", "named", "expected"),
    [
        ("sdxl", "lcm", {"timesteps": [999, 499, 259]}, [[259]]),
        ("sdxl", "flow-map", {"timesteps": [900, 600, 200.5]}, [[200.5, 0]]),
        ("flux", "euler", {"sigmas": [0.8, 0.6, 0.2]}, [[600], [200]]),
        ("flux", "flow-map", {"sigmas": [0.8, 0.6, 0.2]}, [[600, 200], [200, 0]]),
    ],
)
def test_strength_cuts_named_times_too(students, family, name, named, expected):
    """Of three at strength 0.5 the pipelines of UNets leave one, and FLUX.1's, which round up, two."""
    student = students(family, "lora", name)
    _, seen = student.base.calls_at(student.load("Img2Img"), **{**student.arguments, **named})
    torch.testing.assert_close(seen, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-2)


def test_the_even_sigmas_that_pipelines_pass_are_a_number_of_steps():
    """FLUX.1's pipelines with a ControlNet or an image pass them to every scheduler, for it to shift."""
    asked, passed = (FlowMapScheduler(prediction_type="flow", shift=3.0) for _ in range(2))
    for steps in (1, 2, 4, 7):
        asked.set_timesteps(steps)
        passed.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=1.15)
        assert passed.timesteps.tolist() == asked.timesteps.tolist()
        assert passed.pair == asked.pair
    assert asked.timesteps[1] == pytest.approx(1000 * 3 * (6 / 7) / (1 + 2 * 6 / 7), abs=1e-3)
    passed.set_timesteps(sigmas=[1.0, 0.9, 0.5])
    assert passed.timesteps.tolist() == [1000.0, 900.0, 500.0]


def test_a_flow_map_says_that_strength_leaves_no_step(students):
    """One step cannot be halved: other schedulers fail there without a word on why, or return the image as it was."""
    student = students("sdxl", "lora", "flow-map")
    for pipeline in ("Img2Img", "Inpaint"):
        with pytest.raises(ValueError, match=r"none of the 1 steps is left .* strength \(to 1 at least\)"):
            student.call(student.load(pipeline), num_inference_steps=1)
    with pytest.raises(ValueError, match=r"none of the 4 steps is left .* \(to 0.25 at least\).* \(timesteps\)"):
        student.call(student.load("Img2Img"), strength=0.2)


def test_pipelines_made_of_a_flow_maps_parts_share_its_scheduler(students):
    """And one that has another is told so, in place of images at the times of the first."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    student = students("sdxl", "lora", "flow-map")
    pipe = student.load("")
    other = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    expected = student.call(student.load("Img2Img"))
    torch.testing.assert_close(student.call(other), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(student.call(pipe), student.text_to_image, rtol=0, atol=2e-5)
    other.scheduler = FlowMapScheduler.from_pretrained(student.folder, subfolder="scheduler")
    with pytest.raises(ValueError, match="attach belongs to the pipeline that is called"):
        student.call(other)


# -- what a pipeline does not tell ------------------------------------------------------------------------------------


def test_a_flow_map_says_that_a_pipeline_does_not_tell_its_scale(bases, tmp_path):
    student = export(bases["sdxl"], tmp_path, "full", "flow-map", told=True)
    told = student.call(student.load("Img2Img"), guidance_scale=8.0)
    assert far(told, student.call(student.load("Img2Img"), guidance_scale=4.0))
    with pytest.raises(ValueError, match="this pipeline does not tell it"):
        student.call(student.load("ControlNetImg2Img"), control=5, guidance_scale=8.0)


@pytest.mark.parametrize("family", ["sdxl", "sd1x"])
def test_an_ip_adapter_may_be_loaded_before_the_student(students, family):
    student = students(family, "lora", "lcm")
    first, then = student.base.load(""), student.load("")
    for pipe in (first, then):
        load_ip_adapter(student, pipe)
    first.load_lora_weights(student.folder)
    first.scheduler = then.scheduler
    one, other = (student.call(pipe, ip_adapter_image=smooth_image(5)) for pipe in (first, then))
    torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("family", "name", "named"),
    [("sdxl", "tcd", {"timesteps": [499, 259]}), ("sdxl", "flow-map", {"timesteps": [499, 249]}),
     ("flux", "euler", {"sigmas": SIGMAS[2:]})],
)  # fmt: skip
def test_times_may_be_named_in_place_of_a_strength(students, family, name, named):
    student = students(family, "lora", name)
    pipe = student.load("Img2Img")
    made = student.base.call(pipe, **{**student.arguments, **named, "strength": 1.0, "num_inference_steps": 2})
    torch.testing.assert_close(made, student.call(pipe), rtol=0, atol=2e-5)


def block_with(words: str) -> str:
    """The lines of the page that hold this."""
    return next(block.content for block in blocks(PAGE) if words in block.content)


def test_a_pipeline_that_takes_no_times_may_get_them_from_its_scheduler(students):
    student = students("sdxl", "lora", "lcm")
    names = {"pipe": student.load("ControlNetImg2Img")}
    exec(block_with("pipe.scheduler.set_timesteps = lambda"), names)
    given = {"control": 5, "controlnet_conditioning_scale": 0.0, "num_inference_steps": 3, "strength": 0.7}
    made, seen = student.base.calls_at(names["pipe"], **given)
    assert seen.flatten().tolist() == [499, 259]
    expected = student.call(student.load("Img2Img"))
    torch.testing.assert_close(made, expected, rtol=0, atol=2e-5)


def test_an_sdxl_on_a_flow_begins_with_an_image(tmp_path):
    from support.tiny_sdxl import write_tiny_sdxl

    base = Base("sdxl", write_tiny_sdxl(tmp_path / "model", prediction_type="flow", layers_per_block=1))
    student = export(base, tmp_path / "student", "full", "euler")
    pipe = student.load("Img2Img")
    pipe.scheduler.init_noise_sigma = 1.0
    pipe.scheduler.scale_model_input = lambda sample, timestep: sample
    with pytest.raises(AttributeError, match="add_noise"):
        student.call(pipe)
    line = next(line for line in text(PAGE).split("`") if line.startswith("pipe.scheduler.add_noise"))
    exec(line, {"pipe": pipe})
    made, seen = base.calls_at(pipe, **student.arguments)
    assert seen.flatten().tolist() == [750, 500]
    expected = pipe.image_processor.postprocess(by_hand(student, pipe), output_type="pt")
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pipeline", ["ControlNetImg2Img", "ControlNetInpaint"])
def test_a_scale_may_be_told_by_hand(students, pipeline):
    """Without it these pipelines run the student untold, twice in each step, and say nothing."""
    student = students("sdxl", "full", "told")
    expected = student.call(student.load(pipeline.removeprefix("ControlNet")))
    names = {"pipe": student.load(pipeline), "scale": 8.0, "torch": torch}
    off = {"control": 5, "controlnet_conditioning_scale": 0.0}
    assert far(student.call(names["pipe"], **off), expected)
    exec(block_with("register_forward_pre_hook"), names)
    told, seen = student.base.calls_at(names["pipe"], guidance_scale=1.0, **off)
    torch.testing.assert_close(told, expected, rtol=0, atol=2e-5)
    assert len(seen) == 2


def test_the_lines_of_the_page_run(bases, students, tmp_path, monkeypatch):
    """In their order, on the tiny models in place of the real ones; what each makes is neither black nor white."""
    sdxl, flux = bases["sdxl"], bases["flux"]
    instead = {
        "stabilityai/stable-diffusion-xl-base-1.0": sdxl.folder, "black-forest-labs/FLUX.1-dev": flux.folder,
        "output/sdxl-lcm/student": students("sdxl", "lora", "lcm").folder,
        "output/flux-lcm/student": students("flux", "lora", "flow-lcm").folder,
        "output/sdxl-meanflow/student": students("sdxl", "lora", "flow-map").folder,
        "h94/IP-Adapter": sdxl.ip_adapter, ".float16": ".float32", ".bfloat16": ".float32", '"cuda"': '"cpu"',
        "1024": EDGE,
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.ControlNetModel.from_pretrained", lambda *args, **kwargs: sdxl.controlnet)
    monkeypatch.setattr("diffusers.FluxControlNetModel.from_pretrained", lambda *args, **kwargs: flux.controlnet)
    for name, drawn in {"photo": smooth_image(3), "edges": smooth_image(5), "mask": right_half()}.items():
        drawn.save(f"{name}.png")
    names: dict[str, Any] = {}
    run = [block for block in blocks(PAGE) if block.comments["held by"].endswith("test_the_lines_of_the_page_run")]
    assert len(run) == 7
    for block in run:
        content = block.content
        for real, substitute in instead.items():
            content = content.replace(real, str(substitute))
        exec(compile(content, block.where, "exec"), names)
        if "image" in names:
            image = names.pop("image")
            assert image.size == (EDGE, EDGE)
            assert all(low < high for low, high in image.getextrema())
