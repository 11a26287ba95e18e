"""Reads a description of a pipeline from its own calls, and writes it as the code of a family."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError
from ...core.plugin_api.family import ModelSettings
from .generic_check import check_description, compared_size, proposed, record
from .generic_model import linear_layers
from .small_copy import write_small_copy

if TYPE_CHECKING:
    from ..generic import Generic

CONDITIONS = ("prompt_embeds", "prompt_attention_mask", "prompt_mask")
"""What arguments of a pipeline's call that stand for the prompt have in their names."""


def sketch(kind: type[Generic], model: str) -> dict[str, str]:
    """Return the pieces of a family's code for `model`: placeholder of the template -> code.

    A small random model is made from its configs; no weights are read.

    Args:
        kind: The family generic.
        model: Folder in diffusers layout, or hub id.

    Raises:
        UserError: The pipeline's calls cannot be told from each other, or a part cannot be made small.
    """
    with tempfile.TemporaryDirectory() as scratch:
        small = Path(scratch) / "model"
        write_small_copy(model, small)
        try:
            family = described(kind, small)
        except UserError as error:
            raise UserError(
                f"the calls of this pipeline cannot be read: {error.message}",
                "write its family by hand: distill plugins new family NAME without --model, and the tutorial 'your own "
                "family'",
            ) from error
        return pieces(family, model)


def described(kind: type[Generic], folder: Path) -> Generic:
    """Return the family generic with a description that the pipeline in `folder` agrees with.

    Raises:
        UserError: There is none; the message is that of the first one tried.
    """
    family = _made(kind, folder, {"denoiser_call": {"": 0}})
    pipeline = family.architecture.pipeline_class()
    whole = {name: False for name in inspect.signature(pipeline.__call__).parameters if "binning" in name}
    found = {"embeddings": names_of_prompts(pipeline), "pipeline_call": whole}
    for packing in ("none", "patches"):
        found["packing"] = packing
        family = _made(kind, folder, found)
        family._checked = True  # there is no description yet
        embeds = family.encode_prompts(["a fox"])
        size = compared_size(family)
        recording, scheduler = record(family, embeds, size=size, scale=1.0)
        said = proposed(family, embeds, recording, scheduler, size)
        if said["packing"] == packing:
            break
    unknown = [name for name, what in said["denoiser_call"].items() if what == "?"]
    if unknown:
        raise UserError(
            f"{pipeline.__name__} gives its network {', '.join(unknown)}, which cannot be read from its calls",
            "write the family by hand: the tutorial 'your own family'",
        )
    problem: UserError | None = None
    for choice in _choices(family):
        family = _made(kind, folder, {**found, **said, **choice})
        family._checked = True  # it is compared here
        try:
            check_description(family, embeds)
        except UserError as error:
            problem = problem or error
            continue
        return family
    assert problem is not None
    raise problem


def _made(kind: type[Generic], folder: Path, description: Mapping[str, Any]) -> Generic:
    return kind(kind.Config(**description), ModelSettings(source=str(folder)))


def _choices(family: Generic) -> Iterator[dict[str, Any]]:
    """Yield what a description may say of output and guidance, what is usual first."""
    taken = inspect.signature(family.architecture.pipeline_class().__call__).parameters
    guides = [("guidance_scale", 0), ("true_cfg_scale", 0), ("guidance_scale", 1)]
    further = [{}, *({name: False} for name in taken if "norm" in name or "rescal" in name)]
    for batch, output, (argument, offset), uncond, switch in itertools.product(
        ({}, {"latents_at_once": 1}), ("as_is", "negated", "first_half"), guides, ("empty", "zeros"), further
    ):
        if argument in taken:
            yield {
                "output": output, "guidance_argument": argument, "guidance_offset": offset, "uncond": uncond,
                "pipeline_call": {**family.config.pipeline_call, **switch}, **batch,
            }  # fmt: skip


