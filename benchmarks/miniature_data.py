"""Open-captioned emoji scenes: the images that the miniature SDXL teacher is trained on.

A scene is one emoji (Noto Color Emoji, read from the font's CBDT bitmaps) placed on a textured ground. Its caption
names the *kind* of thing ("cat") and, mostly, the colour of the ground. Which of the kind's emoji it is, where it
stands, how large, turned, mirrored and tinted it is, and the whole texture of the ground are left open: one caption has
very many right images, so that a solver with few steps blurs them while one with many steps does not.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image

FONT_PATH = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
RESOLUTION = 32

KINDS: dict[str, tuple[int, ...]] = {
    "cat": (0x1F431, 0x1F638, 0x1F63A, 0x1F63C, 0x1F640),
    "dog": (0x1F436, 0x1F415, 0x1F429, 0x1F9AE, 0x1F43A),
    "fish": (0x1F41F, 0x1F420, 0x1F421, 0x1F988, 0x1F42C),
    "bird": (0x1F426, 0x1F424, 0x1F427, 0x1F99C, 0x1F986),
    "flower": (0x1F337, 0x1F338, 0x1F339, 0x1F33A, 0x1F33B, 0x1F33C),
    "tree": (0x1F332, 0x1F333, 0x1F334, 0x1F384),
    "car": (0x1F697, 0x1F699, 0x1F695, 0x1F693, 0x1F698),
    "boat": (0x26F5, 0x1F6A4, 0x1F6A2, 0x1F6E5),
    "house": (0x1F3E0, 0x1F3E1, 0x1F3E5, 0x1F3E2, 0x26EA),
    "heart": (0x2764, 0x1F499, 0x1F49A, 0x1F49B, 0x1F49C, 0x1F9E1, 0x1F90D, 0x1F5A4),
    "moon": (0x1F319, 0x1F31B, 0x1F31C, 0x1F312, 0x1F318),
    "ball": (0x26BD, 0x1F3C0, 0x1F3D0, 0x26BE, 0x1F3B1),
    "fruit": (0x1F34E, 0x1F34F, 0x1F34C, 0x1F34D, 0x1F347, 0x1F353, 0x1F349, 0x1F352),
    "face": (0x1F600, 0x1F60D, 0x1F60E, 0x1F622, 0x1F632, 0x1F618),
    "clock": (0x1F550, 0x1F552, 0x1F555, 0x1F557, 0x1F55A, 0x23F0),
    "book": (0x1F4D5, 0x1F4D7, 0x1F4D8, 0x1F4D9, 0x1F4D3),
}
"""Kind -> the emoji that stand for it."""

COLOURS: dict[str, tuple[float, float]] = {
    "red": (0.0, 0.80),
    "yellow": (0.145, 0.80),
    "green": (0.35, 0.65),
    "blue": (0.60, 0.75),
    "purple": (0.79, 0.60),
    "gray": (0.0, 0.0),
}
"""Name of a ground's colour -> (hue, saturation); its lightness is left open."""

TEXTURES = ("plain", "stripes", "checker", "dots", "rings")

TEMPLATES = (
    "a {kind} on a {colour} ground",
    "a {colour} image with a {kind}",
    "an image of a {kind} on {colour}",
    "{kind}, {colour} ground",
    "a {kind} in front of a {colour} wall",
    "a {kind}",
    "an image with a {kind}",
)
TEMPLATE_WEIGHTS = np.array([4, 3, 3, 3, 3, 2, 2]) / 20


@dataclass(frozen=True)
class Scene:
    """One image, what its caption says, and what the caption leaves open."""

    pixels: np.ndarray  # (RESOLUTION, RESOLUTION, 3) uint8
    caption: str
    labels: dict[str, int]
    original_size: tuple[int, int]
    crop: tuple[int, int]


def load_emoji(font_path: Path = FONT_PATH) -> dict[str, list[Image.Image]]:
    """Read the bitmaps of all kinds from the font, at 64 px with premultiplied alpha."""
    return {
        kind: [drawing.resize((64, 64), Image.Resampling.LANCZOS).convert("RGBa") for drawing in drawings]
        for kind, drawings in read_drawings(KINDS, font_path).items()
    }


def read_drawings(kinds: Mapping[str, Sequence[int]], font_path: Path) -> dict[str, list[Image.Image]]:
    """The font's bitmaps of these code points, by kind: cropped to the drawing, padded to a square, RGBA."""
    font = TTFont(font_path)
    names, glyphs = font.getBestCmap(), font["CBDT"].strikeData[0]
    return {kind: [_squared(glyphs[names[code]].imageData) for code in codes] for kind, codes in kinds.items()}


