"""Compares a description of a pipeline's calls with the pipeline: its loop, run with a network that is a formula."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core.errors import UserError
from ..calls.images import build_pipeline
from ..calls.packing import patch_ids, text_ids
from ..files.reading import quiet_libraries

if TYPE_CHECKING:
    from ...core.plugin_api.batch import Conditioning
    from ..generic import Generic

STEPS = 2
GUIDED = 3.0
RTOL, ATOL = 1e-4, 1e-5
FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError)
"""What a pipeline raises whose arguments do not fit together."""


@dataclass
class Recording:
    """What a pipeline did: the arguments of each call of its network, and the prediction of each step.

    Attributes:
        calls: Argument -> value, without those that are None.
        predictions: What the scheduler was given, in the pipeline's form of latents.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)


def formula(call: Mapping[str, Any], *, twice: bool) -> Tensor:
    """Return an output of the shape of the call's first tensor that depends on all of its tensors.

    Args:
        call: The arguments.
        twice: Whether the output has twice the channels, (B, 2 C, h, w).
    """
    tensors = [value.float() for value in call.values() if isinstance(value, Tensor)]
    latents, *others = tensors
    output = 0.3 * latents + 0.1 * latents.flip(-1)
    for number, other in enumerate(others, start=1):
        by_sample = other.ndim > 0 and len(other) == len(latents)
        each = (other if by_sample else other[None].expand(len(latents), *other.shape)).reshape(len(latents), -1)
        size = each.square().mean(dim=1, keepdim=True).sqrt() + 1  # of ids: what is large would hide what is small
        weights = torch.linspace(-1, 1, each.shape[1], dtype=output.dtype)
        told = 0.05 * number * (each / size * (1 + weights)).sum(dim=1) / each.shape[1] ** 0.5
        output = output + told.reshape(-1, *[1] * (latents.ndim - 1))
    return torch.cat([output, -output], dim=1) if twice else output


def stand_in(family: Generic, recording: Recording) -> Any:
    """Return a network of the model's class without weights, whose output is :func:`formula`; its calls are kept."""
    network: Any = family.empty_network()
    config: dict[str, Any] = dict(network.config)
    kind: Any = type(network)
    twice = config.get("out_channels") == 2 * config.get("in_channels", 0)
    names = [name for name in inspect.signature(kind.forward).parameters if name != "self"]

    class StandIn(kind):  # type: ignore[misc, valid-type]
        device = torch.device("cpu")
        dtype = torch.float32

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            ordered = sorted(given, key=lambda name: names.index(name) if name in names else len(names))
            kept = {name: given[name] for name in ordered if given[name] is not None and name != "return_dict"}
            recording.calls.append(kept)
            return (formula(kept, twice=twice),)

    with quiet_libraries(), torch.device("meta"):
        made: Any = StandIn
        return made.from_config(config)


