"""Getting a folder of photos and looking it over: the functions behind `python data.py`.

Download, unreadable files, near-duplicates across splits, contact sheet.
Photos lie in FOLDER/{train,validation,test}/<class>/; a new folder appears whole or not at all.
"""

import json
import os
import random
import shutil
import socket
import stat
import tempfile
import urllib.request
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

import data
import runs

COURSE_ARCHIVE = "1a0uuiylWnyGAr0JZVfhw2EPZ6XzcPtyb"  # Google Drive file id of food11.zip
FOOD11_CLASSES = ["apple_pie", "cheesecake", "chicken_curry", "french_fries", "fried_rice",
                  "hamburger", "hot_dog", "ice_cream", "omelette", "pizza", "sushi"]  # fmt: skip
COURSE_COUNTS = {"train": 2200, "validation": 275, "test": 275}
# Two photos count as copies up to this many differing bits of 256. Measured on 10,450 Food-101
# photos: the 8 pairs up to 28 are real copies, the next, at 31, is not; a re-encoded, resized
# (x0.4 to x1.6), darker or brighter copy stays within 28 in 99% of the cases.
NEAR_DUPLICATE_BITS = 28


def refuse_existing(target):
    """Raise SystemExit if the path `target` is anything but missing or an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SystemExit(f"{target}: exists already and is left as it is. Name another folder.")


@contextmanager
def new_folder(target):
    """Yield a temporary sibling folder that becomes `target` only if the block succeeds.

    Raises SystemExit if `target` is there and not empty, or cannot be written.
    """
    target = Path(target).resolve()
    refuse_existing(target)
    unfinished = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        if target.exists():
            target.rmdir()  # an empty folder; Windows would not rename over it
        os.rename(unfinished, target)
    except OSError as error:
        reason = error.strerror or error
        raise SystemExit(
            f"{target}: cannot be written ({reason}). Choose another place."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def count_photos(folder):
    """Return {split: {class: number of files}} of the three splits; {} where a split is missing."""
    found = [photo.parts[-3:-1] for photo in sorted(folder.glob("*/*/*"))]
    return {s: Counter(name for split, name in found if split == s) for s in runs.SPLITS}


def unpack_archive(archive, target, counts=COURSE_COUNTS, classes=11):
    """Unpack {train,validation,test}/<class>/<photo> of a zip file into the new folder `target`.

    A folder around the splits is taken off; whatever is not such a photo is left out. Raises
    ValueError if a member is a link or leads out of the folder, or if there are not exactly
    `classes` classes, the same in every split, with `counts` photos a split.
    """
    with zipfile.ZipFile(archive) as bundle, new_folder(target) as folder:
        for member in bundle.infolist():
            path = PurePosixPath(member.filename)
            outside = path.is_absolute() or ".." in path.parts or set(member.filename) & set("\\:")
            if outside or stat.S_ISLNK(member.external_attr >> 16):
                raise ValueError(f"{member.filename!r} in it is a link or leads out of the folder")
            *_, split, name, photo = ("", "", "", *path.parts)
            is_photo = path.suffix.lower() in (".jpg", ".jpeg", ".png") and photo[0] != "."
            if split in counts and is_photo and path.parts[0] != "__MACOSX":
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                with bundle.open(member) as source, open(folder / split / name / photo, "wb") as f:
                    shutil.copyfileobj(source, f)
        found = count_photos(folder)
        totals = {split: sum(found[split].values()) for split in counts}
        names = {tuple(found[split]) for split in counts}
        if totals != counts or len(names) != 1 or len(found["train"]) != classes:
            raise ValueError(f"it has {totals} photos, not {counts} in the same {classes} classes")


def sample_food101(root, target, train=200, validation=25, test=25):
    """Copy a fixed draw of the 11 dishes from the unpacked `food-101` folder into `target`.

    The numbers are photos a class. Validation and test come from Food-101's reviewed test list,
    train from its noisier training list. Raises ValueError if a photo is missing.
    """
    listed = {p: json.loads((root / f"meta/{p}.json").read_text()) for p in ("train", "test")}
    draw = random.Random(0)
    with new_folder(target) as folder:
        for name in FOOD11_CLASSES:
            held_out = draw.sample(sorted(listed["test"][name]), validation + test)
            photos = {"validation": held_out[:validation], "test": held_out[validation:]}
            photos["train"] = draw.sample(sorted(listed["train"][name]), train)
            for split, chosen in photos.items():
                (folder / split / name).mkdir(parents=True)
                for photo in chosen:  # such as "apple_pie/1005649"
                    source = root / "images" / f"{photo}.jpg"
                    if not source.exists():
                        raise ValueError(f"{root} is incomplete; remove it and try again")
                    shutil.copyfile(source, folder / split / f"{photo}.jpg")


def fetch_course_archive(target, cache):
    """Download the course's zip file from Google Drive and unpack it into `target`."""
    from torchvision.datasets.utils import download_file_from_google_drive  # imports torch

    # gdown waits without a time limit, so first ask, with one, whether Google answers at all.
    urllib.request.urlopen("http://www.google.com/generate_204").close()
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        download_file_from_google_drive(COURSE_ARCHIVE, folder, "food11.zip")
        unpack_archive(Path(folder) / "food11.zip", target)


