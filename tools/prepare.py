"""Get a folder of photos and look it over: counts, unreadable files, copies across splits.

    python tools/prepare.py --data food11               look over what is there
    python tools/prepare.py --download --data food11    fetch Food-11 first
    python tools/prepare.py --demo                      draw a made-up set first, into demo/
    python tools/prepare.py --split pile --data mine    split a folder of class folders first

A new folder appears whole or not at all; one that holds anything is never changed.
"""

import argparse
import itertools
import random
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data

COURSE_ARCHIVE = "1a0uuiylWnyGAr0JZVfhw2EPZ6XzcPtyb"  # Google Drive file id of food11.zip
COURSE_COUNTS = {"train": 2200, "validation": 275, "test": 275}
DEMO_COUNTS = {"train": 36, "validation": 10, "test": 10}  # a class
# Likeness (correlation of 16 x 16 grey blocks) from which a photo counts as a copy. Measured: all 8
# pairs of copies among 10,450 photos of Food-101 are above 0.999, the next pair is at 0.981. Of 275
# photos re-encoded, or halved, all stay above 0.997; resized by 0.4 to 1.6 as well, 99.6%; and
# brightened by 25% at most as well, 95%. Of 319,200 pairs of digits, white on black in one font, it
# takes 0 to 0.85 in 10,000 for copies; at 0.995 it would be up to 1.5.
COPY = 0.997
# Dishes as shapes on a canvas of 200 x 200: ellipse or rectangle, how many, how far they scatter,
# half their width and height, colours to choose from.
DISHES = {
    "apple_pie": "dot 1 0 78 78 peru sienna, dot 1 0 64 64 goldenrod, bar 4 24 54 4 wheat",
    "cheesecake": "bar 1 0 62 50 sienna, bar 1 2 56 44 cornsilk khaki, dot 6 14 10 10 crimson",
    "chicken_curry": "dot 1 0 68 68 chocolate orange, dot 11 26 15 13 peru, dot 16 30 3 3 green",
    "french_fries": "bar 14 26 52 5 goldenrod gold, bar 14 26 52 5 orange gold khaki",
    "fried_rice": "dot 300 26 5 4 wheat cornsilk burlywood, dot 40 26 5 5 green tomato orange",
    "hamburger": "bar 1 0 66 58 peru, bar 1 3 78 12 yellowgreen, bar 1 2 70 12 saddlebrown",
    "hot_dog": "bar 1 0 74 36 burlywood peru, bar 1 3 92 16 brown firebrick, bar 1 2 70 4 gold",
    "ice_cream": "bar 1 0 26 92 peru, dot 3 14 34 30 linen sienna palegreen, dot 9 15 3 3 red",
    "omelette": "dot 1 0 88 44 gold khaki, dot 7 18 9 9 goldenrod cornsilk, dot 12 22 4 4 green",
    "pizza": "dot 1 0 84 84 peru, dot 1 0 70 70 orange tomato, dot 9 28 13 13 firebrick maroon",
    "sushi": "bar 3 30 22 62 linen, bar 3 30 24 48 coral salmon, bar 1 1 78 7 black",
}


def new_folder(target, fill, *arguments):
    """Have fill(folder, *arguments) make a folder, which becomes `target` only if it succeeds.

    Beside it is space for temporary files. Exits with one line if `target` holds anything.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise SystemExit(f"{target} exists already and is left as it is: name another by --data")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=target.parent) as space:
        folder = Path(space, "photos")
        fill(folder, *arguments)
        folder.rename(target)  # an empty folder gives way


def unpack_archive(folder, archive):
    """Unpack the course's zip file into `folder`, without a folder around its splits.

    Exits with one line if a member is a link or leads out, or if the photos are not the course's.
    """
    with zipfile.ZipFile(archive) as bundle:
        for member in bundle.infolist():
            path = Path(folder, member.filename).resolve()
            # 10: a link
            if member.external_attr >> 28 == 10 or not path.is_relative_to(folder.resolve()):
                raise SystemExit(f"{archive}: {member.filename!r} is a link or leads out of it")
            if path.parts[-3] in COURSE_COUNTS:
                member.filename = "/".join(path.parts[-3:])
                bundle.extract(member, folder)
    listed = {split: data.list_photos(folder, split) for split in COURSE_COUNTS}
    counts = {split: len(photos.files) for split, photos in listed.items()}
    classes = {tuple(photos.classes) for photos in listed.values()}  # one, of 11, if all agree
    if counts != COURSE_COUNTS or [len(names) for names in classes] != [11]:
        raise SystemExit(f"{archive}: {counts} photos, not {COURSE_COUNTS} of the same 11 classes")


def fetch_food11(folder):
    """Download the course's photos from Google Drive into `folder`, or exit with one line."""
    try:
        # gdown waits without a limit, so first ask, with one, whether Google answers at all.
        urllib.request.urlopen("http://www.google.com/generate_204", timeout=30).close()
        from torchvision.datasets.utils import download_file_from_google_drive  # takes seconds

        download_file_from_google_drive(COURSE_ARCHIVE, folder.parent, "food11.zip")
        unpack_archive(folder, folder.parent / "food11.zip")
    except (Exception, SystemExit) as error:  # whatever gdown, the network or the archive raise
        raise SystemExit(f"no Food-11 ({error!r}): put it there yourself, or use --demo") from None


