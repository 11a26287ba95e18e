"""Captioned scenes of 64 px: two or three things, how they stand to each other, and where and when.

A scene is drawn from emoji (Noto Color Emoji, read from the font's CBDT bitmaps) on a landscape. Its caption names the
kinds of things, mostly their colours, the relation of the first two, and often the place and the time of day: "a red
car left of a tree in the snow, at night". Which of a kind's emoji it is, where it stands, its size, turn and mirror
image, every colour that is not named, the horizon, clouds, stars, waves and grass are left open: one caption has very
many right images, so that a solver with few steps blends them while one with many steps decides.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from miniature_data import FONT_PATH, read_drawings
from PIL import Image

RESOLUTION = 64

KINDS: dict[str, tuple[int, ...]] = {
    "car": (0x1F697, 0x1F699, 0x1F695, 0x1F698),
    "boat": (0x26F5, 0x1F6A4, 0x1F6A2),
    "house": (0x1F3E0, 0x1F3E1, 0x1F6D6),
    "tree": (0x1F332, 0x1F333, 0x1F334),
    "flower": (0x1F337, 0x1F339, 0x1F33A, 0x1F33B),
    "fish": (0x1F41F, 0x1F420, 0x1F421),
    "bird": (0x1F426, 0x1F424, 0x1F99C, 0x1F986),
    "cat": (0x1F431, 0x1F408, 0x1F63A),
    "apple": (0x1F34E, 0x1F34F),
    "umbrella": (0x2602, 0x2614, 0x26F1),
    "hat": (0x1F452, 0x1F9E2),
    "ball": (0x1F3C0, 0x26BD, 0x1F3D0),
}
"""Kind -> the emoji that stand for it."""

COLOURS: dict[str, tuple[float, float]] = {
    "red": (0.0, 1.3),
    "yellow": (0.145, 1.35),
    "green": (0.34, 1.0),
    "blue": (0.60, 1.25),
    "purple": (0.78, 1.15),
}
"""Name of a thing's colour -> (hue, factor of its lightness)."""

RELATIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Name -> the direction (x to the right, y downwards) from the second thing to the first."""

RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}

PLACES: dict[str, tuple[str, tuple[float, float, float], tuple[float, float, float]]] = {
    "meadow": ("on a meadow", (0.30, 0.52, 0.20), (0.50, 0.72, 0.30)),
    "desert": ("in the desert", (0.80, 0.64, 0.38), (0.93, 0.81, 0.56)),
    "snow": ("in the snow", (0.80, 0.86, 0.92), (0.97, 0.98, 1.0)),
    "sea": ("by the sea", (0.10, 0.36, 0.55), (0.26, 0.58, 0.74)),
}
"""Name -> its words, and the two shades of its ground."""

TIMES: dict[str, tuple[str, tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]] = {
    "day": ("by day", (0.40, 0.66, 0.93), (0.78, 0.90, 0.98), (1.0, 1.0, 1.0)),
    "sunset": ("at sunset", (0.52, 0.36, 0.62), (0.99, 0.67, 0.38), (1.0, 0.86, 0.78)),
    "night": ("at night", (0.03, 0.04, 0.16), (0.12, 0.15, 0.36), (0.52, 0.54, 0.74)),
}
"""Name -> its words, the sky above and at the horizon, and the light that falls on the ground."""

SIZES = (17.0, 25.0)
"""Of a thing, in pixels of its longer side before it is turned."""


@dataclass(frozen=True)
class Thing:
    """One thing of a scene."""

    kind: int
    colour: int
    x: float
    """Of its centre, in pixels from the left."""
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """One image, its caption, and what it shows."""

    pixels: np.ndarray  # (RESOLUTION, RESOLUTION, 3) uint8
    caption: str
    things: tuple[Thing, ...]
    place: int
    time: int
    original_size: tuple[int, int]
    crop: tuple[int, int]


Sprites = dict[tuple[int, int], list[Image.Image]]
"""(kind, colour) -> one image of 96 px for each emoji, with premultiplied alpha."""


def load_sprites(font_path: Path = FONT_PATH) -> Sprites:
    """Read the bitmaps of all kinds from the font, in every colour."""
    sprites: Sprites = {}
    for kind, drawings in enumerate(read_drawings(KINDS, font_path).values()):
        squares = [_square(drawing) for drawing in drawings]
        for colour, (hue, factor) in enumerate(COLOURS.values()):
            sprites[kind, colour] = [_coloured(square, hue, factor) for square in squares]
    return sprites


def _square(drawing: Image.Image) -> np.ndarray:
    """At 96 px: (96, 96, 4) in [0, 1], alpha not multiplied in."""
    premultiplied = np.asarray(drawing.convert("RGBa").resize((96, 96), Image.Resampling.LANCZOS), dtype=np.float32)
    alpha = premultiplied[..., 3:] / 255
    return np.concatenate([(premultiplied[..., :3] / 255 / np.maximum(alpha, 1e-3)).clip(0, 1), alpha], axis=-1)


def _coloured(square: np.ndarray, hue: float, factor: float) -> Image.Image:
    """The drawing's coloured parts in one hue; its blacks, grays and whites mostly stay."""
    rgb, alpha = square[..., :3], square[..., 3:]
    value, chroma = rgb.max(axis=-1, keepdims=True), np.ptp(rgb, axis=-1, keepdims=True)
    light = (rgb @ np.array([0.35, 0.50, 0.15], dtype=np.float32))[..., None]
    seen = alpha > 0.5
    share = ((chroma / np.maximum(value, 1e-3) - 0.12) / 0.25).clip(0, 1)
    if (share * seen).sum() < 0.45 * seen.sum():  # a drawing in black and white is coloured where it is light
        share = np.maximum(share, ((light - 0.35) / 0.3).clip(0, 1))
    typical = np.median(light[seen & (share > 0.5)])
    bright = (0.62 * factor * (light / typical) ** 0.8).clip(0.12, 1.25)
    pure = np.array(colorsys.hsv_to_rgb(hue, 0.88, 1.0), dtype=np.float32)
    dyed = (pure * bright.clip(0, 1)) + (bright - 1).clip(0) * (1 - pure) * 2
    mixed = (rgb * (1 - share) + dyed * share).clip(0, 1)
    pixels = np.concatenate([mixed * alpha, alpha], axis=-1)
    return Image.fromarray((pixels * 255 + 0.5).astype(np.uint8), "RGBa")


