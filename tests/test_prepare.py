"""Getting photos never leaves half a folder; looking them over finds copies and broken files."""

import json
import os
import re
import shutil
import stat
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tools import prepare

COUNTS = {"train": 4, "validation": 2, "test": 2}
FEW = {"train": 3, "validation": 1, "test": 1}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A small made-up set; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("drawn") / "demo"
    prepare.draw_demo(folder, FEW)
    return folder


def write_archive(extra=(), top="food11/"):
    """A zip file of two classes with COUNTS (made-up) photos, and members `extra`."""
    with zipfile.ZipFile("a.zip", "w") as archive:
        for split, number in COUNTS.items():
            for n in range(number):
                archive.writestr(f"{top}{split}/{('pizza', 'sushi')[n % 2]}/{n}.jpg", b"photo")
        for member in extra:
            archive.writestr(member, b"evil")


def link(name):
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


def changed_copy(photo, copy):
    """Save a smaller, darker, coarser copy of a photo."""
    image = Image.open(photo)
    image = ImageEnhance.Brightness(image.resize((70, 70))).enhance(0.8)
    image.save(copy, quality=60)


@pytest.mark.parametrize("top", ["", "food11/"])
def test_good_archive_is_unpacked_without_its_junk(tmp_path, top):
    junk = ["__MACOSX/train/pizza/._0.jpg", f"{top}train/.DS_Store", f"{top}train/pizza/._1.jpg"]
    write_archive(junk, top)
    prepare.unpack_archive("a.zip", tmp_path / "food11", COUNTS, classes=2)
    files = [path.name for path in (tmp_path / "food11").rglob("*") if path.is_file()]
    assert len(files) == 8 and not any(name.startswith(".") for name in files)
    assert sorted(os.listdir()) == ["a.zip", "food11"]


@pytest.mark.parametrize(
    "member",
    ["train/../../x.jpg", "/x.jpg", "train\\..\\x.jpg", "C:/x.jpg", link("train/pizza/x.jpg")],
)
def test_archive_that_leads_out_of_the_folder_is_refused(tmp_path, member):
    write_archive([member])
    with pytest.raises(ValueError, match="is a link or leads out"):
        prepare.unpack_archive("a.zip", tmp_path / "food11", COUNTS, classes=2)
    assert os.listdir() == ["a.zip"]


def test_archive_that_would_fill_the_disk_is_refused(tmp_path):
    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.writestr("train/pizza/x.jpg", b"small")
        archive.infolist()[0].file_size = 2**31 + 1  # what it declares at the end
    with pytest.raises(ValueError, match="would unpack to"):
        prepare.unpack_archive("a.zip", tmp_path / "food11", COUNTS, classes=2)
    assert os.listdir() == ["a.zip"] and os.path.getsize("a.zip") < 2**22


@pytest.mark.parametrize(("counts", "classes"), [(COUNTS | {"test": 3}, 2), (COUNTS, 11)])
def test_archive_with_other_counts_or_classes_is_refused(tmp_path, counts, classes):
    write_archive()
    with pytest.raises(ValueError, match="'test': 2"):
        prepare.unpack_archive("a.zip", tmp_path / "food11", counts, classes)
    assert os.listdir() == ["a.zip"]


def test_an_interrupted_folder_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), prepare.new_folder(tmp_path / "food11") as folder:
        (folder / "0.jpg").write_bytes(b"photo")
        raise KeyboardInterrupt
    assert not os.listdir()


def test_food101_draw_is_fixed_and_without_overlap(tmp_path, capsys):
    root = tmp_path / "food-101"
    (root / "meta").mkdir(parents=True)
    for part, number in (("train", 202), ("test", 52)):
        listed = {name: [f"{name}/{part}{n}" for n in range(number)] for name in prepare.DISHES}
        (root / "meta" / f"{part}.json").write_text(json.dumps(listed))
        for photo in sum(listed.values(), []):
            (root / "images" / photo).parent.mkdir(parents=True, exist_ok=True)
            (root / "images" / f"{photo}.jpg").write_bytes(photo.encode())
    draws = []
    for target in (tmp_path / "one", tmp_path / "two"):
        prepare.fetch_food101(target, tmp_path)
        files = sorted(target.glob("*/*/*.jpg"))
        assert len({file.read_bytes() for file in files}) == len(files) == 11 * 250
        assert len(list(target.glob("train/sushi/train*.jpg"))) == 200
        assert len(list(target.glob("validation/sushi/test*.jpg"))) == 25
        draws.append([file.relative_to(target) for file in files])
    assert draws[0] == draws[1]
    shutil.rmtree(root / "images" / "sushi")
    with pytest.raises(ValueError, match="incomplete"):
        prepare.fetch_food101(tmp_path / "three", tmp_path)
    assert not (tmp_path / "three").exists()


