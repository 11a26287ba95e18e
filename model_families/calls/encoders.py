"""Calls of text encoders and autoencoders, as diffusers' pipelines make them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.utils.memory import is_out_of_memory
from .autoencoders import kind_of
from .networks import outputs_inside

logger = logging.getLogger(__name__)
READ = ("input_ids", "attention_mask")
"""What language models read of a tokenizer's result."""


def token_ids(
    tokenizer: Any, prompts: Sequence[str], *, length: int | None = None, padding_side: str | None = None
) -> Any:
    """Return tokens (B, length), padded and cut to `length` (None: the tokenizer's own), with their attention mask.

    Args:
        tokenizer: Of the text encoder.
        prompts: B prompts.
        length: Number of tokens.
        padding_side: ``left`` or ``right``; None: the tokenizer's own.
    """
    return tokenizer(
        list(prompts),
        padding="max_length",
        padding_side=padding_side,
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )


def as_chat(tokenizer: Any, prompts: Sequence[str], **arguments: Any) -> list[str]:
    """Return prompts as the user's words in a conversation, which the encoder's own template writes.

    Args:
        tokenizer: Has the template.
        prompts: The prompts.
        arguments: Of the template, as ``enable_thinking``.
    """
    turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
    return [
        tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **arguments) for turn in turns
    ]


def ragged(states: Tensor, mask: Tensor) -> list[Tensor]:
    """Return the states (T_i, D) of each prompt without its padding, which follows them.

    Args:
        states: Padded states (B, T, D).
        mask: 1 where a token is, (B, T); on the meta device every prompt has all T.
    """
    if mask.is_meta:
        return list(states)
    return [one[:length] for one, length in zip(states, mask.bool().sum(dim=1).tolist(), strict=True)]


def turned(states: Tensor, mask: Tensor) -> Tensor:
    """Return states (B, S, D) with those of each prompt, which come first, behind all others.

    Args:
        states: Of positions of prompts and of what follows them.
        mask: 1 where a token of the prompt is, (B, T).
    """
    positions = mask.bool().sum(dim=1)[:, None] + torch.arange(states.shape[1], device=states.device)
    return states.take_along_dim((positions % states.shape[1])[..., None], dim=1)


@torch.no_grad()
def masked_states(
    tokenizer: Any,
    encoder: Any,
    prompts: Sequence[str],
    *,
    length: int,
    layer: int = -1,
    padding_side: str | None = None,
) -> dict[str, Tensor]:
    """Return a text encoder's states (B, length, D), those of the padding zero, and the mask of the others (B, length).

    Args:
        tokenizer: Of the text encoder.
        encoder: Takes tokens and their mask.
        prompts: B prompts, as it reads them.
        length: Number of tokens.
        layer: Layer of the states; -1: the encoder's output.
        padding_side: ``left`` or ``right``; None: the tokenizer's own.
    """
    tokens = token_ids(tokenizer, prompts, length=length, padding_side=padding_side).to(encoder.device)
    mask, inner = tokens.attention_mask, layer != -1
    output = encoder(tokens.input_ids, attention_mask=mask, **({"output_hidden_states": True} if inner else {}))
    states = output.hidden_states[layer] if inner else output[0]
    return {"prompt_embeds": states * mask[..., None], "prompt_attention_mask": mask.bool()}


