"""The folder of a finished run whose student is a random LoRA: what the engine trains is tested elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from distill.core.config.load import load_configuration
from distill.core.engine.networks import Networks
from distill.core.plugin_api.family import ExportInfo
from distill.core.registry.registry import Registry
from distill.core.runs.builders import build_family, build_method, lora_settings
from distill.core.runs.output_folder import RESOLVED
from support.small_run import write_run


def write_finished_run(root: Path, **settings) -> Path:
    """A random tiny SDXL, its data and `out/` with the student, and the same LoRA again in `style/`; returns `out/`."""
    registry = Registry.load(installed=False)
    file = write_run(root, **{"validation_prompt": ["a noise", "b"], **settings})
    configuration = load_configuration(registry, config_file=file)
    family = build_family(configuration, registry)
    method = build_method(configuration, registry, family)
    lora = lora_settings(configuration)
    networks = Networks(family, method.roles(configuration.method, method.setup), lora=lora, seed=0)
    g = torch.Generator().manual_seed(0)
    for parameter in networks.parameters("student"):
        parameter.data = torch.randn(parameter.shape, generator=g) * 0.1
    output = configuration.run.output_dir
    sampler = method.sampler(family.schedule, num_inference_steps=2)
    for folder in (output / "student", root / "style"):
        folder.mkdir(parents=True)
        with networks.use("student") as network:
            family.export(network, folder, ExportInfo(sampler=sampler, model_type="lora", lora=lora))
    (output / RESOLVED).write_text(json.dumps(configuration.resolved()))
    return output
