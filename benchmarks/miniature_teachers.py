"""What the miniature teachers of all families share: the scenes as training sees them, and the teacher on disk."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import miniature
import miniature_networks as networks
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Scenes:
    """The pool as training sees it: latents, and the number of each sample's caption; the last caption is empty."""

    def __init__(self, work: Path, device: str) -> None:
        self.device = device
        pool, stored = miniature.load_pool(work, "pool"), work / "latents.npy"
        if not stored.is_file():
            vae = miniature.load_vae()
            np.save(stored, (miniature.encode_pool(vae, pool["pixels"]) * vae.config.scaling_factor).half().numpy())
        self.latents = torch.from_numpy(np.load(stored)).to(device)
        captions, self.caption_of = np.unique(pool["captions"], return_inverse=True)
        self.counts = Counter(pool["captions"].tolist())
        self.captions = [*captions.tolist(), ""]

    def tokens(self, tokenizer: Any, length: int) -> Tensor:
        """(captions, length) of every caption, padded as the pipelines do."""
        kinds = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return tokenizer(self.captions, max_length=length, **kinds).input_ids.to(self.device)

    def batch(self, index: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        """Latents (B, 4, S/2, S/2), and the numbers (B,) of their captions, some replaced by the empty one."""
        chosen = torch.from_numpy(self.caption_of[index.numpy()])
        dropped = torch.rand(len(index)) < dropout
        chosen = chosen.where(~dropped, len(self.captions) - 1)
        return self.latents[index.to(self.device)].float(), chosen.to(self.device)


class Teacher(nn.Module):
    """A text-to-image model that is trained as a whole, but for its autoencoder."""

    folder: Path
    call: ClassVar[dict[str, Any]] = {}
    guidance: ClassVar[float] = 3.0
    bits: ClassVar[int] = 7
    """Of a weight's mantissa, when it is saved."""

    @abstractmethod
    def loss(self, x_0: Tensor, captions: Tensor) -> Tensor:
        """The mean loss of latents (B, C, h, w) with captions of these numbers (B,)."""

    @abstractmethod
    def pipeline(self, vae: Any) -> Any:
        """The diffusers pipeline of these weights."""

    def begin(self, part: str, state: dict[str, Tensor]) -> None:
        """Load the weights of the part of this name to train on from them; a tied weight is stored once."""
        module = getattr(self, part)
        missing, unexpected = module.load_state_dict(state, strict=False)
        tied = set(getattr(module, "_tied_weights_keys", None) or ())
        if unexpected or set(missing) - tied:
            raise ValueError(f"{part}: weights of another network: {unexpected} too many, {missing} missing")

    def begin_with(self, folder: Path) -> None:
        """:meth:`begin` each part whose PART/*.safetensors lie in the folder; others' are passed over."""
        for file in folder.glob("*/*.safetensors"):
            if hasattr(self, file.parent.name):  # not the autoencoder
                self.begin(file.parent.name, load_file(file))

    def blocks(self) -> list[nn.Module]:
        """The denoiser's blocks, which may be compiled one by one; none where that was not tried."""
        return []

    def save(self) -> None:
        """Write the pipeline in half precision, beside the judge and the prompts of the miniature SDXL."""
        halved = deepcopy(self).cpu().half().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        networks.save_pipeline(halved.pipeline(self.autoencoder().half()), self.folder, bits=self.bits)
        shutil.copy(self.sdxl() / "prompts.txt", self.folder / "prompts.txt")
        self.save_judge()

    def save_judge(self) -> None:
        """Write a copy of the miniature SDXL's."""
        shutil.copytree(self.sdxl() / "judge", self.folder / "judge", dirs_exist_ok=True)

    def sdxl(self) -> Path:
        """The folder of the miniature SDXL that this teacher follows."""
        return miniature.TEACHER

    def autoencoder(self) -> Any:
        """The miniature SDXL's."""
        return miniature.load_vae()


class ShiftedTeacher(Teacher):
    """A teacher on a flow, whose autoencoder's latents are shifted by their mean as those of Stable Diffusion 3 are."""

    shift: float

    def shift_of(self, scenes: Scenes) -> float:
        """The mean of the autoencoder's own latents."""
        self._scale = float(super().autoencoder().config.scaling_factor)
        return (scenes.latents.float().mean() / self._scale).item()

    def shifted(self, x_0: Tensor, *, back: bool = False) -> Tensor:
        """Latents of the miniature SDXL (B, C, h, w) as this teacher's autoencoder has them, or the way back."""
        return x_0 + (self.shift if back else -self.shift) * self._scale

    def autoencoder(self) -> Any:
        """The miniature SDXL's, with the shift."""
        vae = super().autoencoder()
        vae.register_to_config(shift_factor=round(self.shift, 5))
        return vae
