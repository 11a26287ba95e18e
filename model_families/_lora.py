"""LoRAs: finding their files, fusing them into the teacher, attaching them beside a student's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ._files import quiet_libraries
from ._finite import check_lora

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ._architecture import Architecture

WEIGHTS = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Lora:
    """One LoRA as diffusers reads it.

    Attributes:
        name: As the user wrote it.
        weight: Factor of its contribution.
        state: Tensors by name, prefixed with the part that they change: ``unet.``, ``text_encoder_2.``.
        alphas: Alphas by tensor name, for files that carry them (kohya), or None.
        metadata: diffusers' adapter metadata of the file (rank, alpha, targets), or None.
    """

    name: str
    weight: float
    state: Mapping[str, Tensor]
    alphas: Mapping[str, float] | None
    metadata: Mapping[str, Any] | None

    def has(self, prefix: str) -> bool:
        """Return True if it changes the component `prefix`."""
        return any(key.startswith(f"{prefix}.") for key in self.state)


def lora_file(name: str) -> Path:
    """Return the LoRA's file; `name` is a file, a folder with one, ``owner/name`` or ``owner/name/file``."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"LoRA {name!r} is not a .safetensors file", "pickled weights are never loaded: convert it")
        return path
    if path.is_dir():
        return _only_weights(path)
    return _hub_file(name)


def student_folder(name: str) -> Path:
    """Return the folder of the LoRA `name`, with the second time beside it if it has one."""
    file = lora_file(name)
    if not Path(name).expanduser().exists():
        _download_second_time(name)
    return file.parent


def read_lora(name: str, weight: float, architecture: Architecture, config: Mapping[str, Any]) -> Lora:
    """Read the LoRA `name`, in diffusers' or kohya's format, for a denoiser of `config`.

    Raises UserError when it is none for this architecture.
    """
    with quiet_libraries():
        read: Any = architecture.pipeline_class().lora_state_dict(
            str(lora_file(name)),
            unet_config=SimpleNamespace(**config),
            return_alphas=True,
            return_lora_metadata=True,
            use_safetensors=True,
        )
    state, *alphas, metadata = read  # some pipelines know no alphas
    check_lora(name, state)
    lora = Lora(name, weight, state, alphas[0] if alphas else None, metadata)
    if not any(lora.has(prefix) for prefix in (architecture.denoiser, *architecture.lora_encoders)):
        raise UserError(
            f"LoRA {name!r} holds nothing for {architecture.title} (its first tensor is {next(iter(state), None)!r})",
            f"name a LoRA that was trained for {architecture.name}, in diffusers' or kohya's format",
        )
    return lora


def fuse(architecture: Architecture, components: Mapping[str, nn.Module], loras: Sequence[Lora]) -> None:
    """Add every LoRA, at its weight, to the weights of `components`; no adapter is left behind.

    Args:
        architecture: The architecture whose pipeline reads them.
        components: Networks by pipeline name: ``unet``, ``text_encoder``, ``text_encoder_2``.
        loras: Applied one after the other; the order does not matter but for rounding.
    """
    for lora in loras:
        touched = [name for name in components if lora.has(name)]
        if not touched:
            continue
        pipeline = _shell(architecture, components)
        _attach(pipeline, architecture, lora, "teacher_lora", touched)
        pipeline.set_adapters(["teacher_lora"], [lora.weight])
        pipeline.fuse_lora(components=touched)
        pipeline.unload_lora_weights()


def attach(architecture: Architecture, components: Mapping[str, nn.Module], loras: Mapping[str, Lora]) -> None:
    """Put LoRAs beside each other as adapters by name, all active at their weights."""
    pipeline = _shell(architecture, components)
    for adapter, lora in loras.items():
        _attach(pipeline, architecture, lora, adapter, [name for name in components if lora.has(name)])
    used = {adapter: lora for adapter, lora in loras.items() if any(lora.has(name) for name in components)}
    if used:
        pipeline.set_adapters(list(used), [lora.weight for lora in used.values()])


def _attach(pipeline: Any, architecture: Architecture, lora: Lora, adapter: str, touched: Sequence[str]) -> None:
    shared: dict[str, Any] = {"network_alphas": lora.alphas, "adapter_name": adapter, "metadata": lora.metadata}
    try:
        with quiet_libraries():
            for name in touched:
                component, state = getattr(pipeline, name), dict(lora.state)
                if name == architecture.denoiser:
                    component.load_lora_adapter(state, prefix=name, **shared)
                else:
                    pipeline.load_lora_into_text_encoder(state, text_encoder=component, prefix=name, **shared)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"LoRA {lora.name!r} does not fit this model: {str(error).strip().splitlines()[0]}",
            f"name a LoRA that was trained for {architecture.name} with networks of this size",
        ) from error


def _shell(architecture: Architecture, components: Mapping[str, nn.Module]) -> Any:
    """Return a pipeline around some networks only, for diffusers' LoRA functions."""
    with quiet_libraries():
        return architecture.shell(**components)


def _only_weights(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(
            f"LoRA folder {str(folder)!r} holds {len(found)} .safetensors files and no {WEIGHTS}",
            "name the file itself",
        )
    return found[0]


def _hub_file(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    owner, _, rest = name.partition("/")
    repository, _, filename = rest.partition("/")
    if not repository or name.startswith((".", "/", "~")):
        raise UserError(f"LoRA {name!r} does not exist", "name a file, a folder, or a hub id as owner/name/file")
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", filename or WEIGHTS))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"LoRA {name!r} is no local file or folder, and the hub did not give it ({type(error).__name__})",
            f"check the spelling; without a {WEIGHTS} in the repository name its file: owner/name/file.safetensors",
        ) from error


def _download_second_time(name: str) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    from ..core.diffusion.flow_map import WEIGHTS as SECOND_TIME

    owner, repository, *file = name.split("/")
    with suppress(EntryNotFoundError):  # a student without
        hf_hub_download(f"{owner}/{repository}", "/".join([*file[:-1], SECOND_TIME]))
