"""The base of families with a multimodal diffusion transformer trained by flow matching."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from ...core.diffusion.second_time import add_second_time, second_time_input
from ...core.errors import UserError
from ...core.plugin_api.batch import Conditioning
from ...core.plugin_api.family_parts import FIRST_HALF, Blocks
from ..calls.networks import check_guidance, chosen_blocks, outputs_inside
from ..calls.smaller import evenly, kept_transformer_weights, not_more, smaller_transformer_config
from ..files.architecture import ReadConfig
from ..files.checks import check_channels
from ..files.empty import empty_denoiser, fill_tables
from .diffusers import DiffusersFamily

LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("norm1.linear", "norm1_context.linear"),
)
"""The attention and feed-forward layers of blocks with two streams, of images and of text, and the modulations that
feed these blocks the time: a few-step student depends on the time in another way than its teacher.
"""
LONGEST_T5 = 512
"""Tokens that T5 was trained with."""
NUM_FEATURES = 4
"""Largest number of activations that are features."""


def longer_t5(length: int, num_tokens: int) -> str:
    """Return how T5, which reads `length` tokens, is made to read `num_tokens` and its mark of the end; empty where it
    reads all that it can.
    """
    longer = min(num_tokens + 1, LONGEST_T5)
    return f"raise family_config.max_sequence_length to {longer}, or shorten them" if longer > length else ""


class TransformerFamily(DiffusersFamily):
    """A family whose denoiser is a transformer with ``transformer_blocks`` over patches of 2 x 2 latents."""

    lora_targets: ClassVar[tuple[str, ...]] = LORA_TARGETS
    pixel_multiple: ClassVar[int] = 16
    position_edge: ClassVar[int] = 2

    class Config(DiffusersFamily.Config):
        """Settings of families with a transformer."""

        student_num_layers: int | None = Field(default=None, ge=1)
        """Number of blocks of two streams that the student has (full training): evenly spaced ones of the teacher's,
        with their weights. Absent: all.
        """

    def takes_guidance(self, network: nn.Module) -> bool:
        return False

    def student_network(
        self, teacher: nn.Module, *, guidance_embedding: bool, second_time: bool = False, smaller: bool = False
    ) -> nn.Module:
        if guidance_embedding:
            raise ValueError("no pipeline of this family tells its network the guidance scale")
        student = self.copy_network(teacher, smaller=smaller)
        if second_time:
            self.add_second_time(student)
        return student

    block_lists: ClassVar[Mapping[str, str]] = {"num_layers": "transformer_blocks"}
    """Key of the network's config that counts blocks -> the list of them; ``student_<key>`` is the family's setting."""
    smaller_students: ClassVar[bool] = True
    """Whether a student may have fewer blocks than its teacher."""

    @classmethod
    def smaller_keys(cls, config: Any) -> list[str]:
        keys = [f"student_{key}" for key in cls.block_lists if cls.smaller_students]
        return [key for key in keys if getattr(config, key) is not None]

    def check_source(self) -> None:
        self._check_smaller_keys()
        super().check_source()

    def _check_smaller_keys(self) -> None:
        keys = [f"student_{key}" for key in self.block_lists if self.smaller_students]
        for key in type(self.config).model_fields:  # the base's key is in the settings of every family
            asked = getattr(self.config, key)
            if key.startswith("student_") and key not in keys and asked is not None:
                raise UserError(
                    f"family_config.{self.name}.{key} = {asked}, but "
                    + ("the network has no list of blocks of this name" if keys else "a student has all blocks here"),
                    f"set {' or '.join(keys)}" if keys else "leave the key out",
                )

    def kept_blocks(self, teacher: Any) -> dict[str, list[int]]:
        """Return key of the network's config -> indices of the teacher's blocks that a smaller student has."""
        kept = {}
        for key in self.block_lists:
            asked, there = getattr(self.config, f"student_{key}"), teacher.config[key]
            not_more(f"student_{key}", asked or there, there)
            kept[key] = evenly(there, asked or there)
        return kept

    def copy_network(self, teacher: Any, *, smaller: bool = False, **changes: Any) -> Any:
        """Return a trainable fp32 copy of `teacher`, its weights read from the files, with `changes` of its config;
        weights that these add are zero.
        """
        config, names = {**teacher.config, **changes}, None
        if smaller:
            kept = self.kept_blocks(teacher)
            config = smaller_transformer_config(config, kept)
            names = {name: name for name in self.empty_network().state_dict()}
            names = kept_transformer_weights(names, {self.block_lists[key]: kept[key] for key in kept})
        student, state = empty_denoiser(self.architecture, config), self.wide_state(names)
        missing = {name: value for name, value in student.state_dict().items() if name not in state}
        wide = next(iter(state.values()))  # not the teacher's weights, which may be packed
        zeros = {name: wide.new_zeros(value.shape) for name, value in missing.items()}
        student.load_state_dict({**state, **zeros}, assign=True)
        fill_tables(student, self.architecture, config, device=self.settings.device)
        return self.with_wide_ends(student.requires_grad_(True).eval())

    time_embedder: ClassVar[str] = "time_text_embed.timestep_embedder"
    """The module whose output (B, D) tells all blocks the time."""

    def add_second_time(self, network: nn.Module, *, name: str = "student") -> nn.Module:
        embedder = network.get_submodule(self.time_embedder)
        last = [module for module in embedder.modules() if isinstance(module, nn.Linear)][-1]
        untimed = self.untimed_rows(network)
        return add_second_time(network, name=name, path=self.time_embedder, width=last.out_features, untimed=untimed)

    def untimed_rows(self, network: nn.Module) -> int:
        """Return the number of the last rows of that output that are of no sample."""
        return 0

    def call_network(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """Return the prediction (B, C, h, w) of one call of the network; arguments are those of :meth:`predict`."""
        raise NotImplementedError(f"the family {self.name} has neither call_network() nor predict()")

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
        check_guidance(guidance, taken=False)
        with second_time_input(network, time, second_time):
            return self.call_network(network, x_t, time, cond)

    def features(
        self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, *, blocks: Blocks = FIRST_HALF
    ) -> list[Tensor]:
        """Return states of the image stream after blocks, (B, D, h, w) each; the first half is up to four evenly spaced
        ones of it.
        """
        transformer: Any = network
        chosen = self._chosen_blocks(transformer, blocks)
        grid = [edge // self.position_edge for edge in x_t.shape[-2:]]
        modules = [transformer.get_submodule(name) for name in chosen]
        count = self.block_names(transformer).index(chosen[-1]) + 1
        with only_first_blocks(transformer, self.lists_of_blocks(transformer), count):
            return outputs_inside(
                modules,
                lambda: self.predict(transformer, x_t, time, cond),
                pick=lambda output: (
                    self.image_states(self.image_first(output, cond), grid).transpose(1, 2).unflatten(2, grid)
                ),
                stop=False,
            )

    def image_first(self, output: Any, cond: Conditioning) -> Any:
        """Return the output of a block with the image's states before those of prompts, whose lengths differ.

        Args:
            output: What the block returned.
            cond: What the network was called with.
        """
        return output

    def image_states(self, output: Any, grid: Sequence[int]) -> Tensor:
        """Return the states (B, rows * columns, D) of the image's positions from the output of a block.

        Args:
            output: What the block returned: by default (the text's states, the image's), or one stream of both.
            grid: Its rows and columns.
        """
        if isinstance(output, tuple):
            return output[1]
        positions = grid[0] * grid[1]
        return output[:, -positions:] if self.text_first else output[:, :positions]

    text_first: ClassVar[bool] = False
    """Whether the text's positions come before the image's in one stream."""

    def inner_width(self, network: nn.Module) -> int:
        """Return the width D of the states between blocks."""
        transformer: Any = network
        return transformer.inner_dim

    def feature_channels(self, network: nn.Module, *, blocks: Blocks = FIRST_HALF) -> list[int]:
        return [self.inner_width(network)] * len(self._chosen_blocks(network, blocks))

    def block_names(self, network: nn.Module) -> list[str]:
        lists = self.lists_of_blocks(network)
        return [f"{name}.{i}" for name, blocks in lists.items() for i in range(len(blocks))]

    def lists_of_blocks(self, network: nn.Module) -> dict[str, Any]:
        """Return the lists of blocks by name, in the order in which they are computed."""
        return {name: getattr(network, name) for name in self.block_lists.values()}

    def shard_units(self, network: nn.Module) -> list[str]:
        return self.block_names(network)

    text_widths: ClassVar[Mapping[str, str]] = {
        "prompt_embeds": "joint_attention_dim",
        "pooled_prompt_embeds": "pooled_projection_dim",
    }
    """Name of an embedding (B, ..., D) -> key of the network's config that is D."""

    def prompt_dimensions(self, network: nn.Module) -> dict[str, int]:
        transformer: Any = network
        return {name: transformer.config[key] for name, key in self.text_widths.items()}

    def _chosen_blocks(self, transformer: Any, blocks: Blocks) -> list[str]:
        names = self.block_names(transformer)
        return chosen_blocks(names, blocks, first_half=[names[index] for index in self._feature_blocks(transformer)])

    def _feature_blocks(self, transformer: Any) -> list[int]:
        """Return the indices of the blocks of the first list whose states are features of the first half."""
        first, *others = (len(blocks) for blocks in self.lists_of_blocks(transformer).values())
        half = min(first, max(1, (first + sum(others)) // 2))
        count = min(NUM_FEATURES, half)
        return [half * (number + 1) // count - 1 for number in range(count)]


class FirstOf(nn.ModuleList):
    """The first `count` of a list of blocks, of the length of all: some networks count with it.

    Args:
        blocks: All of them.
        count: Number of those that it goes through.
    """

    def __init__(self, blocks: nn.ModuleList, count: int) -> None:
        self._length = 0  # as the list is filled
        super().__init__(blocks[:count])
        self._length = len(blocks)

    def __len__(self) -> int:
        return self._length or len(self._modules)


@contextlib.contextmanager
def only_first_blocks(transformer: Any, whole: Mapping[str, Any], count: int) -> Iterator[None]:
    """Run only the first `count` blocks of `transformer` inside the block; its ends stay.

    Args:
        transformer: The network.
        whole: Its lists of blocks by name.
        count: Number of blocks that run.
    """
    for name, blocks in whole.items():
        setattr(transformer, name, FirstOf(blocks, count))
        count = max(count - len(blocks), 0)
    try:
        yield
    finally:
        for name, blocks in whole.items():
            setattr(transformer, name, blocks)


def check_latents(name: str, config: ReadConfig, *, packed: int = 1, usual: int = 0) -> None:
    """Raise UserError unless the transformer takes the latents of the model's own autoencoder, on a flow.

    Args:
        name: Name of the model.
        config: Reads its configs.
        packed: Number of latents that are one position of the transformer.
        usual: Channels of a transformer whose config names none.
    """
    channels = config("transformer/config.json").get("in_channels", usual)
    check_channels(name, "transformer", channels / packed if packed > 1 else channels, config("vae/config.json"))
    check_flow(name, config)


def check_flow(name: str, config: ReadConfig) -> None:
    """Raise UserError unless the model's scheduler is one of flow matching."""
    kind = str(config("scheduler/scheduler_config.json").get("_class_name"))
    if "FlowMatch" not in kind:
        raise UserError(
            f"model {name!r} has a {kind} (scheduler/scheduler_config.json: _class_name), not one of flow matching",
            "restore the scheduler of the model's origin, a FlowMatchEulerDiscreteScheduler",
        )
