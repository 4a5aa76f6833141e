"""Photos as tensors: decoded once into a map on disk, augmented in batches on the device.

A data folder holds train/, validation/ (or val/) and test/, each with one folder of photos per
class. `python tools/prepare.py --data food11` looks one over.
"""

import hashlib
import inspect
import math
import os
import time
import unicodedata
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin

SUFFIXES = ".jpg .jpeg .jfif .png .webp .avif .bmp .gif .tif .tiff .ppm .pgm"
# Of ImageNet's pixels: what the backbones were fed, and close enough to any photos.
PIXEL_MEAN, PIXEL_STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
LUMA = torch.tensor([0.299, 0.587, 0.114])

# One's own photos are no attack: a phone's have 200 megapixels, an editor's megabytes of text.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**30
warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # maps are read only

# images: uint8 [N, 3, H, W], a map on disk or on a GPU, or None; labels: int64 [N]; files: a list
# of "class/name.jpg"; classes: their names; fingerprint: a hash of the files' names and sizes.
Split = namedtuple("Split", "images labels files classes fingerprint")

# How strongly training photos are distorted. crop_scale: smallest crop, share of the area;
# rotation: largest angle, degrees; jitter: largest change of brightness, contrast and saturation,
# as a fraction; flip: probability of a mirrored photo.
Augmentation = namedtuple("Augmentation", "crop_scale rotation jitter flip")


def split_folder(directory, split):
    """Path of a split in a data folder: val/ is taken for validation/."""
    folder, short = Path(directory, split), Path(directory, "val")
    return short if split == "validation" and short.is_dir() else folder


def visible(folder):
    """What is in a folder and not hidden, nor left by a Mac's archive: a sorted list of paths."""
    return sorted(p for p in folder.iterdir() if p.name[0] != "." and p.name != "__MACOSX")


def is_photo(path):
    """Whether a path is read as a photo; reading a pipe would never end."""
    return path.suffix.lower() in SUFFIXES.split() and path.is_file()


def digest(values):
    """A short hash of numbers and strings, the same on every machine."""
    return hashlib.sha256(ascii(values).encode()).hexdigest()[:16]


def list_photos(directory, split):
    """A split without its images, no photo opened. Exits with one line where photos are missing."""
    root, files = split_folder(directory, split), []
    if not root.is_dir():
        raise SystemExit(f"{root}: no such folder. Name yours by --data; see README.md, Data")
    folders = [path for path in visible(root) if path.is_dir()]
    if len(folders) < 2:
        loose = f"{sum(map(is_photo, visible(root)))} photos"
        raise SystemExit(f"{root} holds {loose} and {len(folders) or 'no'} class folders, not two")
    for folder in folders:
        photos = [path.name for path in visible(folder) if is_photo(path)]
        if not photos:
            found = ", ".join(path.name for path in visible(folder)[:3]) or "nothing"
            raise SystemExit(f"{folder}: no photo ({SUFFIXES}) directly in it, but {found}")
        files += [f"{folder.name}/{name}" for name in photos]
    # Some systems write an accent as a letter of its own; that must not change the order either.
    files.sort(key=lambda file: unicodedata.normalize("NFC", file))
    names = [unicodedata.normalize("NFC", file) for file in files]
    classes, labels = np.unique([name.split("/")[0] for name in names], return_inverse=True)
    fingerprint = digest([names, [(root / file).stat().st_size for file in files]])
    return Split(None, torch.from_numpy(labels), files, classes.tolist(), fingerprint)


def decode(path, image_size):
    """A photo as a viewer shows it: uint8 [3, H, W], H = W = image_size. OSError if it is none.

    The shorter side is resized, the longer one centre-cropped.
    """
    try:
        with Image.open(path) as image:
            image.draft("RGB", (image_size, image_size))  # a JPEG decodes to 1/2, 1/4, 1/8 cheaply
            image = ImageOps.exif_transpose(image)
            if image.mode in ("I", "F"):
                raise OSError("more than 16 bits a value: store it with 8 or 16")
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            size = (image_size, image_size)
            image = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC)
            return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # a damaged file makes PIL raise nearly anything
        raise OSError(str(error) or repr(error)) from None


def progress(iterable, total, title):
    """Yield what the iterable yields; every five seconds a line says how far it is."""
    due = time.monotonic() + 5
    for number, value in enumerate(iterable, 1):
        yield value
        if time.monotonic() > due:
            print(f"{title}: {number:,} of {total:,}", flush=True)
            due += 5


def decode_all(paths, image_size):
    """Yield every photo decoded, in order, or None; exits at the end with a line for each None."""
    unreadable = []

    def read(path):
        try:
            return decode(path, image_size)
        except OSError as error:
            unreadable.append(f"{path}: {error}")

    with ThreadPoolExecutor() as pool:
        yield from progress(pool.map(read, paths), len(paths), "decoding photos")
    if unreadable:
        raise SystemExit("\n".join(["remove or replace what is no photo:", *sorted(unreadable)]))


