r"""Adapters on files: their kinds, and what each does to the weight W of a layer. Plain tensors in, plain tensors out.

With scale s = alpha / rank (1 where the file has no alpha), all for one layer:

    LoRA    W + s B A; convolutions with a middle C: B * C * A, contracted over both ranks (LoCon, "Tucker")
    LoHa    W + s (B_1 A_1) o (B_2 A_2), o elementwise; in convolutions each factor may have a middle (arXiv 2108.06098)
    LoKr    W + s kron(W_1, W_2), each whole or a product; the scale is 1 where neither is one (arXiv 2309.14859)
    diff    W + D, for weights, biases and the weights of norms
    DoRA    m (W + dW) / |W + dW|, norms over all but the axis that m has, over any dW above (arXiv 2402.09353)

LyCORIS' ``scalar`` multiplies dW. A weight w of the whole adapter blends: W + w (W' - W).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

LORA = "LoRA"
EXACT = (LORA, "DoRA", "LoCon with a middle", "LoHa", "LoKr", "full differences")
"""Kinds that can be fused here; those behind the first by this module alone."""
KINDS: Mapping[str, str] = {
    r"lora_(A|down)(\.\w+)?\.weight|lora_(B|up)(\.\w+)?\.weight|alpha": LORA,
    r"lora(_linear_layer)?\.(down|up)\.weight|\w+_lora\.(down|up)\.weight": LORA,
    r"dora_scale|lora_magnitude_vector(\.\w+)?(\.weight)?": "DoRA",
    r"lora_mid\.weight": "LoCon with a middle",
    r"hada_(w[12]_[ab]|t[12])": "LoHa",
    r"lokr_(w[12](_[ab])?|t2)": "LoKr",
    r"diff|diff_b|w_norm|b_norm": "full differences",
    r"oft_blocks|oft_diag|oft_r(\.\w+)?(\.weight)?|boft_\w+|rescale": "OFT",
    r"[ab][12]\.weight|bm": "GLoRA",
    r"on_input|ia3_l(\.\w+)?(\.weight)?": "IA3",
    r"set_weight|reshape_weight": "replaced weights",
    r"lora_(B|up)(\.\w+)?\.bias": "biases of a LoRA",
}
"""What a tensor's name ends with -> kind of adapter. LyCORIS' ``scalar`` belongs to whatever it stands beside."""
LEAF = re.compile(rf"(?P<stem>.+?)\.(?P<leaf>{'|'.join(KINDS)}|scalar)")
EMBEDDING = re.compile(r"bundle_emb\..+|emb_params|string_to_param.*|clip_[lg]")
"""Names of trained tokens, as OneTrainer puts into its LoRAs."""


@dataclass(frozen=True)
class AdapterLayer:
    """The tensors of one layer of an adapter.

    Attributes:
        stem: Its name in the file, as ``lora_unet_mid_block_attentions_0_proj_in``.
        tensors: What follows the stem -> tensor.
        alpha: Alpha of the adapter, for layers without a tensor of their own.
        rank_stabilised: Whether the scale is alpha / sqrt(rank).
    """

    stem: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    alpha: float | None = None
    rank_stabilised: bool = False

    @property
    def kinds(self) -> set[str]:
        """The kinds of adapter that its tensors are of; those that are decided beside a LoRA come without it."""
        return {kind_of(leaf) for leaf in self.tensors if leaf not in ("alpha", "scalar")} or {LORA}

    def get(self, *leaves: str) -> Tensor | None:
        """Return the first of these tensors that it has, in float32."""
        found = next((self.tensors[leaf] for leaf in leaves if leaf in self.tensors), None)
        return None if found is None else found.to(torch.float32)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return down (rank, in, ...) and up (out, rank, ...) of a LoRA. Raises RuntimeError where it lacks one."""
        down, up = self.get(*_ends("lora_down", "lora_A")), self.get(*_ends("lora_up", "lora_B"))
        if down is None or up is None:
            raise RuntimeError(f"{self.stem} lacks one of its two factors")
        return down, up

    def scale(self, rank: int | None) -> float:
        """Return alpha / rank, or alpha / sqrt(rank); 1 without an alpha or a rank. Raises RuntimeError."""
        alpha = self.get("alpha")
        if rank == 0 or (alpha is not None and alpha.numel() != 1):
            raise RuntimeError(f"{self.stem} has a rank of 0, or more than one alpha")
        value = self.alpha if alpha is None else (float(alpha) if alpha.device.type != "meta" else 1.0)
        if value is None or rank is None:
            return 1.0
        return value / (rank**0.5 if self.rank_stabilised else rank)


def kind_of(leaf: str) -> str:
    """Return the kind of adapter that a tensor with this ending is of."""
    return next(kind for pattern, kind in KINDS.items() if re.fullmatch(pattern, leaf))


