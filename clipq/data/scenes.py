"""What is on a picture of the built-in data set: sampling a scene, putting it into words, drawing it.

A scene has one or two things, each a shape with a colour, a texture and a size at some place, over a background
with clutter that no caption mentions. Everything is decided by the `random.Random` that the caller passes.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw

# name -> hue in degrees, saturation, value
COLOURS = {
    "red": (358, 0.90, 0.88),
    "orange": (27, 0.95, 1.00),
    "yellow": (53, 0.90, 1.00),
    "green": (125, 0.80, 0.68),
    "cyan": (183, 0.75, 0.92),
    "blue": (224, 0.88, 0.90),
    "purple": (274, 0.75, 0.68),
    "pink": (328, 0.42, 1.00),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
# name -> ways to say it before the noun, ways to say it behind the noun
TEXTURES = {
    "plain": (("plain", "solid"), ("without a pattern",)),
    "striped": (("striped",), ("with stripes", "covered in stripes")),
    "dotted": (("dotted", "spotted"), ("with dots", "full of dots")),
    "checkered": (("checkered", "chequered"), ("with a checkered pattern", "with checks")),
}
# name -> radius as a share of the picture's side, smallest and largest; ways to say it
# (a medium size goes unmentioned)
SIZES = {
    "small": ((0.26, 0.30), ("small", "little", "tiny")),
    "medium": ((0.32, 0.36), ()),
    "large": ((0.38, 0.44), ("large", "big", "huge")),
}
# name -> value of its darkest and lightest tone, ways to say it
BACKGROUNDS = {
    "dark": ((0.06, 0.22), ("dark", "black")),
    "grey": ((0.40, 0.58), ("grey", "gray")),
    "light": ((0.80, 0.97), ("light", "white", "bright")),
}
FRAMES = (
    "{}", "{}", "{}", "a picture of {}", "an image of {}", "a drawing of {}", "there is {}", "this is {}",
    "this picture shows {}", "we see {}", "{} drawn by a computer",
)  # fmt: skip
# How often a caption says what it need not say.
SAYS_SIZE = 0.25
SAYS_TEXTURE = 0.35
SAYS_PLAIN = 0.2
SAYS_PLACE = 0.2
SAYS_BACKGROUND = 0.1
SAYS_RELATION = 0.6
# How often it leaves out what it mostly says; never both.
OMITS_COLOUR = 0.03
OMITS_SHAPE = 0.02

OVERSAMPLING = 3
"""Shapes are drawn this many times larger and averaged down, which smooths their edges."""


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    texture: str
    size: str
    x: float
    """Centre, as a share of the picture's side from the left."""
    y: float
    """Centre, as a share of the picture's side from the top."""
    radius: float
    """As a share of the picture's side."""
    angle: float
    """Rotation in radians."""


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str


def sample_scene(rng: Random, combinations: list[tuple[str, str]], *, pairs: float) -> Scene:
    """One scene whose things have (colour, shape) from `combinations`; two things with probability `pairs`."""
    background = rng.choice(list(BACKGROUNDS))
    if rng.random() >= pairs:
        size = rng.choice(list(SIZES))
        radius = rng.uniform(*SIZES[size][0])
        x, y = (rng.uniform(radius, 1 - radius) for _ in range(2))
        return Scene((_sample_thing(rng, rng.choice(combinations), size, radius, x, y),), background)
    beside, near, level = rng.random() < 0.5, rng.uniform(0.25, 0.27), rng.uniform(0.36, 0.64)
    things = []
    for along, combination in zip((near, 1 - near), rng.sample(combinations, 2), strict=True):
        across = level + rng.uniform(-0.1, 0.1)
        x, y = (along, across) if beside else (across, along)
        things.append(_sample_thing(rng, combination, "small", rng.uniform(0.20, 0.25), x, y))
    return Scene(tuple(things), background)


def _sample_thing(rng: Random, combination: tuple[str, str], size: str, radius: float, x: float, y: float) -> Thing:
    colour, shape = combination
    texture = rng.choice(list(TEXTURES))
    # A square on its corner would be a diamond: shapes lean, they don't turn.
    angle = rng.uniform(-0.25, 0.25)
    return Thing(colour, shape, texture, size, x, y, radius, angle)


