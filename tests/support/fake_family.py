"""A family without a network: images are a pure function of prompt, seed, role and steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from distill.core.diffusion.sampler import Sampler
from distill.core.plugin_api.family import Capabilities, ExportInfo, ModelFamily, ModelSettings
from torch import Tensor, nn


class FakeNetwork(nn.Module):
    """Says which role it plays."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role


@dataclass
class Call:
    """One call of :meth:`FakeFamily.generate`."""

    role: str
    scheduler: str | None
    steps: int | None
    guidance: float | None
    seeds: tuple[int, ...]
    size: tuple[int, int]
    negative: bool
    training: bool
    grad: bool


@dataclass
class FakeNetworks:
    """``networks.use(role)`` over fake networks."""

    modules: dict[str, FakeNetwork] = field(default_factory=dict)

    @contextmanager
    def use(self, role: str) -> Iterator[nn.Module]:
        yield self.modules.setdefault(role, FakeNetwork(role))


class FakeFamily(ModelFamily):
    """The full image of (prompt, seed) is smooth noise; fewer steps lie further from it, the student less far."""

    name: ClassVar[str] = "fake"
    capabilities: ClassVar[Capabilities] = Capabilities()
    lora_targets: ClassVar[tuple[str, ...]] = ()
    default_guidance: ClassVar[float] = 7.0
    prediction_type = "epsilon"
    schedule: Any = None
    latent_channels = 4
    scale_factor = 1

    def __init__(self, config: Any = None, settings: ModelSettings | None = None) -> None:
        super().__init__(config, settings or ModelSettings(source="fake"))
        self.calls: list[Call] = []
        self.encoded: list[tuple[str, ...]] = []
        self.print = "v1"

    def check_source(self) -> None: ...

    def fingerprint(self, part: str) -> str:
        return f"{part}-{self.print}"

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.encoded.append(tuple(prompts))
        return {"embeds": torch.tensor([[float(sum(prompt.encode()) % 997)] for prompt in prompts])}

    def generate(
        self, network: nn.Module, embeds: dict[str, Tensor], *, sampler: Sampler | None, seeds: Sequence[int],
        width: int, height: int, num_inference_steps: int | None = None, guidance_scale: float | None = None,
        negative_embeds: dict[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        assert isinstance(network, FakeNetwork)
        assert len(embeds["embeds"]) == len(seeds)
        if negative_embeds is not None:
            assert len(negative_embeds["embeds"]) == len(seeds)
        self.calls.append(
            Call(
                network.role,
                sampler.scheduler if sampler else None,
                num_inference_steps,
                guidance_scale,
                tuple(seeds),
                (width, height),
                negative_embeds is not None,
                network.training,
                torch.is_grad_enabled(),
            )
        )
        torch.rand(3)  # a pipeline may touch the global generator
        away = {"teacher": 1.0, "student": 0.2}[network.role] / (num_inference_steps or 1)
        away = 0.0 if num_inference_steps == 50 else away
        return torch.stack(
            [image(float(p), s, away, width, height) for p, s in zip(embeds["embeds"], seeds, strict=True)]
        )

    def usage_snippet(self, info: ExportInfo) -> str:
        return f"pipe = load()\nprint({info.sampler.num_inference_steps})\n"


FakeFamily.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]  # what is not about images is never called


def image(prompt: float, seed: int, away: float, width: int, height: int) -> Tensor:
    """(3, H, W) in [0, 1]."""
    g = torch.Generator().manual_seed(int(prompt) * 1000 + seed)
    coarse = torch.rand(1, 3, 4, 4, generator=g)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return (smooth * (1 - away) + 0.5 * away).clamp(0, 1)


def fake_sampler(steps: int = 4, guidance: float = 0.0) -> Sampler:
    """A student's sampler."""
    return Sampler("LCMScheduler", {"original_inference_steps": 50}, steps, guidance)
