"""A random AuraFlow that is small enough for tests: `python tiny.py FOLDER`."""

import sys
from pathlib import Path

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

EDGE = 32
"""Pixels along an edge of its pictures; 16 latents."""


def write_tiny_auraflow(folder):
    """Write the model into `folder`, every part of it made here."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((each, -3.0) for each in letters)]
    T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512).save_pretrained(folder / "tokenizer")
    tokenizer = T5TokenizerFast.from_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    text = {"vocab_size": len(vocabulary), "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    vae = {"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4, "sample_size": EDGE}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    network = {"sample_size": EDGE // 2, "num_mmdit_layers": 1, "num_single_dit_layers": 2, "attention_head_dim": 16}
    widths = {"num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 32}
    transformer = AuraFlowTransformer2DModel(**network, **widths, pos_embed_max_size=256)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight += 0.2 * torch.randn_like(weight)  # as it is built its answer is nearly zero, whatever it is told
    AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(UMT5Config(**text, is_encoder_decoder=False, use_cache=False)),
        vae=AutoencoderKL(**vae, **blocks),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    ).save_pretrained(folder)


if __name__ == "__main__":
    write_tiny_auraflow(Path(sys.argv[1]))
