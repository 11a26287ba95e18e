"""Checks of the keys that name quantizers: which networks they are for, and whether the run can use them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..plugin_api.quantizer import NO_CHANGE
from ..settings.run_settings import RunSettings
from ..utils import packages
from ..utils.devices import cuda_available

if TYPE_CHECKING:
    from ..plugin_api.method import MethodSetup
    from ..registry.registry import Registry
    from .reading import ConfigReport

BASE = "base_model_precision"
TEACHER = "teacher_precision"
TEXT_ENCODERS = {f"text_encoder_{number}_precision": number for number in range(1, 5)}
"""Key -> number of the text encoder."""
PRECISIONS = (BASE, TEACHER, *TEXT_ENCODERS)
"""Keys that name a quantizer, or ``no_change``."""


def named_quantizers(run: RunSettings) -> dict[str, str]:
    """Return each key that names a quantizer, with the name."""
    named = {key: getattr(run, key) for key in PRECISIONS}
    return {key: name for key, name in named.items() if name != NO_CHANGE}


def check_quantisation(
    run: RunSettings,
    classes: dict[str, type[Any]],
    method_config: Any,
    *,
    registry: Registry,
    report: ConfigReport,
    to_train: bool,
) -> None:
    """Check every key that names a quantizer: its package, the machine, the family, the training.

    Args:
        run: The settings.
        classes: Kind -> the class chosen, of method and family.
        method_config: The method's, or None where it is not valid.
        registry: Of the quantizers.
        report: Takes findings.
        to_train: Also check what only training needs.
    """
    for key, name in named_quantizers(run).items():
        if not registry.known("quantizer", name):
            continue  # refused with the other names
        quantizer = registry.get("quantizer", name)
        problems = list(packages.problems(quantizer.packages))
        if not problems:
            problems = [*_on_this_machine(quantizer, run)] if to_train else []
            problems += [*_of_family(key, classes), *_of_training(run, key, quantizer, classes, method_config)]
        for problem, remedy in problems:
            report.refuse(key, name, problem, remedy)


Problems = Iterator[tuple[str, str]]


def _on_this_machine(quantizer: type[Any], run: RunSettings) -> Problems:
    from ..utils.devices import resolve_device

    reason = quantizer.usable(resolve_device(run.device)) if _available(run.device) else None
    if reason is not None:
        yield f"cannot be used here: {reason}", f"set it to {NO_CHANGE}, or to another of `distill plugins list`"


def _available(device: str) -> bool:
    """Return whether the device is on this machine; one that is not is refused by its own key."""
    return not device.startswith("cuda") or cuda_available()


def _of_family(key: str, classes: dict[str, type[Any]]) -> Problems:
    family = classes.get("family")
    if family is None:
        return
    able = family.capabilities
    if key in (BASE, TEACHER) and not able.quantised_base:
        yield f"the family {family.name!r} does not quantise its base", f"set it to {NO_CHANGE}"
    elif key in TEXT_ENCODERS and TEXT_ENCODERS[key] > able.quantised_text_encoders:
        count = able.quantised_text_encoders
        yield f"the family {family.name!r} quantises {count or 'no'} text encoders", f"set it to {NO_CHANGE}"


def _of_training(
    run: RunSettings, key: str, quantizer: type[Any], classes: dict[str, type[Any]], method_config: Any
) -> Problems:
    from ..plugin_api.method import MethodSetup

    full = run.model_type == "full"
    if full and key != TEACHER:
        what = "is what model_type full trains" if key == BASE else "is exported whole with model_type full"
        problem = f"a quantised network only goes with a LoRA: this one {what}"
        beside = f"; {TEACHER} quantises the teacher beside the student" if key == BASE else ""
        yield problem, f"set model_type to lora, or {key} to {NO_CHANGE}{beside}"
        return
    if not full and key == TEACHER:
        problem = "the teacher of a LoRA is the LoRA's own base with the adapter off, one network in memory"
        yield problem, f"set {BASE} to it instead, which quantises both, and {TEACHER} to {NO_CHANGE}"
        return
    method, setup = classes.get("method"), MethodSetup(run.model_type, use_ema=run.use_ema)
    if key in TEXT_ENCODERS or method is None or method_config is None:
        return
    yield from _of_method(key, quantizer, method, method_config, setup)


def _of_method(key: str, quantizer: type[Any], method: Any, method_config: Any, setup: MethodSetup) -> Problems:
    from ..engine.returned import roles_of

    whole = [role.name for role in roles_of(method, method_config, setup) if role.trains == "full"]
    if whole and key == BASE:
        problem = f"the method {method.name!r} trains all weights of a copy of the base ({', '.join(whole)})"
        yield problem, f"set it to {NO_CHANGE}"
    if method.requires(method_config, setup).forward_ad and not quantizer.forward_ad:
        problem = f"the method {method.name!r} differentiates the network in forward mode, which its layers cannot"
        yield problem, f"set it to int8-torchao or {NO_CHANGE}, or choose the method's way without"
