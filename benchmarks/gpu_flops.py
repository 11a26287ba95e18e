"""Model FLOPs of a distillation step, counted on the meta device, and the peaks of cards.

    MFU = FLOPs of a step / (seconds of a step x peak of the card)

FLOPs of a step are those of the denoiser's passes as the method makes them, for each role: forward passes, and backward
passes to what is trained and to what the gradient runs through. A multiplication and an addition are two. What gradient
checkpointing computes again is not counted, nor are heads, optimizers and averages, so that the figure can be compared
between settings. The formulas of `torch.utils.flop_counter` count matrix products, convolutions and attention.

    python benchmarks/gpu_flops.py      # counts again what gpu_flops.json holds of the published models

The counts are the same on every machine, and take minutes: those of the published models lie in gpu_flops.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_models import MODELS, Published, denoiser_config

COUNTED = Path(__file__).with_name("gpu_flops.json")
RANK = 64

PEAKS: dict[str, tuple[float, str]] = {
    "B200": (2250e12, "NVIDIA Blackwell datasheet"),
    "H200": (989.5e12, "NVIDIA H200 datasheet"),
    "H100 PCIe": (756e12, "NVIDIA H100 datasheet, PCIe"),
    "H100 NVL": (835e12, "NVIDIA H100 NVL datasheet"),
    "H100": (989.5e12, "NVIDIA H100 datasheet, SXM"),
    "A100": (312e12, "NVIDIA A100 datasheet"),
    "A10": (125e12, "NVIDIA A10 datasheet"),
    "L40S": (362e12, "NVIDIA L40S datasheet"),
    "L4": (121e12, "NVIDIA L4 datasheet"),
    "RTX 6000 Ada": (364e12, "NVIDIA RTX 6000 Ada datasheet"),
    "RTX 5090": (209.5e12, "NVIDIA RTX Blackwell whitepaper, with fp32 accumulation"),
    "RTX 4090": (165.2e12, "NVIDIA Ada whitepaper, with fp32 accumulation"),
    "RTX 3090": (71e12, "NVIDIA Ampere GA102 whitepaper, with fp32 accumulation"),
}
"""Part of a card's name -> FLOPs per second of its tensor cores in bf16 and fp16, without sparsity, and the source. Of
several that fit a name the longest counts. Rows in fp8 hold packed weights and multiply in bf16: theirs is the same."""
CALLS = 4
"""Most calls of dmd2's student in a simulation."""
TURN = 5
"""Steps of dmd2 of which one is the student's too."""


class Stop(Exception):
    """The features are there: what comes after them is not computed."""


@dataclass(frozen=True)
class PassFlops:
    """FLOPs of one pass of one sample, and of its backward pass.

    Attributes:
        teacher: Forward pass of the base.
        student: Forward pass of a network that is trained, with its adapters.
        backward: Backward pass to what is trained.
        features: Forward pass of the first half.
        features_backward: Its backward pass to what is trained, or to the sample.
    """

    teacher: float
    student: float
    backward: float
    features: float
    features_backward: float


def peak_flops(card: str) -> float | None:
    """Return the FLOPs per second that a card reaches at most in bf16; None for a name that is in no list."""
    fitting = [name for name in PEAKS if name in card]
    return PEAKS[max(fitting, key=len)][0] if fitting else None


def step_flops(method: str, one: PassFlops, *, guided_by_input: bool, calls: float = (1 + CALLS) / 2) -> float:
    """Return the FLOPs of a step of one sample.

    Args:
        method: ``lcm``, or ``dmd2`` with its adversarial term: the mean of :data:`TURN` steps.
        one: Of its passes.
        guided_by_input: Whether guidance takes one call of the teacher in place of two.
        calls: Calls of dmd2's student in a simulation; by default their mean.
    """
    guided = (1 if guided_by_input else 2) * one.teacher
    if method == "lcm":
        return guided + one.student + one.student + one.backward
    every_step = calls * one.student + (one.student + one.backward) + 2 * (one.features + one.features_backward)
    matched = one.backward + one.student + guided + one.features + one.features_backward
    return every_step + matched / TURN


