"""What a single file says of its own noise: markers among its tensors, and strings in its header.

ComfyUI writes empty tensors (``v_pred``, ``ztsnr``) and ``modelspec.predict_key``; the ModelSpec standard has
``modelspec.prediction_type`` and ``modelspec.resolution``; sd-scripts writes ``ss_v_parameterization`` and
``ss_zero_terminal_snr``. EDM's models have tensors ``edm_mean``, ``edm_std`` or ``edm_vpred.sigma_max``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...core.errors import UserError

EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
ZERO_SNR_KEYS = ("ss_zero_terminal_snr", "modelspec.zero_terminal_snr", "zero_terminal_snr", "ztsnr")
V_ARCHITECTURE = re.compile(r"-v$")
"""End of ``modelspec.architecture`` of models that predict v, as ``stable-diffusion-v2-768-v``."""
PREDICTIONS: Mapping[str, str] = {
    **dict.fromkeys(("v", "vpred", "v_pred", "v_prediction", "velocity"), "v_prediction"),
    **dict.fromkeys(("eps", "epsilon"), "epsilon"),
    **dict.fromkeys(("sample", "x0"), "sample"),
}
RESOLUTION = re.compile(r"\s*(\d{2,5})\s*(?:[x,]\s*(\d{2,5}))?\s*")


@dataclass(frozen=True)
class Sign:
    """One statement of a file about its noise.

    Attributes:
        origin: Where it stands, in words.
        key: The scheduler config's key that it speaks of.
        value: In the scheduler config's words.
    """

    origin: str
    key: str
    value: Any


def refuse_edm(name: str, tensors: Collection[str]) -> None:
    """Raise UserError where the tensors say that the model was trained by EDM."""
    found = [marker for marker in EDM if marker in tensors]
    if found:
        raise UserError(
            f"single file {name!r} is a model of EDM's noise ({', '.join(found)}), which has no table of betas",
            "name a model that was trained on DDPM's noise or on a flow; EDM's (Playground v2.5, CosXL) cannot be "
            "distilled by this family",
        )


def read_signs(tensors: Collection[str], metadata: Mapping[str, str]) -> list[Sign]:
    """Return every statement of a single file about its prediction type and its terminal SNR."""
    return [*_of_prediction(tensors, metadata), *_of_zero_snr(tensors, metadata)]


def _of_prediction(tensors: Collection[str], metadata: Mapping[str, str]) -> Iterator[Sign]:
    if "v_pred" in tensors:
        yield Sign("tensor v_pred", "prediction_type", "v_prediction")
    for key in PREDICTION_KEYS:
        if said := metadata.get(key):
            value = PREDICTIONS.get(said.strip().lower().replace("-", "_"), said)
            yield Sign(f"{key} = {said!r}", "prediction_type", value)
    if V_ARCHITECTURE.search(said := metadata.get("modelspec.architecture", "")):
        yield Sign(f"modelspec.architecture = {said!r}", "prediction_type", "v_prediction")
    if _true(metadata.get("ss_v_parameterization")):
        yield Sign("ss_v_parameterization = True", "prediction_type", "v_prediction")


def _of_zero_snr(tensors: Collection[str], metadata: Mapping[str, str]) -> Iterator[Sign]:
    if "ztsnr" in tensors:
        yield Sign("tensor ztsnr", "rescale_betas_zero_snr", True)
    for key in ZERO_SNR_KEYS:
        if _true(metadata.get(key)):
            yield Sign(f"{key} = {metadata[key]!r}", "rescale_betas_zero_snr", True)


def _true(said: str | None) -> bool:
    return (said or "").strip().lower() in ("true", "1", "yes")


def agreed(name: str, signs: Collection[Sign], config: Mapping[str, Any], chosen: Collection[str]) -> dict[str, Any]:
    """Return what the signs add to the scheduler config.

    Args:
        name: The model, for messages.
        signs: The file's.
        config: The scheduler config beside it, which may be that of another model.
        chosen: Keys that the user has set, on which nothing needs to agree.

    Raises:
        UserError: The signs contradict each other, or a config that says more than the base models' default.
    """
    found: dict[str, Any] = {}
    for key in {sign.key for sign in signs} - set(chosen):
        said = {sign.value: sign.origin for sign in signs if sign.key == key}
        if config.get(key) == "v_prediction":  # no base's default: somebody chose it for this model
            said.setdefault(config[key], "scheduler_config.json")
        if len(said) > 1:
            told = ", ".join(f"{origin} says {value}" for value, origin in said.items())
            raise UserError(f"model {name!r} contradicts itself: {told}", f"set family_config.{key} to the right one")
        found[key] = next(iter(said))
    return found


def stated_resolution(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """Return (width, height) in pixels of ``modelspec.resolution``; None where the file says none."""
    match = RESOLUTION.fullmatch(metadata.get("modelspec.resolution", ""))
    return (int(match[1]), int(match[2] or match[1])) if match else None
