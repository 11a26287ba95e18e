"""Parts of the contract of a family that some methods need, and not every family offers (see its capabilities)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..diffusion.prediction import Prediction
    from .batch import Conditioning

FIRST_HALF: Literal["first_half"] = "first_half"
Blocks = Literal["first_half", "all"] | Sequence[str]
"""Blocks of a network: those of the first half that discriminators read, all, or some by name."""


class Guided:
    """What a pipeline does about guidance besides the usual."""

    encode_prompts: Callable[[Sequence[str]], Conditioning]

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        """Return the embeddings of prompts to stay away from, around which some pipelines write other words."""
        return self.encode_prompts(prompts)

    def with_guidance(self, cond: Prediction, uncond: Prediction, scale: Tensor) -> Prediction:
        """Return the guided prediction of two at one point: uncond + g (cond - uncond), or what the pipeline makes.

        Args:
            cond: Prediction with the prompt.
            uncond: Prediction without it.
            scale: Guidance scale g, shape (B,).
        """
        from ..diffusion.prediction import classifier_free_guidance

        return classifier_free_guidance(cond, uncond, scale)


class InnerActivations:
    """Activations inside the denoiser (``capabilities.features``), and the sizes that modules on them are made for."""

    name: ClassVar[str]

    def features(
        self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, *, blocks: Blocks = FIRST_HALF
    ) -> list[Tensor]:
        """Return activations inside the network, each (B, C_k, h_k, w_k), in the order in which they are computed.

        What comes after the last of them is not computed. The gradient reaches `x_t` and the network's own weights.

        Args:
            network: As of :meth:`predict`.
            x_t: As of :meth:`predict`.
            time: As of :meth:`predict`.
            cond: As of :meth:`predict`.
            blocks: ``first_half``: some blocks of the first half, from fine to coarse; ``all``: every block; or their
                names (:meth:`block_names`), which give their outputs in the network's order.
        """
        raise NotImplementedError(f"the family {self.name} has no features (capabilities.features)")

    def feature_channels(self, network: nn.Module, *, blocks: Blocks = FIRST_HALF) -> list[int]:
        """Return C_k of each level that :meth:`features` returns for these `blocks`."""
        raise NotImplementedError(f"the family {self.name} has no features (capabilities.features)")

    def block_names(self, network: nn.Module) -> list[str]:
        """Return the names of all blocks whose outputs :meth:`features` can return, in the network's order."""
        raise NotImplementedError(f"the family {self.name} has no features (capabilities.features)")

    def shard_units(self, network: nn.Module) -> Sequence[str]:
        """Return the names of the modules of `network` that are gathered one at a time where its weights are sharded
        over processes, in the order in which they are computed; each is called as a module. Empty: all at once.
        """
        return ()

    def prompt_dimensions(self, network: nn.Module) -> Mapping[str, int]:
        """Return the last dimension D of each of the conditioning's embeddings by name, (B, ..., D); empty where they
        are not known from the network.
        """
        return {}


class PixelDecoding:
    """Images of latents with a gradient (``capabilities.pixels``)."""

    name: ClassVar[str]

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) of scaled latents (B, C, h, w), in at least fp32, with the gradient to `latents`.

        0 is black and 1 white. Values beyond are not clamped: a clamp has no gradient where it acts. What decodes stays
        loaded when the encoders are released.
        """
        raise NotImplementedError(f"the family {self.name} decodes without a gradient only (capabilities.pixels)")

    def load_pixel_decoder(self) -> None:
        """Load what :meth:`decode_pixels` needs, and keep it; called before training where a method decodes."""

    def decoding_bytes(self, num_pixels: int) -> int:
        """Estimate, from configs alone, the bytes that :meth:`decode_pixels` takes for one image of `num_pixels`:
        weights, and activations with a gradient.
        """
        return 0


class MemoryEstimates:
    """What the memory of a run is estimated by, from configs alone; 0 or None where a family does not know it."""

    def empty_conditioning(self, network: nn.Module) -> Conditioning | None:
        """Return the conditioning of one sample on the meta device, as :meth:`predict` takes it; None: activations are
        estimated by the size of the network.

        Args:
            network: The denoiser on the meta device.
        """
        return None

    def text_bytes(self) -> int:
        """Return the bytes of all text encoders, as they are loaded to encode prompts."""
        return 0

    def autoencoder_bytes(self) -> int:
        """Return the bytes of the autoencoder's weights."""
        return 0

    def encoding_bytes(self, size: tuple[int, int], *, images: int) -> int:
        """Return the bytes of what encoding makes beside the autoencoder's weights.

        Args:
            size: (width, height) of an image in pixels.
            images: Number of images in a call of ``encode_images``.
        """
        return 0

    def generating_bytes(self, size: tuple[int, int], *, images: int) -> int:
        """Return the bytes of what decoding without a gradient makes beside the autoencoder's weights.

        Args:
            size: (width, height) of an image in pixels.
            images: Number of images in a call of ``decode_latents``.
        """
        return 0
