"""Get a folder of photos, look it over and decode it in advance.

    python tools/prepare.py --data food11               counts, unreadable files, leaks, a picture
    python tools/prepare.py --download --data food11    fetch Food-11 first
    python tools/prepare.py --download --classes all --data food101    or all of Food-101's classes
    python tools/prepare.py --demo                      draw the made-up set first, into demo/
    python tools/prepare.py --split photos --data mine  split a plain folder of class folders first

A new folder appears whole or not at all; one that exists is never changed.
"""

import contextlib
import json
import os
import random
import shutil
import socket
import stat
import sys
import tempfile
import urllib.request
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations, cycle, islice
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageColor, ImageDraw, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import (
    Parser,
    add_folder_flags,
    atomic_file,
    cpu_count,
    number,
    printable,
    split_folder,
)

import data

COURSE_ARCHIVE = "1a0uuiylWnyGAr0JZVfhw2EPZ6XzcPtyb"  # Google Drive file id of food11.zip
COURSE_COUNTS = {"train": 2200, "validation": 275, "test": 275}
LARGEST_ARCHIVE = 2**31  # bytes unpacked; the course's has some 100 MB
DEMO_COUNTS = {"train": 36, "validation": 10, "test": 10}  # a class
SHARES = {"validation": 0.1, "test": 0.1, "train": 0.8}  # of each class, filled in this order
# Two photos count as copies up to this many differing bits of 256. Measured on 10,450 Food-101
# photos: the 8 pairs up to 28 are real copies, the next, at 31, is not; a re-encoded, resized
# (x0.4 to x1.6), darker or brighter copy stays within 28 in 99% of the cases.
NEAR_DUPLICATE_BITS = 28
LARGEST_BLOCK = 2**25  # distances in memory at a time, 4 bytes each
MOST_LINES = 200  # printed of a list of files
# The classes of Food-11, and of what each is made up, on a canvas of 200 x 200. A shape: kind, how
# many, how far they scatter, half its width and height, colours to choose from.
DISHES = {
    "apple_pie": "dot 1 0 78 78 peru sienna, dot 1 0 64 64 goldenrod, bar 4 24 54 4 wheat",
    "cheesecake": "slice 1 0 96 96 sienna, slice 1 2 88 88 cornsilk khaki, dot 6 14 10 10 crimson",
    "chicken_curry": "dot 1 0 68 68 chocolate orange, dot 11 26 15 13 peru, dot 16 30 3 3 green",
    "french_fries": "bar 14 26 52 5 goldenrod gold, bar 14 26 52 5 orange gold khaki",
    "fried_rice": "dot 300 26 5 4 wheat cornsilk burlywood, dot 40 26 5 5 green tomato orange",
    "hamburger": "bar 1 0 66 58 peru, bar 1 3 78 12 yellowgreen, bar 1 2 70 12 saddlebrown",
    "hot_dog": "bar 1 0 74 36 burlywood peru, bar 1 3 92 16 brown firebrick, bar 1 2 70 4 gold",
    "ice_cream": "slice 1 0 99 99 peru, dot 3 14 34 30 linen sienna palegreen, dot 9 15 3 3 red",
    "omelette": "half 1 0 88 76 gold khaki, dot 7 18 9 9 goldenrod cornsilk, dot 12 22 4 4 green",
    "pizza": "dot 1 0 84 84 peru, dot 1 0 70 70 orange tomato, dot 9 28 13 13 firebrick maroon",
    "sushi": "bar 3 30 22 62 linen, bar 3 30 24 48 coral salmon, bar 1 1 78 7 black",
}