def fetch_food101(target, cache):
    """Download Food-101 (5 GB) into `cache` and draw as many photos a class as the course has."""
    from torchvision.datasets import Food101

    root = cache / "food-101"
    if not root.exists():
        try:
            Food101(cache, download=True)
        except BaseException:
            shutil.rmtree(root, ignore_errors=True)  # half unpacked, it would pass for the whole
            raise
    sample_food101(root, target)
    print(f"{cache} now holds all of Food-101 (10 GB) and can be removed")


def download_food11(target, cache):
    """Fetch Food-11 into the new folder `target`: the course's archive, else a draw from Food-101.

    `cache` takes the downloads. Prints which of the two it is and why one cannot be had; raises
    SystemExit if neither can, or if `target` exists and is not empty.
    """
    refuse_existing(target)
    sources = {"the course's archive": fetch_course_archive, "a draw from Food-101": fetch_food101}
    socket.setdefaulttimeout(30)  # rather than hang without a network
    for title, fetch in sources.items():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            fetch(target, cache)
            return print(f"{target} is {title}")
        except Exception as error:  # whatever torchvision, gdown, the network or the disk raise
            reason = str(error).strip() or repr(error)
            print(f"{title} is not to be had: {reason.splitlines()[0]}")
    raise SystemExit(
        "nothing could be downloaded. Check the network, or put photos yourself in "
        f"{target}/{{train,validation,test}}/<class>/, or use the made-up set of --demo."
    )


def scan_photos(files):
    """Decode every photo once, in threads.

    Returns sizes int [N, 2] (width, height), hashes bool [N, 256] (is a pixel of the grey photo,
    shrunk to 17 x 16, brighter than its left neighbour?) and a list of (file, reason) of the
    unreadable ones, truncated ones included, whose rows are all 0.
    """

    def scan(file):
        try:
            with Image.open(file) as photo:
                size = photo.size
                photo.draft("L", (128, 128))  # a JPEG decodes to 1/2, 1/4, 1/8 cheaply
                photo = ImageOps.exif_transpose(photo).convert("L")
                grey = np.asarray(photo.resize((17, 16), Image.Resampling.BILINEAR))
        except Exception as error:  # a broken file can raise nearly anything in PIL
            return (0, 0), np.zeros(256, bool), str(error).strip() or repr(error)
        return size, (grey[:, 1:] > grey[:, :-1]).ravel(), None

    with ThreadPoolExecutor(runs.cpu_count()) as pool:
        scanned = list(pool.map(scan, files))
    sizes = np.array([size for size, _, _ in scanned], int).reshape(-1, 2)
    hashes = np.array([bits for _, bits, _ in scanned], bool).reshape(-1, 256)
    errors = [(f, reason) for f, (_, _, reason) in zip(files, scanned, strict=True) if reason]
    return sizes, hashes, errors


def near_duplicates(hashes, splits, bits=NEAR_DUPLICATE_BITS):
    """Find copies in different splits, such as test photos that training has seen.

    `hashes` bool [N, 256] from scan_photos, `splits` the N split names. Returns [(i, j, distance)]
    with i < j and at most `bits` differing bits, nearest first. A hash without a single bit (flat
    or unreadable photo) matches nothing.
    """
    signs = np.where(hashes, 1, -1).astype(np.float32)
    splits = np.where(hashes.any(axis=1), splits, "")
    pairs = []
    for one, other in combinations(sorted(set(splits) - {""}), 2):
        rows, columns = np.flatnonzero(splits == one), np.flatnonzero(splits == other)
        transposed = signs[columns].T
        for start in range(0, len(rows), 512):  # at most 512 x N distances in memory
            distances = (hashes.shape[1] - signs[rows[start : start + 512]] @ transposed) / 2
            for row, column in np.argwhere(distances <= bits):
                i, j = sorted((int(rows[start + row]), int(columns[column])))
                pairs.append((i, j, int(distances[row, column])))
    return sorted(pairs, key=lambda pair: pair[2])


