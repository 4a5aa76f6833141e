"""Photos become the right tensors, once, in a reproducible order."""

import os
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data

CPU = torch.device("cpu")
MILD = {"crop_scale": 0.4, "rotation": 10.0, "jitter": 0.2, "flip": 0.5}
NOTHING = {"crop_scale": 1.0, "rotation": 0.0, "jitter": 0.0, "flip": 0.0}


def copy_of(photos, tmp_path):
    return shutil.copytree(photos, tmp_path / "copy")


def test_a_split_is_a_uint8_tensor_with_labels_from_the_folders(photos):
    split = data.load_split(photos, "train", 32)
    assert split.images.shape == (42, 3, 32, 32) and split.images.dtype == torch.uint8
    assert split.classes == ["blue", "green", "red"]
    assert split.labels.tolist() == [0] * 14 + [1] * 14 + [2] * 14
    brightest = split.images.float().mean((2, 3)).argmax(1)
    assert torch.equal(brightest, 2 - split.labels)  # channel 2 is blue, class 0


def test_resizing_keeps_the_aspect_ratio(tmp_path):
    photo = Image.new("RGB", (300, 100), "black")
    photo.paste("white", (100, 0, 200, 100))  # exactly the centre square
    photo.save(tmp_path / "wide.png")
    pixels, _ = data.decode(tmp_path / "wide.png", 32)
    assert pixels.shape == (3, 32, 32) and pixels[:, :, 2:-2].min() > 250


def test_a_second_start_reads_the_map_and_a_changed_photo_is_noticed(photos, tmp_path, monkeypatch):
    directory = copy_of(photos, tmp_path)
    first = data.load_split(directory, "train", 32)
    monkeypatch.setattr(data, "decode", None)  # a second decoding would fail
    again = data.load_split(directory, "train", 32)
    assert torch.equal(first.images, again.images) and first.fingerprint == again.fingerprint
    monkeypatch.undo()
    os.chdir(tmp_path)
    changed = directory / "train" / "red" / "0.jpg"
    Image.new("RGB", (50, 50), "white").save(changed)
    os.utime(changed, (time.time() + 9, time.time() + 9))
    other = data.load_split(directory, "train", 32)
    assert other.fingerprint != first.fingerprint
    assert (other.images[28] > 250).all()


@pytest.mark.parametrize("suffix", ["npy", "json"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"damaged"])
def test_a_damaged_cache_is_made_again(photos, tmp_path, suffix, content):
    first = data.load_split(photos, "validation", 32)
    pixels = first.images.clone()
    (path,) = tmp_path.glob(f".cache/*.{suffix}")
    path.unlink() if content is None else path.write_bytes(content)
    again = data.load_split(photos, "validation", 32)
    assert torch.equal(pixels, again.images) and first.fingerprint == again.fingerprint


def test_unusual_photos_are_read_as_a_person_sees_them(tmp_path):
    grey = (np.linspace(0, 1, 64) * 65535).astype(np.uint16)[None].repeat(64, 0)
    Image.fromarray(grey).save(tmp_path / "16bit.png")
    assert 100 < data.decode(tmp_path / "16bit.png", 32)[0].mean() < 155
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert data.decode(tmp_path / "clear.png", 32)[0].min() == 255
    for mode, name in (("CMYK", "a.jpg"), ("P", "b.gif"), ("L", "c.jpg"), ("1", "d.png")):
        Image.new(mode, (50, 7)).save(tmp_path / name)
        assert data.decode(tmp_path / name, 32)[0].shape == (3, 32, 32)


def test_the_fingerprint_does_not_depend_on_the_path(photos, tmp_path):
    first = data.load_split(photos, "validation", 32).fingerprint
    assert first == data.load_split(copy_of(photos, tmp_path), "validation", 32).fingerprint


@pytest.mark.parametrize("augmentation", [None, MILD])
def test_every_photo_comes_exactly_once(photos, augmentation):
    split = data.load_split(photos, "train", 32)
    loader = data.Loader(split._replace(labels=torch.arange(42)), 10, CPU, augmentation)
    sizes, seen = zip(*((len(images), labels) for images, labels in loader), strict=True)
    assert sorted(torch.cat(seen).tolist()) == list(range(42))
    assert len(sizes) == len(loader) == 5 and max(sizes) - min(sizes) <= 1


def test_the_loader_is_reproducible_and_epochs_differ(photos):
    split = data.load_split(photos, "train", 32)

    def epochs(seed):
        loader = data.Loader(split, 42, CPU, MILD, seed)
        return [next(iter([*loader])) for _ in range(2)]

    (a, a_labels), (b, b_labels) = epochs(0)
    (c, c_labels), _ = epochs(0)
    (d, d_labels), _ = epochs(1)
    assert torch.equal(a, c) and torch.equal(a_labels, c_labels)
    assert not torch.equal(a_labels, b_labels) and not torch.equal(a_labels, d_labels)


def test_augmentation_differs_from_image_to_image(photos):
    image = data.load_split(photos, "train", 32).images[:1].expand(16, -1, -1, -1)
    view = data.draw_augmentation(16, torch.Generator().manual_seed(0), **MILD)
    images = data.augment(image, *view).flatten(1)
    assert torch.cdist(images, images).fill_diagonal_(9).min() > 0.1


def test_augmentation_of_no_strength_only_normalises(photos):
    images = data.load_split(photos, "train", 32).images[:8]
    view = data.draw_augmentation(8, torch.Generator().manual_seed(0), **NOTHING)
    torch.testing.assert_close(
        data.augment(images, *view), data.normalise(images), atol=1e-4, rtol=0
    )


def test_flip_rotation_and_colour_do_what_they_say():
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    images[:, :, :, 0] = 200  # a bright left edge
    mirror = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]])
    plain = torch.ones(1, 3)
    torch.testing.assert_close(
        data.augment(images, mirror, plain), data.normalise(images.flip(3)), atol=1e-4, rtol=0
    )
    quarter = torch.tensor([[[0.0, -1, 0], [1, 0, 0]]])
    torch.testing.assert_close(
        data.augment(images, quarter, plain),
        data.normalise(images.rot90(1, (2, 3))),
        atol=1e-4,
        rtol=0,
    )
    same = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    brighter = data.augment(images, same, torch.tensor([[1.2, 1, 1]]))
    torch.testing.assert_close(brighter, data.normalise(images * 1.2), atol=1e-4, rtol=0)


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
def test_a_bad_folder_is_one_clear_line(photos, tmp_path, damage, message):
    directory = copy_of(photos, tmp_path)
    damage(directory)
    with pytest.raises(SystemExit, match=message):
        data.load_split(directory, "train", 32)
    assert not list(tmp_path.glob(".cache/*.npy"))


def test_photos_beside_the_class_folders_are_no_classes(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "flat")
    for name in ("blue", "green", "red"):
        shutil.rmtree(tmp_path / "flat/train" / name)
    with pytest.raises(SystemExit, match="not the classes of train/"):
        data.list_photos(tmp_path / "flat")