@contextmanager
def spied(scheduler: Any, recording: Recording) -> Iterator[None]:
    """Keep what the scheduler is given at each step inside the block."""
    step = scheduler.step

    def kept(prediction: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        recording.predictions.append(prediction)
        return step(prediction, timestep, sample, *args, **kwargs)

    scheduler.step = kept
    try:
        yield
    finally:
        scheduler.step = step


def record(family: Generic, embeds: Conditioning, *, size: tuple[int, int], scale: float) -> tuple[Recording, Any]:
    """Run the pipeline's loop with a stand-in; return what it did, and its scheduler.

    Raises:
        UserError: Its call takes no such arguments, or fails.
    """
    recording, scheduler = Recording(), family.scheduler(None)
    network = stand_in(family, recording)
    pipeline = build_pipeline(family.architecture, network, scheduler, scale_factor=family.scale_factor)
    call = {**family.pipeline_prompts(embeds), **family.guidance_call(network, scale)}
    if scale > 1:
        call |= family.pipeline_prompts({key: family.uncond(embeds)[key] for key in embeds}, "negative_")
    taken = inspect.signature(pipeline.__call__).parameters
    if unknown := [name for name in call if name not in taken]:
        raise UserError(
            f"family_config.generic: {family.architecture.pipeline} takes no {', '.join(unknown)}",
            f"its arguments: {', '.join(taken)}",
        )
    sizes = {"width": size[0], "height": size[1], "num_inference_steps": STEPS}
    try:
        with spied(scheduler, recording), quiet_libraries(), torch.no_grad():
            pipeline(**call, **sizes, generator=torch.Generator().manual_seed(0), output_type="latent")
    except FAILURES as error:
        raise UserError(
            f"family_config.generic: {family.architecture.pipeline} cannot be called as it is described: "
            f"{type(error).__name__}: {error}",
            "name all that stands for the prompt under `embeddings`, and what its call needs besides under "
            "`pipeline_call`",
        ) from error
    return recording, scheduler


def compared_size(family: Generic) -> tuple[int, int]:
    """Return the (width, height) in pixels of the images with which calls are compared: small, and not square."""
    edge = 4 * family.scale_factor
    return 6 * edge, 4 * edge


def check_description(family: Generic, embeds: Conditioning) -> None:
    """Raise UserError where the pipeline calls its network otherwise than the family's ``predict`` does.

    Args:
        family: With its description.
        embeds: Of one prompt, (1, ...) each.
    """
    embeds = {key: value.cpu().float() if value.is_floating_point() else value.cpu() for key, value in embeds.items()}
    if family.config.latents_at_once > 1:  # a second image, of another prompt
        embeds = {key: torch.cat([one, 0.9 * one if one.is_floating_point() else one]) for key, one in embeds.items()}
    size = compared_size(family)
    found, scheduler = record(family, embeds, size=size, scale=1.0)
    problems = [] if family.config.denoiser_call else ["denoiser_call is not given"]
    if not problems:
        problems = _differences(family, embeds, found, scheduler, size, scale=1.0)
    if not problems:
        guided, scheduler = record(family, embeds, size=size, scale=GUIDED)
        problems = _differences(family, embeds, guided, scheduler, size, scale=GUIDED)
    if problems:
        proposal = json.dumps(proposed(family, embeds, found, scheduler, size), ensure_ascii=False)
        raise UserError(
            f"family_config.generic does not describe what {family.architecture.pipeline} does: {'; '.join(problems)}",
            f"the pipeline's own calls suggest {proposal}",
        )


def _differences(
    family: Generic, embeds: Conditioning, found: Recording, scheduler: Any, size: tuple[int, int], *, scale: float
) -> list[str]:
    """Return sentences about the first step at which the pipeline and ``predict`` differ; nothing where none does."""
    batch, per_step = len(next(iter(embeds.values()))), len(found.calls) / len(found.predictions)
    conds = [{key: value[number : number + 1] for key, value in embeds.items()} for number in range(batch)]
    uncond = {key: value.to(embeds[key]) for key, value in family.uncond(conds[0]).items()}
    for number, theirs in enumerate(found.predictions):
        ours, calls = Recording(), found.calls[round(number * per_step) : round((number + 1) * per_step)]
        network, time = stand_in(family, ours), scheduler.timesteps[number].reshape(1).float()
        latents = next(value for value in calls[0].values() if isinstance(value, Tensor))  # some schedulers scale them
        outputs = []
        for sample, cond in enumerate(conds):
            try:
                x_t = family.from_network(latents[sample : sample + 1], size=size)
                output = family.predict(network, x_t, time, cond)
                if scale > 1:
                    without = family.predict(network, x_t, time, uncond)
                    output = without + scale * (output - without)
            except FAILURES as error:
                return [f"its network cannot be called so ({type(error).__name__}: {error})"]
            outputs.append(family.to_network(output))
        if unlike := _unlike(calls, ours.calls):
            return unlike
        expected = torch.cat(outputs)
        if expected.shape != theirs.shape or not torch.allclose(expected, theirs, rtol=RTOL, atol=ATOL):
            return [_about_output(expected, theirs, guided=scale > 1)]
    return []


def _about_output(expected: Tensor, theirs: Tensor, *, guided: bool) -> str:
    if expected.shape != theirs.shape:
        return f"its prediction has the shape {tuple(theirs.shape)}, not {tuple(expected.shape)} (output, packing)"
    if torch.allclose(expected, -theirs.to(expected), rtol=RTOL, atol=ATOL):
        return "its prediction is the negative of the one described (output)"
    if guided:
        return (
            "it guides otherwise than uncond + s (cond - uncond) (guidance_argument, guidance_offset, uncond; a "
            "rescaling that pipeline_call can switch off)"
        )
    return "its prediction is another than the one described (output, time_input)"


def _unlike(theirs: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return sentences about the first row of the pipeline's calls that none of `ours` is."""
    for call in theirs:
        batch = len(next(value for value in call.values() if isinstance(value, Tensor)))
        for part in range(batch):
            row = {name: _row(value, part, batch) for name, value in call.items()}
            compared = [_unlike_call(row, one) for one in ours]
            if all(compared):
                return min(compared, key=len)
    return []


def _row(value: Any, part: int, batch: int) -> Any:
    """Return an argument of one sample of a batch."""
    rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch and batch > 1
    return value[part : part + 1] if rows else value


def _unlike_call(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    found = [f"it does not give the network {name}" for name in ours if name not in theirs]
    for name, value in theirs.items():
        if name not in ours:
            found += [] if _is_nothing(value) else [f"it gives the network {name} = {_said(value)} as well"]
        elif not _same(value, ours[name]):
            found.append(f"{name} is {_said(value)}, not {_said(ours[name])}")
    return found


def _is_nothing(value: Any) -> bool:
    """Return True for what a call without the argument does as well."""
    return value is False or value == {} if not isinstance(value, Tensor) else False


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        # ids of places come with and without a batch of one in front, and a time as a number
        one, other = (value.reshape(_without_batch(value)) for value in (one, other))
        return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-6)
    return type(one) is type(other) and not isinstance(one, Tensor) and one == other


def _without_batch(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape[1:] if value.ndim > 2 and len(value) == 1 else value.shape or (1,))


def _said(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return repr(value.flatten()[0].item()) if value.numel() == 1 else f"a tensor {tuple(value.shape)}"


def proposed(
    family: Generic, embeds: Conditioning, found: Recording, scheduler: Any, size: tuple[int, int]
) -> dict[str, Any]:
    """Return the description that the pipeline's first call suggests; ``?`` for what has no name in one."""
    batch = len(next(iter(embeds.values())))
    call, time = {name: _row(value, 0, batch) for name, value in found.calls[0].items()}, scheduler.timesteps[:1]
    embeds = {key: value[:1] for key, value in embeds.items()}
    latents = next(value for value in call.values() if isinstance(value, Tensor))
    height, width = (edge // family.scale_factor for edge in reversed(size))
    units = {"timesteps": time, "fraction": time / 1000, "reversed": 1 - time / 1000}
    length = next(iter(embeds.values())).shape[1]
    named = {
        **embeds,
        "image_ids": patch_ids(height, width, like=latents),
        "text_ids": text_ids(length, like=latents),
        "counted_text_ids": text_ids(length, like=latents, counted=True),
    }
    told: dict[str, Any] = {}
    proposal: dict[str, Any] = {"packing": "patches" if latents.ndim == 3 else "none"}
    for name, value in call.items():
        unit = next((unit for unit, one in units.items() if isinstance(value, Tensor) and _same(value, one)), None)
        match = next((key for key, one in named.items() if _same(value, one)), None)
        if value is latents:
            told[name] = "latents"
        elif unit is not None:
            told[name], proposal["time_input"] = "time", unit
        elif match is not None:
            told[name] = match
        elif not isinstance(value, Tensor):
            if not _is_nothing(value):
                told[name] = value if isinstance(value, bool | int | float) else "?"
        else:
            told[name] = [value.item()] if value.numel() == 1 else "?"
    return {**proposal, "denoiser_call": told}