def split(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str], list[str]]:
    """Return the layers of a file (stem -> leaf -> name), its trained tokens, and names of no known kind."""
    layers: dict[str, dict[str, str]] = {}
    tokens, unknown = [], []
    for name in names:
        if EMBEDDING.fullmatch(name):
            tokens.append(name)
        elif match := LEAF.fullmatch(name):
            layers.setdefault(match["stem"], {})[match["leaf"]] = name
        else:
            unknown.append(name)
    return layers, tokens, unknown


def changed_weight(layer: AdapterLayer, weight: Tensor, *, strength: float) -> Tensor:
    """Return the weight of a layer with the adapter at `strength`, float32, shape of `weight`.

    Raises:
        RuntimeError: Their sizes do not fit.
    """
    base = weight.to(torch.float32)
    delta = _delta(layer)
    if delta is None:
        return base
    if delta.numel() != base.numel() or delta.shape[0] != base.shape[0]:
        raise RuntimeError(f"{layer.stem} changes {tuple(delta.shape)}, the layer has {tuple(base.shape)}")
    delta = delta.reshape(base.shape)
    magnitude = layer.get("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight")
    if magnitude is None:
        return base + strength * delta
    return base + strength * (_decomposed(base + delta, magnitude) - base)


def changed_bias(layer: AdapterLayer, bias: Tensor, *, strength: float) -> Tensor:
    """Return the bias of a layer with the adapter at `strength`, float32, shape of `bias`. Raises RuntimeError."""
    delta = layer.get("diff_b", "b_norm")
    base = bias.to(torch.float32)
    return base if delta is None else base + strength * delta.reshape(base.shape)


def _delta(layer: AdapterLayer) -> Tensor | None:
    """Return dW of a layer; None where only its bias changes."""
    kinds = layer.kinds
    if "LoHa" in kinds:
        delta = _hadamard(layer)
    elif "LoKr" in kinds:
        delta = _kronecker(layer)
    elif "full differences" in kinds:
        delta = layer.get("diff", "w_norm")
    else:
        delta = _low_rank(layer)
    scalar = layer.get("scalar")
    return delta if scalar is None or delta is None else delta * scalar


def _low_rank(layer: AdapterLayer) -> Tensor:
    down, up = layer.factors()
    middle = layer.get("lora_mid.weight")
    scale = layer.scale(len(down))
    if middle is not None:
        return scale * torch.einsum("oa,abhw,bi->oihw", up.flatten(1), middle, down.flatten(1))
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])


def _ends(*names: str) -> list[str]:
    return [f"{name}{adapter}.weight" for name in names for adapter in ("", ".default")]


def _hadamard(layer: AdapterLayer) -> Tensor:
    pairs = ((layer.get(f"hada_w{n}_a"), layer.get(f"hada_w{n}_b"), layer.get(f"hada_t{n}")) for n in (1, 2))
    first, second = (_product(left, right, middle, layer.stem) for left, right, middle in pairs)
    rank = layer.get("hada_w1_b")
    return layer.scale(None if rank is None else len(rank)) * first * second


def _kronecker(layer: AdapterLayer) -> Tensor:
    factors, rank = [], None
    for n in (1, 2):
        whole, right = layer.get(f"lokr_w{n}"), layer.get(f"lokr_w{n}_b")
        if whole is None:
            middle = layer.get("lokr_t2") if n == 2 else None
            whole = _product(layer.get(f"lokr_w{n}_a"), right, middle, layer.stem)
            rank = None if right is None else len(right)
        factors.append(whole)
    first, second = factors
    first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    return layer.scale(rank) * torch.kron(first, second.contiguous())


def _product(left: Tensor | None, right: Tensor | None, middle: Tensor | None, stem: str) -> Tensor:
    """Return left @ right (out, in), or with a middle (r, r, h, w): (out, in, h, w)."""
    if left is None or right is None:
        raise RuntimeError(f"{stem} lacks one of its factors")
    if middle is None:
        return left @ right
    return torch.einsum("abhw,bi,ao->oihw", middle, right, left)


def _decomposed(directed: Tensor, magnitude: Tensor) -> Tensor:
    """Return the weight with the norms of its rows (or, as older files say, columns) replaced by `magnitude`."""
    sizes = [size for size in magnitude.shape if size != 1] or [1]
    over_inputs = magnitude.ndim > 1 and magnitude.shape[0] == 1 and directed.shape[0] != 1
    axis = 1 if over_inputs else 0
    if len(sizes) > 1 or magnitude.numel() != directed.shape[axis]:
        raise RuntimeError(f"magnitudes {tuple(magnitude.shape)} do not fit a weight {tuple(directed.shape)}")
    others = [one for one in range(directed.ndim) if one != axis]
    norm = torch.linalg.vector_norm(directed, dim=others, keepdim=True)
    return directed * (magnitude.reshape(norm.shape) / norm)