def describe(rng: Random, scene: Scene) -> str:
    """One English sentence or phrase that is true of the scene and mentions some of it."""
    if len(scene.things) == 1:
        text = _thing_words(rng, scene.things[0])
        place = _place_words(rng, scene.things[0])
        if place and rng.random() < SAYS_PLACE:
            text += f" {place}"
    else:
        first, second = rng.sample(scene.things, 2)
        text = f"{_thing_words(rng, first)} {_relation_words(rng, first, second)} {_thing_words(rng, second)}"
    if rng.random() < SAYS_BACKGROUND:
        text += f" on a {rng.choice(BACKGROUNDS[scene.background][1])} background"
    text = rng.choice(FRAMES).format(text)
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:] + "."
    return text


def _thing_words(rng: Random, thing: Thing) -> str:
    before: list[str] = []
    behind = ""
    omits = rng.random()
    if omits >= OMITS_COLOUR:
        before.append(thing.colour)
    omits_shape = OMITS_COLOUR <= omits < OMITS_COLOUR + OMITS_SHAPE
    noun = rng.choice(["shape", "figure", "thing"]) if omits_shape else thing.shape
    if rng.random() < (SAYS_PLAIN if thing.texture == "plain" else SAYS_TEXTURE):
        words_before, words_behind = TEXTURES[thing.texture]
        if rng.random() < 0.75:
            before.insert(len(before) if rng.random() < 0.25 else 0, rng.choice(words_before))
        else:
            behind = f" {rng.choice(words_behind)}"
    size_words = SIZES[thing.size][1]
    if size_words and rng.random() < SAYS_SIZE:
        before.insert(0, rng.choice(size_words))
    words = " ".join([*before, noun]) + behind
    article = rng.choice(["a", "a", "a", "a", "the", "one"])
    return f"{'an' if article == 'a' and words[0] in 'aeiou' else article} {words}"


def _place_words(rng: Random, thing: Thing) -> str:
    """Where the thing is; nothing where words would be arguable."""
    dx, dy = thing.x - 0.5, thing.y - 0.5
    across = "left" if dx < -0.07 else "right" if dx > 0.07 else ""
    down = "top" if dy < -0.07 else "bottom" if dy > 0.07 else ""
    if across and down:
        return rng.choice([f"in the {down} {across} corner", f"at the {down} {across}"])
    if down and abs(dx) < 0.05:
        return rng.choice([f"at the {down}", f"near the {down}"])
    if across and abs(dy) < 0.05:
        return rng.choice([f"on the {across}", f"on the {across} side"])
    if max(abs(dx), abs(dy)) < 0.05:
        return rng.choice(["in the middle", "in the centre"])
    return ""


def _relation_words(rng: Random, first: Thing, second: Thing) -> str:
    if rng.random() >= SAYS_RELATION:
        return rng.choice(["and", "next to", "with", "beside"])
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        side = "left" if dx < 0 else "right"
        return rng.choice([f"{side} of", f"to the {side} of"])
    return rng.choice(["above", "over"] if dy < 0 else ["below", "under"])


def draw(rng: Random, scene: Scene, size: int) -> Image.Image:
    """The scene as an RGB image of `size` x `size` pixels, with sensor-like noise."""
    image = _draw_background(rng, scene.background, size)
    for thing in scene.things:
        _draw_thing(rng, image, thing)
    noise = np.random.default_rng(rng.getrandbits(64))
    pixels_HWC = np.asarray(image, dtype=np.float32) * rng.uniform(0.88, 1.08)
    grain_HWC = noise.standard_normal(pixels_HWC.shape, dtype=np.float32)
    pixels_HWC += rng.uniform(0.0, 6.0) * grain_HWC
    return Image.fromarray(np.clip(pixels_HWC, 0, 255).astype(np.uint8))


