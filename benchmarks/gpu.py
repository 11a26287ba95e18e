"""Speed and memory of distillation at the size of SDXL, on the GPU there is.

    python benchmarks/gpu.py [--method lcm] [--steps 40] [--workspace FOLDER] [--json FILE] [--rows bf16,int8]
    python benchmarks/gpu.py --small --device cpu --steps 4        # the same on a small network, to try the script

Writes an SDXL of the published sizes with random weights (2.57B parameters in the UNet, 7 GB on disk in half precision)
and sixteen random images of 1024x1024, then calls `distill run` once for each row of the table: whole runs, with
caches, clipping, metrics and export. Speed is the median over the steps after the first ten; it does not depend on the
weights' values. Memory is what torch allocated at most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from step_workspace import write_images, write_model

WARM_UP = 10
ROWS: dict[str, list[str]] = {
    "bf16": [],
    "bf16, no gradient checkpointing": ["gradient_checkpointing=false"],
    "bf16, batch 4": ["train_batch_size=4"],
    "fp16": ["mixed_precision=fp16"],
    "bf16 weights of the adapter": ["optimizer=adamw_bf16"],
    "int8-torchao": ["base_model_precision=int8-torchao"],
    "int8-quanto": ["base_model_precision=int8-quanto"],
    "fp8-torchao": ["base_model_precision=fp8-torchao"],
    "nf4-bnb": ["base_model_precision=nf4-bnb"],
}
"""Name of a row -> what it changes of :data:`COMMON`."""
COMMON = [
    "train_batch_size=1", "gradient_checkpointing=true", "mixed_precision=bf16", "lora_rank=64", "learning_rate=1e-4",
    "validation_step_interval=0", "checkpoint_step_interval=0", "evaluation_num_samples=0", "log_step_interval=1",
    "report_to=tensorboard",
]  # fmt: skip


def write_sdxl(folder: Path, device: str) -> None:
    """A pipeline of SDXL's published sizes, random, in half precision."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    small = Path(__file__).resolve().parent.parent / "model_families" / "assets" / "sdxl_miniature"
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        ).half()  # fmt: skip
        vae = AutoencoderKL(
            sample_size=1024, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=0.13025, force_upcast=True,
        ).half()  # fmt: skip
        sizes = {"max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
        first = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768,
                               num_hidden_layers=12, **sizes)  # fmt: skip
        second = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_attention_heads=20, projection_dim=1280,
                                num_hidden_layers=32, hidden_act="gelu", **sizes)  # fmt: skip
        encoders = CLIPTextModel(first).half(), CLIPTextModelWithProjection(second).half()
    tokenizers = [AutoTokenizer.from_pretrained(small / name) for name in ("tokenizer", "tokenizer_2")]
    StableDiffusionXLPipeline(
        vae=vae, unet=unet, text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1], scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012,
        beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"), add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip


def measure(workspace: Path, name: str, changes: Sequence[str], given: argparse.Namespace) -> dict[str, Any]:
    """One run: median samples per second, the most memory in GiB, or why it failed."""
    output = workspace / "runs" / "".join(c if c.isalnum() else "-" for c in name)
    edge = 128 if given.small else 1024
    settings = [*COMMON, f"resolution={edge}", "resolution_type=pixel", f"max_train_steps={given.steps}"]
    settings += [*changes, f"device={given.device}"]
    command = [sys.executable, "-m", "distill", "run", "--family", "sdxl", "--method", given.method, "--overwrite"]
    command += ["--model", str(workspace / "model"), "--data", str(workspace / "data.json")]
    command += ["--output-dir", str(output), *(word for setting in settings for word in ("--set", setting))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failed": reason[-1] if reason else f"exit code {done.returncode}"}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steady = [line["samples_per_second"] for line in lines[min(WARM_UP, given.steps // 2) :]]
    return {"samples_per_second": statistics.median(steady), "memory_gib": most_memory(output / "tensorboard")}


def most_memory(folder: Path) -> float:
    """GiB, of a run's TensorBoard log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tag = next(tag for tag in events.Tags()["scalars"] if tag.endswith("memory_gib"))
    return max(event.value for event in events.Scalars(tag))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="lcm")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", help="comma-separated beginnings of the names of rows; absent: all")
    parser.add_argument("--small", action="store_true", help="a network of 8M parameters at 128 px")
    parser.add_argument("--workspace", type=Path, default=Path("build") / "gpu")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args(arguments)
    workspace = given.workspace.resolve()
    if not (workspace / "model" / "model_index.json").is_file():
        write_model(workspace / "model") if given.small else write_sdxl(workspace / "model", given.device)
    write_images(workspace / "images", edge=128 if given.small else 1024)
    data = [{"id": "images", "instance_data_dir": str(workspace / "images"), "cache_dir_vae": str(workspace / "vae")}]
    data += [{"id": "text", "dataset_type": "text_embeds", "default": True, "cache_dir": str(workspace / "text")}]
    (workspace / "data.json").write_text(json.dumps(data))
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{card}, torch {torch.__version__}, {given.method}\n\n| | samples/s | GiB |\n| --- | --- | --- |")
    found = {}
    for name, changes in ROWS.items():
        if given.rows and not any(name.startswith(start) for start in given.rows.split(",")):
            continue
        found[name] = row = measure(workspace, name, changes, given)
        cells = row.get("failed") or f"{row['samples_per_second']:.2f} | {row['memory_gib']:.1f}"
        print(f"| {name} | {cells} |", flush=True)
    if given.json:
        given.json.write_text(json.dumps({"card": card, "rows": found}, indent=2))


if __name__ == "__main__":
    main()
