"""Ovis-Image: a transformer over text and packed latents, trained by flow matching, told prompts by a language model.

Qwen3 reads each prompt after a system prompt, in a conversation. The network takes its states from the prompt on,
(B, 256, 2048), those of the padding set to zero. The unconditional is the empty prompt, encoded in the same way.

References:
    Ovis Team, Ovis-Image Technical Report, arXiv 2511.22982.
"""

import sys
from pathlib import Path

import distill
import torch
from distill.model_families import (
    Architecture,
    TransformerFamily,
    as_chat,
    check_channels,
    check_flow,
    pack,
    patch_ids,
    text_ids,
    token_ids,
    unpack,
)
from pydantic import Field

PIPELINE_TOKENS = 256
SYSTEM = (
    "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships of the "
    "objects and background: "
)
BEFORE = 28
"""Tokens of the conversation before the prompt, which the pipeline leaves out of the states."""
PATCH = 4
"""Number of latents that are one position of the network."""
EDGE = 32
"""Pixels along an edge of the images of the random model; 16 latents."""


def check_configs(name, config):
    """Raise UserError unless the transformer takes what the model's autoencoder makes, packed, on a flow."""
    channels = config("transformer/config.json").get("in_channels", 0)
    check_channels(name, "transformer", channels / PATCH, config("vae/config.json"))
    check_flow(name, config)


class OvisImage(TransformerFamily):
    """Ovis-Image and its fine-tunes."""

    name = "ovis-image"
    capabilities = distill.Capabilities(lora=True, full=True, features=True)
    lora_targets = (*TransformerFamily.lora_targets, "norm.linear", "proj_mlp", "proj_out")
    default_guidance = 5.0
    embed_keys = ("prompt_embeds",)
    text_widths = {"prompt_embeds": "joint_attention_dim"}
    block_lists = {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"}
    architecture = Architecture(
        title="an Ovis-Image",
        pipeline="OvisImagePipeline",
        accepted=("OvisImagePipeline",),
        denoiser="transformer",
        denoiser_class="OvisImageTransformer2DModel",
        tokenizers={"tokenizer": "AutoTokenizer"},
        encoders={"text_encoder": "Qwen3Model"},
        check=check_configs,
        made_of="an Ovis-Image has Qwen3 as its text encoder",
        lora_encoders=(),
    )

    class Config(TransformerFamily.Config):
        """Settings of the family ovis-image, under `family_config`."""

        max_sequence_length: int = Field(PIPELINE_TOKENS, ge=1)
        """Tokens of a prompt that the language model reads; the rest is cut off."""
        student_num_single_layers: int | None = Field(None, ge=1)
        """Number of blocks of one stream that the student has (full training)."""

    @property
    def num_tokens(self):
        return self.config.max_sequence_length + BEFORE

    @property
    def longest_reader(self):
        return "tokenizer", self.num_tokens

    @property
    def prompt_positions(self):
        return self.config.max_sequence_length

    def text_settings(self):
        return (f"max_sequence_length={self.config.max_sequence_length}",)

    def written(self, tokenizer, prompts):
        return as_chat(tokenizer, [SYSTEM + prompt for prompt in prompts], enable_thinking=False)

    @torch.no_grad()
    def encode(self, text, prompts):
        tokenizer, encoder = text.pairs()[0]
        tokens = token_ids(tokenizer, self.written(tokenizer, prompts), length=self.num_tokens).to(encoder.device)
        states = encoder(**tokens).last_hidden_state * tokens.attention_mask[..., None]  # (B, 28 + T, D)
        return {"prompt_embeds": states[:, BEFORE:]}

    @property
    def taken_channels(self):
        return super().taken_channels // PATCH

    def input_weight(self, network):
        return network.x_embedder.weight

    def predict(self, network, x_t, time, cond, *, guidance=None, second_time=None):
        dtype, (height, width) = self.input_weight(network).dtype, x_t.shape[-2:]
        states = cond["prompt_embeds"].to(dtype)  # (B, T, D)
        packed = network(
            hidden_states=pack(x_t.to(dtype)),  # (B, h/2 w/2, 4 C)
            timestep=time.to(dtype) / 1000,
            encoder_hidden_states=states,
            txt_ids=text_ids(states.shape[1], like=states, counted=True),  # (0, i, i)
            img_ids=patch_ids(height, width, like=states),
            return_dict=False,
        )[0]
        return unpack(packed, height, width)

    def to_network(self, latents):
        return pack(latents)

    def from_network(self, latents, *, size):
        return unpack(latents, size[1] // self.scale_factor, size[0] // self.scale_factor)

    def pipeline_prompts(self, embeds, prefix=""):
        named = super().pipeline_prompts(embeds, prefix)
        return {**named, "negative_prompt": None} if prefix else named

    def snippet_call(self, info):
        length = self.config.max_sequence_length
        return super().snippet_call(info) | ({} if length == PIPELINE_TOKENS else {"max_sequence_length": length})

    @classmethod
    def example(cls, folder):
        """A small random model, to be checked on."""
        write_tiny_ovis_image(folder)
        return folder


TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def write_tiny_ovis_image(folder):
    """Write a random model into `folder`, of the same classes, a few hundred thousand times smaller."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, OvisImagePipeline, OvisImageTransformer2DModel
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

    letters = {token: number for number, token in enumerate([*sorted(ByteLevel.alphabet()), "<|endoftext|>"])}
    marks = ["<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[], chat_template=TEMPLATE, additional_special_tokens=marks)
    torch.manual_seed(0)
    text = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    vae = {"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4, "shift_factor": 0.1}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    network = {"in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 2}
    widths = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
    transformer = OvisImageTransformer2DModel(**network, **widths, axes_dims_rope=(4, 6, 6))
    with torch.no_grad():
        for weight in transformer.parameters():
            weight += 0.2 * torch.randn_like(weight)  # as it is built its answer is nearly zero, whatever it is told
    OvisImagePipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen3Model(Qwen3Config(**text, **heads, use_cache=False)),
        vae=AutoencoderKL(**vae, **blocks),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)


@distill.hookimpl
def register_families():
    return [OvisImage]


if __name__ == "__main__":
    OvisImage.example(Path(sys.argv[1]))
