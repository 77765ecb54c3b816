r"""Write the image sets that a merge benchmark can have without a download.

``digits`` are scikit-learn's 8x8 scans.  The others are drawn: ``letters`` (26 classes: a slanted letter over
clutter) and ``dots`` (how many discs, one to eight) are tasks; ``glyphs`` (letters and digits, clean) and
``shapes`` (six shapes in six colours) are variety for the base, see ``pretrain_clip.py --extra``.
Each is ``OUTPUT/NAME/{train,validation,test}.parquet`` with a PNG ``image`` of 32x32 pixels and a ``ClassLabel``::

    pip install scikit-learn pillow
    python scripts/prepare_images.py --fonts /usr/share/fonts/truetype/dejavu --output data

The drawn sets hold the same pictures whenever seed, fonts and Pillow are the same.
"""

from __future__ import annotations

import argparse
import random
import string
from collections.abc import Callable
from pathlib import Path

import numpy
from datasets import ClassLabel, Dataset, Features, disable_progress_bars
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 32
CANVAS = 128  # drawn large, then reduced: smooth edges
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
}
CORNERS = {"triangle": 3, "square": 4, "hexagon": 6}  # regular polygons
SHAPES = [*CORNERS, "circle", "ring", "cross"]
Colour = tuple[int, int, int]
Draw = Callable[[int, random.Random], Image.Image]


def any_colour(rng: random.Random) -> Colour:
    """A colour out of all."""
    return (rng.randrange(256), rng.randrange(256), rng.randrange(256))


def contrasting(colour: Colour, rng: random.Random, distance: int) -> Colour:
    """A colour whose brightness differs from the given one's by ``distance`` at least."""
    while True:
        other = any_colour(rng)
        if abs(sum(other) - sum(colour)) >= 3 * distance:
            return other


def finish(picture: Image.Image, rng: random.Random, noise: float) -> Image.Image:
    """Blur a little, reduce to ``SIZE`` and add Gaussian noise of standard deviation ``noise``."""
    small = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2.5))).resize((SIZE, SIZE), Image.Resampling.BOX)
    grain = numpy.random.default_rng(rng.getrandbits(32)).normal(0, noise, (SIZE, SIZE, 3))
    return Image.fromarray((numpy.asarray(small) + grain).clip(0, 255).astype(numpy.uint8))


def draw_glyph(text: str, fonts: list[Path], rng: random.Random, turn: float, clutter: int) -> Image.Image:
    """One character in a random face, size, place and colour, over ``clutter`` random lines."""
    ground = any_colour(rng)
    ink = contrasting(ground, rng, 60)
    picture = Image.new("RGB", (CANVAS, CANVAS), ground)
    lines = ImageDraw.Draw(picture)
    for _ in range(clutter):
        ends = [rng.randrange(CANVAS) for _ in range(4)]
        lines.line(ends, fill=contrasting(ink, rng, 40), width=rng.randrange(2, 14))
    font = ImageFont.truetype(str(rng.choice(fonts)), rng.randrange(80, 125))
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    place = (CANVAS / 2 + rng.uniform(-14, 14), CANVAS / 2 + rng.uniform(-14, 14))
    ImageDraw.Draw(mask).text(place, text, fill=255, font=font, anchor="mm")
    picture.paste(ink, mask=mask.rotate(rng.uniform(-turn, turn), Image.Resampling.BILINEAR))
    return finish(picture, rng, rng.uniform(0, 12))


def draw_letter(label: int, fonts: list[Path], rng: random.Random) -> Image.Image:
    """A letter, upper or lower case, turned by up to 35 degrees, with four lines of clutter behind it."""
    letter = string.ascii_lowercase[label]
    return draw_glyph(rng.choice((letter, letter.upper())), fonts, rng, turn=35, clutter=4)


def draw_clean_glyph(label: int, fonts: list[Path], rng: random.Random) -> Image.Image:
    """A digit or letter, almost upright, on a plain ground."""
    glyph = (string.digits + string.ascii_lowercase)[label]
    return draw_glyph(rng.choice((glyph, glyph.upper())), fonts, rng, turn=8, clutter=0)


