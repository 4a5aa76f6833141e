"""A small made-up data set: drawings of the 11 dishes, for machines without a network."""

import random
from functools import partial

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from tools.photos import count_photos, new_folder

DEMO_COUNTS = {"train": 36, "validation": 10, "test": 10}  # a class
# The made-up dishes on a canvas from -100 to 100. A shape: kind, how many, how far they scatter,
# box (dot, bar) or corners (area, line), colours to choose from.
DISHES = """
apple_pie: dot 1 0 -78 -78 78 78 peru sienna, dot 1 0 -64 -64 64 64 goldenrod,
  line 3 24 -54 0 54 0 wheat, line 3 24 0 -54 0 54 wheat
cheesecake: area 1 0 -76 -40 80 5 -64 24 cornsilk, area 1 0 -64 24 80 5 80 38 -64 66 khaki,
  area 1 0 -64 54 80 27 80 40 -64 70 sienna, dot 6 14 -45 -18 -25 2 crimson indigo
chicken_curry: dot 1 0 -84 -84 84 84 dimgray linen navy, dot 1 0 -68 -68 68 68 chocolate orange,
  dot 11 26 -15 -13 15 13 peru burlywood sienna, dot 16 30 -3 -3 3 3 forestgreen
french_fries: line 12 26 -52 -14 52 14 goldenrod gold orange, line 14 26 -52 12 52 -12 gold khaki
fried_rice: dot 300 26 -5 -4 5 4 wheat cornsilk burlywood, dot 40 26 -5 -5 5 5 green tomato orange
hamburger: bar 1 0 -66 -60 66 24 peru, bar 1 3 -76 -12 76 8 yellowgreen, bar 1 2 -66 0 66 14 gold,
  bar 1 2 -70 8 70 32 saddlebrown, bar 1 0 -66 28 66 56 peru, dot 12 14 -3 -42 3 -36 cornsilk
hot_dog: bar 1 0 -74 -36 74 36 burlywood peru, bar 1 3 -92 -16 92 16 brown firebrick,
  line 1 2 -70 8 -50 -8 -30 8 -10 -8 10 8 30 -8 50 8 70 -8 gold
ice_cream: area 1 0 -34 4 34 4 0 96 peru, dot 4 14 -30 -50 30 10 linen pink sienna palegreen khaki,
  dot 9 15 -3 -29 3 -23 crimson sienna royalblue
omelette: area 1 0 -88 -34 88 -34 80 8 48 42 0 56 -48 42 -80 8 gold khaki,
  dot 7 18 -9 -8 9 12 goldenrod cornsilk, dot 12 22 -4 -4 4 4 green tomato
pizza: dot 1 0 -84 -84 84 84 peru burlywood, dot 1 0 -70 -70 70 70 orange goldenrod tomato,
  dot 9 28 -13 -13 13 13 firebrick maroon, dot 9 30 -6 -6 6 6 linen green black
sushi: bar 1 4 -74 -62 -30 62 linen, bar 1 4 -22 -62 22 62 linen, bar 1 4 30 -62 74 62 linen,
  bar 1 4 -76 -68 -28 30 coral salmon, bar 1 4 -24 -68 24 30 coral salmon,
  bar 1 4 28 -68 76 30 coral salmon, bar 1 1 -78 -12 78 2 black
"""
DISHES = dict(dish.split(": ") for dish in DISHES.strip().replace(",\n ", ",").splitlines())


def draw_dish(name, size, seed):
    """Draw one made-up photo of a dish of DISHES: a PIL image of size x size, fixed by the seed."""
    choice = random.Random(seed)  # a str gives the same numbers on every machine
    uniform, gauss = choice.uniform, choice.gauss

    def vary(colours):
        return tuple(int(c + gauss(0, 16)) for c in ImageColor.getrgb(choice.choice(colours)))

    hue, grey = choice.randrange(360), choice.randrange(60)
    table = Image.new("RGB", (200, 200), f"hsv({hue},{grey}%,60%)")
    draw = ImageDraw.Draw(table)
    for x in range(0, 200, choice.choice((8, 20, 50, 200))):  # a cloth with stripes
        draw.line((x, 0, x, 200), vary(("white", "sienna", "gray", "teal")), choice.randrange(9))
    x, y, radius = gauss(100, 15), gauss(100, 15), uniform(80, 115)
    plate = vary(("white", "linen", "lightblue", "dimgray", "sienna", "goldenrod"))
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), plate, vary(("gray",)), 3)
    layer = Image.new("RGBA", (200, 200))
    draw = ImageDraw.Draw(layer)
    kinds = {"dot": draw.ellipse, "area": draw.polygon, "line": partial(draw.line, width=9)}
    kinds["bar"] = partial(draw.rounded_rectangle, radius=17)
    for shape in DISHES[name].split(", "):
        kind, count, scatter, *rest = shape.split()
        colours = [word for word in rest if word.isalpha()]
        for _ in range(int(count)):
            middle = [gauss(100, int(scatter)), gauss(100, int(scatter))]
            points = [int(n) + middle[i % 2] for i, n in enumerate(rest[: -len(colours)])]
            kinds[kind](points, fill=vary(colours))
    layer = layer.resize((int(uniform(130, 200)), int(uniform(130, 200))))
    layer = layer.rotate(uniform(0, 360), Image.Resampling.BILINEAR, expand=True)
    table.paste(layer, tuple(int(gauss(100 - side / 2, 14)) for side in layer.size), layer)
    pixels = np.asarray(table.resize((size, size), Image.Resampling.BOX), np.float32)
    noise = np.random.default_rng(choice.getrandbits(32)).normal(0, uniform(4, 14), pixels.shape)
    light = uniform(0.7, 1.2) * np.array([uniform(0.9, 1.1) for _ in range(3)])  # and its colour
    return Image.fromarray((pixels * light + noise).clip(0, 255).astype(np.uint8))


def draw_demo(target, per_split=DEMO_COUNTS, size=96, seed=0):
    """Write a made-up set of the 11 dishes as JPEGs of size x size, `per_split` photos a class.

    The same arguments give the same bytes. A complete set is left alone; raises SystemExit if
    `target` holds anything else.
    """
    if count_photos(target) == {s: dict.fromkeys(DISHES, n) for s, n in per_split.items()}:
        return
    with new_folder(target) as folder:
        for split, number in per_split.items():
            for name in DISHES:
                (folder / split / name).mkdir(parents=True)
                for n in range(number):
                    photo = draw_dish(name, size, f"{seed} {split} {name} {n}")
                    photo.save(folder / split / name / f"{n:03}.jpg", quality=90)
