"""Memory: the use of a run, an estimate of it beforehand, and ways to reduce it when it does not fit."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import described
from .simulated_training import KeptBytes

ACTIVATIONS_PER_PIXEL = 5.5
"""Saved elements per latent pixel and per sqrt(parameters), LoRA, for a network that cannot be simulated: those of
SDXL's UNet (rank 64, autocast on CUDA); other networks differ by a small factor."""
CHECKPOINTED_SHARE = 0.11
"""Share of those that stays with gradient checkpointing on SDXL: the blocks' inputs, and one block at once."""
TINY_DECODER = 4
"""How many times as much SDXL's autoencoder takes as a tiny one to decode with a gradient, measured at 512 pixels."""
OVERHEAD_BYTES = 600 * 2**20
"""Bytes of the process itself: the interpreter, torch and diffusers, or a CUDA context."""


CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
     "total_inactive_file"),
)  # fmt: skip
"""Where a container sees its limit and its use of memory, and what of that use can be given back: version 2, and 1."""


def peak_memory_bytes(device: str = "cpu") -> int:
    """Return the most bytes this process has held: allocated by torch on a CUDA device, elsewhere its resident set."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        # Not getrusage: its maximum survives exec, so what a large process starts would report the large one.
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    if os.name == "posix":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    import psutil

    return psutil.Process().memory_info().peak_wset  # pyright: ignore[reportAttributeAccessIssue]  # Windows only


def free_memory_bytes(device: str = "cpu") -> int:
    """Return the bytes that can still be allocated on a device: of the machine, or of this process's control group."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    limits = [psutil.virtual_memory().available]
    for limit, used, cached in CONTROL_GROUPS:
        most, now = _number_in(Path(limit)), _number_in(Path(used))
        if most is not None and now is not None:
            limits.append(max(most - now + _reclaimable(Path(used).with_name("memory.stat"), cached), 0))
    return min(limits)


def _number_in(file: Path) -> int | None:
    try:
        return int(file.read_text("ascii"))
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return None


