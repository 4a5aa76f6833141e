"""Photos become the right tensors, once, in a reproducible order."""

import os
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from tests.helpers import train

CPU = torch.device("cpu")
MILD = data.Augmentation(crop_scale=0.4, rotation=10.0, jitter=0.2, flip=0.5)
NOTHING = data.Augmentation(crop_scale=1.0, rotation=0.0, jitter=0.0, flip=0.0)


@pytest.fixture
def copy(photos, tmp_path):
    """A data folder that a test may change."""
    return shutil.copytree(photos, tmp_path / "copy")


def cache_file(suffix):
    [path] = Path(".cache").glob(f"*.{suffix}")
    return path


def replace_unnoticed(path, content):
    """Write other bytes into a file and set its time of modification back."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# Reading


def test_a_split_is_a_uint8_tensor_with_labels_from_the_folders(photos):
    split = data.load_split(photos, "train", 32)
    assert split.images.shape == (42, 3, 32, 32) and split.images.dtype == torch.uint8
    assert split.classes == ["blue", "green", "red"]
    assert split.files[:2] == ["blue/0.jpg", "blue/1.jpg"] and len(split.files) == 42
    assert split.labels.tolist() == [0] * 14 + [1] * 14 + [2] * 14
    brightest = split.images.float().mean((2, 3)).argmax(1)
    assert torch.equal(brightest, 2 - split.labels)  # channel 2 is blue, class 0


def test_resizing_keeps_the_aspect_ratio(tmp_path):
    photo = Image.new("RGB", (300, 100), "black")
    photo.paste("white", (100, 0, 200, 100))  # exactly the centre square
    photo.save(tmp_path / "wide.png")
    pixels, _ = data.decode(tmp_path / "wide.png", 32)
    assert pixels.shape == (3, 32, 32) and pixels[:, :, 2:-2].min() > 250


def test_unusual_photos_are_read_as_a_person_sees_them(tmp_path):
    grey = (np.linspace(0, 1, 64) * 65535).astype(np.uint16)[None].repeat(64, 0)
    Image.fromarray(grey).save(tmp_path / "16bit.png")
    assert 100 < data.decode(tmp_path / "16bit.png", 32)[0].mean() < 155
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert data.decode(tmp_path / "clear.png", 32)[0].min() == 255
    for mode, name in (("CMYK", "a.jpg"), ("P", "b.gif"), ("L", "c.jpg"), ("1", "d.png")):
        Image.new(mode, (50, 7)).save(tmp_path / name)
        assert data.decode(tmp_path / name, 32)[0].shape == (3, 32, 32)


def test_a_photo_that_a_camera_turned_is_read_upright(tmp_path):
    photo = Image.new("RGB", (40, 40), "black")
    photo.paste("white", (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: upside down
    photo.save(tmp_path / "turned.jpg", exif=exif)
    pixels, _ = data.decode(tmp_path / "turned.jpg", 32)
    assert pixels[:, :14].max() < 50 and pixels[:, 18:].min() > 200


# Once


def test_a_second_start_reads_the_map(photos):
    first = data.load_split(photos, "train", 32)
    before = cache_file("pixels").stat()
    again = data.load_split(photos, "train", 32)
    assert torch.equal(first.images, again.images) and first.fingerprint == again.fingerprint
    after = cache_file("pixels").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert data.load_split(photos, "train", 40).images.shape == (42, 3, 40, 40)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux alone has this list")
def test_the_map_promises_no_memory_so_that_it_may_exceed_it(photos):
    split = data.load_split(photos, "train", 32)  # in use while the list is read
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    assert {words[1] for words in maps if words[-1].endswith(".pixels")} == {"r--s"}
    assert len(split.images) == 42


def test_a_changed_photo_is_noticed_though_size_and_time_are_set_back(copy):
    first = data.load_split(copy, "train", 32)
    photo, white = copy / "train" / "red" / "0.jpg", copy / "white.jpg"
    Image.new("RGB", (50, 50), "white").save(white)
    replace_unnoticed(photo, white.read_bytes().ljust(photo.stat().st_size, b"\0"))
    other = data.load_split(copy, "train", 32)
    assert other.fingerprint != first.fingerprint and (other.images[28] > 250).all()


@pytest.fixture
def half_decoded(photos, monkeypatch):
    """What is in the cache after decoding was cut off at the 21st photo, in the third chunk."""
    decode, last = data.decode, photos / "train" / data.list_photos(photos)[1]["train"][20]

    def cut(path, image_size):
        if path == last:
            raise KeyboardInterrupt
        return decode(path, image_size)

    with monkeypatch.context() as patch:
        patch.setattr(data, "CHUNK", 8)
        patch.setattr(data, "decode", cut)
        with pytest.raises(KeyboardInterrupt):
            data.load_split(photos, "train", 32)


@pytest.mark.parametrize("damaged", [None, "part", "digests"])
def test_decoding_goes_on_where_it_was_cut_off(photos, half_decoded, monkeypatch, damaged):
    if damaged:  # in the second photo, as a power failure may leave it
        content = bytearray(cache_file(damaged).read_bytes())
        content[len(content) // 16 + 1] ^= 1
        cache_file(damaged).write_bytes(content)
    decoded, decode = [], data.decode
    monkeypatch.setattr(data, "decode", lambda *a: decoded.append(a) or decode(*a))
    ours = data.load_split(photos, "train", 32)
    assert len(decoded) == (42 - 1 if damaged else 42 - 20)
    whole = data.load_split(photos, "train", 32, "other")
    assert torch.equal(ours.images, whole.images) and ours.fingerprint == whole.fingerprint
    assert {path.suffix for path in Path(".cache").iterdir()} == {".pixels", ".json", ".lock"}


def test_a_disk_that_is_too_small_is_refused_before_decoding(photos, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Namespace(free=42 * 3 * 32 * 32 - 1))
    monkeypatch.setattr(data, "decode", None)
    with pytest.raises(SystemExit, match="are needed for .*train at 32 px, more than is free"):
        data.load_split(photos, "train", 32)


@pytest.mark.parametrize("suffix", ["pixels", "json"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"damaged"])
def test_a_damaged_cache_is_made_again(photos, suffix, content):
    first = data.load_split(photos, "validation", 32)
    pixels, path = first.images.clone(), cache_file(suffix)
    path.unlink() if content is None else path.write_bytes(content)
    again = data.load_split(photos, "validation", 32)
    assert torch.equal(pixels, again.images) and first.fingerprint == again.fingerprint


@pytest.mark.parametrize(
    ("place", "bits"),
    [(0, 1), (10, 1), (60, 1), (70, 1), (1000, 1), (-1, 1), (22, ord("u") ^ ord("i"))],
)
def test_a_few_flipped_bits_of_a_map_are_noticed(photos, place, bits):
    pixels, path = data.load_split(photos, "validation", 32).images.clone(), cache_file("pixels")
    content = bytearray(path.read_bytes())
    whole = bytes(content)
    content[place] ^= bits
    replace_unnoticed(path, content)
    again = data.load_split(photos, "validation", 32).images
    assert again.dtype == torch.uint8 and torch.equal(pixels, again)
    assert path.read_bytes() == whole


def test_the_fingerprint_does_not_depend_on_the_path(photos, copy):
    first = data.load_split(photos, "validation", 32).fingerprint
    assert first == data.load_split(copy, "validation", 32).fingerprint
    (copy / "validation").rename(copy / "val")
    assert first == data.load_split(copy, "validation", 32).fingerprint


# In what order, and how distorted


@pytest.mark.parametrize("augmentation", [None, MILD])
def test_every_photo_comes_exactly_once(photos, augmentation):
    split = data.load_split(photos, "train", 32)
    loader = data.Loader(split._replace(labels=torch.arange(42)), 10, CPU, augmentation)
    batches = list(loader)
    sizes = [len(images) for images, _ in batches]
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(42))
    assert len(batches) == len(loader) == 5 and max(sizes) - min(sizes) <= 1
    for images, _ in batches:
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_order_and_views_are_functions_of_seed_and_epoch(photos):
    split = data.load_split(photos, "train", 32)

    def batch(seed, epoch, views=None):
        loader = data.Loader(split, 42, CPU, MILD, seed, views)
        loader.set_epoch(epoch)
        [(images, labels)] = loader
        return images, labels, loader.order()

    images, labels, order = batch(0, 3)
    again, labels_again, _ = batch(0, 3)
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert not torch.equal(order, batch(0, 4)[2]) and not torch.equal(order, batch(1, 3)[2])
    # Of two views the third epoch shows the first again, in another order.
    first, _, order = batch(0, 0, views=2)
    third, _, other_order = batch(0, 2, views=2)
    assert not torch.equal(order, other_order)
    assert torch.equal(first[order.argsort()], third[other_order.argsort()])
    second, _, other_order = batch(0, 1, views=2)
    assert not torch.equal(first[order.argsort()], second[other_order.argsort()])


def test_augmentation_differs_from_image_to_image(photos):
    image = data.load_split(photos, "train", 32).images[:1].expand(16, -1, -1, -1)
    view = data.draw_augmentation(16, torch.Generator().manual_seed(0), MILD)
    images = data.augment(image, *view).flatten(1)
    assert torch.cdist(images, images).fill_diagonal_(9).min() > 0.1


def test_augmentation_of_no_strength_only_normalises(photos):
    images = data.load_split(photos, "train", 32).images[:8]
    view = data.draw_augmentation(8, torch.Generator().manual_seed(0), NOTHING)
    torch.testing.assert_close(
        data.augment(images, *view), data.normalise(images), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("theta", "color", "expected"),
    [
        ([[-1.0, 0, 0], [0, 1, 0]], [1.0, 1, 1], lambda images: images.flip(3)),
        ([[0.0, -1, 0], [1, 0, 0]], [1.0, 1, 1], lambda images: images.rot90(1, (2, 3))),
        ([[1.0, 0, 0], [0, 1, 0]], [1.2, 1, 1], lambda images: images * 1.2),
    ],
)
def test_flip_rotation_and_brightness_do_what_they_say(theta, color, expected):
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    images[:, :, :, 0] = 200  # a bright left edge
    augmented = data.augment(images, torch.tensor([theta]), torch.tensor([color]))
    torch.testing.assert_close(augmented, data.normalise(expected(images)), atol=1e-4, rtol=0)


def test_fewer_training_photos_are_drawn_of_each_class_and_nested(photos):
    split = data.load_split(photos, "train", 32)
    few, more, all_of_them = (data.take_photos(split, count, 0) for count in (3, 8, 99))
    assert few.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert set(few.files) < set(more.files) < set(all_of_them.files) == set(split.files)
    place = split.files.index(few.files[4])
    assert torch.equal(few.images[4], split.images[place])
    assert data.take_photos(split, 3, 1).files != few.files


# What is not as it should be


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d), "no such folder.*--download"),
        (lambda d: shutil.rmtree(d / "test"), "must hold train/, validation/ and test/"),
        (lambda d: shutil.rmtree(d / "test" / "red"), "red is in only one"),
        (lambda d: [p.unlink() for p in (d / "train" / "red").iterdir()], "no photos"),
        (lambda d: (d / "train/red/3.jpg").write_bytes(b"no photo"), "unreadable photo .*3.jpg"),
        (lambda d: os.truncate(d / "train/red/3.jpg", 700), "unreadable photo .*3.jpg"),
    ],
)
def test_a_bad_folder_is_one_clear_line(copy, damage, message):
    damage(copy)
    with pytest.raises(SystemExit, match=message):
        data.load_split(copy, "train", 32)
    assert not list(Path().glob(".cache/*.pixels"))


def test_photos_beside_the_class_folders_are_no_classes(copy):
    for name in ("blue", "green", "red"):
        shutil.rmtree(copy / "train" / name)
    with pytest.raises(SystemExit, match="not the classes of train/"):
        data.list_photos(copy)


def test_what_is_no_photo_is_not_read_but_listed(photos, copy, capsys):
    folder = copy / "train" / "red"
    (folder / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "more").mkdir()
    shutil.copy(folder / "0.jpg", folder / "more" / "0.jpg")
    os.mkfifo(folder / "pipe.jpg")  # who opens it waits without end
    (folder / "lost.jpg").symlink_to("nowhere.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (copy / "train" / "__MACOSX").mkdir()
    (copy / "train" / ".hidden").mkdir()
    _, files, ignored = data.list_photos(copy)
    names = ["loop.jpg", "lost.jpg", "more", "phone.HEIC", "pipe.jpg"]
    assert ignored["train"] == ["__MACOSX", *(f"red/{name}" for name in names)]
    assert len(files["train"]) == 42 and ignored["test"] == []
    train(copy, "--epochs", "1")
    assert "no photos: 6, such as train/__MACOSX" in capsys.readouterr().out
    assert (
        data.load_split(copy, "train", 32).fingerprint
        == data.load_split(photos, "train", 32).fingerprint
    )
