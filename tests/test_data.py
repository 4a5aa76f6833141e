"""Photos become the right tensors, once, in an order that seed and epoch decide."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor, PngImagePlugin
from torch.testing import assert_close

import data
from data import Loader, augment, decode, draw_augmentation, list_photos, normalise

CPU, SIZE = torch.device("cpu"), (50, 37)
GENERATOR = torch.Generator().manual_seed(0)
MILD = data.Augmentation(0.4, 10.0, 0.2, 0.5)
IMAGES = torch.randint(256, (40, 3, 8, 8), generator=GENERATOR).byte()
SPLIT = data.Split(IMAGES, torch.arange(40), None, None, None)  # a photo's label is its number
BAD_FOLDERS = {
    "rm -r copy": "copy/validation: no such folder.*--data",
    "rm -r copy/train": "copy/train: no such folder.*--data",
    "rm -r copy/train/red": "not both in train/ and validation/: red",
    "cd copy/validation; mkdir x; mv red x": "validation/x: no photo .* but red",
    "mv copy/test/red copy/val": "holds 5 photos and no class folders",
}
KINDS = ["RGB-red-.jfif", "RGB-red-.ppm", "P-red-.gif", "CMYK-red-.jpg", "L-gray-.jpg"]


@pytest.fixture
def copy(photos):  # in the folder that the test works in, to be changed
    os.system(f"cp -r '{photos}' copy")


def load(split="train", folder="copy"):
    return data.load_split(folder, split, 32)


# What is in a folder


def test_a_split_is_a_uint8_tensor_with_labels_from_the_folders(photos):
    split = load("train", photos)
    assert split.images.shape == (42, 3, 32, 32) and split.images.dtype == torch.uint8
    assert split.files[14] == "green/0.jpg" and split.classes == ["blue", "green", "red"]
    assert torch.equal(split.images.sum((2, 3)).argmax(1), 2 - split.labels)  # 2 is blue


@pytest.mark.parametrize("change", ["touch 0.jpg", "cp 1.jpg 0.jpg"])
def test_a_split_is_decoded_once_and_again_after_a_change(copy, monkeypatch, change):
    first = load().images
    monkeypatch.setattr(data, "decode_all", None)
    assert torch.equal(load().images, first)
    os.system(f"cd copy/train/red; {change}")
    with pytest.raises(TypeError):
        load()


def test_no_test_folder_is_needed_and_val_and_both_spellings_of_an_accent_are_known(copy):
    os.system("rm -r copy/test; mv copy/validation copy/val; mv copy/val/red copy/val/caf\u00e9")
    os.rename("copy/train/red", "copy/train/cafe\u0301")
    assert load().classes == load("validation").classes == ["blue", "caf\u00e9", "green"]


def test_what_is_hidden_or_no_photo_is_not_read(copy):
    os.system("cd copy/train; cp -r red .git; cp -r red __MACOSX; cp -r red _other")
    os.system("cd copy/train/red; cp 0.jpg .0.jpg; cp 0.jpg 0.txt; mkfifo pipe.jpg")
    listed = list_photos("copy", "train")
    assert listed.classes == ["_other", "blue", "green", "red"] and len(listed.files) == 56


def test_the_fingerprint_is_of_names_and_sizes_and_not_of_place_and_time(photos, copy):
    prints = {list_photos(folder, "train").fingerprint for folder in ("copy", photos)}
    os.rename("copy/train/red/0.jpg", "copy/train/red/00.jpg")
    prints.add(list_photos("copy", "train").fingerprint)
    os.truncate("copy/train/red/00.jpg", 9)
    assert len(prints | {list_photos("copy", "train").fingerprint}) == 3


@pytest.mark.parametrize("damage", BAD_FOLDERS)
def test_a_bad_folder_is_one_line(copy, damage):
    os.system(damage)
    with pytest.raises(SystemExit, match=f"^.*{BAD_FOLDERS[damage]}.*$"):
        load("validation")


def test_every_unreadable_photo_is_named_and_more_than_16_bits_are(copy):
    os.system("cd copy/train; head -c 700 red/0.jpg > blue/5.jpg; echo > blue/6.jpg")
    Image.new("F", SIZE).save("copy/train/green/a.tif")
    Image.new("I", SIZE).save("copy/train/red/b.tif")
    with pytest.raises(SystemExit, match="(?s)remove.*/5.jpg.*/6.jpg.*/a.tif: more.*/b.tif: more"):
        load()
    assert not list(Path(".cache").glob("*.npy"))


# Each photo as a viewer shows it


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_photo_is_read_as_a_viewer_shows_it(kind):
    mode, color, _ = kind.split("-")
    Image.new("RGB", SIZE, color).convert(mode).save(kind)
    assert decode(kind, 32).mean((1, 2)) == pytest.approx(ImageColor.getrgb(color), abs=2)


def test_transparent_is_white_and_of_16_bits_the_high_byte_is_read_and_size_is_no_matter():
    text, large = PngImagePlugin.PngInfo(), Path("d.jpg")
    text.add_text("edits", "x" * 2_000_000, zip=True)
    Image.new("LA", SIZE, (0, 127)).save("a.png", pnginfo=text)
    Image.new("RGBA", SIZE).save("b.gif")
    Image.new("I;16", SIZE, 0x80FF).save("c.png")
    Image.new("L", (257, 257), 128).save(large)
    large.write_bytes(large.read_bytes().replace(b"\1\1\1\1", b"\x37\0\x37\0", 1))  # 14080 px
    seen = [{*decode(name, 32).flat} for name in ("a.png", "b.gif", "c.png", large)]
    assert seen == [{128}, {255}, {128}, {128}]


def test_a_turned_photo_is_read_upright_and_a_long_one_cut():
    photo, exif = Image.new("L", (40, 120)), Image.Exif()
    photo.paste(255, (0, 40, 40, 60))  # upper half of the centre square
    exif[0x0112] = 6  # orientation: the stored top belongs on the right
    photo.save("turned.png", exif=exif)
    assert decode("turned.png", 32)[0, 5, [5, 27]].tolist() == [0, 255]


# In what order, and how distorted


def epoch(number, batch_size=7, **flags):  # inputs and labels, each a tensor [steps, batch, ...]
    loader = Loader(SPLIT, batch_size, CPU, MILD, **flags)
    loader.epoch = number
    return map(torch.stack, zip(*loader, strict=True))


def test_batches_are_of_one_size_and_a_photo_comes_at_most_once():
    _, labels = zip(*map(epoch, range(5)), strict=True)
    assert torch.stack(labels).shape == (5, 6, 6)
    seen = torch.stack([part.unique() for part in labels])
    assert seen.shape == (5, 36) and len(seen.unique()) > 36  # other photos are left over


def test_order_and_views_are_functions_of_seed_and_epoch():
    inputs, [order] = epoch(3, 40)
    assert torch.equal(next(epoch(3, 40)), inputs)
    for others, [other] in (epoch(4, 40), epoch(3, 40, seed=1)):
        assert not torch.equal(order, other)
        assert not torch.allclose(inputs[0, order.argsort()], others[0, other.argsort()])


def test_two_processes_take_the_two_halves_of_each_batch():
    halves = epoch(0, share=(0, 2)), epoch(0, share=(1, 2))
    for whole, *parts in zip(epoch(0), *halves, strict=True):
        assert_close(torch.hstack(parts), whole)


def test_without_augmentation_every_photo_comes_once_in_order():
    inputs, labels = map(torch.cat, zip(*Loader(SPLIT, 7, CPU), strict=True))
    assert torch.equal(labels, SPLIT.labels) and torch.equal(inputs, normalise(IMAGES))


def test_strength_0_changes_nothing():
    view = draw_augmentation(40, GENERATOR, 1.0, 0.0, 0.0, 0.0)
    assert_close(augment(IMAGES, *view), normalise(IMAGES), atol=1e-4, rtol=0)


def test_each_photo_has_its_own_view():
    theta, color = draw_augmentation(40, GENERATOR, *MILD)
    area = theta[:, :, :2].det()  # negative: mirrored
    assert len(area.unique()) == 40 and area.min() < 0 < area.max() and 0.3 < area.abs().min() < 0.6
    alone = map(augment, IMAGES.split(1), theta.split(1), color.split(1))
    assert_close(augment(IMAGES, theta, color), torch.cat([*alone]))
