"""The base of families with a UNet: its calls, inner activations, and copies of it to train."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...core.diffusion.second_time import add_second_time, second_time_input
from ...core.errors import UserError
from ...core.plugin_api.batch import Conditioning
from ...core.plugin_api.family_parts import FIRST_HALF, Blocks
from ...core.utils.full_precision import input_type
from ..calls.images import guidance_scale_embedding
from ..calls.networks import check_guidance, chosen_blocks, outputs_inside
from ..calls.smaller import kept_unet_weights, smaller_unet_config
from ..files.architecture import Architecture
from ..files.empty import empty_denoiser
from .diffusers import DiffusersFamily

GUIDANCE_DIM = 256
"""``time_cond_proj_dim`` of a student with a guidance embedding."""
LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""Every attention, feed-forward and convolution of a UNet's blocks."""
Levels = Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=1)]]
Depths = Annotated[int, Field(ge=0)] | list[Annotated[int, Field(ge=0)]]
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


class UNetFamily(DiffusersFamily):
    """A family whose denoiser is a ``UNet2DConditionModel``."""

    lora_targets = LORA_TARGETS
    ends = ("conv_in", "conv_norm_out", "conv_out")

    class Config(DiffusersFamily.Config):
        """Settings of families with a UNet."""

        prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
        """The network's prediction type, for models whose scheduler config does not state it."""
        rescale_betas_zero_snr: bool | None = None
        """Whether the model was trained with zero terminal SNR, for models whose scheduler config does not state it."""
        channels_last: bool = True
        """Lay out the UNet's weights channels last, as tensor cores read them. Which is faster depends on the card:
        `benchmarks/gpu.py` measures both."""
        student_layers_per_block: Levels | None = None
        """Residual layers of the student in each level, one number or one per level (full training); absent: as many
        as the teacher's. The student begins with the weights of the layers it keeps."""
        student_transformer_layers: Depths | None = None
        """Transformer layers in the student's attentions, one number or one per level; 0: no attention there."""
        student_mid_block: bool = True
        """Whether the student has a middle block."""

    @classmethod
    def smaller_keys(cls, config: Any) -> list[str]:
        keys = ("student_layers_per_block", "student_transformer_layers", "student_mid_block")
        return [key for key in keys if getattr(config, key) not in (None, True)]

    def scheduler_overrides(self) -> dict[str, Any]:
        said = {key: getattr(self.config, key) for key in ("prediction_type", "rescale_betas_zero_snr")}
        return {key: value for key, value in said.items() if value is not None}

    def check_source(self) -> None:
        super().check_source()
        if self.prediction_type not in PREDICTIONS:
            raise UserError(
                f"model {self.settings.source!r} predicts {self.prediction_type!r} (scheduler_config.json)",
                f"set family_config.prediction_type to {', '.join(PREDICTIONS[:2])} or {PREDICTIONS[2]}",
            )

    def laid_out(self, network: nn.Module) -> nn.Module:
        if not self.config.channels_last:
            return network
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def flow_needs_help(self) -> bool:
        return self.prediction_type == "flow"

    def takes_guidance(self, network: nn.Module) -> bool:
        unet: Any = network
        return unet.config.time_cond_proj_dim is not None

    def input_weight(self, network: nn.Module) -> Tensor:
        unet: Any = network
        return unet.conv_in.weight

    def added(self, cond: Conditioning, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """Return ``added_cond_kwargs`` of the UNet: its conditioning beside the prompt's states."""
        return None

    def student_network(
        self, teacher: nn.Module, *, guidance_embedding: bool, second_time: bool = False, smaller: bool = False
    ) -> nn.Module:
        unet: Any = teacher
        config, kept = self._shape(unet) if smaller else (dict(unet.config), None)
        student = copy_unet(self.architecture, config, self.wide_state(kept), guidance_embedding=guidance_embedding)
        if second_time:
            unet_second_time(student, name="student")
        return self.with_wide_ends(self.laid_out(student))

    def _shape(self, teacher: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the smaller student's config, and the names of its weights -> the teacher's that they begin with."""
        config = smaller_unet_config(
            teacher.config,
            layers=self.config.student_layers_per_block,
            depth=self.config.student_transformer_layers,
            middle=self.config.student_mid_block,
        )
        names = {name: name for name in self.empty_network().state_dict()}
        return config, kept_unet_weights(names, teacher.config, config)

    def add_second_time(self, network: nn.Module, *, name: str = "student") -> nn.Module:
        return unet_second_time(network, name=name)

    def predict(
        self,
        network: nn.Module,
        x_t: Tensor,
        time: Tensor,
        cond: Conditioning,
        *,
        guidance: Tensor | None = None,
        second_time: Tensor | None = None,
    ) -> Tensor:
        unet: Any = network
        dtype = self.weight_type(unet)
        width = unet.config.time_cond_proj_dim
        check_guidance(guidance, taken=width is not None)
        with second_time_input(unet, time, second_time):
            return unet(
                x_t.to(input_type(dtype, x_t.device)),
                time,
                encoder_hidden_states=cond["prompt_embeds"].to(dtype),
                timestep_cond=None if guidance is None else guidance_scale_embedding(guidance, width).to(dtype),
                added_cond_kwargs=self.added(cond, dtype),
                return_dict=False,
            )[0]

    def features(
        self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, *, blocks: Blocks = FIRST_HALF
    ) -> list[Tensor]:
        """Return outputs of blocks; the first half is the down blocks and the middle block."""
        unet: Any = network
        return outputs_inside(
            [unet.get_submodule(name) for name in self._chosen_blocks(unet, blocks)],
            lambda: self.predict(unet, x_t, time, cond),
            # a down block returns its skip connections to the up blocks as well
            pick=lambda output: output[0] if isinstance(output, tuple) else output,
            stop=True,
        )

    def feature_channels(self, network: nn.Module, *, blocks: Blocks = FIRST_HALF) -> list[int]:
        unet: Any = network
        widths = list(unet.config.block_out_channels)
        middle = [widths[-1]] if unet.mid_block is not None else []
        of_block = dict(zip(self.block_names(unet), [*widths, *middle, *reversed(widths)], strict=True))
        return [of_block[name] for name in self._chosen_blocks(unet, blocks)]

    def block_names(self, network: nn.Module) -> list[str]:
        unet: Any = network
        down, up = (range(len(each)) for each in (unet.down_blocks, unet.up_blocks))
        middle = ["mid_block"] if unet.mid_block is not None else []
        return [*(f"down_blocks.{i}" for i in down), *middle, *(f"up_blocks.{i}" for i in up)]

    def shard_units(self, network: nn.Module) -> list[str]:
        layers: list[str] = []
        for name in self.block_names(network):
            block: Any = network.get_submodule(name)
            kinds = {kind: len(getattr(block, kind, None) or ()) for kind in ("resnets", "attentions")}
            for index in range(max(kinds.values())):
                layers += [f"{name}.{kind}.{index}" for kind, count in kinds.items() if index < count]
        return layers

    def prompt_dimensions(self, network: nn.Module) -> dict[str, int]:
        unet: Any = network
        return {"prompt_embeds": unet.config.encoder_hid_dim or unet.config.cross_attention_dim}

    def _chosen_blocks(self, unet: Any, blocks: Blocks) -> list[str]:
        names = self.block_names(unet)
        return chosen_blocks(names, blocks, first_half=[name for name in names if not name.startswith("up_")])


def copy_unet(
    architecture: Architecture, config: dict[str, Any], state: dict[str, Tensor], *, guidance_embedding: bool
) -> Any:
    """Return a trainable UNet of this config with these weights; a guidance embedding that they lack starts at zero."""
    if guidance_embedding and config.get("time_cond_proj_dim") is None:
        first = state["time_embedding.linear_1.weight"]
        state["time_embedding.cond_proj.weight"] = first.new_zeros(first.shape[1], GUIDANCE_DIM)
        config["time_cond_proj_dim"] = GUIDANCE_DIM
    student = empty_denoiser(architecture, config)
    student.load_state_dict(state, assign=True)
    return student.requires_grad_(True).eval()


def unet_second_time(unet: Any, *, name: str) -> nn.Module:
    """Return the second time `name` of a UNet, added to the output of its time embedding."""
    width = unet.time_embedding.linear_2.out_features
    return add_second_time(unet, name=name, path="time_embedding", width=width)
