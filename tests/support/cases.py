"""Every registered method as tests run it: settings that make some cheaper, and variants."""

from __future__ import annotations

from functools import cache
from typing import Any

from distill.core.errors import UserError
from distill.core.plugin_api.method import MethodSetup
from distill.core.registry.registry import Registry
from support.networks import MeanRed, Vgg, network_file
from support.recipes import recipe, term

SHORT_DMD2 = {"fake_updates_per_student_update": 2, "num_inference_steps": 2}
SETTINGS = {
    "tcd/segments": {"segments": [2, 1], "adversarial_weight": [0.0, 0.5], "stage_shares": [1, 3], "r1_weight": 0.1},
    "dmd2": SHORT_DMD2,
    "dmd2/gan": {**SHORT_DMD2, "gan_weight": 0.1, "divergence": "js", "r1_weight": 0.1, "r1": "finite_difference"},
    "dmd2/sid": {**SHORT_DMD2, "loss": "sid", "guidance_scale": 2.0},
    "progressive": {"student_steps": [4, 2], "stage_shares": [1, 3]},
    "guidance": {"w_min": 2.0, "w_max": 6.0},
    "meanflow": {"w_min": 2.0, "w_max": 6.0},
    "meanflow/exact": {"derivative": "exact"},
    "kd": {"num_inference_steps": 2, "loss_type": "huber"},
    "kd/lpips": {"num_inference_steps": 2, "loss_type": "lpips", "lpips_network": network_file(Vgg)},
    "reward": {"num_inference_steps": 2, "gradient_calls": 2, "network": network_file(MeanRed)},
}
"""Method, and a variant's name where there are several -> settings."""
TERMS = (term("pcm", 1.0, adversarial_weight=0.0), term("dmd2", {0: 0.0, 2: 0.5}, **SHORT_DMD2))


@cache
def registry() -> Registry:
    """What is built in."""
    return Registry.load(installed=False)


def found_of(case: str) -> Any:
    """The method of a case."""
    return registry().get("method", case.partition("/")[0])


def config_of(case: str) -> Any:
    """The settings of a case."""
    return recipe(registry(), *TERMS) if case == "recipe" else found_of(case).Config(**SETTINGS.get(case, {}))


def refusal(case: str, model_type: Any) -> UserError | None:
    """What the method says against this kind of training."""
    try:
        found_of(case).requires(config_of(case), MethodSetup(model_type))
        found_of(case).roles(config_of(case), MethodSetup(model_type))
    except UserError as error:
        return error
    return None