def refuse_existing(target):
    """Exit with one line if the path `target` is anything but missing or an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SystemExit(f"{target}: exists already and is left as it is. Name another folder.")


@contextlib.contextmanager
def new_folder(target):
    """Yield a temporary sibling folder that becomes `target` only if the block succeeds.

    Exits with one line if `target` is there and not empty, or cannot be written.
    """
    target = Path(target).resolve()
    refuse_existing(target)
    unfinished = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # a killed process had the same number
        unfinished.mkdir(parents=True)
        yield unfinished
        os.rename(unfinished, target)  # an empty folder gives way
    except OSError as error:
        reason = error.strerror or error
        raise SystemExit(f"{target}: cannot be written ({reason}). Choose another place.") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def count_files(folder):
    """Return {split: {class: number of files}} of the three splits, without hidden files."""
    found = [photo.parts[-3:-1] for photo in sorted(folder.glob("*/*/[!.]*"))]
    return {s: Counter(name for split, name in found if split == s) for s in data.SPLITS}


def unpack_archive(archive, target, counts=COURSE_COUNTS, classes=11):
    """Unpack {train,validation,test}/<class>/<photo> of a zip file into the new folder `target`.

    A folder around the splits is taken off; whatever is not such a photo is left out. Raises
    ValueError if it is far too large, a member is a link or leads out, or if there are not exactly
    `classes` classes, the same in every split, with `counts` photos a split.
    """
    with zipfile.ZipFile(archive) as bundle, new_folder(target) as folder:
        unpacked = sum(member.file_size for member in bundle.infolist())
        if unpacked > LARGEST_ARCHIVE:
            raise ValueError(f"it would unpack to {unpacked:,} bytes")
        for member in bundle.infolist():
            path = PurePosixPath(member.filename)
            outside = path.is_absolute() or ".." in path.parts or set(member.filename) & set("\\:")
            if outside or stat.S_ISLNK(member.external_attr >> 16):
                raise ValueError(f"{member.filename!r} in it is a link or leads out of the folder")
            if len(path.parts) < 3 or path.parts[0] == "__MACOSX" or not data.has_photo_name(path):
                continue
            if path.parts[-3] in counts:
                photo = folder.joinpath(*path.parts[-3:])
                photo.parent.mkdir(parents=True, exist_ok=True)
                with bundle.open(member) as packed, open(photo, "wb") as file:
                    shutil.copyfileobj(packed, file)
        found = count_files(folder)
        totals = {split: sum(found[split].values()) for split in counts}
        names = {tuple(found[split]) for split in counts}
        if totals != counts or len(names) != 1 or len(found["train"]) != classes:
            raise ValueError(f"it has {totals} photos, not {counts} in the same {classes} classes")


def fetch_course_archive(target, cache):
    """Download the course's zip file from Google Drive and unpack it into `target`."""
    from torchvision.datasets.utils import download_file_from_google_drive  # a second to import

    # gdown waits without a time limit, so first ask, with one, whether Google answers at all.
    urllib.request.urlopen("http://www.google.com/generate_204").close()
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        download_file_from_google_drive(COURSE_ARCHIVE, folder, "food11.zip")
        unpack_archive(Path(folder, "food11.zip"), target)


def fetch_food101(target, cache, classes="food11"):
    """Download Food-101 (5 GB) into `cache` and copy as many photos a class as the course has.

    classes: "food11" or "all". If the folder food-101 is in `cache` nothing is downloaded. The draw
    is always the same: validation and test from Food-101's reviewed test list, train from its
    noisier training list. Raises ValueError if a photo is missing.
    """
    from torchvision.datasets import Food101

    root = cache / "food-101"
    if not root.exists():
        try:
            Food101(cache, download=True)
        except BaseException:
            shutil.rmtree(root, ignore_errors=True)  # half unpacked, it would pass for the whole
            raise
    listed = {p: json.loads((root / f"meta/{p}.json").read_text()) for p in ("train", "test")}
    choice = random.Random(0)
    with new_folder(target) as folder:
        for name in DISHES if classes == "food11" else sorted(listed["train"]):
            held_out = choice.sample(sorted(listed["test"][name]), 50)
            training = choice.sample(sorted(listed["train"][name]), 200)
            photos = {"train": training, "validation": held_out[:25], "test": held_out[25:]}
            for split, chosen in photos.items():
                (folder / split / name).mkdir(parents=True)
                for photo in chosen:  # such as "apple_pie/1005649"
                    stored = root / "images" / f"{photo}.jpg"
                    if not stored.exists():
                        raise ValueError(f"{root} is incomplete; remove it and try again")
                    shutil.copyfile(stored, folder / split / f"{photo}.jpg")
    print(f"{cache} now holds all of Food-101 (10 GB) and can be removed")


SOURCES = {"the course's archive": fetch_course_archive, "a draw from Food-101": fetch_food101}


def download_food11(target, cache, sources=SOURCES):
    """Fetch Food-11 into the new folder `target` from the first of `sources` that can be had.

    A source is a title and a function of target and cache, the folder for downloads. Exits with
    one line if `target` exists and is not empty or no source can be had.
    """
    refuse_existing(target)
    socket.setdefaulttimeout(30)  # rather than hang without a network
    for title, fetch in sources.items():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            fetch(target, cache)
        except Exception as error:  # whatever torchvision, gdown, the network or the disk raise
            reason = str(error).strip() or repr(error)
            print(f"{title} is not to be had: {reason.splitlines()[0]}")
        else:
            print(f"{target} is {title}")
            return
    raise SystemExit(
        "nothing could be downloaded. Check the network, or put photos yourself in "
        f"{target}/{{train,validation,test}}/<class>/, or use the made-up set of --demo."
    )


