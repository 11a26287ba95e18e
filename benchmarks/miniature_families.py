"""Train the miniature teachers of sd3 and z-image, of 32 px: scenes, autoencoder, judge are those of that SDXL.

    python benchmarks/miniature.py data --assets build/scratch   # the training pool, if it is not there
    python benchmarks/miniature_families.py sd3                  # a transformer on a flow, from scratch
    python benchmarks/miniature_families.py z-image              # one stream on a flow, a language model, from scratch
    python benchmarks/miniature_families.py report --family sd3  # the figures and image grids of the model card

Seeds are fixed; a training that was interrupted goes on from `<work>/<family>.pt`. Needs what `miniature.py` needs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

import miniature  # noqa: E402
import miniature_networks as networks  # noqa: E402
from miniature_speed import compile_blocks, half_precision  # noqa: E402
from miniature_teachers import Scenes, ShiftedTeacher, Teacher  # noqa: E402
from miniature_z_image import ZImageTeacher  # noqa: E402

T5_TOKENS, T5_WIDTH = 16, 160
CLIP_WIDTH = 64
FLOW_SHIFT = 3.0


def new_t5_tokenizer(counts: Counter[str]) -> T5TokenizerFast:
    """A T5 tokenizer of the captions' words, and letters for every other word."""
    words = Counter(word for caption, count in counts.items() for word in caption.replace(",", "").split() * count)
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pieces = {f"\u2581{word}": float(np.log(count / words.total())) for word, count in words.items()}
    pieces |= {piece: -12.0 for piece in ("\u2581", *letters)}
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *pieces.items()]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def new_t5(vocabulary: int) -> T5EncoderModel:
    """T5's encoder in small, two layers."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary, d_model=T5_WIDTH, d_kv=32, d_ff=2 * T5_WIDTH, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, dropout_rate=0.0,
        )
    )  # fmt: skip


def begin_as_nothing(transformer: SD3Transformer2DModel) -> None:
    """Set what modulates, and the output, to zero, as in the papers on such transformers."""
    for name, module in transformer.named_modules():
        if name.endswith((".norm1.linear", ".norm1_context.linear", "norm_out.linear")) or name == "proj_out":
            nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)


class SD3Teacher(ShiftedTeacher):
    """Stable Diffusion 3.5 in small: joint attention with normed queries, two CLIP encoders and T5, a shifted flow."""

    folder = miniature.ASSETS / "sd3_miniature"
    call: ClassVar[dict[str, Any]] = {"max_sequence_length": T5_TOKENS}

    def __init__(self, scenes: Scenes, *, depth: int = 6, heads: int = 5) -> None:
        super().__init__()
        sdxl = networks.load_teacher(miniature.TEACHER)
        self.tokenizer, self.tokenizer_2 = sdxl.tokenizer, sdxl.tokenizer_2
        self.tokenizer_3 = new_t5_tokenizer(scenes.counts)
        self.text_encoder = CLIPTextModelWithProjection(networks.text_config(self.tokenizer, "quick_gelu"))
        self.text_encoder.load_state_dict(sdxl.text_encoder.state_dict(), strict=False)  # it has no projection
        self.text_encoder_2 = sdxl.text_encoder_2
        self.text_encoder_3 = new_t5(len(self.tokenizer_3))
        self.transformer = SD3Transformer2DModel(
            sample_size=miniature.SIZE // 2,
            in_channels=4,
            out_channels=4,
            num_layers=depth,
            attention_head_dim=32,
            num_attention_heads=heads,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=32 * heads,
            pooled_projection_dim=2 * CLIP_WIDTH,
            pos_embed_max_size=miniature.SIZE // 4,
            qk_norm="rms_norm",
        )
        begin_as_nothing(self.transformer)
        self.shift = self.shift_of(scenes)
        tokenizers = (self.tokenizer, self.tokenizer_2, self.tokenizer_3)
        lengths = (networks.MAX_TOKENS, networks.MAX_TOKENS, T5_TOKENS)
        self.tokens = [scenes.tokens(each, length) for each, length in zip(tokenizers, lengths, strict=True)]

    def embeds(self, captions: Tensor) -> tuple[Tensor, Tensor]:
        """What the pipeline encodes captions to: states (B, 24 + 16, D), pooled (B, P)."""
        encoders = (self.text_encoder, self.text_encoder_2)
        outputs = [
            encoder(tokens[captions], output_hidden_states=True)
            for encoder, tokens in zip(encoders, self.tokens[:2], strict=True)
        ]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        states = nn.functional.pad(states, (0, T5_WIDTH - states.shape[-1]))
        t5 = self.text_encoder_3(self.tokens[2][captions]).last_hidden_state
        kept = (
            torch.rand(len(captions), 1, 1, device=t5.device) > 0.2
        ).float()  # it may be left out when images are made
        return torch.cat([states, kept * t5], dim=1), torch.cat([output.text_embeds for output in outputs], dim=-1)

    def loss(self, x_0: Tensor, captions: Tensor) -> Tensor:
        """|u_hat - (eps - x_0)|^2 at x_t = (1 - t) x_0 + t eps, logit(t) ~ N(0.4, 1.2) (arXiv 2403.03206)."""
        x_0 = self.shifted(x_0)
        states, pooled = self.embeds(captions)
        noise = torch.randn(x_0.shape, device=x_0.device)
        t = torch.sigmoid(0.4 + 1.2 * torch.randn(len(x_0), device=x_0.device))
        mixed = t[:, None, None, None]
        u = self.transformer((1 - mixed) * x_0 + mixed * noise, states, pooled, 1000 * t).sample
        return (u - (noise - x_0)).square().mean()

    def pipeline(self, vae: Any) -> Any:
        """The diffusers pipeline of these weights."""
        parts = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
            **{name: getattr(self, name) for name in parts},
        )


TEACHERS: dict[str, tuple[type[Teacher], dict[str, Any]]] = {
    "sd3": (SD3Teacher, {"steps": 3700, "peak": 1e-3, "seed": 12, "batch_size": 256}),
    "z-image": (ZImageTeacher, {"steps": 12000, "peak": 1e-3, "seed": 13, "batch_size": 64, "muon": True}),
}
"""Family -> its teacher, and how it is trained."""


def train(
    family: str,
    work: Path,
    *,
    steps: int | None,
    device: str,
    half: bool = False,
    compiled: bool = False,
    begin: Path | None = None,
    peak: float | None = None,
) -> None:
    """Train the family's miniature and write it to the assets; with bf16 products, and compiled blocks, if asked.

    Without a state of its own in `work` it begins with the weights in `begin`, a folder of each part's safetensors.
    """
    kind, settings = TEACHERS[family]
    settings = {**settings, "steps": steps or settings["steps"], "peak": peak or settings["peak"]}
    torch.manual_seed(settings["seed"])
    torch.set_float32_matmul_precision("high")  # tf32, on devices that have it
    scenes = Scenes(work, device)
    teacher = kind(scenes).to(device)

    if begin is not None:
        teacher.begin_with(begin)
    if compiled:
        compile_blocks(teacher.blocks())

    def loss(index: Tensor) -> Tensor:
        with half_precision(half, device):
            return teacher.loss(*scenes.batch(index, 0.12))

    settings |= {"horizon": settings["steps"], "resume": work / f"{family}.pt"}
    miniature.fit(teacher, loss, lambda average: average.save(), **settings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*TEACHERS, "report"))
    parser.add_argument("--family", choices=tuple(TEACHERS), default="sd3", help="whose report")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "miniature", help="folder for what does not ship")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="as `cuda`, where there is one")
    parser.add_argument("--half", action="store_true", help="bf16 products: faster on processors with AMX")
    parser.add_argument("--compile", action="store_true", help="compile the denoiser's blocks (z-image)")
    parser.add_argument("--begin", type=Path, help="folder of weights to begin with, PART/*.safetensors")
    parser.add_argument("--steps", type=int, help="training steps, in place of the stage's own number")
    parser.add_argument("--peak", type=float, help="highest learning rate, in place of the stage's own")
    parser.add_argument("--samples", type=int, default=1000, help="images per row of the report")
    parser.add_argument("--guidance", type=float, help="of the report, in place of the miniature's own")
    parser.add_argument("--sampler-steps", default="1,2,4,8,50", help="rows of the report")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.stage != "report":
        kinds = {"half": given.half, "compiled": given.compile, "begin": given.begin, "peak": given.peak}
        train(given.stage, given.work, steps=given.steps, device=given.device, **kinds)
        return
    kind, _ = TEACHERS[given.family]
    counts = [int(count) for count in given.sampler_steps.split(",")]
    guidance = given.guidance or kind.guidance
    work = given.work / given.family
    work.mkdir(parents=True, exist_ok=True)
    shutil.copy(given.work / "held_out.npz", work / "held_out.npz")
    miniature.report(work, kind.folder, samples=given.samples, guidance=guidance, step_counts=counts, call=kind.call)


if __name__ == "__main__":
    main()