def draw_dots(label: int, rng: random.Random) -> Image.Image:
    """``label + 1`` discs that do not touch, each of its own size and colour."""
    ground = any_colour(rng)
    picture = Image.new("RGB", (CANVAS, CANVAS), ground)
    pen = ImageDraw.Draw(picture)
    placed: list[tuple[float, float, float]] = []
    while len(placed) <= label:
        radius = rng.uniform(7, 17)
        x, y = rng.uniform(radius, CANVAS - radius), rng.uniform(radius, CANVAS - radius)
        if all((x - u) ** 2 + (y - v) ** 2 > (radius + r + 5) ** 2 for u, v, r in placed):
            placed.append((x, y, radius))
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=contrasting(ground, rng, 50))
    return finish(picture, rng, rng.uniform(0, 12))


def draw_shape(label: int, rng: random.Random) -> Image.Image:
    """One shape in one colour, of random size, place and turn."""
    colour, shape = list(COLOURS.values())[label // len(SHAPES)], SHAPES[label % len(SHAPES)]
    picture = Image.new("RGB", (CANVAS, CANVAS), contrasting(colour, rng, 45))
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    pen = ImageDraw.Draw(mask)
    radius = rng.uniform(20, 48)
    x, y = (CANVAS / 2 + rng.uniform(-16, 16) for _ in range(2))
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape in CORNERS:
        pen.regular_polygon((x, y, radius), CORNERS[shape], fill=255)
    elif shape == "cross":
        pen.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), fill=255)
        pen.rectangle((x - radius / 3, y - radius, x + radius / 3, y + radius), fill=255)
    else:
        pen.ellipse(box, fill=255)
        if shape == "ring":
            hole = radius * 0.6
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    picture.paste(colour, mask=mask.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR))
    return finish(picture, rng, rng.uniform(0, 12))


def write(images: list[Image.Image], labels: list[int], names: list[str], path: Path) -> None:
    """Write one split."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(str(path))


def write_drawn(directory: Path, names: list[str], draw: Draw, sizes: dict[str, int], seed: int) -> None:
    """Write a drawn set, its classes equally frequent."""
    for split, size in sizes.items():
        rng = random.Random(f"{directory.name} {split} {seed}")
        labels = [index % len(names) for index in range(size)]
        rng.shuffle(labels)
        write([draw(label, rng) for label in labels], labels, names, directory / f"{split}.parquet")


def write_digits(directory: Path, seed: int) -> None:
    """Write scikit-learn's digits, enlarged from 8x8: 1000 for training, 197 for validation, 600 for the test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = list(range(len(digits.target)))
    random.Random(seed).shuffle(order)
    for split, part in {"train": order[:1000], "validation": order[1000:1197], "test": order[1197:]}.items():
        pictures = [Image.fromarray((digits.images[i] * 15.9).astype(numpy.uint8)) for i in part]
        large = [picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for picture in pictures]
        write(large, [int(digits.target[i]) for i in part], NUMBERS, directory / f"{split}.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="sets go to OUTPUT/NAME")
    parser.add_argument("--fonts", type=Path, required=True, help="folder of .ttf files for letters and glyphs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    fonts = sorted(arguments.fonts.glob("*.ttf"))
    if not fonts:
        parser.error(f"no .ttf file in {arguments.fonts}")
    disable_progress_bars()
    letters = list(string.ascii_lowercase)
    counts = ["one dot", *(f"{number} dots" for number in NUMBERS[2:9])]
    coloured = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    task = {"train": 3000, "validation": 400, "test": 1000}
    variety = {"train": 9000}
    write_digits(arguments.output / "digits", arguments.seed)
    drawn: list[tuple[str, list[str], Draw, dict[str, int]]] = [
        ("letters", letters, lambda label, rng: draw_letter(label, fonts, rng), task),
        ("dots", counts, draw_dots, task),
        ("glyphs", NUMBERS + letters, lambda label, rng: draw_clean_glyph(label, fonts, rng), variety),
        ("shapes", coloured, draw_shape, variety),
    ]
    for name, names, draw, sizes in drawn:
        write_drawn(arguments.output / name, names, draw, sizes, arguments.seed)
        print(f"{name}: {len(names)} classes, {sizes}", flush=True)


if __name__ == "__main__":
    main()