def contact_sheet(rows, path):
    """Write a PNG of a few photos of each class beside the same photos augmented.

    `rows` maps a class name to (originals, augmented), both uint8 [k, H, W, 3]; the first 20
    classes are shown.
    """
    shown = list(rows.items())[:20]
    k, high, wide = shown[0][1][0].shape[:3]
    figure = Figure(figsize=(9, 0.3 + len(shown) * 4 / k * high / wide), layout="constrained")
    axes = figure.subplots(len(shown), 2, squeeze=False)
    for row, (name, photos) in zip(axes, shown, strict=True):
        for axis, strip in zip(row, photos, strict=True):
            padding = ((0, 0), (0, 0), (0, wide // 24), (0, 0))  # white between the photos
            axis.imshow(np.concatenate(list(np.pad(strip, padding, constant_values=255)), axis=1))
            axis.set(xticks=[], yticks=[], frame_on=False)
        row[0].set_ylabel(
            name.replace("_", "\n"), parse_math=False, rotation=0, ha="right", va="center"
        )
    axes[0, 0].set_title("as stored", fontsize=10)
    axes[0, 1].set_title("as the network sees them", fontsize=10)
    with runs.atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def sheet_rows(directory, classes, files, image_size=96, count=4):
    """Rows for contact_sheet: the first training photos of each class, plain and augmented."""
    generator, rows = torch.Generator().manual_seed(0), {}
    mean, std = data.PIXEL_MEAN[:, None, None], data.PIXEL_STD[:, None, None]
    for name in classes:
        chosen = [file for file in files["train"] if file.startswith(f"{name}/")][:count]
        chosen = (chosen * count)[:count]  # a class with fewer photos repeats them
        stored = [data.decode(directory / "train" / file, image_size)[0] for file in chosen]
        images = torch.from_numpy(np.stack(stored))
        view = data.draw_augmentation(count, generator, **runs.SCRATCH_AUGMENTATION)
        shown = ((data.augment(images, *view) * std + mean).clamp(0, 1) * 255).byte()
        rows[name] = [strip.permute(0, 2, 3, 1).numpy() for strip in (images, shown)]
    return rows


def check(directory, sheet):
    """Print counts, sizes, near-duplicates across splits, unreadable files; draw the sheet.

    Raises SystemExit if a photo is unreadable.
    """
    classes, files = data.list_photos(directory)
    width = max(len(name) for name in classes) + 2
    print(f"{'class':{width}}" + "".join(f"{split:>12}" for split in files))
    for name in [*classes, ""]:
        start = f"{name}/" if name else ""
        numbers = [sum(f.startswith(start) for f in files[split]) for split in files]
        print(f"{name or 'all':{width}}" + "".join(f"{n:12}" for n in numbers))
    paths = [directory / split / name for split in files for name in files[split]]
    sizes, hashes, errors = scan_photos(paths)
    read = sizes[sizes.all(axis=1)]
    if len(read):
        low, middle, high = read.min(0), np.median(read, axis=0).astype(int), read.max(0)
        print(f"width {low[0]} to {high[0]} px, median {middle[0]}; "
              f"height {low[1]} to {high[1]} px, median {middle[1]}")  # fmt: skip
    pairs = near_duplicates(hashes, [split for split in files for _ in files[split]])
    print(f"{len(pairs)} near-duplicate pairs across splits (a leak: keep one photo of each)")
    for i, j, distance in pairs:
        print(f"  {paths[i]}  {paths[j]}  ({distance} of 256 bits differ)")
    print(f"{len(errors)} unreadable files")
    for path, reason in errors:
        print(f"  {path}: {reason}")
    if errors:
        raise SystemExit("remove or replace the unreadable files: training would stop at them")
    contact_sheet(sheet_rows(directory, classes, files), sheet)
    print(f"wrote {sheet}")