def _squared(stored: bytes) -> Image.Image:
    glyph = Image.open(io.BytesIO(stored)).convert("RGBA")
    glyph = glyph.crop(glyph.getbbox())
    square = Image.new("RGBA", (max(glyph.size),) * 2)
    square.paste(glyph, ((square.width - glyph.width) // 2, (square.height - glyph.height) // 2))
    return square


def texture_field(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A pattern in [0, 1], (size, size), with random phase, angle and spacing."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(4.0, 8.0)
    origin = rng.uniform(0, size, 2) if name == "rings" else rng.uniform(0, 8, 2)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    x, y = x - origin[0], y - origin[1]
    u = (np.cos(angle) * x + np.sin(angle) * y) * (2 * np.pi / period)
    v = (np.cos(angle) * y - np.sin(angle) * x) * (2 * np.pi / period)
    match name:
        case "plain":
            return (u - u.min()) / (u.max() - u.min())
        case "stripes":
            wave = np.sin(u)
        case "checker":
            wave = 2 * np.sin(0.8 * u) * np.sin(0.8 * v)
        case "dots":
            wave = np.cos(u) + np.cos(v) - 0.8
        case _:
            wave = np.sin(np.hypot(x, y) * (2 * np.pi / period))
    return 0.5 + 0.5 * np.tanh(2.5 * wave)


def paint_ground(colour: str, texture: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Two shades of one colour, mixed by the texture; (size, size, 3) in [0, 1]."""
    hue, saturation = COLOURS[colour]
    if colour == "gray":
        shades = [np.full(3, value) for value in (rng.uniform(0.25, 0.5), rng.uniform(0.65, 0.9))]
    else:
        hue = hue + rng.uniform(-0.02, 0.02)
        dark = colorsys.hsv_to_rgb(hue % 1, min(1.0, saturation + 0.15), rng.uniform(0.55, 0.7))
        light = colorsys.hsv_to_rgb(hue % 1, saturation - rng.uniform(0.1, 0.25), rng.uniform(0.88, 1.0))
        shades = [np.array(dark), np.array(light)]
    if rng.random() < 0.5:
        shades.reverse()
    field = texture_field(texture, size, rng)[..., None]
    return shades[0] * (1 - field) + shades[1] * field


def place_emoji(ground: np.ndarray, emoji: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Put an emoji of random size, turn, mirror, tint and position on the ground."""
    size = ground.shape[0]
    extent = rng.uniform(16.0, 25.0)
    if rng.random() < 0.5:
        emoji = emoji.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    emoji = emoji.resize((round(extent),) * 2, Image.Resampling.BOX, reducing_gap=None)
    emoji = emoji.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True)
    sprite = np.asarray(emoji, dtype=np.float32) / 255
    height, width = sprite.shape[:2]
    margin = 2
    top = int(rng.integers(-margin, max(size - height + margin, -margin + 1) + 1))
    left = int(rng.integers(-margin, max(size - width + margin, -margin + 1) + 1))
    canvas = ground.copy()
    y0, y1, x0, x1 = max(top, 0), min(top + height, size), max(left, 0), min(left + width, size)
    sprite = sprite[y0 - top : y1 - top, x0 - left : x1 - left]
    colour, alpha = sprite[..., :3] * rng.uniform(0.88, 1.0, 3), sprite[..., 3:]
    canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - alpha) + colour
    return canvas


def compose(emoji: dict[str, list[Image.Image]], rng: np.random.Generator, *, crop_probability: float = 0.0) -> Scene:
    """Draw one scene and its caption."""
    kind, colour = rng.integers(len(KINDS)), rng.integers(len(COLOURS))
    texture = rng.integers(len(TEXTURES))
    kind_name, colour_name = list(KINDS)[kind], list(COLOURS)[colour]
    size = RESOLUTION + (int(rng.integers(1, 9)) if rng.random() < crop_probability else 0)
    top, left = (int(value) for value in rng.integers(0, size - RESOLUTION + 1, 2))
    picked = emoji[kind_name][rng.integers(len(emoji[kind_name]))]
    image = place_emoji(paint_ground(colour_name, TEXTURES[texture], size, rng), picked, rng)
    image = image[top : top + RESOLUTION, left : left + RESOLUTION]
    template = TEMPLATES[rng.choice(len(TEMPLATES), p=TEMPLATE_WEIGHTS)]
    return Scene(
        pixels=(image.clip(0, 1) * 255 + 0.5).astype(np.uint8),
        caption=template.format(kind=kind_name, colour=colour_name),
        labels={"kind": int(kind), "colour": int(colour), "texture": int(texture)},
        original_size=(size, size),
        crop=(top, left),
    )


def prompts() -> list[str]:
    """Sixteen prompts for validation: every kind once, colours and templates in turn."""
    colours = list(COLOURS)
    return [
        TEMPLATES[index % 5].format(kind=kind, colour=colours[index % len(colours)]) for index, kind in enumerate(KINDS)
    ]