# --------------------------------------------------------------------------------------------------- landscapes


def paint_landscape(place: str, time: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Sky and ground with all that is left open about them; (size, size, 3) in [0, 1]."""
    _, dark, light = PLACES[place]
    _, zenith, horizon_sky, ambient = TIMES[time]
    tilt, waves, phase = rng.uniform(-0.06, 0.06), rng.uniform(0.0, 2.5), rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    line = rng.uniform(0.34, 0.62) * size + tilt * (x - size / 2)
    if place != "sea":
        line = line + waves * np.sin(x * rng.uniform(0.06, 0.16) + phase)
    height = (y / np.maximum(line, 1)).clip(0, 1)[..., None] ** rng.uniform(0.8, 1.6)
    sky = np.array(zenith) * (1 - height) + np.array(horizon_sky) * height
    sky = _with_stars(sky, rng) if time == "night" else _with_clouds(sky, x, y, time, rng)
    ground = _ground(place, np.array(dark), np.array(light), x, y, line, rng) * np.array(ambient)
    edge = (y - line + 0.5).clip(0, 1)[..., None]
    return (sky * (1 - edge) + ground * edge) * rng.uniform(0.94, 1.04, 3)


def _with_stars(sky: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    size, sky = len(sky), sky.copy()
    for _ in range(rng.integers(5, 16)):
        row, column = rng.integers(0, size // 2 + 6), rng.integers(0, size)
        sky[row, column] = sky[row, column] * 0.2 + 0.8 * rng.uniform(0.6, 1.0)
    return sky


def _with_clouds(sky: np.ndarray, x: np.ndarray, y: np.ndarray, time: str, rng: np.random.Generator) -> np.ndarray:
    tone = np.array((0.99, 0.99, 1.0) if time == "day" else (1.0, 0.82, 0.66))
    cover = np.zeros_like(x)
    for _ in range(rng.integers(0, 4)):
        left, top, width = rng.uniform(0, len(sky)), rng.uniform(0, 22), rng.uniform(5, 12)
        for puff in rng.uniform(-1, 1, 3):
            distance = ((x - left - puff * width) / width) ** 2 + ((y - top - puff * 1.5) / (0.38 * width)) ** 2
            cover = np.maximum(cover, (1.25 - distance).clip(0, 1))
    cover = 0.75 * cover[..., None]
    return sky * (1 - cover) + tone * cover


def _ground(
    place: str, dark: np.ndarray, light: np.ndarray, x: np.ndarray, y: np.ndarray, line: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    depth = ((y - line) / (len(x) - line)).clip(0.02, 1)
    phase, angle = rng.uniform(0, 2 * np.pi, 2)
    match place:
        case "meadow":  # blades
            field = np.sin(x * rng.uniform(1.0, 1.8) + 2.5 * np.sin(0.45 * y + phase)) * np.sin(1.3 * y + angle)
        case "desert":  # dunes
            field = np.sin(y * rng.uniform(0.35, 0.7) + 2.2 * np.sin(x * rng.uniform(0.06, 0.14) + phase))
        case "snow":  # drifts
            field = np.sin(0.16 * x * rng.uniform(0.6, 1.2) + phase) + np.sin(0.3 * y + angle)
        case _:  # waves, which are shorter far away
            field = np.sin(7.0 / depth**0.6 + phase + 1.2 * np.sin(0.35 * x + angle))
    field = (0.5 + 0.5 * np.tanh(rng.uniform(0.8, 1.6) * field))[..., None]
    return dark * (1 - field) + light * field


# ------------------------------------------------------------------------------------------------------- things


def arrange(relation: str, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Centres (count, 2) and sizes (count,) of things of which the first two stand in the relation."""
    direction = np.array(RELATIONS[relation])
    across = np.abs(direction[::-1])
    for _ in range(10_000):
        sizes = rng.uniform(*SIZES, count)
        reach = sizes / 2 + 1
        centres = np.stack([rng.uniform(r, RESOLUTION - r, 2) for r in reach])
        gap = centres[0] - centres[1]
        apart, sideways = gap @ direction, abs(gap @ across)
        distances = np.linalg.norm(centres[:, None] - centres[None], axis=-1) + 1e3 * np.eye(count)
        near = 0.46 * (sizes[:, None] + sizes[None]) + 1
        if apart >= 0.5 * sizes[:2].sum() and sideways <= 0.45 * apart and (distances > near).all():
            return centres, sizes
    raise AssertionError("no arrangement was found")


def place_thing(
    canvas: np.ndarray, sprite: Image.Image, thing: Thing, light: np.ndarray, rng: np.random.Generator
) -> None:
    """Put a sprite, turned and mirrored at random, on the canvas (H, W, 3), in place."""
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sprite = sprite.rotate(rng.uniform(-16, 16), Image.Resampling.BICUBIC)
    side = round(thing.size)
    sprite = sprite.resize((side, side), Image.Resampling.BOX)
    drawn = np.asarray(sprite, dtype=np.float32) / 255
    top, left = round(thing.y - side / 2), round(thing.x - side / 2)
    y0, y1, x0, x1 = max(top, 0), min(top + side, len(canvas)), max(left, 0), min(left + side, len(canvas))
    drawn = drawn[y0 - top : y1 - top, x0 - left : x1 - left]
    alpha = drawn[..., 3:]
    canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - alpha) + drawn[..., :3] * light