def test_all_classes_of_an_unpacked_food101_are_taken(tmp_path, capsys):
    (tmp_path / "food-101" / "meta").mkdir(parents=True)
    photo = tmp_path / "food-101" / "images" / "baklava" / "0.jpg"
    photo.parent.mkdir(parents=True)
    prepare.draw_dish("pizza", 48, "0").save(photo)
    for part, count in (("train", 200), ("test", 50)):
        listed = {
            name: [f"{name}/{part}{n}" for n in range(count)] for name in ("baklava", "tacos")
        }
        (tmp_path / "food-101" / "meta" / f"{part}.json").write_text(json.dumps(listed))
        for name in sum(listed.values(), []):
            link = tmp_path / "food-101" / "images" / f"{name}.jpg"
            link.parent.mkdir(exist_ok=True)
            os.link(photo, link)
    flags = ["--download", "--classes", "all", "--data", "two", "--cache", str(tmp_path)]
    prepare.main([*flags, "--image-size", "32"])
    out = capsys.readouterr().out
    assert re.search(r"all +400 +50 +50", out) and "more" in out  # of 42,500 copies


def test_download_falls_back_and_fails_in_plain_words(tmp_path, capsys):
    def unreachable(target, cache):
        raise OSError("no network\nand a long story")

    def fetch(target, cache):
        prepare.draw_demo(target, {"train": 1, "validation": 1, "test": 1}, size=8)

    target, cache = tmp_path / "food11", tmp_path / "cache"
    with pytest.raises(SystemExit, match="Check the network"):
        prepare.download_food11(target, cache, {"one": unreachable, "other": unreachable})
    assert len(capsys.readouterr().out.splitlines()) == 2 and not target.exists()
    prepare.download_food11(target, cache, {"one": unreachable, "other": fetch})
    assert f"{target} is other" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists already"):
        prepare.main(["--download", "--data", str(target)])


def test_demo_is_the_same_every_time_and_a_complete_one_is_left_alone(drawn, tmp_path):
    sets = []
    for target, seed in ((drawn, 0), (tmp_path / "b", 0), (tmp_path / "c", 1)):
        prepare.draw_demo(target, FEW, seed=seed)
        sets.append([file.read_bytes() for file in sorted(target.glob("*/*/*.jpg"))])
    assert len(sets[0]) == 55 and sets[0] == sets[1] and not set(sets[0]) & set(sets[2])
    photo = tmp_path / "c/train/sushi/000.jpg"
    photo.write_bytes(b"mine")
    prepare.draw_demo(tmp_path / "c", FEW)
    assert photo.read_bytes() == b"mine"
    photo.unlink()
    with pytest.raises(SystemExit, match="exists already"):
        prepare.draw_demo(tmp_path / "c", FEW)


def test_demo_command_draws_into_a_folder_of_its_own(capsys):
    prepare.main(["--demo", "--image-size", "32", "40"])
    assert "0 near-duplicate pairs" in capsys.readouterr().out
    assert sorted(os.listdir()) == [".cache", "demo", "results"]
    assert len([name for name in os.listdir(".cache") if name.endswith(".pixels")]) == 4
    assert Image.open("results/figures/photos.png").width == 1350


