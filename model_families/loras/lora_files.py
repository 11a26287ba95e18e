"""Files of LoRAs: found on disk or on the hub."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ...core.errors import UnreachableError, UserError
from ..files.hub import hub_answers, hub_file

WEIGHTS = "pytorch_lora_weights.safetensors"


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
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    owner, _, rest = name.partition("/")
    repository, _, filename = rest.partition("/")
    if not repository or name.startswith((".", "/", "~")):
        raise UserError(f"LoRA {name!r} does not exist", "name a file, a folder, or a hub id as owner/name/file")
    try:
        return hub_file(f"{owner}/{repository}", filename or WEIGHTS)
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        kind = UserError if hub_answers() else UnreachableError
        raise kind(
            f"LoRA {name!r} is no local file or folder, and the hub did not give it ({type(error).__name__})",
            f"check the spelling; without a {WEIGHTS} in the repository name its file: owner/name/file.safetensors",
        ) from error


def _download_second_time(name: str) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    from ...core.diffusion.flow_map import WEIGHTS as SECOND_TIME

    owner, repository, *file = name.split("/")
    with suppress(EntryNotFoundError):  # a student without
        hub_file(f"{owner}/{repository}", "/".join([*file[:-1], SECOND_TIME]))
