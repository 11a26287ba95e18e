"""Train the miniature teachers of sd2x and sd3 on the scenes of 64 px; autoencoder, judge and texts are `scenes.py`'s.

    python benchmarks/scenes_families.py sd2x --half             # a UNet that predicts v, begun from SDXL's of scenes
    python benchmarks/scenes_families.py sd3 --half              # a transformer on a flow, from scratch
    python benchmarks/scenes_families.py report --family sd2x    # the figures and image grids of the model card

They learn what the SDXL of scenes expects of noisy latents, which has less variance than the scene that the noise was
added to. Needs what `scenes.py` has left in `--work` and in the assets. Seeds are fixed; a training that was
interrupted goes on from `<work>/<family>.pt`, and `torchrun --nproc_per_node 2` shares every batch between two
processes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from distill.plugins.evaluators import load_judge
from distill.plugins.scene_judge import SceneJudge
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

import miniature  # noqa: E402
import miniature_families as families  # noqa: E402
import scenes  # noqa: E402
import scenes_networks as networks  # noqa: E402
from miniature import decayed, index_batches, progress  # noqa: E402
from miniature_networks import load_teacher, shorten  # noqa: E402
from miniature_speed import half_precision  # noqa: E402
from miniature_teachers import Scenes, Teacher  # noqa: E402
from scenes_data import RESOLUTION  # noqa: E402

T5_TOKENS = 28


class Pool(Scenes):
    """The pool of `scenes.py`: latents, and a caption for each sample; the last caption is empty."""

    def __init__(self, work: Path, device: str) -> None:
        self.device, self.work = device, work
        captions = scenes.load(work, "pool", "captions").tolist()
        self.latents = torch.from_numpy(np.load(work / "pool_latents.npy")).to(device)
        self.caption_of, self.counts = np.arange(len(captions)), Counter(captions)
        self.captions = [*captions, ""]

    def __len__(self) -> int:
        return len(self.caption_of)


class Reference:
    """What the SDXL of scenes expects of noisy latents."""

    def __init__(self, pool: Pool) -> None:
        shipped = load_teacher(scenes.TEACHER)
        self.data, self.none = scenes.Captioned(pool.work), len(pool.captions) - 1
        self.network = networks.Teacher(self.data.tokenizers).requires_grad_(False)
        for name, part in self.network.named_children():
            part.load_state_dict(getattr(shipped, name).state_dict())
        self.sizes = torch.tensor([[RESOLUTION] * 2 + [0, 0] + [RESOLUTION] * 2], dtype=torch.float32)
        alphas_cumprod = shipped.scheduler.alphas_cumprod.double()
        self.ratios = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().log()

    def reaches(self, ratio: Tensor) -> Tensor:
        """Whether its schedule has these ratios (B,) of noise to signal."""
        log = ratio.double().log()
        return (log >= self.ratios[0]) & (log <= self.ratios[-1])

    @torch.no_grad()
    def x_0(self, over_signal: Tensor, ratio: Tensor, captions: Tensor, guidance: float = 1.0) -> Tensor:
        """Latents (B, C, h, w) expected at x_0 + ratio * noise, uncropped, with captions of these numbers (B,).

        What a caption changes counts `guidance` times.
        """
        if guidance != 1.0:
            both = torch.cat([captions, torch.full_like(captions, self.none)])
            given, empty = self.x_0(torch.cat([over_signal] * 2), torch.cat([ratio] * 2), both).chunk(2)
            return empty + guidance * (given - empty)
        t = torch.from_numpy(np.interp(ratio.double().log().numpy(), self.ratios.numpy(), np.arange(1000.0))).float()
        wide = ratio.float()[:, None, None, None]
        noisy = (over_signal / (1 + wide.square()).sqrt()).contiguous(memory_format=torch.channels_last)
        keep, known = (captions != self.none).float(), captions.clamp(max=self.none - 1)
        tokens = tuple(each[known] for each in self.data.tokens)
        noise = self.network(noisy, t, tokens, self.sizes.expand(len(captions), -1), keep)
        return over_signal - wide * noise.float()


class OfScenes(Teacher):
    """A teacher whose autoencoder, judge and prompts are those of the SDXL of scenes."""

    multistep: ClassVar[dict[str, Any]] = {}
    """What DPM++ 2M needs beside the settings of the teacher's own scheduler."""

    bits: ClassVar[int] = 5

    def save_judge(self) -> None:
        """Name the judge of the SDXL of scenes, which lies beside it."""
        folder = self.folder / "judge"
        folder.mkdir(exist_ok=True)
        named = json.dumps({"same_as": f"../../{self.sdxl().name}/judge"}, indent=2)
        (folder / "config.json").write_text(named + "\n", encoding="utf-8")

    @abstractmethod
    def reference_loss(self, x_0: Tensor, captions: Tensor, reference: Reference) -> Tensor:
        """The mean loss of latents (B, C, h, w) with captions of these numbers (B,), by what `reference` expects."""

    def sdxl(self) -> Path:
        """The SDXL of scenes."""
        return scenes.TEACHER

    def autoencoder(self) -> Any:
        """That of the SDXL of scenes, rounded to seven bits of mantissa; 32.43 dB on held-out scenes, as before."""
        vae = scenes.load_vae()
        shorten(vae, 7)
        return vae


