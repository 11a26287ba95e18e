"""Which strategy fits which model on which cards: the table of docs/scaling.md, from configs alone.

    python benchmarks/strategies.py [--resolution 1024]
    python benchmarks/strategies.py --cards             # what small cards can do: the table of docs/low-memory.md

Writes the published configs of SDXL, Stable Diffusion 3.5 large and FLUX.1 (no weights), and asks the same arithmetic
as `distill doctor --processes N`: one image of 1024 px per process, bf16, gradient checkpointing, AdamW in fp32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.core.config.load import load_configuration
from distill.core.registry.registry import Registry
from distill.core.runs.builders import build_family
from distill.core.runs.planned_memory import planned_memory
from distill.core.utils.memory import MemorySettings, peak, phases
from distill.core.utils.process_memory import division_problem, process_memory
from distill.core.utils.strategies import STRATEGIES, Division, ParallelSettings

CARDS = (24, 48, 80)
PROCESSES = (1, 2, 8)
PHASES = ("encode", "train", "validate", "export")
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "sample_size": 128, "in_channels": 4, "out_channels": 4,
    "block_out_channels": [320, 640, 1280], "layers_per_block": 2, "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD35: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16,
    "num_layers": 38, "attention_head_dim": 64, "num_attention_heads": 38, "joint_attention_dim": 4096,
    "caption_projection_dim": 2432, "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "qk_norm": "rms_norm",
}  # fmt: skip
FLUX: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": 19,
    "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
DDPM = {
    "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon", "num_train_timesteps": 1000, "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], int]] = {
    "SDXL": ("sdxl", "unet", UNET, DDPM, 4),
    "SD 3.5 large": ("sd3", "transformer", SD35, FLOW, 16),
    "FLUX.1 dev": ("flux", "transformer", FLUX, FLOW, 16),
}
"""Name -> family, folder of the denoiser, its config, the scheduler's, channels of latents."""
RUNS: dict[str, list[str]] = {
    "LoRA, rank 64": ["distillation_method=lcm", "model_type=lora", "lora_rank=64"],
    "full, with an average": [
        "distillation_method=lcm",
        "model_type=full",
        "distillation_config.lcm.w_min=4",
        "distillation_config.lcm.w_max=4",
    ],
    "full DMD2, three networks": ["distillation_method=dmd2", "model_type=full"],
}
SMALL: dict[int, tuple[str, list[str]]] = {
    16: ("SDXL", ["distillation_method=dmd2"]),
    12: ("SDXL", ["distillation_method=lcm", "base_model_precision=int8-torchao"]),
    8: ("SDXL", ["distillation_method=lcm", "base_model_precision=nf4-bnb", "optimizer=ao-adamw8bit"]),
    24: ("FLUX.1 dev", ["distillation_method=lcm", "base_model_precision=nf4-bnb"]),
}
"""Size of a card in GB -> a model and a LoRA run of rank 64 for it."""
COMMON = [
    "train_batch_size=1", "gradient_checkpointing=true", "mixed_precision=bf16", "max_train_steps=1000",
    "optimizer=adamw", "report_to=none", "device=cpu",
]  # fmt: skip


def write_configs(folder: Path, model: str) -> Path:
    """Write the configs that an estimate needs of a model, without weights."""
    _, denoiser, network, scheduler, channels = MODELS[model]
    vae = {
        "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    }  # fmt: skip
    for name, config in {denoiser: network, "vae": vae}.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text("{}")
    return folder


def planned(
    workspace: Path, model: str, *, resolution: int = 1024, runs: Mapping[str, list[str]] = RUNS
) -> Iterator[tuple[str, MemorySettings]]:
    """Yield each of these runs of a model with what its memory depends on."""
    registry = Registry.load(installed=False)
    folder = write_configs(workspace / model.replace(" ", "-"), model)
    images, data = workspace / "images", workspace / "data.json"
    images.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps([{"id": "images", "instance_data_dir": str(images)}]))
    family = None
    for run, keys in runs.items():
        flags = {"model_family": MODELS[model][0], "pretrained_model_name_or_path": str(folder)}
        size = [f"resolution={resolution}", "resolution_type=pixel", f"output_dir={workspace / 'output'}"]
        configuration = load_configuration(registry, data_file=data, flags=flags, overrides=[*COMMON, *size, *keys])
        if family is None:
            family = build_family(configuration, registry)
            family.text_bytes = lambda: 0  # their configs are not here, and they have left when training begins
        settings = planned_memory(configuration, registry, family=family)
        assert settings is not None
        yield run, replace(settings, staged=False)  # on cards a checkpoint is copied to the host


def row(settings: MemorySettings, number: int) -> list[str]:
    """Return the cells of one number of processes: GB on each by strategy, then the first that fits each card."""
    ways = [*map(ParallelSettings, STRATEGIES), ParallelSettings("fsdp", offload=True)]
    choices = [Division(way, number) for way in ways]
    found = {each: process_memory(settings, each) for each in choices if division_problem(settings, each) is None}
    cells = [f"{found[each].total / 1e9:.0f}" if each in found else "–" for each in choices]
    cells[-1] += f" + {found[choices[-1]].host / 1e9:.0f}"
    for size in CARDS:
        cells.append(next((short(each) for each in found if found[each].total <= size * 1e9), "–"))
    return cells


def short(division: Division) -> str:
    """Return a strategy's name, with its offload."""
    return f"{division.strategy}, offloaded" if division.settings.offload else division.strategy


def table(rows: Mapping[str, Mapping[str, MemorySettings]]) -> str:
    """Return the table in Markdown: model -> run -> settings."""
    heads = ["model", "run", "cards", *STRATEGIES, "fsdp, offloaded", *(f"{size} GB" for size in CARDS)]
    lines = [heads, ["---"] * len(heads)]
    for model, runs in rows.items():
        for run, settings in runs.items():
            for number in PROCESSES:
                first = number == PROCESSES[0]
                lines.append([model if first else "", run if first else "", str(number), *row(settings, number)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def small_cards(workspace: Path) -> Iterator[tuple[int, str, float, dict[str, int]]]:
    """Yield each small card in GB, its run, the GB that the run takes, and those of each phase."""
    for size, (model, keys) in SMALL.items():
        runs = {"run": ["model_type=lora", "lora_rank=64", *keys]}
        ((_, settings),) = planned(workspace / str(size), model, runs=runs)
        yield size, f"{model}: {', '.join(keys)}", peak(settings) / 1e9, phases(settings)


def cards_table(workspace: Path) -> str:
    """Return the table of small cards in Markdown."""
    lines = [["card", "LoRA of rank 64, 1024 px, one image, bf16", "GB", *PHASES], ["---"] * (3 + len(PHASES))]
    for size, run, taken, by_phase in small_cards(workspace):
        lines.append([f"{size} GB", run, f"{taken:.1f}", *(f"{by_phase[each] / 1e9:.1f}" for each in PHASES)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=1024, help="edge of the images in pixels")
    parser.add_argument("--cards", action="store_true", help="print what small cards can do")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as workspace:
        if given.cards:
            print(cards_table(Path(workspace)))
            return
        print(table({m: dict(planned(Path(workspace), m, resolution=given.resolution)) for m in MODELS}))


if __name__ == "__main__":
    main()
