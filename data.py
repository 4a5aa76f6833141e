"""Photos as tensors: decoded once into a map on disk, augmented in batches on the device.

A data folder holds train/, validation/ (or val/) and test/, each with one folder of photos per
class. `python tools/prepare.py --data food11` fetches one and looks it over.
"""

import functools
import hashlib
import io
import math
import os
import shutil
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from common import cpu_count, lock, read_json, split_folder, write_json

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

SPLITS = ("train", "validation", "test")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# Of ImageNet's pixels: what the backbones were fed, and close enough to any photos.
PIXEL_MEAN = torch.tensor([0.485, 0.456, 0.406])
PIXEL_STD = torch.tensor([0.229, 0.224, 0.225])
LUMA = torch.tensor([0.299, 0.587, 0.114])
CACHE_FORMAT = 3  # raise it when decode() changes, so that old maps are not used
CHUNK = 64  # photos decoded at a time


class Split(NamedTuple):
    """One split: images uint8 [N, 3, H, W], labels int64 [N], files, classes.

    The images are a map on disk, or copies in memory or on a GPU.
    """

    images: torch.Tensor
    labels: torch.Tensor
    files: list[str]
    classes: list[str]
    fingerprint: str


class Augmentation(NamedTuple):
    """How strongly training photos are distorted; the flags of the training scripts set it."""

    crop_scale: float  # smallest crop, share of the area
    rotation: float  # largest angle, degrees
    jitter: float  # largest change of brightness, contrast and saturation, as a fraction
    flip: float  # probability of a mirrored photo


def visible_entries(folder):
    """os.DirEntry of what is in a folder and not hidden, sorted by name."""
    try:
        entries = [entry for entry in os.scandir(folder) if entry.name[0] != "."]
    except OSError as error:
        raise SystemExit(f"{folder}: cannot be read ({error.strerror}).") from None
    return sorted(entries, key=lambda entry: entry.name)


def is_class(entry):
    """Whether an os.DirEntry of a split is a class; archives leave folders such as __MACOSX."""
    return os.path.isdir(entry) and entry.name[0] != "_"


def has_photo_name(path):
    """Whether a path has the suffix of a photo and is not hidden, as the ._x.jpg of a Mac is."""
    return path.suffix.lower() in SUFFIXES and path.name[0] != "."


def is_photo(entry):
    """Whether an os.DirEntry is read; a pipe or a device would be waited for without end."""
    return has_photo_name(Path(entry.name)) and os.path.isfile(entry)