def _reclaimable(file: Path, name: str) -> int:
    """Return the bytes of files in memory that the system gives back when it needs them."""
    try:
        lines = dict(line.split() for line in file.read_text("ascii").splitlines())
        return int(lines.get(name, 0))
    except (OSError, ValueError):
        return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if `error` means that an allocation failed, on the host or on the device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = described(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


@dataclass(frozen=True)
class MemorySettings:
    """The settings that a run's memory depends on.

    Attributes:
        base_parameters: Parameters of the denoiser.
        trained_parameters: Parameters that an optimizer steps (of the adapter, or of the whole student).
        latent_pixels: h * w of the latents.
        batch: Samples of a micro-batch.
        base_bytes: Bytes per frozen weight (4, 2; 1 for int8).
        compute_bytes: Bytes per activation (2 under mixed precision).
        trained_bytes: Bytes per trained weight and gradient.
        optimizer_bytes: Bytes of optimizer state per trained weight (AdamW in fp32: 8).
        idle_parameters: Those of the trained parameters that no loss reaches, without gradients and optimizer state:
            what lies behind the features of a network of which features are all that is read.
        largest_role: Those of the trained parameters that belong to the largest role, which is what has gradients at a
            time: each role is stepped, and its gradients are dropped, before those of the next are made; None: all.
        averaged_parameters: Parameters that averages hold, in fp32.
        student_parameters: Those of the trained parameters that are exported; None: all.
        gradient_checkpointing: Whether activations are recomputed in the backward pass.
        activation_offload: Whether what is kept for the backward pass waits in the host's memory.
        kept: Bytes that one sample keeps for the backward pass, in `compute_bytes`; None where they are not known.
        decoding_bytes: Bytes of the autoencoder and of its activations, where latents are decoded with a gradient.
        own_decoder: Whether it is the model's autoencoder that decodes them, not one that the configuration names.
        auxiliary_bytes: Bytes of the weights of frozen networks that a method brings, as of LPIPS or of a reward.
        quantisable: Whether the base may be quantised: no copy of it is trained.
        full_student: Whether the student has all weights of its own, so that the base is its teacher alone.
        full_roles: Number of the roles that train a whole network.
        full_parameters: Those of the trained parameters that belong to them; the rest are of adapters and heads.
        averaged_full_parameters: Those of the averaged parameters that are averages or copies of whole networks.
        largest_unit: Parameters of the largest block of the denoiser that is gathered as one where weights are sharded.
        outside_units: Parameters of the denoiser that lie in no block.
        staged: Whether checkpoints are copied into the same memory before they are written, where there is room.
        encoding_bytes: Bytes of the encoders and their activations while the caches are built, the larger of both.
        loading_bytes: Bytes of the base while LoRAs are fused into it, not yet quantised; 0 where none are.
        validating_bytes: Bytes of the autoencoder and its activations while images of a validation are decoded.
        exporting_bytes: Bytes of what an export needs beside the networks.
    """

    base_parameters: int
    trained_parameters: int
    latent_pixels: int
    batch: int = 1
    base_bytes: float = 4
    compute_bytes: float = 4
    trained_bytes: float = 4
    optimizer_bytes: float = 8
    idle_parameters: int = 0
    largest_role: int | None = None
    averaged_parameters: int = 0
    student_parameters: int | None = None
    gradient_checkpointing: bool = False
    activation_offload: bool = False
    kept: KeptBytes | None = None
    decoding_bytes: int = 0
    own_decoder: bool = True
    auxiliary_bytes: int = 0
    quantisable: bool = True
    full_student: bool = False
    full_roles: int = 0
    full_parameters: int = 0
    averaged_full_parameters: int = 0
    largest_unit: int = 0
    outside_units: int = 0
    staged: bool = False
    encoding_bytes: int = 0
    loading_bytes: int = 0
    validating_bytes: int = 0
    exporting_bytes: int = 0


OPTIONAL = ("checkpoint_copy",)
"""Purposes that are done without where there is no room: checkpoints are then written while training waits."""
OF_A_STEP = ("gradients", "activations", "decoding", "casts", "gathered")
"""Purposes of memory that is free between steps."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose, while training."""

    weights: int
    trained: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    decoding: int = 0
    auxiliary: int = 0
    casts: int = 0
    checkpoint_copy: int = 0
    overhead: int = OVERHEAD_BYTES

    @property
    def total(self) -> int:
        """Sum of the bytes, without what is optional."""
        return needed(self.parts())

    def parts(self) -> dict[str, int]:
        """Return purpose -> bytes, for tables."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def needed(parts: Mapping[str, int]) -> int:
    """Return the sum of bytes by purpose, without what is optional."""
    return sum(num_bytes for purpose, num_bytes in parts.items() if purpose not in OPTIONAL)


def phases(settings: MemorySettings, parts: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the peak of each phase of a run, in bytes; a phase that nothing is known of is left out.

    Args:
        settings: Of the run.
        parts: Bytes by purpose while training, of one of several processes; those of one process alone unless given.
    """
    parts = estimate(settings).parts() if parts is None else parts
    held = needed({purpose: num for purpose, num in parts.items() if purpose not in OF_A_STEP})
    found = {
        "encode": settings.encoding_bytes and settings.encoding_bytes + OVERHEAD_BYTES,
        "load": settings.loading_bytes and settings.loading_bytes + OVERHEAD_BYTES,
        "train": needed(parts),
        "validate": settings.validating_bytes and held + settings.validating_bytes,
        "export": settings.exporting_bytes and held + settings.exporting_bytes,
    }
    return {phase: num_bytes for phase, num_bytes in found.items() if num_bytes}


def peak(settings: MemorySettings) -> int:
    """Return the bytes of a run in one process, in the phase that takes most."""
    return max(phases(settings).values())


def cast_bytes(settings: MemorySettings) -> int:
    """Return the bytes of the copies in half precision that autocast makes of trained weights of float32.

    It keeps each until the end of its forward pass, and the graph until the backward pass: of an adapter, and of whole
    networks two at a time, one with a graph and one that is called beside it.
    """
    if settings.compute_bytes >= settings.trained_bytes:
        return 0
    whole_networks = settings.full_parameters * min(settings.full_roles, 2) // max(settings.full_roles, 1)
    adapters = settings.trained_parameters - settings.full_parameters
    return round((whole_networks + adapters) * settings.compute_bytes)


def estimate(settings: MemorySettings) -> MemoryEstimate:
    """Estimate the memory of a run while it trains."""
    trained = settings.trained_parameters
    stepped = trained - settings.idle_parameters
    with_gradients = stepped if settings.largest_role is None else settings.largest_role
    return MemoryEstimate(
        weights=round(settings.base_parameters * settings.base_bytes),
        trained=round(trained * settings.trained_bytes),
        gradients=round(with_gradients * settings.trained_bytes),
        optimizer=round(stepped * settings.optimizer_bytes),
        averages=4 * settings.averaged_parameters,
        activations=round(_activations(settings) * settings.batch),
        decoding=settings.decoding_bytes,
        auxiliary=settings.auxiliary_bytes,
        casts=cast_bytes(settings),
        checkpoint_copy=checkpoint_bytes(settings) if settings.staged else 0,
    )


def _activations(settings: MemorySettings) -> float:
    """Return the bytes of one sample's activations; without `kept` they are rough (a factor of two either way)."""
    kept = settings.kept
    if kept is None:
        elements = ACTIVATIONS_PER_PIXEL * math.sqrt(settings.base_parameters) * settings.latent_pixels
        share = CHECKPOINTED_SHARE if settings.gradient_checkpointing else 1.0
        return elements * settings.compute_bytes * share
    if settings.activation_offload:
        return kept.block
    return kept.recomputed if settings.gradient_checkpointing else kept.whole


def whole(settings: MemorySettings) -> int:
    """Return the bytes of a run in one process while it trains."""
    return estimate(settings).total


Measure = Callable[[MemorySettings], int]
"""The bytes that a process of a run takes."""


def checkpoint_bytes(settings: MemorySettings) -> int:
    """Return the bytes of a checkpoint: trained weights, optimizer state and averages."""
    stepped = settings.trained_parameters - settings.idle_parameters
    trained = settings.trained_parameters * settings.trained_bytes + stepped * settings.optimizer_bytes
    return round(trained) + 4 * settings.averaged_parameters


def scaled(settings: MemorySettings, factor: float, **changes: float) -> MemorySettings:
    """Return the settings with these changes, by which each sample keeps `factor` times as much."""
    kept = settings.kept
    if kept is not None:
        kept = KeptBytes(*(round(num_bytes * factor) for num_bytes in (kept.whole, kept.recomputed, kept.block)))
    return replace(settings, kept=kept, **changes)


def savings(settings: MemorySettings, *, quantizers: bool = False, measure: Measure = whole) -> list[tuple[str, int]]:
    """Return remedies with the bytes that each saves, the greatest first.

    Args:
        settings: Settings of the run.
        quantizers: Whether the base can be quantised in this installation.
        measure: Counts the bytes of one process.
    """
    choices: dict[str, MemorySettings] = {}
    if settings.batch > 1:
        half = settings.batch // 2
        accumulation = "and gradient_accumulation_steps twice as many"
        choices[f"train_batch_size={half} ({accumulation})"] = replace(settings, batch=half)
    if not settings.gradient_checkpointing:
        choices["gradient_checkpointing=true"] = replace(settings, gradient_checkpointing=True)
    if settings.kept is not None and not settings.activation_offload:
        choices["activation_offload=true"] = replace(settings, activation_offload=True)
    if settings.compute_bytes > 2:
        choices["mixed_precision=bf16"] = scaled(settings, 0.5, compute_bytes=2, base_bytes=min(settings.base_bytes, 2))
    if settings.optimizer_bytes + 2 * settings.trained_bytes > 12:
        choices["optimizer=adamw_bf16"] = replace(settings, optimizer_bytes=8, trained_bytes=2)
    if quantizers and (settings.quantisable or settings.full_student) and settings.base_bytes > 1:
        key = "teacher_precision=int8-quanto" if settings.full_student else "base_model_precision=int8-quanto"
        choices[key] = replace(settings, base_bytes=1)
    if settings.decoding_bytes and settings.own_decoder:
        tiny = settings.decoding_bytes // TINY_DECODER
        choices["pixel_decoder=NAME of a tiny autoencoder (TAESD)"] = replace(settings, decoding_bytes=tiny)
    choices["half the resolution"] = scaled(
        settings, 0.25, latent_pixels=settings.latent_pixels // 4, decoding_bytes=settings.decoding_bytes // 4
    )
    total = measure(settings)
    saved = [(label, total - measure(choice)) for label, choice in choices.items()]
    return sorted((item for item in saved if item[1] > 0), key=lambda item: -item[1])


def out_of_memory_hint(settings: MemorySettings, *, quantizers: bool = False, measure: Measure = whole) -> str:
    """Return the message after a failed allocation: the expected use, and how much each remedy would save."""
    lines = [f"out of memory; this run was estimated at {gigabytes(measure(settings))}. What would save how much:"]
    return "\n".join([*lines, *savings_lines(settings, quantizers=quantizers, measure=measure)])


def savings_lines(settings: MemorySettings, *, quantizers: bool = False, measure: Measure = whole) -> list[str]:
    """Return :func:`savings` as lines for people."""
    found = savings(settings, quantizers=quantizers, measure=measure)
    return [f"  {label}: about {gigabytes(saved)}" for label, saved in found]


def gigabytes(num_bytes: float) -> str:
    """Return bytes as ``12.3 GB`` or ``830 MB`` (decimal units)."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