class SD2OfScenes(OfScenes):
    """Stable Diffusion 2.1 in small: v prediction; one text encoder as wide as both of SDXL's together.

    As in Stable Diffusion 2.1 every block of attention has one layer: of SDXL's deeper ones the first.
    """

    folder = miniature.ASSETS / "sd2x_scenes"
    guidance: ClassVar[float] = 7.5

    def __init__(self, pool: Pool) -> None:
        nn.Module.__init__(self)
        self.tokenizer = CLIPTokenizer.from_pretrained(pool.work / "tokenizers" / "bang")
        self.text_encoder = CLIPTextModel(
            networks.text_config_of(self.tokenizer, "gelu", width=2 * networks.TEXT_WIDTH)
        )
        sdxl = load_teacher(scenes.TEACHER)
        config = {**sdxl.unet.config, "addition_embed_type": None, "addition_time_embed_dim": None}
        config |= {"projection_class_embeddings_input_dim": None, "transformer_layers_per_block": 1}
        self.unet = UNet2DConditionModel.from_config(config)
        kept = self.unet.state_dict()
        self.unet.load_state_dict({name: weight for name, weight in sdxl.unet.state_dict().items() if name in kept})
        self.unet.to(memory_format=torch.channels_last)
        self.tokens = pool.tokens(self.tokenizer, networks.MAX_TOKENS)
        self.alphas_cumprod = self.scheduler().alphas_cumprod

    @staticmethod
    def scheduler() -> DDIMScheduler:
        """The scheduler of Stable Diffusion 2.1, setting for setting."""
        return DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
        )  # fmt: skip

    def pipeline(self, vae: Any) -> Any:
        """The diffusers pipeline of these weights."""
        return StableDiffusionPipeline(
            vae=vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=self.unet,
            scheduler=self.scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    def prepare(self, pool: Pool, reference: Reference, *, steps: int = 800) -> None:
        """Fit the encoder to the states that SDXL's give; what size and pooled text add to the time becomes a bias."""
        data, sdxl = reference.data, reference.network
        optimizer = torch.optim.AdamW(self.text_encoder.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
        for step, index in enumerate(index_batches(len(pool), 128, steps, seed=15)):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * decayed(step, steps, warmup=50, decay_from=0.3)
            with torch.no_grad():
                wanted, pooled = sdxl.encode((data.tokens[0][index], data.tokens[1][index]))
            loss = (self.text_encoder(self.tokens[index]).last_hidden_state - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 100 == 0:
                progress(f"text step {step} loss {loss.item():.4f} of {wanted.square().mean().item():.4f}")
        unet = sdxl.unet
        sizes = unet.add_time_proj(data.time_ids[index].flatten()).reshape(len(index), -1)
        with torch.no_grad():
            added = unet.add_embedding(torch.cat([pooled, sizes], dim=-1)).mean(dim=0)
            self.unet.time_embedding.linear_2.bias += added

    def reference_loss(self, x_0: Tensor, captions: Tensor, reference: Reference) -> Tensor:
        """|v_hat - v|^2, so weighed that the error of x_0 counts min(SNR, 5) + 1 times."""
        states = self.text_encoder(self.tokens[captions]).last_hidden_state
        t, noise = torch.randint(0, 1000, (len(x_0),)), torch.randn(x_0.shape)
        signal = self.alphas_cumprod[t]
        snr = signal / (1 - signal)
        alpha_t, sigma_t = signal.sqrt()[:, None, None, None], (1 - signal).sqrt()[:, None, None, None]
        noisy = alpha_t * x_0 + sigma_t * noise
        x_0 = reference.x_0(noisy / alpha_t, snr.rsqrt(), captions)
        v = self.unet(noisy.contiguous(memory_format=torch.channels_last), t, encoder_hidden_states=states).sample
        error = (v - (alpha_t * noisy - x_0) / sigma_t).square().mean(dim=(1, 2, 3))
        return ((snr.clamp(max=5) + 1) / (snr + 1) * error).mean()


class SD3OfScenes(families.SD3Teacher, OfScenes):
    """Stable Diffusion 3.5 in small, on patches of 8 x 8 pixels."""

    folder = miniature.ASSETS / "sd3_scenes"
    call: ClassVar[dict[str, Any]] = {"max_sequence_length": T5_TOKENS}
    guidance: ClassVar[float] = 5.0
    learned_guidance: ClassVar[float] = 2.0
    """How many times what a caption changes counts in what is learned."""
    multistep: ClassVar[dict[str, Any]] = {
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": families.FLOW_SHIFT,
    }  # fmt: skip

    def __init__(self, pool: Pool, *, depth: int = 6, heads: int = 5) -> None:
        nn.Module.__init__(self)
        sdxl = load_teacher(scenes.TEACHER)
        self.tokenizer, self.tokenizer_2 = sdxl.tokenizer, sdxl.tokenizer_2
        self.tokenizer_3 = families.new_t5_tokenizer(pool.counts)
        config = networks.text_config_of(self.tokenizer, "quick_gelu")
        self.text_encoder = CLIPTextModelWithProjection(config)
        self.text_encoder.load_state_dict(sdxl.text_encoder.state_dict(), strict=False)  # it has no projection
        self.text_encoder_2 = sdxl.text_encoder_2
        self.text_encoder_3 = families.new_t5(len(self.tokenizer_3))
        width = families.T5_WIDTH
        self.transformer = SD3Transformer2DModel(
            sample_size=networks.LATENT_SIZE, in_channels=networks.LATENT_CHANNELS,
            out_channels=networks.LATENT_CHANNELS, num_layers=depth, attention_head_dim=32, num_attention_heads=heads,
            joint_attention_dim=width, caption_projection_dim=32 * heads, pooled_projection_dim=2 * networks.POOLED,
            pos_embed_max_size=networks.LATENT_SIZE // 2, qk_norm="rms_norm",
        )  # fmt: skip
        families.begin_as_nothing(self.transformer)
        self.shift = self.shift_of(pool)
        lengths = (networks.MAX_TOKENS, networks.MAX_TOKENS, T5_TOKENS)
        tokenizers = (self.tokenizer, self.tokenizer_2, self.tokenizer_3)
        self.tokens = [pool.tokens(each, length) for each, length in zip(tokenizers, lengths, strict=True)]

    def reference_loss(self, x_0: Tensor, captions: Tensor, reference: Reference) -> Tensor:
        """|u_hat - u|^2, logit(t) ~ N(-0.4, 1.2); by the scene itself where SDXL does not reach."""
        states, pooled = self.embeds(captions)
        noise, t = torch.randn(x_0.shape), torch.sigmoid(-0.4 + 1.2 * torch.randn(len(x_0)))
        mixed, ratio, x_0 = t[:, None, None, None], t / (1 - t), self.shifted(x_0)
        noisy, target = (1 - mixed) * x_0 + mixed * noise, noise - x_0
        reached = reference.reaches(ratio)
        over_signal = self.shifted((noisy / (1 - mixed))[reached], back=True)
        expected = self.shifted(reference.x_0(over_signal, ratio[reached], captions[reached], self.learned_guidance))
        target[reached] = (noisy[reached] - expected) / mixed[reached]
        return (self.transformer(noisy, states, pooled, 1000 * t).sample - target).square().mean()


TEACHERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "sd2x": (SD2OfScenes, {"steps": 2600, "peak": 6e-4, "seed": 11, "batch_size": 48}),
    "sd3": (SD3OfScenes, {"steps": 8000, "peak": 1e-3, "seed": 12, "batch_size": 32}),
}
"""Family -> its teacher, and how it is trained."""


def train(
    family: str, work: Path, *, steps: int | None, horizon: int | None, half: bool, begin: Path | None = None
) -> None:
    """Train the family's teacher and write it to the assets; with bf16 products, if asked.

    Without a state of its own in `work` it begins with the weights in `begin`, a folder of each part's safetensors.
    """
    kind, settings = TEACHERS[family]
    torch.manual_seed(settings["seed"])
    pool, state = Pool(work, "cpu"), work / f"{family}.pt"
    teacher, reference, drawn = kind(pool), Reference(pool), scenes.drawn_from(work)
    if begin is not None:
        teacher.begin_with(begin)
    elif isinstance(teacher, SD2OfScenes) and not state.is_file():
        teacher.prepare(pool, reference)

    def loss(index: Tensor) -> Tensor:
        with half_precision(half, "cpu"):
            return teacher.reference_loss(*pool.batch(drawn[index], 0.1), reference)

    settings = {**settings, "steps": steps or settings["steps"], "resume": state, "count": len(drawn), "muon": True}
    miniature.fit(teacher, loss, lambda average: average.save(), horizon=horizon or settings["steps"], **settings)


def report(family: str, work: Path, *, samples: int, guidance: float, rows: Sequence[str]) -> None:
    """Answers, distance and quality of the teacher: `plain-50` by its own scheduler, `dpm-4` by DPM++ 2M."""
    kind, _ = TEACHERS[family]
    pipeline = DiffusionPipeline.from_pretrained(kind.folder).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    figures = scenes.figures_of(
        pipeline, cast(SceneJudge, load_judge(kind.folder / "judge")), work, family, samples=samples, guidance=guidance,
        rows=rows, multistep=kind.multistep, call=kind.call,
    )  # fmt: skip
    (work / f"{family}_figures.json").write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*TEACHERS, "report"))
    parser.add_argument("--family", choices=tuple(TEACHERS), default="sd2x", help="whose report")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "scenes", help="folder of `scenes.py`")
    parser.add_argument("--assets", type=Path, default=miniature.ASSETS, help="folder of the teachers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--half", action="store_true", help="bf16 products: faster on processors with AMX")
    parser.add_argument("--begin", type=Path, help="folder of weights to begin with, PART/*.safetensors")
    parser.add_argument("--steps", type=int, help="of the optimizer, in place of the stage's own number")
    parser.add_argument("--horizon", type=int, help="steps after which the learning rate has decayed")
    parser.add_argument("--samples", type=int, default=1000, help="images per row of the report")
    parser.add_argument("--guidance", type=float, help="of the report, in place of the miniature's own")
    parser.add_argument("--rows", default="plain-1,plain-4,dpm-4,plain-50,dpm-50", help="of the report")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    scenes.TEACHER = given.assets / scenes.TEACHER.name
    for kind, _ in TEACHERS.values():
        kind.folder = given.assets / kind.folder.name
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    if given.stage != "report":
        train(given.stage, given.work, steps=given.steps, horizon=given.horizon, half=given.half, begin=given.begin)
        return
    guidance = given.guidance or TEACHERS[given.family][0].guidance
    report(given.family, given.work, samples=given.samples, guidance=guidance, rows=given.rows.split(","))


if __name__ == "__main__":
    main()