@torch.no_grad()
def states_padded_in_front(
    tokenizer: Any, encoder: Any, prompts: Sequence[str], *, length: int, multiple: int
) -> dict[str, Tensor]:
    """Return the states before the last layer of prompts that are padded in front, each as if it were alone, (B, T, D)
    with zeros behind them, and where they are, (B, T).

    Args:
        tokenizer: Of the text encoder.
        encoder: Is not told where the padding is.
        prompts: B prompts.
        length: Largest number of tokens; the rest is cut off.
        multiple: The padded length of each prompt, and T, are multiples of it.
    """
    found = tokenizer(list(prompts), truncation=True, max_length=length, verbose=False).input_ids
    lengths = [-(-len(ids) // multiple) * multiple for ids in found]
    own = encoder.get_input_embeddings().weight
    states = own.new_zeros(len(found), -(-length // multiple) * multiple, encoder.config.hidden_size)
    mask = torch.zeros(states.shape[:2], dtype=torch.bool, device=own.device)
    for padded in sorted(set(lengths)):
        rows = [row for row, one in enumerate(lengths) if one == padded]
        ids = [[tokenizer.pad_token_id] * (padded - len(found[row])) + found[row] for row in rows]
        output = encoder(torch.tensor(ids, device=own.device), output_hidden_states=True)
        states[rows, :padded], mask[rows, :padded] = output.hidden_states[-2], True
    return {"prompt_embeds": states, "prompt_attention_mask": mask}


def shortened(states: Tensor, mask: Tensor, further: int) -> tuple[Tensor, Tensor | None]:
    """Return states (B, T, D) without what is padding in every prompt, and which of them and of `further` positions may
    be seen, (B, T + further); None where all may.

    Args:
        states: Of prompts, padding behind them.
        mask: 1 where a state is, (B, T'); on the meta device every prompt has all.
        further: Number of positions behind them.
    """
    lengths = [mask.shape[1]] if mask.is_meta else mask.bool().sum(dim=1).tolist()
    longest = max(lengths)
    seen = torch.nn.functional.pad(mask[:, :longest].bool(), (0, further), value=True)
    return states[:, :longest], None if min(lengths) == longest else seen


def chunked_ids(tokenizer: Any, prompts: Sequence[str], chunks: int) -> Any:
    """Return tokens (B * chunks, T), each prompt cut into `chunks` parts with marks of their own, and their mask.

    T is the tokenizer's own length; the parts of a prompt follow each other, empty ones at the end.
    """
    length, begin, end = tokenizer.model_max_length, tokenizer.bos_token_id, tokenizer.eos_token_id
    size = length - 2
    whole = tokenizer(list(prompts), add_special_tokens=False, truncation=False, verbose=False).input_ids
    parts = [ids[at : at + size] for ids in whole for at in range(0, chunks * size, size)]
    marked = {"input_ids": [[begin, *part, end] for part in parts]}
    return tokenizer.pad(marked, padding="max_length", max_length=length, return_tensors="pt")


@torch.no_grad()
def penultimate(
    tokenizer: Any, encoder: Any, prompts: Sequence[str], *, length: int | None = None, chunks: int = 1
) -> tuple[Tensor, Tensor]:
    """Return a CLIP text encoder's states (B, chunks * T, D) before its last layer, and its projection (B, P) of the
    first chunk.
    """
    tokens = token_ids(tokenizer, prompts, length=length) if chunks == 1 else chunked_ids(tokenizer, prompts, chunks)
    output = encoder(tokens.input_ids.to(encoder.device), output_hidden_states=True)
    states = output.hidden_states[-2]
    return states.reshape(len(prompts), -1, states.shape[-1]), output[0][::chunks]


@torch.no_grad()
def last_states(
    tokenizer: Any,
    encoder: Any,
    prompts: Sequence[str],
    *,
    length: int | None = None,
    masked: bool = False,
    chunks: int = 1,
) -> Any:
    """Return a text encoder's output, states (B * chunks, T, D) first; with the attention mask of its padding if
    `masked`.
    """
    tokens = token_ids(tokenizer, prompts, length=length) if chunks == 1 else chunked_ids(tokenizer, prompts, chunks)
    mask = tokens.attention_mask.to(encoder.device) if masked else None
    return encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)


@torch.no_grad()
def inner_states(encoder: Any, tokens: Any, *, layers: Sequence[int]) -> Tensor:
    """Return the states of several layers of a language model side by side, (B, T, len(layers) D); the layers after the
    last of them are not computed.

    Args:
        encoder: A language model, with or without a head, alone or as the decoder of a model that sees images.
        tokens: Its ``input_ids`` and ``attention_mask`` (B, T).
        layers: Their numbers from 1, ascending.
    """
    decoder, moved = encoder.get_decoder(), {name: tokens[name].to(encoder.device) for name in READ}
    found = outputs_inside(
        [decoder.layers[number - 1] for number in layers],
        lambda: decoder(**moved, use_cache=False),
        pick=lambda output: output[0] if isinstance(output, tuple) else output,
        stop=True,
    )
    return torch.cat(found, dim=-1)


def encode_by_pieces(vae: Any, pixels: Tensor, generator: Sequence[torch.Generator] | None, *, at_once: int) -> Tensor:
    """Return what :func:`encode_pixels` does, with at most `at_once` images in the autoencoder, and fewer where those
    do not fit into memory.
    """
    done, at_once = list[Tensor](), min(at_once, len(pixels))
    while (start := sum(map(len, done))) < len(pixels):
        piece = slice(start, start + at_once)
        try:
            done.append(encode_pixels(vae, pixels[piece], generator and generator[piece]))
        except (RuntimeError, MemoryError) as error:
            if at_once == 1 or not is_out_of_memory(error):
                raise
            at_once //= 2
            logger.info(f"the autoencoder has no room for so many images: from here on {at_once} at a time")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return torch.cat(done)


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor, generator: Sequence[torch.Generator] | None) -> Tensor:
    """Return scaled latents (B, C, h, w) of `pixels` (B, 3, H, W) in [-1, 1]."""
    kind = kind_of(vae)
    latents, deviation = kind.distribution(vae, pixels.to(vae.device, vae.dtype))
    if generator is not None and deviation is not None:
        noise = [
            torch.randn(mean.shape, generator=one, device=one.device).to(mean)
            for mean, one in zip(latents, generator, strict=True)
        ]
        latents = latents + deviation * torch.stack(noise)
    return kind.scaled(vae, latents)


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Return images (B, 3, H, W) in [0, 1], float32, decoded from scaled `latents` (B, C, h, w)."""
    pixels = decoded_pixels(vae, latents)
    return (pixels.float() * 0.5 + 0.5).clamp(0, 1)


def decoded_pixels(vae: Any, latents: Tensor) -> Tensor:
    """Return images (B, 3, H, W), about in [-1, 1], decoded from scaled `latents` (B, C, h, w), with their gradient."""
    kind = kind_of(vae)
    return kind.decode(vae, kind.unscaled(vae, latents.to(vae.device, vae.dtype)))