def load_split(directory, split, image_size, cache=".cache"):
    """Decode a split once into an .npy map in `cache`, or find it there; return a Split.

    The map is found again by the files' names, sizes and times, and by the image size. Exits with
    one line if its classes are not those of train/, and a line for each unreadable photo.
    """
    listed = list_photos(directory, split)
    other = sorted({*listed.classes} ^ {*list_photos(directory, "train").classes})
    if other:
        raise SystemExit(f"{directory}: not both in train/ and {split}/: {', '.join(other[:5])}")
    paths = [split_folder(directory, split) / file for file in listed.files]
    times = [(path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in paths]
    key = digest([listed.files, listed.fingerprint, times, inspect.getsource(decode)])
    file = Path(cache, f"{split}-{image_size}-{key}.npy")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished, shape = file.with_suffix(f".{os.getpid()}"), (image_size, image_size)
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), 3, *shape)}
        with open(unfinished, "wb") as opened:
            np.lib.format.write_array_header_1_0(opened, header)
            photos = decode_all(paths, image_size)
            opened.writelines(photo.tobytes() for photo in photos if photo is not None)
        os.replace(unfinished, file)
    return listed._replace(images=torch.from_numpy(np.load(file, mmap_mode="r")))


def draw_augmentation(count, generator, crop_scale, rotation, jitter, flip):
    """Draw one random view for each of `count` photos, on the CPU, the same on every device.

    Returns (theta float32 [N, 2, 3] for F.affine_grid, color float32 [N, 3]: factors of
    brightness, contrast and saturation). Area and aspect of a crop as in Szegedy et al., CVPR 2015.
    """
    # Uniform in [0, 1), float32 [9, N].
    area, aspect, angle, mirror, x, y, *color = torch.rand(9, count, generator=generator)
    area = crop_scale + (1 - crop_scale) * area
    aspect = (4 / 3 if crop_scale < 1 else 1.0) ** (2 * aspect - 1)
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x, y = (2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height)
    angle = (2 * angle - 1) * math.radians(rotation)
    cos, sin = angle.cos(), angle.sin()
    width = torch.where(mirror < flip, -width, width)
    theta = torch.stack([width * cos, -height * sin, x, width * sin, height * cos, y], 1)
    return theta.view(count, 2, 3), 1 + jitter * (2 * torch.stack(color, 1) - 1)


def augment(images, theta, color):
    """Crop, scale, flip, rotate, jitter and normalise a batch, each image with its own parameters.

    images uint8 [B, 3, H, W]; theta, color: see draw_augmentation -> float32 [B, 3, H, W],
    channels_last.
    """
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    images = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    # Brightness, contrast (about the image's mean grey), saturation (about each pixel's grey) and
    # normalisation are all linear in the pixel: one matrix [B, 3, 3] and one offset.
    mean, std, luma = (c.to(images.device)[:, None] for c in (PIXEL_MEAN, PIXEL_STD, LUMA))
    brightness, contrast, saturation = color[:, :, None, None].unbind(1)  # [B, 1, 1] each
    matrix = saturation * torch.eye(3, device=images.device) + (1 - saturation) * luma.T
    grey = images.mean((2, 3)) @ luma / 255  # [B, 1]
    offset = brightness * (1 - contrast) * grey[:, :, None] - mean  # [B, 3, 1]
    matrix = brightness * contrast / 255 * matrix / std
    pixels = torch.baddbmm(offset / std, matrix, images.flatten(2)).view_as(images)
    return pixels.contiguous(memory_format=torch.channels_last)


def normalise(images):
    """uint8 [B, 3, H, W] -> float32 likewise, channels_last, with ImageNet's mean and deviation."""
    mean, std = (c.to(images.device)[:, None, None] for c in (PIXEL_MEAN, PIXEL_STD))
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


class Loader:
    """Iterate over a split: (float32 [B, 3, H, W] as networks take it, int64 [B]) on the device.

    With an Augmentation the order is shuffled and each photo has its own view, both functions of
    seed and `epoch` (an attribute, counted from 0) alone; all batches are of one size, and the few
    photos left over are others in each epoch. Without, every photo comes once, in the order of the
    files. share: (rank, count) of this process among those that each take a part of every batch.
    """

    def __init__(self, split, batch_size, device, augmentation=None, seed=0, share=(0, 1)):
        self.images, self.labels, self.device = split.images, split.labels.to(device), device
        self.augmentation, self.seed, self.epoch = augmentation, seed, 0
        self.rank, self.count = share
        self.steps = math.ceil(len(self.labels) / batch_size)
        # Of this process; at most `batch_size`, and all alike.
        self.batch_size = len(self.labels) // self.steps // self.count

    def order(self):
        """Photo indices int64 [N] of the current epoch, batch after batch, on the device."""
        if self.augmentation is None:
            return torch.arange(len(self.labels), device=self.device)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        order = order[: self.steps * self.count * self.batch_size].view(self.steps, self.count, -1)
        return order[:, self.rank].flatten().to(self.device)

    def draw_view(self, number):
        """View `number` of all photos: draw_augmentation(), on the device; None without one."""
        if self.augmentation is None:
            return None
        generator = torch.Generator().manual_seed((self.seed + 1) * 7_368_787 + number)
        drawn = draw_augmentation(len(self.labels), generator, *self.augmentation)
        return [parameters.to(self.device) for parameters in drawn]

    def inputs(self, index, view):
        """Photos of int64 [n] in a view of draw_view(): float32 [n, 3, H, W]."""
        images = self.images[index.to(self.images.device)].to(self.device)
        return augment(images, *(part[index] for part in view)) if view else normalise(images)

    def __iter__(self):
        view, size = self.draw_view(self.epoch), self.batch_size
        # A GPU augments 64 MiB of float photos at a time: it would wait for the many launches.
        most = 2**24 // self.images[0].numel() if self.device.type == "cuda" else 0
        for index in self.order().split(max(1, most // size) * size):
            inputs, labels = self.inputs(index, view), self.labels[index]
            yield from zip(inputs.split(size), labels.split(size), strict=True)
