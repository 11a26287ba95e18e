"""LoRAs on networks and in pipelines that diffusers gives none: its own loaders, added to the class.

A student's adapter is in the same file as everywhere, ``pytorch_lora_weights.safetensors`` with ``transformer.`` before
each name, which peft reads in a few plain lines (:mod:`..bases.usage`).
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


@cache
def with_adapters(network: type[Any]) -> type[Any]:
    """Return the class of a network, with diffusers' calls for adapters where it lacks them; its name stays."""
    from diffusers.loaders import PeftAdapterMixin

    return network if issubclass(network, PeftAdapterMixin) else _joined(network, PeftAdapterMixin)


@cache
def with_lora_files(pipeline: type[Any], part: str) -> type[Any]:
    """Return the class of a pipeline, which loads and saves LoRAs of its transformer where it does not; its name
    stays.
    """
    from diffusers.loaders import SanaLoraLoaderMixin  # of those for one transformer without text encoders

    return pipeline if loads_loras(pipeline, part) else _joined(pipeline, SanaLoraLoaderMixin)


def loads_loras(pipeline: type[Any], part: str) -> bool:
    """Return True if diffusers' own class of a pipeline loads LoRAs of its network `part`; some have the loader of
    others, which knows a ``unet`` alone.
    """
    save = getattr(pipeline, "save_lora_weights", None)
    return save is not None and f"{part}_lora_layers" in inspect.signature(save).parameters


def _joined(kind: type[Any], loader: type[Any]) -> type[Any]:
    # files name the class and its module: to diffusers it is the one that it knows
    return type(kind.__name__, (loader, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