def list_photos(directory):
    """Return (classes, files, ignored) of a data folder without opening a photo.

    classes: sorted folder names, the same in all three splits. files: split -> sorted list of
    "class/name.jpg". ignored: split -> sorted list of what is there and not read, such as a HEIC
    photo or a folder in a class folder. Exits with one line if a split is missing, classes differ
    or one is empty.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise SystemExit(
            f"{directory}: no such folder. Give one with --data, or fetch Food-11 with "
            f"`python tools/prepare.py --download --data {directory}`."
        )
    classes, files, ignored = [], {}, {}
    for split in SPLITS:
        folder = split_folder(directory, split)
        if not folder.is_dir():
            raise SystemExit(
                f"{folder}: no such folder. {directory} must hold train/, validation/ and test/."
            )
        names = [entry.name for entry in visible_entries(folder) if is_class(entry)]
        if split == "train":
            classes = names
        if names != classes:
            difference = ", ".join(sorted(set(names) ^ set(classes)))
            raise SystemExit(f"{folder}: not the classes of train/: {difference} is in only one.")
        files[split] = []
        ignored[split] = [entry.name for entry in visible_entries(folder) if not is_class(entry)]
        for name in names:
            entries = visible_entries(folder / name)
            photos = [f"{name}/{entry.name}" for entry in entries if is_photo(entry)]
            if not photos:
                raise SystemExit(f"{folder / name}: no photos. Add some or remove the class.")
            files[split] += photos
            ignored[split] += [f"{name}/{entry.name}" for entry in entries if not is_photo(entry)]
    if len(classes) < 2:
        raise SystemExit(f"{directory}: {len(classes)} class, at least 2 are needed.")
    return classes, files, ignored


def count_photos(files):
    """Number of photos of each class, a Counter; files: a list of "class/name.jpg"."""
    return Counter(file.split("/")[0] for file in files)


def decode(path, image_size):
    """Return (uint8 [3, H, W] with H = W = image_size, digest of the file's bytes).

    The shorter side is resized, the longer one centre-cropped. Raises OSError if unreadable.
    """
    if not Path(path).is_file():  # a pipe would be waited for without end
        raise OSError("no such file, or not a regular one")
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
    except Exception as error:  # a damaged file makes PIL raise nearly anything
        raise OSError(str(error) or repr(error)) from error
    return np.asarray(image).transpose(2, 0, 1), hashlib.sha256(content).digest()


def load_split(directory, split, image_size, cache=".cache"):
    """Decode a split once, in parallel, into a memory-mapped file in `cache`; return a Split.

    The map is found again by the files' names, sizes and times of change and by the image size.
    Its checksum is compared every time it is opened. The fingerprint is a hash of the files' names
    and contents, whatever the folder is called. Memory stays flat: the map is written 64 photos at
    a time and read on demand; interrupted, it goes on from there. Exits with one line if a photo is
    unreadable, the disk too small or the cache cannot be written.
    """
    classes, files, _ignored = list_photos(directory)
    files, root = files[split], split_folder(directory, split)
    key = hashlib.sha256(f"{CACHE_FORMAT} {image_size}".encode())
    for name in files:
        try:
            status = (root / name).stat()
        except OSError as error:
            raise SystemExit(f"unreadable photo {root / name} ({error.strerror}).") from None
        # The time of change, unlike that of modification, can't be set back by a program.
        times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
        key.update(os.fsencode(f"{name} {status.st_size} {times}\n"))
    map_file = Path(cache, f"{split}-{image_size}-{key.hexdigest()[:20]}.pixels")
    number_of = {name: label for label, name in enumerate(classes)}
    labels = torch.tensor([number_of[name.split("/")[0]] for name in files])
    shape = (len(files), 3, image_size, image_size)
    images, fingerprint = open_map(map_file, shape)
    if images is None:  # not there yet, or damaged
        with lock(map_file.with_suffix(".lock"), wait=True):
            images, fingerprint = open_map(map_file, shape)  # another process may have made it
            if images is None:
                write_map(root, files, image_size, map_file)
                images, fingerprint = open_map(map_file, shape)
    if images is None:
        raise SystemExit(f"{map_file}: cannot be read. Choose another --cache.")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if images.nbytes > memory:
        text = f"{map_file}: {images.nbytes / 2**30:,.0f} GiB, more than this machine's memory"
        print(f"{text}: every epoch reads it from the disk, in random order", file=sys.stderr)
    return Split(images, labels, files, classes, fingerprint)


def take_photos(split, count, seed):
    """A Split of `count` photos of each class, drawn with the seed; all of a class with fewer.

    Draws of one seed are nested: the photos of a small one are among those of a large one. What is
    drawn is copied into memory.
    """
    generator, taken = torch.Generator().manual_seed(seed), []
    for label in range(len(split.classes)):
        own = torch.nonzero(split.labels == label).flatten()
        taken.append(own[torch.randperm(len(own), generator=generator)[:count]])
    taken = torch.cat(taken).sort().values
    files = [split.files[index] for index in taken.tolist()]
    return split._replace(images=split.images[taken], labels=split.labels[taken], files=files)


def open_map(map_file, shape):
    """Return (uint8 tensor of `shape` mapped from the file, fingerprint of the photos).

    (None, None) if the map is missing or is not, byte for byte, what was written.
    """
    try:
        stored = read_json(map_file.with_suffix(".json"), "pixels", "fingerprint")
        # Read-only: of a map that could be written to the system promises all pages beforehand, and
        # refuses one that is larger than its memory.
        images = np.memmap(map_file, np.uint8, "r", shape=shape)
        if stored["pixels"] == checksum_pixels(images):
            with warnings.catch_warnings():  # torch would rather have an array to write to
                warnings.simplefilter("ignore", UserWarning)
                return torch.from_numpy(images), stored["fingerprint"]
    except (OSError, ValueError, SystemExit):  # whatever is wrong with it, it can be made again
        pass
    return None, None


def checksum_pixels(images):
    """Checksum of uint8 [N, ...]: a hash of the hashes of 1024 photos each, in parallel."""
    parts = [images[start : start + 1024] for start in range(0, len(images), 1024)]
    with ThreadPoolExecutor(cpu_count()) as pool:
        digests = pool.map(lambda part: hashlib.sha256(part).digest(), parts)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def write_map(root, files, image_size, map_file):
    """Decode files into a map, uint8 [N, 3, H, W] in order, and a .json that describes it.

    What an interrupted call had decoded is used, as far as it is what was written.
    """
    photo_bytes = 3 * image_size**2
    pixels_file, digests_file = map_file.with_suffix(".part"), map_file.with_suffix(".digests")
    unreadable = []

    def read(name):
        try:
            return decode(root / name, image_size)
        except OSError as error:
            unreadable.append(f"{root / name} ({error})")

    try:
        digests = intact_photos(pixels_file, digests_file, photo_bytes)
        begun, missing = len(digests), (len(files) - len(digests)) * photo_bytes
        if missing > shutil.disk_usage(map_file.parent).free:
            raise SystemExit(
                f"{map_file.parent}: {missing / 2**30:.1f} GiB are needed for {root} at "
                f"{image_size} px, more than is free. Choose another --cache or --image-size."
            )
        progress = Progress(f"{root} at {image_size} px", len(files) - begun)
        # Ordinary writes, not a map: a full disk is then an OSError and not a bus error.
        with (
            open(pixels_file, "ab") as pixels,
            open(digests_file, "ab") as written,
            ThreadPoolExecutor(cpu_count()) as pool,
        ):
            for start in range(begun, len(files), CHUNK):
                for photo in pool.map(read, files[start : start + CHUNK]):
                    if not unreadable:
                        content, digest = photo[0].tobytes(), photo[1]
                        pixels.write(content)
                        written.write(digest + check_of(digest, content))
                        digests.append(digest)
                progress.show(min(start + CHUNK, len(files)) - begun)
            pixels.flush()
            os.fsync(pixels.fileno())
        if unreadable:
            pixels_file.unlink()  # of no use: the photos must change
            digests_file.unlink()
            raise SystemExit(
                f"unreadable photo {unreadable[0]}, {len(unreadable)} in all: remove or replace "
                f"what `python tools/prepare.py --data {root.parent}` lists"
            )
        fingerprint = hashlib.sha256()
        for name, digest in zip(files, digests, strict=True):
            fingerprint.update(os.fsencode(name) + digest)
        whole = np.memmap(pixels_file, np.uint8, "r").reshape(len(files), -1)
        description = {"fingerprint": fingerprint.hexdigest(), "pixels": checksum_pixels(whole)}
        write_json(map_file.with_suffix(".json"), description)
        os.replace(pixels_file, map_file)  # the last step: cut off before it, all photos are kept
        digests_file.unlink()
    except OSError as error:
        raise SystemExit(
            f"{map_file}: cannot be written ({error.strerror or error}). Free some space or choose "
            "another --cache; what was decoded is kept."
        ) from None


def check_of(digest, pixels):
    """Checksum of a decoded photo in an unfinished map and of its digest, bytes."""
    return hashlib.sha256(digest + pixels).digest()


def intact_photos(pixels_file, digests_file, photo_bytes):
    """Digests of the photos that an interrupted write_map() left; cuts off what follows them."""
    digests = []
    with open(pixels_file, "a+b") as pixels, open(digests_file, "a+b") as written:
        pixels.seek(0)
        written.seek(0)
        while True:
            photo, pair = pixels.read(photo_bytes), written.read(64)
            if len(photo) < photo_bytes or check_of(pair[:32], photo) != pair[32:]:
                break
            digests.append(pair[:32])
        pixels.truncate(len(digests) * photo_bytes)
        written.truncate(len(digests) * 64)
    return digests


class Progress:
    """How far a long job has come, on stderr: a line at most every ten seconds."""

    def __init__(self, title, total):
        self.title, self.total, self.begin = title, total, time.monotonic()
        self.shown = self.begin

    def show(self, done):
        now = time.monotonic()
        if now - self.shown >= 10 and done:
            self.shown, left = now, (now - self.begin) * (self.total - done) / done
            text = f"{self.title}: {done:,} of {self.total:,} photos, {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)


def processes():
    """(rank of this process, their number) under torchrun; (0, 1) without."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def on_device(images, device):
    """Move uint8 images to the device if they take less than a sixteenth of its memory.

    Otherwise they stay a map on disk and batches are gathered from it. A sixteenth, because eight
    runs may share the device, and none knows what the others are about to take.
    """
    fits = device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[1] / 16
    return images.to(device) if fits else images


def draw_augmentation(count, generator, augmentation):
    """Draw one random view for each of `count` photos, on the CPU, the same on every device.

    Returns (theta float32 [N, 2, 3] for F.affine_grid, color float32 [N, 3]: factors of
    brightness, contrast and saturation). Area and aspect of a crop as in Szegedy et al., CVPR 2015.
    """
    drawn = torch.rand(9, count, generator=generator)  # uniform in [0, 1), float32 [9, N]
    area, aspect, angle, mirror, x, y, brightness, contrast, saturation = drawn
    area = augmentation.crop_scale + (1 - augmentation.crop_scale) * area
    largest_aspect = 4 / 3 if augmentation.crop_scale < 1 else 1.0
    aspect = torch.exp((2 * aspect - 1) * math.log(largest_aspect))
    width = (area * aspect).sqrt().clamp(max=1)
    height = (area / aspect).sqrt().clamp(max=1)
    angle = (2 * angle - 1) * math.radians(augmentation.rotation)
    mirror = torch.where(mirror < augmentation.flip, -1.0, 1.0)
    x, y = (2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height)
    cos, sin = angle.cos(), angle.sin()
    entries = [width * cos * mirror, -height * sin, x, width * sin * mirror, height * cos, y]
    theta = torch.stack(entries, 1).view(count, 2, 3)
    color = torch.stack([brightness, contrast, saturation], 1)
    return theta, 1 + augmentation.jitter * (2 * color - 1)


@functools.cache
def constants(device):
    """Mean [3, 1], deviation [3, 1], luma [3] and identity [3, 3], moved to the device once."""
    return [c.to(device) for c in (PIXEL_MEAN[:, None], PIXEL_STD[:, None], LUMA, torch.eye(3))]


def augment(images, theta, color):
    """Crop, scale, flip, rotate, jitter and normalise a batch, each image with its own parameters.

    images uint8 [B, 3, H, W]; theta, color: see draw_augmentation -> float32 [B, 3, H, W],
    channels_last.
    """
    images = images.float()
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    # Brightness, contrast (about the image's mean grey), saturation (about each pixel's grey) and
    # normalisation are all linear in the pixel: one 3x3 matrix and one offset per image.
    brightness, contrast, saturation = color[:, :, None, None].unbind(1)  # [B, 1, 1] each
    mean, std, luma, identity = constants(images.device)
    matrix = saturation * identity + (1 - saturation) * luma.expand(3, 3)  # [B, 3, 3]
    grey = images.mean((2, 3)) @ luma / 255  # [B]
    offset = brightness * (1 - contrast) * grey[:, None, None] - mean  # [B, 3, 1]
    matrix = brightness * contrast / 255 * matrix / std
    pixels = torch.baddbmm(offset / std, matrix, images.flatten(2)).view_as(images)
    return pixels.contiguous(memory_format=torch.channels_last)


def normalise(images):
    """uint8 [B, 3, H, W] -> float32 likewise, channels_last, with ImageNet's mean and deviation."""
    mean, std, *_ = constants(images.device)
    pixels = (images.float() / 255 - mean[:, None]) / std[:, None]
    return pixels.contiguous(memory_format=torch.channels_last)


class Loader:
    """Iterate over a split: (float32 [B, 3, H, W] as networks take it, int64 [B]) on the device.

    Every photo comes exactly once, in batches whose sizes differ by at most one (no tiny last
    batch to upset batch norm). With an Augmentation the order is shuffled and each photo gets its
    own view; both are functions of seed and epoch alone (see set_epoch), the same on every device.
    With `views=V` epoch e repeats the views (not the order) of epoch e % V. Under torchrun each
    process gets its share of every batch.
    """

    def __init__(self, split, batch_size, device, augmentation=None, seed=0, views=None):
        self.images, self.labels = on_device(split.images, device), split.labels.to(device)
        self.batch_size, self.device, self.augmentation = batch_size, device, augmentation
        self.seed, self.views, self.epoch = seed, views, 0

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def set_epoch(self, epoch):
        """Choose the epoch, counted from 0, whose order and views come next."""
        self.epoch = epoch

    def order(self):
        """Photo indices int64 [N] in the order of the current epoch."""
        if self.augmentation is None:
            return torch.arange(len(self.labels))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(len(self.labels), generator=generator)

    def draw_view(self, number):
        """Parameters of view `number` for all photos: theta, color of draw_augmentation, on the
        device; None without an Augmentation."""
        if self.augmentation is None:
            return None
        generator = torch.Generator().manual_seed((self.seed + 1) * 7_368_787 + number)
        drawn = draw_augmentation(len(self.labels), generator, self.augmentation)
        return [parameters.to(self.device) for parameters in drawn]

    def shares(self, order):
        """Indices int64 [N] -> a list with this process's share of each batch, int64 [b]."""
        rank, count = processes()
        return [batch.tensor_split(count)[rank] for batch in order.tensor_split(len(self))]

    def batches(self, order, view):
        """Yield (inputs, labels) for the photos of `order`, int64 [N], in a view of draw_view()."""
        # Both copies are made here, once: within an epoch nothing waits for the device.
        image_order = order.to(self.images.device)
        label_order = image_order.to(self.device)
        image_shares, label_shares = self.shares(image_order), self.shares(label_order)
        for image_index, index in zip(image_shares, label_shares, strict=True):
            images = self.images[image_index]
            if self.device.type == "cuda" and images.device.type == "cpu":
                # Pinned, so that the copy need not be waited for. One to mps must be: else photos
                # may be freed before it has read them (pytorch issue 189690).
                images = images.pin_memory().to(self.device, non_blocking=True)
            images = images.to(self.device)  # no copy if they are there
            if view is None:
                yield normalise(images), self.labels[index]
            else:
                theta, color = view
                yield augment(images, theta[index], color[index]), self.labels[index]

    def __iter__(self):
        number = self.epoch % self.views if self.views else self.epoch
        return self.batches(self.order(), self.draw_view(number))
