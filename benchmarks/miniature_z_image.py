"""The miniature teacher of z-image: one stream of text and latents, whose prompts a small Qwen3 reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import miniature
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from miniature_teachers import Scenes, ShiftedTeacher
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

TOKENS = 32
"""Of a prompt in its template."""
TEXT_WIDTH = 96
SHIFT = 3.0
START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}" + START + "{{ message.role }}\n{{ message.content }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + START + "assistant\n{% endif %}"
)
"""Qwen3's, as far as one turn of a user goes."""


def new_llm_tokenizer(captions: Iterable[str]) -> Qwen2Tokenizer:
    """A byte-level tokenizer whose merges are learned from the captions in their template."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=1200, min_frequency=2, show_progress=False, initial_alphabet=sorted(ByteLevel.alphabet())
    )
    learner.train_from_iterator([*captions, *["user\n", "assistant\n"] * 50], trainer)
    vocabulary, merges = learner.get_vocab(), _merges(learner)
    for token in ("<|endoftext|>", START, END):
        vocabulary[token] = len(vocabulary)
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, model_max_length=512, chat_template=TEMPLATE,
        additional_special_tokens=[START, END],
    )  # fmt: skip


def _merges(learner: Tokenizer) -> list[tuple[str, ...]]:
    import json

    return [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]


def deeper(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Weights of a transformer of `depth` blocks that does what this one of fewer does.

    Some blocks are there twice; the second begins as the first, but for the norms through which it adds to the stream,
    which are zero.
    """
    given = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    source = [layer * given // depth for layer in range(depth)]
    grown = {name: value for name, value in state.items() if not name.startswith("layers.")}
    for layer, old in enumerate(source):
        doubled = layer > 0 and source[layer - 1] == old
        for name, value in state.items():
            if name.startswith(f"layers.{old}."):
                silent = doubled and name.endswith((".attention_norm2.weight", ".ffn_norm2.weight"))
                grown[f"layers.{layer}.{name.split('.', 2)[2]}"] = torch.zeros_like(value) if silent else value
    return grown


class ZImageTeacher(ShiftedTeacher):
    """Z-Image in small: refiners of text and latents, blocks of one stream, rotary ids of three axes, a Qwen3."""

    folder = miniature.ASSETS / "z_image_miniature"
    call: ClassVar[dict[str, Any]] = {"max_sequence_length": TOKENS}
    guidance = 3.5
    """The pipeline's, one less than that of other families."""

    def __init__(self, scenes: Scenes, *, depth: int = 8, heads: int = 4) -> None:
        super().__init__()
        self.tokenizer = new_llm_tokenizer(scenes.captions[:-1])
        self.text_encoder = Qwen3Model(
            Qwen3Config(
                vocab_size=len(self.tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH,
                num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=24, use_cache=False,
                max_position_embeddings=512,
            )
        )  # fmt: skip
        self.transformer = ZImageTransformer2DModel(
            in_channels=4, dim=32 * heads, n_layers=depth, n_refiner_layers=1, n_heads=heads, n_kv_heads=heads,
            cap_feat_dim=TEXT_WIDTH, axes_dims=[8, 12, 12], axes_lens=[256, 64, 64],
        )  # fmt: skip
        for name, module in self.transformer.named_modules():  # the output begins as nothing
            if name.endswith(("all_final_layer.2-1.linear", "adaLN_modulation.1")):
                nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
        self.shift = self.shift_of(scenes)
        turns = ([{"role": "user", "content": caption}] for caption in scenes.captions)
        written = [
            self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns
        ]
        kinds = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        tokens = self.tokenizer(written, **kinds).to(scenes.device)
        assert tokens.attention_mask.sum(dim=1).max() < TOKENS, "no caption is cut"
        self.tokens, self.mask = tokens.input_ids, tokens.attention_mask.bool()

    def begin(self, part: str, state: dict[str, Tensor]) -> None:
        """Load a part's weights; a transformer of fewer blocks is made deeper."""
        super().begin(part, deeper(state, len(self.transformer.layers)) if part == "transformer" else state)

    def embeds(self, captions: Tensor) -> list[Tensor]:
        """What the pipeline encodes captions to: states (T_i, D) of each."""
        mask = self.mask[captions]
        output = self.text_encoder(input_ids=self.tokens[captions], attention_mask=mask, output_hidden_states=True)
        return [one[kept] for one, kept in zip(output.hidden_states[-2], mask, strict=True)]

    def loss(self, x_0: Tensor, captions: Tensor) -> Tensor:
        """|u_hat - (x_0 - eps)|^2 at x_t = (1 - t) x_0 + t eps, logit(t) ~ N(0.4, 1.2) (arXiv 2403.03206)."""
        x_0 = self.shifted(x_0)
        noise = torch.randn(x_0.shape, device=x_0.device)
        t = torch.sigmoid(0.4 + 1.2 * torch.randn(len(x_0), device=x_0.device))
        mixed = t[:, None, None, None]
        noised = ((1 - mixed) * x_0 + mixed * noise).unsqueeze(2)
        u = self.transformer(list(noised), 1 - t, self.embeds(captions), return_dict=False)[0]
        return (torch.stack(u).squeeze(2) - (x_0 - noise)).square().mean()

    def blocks(self) -> list[nn.Module]:
        """Blocks of the stream and of both refiners."""
        network = self.transformer
        return [*network.layers, *network.noise_refiner, *network.context_refiner]

    def pipeline(self, vae: Any) -> Any:
        """The diffusers pipeline of these weights."""
        return ZImagePipeline(
            vae=vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        )  # fmt: skip
