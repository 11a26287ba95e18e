"""The return values of a method's own code, each checked where it enters the engine, with a message for its author."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..diffusion.sampler import Sampler
from ..errors import PluginError
from ..plugin_api.method import Method, MethodSetup, Role
from ..registry.attribution import owner, short

if TYPE_CHECKING:
    from ..diffusion.schedule import Schedule


def wrong(method: type[Method], function: str, what: str, remedy: str) -> PluginError:
    """Return the error about something that a function of a method has done.

    Args:
        method: The method.
        function: Name of its function.
        what: What the function did, as ``returned str``.
        remedy: How its author mends it, as a sentence.
    """
    who = owner(method.__module__) or f"method {method.name!r}"
    return PluginError(f"{who}: {method.__qualname__}.{function} {what}. {remedy}")


def roles_of(method: type[Method], config: Any, setup: MethodSetup) -> list[Role]:
    """Return the roles that a method declares.

    Raises:
        PluginError: They are something else.
    """
    found: object = method.roles(config, setup)
    listed = list(found) if isinstance(found, Iterable) and not isinstance(found, str) else [found]
    strange = [each for each in listed if not isinstance(each, Role)]
    if strange:
        remedy = (
            'Return `[distill.Role("teacher"), distill.Role("student", trains=setup.model_type)]`, and further ones.'
        )
        raise wrong(method, "roles", f"returned {_described(strange[0])}, not a distill.Role", remedy)
    roles = [each for each in listed if isinstance(each, Role)]
    for role in roles:
        problem = _build_problem(role)
        if problem:
            remedy = "A factory goes with trains='module', or, for a frozen network, with trains='none'."
            raise wrong(method, "roles", f"declares {role.name!r} {problem}", remedy)
    return roles


def _build_problem(role: Role) -> str | None:
    """Return what is wrong with the factory of a role; None where nothing is."""
    if role.trains == "module" and role.build is None:
        return "with trains='module' and without build"
    if role.build is not None and role.trains not in ("module", "none"):
        return f"with build and trains={role.trains!r}"
    if role.build is not None and role.source is not None:
        return f"with build, and as made of {role.source!r}"
    if role.build is not None and role.name in ("teacher", "student"):
        return "with build; this one is a network of the family"
    return None


def sampler_of(
    method: Method, schedule: Schedule, *, num_inference_steps: int | None = None, guidance_scale: float | None = None
) -> Sampler:
    """Return the sampler that a method names, at its default or the given steps and guidance.

    Raises:
        PluginError: It is something else, as a scheduler of diffusers.
    """
    found: object = method.sampler(schedule, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    if not isinstance(found, Sampler):
        remedy = (
            "Return `distill.Sampler(scheduler, config, num_inference_steps, guidance_scale)`, which names a scheduler "
            'of diffusers ("DDIMScheduler") and its settings; the engine makes it. `deterministic_sampler` and '
            "`multistep_sampler` of distill.core.diffusion return one."
        )
        raise wrong(type(method), "sampler", f"returned {_described(found)}, not a distill.Sampler", remedy)
    return found


def _described(value: object) -> str:
    plain = isinstance(value, str | int | float | type) or value is None
    return short(value) if plain else type(value).__name__
