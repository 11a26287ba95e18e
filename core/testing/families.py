"""Checks of a family on its small model, from the prompt to the image and back from disk."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.networks import Networks
from ..errors import UserError
from ..plugin_api.family import ExportInfo
from ..plugin_api.method import Role
from .checks import NotApplicable, Subject, expect, failing
from .model import LORA, PROMPTS, SEEDS, Kind, Model
from .sampling_loops import GUIDED, UNGUIDED, loop_is_generate
from .suite import Named

ROUNDING, IMAGE_ROUNDING = 1e-4, 2.5 / 255
"""Tolerances, for pixels in [0, 1], of an image made a second time, and of one stored with 8 bits in between."""

CALLS = ("pipe(prompt, ", "pipe(prompt=prompt, ")
"""How a usage snippet calls the pipeline; of some pipelines the first argument is an image."""


def checks(subject: Subject) -> list[Named]:
    """Return checks on the model of its example."""
    model = Model(subject)
    found: list[Named] = [
        ("it knows its model", partial(_source, model)),
        ("prompts are encoded", partial(_prompts, model)),
        ("the length of prompts is known", partial(_prompt_length, model)),
        ("the unconditional counterpart fits", partial(_uncond, model)),
        ("images are encoded and decoded", partial(_images, model)),
        ("predict gives an output for each sample", partial(_predict, model)),
        ("steps along predict make the pipeline's image", partial(loop_is_generate, model, UNGUIDED)),
        ("so do guided steps", partial(loop_is_generate, model, GUIDED)),
        ("LoRA off is the base, bit for bit", partial(_lora_off, model)),
        ("a full student starts as its teacher", partial(_full, model)),
        ("what it says it can do, it can", partial(_capabilities, model)),
    ]
    for kind in ("lora", "full"):
        found += [
            (f"an exported student makes the same image [{kind}]", partial(_export, model, kind)),
            (f"plain diffusers makes the same image of it [{kind}]", partial(_diffusers, model, kind)),
        ]
    return found


def _source(model: Model) -> None:
    family, kinds = model.family, ("epsilon", "v_prediction", "sample", "flow")
    expect(family.prediction_type in kinds, f"prediction_type is {family.prediction_type!r}", f"it is one of {kinds}")
    flow = family.prediction_type == "flow"
    expect(family.schedule.clean_at_zero == flow, f"a {type(family.schedule).__name__} goes with "
           f"{family.prediction_type!r}", "see distill.core.diffusion.schedule.from_scheduler_config")  # fmt: skip
    for part in ("text", "vae", "denoiser"):
        first, again = family.fingerprint(part), model.make().fingerprint(part)
        expect(first and first == again, f"fingerprint({part!r}) is {first!r} and then {again!r}", "make it from files")
    with tempfile.TemporaryDirectory() as empty:
        try:
            model.make(empty).check_source()
        except UserError:
            return
        expect(False, "check_source() says nothing against an empty folder", "raise UserError, before weights load")


def _rows(embeds: Any, what: str) -> None:
    tensors = isinstance(embeds, dict) and all(isinstance(value, Tensor) for value in embeds.values())
    expect(tensors and embeds, f"{what} returned {type(embeds).__name__}", "return {name: tensor (B, ...)}")
    for name, value in embeds.items():
        expect(len(value) == len(PROMPTS), f"{name!r} of {what} has the shape {tuple(value.shape)} for {len(PROMPTS)} "
               "prompts", "the batch is the first axis")  # fmt: skip


def _prompts(model: Model) -> None:
    with failing("encode_prompts()", "it takes a list of texts"):
        embeds, again = model.family.encode_prompts(PROMPTS), model.family.encode_prompts(PROMPTS)
        alone, empty = model.family.encode_prompts(PROMPTS[:1]), model.family.encode_prompts([""])
    _rows(embeds, "encode_prompts()")
    for name, value in embeds.items():
        expect(value.device.type == "cpu" and not value.requires_grad, f"{name!r} is on {value.device}, or has a "
               "gradient", "return detached tensors on the CPU: they are cached")  # fmt: skip
        expect(torch.equal(value, again[name]), f"{name!r} is not the same twice", "encoders run in eval mode")
        close = torch.allclose(value[:1], alone[name], rtol=1e-3, atol=1e-4)
        expect(close, f"{name!r} of a prompt depends on what else is in the batch", "pad every prompt to one length")
        expect(empty[name].shape[1:] == value.shape[1:], f"{name!r} of an empty prompt has another shape", "pad it")
    differ = any(not torch.equal(value[0], value[1]) for value in embeds.values())
    expect(differ, "two prompts have the same embeddings", "is the text used at all?")
    model.family.release_encoders()
    with failing("encode_prompts() after release_encoders()", "encoders load again when they are needed"):
        model.family.encode_prompts(PROMPTS[:1])


def _prompt_length(model: Model) -> None:
    """Check that what is counted beyond the longest prompt is what is cut off."""
    with failing("max_prompt_tokens", "a run asks for it before it encodes captions"):
        limit = model.family.max_prompt_tokens
    if limit is None:
        raise NotApplicable("max_prompt_tokens is None: prompts are read whole")
    with failing("count_tokens()", "it takes a list of texts and loads no weights"):
        counts = list(model.family.count_tokens(PROMPTS))
    expect(limit > 0 and min(counts) > 0, f"max_prompt_tokens is {limit}, and count_tokens() says {counts} of "
           f"{list(PROMPTS)}", "both count without marks of beginning and end")  # fmt: skip
    whole = " ".join(PROMPTS[1:] * (2 + limit // counts[1]))
    ends = [model.family.encode_prompts([f"{whole} {end}"]) for end in ("moon", "sun")]
    cut = all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    expect(cut, f"a prompt of more than {limit} tokens, max_prompt_tokens, is read to its end", "return None where "
           "nothing is cut off")  # fmt: skip


def _uncond(model: Model) -> None:
    cond = model.conditioned
    _rows(cond, "condition()")
    with failing("uncond()", "it takes what condition() returned"):
        uncond = model.family.uncond(cond)
    shapes = {name: tuple(value.shape) for name, value in uncond.items()}
    expected = {name: tuple(value.shape) for name, value in cond.items()}
    expect(shapes == expected, f"uncond() has {shapes}, condition() {expected}", "the same names and shapes")
    differ = any(not torch.equal(uncond[name], value) for name, value in cond.items())
    expect(differ, "uncond() is condition() itself", "it is that of an empty prompt, or zeros")


def _images(model: Model) -> None:
    family, edge = model.family, model.edge
    pixels = torch.rand(2, 3, edge, edge, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with failing("encode_images()", "it takes images (B, 3, H, W) in [-1, 1]"), torch.no_grad():
        latents = family.encode_images(pixels)
        drawn = [family.encode_images(pixels[:1], [torch.Generator().manual_seed(5)]) for _ in range(2)]
    small = edge // family.scale_factor
    expected = (2, family.latent_channels, small, small)
    expect(tuple(latents.shape) == expected, f"latents of images {tuple(pixels.shape)} have the shape "
           f"{tuple(latents.shape)}, not {expected}", "see latent_channels and scale_factor")  # fmt: skip
    expect(torch.equal(*drawn), "one generator gives two latents", "draw from the generators that are given")
    with failing("decode_latents()", "it takes what encode_images() returned"), torch.no_grad():
        decoded = family.decode_latents(latents)
    expect(decoded.shape == pixels.shape, f"decode_latents() made {tuple(decoded.shape)} of {tuple(latents.shape)}, "
           f"not {tuple(pixels.shape)}", "images are (B, 3, H, W), of the size that was encoded")  # fmt: skip
    inside = bool(decoded.isfinite().all()) and float(decoded.min()) >= 0 and float(decoded.max()) <= 1
    expect(inside and decoded.dtype == torch.float32, f"decoded images are {decoded.dtype} from "
           f"{float(decoded.min()):.2f} to {float(decoded.max()):.2f}", "they are float32 in [0, 1]")  # fmt: skip


def _predict(model: Model) -> None:
    network = model.family.load_network()
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    expect(not trained, f"load_network() is not frozen: {trained[:2]}", "requires_grad_(False)")
    expect(not network.training, "load_network() is in training mode", "call eval()")
    (x_t, time), output = model.inputs(), model.predict(network)
    expect(output.shape == x_t.shape, f"predict() made {tuple(output.shape)} of {tuple(x_t.shape)}",
           "the output has the shape of x_t")  # fmt: skip
    expect(output.isfinite().all(), "predict() is not finite", "look at the time: it comes as network_time() gives it")
    with torch.no_grad():
        cond = {name: value[1:] for name, value in model.conditioned.items()}
        alone = model.family.predict(network, x_t[1:], time[1:], cond)
    expect(torch.allclose(output[1:], alone, rtol=1e-3, atol=1e-4), "a sample's output depends on the rest of the "
           "batch", "samples of a batch have times and prompts of their own")  # fmt: skip


def _lora_off(model: Model) -> None:
    _need(model, "lora")
    names = [name for name, _ in model.family.load_network().named_modules()]
    lost = [t for t in model.family.lora_targets if not any(n == t or n.endswith(f".{t}") for n in names)]
    expect(not lost, f"lora_targets {lost} name no module of the network", "give suffixes of module names")
    bare = model.predict(model.family.load_network())
    with failing("adding an adapter", "the network has add_adapter(), as networks of diffusers do"):
        networks = Networks(model.family, [Role("teacher"), Role("student", trains="lora")], lora=LORA, seed=0)
    with networks.use("student") as network:
        expect(torch.equal(model.predict(network), bare), "a new adapter changes the output", "it starts at zero")
    with torch.no_grad():
        for parameter in networks.parameters("student"):
            parameter.add_(0.05)
    with networks.use("student") as network:
        expect(not torch.equal(model.predict(network), bare), "a trained adapter changes nothing", "see lora_targets")
    with networks.use("teacher") as network:
        expect(torch.equal(model.predict(network), bare), "with the adapter off the output is not the base's, bit for "
               "bit", "predict() must leave adapters as they are set")  # fmt: skip


def _full(model: Model) -> None:
    _need(model, "full")
    teacher = model.family.load_network()
    before = model.predict(teacher)
    with failing("student_network()", "it returns a trainable copy of the teacher"):
        student = model.family.student_network(teacher, guidance_embedding=False)
    frozen = [n for n, p in student.named_parameters() if not p.requires_grad or p.dtype != torch.float32]
    expect(not frozen, f"of a full student {frozen[:2]} are frozen or not float32", "it is a trainable fp32 copy")
    expect(torch.equal(model.predict(student), before), "a full student does not start as its teacher", "copy it")
    with torch.no_grad():
        next(student.parameters()).add_(1)
    expect(torch.equal(model.predict(teacher), before), "a change of the student changes the teacher", "copy, no view")


def _capabilities(model: Model) -> None:
    family, said = model.family, model.family.capabilities
    teacher = family.load_network()
    if said.features:
        with failing("features()", "capabilities.features says that it has some"), torch.no_grad():
            found = family.features(teacher, *model.inputs(), model.conditioned)
            channels = family.feature_channels(teacher)
        shapes = [tuple(level.shape) for level in found]
        fits = channels == [level.shape[1] for level in found] and all(level.ndim == 4 for level in found)
        expect(fits, f"features() has {shapes}, feature_channels() {channels}", "give (B, C_k, h_k, w_k) of each level")
    inputs = {"guidance_embedding": said.guidance_embedding, "second_time": said.second_time}
    _micro_conditioning(model)
    _shard_units(model, teacher)
    given = {"guidance_embedding": "guidance", "second_time": "second_time"}
    for name in [name for name, able in inputs.items() if able]:
        with failing(f"student_network({name}=True)", f"capabilities.{name} says that it can"):
            student = family.student_network(teacher, **{"guidance_embedding": False, name: True})
        value = torch.full((len(PROMPTS),), 2.5) if name == "guidance_embedding" else model.inputs()[1] / 2
        told = {given[name]: value}
        expected = model.predict(teacher, **(told if name == "guidance_embedding" and family.guided_by_input else {}))
        close = torch.allclose(model.predict(student, **told), expected, rtol=1e-4, atol=1e-5)
        expect(close, f"a student with {name} does not start as its teacher", "the new embedding starts at zero")
        if name == "second_time":
            _second_time(model, student)


def _second_time(model: Model, student: nn.Module) -> None:
    """Check that the output depends on the second time once its embedding has been trained."""
    g, time = torch.Generator().manual_seed(0), model.inputs()[1]
    with torch.no_grad():
        for weight in student.get_submodule("second_time").parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=g))
    far, near = (model.predict(student, second_time=time * share) for share in (0.2, 0.9))
    expect(not torch.equal(far, near), "predict() ignores its second time, and capabilities.second_time is True",
           "call the network inside second_time_input() of core/diffusion/second_time.py, or say False")  # fmt: skip


def _shard_units(model: Model, teacher: nn.Module) -> None:
    """Compare the modules that are gathered one at a time with those that a forward pass calls."""
    names = list(model.family.shard_units(teacher))
    called: list[str] = []
    passes: list[None] = []  # some networks are called for one sample at a time
    with failing("shard_units()", "it names modules of the network"):
        hooks = [
            teacher.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
            for name in names
        ]
    hooks.append(teacher.register_forward_hook(lambda *_: passes.append(None)))
    model.predict(teacher)
    for hook in hooks:
        hook.remove()
    said = f"shard_units() names {names[:3]} ..., and a forward pass calls {called[:3]} ..."
    expect(called == names * len(passes), said,
           "name modules that are called once, in the order in which they are computed")  # fmt: skip


def _micro_conditioning(model: Model) -> None:
    """Compare what condition() makes of two sizes with what the family says of itself."""
    able = model.family.capabilities.micro_conditioning
    other = model.conditioning(original=2 * model.edge, crop=3)
    differs = any(not torch.equal(other[name], value) for name, value in model.conditioned.items())
    says = f"capabilities.micro_conditioning is {able}"
    does = "depends on" if differs else "ignores"
    expect(differs == able, f"condition() {does} the sizes of images, and {says}", f"set it to {differs}")


def _need(model: Model, kind: Kind) -> None:
    if not getattr(model.family.capabilities, kind):
        raise NotApplicable(f"capabilities.{kind} is False")


# -- students on disk -------------------------------------------------------------------------------------------------


@contextmanager
def _exported(model: Model, kind: Kind) -> Iterator[tuple[Path, Tensor]]:
    """Yield the working directory, with the folder ``student``, and the images from before the export."""
    _need(model, kind)
    with model.student(kind) as network, tempfile.TemporaryDirectory(prefix="distill-check-") as place:
        images = model.images(network)
        expected = (len(SEEDS), 3, model.edge, model.edge)
        expect(tuple(images.shape) == expected, f"generate() made {tuple(images.shape)}, not {expected}",
               "images are (B, 3, H, W)")  # fmt: skip
        expect(torch.equal(images, model.images(network)), "one seed gives two images", "draw noise from the seeds")
        quiet = redirect_stderr(io.StringIO())  # progress bars
        with quiet, failing("export()", "it writes a student in diffusers' layout into the folder"):
            model.family.export(network, Path(place) / "student", _info(model, kind))
        yield Path(place), images


def _info(model: Model, kind: Kind) -> ExportInfo:
    return ExportInfo(model.sampler(), kind, LORA if kind == "lora" else None, metadata={"step": "7"})


def _export(model: Model, kind: Kind) -> None:
    with _exported(model, kind) as (place, images):
        scheduler = place / "student" / "scheduler" / "scheduler_config.json"
        expect(scheduler.is_file(), "export() wrote no scheduler/", "the student's sampler goes along with it")
        family = model.make()
        with failing("load_student()", "it must read what export() wrote"):
            loaded = family.load_student(place / "student")
        found = model.images(loaded, family=family)
    distance = float((found - images).abs().max())
    expect(distance <= ROUNDING, f"the exported student, loaded again, makes an image {distance:.3f} away from the "
           "one before (pixels in [0, 1])", "write and read all of its weights and its sampler")  # fmt: skip
    with model.student(kind) as _:
        teacher = model.images(model.make().load_network(), family=model.make())
    far = float((teacher - images).abs().max())
    expect(far > ROUNDING, "the student's images are the teacher's", "generate() must use the network that is given")


def _diffusers(model: Model, kind: Kind) -> None:
    with _exported(model, kind) as (place, images), chdir(place):
        snippet = model.family.usage_snippet(_info(model, kind))
        call = next((call for call in CALLS if call in snippet), "")
        expect(call, f"usage_snippet() has neither {' nor '.join(map(repr, CALLS))}",
               "say `image = pipe(prompt, ...).images[0]`")  # fmt: skip
        size = f"generator=_generator, width={model.edge}, height={model.edge}, "
        own = call.replace("prompt, ", f"{PROMPTS[0]!r}, ") + size
        names = {"_generator": torch.Generator().manual_seed(SEEDS[0])}
        quiet = redirect_stderr(io.StringIO())  # progress bars
        with quiet, failing("usage_snippet()", "these are the lines that people paste; they must run"):
            exec(compile(snippet.replace(call, own), "usage_snippet()", "exec"), names)
        image: Any = names.get("image")
    expect(image is not None, "usage_snippet() leaves no `image`", "say `image = pipe(prompt, ...).images[0]`")
    import numpy as np
    from PIL import Image

    opaque = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    found = torch.from_numpy(np.asarray(opaque.convert("RGB")).copy()).permute(2, 0, 1).float() / 255
    expect(found.shape == images[0].shape, f"plain diffusers makes an image {tuple(found.shape)}", "see pixel_multiple")
    distance = float((found - images[0]).abs().max())
    expect(distance <= IMAGE_ROUNDING, f"plain diffusers makes an image {distance:.3f} away from generate()'s "
           "(pixels in [0, 1])", "export all of the student's weights and its scheduler; encode prompts as the "
           "pipeline does; say in snippet_call() what completed_call() adds")  # fmt: skip
