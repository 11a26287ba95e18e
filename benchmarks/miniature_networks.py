"""The parts of the miniature SDXL: autoencoder, tokenizers, text encoders, UNet, scheduler, and the pipeline of them.

Every part is of the class and of the kind of configuration that SDXL itself has; only widths and depths are small.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import miniature_data as scenes
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MAX_TOKENS = 24


def new_vae() -> AutoencoderKL:
    """The SDXL autoencoder in small: two levels (compression 2), four latent channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(24, 48),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=scenes.RESOLUTION,
        force_upcast=False,
    )


def new_tokenizer(captions: list[str], pad_token: str, length: int = MAX_TOKENS) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learned from the captions; laid out as CLIP's own vocabulary."""
    alphabet = sorted(ByteLevel.alphabet())
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = Lowercase(), WhitespaceSplit()
    trainer = BpeTrainer(vocab_size=2000, min_frequency=2, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator([caption.replace(",", "") for caption in captions], trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *dict.fromkeys(map("".join, merges))]
    vocabulary = dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=merges,
        pad_token=pad_token,
        model_max_length=length,
    )


def text_config(tokenizer: CLIPTokenizer, activation: str, *, width: int = 64) -> CLIPTextConfig:
    """Two layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_unet() -> UNet2DConditionModel:
    """The SDXL UNet in small: three levels, attention in the lower two, text_time conditioning."""
    return UNet2DConditionModel(
        sample_size=scenes.RESOLUTION // 2,
        block_out_channels=(48, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(3, 4, 6),  # as in SDXL's own config: the number of heads
        cross_attention_dim=128,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 64,
        norm_num_groups=16,
    )


class Teacher(nn.Module):
    """What is trained jointly: both text encoders and the UNet."""

    def __init__(self, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(text_config(tokenizers[0], "quick_gelu"))
        self.text_encoder_2 = CLIPTextModelWithProjection(text_config(tokenizers[1], "gelu"))
        self.unet = new_unet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self, noisy: Tensor, t: Tensor, tokens: tuple[Tensor, Tensor], time_ids: Tensor, keep: Tensor
    ) -> Tensor:
        """Predict the noise; `keep` (B,) is 0 where the caption is dropped: zeros for both embeddings, as in SDXL."""
        first = self.text_encoder(tokens[0], output_hidden_states=True)
        second = self.text_encoder_2(tokens[1], output_hidden_states=True)
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1) * keep[:, None, None]
        added = {"text_embeds": second.text_embeds * keep[:, None], "time_ids": time_ids}
        return self.unet(noisy, t, encoder_hidden_states=context, added_cond_kwargs=added).sample


def new_scheduler() -> EulerDiscreteScheduler:
    """The scheduler of SDXL base, setting for setting."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        prediction_type="epsilon",
        interpolation_type="linear",
        use_karras_sigmas=False,
    )


def save_teacher(teacher: Teacher, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], folder: Path) -> None:
    """Write the diffusers pipeline in half precision, beside the judge and the prompts that are there already."""
    halved = deepcopy(teacher).cpu().half().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float16),
        text_encoder=halved.text_encoder,
        text_encoder_2=halved.text_encoder_2,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=halved.unet,
        scheduler=new_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    save_pipeline(pipeline, folder)


def save_pipeline(pipeline: Any, folder: Path, *, bits: int = 7) -> None:
    """Write a pipeline of halves, which it rounds (`shorten`); what loads it plainly gets float32."""
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and name != "vae":  # the autoencoder's figures are those of its halves
            shorten(part, bits)
    pipeline.save_pretrained(folder)
    for path in folder.glob("text_encoder*/config.json"):  # diffusers loads the other parts as float32
        path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'), encoding="utf-8")
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):  # without where a part was loaded from
        config = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in folder.glob("tokenizer*"):
        tokenizer = getattr(pipeline, path.name)
        if isinstance(tokenizer, CLIPTokenizer):
            tokenizer.backend_tokenizer.model.save(str(path))  # vocab.json and merges.txt, for older readers


@torch.no_grad()
def shorten(part: nn.Module, bits: int) -> None:
    """Round weights in place to so many bits after the leading one, so that halves compress better in a wheel.

    7 are those of bfloat16: four fifths remain, and two thirds with 5, at errors of 0.2 % and 0.7 %.
    """
    for weight in part.parameters():
        mantissa, exponent = torch.frexp(weight.float())
        weight.copy_(torch.ldexp(torch.round(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent))


def restore_teacher(teacher: Teacher, folder: Path) -> None:
    """Give `teacher` the weights that `save_teacher` wrote."""
    pipeline = load_teacher(folder)
    for name in ("text_encoder", "text_encoder_2", "unet"):
        getattr(teacher, name).load_state_dict(getattr(pipeline, name).state_dict())


def load_teacher(folder: Path) -> StableDiffusionXLPipeline:
    """The shipped teacher, in single precision."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float32)