def _draw_background(rng: Random, name: str, size: int) -> Image.Image:
    """A weakly coloured slope from one tone to another, with grey lines and specks."""
    darkest, lightest = BACKGROUNDS[name][0]
    ends = [
        [255 * c for c in colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.2), rng.uniform(darkest, lightest))]
        for _ in range(2)
    ]
    direction = rng.uniform(0, 2 * math.pi)
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    slope_HW1 = (0.5 + 0.7 * (ramp[:, None] * math.sin(direction) + ramp * math.cos(direction)))[..., None]
    first, last = (np.array(end, dtype=np.float32) for end in ends)
    image = Image.fromarray(np.clip(first + slope_HW1 * (last - first), 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randrange(4)):
        grey = round(255 * rng.uniform(0.15, 0.85))
        x, y, dx, dy = (rng.uniform(0, size) for _ in range(4))
        if rng.random() < 0.5:
            pen.line((x, y, dx, dy), fill=(grey, grey, grey), width=1)
        else:
            r = rng.uniform(0.01, 0.03) * size
            pen.ellipse((x - r, y - r, x + r, y + r), fill=(grey, grey, grey))
    return image


def _draw_thing(rng: Random, image: Image.Image, thing: Thing) -> None:
    side = image.width * OVERSAMPLING
    hue, saturation, value = COLOURS[thing.colour]
    rgb = colorsys.hsv_to_rgb(
        (hue + rng.uniform(-5, 5)) % 360 / 360,
        min(1, saturation * rng.uniform(0.88, 1.08)),
        min(1, value * rng.uniform(0.9, 1.06)),
    )
    # The pattern is a much lighter or much darker tone of the same colour.
    towards = rng.choice([0.0, 1.0])
    ink = [(c + towards) / 2 for c in rgb]
    mask = _shape_mask(thing, side)
    image.paste(_bytes(rgb), mask=mask.reduce(OVERSAMPLING))
    if thing.texture != "plain":
        pattern = _pattern_mask(rng, thing.texture, side)
        image.paste(_bytes(ink), mask=ImageChops.multiply(mask, pattern).reduce(OVERSAMPLING))


def _bytes(rgb) -> tuple[int, ...]:
    return tuple(round(255 * c) for c in rgb)


def _shape_mask(thing: Thing, side: int) -> Image.Image:
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    x, y, r = thing.x * side, thing.y * side, thing.radius * side
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        return mask
    sin, cos = math.sin(thing.angle), math.cos(thing.angle)
    outline = [(x + r * (cos * u - sin * v), y + r * (sin * u + cos * v)) for u, v in OUTLINES[thing.shape]]
    pen.polygon(outline, fill=255)
    return mask


def _pattern_mask(rng: Random, texture: str, side: int) -> Image.Image:
    """White where the pattern's ink goes. The period is the same for every size, as it is for cloth."""
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    period = rng.uniform(0.11, 0.14) * side
    offset = rng.uniform(0, period)
    steps = range(-1, math.ceil(side / period) + 1)
    if texture == "striped":
        slant = rng.choice([0.0, 0.0, 1.0, -1.0]) * side
        upright = rng.random() < 0.5
        thickness = 0.45 * period / (math.sqrt(2) if slant else 1)
        for i in range(-len(steps), 2 * len(steps)):
            at = i * period + offset
            line = (at, 0, at + slant, side) if upright else (0, at, side, at + slant)
            pen.line(line, fill=255, width=round(thickness))
        return mask
    for i in steps:
        for j in steps:
            x, y = i * period + offset, j * period + offset
            if texture == "dotted":
                r = period * 0.30
                pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
            elif (i + j) % 2:
                pen.rectangle((x, y, x + period, y + period), fill=255)
    return mask


def _turns(radii: list[float], start: float) -> list[tuple[float, float]]:
    """Corners at even angles, the i-th at radii[i]."""
    angles = [start + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _heart() -> list[tuple[float, float]]:
    points = []
    for i in range(40):
        t = 2 * math.pi * i / 40
        u = 16 * math.sin(t) ** 3
        v = -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        points.append((u / 16, v / 16 - 0.1))
    return points


def _cross() -> list[tuple[float, float]]:
    w = 0.32
    quarter = [(w, -1.0), (w, -w), (1.0, -w)]
    points = []
    for i in range(4):
        sin, cos = round(math.sin(i * math.pi / 2)), round(math.cos(i * math.pi / 2))
        points += [(cos * u - sin * v, sin * u + cos * v) for u, v in quarter]
    return points


# Corners of the shapes of radius 1, y downwards
OUTLINES = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
    "star": _turns([1.1, 0.45] * 5, -math.pi / 2),
    "cross": _cross(),
    "heart": _heart(),
}