def split_pile(folder, pile):
    """Split a folder of class folders, 80 / 10 / 10% of each class, always alike, into `folder`.

    Exits with one line at fewer than two classes or three photos of a class.
    """
    classes = [path for path in data.visible(pile) if path.is_dir()]
    if len(classes) < 2:
        raise SystemExit(f"{pile}: two class folders or more are needed, not {len(classes)}")
    for source in classes:
        photos = [path for path in data.visible(source) if data.is_photo(path)]
        if len(photos) < 3:
            raise SystemExit(f"{source}: {len(photos)} photos; add some, three are needed")
        random.Random(0).shuffle(photos)
        splits = ["validation", "test"] * max(1, round(len(photos) / 10))
        for photo, split in itertools.zip_longest(photos, splits, fillvalue="train"):
            copy = folder / split / source.name / photo.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                copy.hardlink_to(photo.resolve())
            except OSError:  # another disk, or one without links
                copy.write_bytes(photo.read_bytes())


def draw_dish(name, seed):
    """Draw a made-up photo of a dish of DISHES: a PIL image of 96 x 96, the same for a seed."""
    choice = random.Random(seed)  # a str gives the same numbers on every machine
    table = f"hsv({choice.randrange(360)},{choice.randrange(60)}%,60%)"
    image = Image.new("RGB", (200, 200), table)
    pen = ImageDraw.Draw(image)
    plate = "dot 1 12 97 97 white linen lightblue dimgray sienna goldenrod"
    for shape in [plate, *DISHES[name].split(", ")]:
        kind, count, scatter, wide, high, *colours = shape.split()
        draw = pen.ellipse if kind == "dot" else pen.rectangle
        for _ in range(int(count)):
            x, y = choice.gauss(100, int(scatter)), choice.gauss(100, int(scatter))
            box = x - int(wide), y - int(high), x + int(wide), y + int(high)
            draw(box, choice.choice(colours))
    image = image.rotate(choice.uniform(0, 360), Image.Resampling.BILINEAR, fillcolor=table)
    light = choice.uniform(0.6, 1.2)
    return image.resize((96, 96), Image.Resampling.BOX).point(lambda value: value * light)


def draw_demo(folder):
    """Draw the made-up set into `folder`, always alike."""
    for split, name in itertools.product(DEMO_COUNTS, DISHES):
        (folder / split / name).mkdir(parents=True)
        for n in range(DEMO_COUNTS[split]):
            photo = draw_dish(name, f"{split} {name} {n}")
            photo.save(folder / split / name / f"{n:02}.jpg", quality=90)


def find_copies(photos, ends):
    """Yield (i, j) where photo j is a copy of photo i of an earlier split.

    photos: uint8 [3, 128, 128] each, split after split; ends: how many there are up to each end.
    """
    grey = [photo.reshape(3, 16, 8, 16, 8).mean((0, 2, 4), np.float32).ravel() for photo in photos]
    grey = np.array(grey) - np.mean(grey, axis=1, keepdims=True)  # float32 [N, 256]
    grey /= np.linalg.norm(grey, axis=1, keepdims=True).clip(1)  # a flat photo is like no other
    for start, end in itertools.pairwise(ends):
        blocks = range(start, end, 64)  # at a time, for little memory
        for first in data.progress(blocks, len(blocks), "comparing blocks of 64 photos"):
            likeness = grey[:start] @ grey[first : min(first + 64, end)].T
            yield from ((i, first + j) for i, j in np.argwhere(likeness > COPY))


def look_over(directory):
    """Print counts, what is not read and copies. Exits with a line for each unreadable photo."""
    splits = [s for s in COURSE_COUNTS if s != "test" or (directory / s).is_dir()]
    row, names, paths, ends = "{:24}" + "{:>11}" * len(splits), [], [], []
    for split_name in splits:
        split = data.list_photos(directory, split_name)
        names.append([split.classes[label] for label in split.labels])
        paths += [data.split_folder(directory, split_name) / file for file in split.files]
        ends.append(len(paths))
    print(row.format("photos", *splits))
    for name in sorted(set().union(*names)):
        print(row.format(name, *(found.count(name) for found in names)))
    print(row.format("all", *map(len, names)))
    others = {path for path in directory.rglob("[!.]*") if path.is_file()}.difference(paths)
    print(f"{len(others):,} files not read as photos", *sorted(others)[:20], sep="\n  ")
    photos = (photo for photo in data.decode_all(paths, 128) if photo is not None)
    copies = [f"{paths[i]}  {paths[j]}" for i, j in find_copies(photos, ends)]
    print(f"{len(copies):,} copies across splits, at most 20 named", *copies[:20], sep="\n  ")


def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description = __doc__.split("\n\n")[0]
    parser.add_argument("--data", default=argparse.SUPPRESS, help="default: food11, of --demo demo")
    flag = parser.add_mutually_exclusive_group().add_argument
    flag("--download", action="store_true", help="fetch Food-11 into --data first")
    flag("--demo", action="store_true", help="draw a made-up set into --data first")
    flag("--split", metavar="PILE", help="split a folder of class folders into --data first")
    arguments = parser.parse_args(argv)
    # Drawings must not be taken for Food-11.
    directory = Path(getattr(arguments, "data", "demo" if arguments.demo else "food11"))
    try:
        if arguments.download:
            new_folder(directory, fetch_food11)
        # It appeared whole, so the last photo speaks for all.
        elif arguments.demo and not (directory / "test/sushi/09.jpg").exists():
            new_folder(directory, draw_demo)
        elif arguments.split:
            new_folder(directory, split_pile, Path(arguments.split))
        look_over(directory)
    except OSError as error:  # such as a full disk, or no such pile
        raise SystemExit(error) from None


if __name__ == "__main__":
    main()