def test_check_finds_copies_across_splits_and_what_is_not_read(drawn, tmp_path, capsys):
    shutil.copytree(drawn, "mine")
    (tmp_path / "mine/validation").rename("mine/val")
    photo = tmp_path / "mine/train/pizza/000.jpg"
    changed_copy(photo, "mine/val/pizza/copy.jpg")
    changed_copy(photo, "mine/train/pizza/copy2.jpg")  # no leak: the same split as its original
    (tmp_path / "mine/test/pizza/photo.heic").write_bytes(b"photo")
    with open(b"mine/train/caf\xe9.txt", "wb"):
        pass
    sys.stdout.reconfigure(errors="backslashreplace")  # common.py did so before pytest's capture
    prepare.main(["--data", "mine", "--image-size", "32"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[12].split() == ["all", "34", "12", "11"]
    start = lines.index("2 near-duplicate pairs across splits (a leak: keep one photo of each)")
    pairs = {" ".join(line.split()[:2]) for line in lines[start + 1 : start + 3]}
    assert pairs == {
        f"mine/train/pizza/{name}.jpg mine/val/pizza/copy.jpg" for name in ("000", "copy2")
    }
    start = lines.index("2 files are no photos and not read")
    assert lines[start + 1 : start + 3] == [
        "  mine/train/caf\\udce9.txt",
        "  mine/test/pizza/photo.heic",
    ]


def test_check_names_unreadable_files(drawn, capsys):
    shutil.copytree(drawn, "mine")
    os.truncate("mine/test/sushi/000.jpg", 1000)
    with open("mine/train/sushi/001.jpg", "w") as file:
        file.write("not a photo")
    with pytest.raises(SystemExit, match="remove or replace"):
        prepare.main(["--data", "mine"])
    lines = capsys.readouterr().out.splitlines()
    text, truncated = lines[lines.index("2 unreadable files") + 1 :]
    assert "test/sushi/000.jpg: " in text + truncated and "001.jpg: cannot identify" in truncated
    assert not os.path.exists("results")


def plain_folder(photos):
    """plain/<class>/ with that many different photos in each of two classes."""
    for name in ("pizza", "sushi"):
        os.makedirs(f"plain/{name}")
        for n in range(photos):
            prepare.draw_dish(name, 96, str(n)).save(f"plain/{name}/{n}.jpg")


def test_split_keeps_copies_together_and_is_the_same_every_time(capsys):
    plain_folder(20)
    changed_copy("plain/pizza/0.jpg", "plain/pizza/copy.jpg")
    open("plain/pizza/list.csv", "w").close()
    for target in ("a", "b"):
        prepare.main(["--split", "plain", "--data", target])
    printed = capsys.readouterr().out
    assert "1 files are no photos and left out\n  plain/pizza/list.csv" in printed
    assert "0 near-duplicate pairs" in printed
    one, other = (sorted(path.parts[1:] for path in Path(d).glob("*/*/*")) for d in ("a", "b"))
    assert one == other and len({path[1:] for path in one}) == len(one) == 41
    sushi = Counter(split for split, name, _ in one if name == "sushi")
    assert sushi == {"train": 16, "validation": 2, "test": 2}
    folders = [path[:2] for path in one if path[1:] in (("pizza", "0.jpg"), ("pizza", "copy.jpg"))]
    assert folders[0] == folders[1]
    with pytest.raises(SystemExit, match="exists already"):
        prepare.main(["--split", "plain", "--data", "a"])


def test_smallest_split_has_a_photo_everywhere_and_a_smaller_one_is_refused():
    plain_folder(3)
    prepare.main(["--split", "plain", "--data", "a"])
    assert len(list(Path("a").glob("*/*/*"))) == 6
    changed_copy("plain/pizza/0.jpg", "plain/pizza/2.jpg")
    with pytest.raises(SystemExit, match="plain/pizza: less than 3 different photos"):
        prepare.main(["--split", "plain", "--data", "b"])
    assert sorted(os.listdir()) == [".cache", "a", "plain", "results"]


@pytest.mark.parametrize("sizes", [[2, 50, 60], [1, 1, 40], [30, 30, 30]])
def test_split_leaves_no_split_empty_however_many_copies_there_are(sizes):
    random = np.random.default_rng(0)
    hashes = np.repeat(random.random((len(sizes), 256)) < 0.5, sizes, axis=0)
    chosen = prepare.share_out(hashes)
    assert sorted(map(len, chosen.values())) == sizes and len(chosen["train"]) == max(sizes)


def test_split_needs_a_name_for_the_new_folder(capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--split", "plain"])
    assert "--split needs --data" in capsys.readouterr().err
