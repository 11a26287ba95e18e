"""AuraFlow: a transformer trained by flow matching, which reads prompts through one T5.

The network sees T5's states with those of the padding set to zero, (B, 256, D). The unconditional is the encoded empty
prompt.

References:
    Ryu et al., AuraFlow v0.1 (fal.ai, 2024); its pipeline in diffusers is AuraFlowPipeline.
"""

import sys
from pathlib import Path

import distill
import torch
from distill.model_families import Architecture, DiffusersFamily, check_channels, check_flow, token_ids
from pydantic import Field

PIPELINE_TOKENS = 256
EDGE = 32
"""Pixels along an edge of the images of the random model; 16 latents."""


def check_configs(name, config):
    """Raise UserError unless the transformer takes what the model's autoencoder makes, on a flow."""
    check_channels(name, "transformer", config("transformer/config.json").get("in_channels"), config("vae/config.json"))
    check_flow(name, config)


class AuraFlow(DiffusersFamily):
    """AuraFlow and its fine-tunes."""

    name = "auraflow"
    capabilities = distill.Capabilities(lora=True, full=True)
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("norm1.linear", "norm1_context.linear"),
    )
    default_guidance = 3.5
    pixel_multiple = 16
    position_edge = 2
    embed_keys = ("prompt_embeds", "prompt_attention_mask")
    architecture = Architecture(
        title="an AuraFlow",
        pipeline="AuraFlowPipeline",
        accepted=("AuraFlowPipeline",),
        denoiser="transformer",
        denoiser_class="AuraFlowTransformer2DModel",
        tokenizers={"tokenizer": "AutoTokenizer"},
        encoders={"text_encoder": "UMT5EncoderModel"},
        check=check_configs,
        made_of="an AuraFlow has T5 as its text encoder",
        lora_encoders=(),
    )

    class Config(DiffusersFamily.Config):
        """Settings of the family auraflow, under `family_config`."""

        max_sequence_length: int = Field(PIPELINE_TOKENS, ge=1, le=512)
        """Tokens of a prompt that T5 reads; the rest is cut off."""

    @property
    def longest_reader(self):
        return "tokenizer", self.config.max_sequence_length

    def text_settings(self):
        return (f"max_sequence_length={self.config.max_sequence_length}",)

    @torch.no_grad()
    def encode(self, text, prompts):
        tokenizer, encoder = text.pairs()[0]
        tokens = token_ids(tokenizer, prompts, length=self.config.max_sequence_length).to(encoder.device)
        states = encoder(**tokens)[0]  # (B, T, D)
        mask = tokens.attention_mask.to(states)  # (B, T)
        return {"prompt_embeds": states * mask[..., None], "prompt_attention_mask": mask}

    def input_weight(self, network):
        return network.pos_embed.proj.weight

    def takes_guidance(self, network):
        return False

    def student_network(self, teacher, *, guidance_embedding, second_time=False, smaller=False):
        return self.copy_network(teacher)

    def predict(self, network, x_t, time, cond, *, guidance=None, second_time=None):
        dtype = self.input_weight(network).dtype
        return network(
            x_t.to(dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            timestep=(time / 1000).to(dtype),
            return_dict=False,
        )[0]

    def snippet_call(self, info):
        length = self.config.max_sequence_length
        return super().snippet_call(info) | ({} if length == PIPELINE_TOKENS else {"max_sequence_length": length})

    @classmethod
    def example(cls, folder):
        """A small random model, to be checked on."""
        write_tiny_auraflow(folder)
        return folder


def write_tiny_auraflow(folder):
    """Write a random model into `folder`, of the same classes, a few thousand times smaller."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

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


@distill.hookimpl
def register_families():
    return [AuraFlow]


if __name__ == "__main__":
    AuraFlow.example(Path(sys.argv[1]))