def count_passes(
    model: Published, targets: Sequence[str], *, edge: int, rank: int, full: bool, small: bool = False
) -> PassFlops:
    """Return the FLOPs of the passes of one sample, counted without memory for a single weight.

    Args:
        model: Which one.
        targets: Modules that are adapted.
        edge: Edge of the images in pixels.
        rank: Rank of adapters.
        full: Whether all weights are trained, without adapters.
        small: Count the small network.
    """
    import diffusers
    import torch
    from peft import LoraConfig

    config = denoiser_config(model, small=small)
    with torch.device("meta"):
        network = getattr(diffusers, model.network)(**config).requires_grad_(full)
        teacher = _counted(lambda: _call(network, model, config, edge=edge))[0]
        if not full:
            network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))
        trained = [p for p in network.parameters() if p.requires_grad]
        student, backward = _counted(lambda: _call(network, model, config, edge=edge), trained)
        with _stopping(network) as features:
            half, half_backward = _counted(lambda: features(lambda: _call(network, model, config, edge=edge)), trained)
    return PassFlops(teacher, student, backward, half, half_backward)


def _counted(forward: Callable[[], Any], trained: Sequence[Any] = ()) -> tuple[float, float]:
    """Return the FLOPs of a pass, and of its backward pass to `trained` where there is any."""
    import torch

    with torch.set_grad_enabled(bool(trained)), flop_counting() as ahead:
        output = forward()
    if not trained:
        return ahead[0], 0.0
    with flop_counting() as behind:
        torch.autograd.grad(output.sum(), trained, allow_unused=True)
    return ahead[0], behind[0]


@contextmanager
def flop_counting() -> Iterator[list[float]]:
    """Give a list whose one number are the FLOPs of the block, by the formulas of ``torch.utils.flop_counter``.

    Its own mode counts them by module too, which takes minutes for a network of thousands of modules.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            formula = flop_registry.get(func.overloadpacket)
            if formula is not None:
                found[0] += formula(*args, **(kwargs or {}), out_val=result)
            return result

    found = [0.0]
    with Counter():
        yield found


@contextmanager
def _stopping(network: Any) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Give a function that makes a pass and returns the features at its middle, inside the block."""
    found: list[Any] = []

    def stop(module: Any, args: Any, output: Any) -> None:
        found.append(output[-1] if isinstance(output, tuple) else output)
        raise Stop

    handle = _middle(network).register_forward_hook(stop)

    def features(forward: Callable[[], Any]) -> Any:
        with suppress(Stop):
            forward()
        return found.pop()

    try:
        yield features
    finally:
        handle.remove()


def _middle(network: Any) -> Any:
    if hasattr(network, "mid_block"):
        return network.mid_block
    blocks = [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", ())]
    return blocks[len(blocks) // 2 - 1]


def _call(network: Any, model: Published, config: dict[str, Any], *, edge: int) -> Any:
    """Return the output for one sample of an image of `edge` pixels."""
    import torch

    size, t = edge // 8, torch.zeros(1)
    if model.family == "sdxl":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        added = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
        text = torch.zeros(1, model.tokens, config["cross_attention_dim"])
        return network(torch.zeros(1, model.channels, size, size), t, text, added_cond_kwargs=added).sample
    text = torch.zeros(1, model.tokens, config["joint_attention_dim"])
    pooled = torch.zeros(1, config["pooled_projection_dim"])
    if model.family == "sd3":
        sample = torch.zeros(1, model.channels, size, size)
        return network(sample, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample
    positions = (size // 2) ** 2
    return network(
        torch.zeros(1, positions, config["in_channels"]), encoder_hidden_states=text, pooled_projections=pooled,
        timestep=t, img_ids=torch.zeros(positions, 3), txt_ids=torch.zeros(model.tokens, 3), guidance=torch.ones(1),
    ).sample  # fmt: skip


def counted_passes(
    name: str, targets: Sequence[str], *, edge: int, full: bool, small: bool = False, rank: int = RANK
) -> PassFlops:
    """Return the FLOPs of the passes of a model by its name, counted by now or before."""
    key = f"{name}, {'full' if full else 'lora'}, {edge} px"
    known = json.loads(COUNTED.read_text()) if COUNTED.is_file() else {}
    if key in known and not small:
        return PassFlops(**known[key])
    return count_passes(MODELS[name], targets, edge=edge, rank=rank, full=full, small=small)


def main() -> None:
    """Count the passes of the published models, and write them down as they come."""
    from distill.core.registry.registry import Registry

    registry, known = Registry.load(installed=False), {}
    for name, model in MODELS.items():
        targets = registry.get("family", model.family).lora_targets
        for full in (False, True):
            for edge in (1024, 512):
                found = count_passes(model, targets, edge=edge, rank=RANK, full=full)
                known[f"{name}, {'full' if full else 'lora'}, {edge} px"] = asdict(found)
                COUNTED.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
