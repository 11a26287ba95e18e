"""Every quantizer and every optimizer on a device: what a network of SDXL's size takes, and whether short runs end.

    python benchmarks/quantizers.py --device cuda

Weights are random: memory, time and the error of rounding are what is measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from distill.core.engine.networks import AdapterSwitch
from distill.core.plugin_api.quantizer import stored_bytes
from distill.core.registry.registry import Registry
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def network(device: str) -> nn.Module:
    """A random UNet of SDXL's size in bfloat16, on the host, made on the device."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**SDXL).to(torch.bfloat16)  # type: ignore[arg-type]
    return unet.requires_grad_(False).eval().cpu()


def call(unet: nn.Module, device: str) -> torch.Tensor:
    """One forward of 1024 x 1024 pixels from fixed inputs."""
    rng = torch.Generator().manual_seed(1)
    given = [torch.randn(shape, generator=rng).to(device) for shape in ((1, 4, 128, 128), (1, 77, 2048), (1, 1280))]
    added = {"text_embeds": given[2], "time_ids": torch.zeros(1, 6, device=device)}
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        return unet(given[0], torch.tensor([500], device=device), given[1], added_cond_kwargs=added).sample


def measure(registry: Registry, name: str | None, device: str, expected: torch.Tensor | None) -> torch.Tensor:
    """Print what a training step of a LoRA takes on this base; returns the bare base's output."""
    from peft import LoraConfig

    unet = network(device)
    before, on_cuda = stored_bytes(unet), device.startswith("cuda")
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    kept = before
    if name is None:
        unet = unet.to(device)
    else:
        found = registry.get("quantizer", name)
        quantizer = found(found.Config())
        unet = quantizer.quantize(unet, device=device, keep=("conv_in",))
        kept = quantizer.stored_bytes(unet)
    with torch.no_grad():
        bare = call(unet, device).float().cpu()
    unet.add_adapter(LoraConfig(r=64, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]), "student")  # type: ignore[operator]
    for key, weight in unet.named_parameters():
        if "lora_" in key:
            weight.data = weight.data.float()
    switch, times = AdapterSwitch(unet), []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing(switch.checkpoint)  # type: ignore[operator]
        for _ in range(2):
            start = time.perf_counter()
            with switch.use("student"):
                call(unet, device).float().square().mean().backward()
            if on_cuda:
                torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 1e9 if on_cuda else 0.0
        times.append(f"{time.perf_counter() - start:.2f} s, peak {peak:.1f} GB")
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
    error = 0.0 if expected is None else ((bare - expected).norm() / expected.norm()).item()
    grads = [weight.grad for weight in unet.parameters() if weight.grad is not None]
    fine = "finite" if all(bool(torch.isfinite(grad).all()) for grad in grads) else "NOT FINITE"
    print(
        f"{name or 'no_change':14} {before / 1e9:.2f} -> {kept / 1e9:.2f} GB, error {error:.4f}, "
        f"{len(grads)} gradients {fine}; step {times[0]}; checkpointed {times[1]}",
        flush=True,
    )
    return bare


def runs(registry: Registry, device: str) -> None:
    """Short runs of a tiny model with each quantizer and each optimizer."""
    from support.small_run import execute, losses, write_run

    root = Path(tempfile.mkdtemp())
    cases = [("base_model_precision", name) for name in registry.names("quantizer")]
    cases += [("optimizer", name) for name in registry.names("optimizer")]
    for key, name in cases:
        rate = registry.get("optimizer", name).default_learning_rate if key == "optimizer" else None
        settings = {key: name, "device": device, "mixed_precision": "bf16", "learning_rate": rate or 1e-3}
        settings["quantizer_config"] = {"int4-torchao": {"group_size": 16}}
        start = time.perf_counter()
        try:
            execute(write_run(root, output=f"whole-{name}", max_train_steps=6, **settings))
            execute(write_run(root, output=f"parts-{name}", max_train_steps=4, **settings))
            execute(write_run(root, output=f"parts-{name}", max_train_steps=6, **settings))
        except Exception as error:  # the others are of interest all the same
            print(f"{key} {name}: FAILED {type(error).__name__}: {error}", flush=True)
            continue
        same = losses(root / f"whole-{name}") == losses(root / f"parts-{name}")
        print(
            f"{key} {name}: resumed run {'same' if same else 'DIFFERS'}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--skip-size", action="store_true", help="leave out the network of SDXL's size")
    arguments = parser.parse_args()
    plugins = Registry.load(installed=False)
    if not arguments.skip_size:
        plain = measure(plugins, None, arguments.device, None)
        for quantizer_name in plugins.names("quantizer"):
            measure(plugins, quantizer_name, arguments.device, plain)
    runs(plugins, arguments.device)