def names_of_prompts(pipeline: Any) -> list[str]:
    """Return what a pipeline's ``encode_prompt`` returns, in its order, by the names of its own code: arguments of the
    pipeline's call that stand for the prompt, ``-`` for all else.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(pipeline.encode_prompt)))
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    last = returned[-1]
    nodes = last.elts if isinstance(last, ast.Tuple) else [last]
    taken = inspect.signature(pipeline.__call__).parameters
    names = [_name(node) for node in nodes]
    own = [name if name in taken and any(one in name for one in CONDITIONS) else "-" for name in names]
    return ["-" if name.startswith("negative") else name for name in own]


def _name(node: ast.expr) -> str:
    node = node.body if isinstance(node, ast.IfExp) else node
    return node.id if isinstance(node, ast.Name) else ""


# -- as code ----------------------------------------------------------------------------------------------------------


def pieces(family: Generic, model: str) -> dict[str, str]:
    """Return the code of a family that does what a description says."""
    config, architecture = family.config, family.architecture
    taken = inspect.signature(architecture.pipeline_class().__call__).parameters
    packed = config.packing == "patches"
    helpers = {"pack", "unpack"} if packed else set()
    helpers |= {"patch_ids"} if "image_ids" in config.denoiser_call.values() else set()
    helpers |= {"text_ids"} if {"text_ids", "counted_text_ids"} & set(config.denoiser_call.values()) else set()
    call = {**config.pipeline_call, config.guidance_argument: "max(scale, 1.0)"}
    return {
        "pipeline": architecture.pipeline,
        "model": model,
        "imports": ", ".join(sorted(helpers, key=str.lower)),
        "comma": ", " if helpers else "",
        "denoiser": architecture.denoiser,
        "denoiser_class": architecture.denoiser_class,
        "autoencoder": architecture.autoencoder,
        "tokenizers": repr(dict(architecture.tokenizers)).replace("'", '"'),
        "encoders": repr(dict(architecture.encoders)).replace("'", '"'),
        "arguments": repr(dict(architecture.arguments)).replace("'", '"'),
        "embed_keys": _tuple(family.embed_keys),
        "returned": _tuple(config.embeddings),
        "lora_targets": _tuple(_suffixes(linear_layers(family.empty_network()))),
        "guidance": repr(float(_number(taken, config.guidance_argument, 5.0) + config.guidance_offset)),
        "steps": repr(int(_number(taken, "num_inference_steps", 50))),
        "edge": repr(family.position_edge),
        "multiple": repr(max(16, family.scale_factor * family.position_edge)),
        "arguments_of_network": _indented(_argument_lines(family), 12),
        "output": _output(config),
        "guidance_call": _guidance(config, call),
        "packing": PACKING if packed else "",
        "config": ONE_AT_A_TIME if config.latents_at_once == 1 else "",
        "field": "\nfrom pydantic import Field" if config.latents_at_once == 1 else "",
        "encode_call": _encode_call(family),
        "prompts": PROMPTS if "negative_prompt" in taken and taken["negative_prompt"].default is not None else "",
        "uncond": UNCOND if config.uncond == "zeros" else "",
    }


LINE = 95
"""Characters of a line of names."""
PACKING = """
    @property
    def taken_channels(self):
        return super().taken_channels // 4

    def to_network(self, latents):
        return pack(latents)

    def from_network(self, latents, *, size):
        return unpack(latents, size[1] // self.scale_factor, size[0] // self.scale_factor)
"""
PROMPTS = '''
    def pipeline_prompts(self, embeds, prefix=""):
        """The pipeline refuses negative embeddings beside its own default of a negative prompt."""
        given = super().pipeline_prompts(embeds, prefix)
        return {"negative_prompt": None, **given} if prefix else given
'''
ONE_AT_A_TIME = '''
    class Config(DiffusersFamily.Config):
        """Settings of the family."""

        latents_at_once: int = Field(1, ge=1)
        """The pipeline guides one image at a time."""
'''
UNCOND = """
    def uncond(self, cond):
        return {key: torch.zeros_like(value) for key, value in cond.items()}
"""


def _encode_call(family: Generic) -> str:
    """Return the arguments of ``encode_prompt`` as code."""
    asked = inspect.signature(family.architecture.pipeline_class().encode_prompt).parameters
    call = {
        "prompt": "[prompt]", "device": "self.settings.device", "num_images_per_prompt": "1",
        "do_classifier_free_guidance": "False",
    }  # fmt: skip
    call |= {key: "None" for key, one in asked.items() if key.startswith("prompt_") and one.default is one.empty}
    lines = [f"{key}={value}," for key, value in call.items() if key in asked]
    return "\n" + _indented(lines, 12) + "\n        "


def _tuple(values: Any) -> str:
    written = ", ".join(f'"{value}"' for value in values)
    if len(written) < LINE:
        return f"({written}{',' if len(values) == 1 else ''})"
    return "(\n" + "".join(f'        "{value}",\n' for value in values) + "    )"


def _number(taken: Mapping[str, inspect.Parameter], name: str, usual: float) -> float:
    default = taken[name].default if name in taken else None
    return default if isinstance(default, int | float) else usual


def _suffixes(names: Any) -> list[str]:
    """Return the ends of names of layers, without their blocks, each once."""
    return list(dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name) for name in names))


def _argument_lines(family: Generic) -> list[str]:
    return [f"{name}={_expression(what, family)}," for name, what in family.config.denoiser_call.items()]


def _expression(what: Any, family: Generic) -> str:
    """Return the code of an argument of the network's call."""
    if isinstance(what, list):
        return f"torch.full_like(time, {what[0]!r}, dtype=dtype)"
    if not isinstance(what, str):
        return repr(what)
    if what in family.embed_keys:
        return f'cond["{what}"]' + ("" if "mask" in what else ".to(dtype)")
    length = f'cond["{family.embed_keys[0]}"].shape[1]'
    return {
        "latents": "self.to_network(x_t.to(dtype))",
        "time": {"timesteps": "time", "fraction": "time / 1000", "reversed": "1 - time / 1000"}[
            family.config.time_input
        ],
        "image_ids": "patch_ids(*x_t.shape[-2:], like=x_t.to(dtype))",
        "text_ids": f"text_ids({length}, like=x_t.to(dtype))",
        "counted_text_ids": f"text_ids({length}, like=x_t.to(dtype), counted=True)",
        "latent_height": "x_t.shape[-2]",
        "latent_width": "x_t.shape[-1]",
    }[what]


def _output(config: Any) -> str:
    form = "unpack(output, *x_t.shape[-2:])" if config.packing == "patches" else "output"
    return {"as_is": form, "negated": f"-{form}", "first_half": f"{form}.chunk(2, dim=1)[0]"}[config.output]


def _guidance(config: Any, call: Mapping[str, Any]) -> str:
    offset = f" - {config.guidance_offset:g}" if config.guidance_offset else ""
    own = {name: value if name == config.guidance_argument else repr(value) for name, value in call.items()}
    return "{" + ", ".join(f'"{name}": {value}' for name, value in own.items()).replace(
        "max(scale, 1.0)", f"max(scale, 1.0){offset}"
    ) + "}"  # fmt: skip


def _indented(lines: list[str], spaces: int) -> str:
    return "\n".join(" " * spaces + line for line in lines)