def draw_dish(name, size, seed):
    """Draw one made-up photo of a dish of DISHES: a PIL image of size x size, fixed by the seed."""
    choice = random.Random(seed)  # a str gives the same numbers on every machine
    uniform, gauss = choice.uniform, choice.gauss

    def vary(colours):
        return tuple(int(c + gauss(0, 16)) for c in ImageColor.getrgb(choice.choice(colours)))

    def place(scatter, wide, high):
        x, y = gauss(100, scatter), gauss(100, scatter)
        return x - wide, y - high, x + wide, y + high

    hue, saturation, radius = choice.randrange(360), choice.randrange(60), uniform(80, 115)
    table = Image.new("RGB", (200, 200), f"hsv({hue},{saturation}%,60%)")
    plate = vary(["white", "linen", "lightblue", "dimgray", "sienna", "goldenrod"])
    ImageDraw.Draw(table).ellipse(place(15, radius, radius), plate, "gray")
    dish = Image.new("RGBA", (200, 200))
    pen = ImageDraw.Draw(dish)
    for shape in DISHES[name].split(", "):
        kind, count, scatter, wide, high, *colours = shape.split()
        for _ in range(int(count)):
            box, colour = place(int(scatter), int(wide), int(high)), vary(colours)
            if kind == "dot":
                pen.ellipse(box, colour)
            elif kind == "bar":
                pen.rounded_rectangle(box, 17, colour)
            elif kind == "slice":
                pen.pieslice(box, 60, 120, colour)
            else:
                pen.chord(box, 0, 180, colour)
    dish = dish.resize((int(uniform(130, 200)), int(uniform(130, 200))))
    dish = dish.rotate(uniform(0, 360), Image.Resampling.BILINEAR, expand=True)
    table.paste(dish, tuple(int(gauss(100 - side / 2, 14)) for side in dish.size), dish)
    pixels = np.asarray(table.resize((size, size), Image.Resampling.BOX), np.float32)
    noise = np.random.default_rng(choice.getrandbits(32)).normal(0, uniform(4, 14), pixels.shape)
    light = uniform(0.7, 1.2) * np.array([uniform(0.9, 1.1) for _ in range(3)])  # and its colour
    return Image.fromarray((pixels * light + noise).clip(0, 255).astype(np.uint8))


def draw_demo(target, per_split=DEMO_COUNTS, size=96, seed=0):
    """Write a made-up set of the 11 dishes as JPEGs of size x size, `per_split` photos a class.

    The same arguments give the same bytes. A complete set is left alone; exits with one line if
    `target` holds anything else.
    """
    if count_files(target) == {s: dict.fromkeys(DISHES, n) for s, n in per_split.items()}:
        return
    with new_folder(target) as folder:
        for split, count in per_split.items():
            for name in DISHES:
                (folder / split / name).mkdir(parents=True)
                for n in range(count):
                    photo = draw_dish(name, size, f"{seed} {split} {name} {n}")
                    photo.save(folder / split / name / f"{n:03}.jpg", quality=90)


def scan_photos(files):
    """Decode every photo once, in threads.

    Returns sizes int [N, 2] (width, height), hashes bool [N, 256] (is a pixel of the grey photo,
    shrunk to 17 x 16, brighter than its left neighbour?) and a list of "file: reason" of the
    unreadable ones, truncated ones included, whose rows are all 0.
    """
    sizes, hashes, errors = np.zeros((len(files), 2), int), np.zeros((len(files), 256), bool), []

    def scan(row):
        try:
            with Image.open(files[row]) as photo:
                size = photo.size
                photo.draft("L", (128, 128))  # a JPEG decodes to 1/2, 1/4, 1/8 cheaply
                photo = ImageOps.exif_transpose(photo).convert("L")
                grey = np.asarray(photo.resize((17, 16), Image.Resampling.BILINEAR))
            sizes[row], hashes[row] = size, (grey[:, 1:] > grey[:, :-1]).ravel()
        except Exception as error:  # a broken file can raise nearly anything in PIL
            errors.append(f"{files[row]}: {str(error) or repr(error)}")

    progress = data.Progress("check", len(files))
    with ThreadPoolExecutor(cpu_count()) as pool:
        for done, _ in enumerate(pool.map(scan, range(len(files)))):
            progress.show(done)
    return sizes, hashes, sorted(errors)


