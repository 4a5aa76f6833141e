"""Photos as tensors: every photo is decoded once, kept in a map on disk, augmented on the device.

    python data.py --data food11               counts, unreadable files, leaks, a picture
    python data.py --download --data food11    fetch Food-11 first; --demo draws a made-up set

A data folder holds train/, validation/ and test/, each with one folder of photos per class.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

import runs

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# Of ImageNet's pixels: what the backbones were fed, and close enough to any photos.
PIXEL_MEAN = torch.tensor([0.485, 0.456, 0.406])
PIXEL_STD = torch.tensor([0.229, 0.224, 0.225])
LUMA = torch.tensor([0.299, 0.587, 0.114])
CACHE_FORMAT = 2  # raise it when decode() changes, so that old cache files are not used


class Split(NamedTuple):
    """One split: images uint8 [N, 3, H, W] (a map on disk), labels int64 [N], files, classes."""

    images: torch.Tensor
    labels: torch.Tensor
    files: list[str]
    classes: list[str]
    fingerprint: str


def list_photos(directory):
    """Return (classes, files) of a data folder without opening a photo.

    classes: sorted folder names, the same in all three splits. files: split -> sorted list of
    "class/name.jpg". Exits with one line if a split is missing, classes differ or one is empty.
    """
    directory = Path(directory)
    if not directory.is_dir():
        advice = f"Give one with --data, or `python data.py --download --data {directory}`."
        raise SystemExit(f"{directory}: no such folder. {advice}")
    classes, files = [], {}
    for split in runs.SPLITS:
        folder = directory / split
        if not folder.is_dir():
            advice = f"{directory} must hold train/, validation/ and test/."
            raise SystemExit(f"{folder}: no such folder. {advice}")
        names = sorted(d.name for d in folder.iterdir() if d.is_dir() and d.name[0] not in "._")
        classes = names if split == "train" else classes
        if names != classes:
            difference = ", ".join(sorted(set(names) ^ set(classes)))
            raise SystemExit(f"{folder}: not the classes of train/: {difference} is in only one.")
        files[split] = []
        for name in names:
            entries = [e for e in os.scandir(folder / name) if e.name[0] != "." and not e.is_dir()]
            photos = (e.name for e in entries if Path(e.name).suffix.lower() in SUFFIXES)
            found = sorted(f"{name}/{photo}" for photo in photos)
            if not found:
                raise SystemExit(f"{folder / name}: no photos. Add some or remove the class.")
            files[split] += found
    if len(classes) < 2:
        raise SystemExit(f"{directory}: {len(classes)} class, at least 2 are needed.")
    return classes, files


def decode(path, image_size):
    """Return (uint8 [3, H, W] with H = W = image_size, digest of the file's bytes).

    The shorter side is resized, the longer one centre-cropped. Raises OSError if unreadable.
    """
    content = Path(path).read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (image_size, image_size))  # a JPEG decodes to 1/2, 1/4, 1/8 cheaply
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a pixel
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            image = image.convert("RGB")
            width, height = image.size
            left, top = (width - min(image.size)) / 2, (height - min(image.size)) / 2
            square = (left, top, width - left, height - top)
            image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=square)
    except UnidentifiedImageError:
        raise OSError("not a photo") from None
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(error) from error
    return np.asarray(image).transpose(2, 0, 1), hashlib.sha256(content).digest()


def load_split(directory, split, image_size, cache=".cache"):
    """Decode a split once, in parallel, into a memory-mapped file in `cache`; return a Split.

    The map is found again by the files' names, sizes, modification times and the image size. The
    fingerprint is a hash of the files' names and contents, whatever the folder is called. Memory
    stays flat: the map is written 64 photos at a time and read on demand. Exits with one line if a
    photo is unreadable or the cache cannot be written.
    """
    classes, files = list_photos(directory)
    files, root, cache = files[split], Path(directory) / split, Path(cache)
    key = hashlib.sha256(f"{CACHE_FORMAT} {image_size}".encode())
    for name in files:
        try:
            status = (root / name).stat()
        except OSError as error:
            raise SystemExit(f"unreadable photo {root / name} ({error.strerror}).") from None
        key.update(os.fsencode(f"{name} {status.st_size} {status.st_mtime_ns}\n"))
    map_file = cache / f"{split}-{image_size}-{key.hexdigest()[:20]}.npy"
    meta_file = map_file.with_suffix(".json")
    labels = torch.tensor([classes.index(name.split("/")[0]) for name in files])
    for _ in range(2):
        with contextlib.suppress(OSError, ValueError, EOFError, KeyError, TypeError):
            fingerprint = json.loads(meta_file.read_text())["fingerprint"]
            # Mode "c" is a private map: torch wants a writable array, the file stays as it is.
            images = np.load(map_file, mmap_mode="c")
            if images.shape == (len(files), 3, image_size, image_size):
                return Split(torch.from_numpy(images), labels, files, classes, fingerprint)
        fingerprint = write_map(root, files, image_size, map_file)  # not there yet, or damaged
        runs.write_json(meta_file, {"fingerprint": fingerprint})
    raise SystemExit(f"{map_file}: cannot be read. Choose another --cache.")


def write_map(root, files, image_size, map_file):
    """Decode files into a .npy of uint8 [N, 3, H, W], in order; return the content fingerprint."""
    fingerprint, unreadable = hashlib.sha256(), []
    shape = (len(files), 3, image_size, image_size)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}

    def read(name):
        try:
            return decode(root / name, image_size)
        except OSError as error:
            unreadable.append(f"{root / name} ({error})")

    # Ordinary writes, not a map: a full disk is then an OSError and not a bus error.
    with runs.atomic_file(map_file) as file, ThreadPoolExecutor(runs.cpu_count()) as pool:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(files), 64):
            chunk = files[start : start + 64]
            for name, result in zip(chunk, pool.map(read, chunk), strict=True):
                if result is not None:
                    file.write(result[0].tobytes())
                    fingerprint.update(os.fsencode(name) + result[1])
        if unreadable:
            advice = f"remove or replace what `python data.py --data {root.parent}` lists"
            raise SystemExit(
                f"unreadable photo {unreadable[0]}, {len(unreadable)} in all: {advice}"
            )
    return fingerprint.hexdigest()


def on_device(images, device):
    """Move uint8 images to the device if they take less than half of its free memory.

    Otherwise they stay a map on disk and batches are gathered from it.
    """
    fits = device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return images.to(device) if fits else images


def draw_augmentation(count, generator, crop_scale, rotation, jitter, flip):
    """Draw one random view for each of `count` photos, on the CPU, the same on every device.

    Returns (theta float32 [N, 2, 3] for F.affine_grid, color float32 [N, 3]: factors of
    brightness, contrast and saturation). crop_scale: smallest crop as a fraction of the area;
    rotation: largest angle, degrees; jitter: largest change of a colour factor; flip: probability.
    """
    random = torch.rand(9, count, generator=generator)
    area = crop_scale + (1 - crop_scale) * random[0]
    aspect = torch.exp((2 * random[1] - 1) * math.log(4 / 3) * (crop_scale < 1))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    angle = (2 * random[2] - 1) * math.radians(rotation)
    mirror = 1 - 2 * (random[3] < flip).float()
    x, y = (2 * random[4] - 1) * (1 - width), (2 * random[5] - 1) * (1 - height)
    cos, sin = angle.cos(), angle.sin()
    rows = [width * cos * mirror, -height * sin, x, width * sin * mirror, height * cos, y]
    return torch.stack(rows, 1).view(count, 2, 3), (1 + jitter * (2 * random[6:] - 1)).T


@functools.cache
def constants(device):
    """Mean [3, 1], deviation [3, 1], luma [3] and identity [3, 3], moved to the device once."""
    return [c.to(device) for c in (PIXEL_MEAN[:, None], PIXEL_STD[:, None], LUMA, torch.eye(3))]


def augment(images, theta, color):
    """Crop, scale, flip, rotate, jitter and normalise a batch, each image with its own parameters.

    images uint8 [B, 3, H, W], theta [B, 2, 3], color [B, 3] -> float32 [B, 3, H, W].
    """
    images = images.float()
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    # Brightness, contrast (about the image's mean grey), saturation (about each pixel's grey) and
    # normalisation are all linear in the pixel: one 3x3 matrix and one offset per image.
    brightness, contrast, saturation = color.T[:, :, None, None]
    mean, std, luma, identity = constants(images.device)
    matrix = saturation * identity + (1 - saturation) * luma.expand(3, 3)
    grey = images.mean((2, 3)) @ luma / 255
    offset = brightness * (1 - contrast) * grey[:, None, None] - mean
    matrix = brightness * contrast / 255 * matrix / std
    pixels = torch.baddbmm(offset / std, matrix, images.flatten(2))
    return pixels.view_as(images)


def normalise(images):
    """uint8 [B, 3, H, W] -> float32 [B, 3, H, W] with ImageNet's mean and deviation."""
    mean, std, *_ = (constant[:, None] for constant in constants(images.device))
    return (images.float() / 255 - mean) / std


class Loader:
    """Iterate once over a split: (float32 [B, 3, H, W] ready for a network, int64 [B]) on device.

    Every photo comes exactly once, in batches whose sizes differ by at most one (no tiny last
    batch to upset batch norm). With `augmentation` (arguments of draw_augmentation) the order is
    shuffled and each photo gets its own view; both depend on `seed` and `epoch` alone, not on the
    device. With `views=V` epoch e repeats the views (not the order) of epoch e % V.
    """

    def __init__(self, split, batch_size, device, augmentation=None, seed=0, views=None):
        self.images, self.labels = on_device(split.images, device), split.labels.to(device)
        self.batch_size, self.device, self.augmentation = batch_size, device, augmentation
        self.seed, self.views, self.epoch = seed, views, 0

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def order(self):
        """Photo indices int64 [N] in the order of the current epoch."""
        if self.augmentation is None:
            return torch.arange(len(self.labels))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(len(self.labels), generator=generator)

    def view(self, number):
        """The augmentation parameters of view `number` for all photos, on the device."""
        generator = torch.Generator().manual_seed((self.seed + 1) * 7_368_787 + number)
        drawn = draw_augmentation(len(self.labels), generator, **self.augmentation)
        return [parameters.to(self.device, non_blocking=True) for parameters in drawn]

    def batches(self, order, view=None):
        """Yield (inputs, labels) for the photos of `order`, in the view given (see view())."""
        order_here, order = order.to(self.images.device), order.to(self.device)
        parts = order_here.tensor_split(len(self)), order.tensor_split(len(self))
        for index_here, index in zip(*parts, strict=True):
            images = self.images[index_here].to(self.device, non_blocking=True)
            if view is None:
                yield normalise(images), self.labels[index]
            else:
                yield augment(images, *(part[index] for part in view)), self.labels[index]

    def __iter__(self):
        view = None
        if self.augmentation is not None:
            view = self.view(self.epoch % self.views if self.views else self.epoch)
        yield from self.batches(self.order(), view)
        self.epoch += 1


def main(argv=None):
    from tools import demo, photos  # with matplotlib, for which training has no use

    parser = runs.Parser(__doc__)
    runs.add_place_flags(parser)
    parser.add_argument("--download", action="store_true", help="fetch Food-11 into --data first")
    parser.add_argument("--demo", action="store_true", help="draw a made-up set, into demo/")
    parser.add_argument("--image-size", type=runs.number(int, 32), nargs="+", default=[96],
                        help="sizes to decode train/ and validation/ to in advance")  # fmt: skip
    arguments = parser.parse_args(argv)
    directory = Path(arguments.data)
    if arguments.demo and arguments.data == parser.get_default("data"):
        directory = Path("demo")  # drawings must not be taken for Food-11
    if arguments.download:
        photos.download_food11(directory, Path(arguments.cache))
    elif arguments.demo:
        demo.draw_demo(directory)
    photos.check(directory, Path(arguments.output, "figures", "photos.png"))
    for size in arguments.image_size:
        for split in ("train", "validation"):
            load_split(directory, split, size, arguments.cache)


if __name__ == "__main__":
    runs.run_main(main)
