"""Teach the scenes' UNet "left" and "right" again, after a joint training that has lost them.

    python benchmarks/scenes_sides.py --work build/scenes     # before or between steps of `scenes.py unet`

A UNet that does not know yet where it is from left to right (landscapes show what is up, nothing shows what is left)
finds both words equally useless. Text encoders that are trained with it then give both the same states; from there no
gradient leads back, since what the UNet could do with the difference and the difference itself are both near zero.
Scenes of above and below were right in 85%, those of left and right in 30%, which is chance.

First the encoders' states for the first two things are moved apart along directions in which they hardly vary, and all
else is kept. Then, for captions of left and right and at times where layouts are decided, the UNet predicts under the
right caption and under the mirrored one. Half of the difference is what it makes of the word; that part alone is fitted
to the error of the mean of both, with ten times the weight of the plain loss. Its optimum is that of the plain loss,
but what both predictions have in common, which is nearly all of the gradient, is left out.

The shipped weights: states moved apart at step 17,100; 400 steps of the plain loss then began nothing (the mirrored
caption made the error 0.0% larger); 300 steps of a hinge between both errors began it, and the plain loss kept a tenth
of that (2%); 300 steps of the fit above from step 18,600 made it 5 to 8%, where above and below have 5 to 13%.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

import miniature  # noqa: E402
import scenes  # noqa: E402
import scenes_networks as networks  # noqa: E402
from miniature import index_batches, progress  # noqa: E402
from miniature_networks import new_scheduler  # noqa: E402

MIRRORED = {"left": "right", "right": "left"}
FIRST, SECOND = -networks.REGISTERS, 1 - networks.REGISTERS
"""States of a padded caption that hold its first and its second thing."""


def mirrored(caption: str) -> str:
    """The caption with left and right exchanged."""
    return " ".join(MIRRORED.get(word, word) for word in caption.split())


def directions(states: Tensor, length: float) -> Tensor:
    """Of this length for each encoder's half of the states (N, T, W): (W,), where registers vary the least."""
    away = torch.zeros(states.shape[-1])
    for half in torch.arange(len(away)).split(networks.TEXT_WIDTH):
        spread = torch.cat([states[:, FIRST][:, half], states[:, SECOND][:, half]]).T.cov()
        quiet = torch.linalg.eigh(spread).eigenvectors[:, : networks.TEXT_WIDTH // 2]
        away[half] = nn.functional.normalize(quiet @ torch.randn(quiet.shape[1]), dim=0) * length
    return away


def part_words(teacher: networks.Teacher, data: scenes.Captioned, *, steps: int, length: float = 4.0) -> None:
    """Fit both encoders, in place, to their own states, moved one way for left and the other for right."""
    words, before = scenes.judge_words(), networks.Teacher(data.tokenizers).requires_grad_(False)
    before.load_state_dict(teacher.state_dict())
    sides = torch.tensor([float((words.read(caption).relation or (0, 0))[0]) for caption in data.captions])
    with torch.no_grad():
        away = directions(before.encode((data.tokens[0][:2000], data.tokens[1][:2000]))[0], length)
    parameters = [*teacher.text_encoder.parameters(), *teacher.text_encoder_2.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    for step, index in enumerate(index_batches(len(sides), 128, steps, seed=9)):
        tokens = data.tokens[0][index], data.tokens[1][index]
        with torch.no_grad():
            wanted, wanted_pooled = before.encode(tokens)
            wanted[:, FIRST] += sides[index, None] * away
            wanted[:, SECOND] -= sides[index, None] * away
        states, pooled = teacher.encode(tokens)
        loss = (states - wanted).square().mean() + (pooled - wanted_pooled).square().mean()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * miniature.decayed(step, steps, warmup=20, decay_from=0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            progress(f"words step {step} loss {loss.item():.5f}")


class Sides:
    """Captions of left and right, with the tokens of what they would say in a mirror."""

    def __init__(self, data: scenes.Captioned, *, held_out: int = 192) -> None:
        self.data = data
        self.index = torch.tensor([i for i, c in enumerate(data.captions) if MIRRORED.keys() & set(c.split())])
        self.held_out, self.index = self.index.split([held_out, len(self.index) - held_out])
        self.alphas_cumprod = new_scheduler().alphas_cumprod

    def predictions(self, teacher: networks.Teacher, index: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The noise (B, C, h, w) at times t (B,), predicted under the right captions, and under the mirrored ones."""
        x_0, tokens, time_ids = self.data.batch(index)
        captions = [mirrored(self.data.captions[i]) for i in index.tolist()]
        kinds: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        others = [tokenizer(captions, **kinds).input_ids for tokenizer in self.data.tokenizers]
        both = torch.cat([tokens[0], others[0]]), torch.cat([tokens[1], others[1]])
        noise, signal = torch.randn(x_0.shape), self.alphas_cumprod[t][:, None, None, None]
        noisy = (signal.sqrt() * x_0 + (1 - signal).sqrt() * noise).repeat(2, 1, 1, 1)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            found = teacher(noisy, t.repeat(2), both, time_ids.repeat(2, 1), torch.ones(len(noisy)))
        right, wrong = found.float().chunk(2)
        return noise, right, wrong

    @torch.no_grad()
    def gaps(self, teacher: networks.Teacher) -> str:
        """How much worse the mirrored caption makes the error, at three times, of captions that are not trained on."""
        rows = []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for t in (725, 825, 925):
                found = self.predictions(teacher, self.held_out, torch.full((len(self.held_out),), t))
                right, wrong = ((each - found[0]).square().mean() for each in found[1:])
                rows.append(f"{t}: {wrong / right - 1:+.2%}")
        return ", ".join(rows)


def use_words(teacher: networks.Teacher, sides: Sides, *, steps: int, rate: float = 5e-4, share: float = 10.0) -> None:
    """Train encoders and UNet, in place, on what the words change in the prediction, and on the prediction itself."""
    optimizers = [
        kind(group, lr=rate, weight_decay=0.0, **settings)
        for kind, group, settings in miniature.optimizer_groups(teacher, True)
    ]
    parameters = list(teacher.parameters())
    for step in range(steps):
        if step % 50 == 0:
            progress(f"use step {step}: {sides.gaps(teacher)}")
        index = sides.index[torch.randint(len(sides.index), (24,))]
        t = torch.randint(550, 1000, (len(index),))
        noise, right, wrong = sides.predictions(teacher, index, t)
        mean, change = (right + wrong) / 2, (right - wrong) / 2
        signal = sides.alphas_cumprod[t][:, None, None, None]
        errors = (right - noise).square() + share * ((noise - mean).detach() - change).square()
        teacher.zero_grad()
        (4 * ((1 - signal) / signal).sqrt() * errors).mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
    progress(f"use step {steps}: {sides.gaps(teacher)}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "scenes", help="folder of `scenes.py`")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--words-steps", type=int, default=400, help="of the text encoders alone")
    parser.add_argument("--use-steps", type=int, default=300, help="of the fit of both")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(5)
    data = scenes.Captioned(given.work)
    done, generator, parts = torch.load(given.work / "unet.pt", weights_only=True)
    teacher = networks.Teacher(data.tokenizers)
    teacher.load_state_dict(parts[0])
    part_words(teacher, data, steps=given.words_steps)
    use_words(teacher, Sides(data), steps=given.use_steps)
    state = teacher.state_dict()
    average = {name: value.clone() for name, value in state.items()}
    torch.save((done, generator, [state, average, *parts[2:]]), given.work / "unet.pt")


if __name__ == "__main__":
    main()