def compose(sprites: Sprites, rng: np.random.Generator, *, crop_probability: float = 0.0) -> Scene:
    """Draw one scene and its caption."""
    count = 3 if rng.random() < 0.25 else 2
    kinds = rng.choice(len(KINDS), count, replace=False)
    colours = rng.integers(len(COLOURS), size=count)
    relation = list(RELATIONS)[rng.integers(len(RELATIONS))]
    place, time = int(rng.integers(len(PLACES))), int(rng.integers(len(TIMES)))
    size = RESOLUTION + (int(rng.integers(1, 13)) if rng.random() < crop_probability else 0)
    top, left = (int(value) for value in rng.integers(0, size - RESOLUTION + 1, 2))
    canvas = paint_landscape(list(PLACES)[place], list(TIMES)[time], size, rng)
    canvas = canvas[top : top + RESOLUTION, left : left + RESOLUTION].copy()
    centres, sizes = arrange(relation, count, rng)
    light = 0.6 + 0.4 * np.array(TIMES[list(TIMES)[time]][3])
    things = []
    for kind, colour, (x, y), extent in zip(kinds, colours, centres, sizes, strict=True):
        thing = Thing(int(kind), int(colour), float(x), float(y), float(extent))
        choices = sprites[thing.kind, thing.colour]
        place_thing(canvas, choices[rng.integers(len(choices))], thing, light * rng.uniform(0.92, 1.0), rng)
        things.append(thing)
    return Scene(
        pixels=(canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8),
        caption=describe(things, relation, place, time, rng),
        things=tuple(things),
        place=place,
        time=time,
        original_size=(size, size),
        crop=(top, left),
    )


def describe(things: list[Thing], relation: str, place: int, time: int, rng: np.random.Generator) -> str:
    """A sentence about the scene that may leave out colours, the place and the time."""
    said = [_noun(thing, rng.random() < share) for thing, share in zip(things, (0.75, 0.6, 0.5), strict=False)]
    words = RELATION_WORDS[relation]
    sentence = f"{said[0]} {words[int(rng.random() < 0.3)]} {said[1]}"
    if len(said) == 3:
        sentence += f" and {said[2]}"
    if rng.random() < 0.65:
        sentence += f" {PLACES[list(PLACES)[place]][0]}"
    if rng.random() < 0.65:
        when = TIMES[list(TIMES)[time]][0]
        sentence = f"{when}, {sentence}" if rng.random() < 0.25 else f"{sentence}, {when}"
    if rng.random() < 0.15:
        sentence = f"an image of {sentence}" if not sentence.startswith(("at ", "by ")) else sentence
    return sentence


def _noun(thing: Thing, with_colour: bool) -> str:
    words = [list(COLOURS)[thing.colour]] * with_colour + [list(KINDS)[thing.kind]]
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"