def near_duplicates(hashes, rows, columns, bits=NEAR_DUPLICATE_BITS):
    """Yield (i, j, distance) where at most `bits` bits differ, i of `rows` and j of `columns`.

    `hashes` bool [N, 256] of scan_photos, `rows` and `columns` int arrays of its rows. A hash
    without a single bit (flat or unreadable photo) matches nothing.
    """
    rows, columns = (part[hashes[part].any(axis=1)] for part in (rows, columns))
    if not len(rows) or not len(columns):
        return
    signs = np.where(hashes[columns], 1, -1).astype(np.float32).T
    count = max(1, LARGEST_BLOCK // len(columns))  # rows at a time: memory does not grow with both
    for start in range(0, len(rows), count):
        some = rows[start : start + count]
        same = np.where(hashes[some], 1, -1).astype(np.float32) @ signs  # equal bits less others
        for row, column in np.argwhere(same >= hashes.shape[1] - 2 * bits):
            distance = (hashes.shape[1] - same[row, column]) / 2
            yield some[row], columns[column], int(distance)


def print_files(title, files):
    """Print how many files there are and the first of them, each on a line of its own."""
    print(f"{len(files):,} {title}")
    for file in files[:MOST_LINES]:
        print(f"  {file}")
    if len(files) > MOST_LINES:
        print(f"  and {len(files) - MOST_LINES:,} more")


def refuse_unreadable(errors):
    """Print the unreadable files of scan_photos; exit with one line if there are any."""
    print_files("unreadable files", errors)
    if errors:
        raise SystemExit("remove or replace the unreadable files: training would stop at them")


def share_out(hashes):
    """Split the photos of one class, bool [N, 256], as SHARES says: split -> list of rows.

    Near-duplicates stay together. None if there are too few different photos for three splits.
    """
    rows = np.arange(len(hashes))
    group = rows.copy()
    for i, j, _ in near_duplicates(hashes, rows, rows):
        group[group == group[j]] = group[i]
    groups = [np.flatnonzero(group == number).tolist() for number in np.unique(group)]
    if len(groups) < len(SHARES):
        return None
    random.Random(0).shuffle(groups)
    groups.sort(key=len)
    # No split stays empty, however large a group is; the largest one belongs into train.
    chosen = {"validation": groups.pop(0), "test": groups.pop(0), "train": groups.pop()}
    for members in groups:
        wanting = [s for s, share in SHARES.items() if len(chosen[s]) < share * len(rows)]
        chosen[wanting[0]] += members
    return chosen


def split_photos(plain, target):
    """Split `plain`, a folder of class folders, into the new data folder `target`, always alike.

    The photos are hard links, or copies where links fail. Exits with one line if there are less
    than two classes, a class has less than three different photos, or one is unreadable.
    """
    classes = [Path(entry.path) for entry in data.visible_entries(plain) if data.is_class(entry)]
    if len(classes) < 2:
        raise SystemExit(f"{plain}: {len(classes)} class folders, at least 2 are needed.")
    ignored, errors = [], []
    with new_folder(target) as folder:
        for source in classes:
            entries = data.visible_entries(source)
            ignored += [entry.path for entry in entries if not data.is_photo(entry)]
            photos = [Path(entry.path) for entry in entries if data.is_photo(entry)]
            _, hashes, unreadable = scan_photos(photos)
            errors += unreadable
            chosen = share_out(hashes)
            if chosen is None:
                raise SystemExit(f"{source}: less than 3 different photos. Add some.")
            for split, rows in chosen.items():
                (folder / split / source.name).mkdir(parents=True)
                for row in rows:
                    link = folder / split / source.name / photos[row].name
                    try:
                        os.link(photos[row].resolve(), link)
                    except OSError:  # another disk, or one without links
                        shutil.copyfile(photos[row], link)
        print_files("files are no photos and left out", ignored)
        refuse_unreadable(errors)


def draw_sheet(directory, classes, files, path, image_size=96, count=4):
    """Write a PNG of the first `count` training photos of each class, as stored and augmented.

    The first 20 classes are shown; a class with fewer photos repeats them.
    """
    classes = classes[:20]
    generator, augmentation = torch.Generator().manual_seed(0), data.Augmentation(0.2, 15, 0.3, 0.5)
    mean, std = data.PIXEL_MEAN[:, None, None], data.PIXEL_STD[:, None, None]
    figure = Figure(figsize=(9, 0.3 + len(classes)), layout="constrained")
    axes = figure.subplots(len(classes), 2, squeeze=False)
    for name, row in zip(classes, axes, strict=True):
        photos = cycle(file for file in files["train"] if file.startswith(f"{name}/"))
        paths = [directory / "train" / photo for photo in islice(photos, count)]
        stored = torch.from_numpy(np.stack([data.decode(file, image_size)[0] for file in paths]))
        view = data.draw_augmentation(count, generator, augmentation)
        augmented = ((data.augment(stored, *view) * std + mean).clamp(0, 1) * 255).byte()
        for axis, images in zip(row, (stored, augmented), strict=True):
            gap = images.new_full((count, 3, image_size, 4), 255)  # white
            strip = torch.cat(list(torch.cat([images, gap], dim=3)), dim=2)  # side by side
            axis.imshow(strip.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[], frame_on=False)
        label = printable(name).replace("_", "\n")
        row[0].set_ylabel(label, parse_math=False, rotation=0, ha="right", va="center")
    axes[0, 0].set_title("as stored", fontsize=10)
    axes[0, 1].set_title("as the network sees them", fontsize=10)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def check(directory, sheet):
    """Print counts, sizes, near-duplicates across splits, what is not read; draw the sheet.

    Exits with one line if a photo is unreadable.
    """
    classes, files, ignored = data.list_photos(directory)
    width = max(len(name) for name in classes) + 2
    print(f"{'class':{width}}" + "".join(f"{split:>12}" for split in files))
    counts = [data.count_photos(names) for names in files.values()]
    for name in classes:
        print(f"{name:{width}}" + "".join(f"{count[name]:12}" for count in counts))
    print(f"{'all':{width}}" + "".join(f"{count.total():12}" for count in counts))

    folders = {split: split_folder(directory, split) for split in files}
    paths = [folders[split] / name for split in files for name in files[split]]
    sizes, hashes, errors = scan_photos(paths)
    read = sizes[sizes.all(axis=1)]
    for title, pixels in zip(("width", "height"), read.T, strict=True):
        if len(read):
            print(f"{title} {pixels.min()} to {pixels.max()} px, median {np.median(pixels):.0f}")
    splits = np.repeat(list(files), [len(names) for names in files.values()])
    pairs = []
    for one, other in combinations(files, 2):
        rows, columns = np.flatnonzero(splits == one), np.flatnonzero(splits == other)
        pairs += near_duplicates(hashes, rows, columns)
    print_files(
        "near-duplicate pairs across splits (a leak: keep one photo of each)",
        [
            f"{paths[i]}  {paths[j]}  ({bits} of 256 bits differ)"
            for i, j, bits in sorted(pairs, key=lambda pair: pair[2])
        ],
    )
    print_files(
        "files are no photos and not read",
        [folders[split] / name for split in files for name in ignored[split]],
    )
    refuse_unreadable(errors)
    draw_sheet(directory, classes, files, sheet)
    print(f"wrote {sheet}")


def main(argv=None):
    parser = Parser(__doc__)
    add_folder_flags(parser, "folder of photos; default: food11, with --demo demo", data=None)
    first = parser.add_mutually_exclusive_group()
    first.add_argument("--download", action="store_true", help="fetch Food-11 into --data first")
    first.add_argument("--demo", action="store_true", help="draw a made-up set into --data first")
    first.add_argument("--split", metavar="DIR", help="split a folder of class folders into --data")
    parser.add_argument(
        "--image-size",
        type=number(int, 32, 2048),
        nargs="+",
        default=[96],
        help="sizes to decode train/ and validation/ to in advance",
    )
    parser.add_argument(
        "--classes",
        choices=("food11", "all"),
        default="food11",
        help="with --download: the eleven of Food-11, or all of Food-101, from CACHE/food-101",
    )
    arguments = parser.parse_args(argv)
    if arguments.split and arguments.data is None:
        parser.error("--split needs --data, the name of the new folder")
    if arguments.classes == "all" and arguments.data is None:
        parser.error("--classes all needs --data, the name of the new folder")
    if arguments.classes == "all" and not arguments.download:
        parser.error("--classes is for --download")
    # Drawings must not be taken for Food-11.
    directory = Path(arguments.data or ("demo" if arguments.demo else "food11"))
    if arguments.download and arguments.classes == "all":
        sources = {"a draw from Food-101": partial(fetch_food101, classes="all")}
        download_food11(directory, Path(arguments.cache), sources)
    elif arguments.download:
        download_food11(directory, Path(arguments.cache))
    elif arguments.demo:
        draw_demo(directory)
    elif arguments.split:
        split_photos(arguments.split, directory)
    check(directory, Path(arguments.output, "figures", "photos.png"))
    for size in arguments.image_size:
        for split in ("train", "validation"):
            data.load_split(directory, split, size, arguments.cache)


if __name__ == "__main__":
    main()
