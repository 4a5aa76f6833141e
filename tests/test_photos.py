"""Getting photos never leaves half a folder; looking them over finds copies and broken files."""

import json
import stat
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tools import demo, photos

COUNTS = {"train": 4, "validation": 2, "test": 2}


def write_archive(path, counts=COUNTS, top="food11/", extra=()):
    """A zip file of two classes with as many (made-up) photos a split as `counts` says."""
    with zipfile.ZipFile(path, "w") as archive:
        for split, number in counts.items():
            for n in range(number):
                archive.writestr(f"{top}{split}/{('pizza', 'sushi')[n % 2]}/{n}.jpg", b"photo")
        for name in extra:
            archive.writestr(name, b"evil")
    return path


@pytest.mark.parametrize("top", ["", "food11/"])
def test_good_archive_is_unpacked_without_its_junk(tmp_path, top):
    junk = ["__MACOSX/train/pizza/._0.jpg", f"{top}train/.DS_Store", f"{top}train/pizza/._1.jpg"]
    archive = write_archive(tmp_path / "a.zip", top=top, extra=junk)
    photos.unpack_archive(archive, tmp_path / "food11", COUNTS, classes=2)
    files = [p.name for p in (tmp_path / "food11").rglob("*") if p.is_file()]
    assert len(files) == 8 and not any(name.startswith(".") for name in files)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "food11"]


@pytest.mark.parametrize("name", ["train/../../x.jpg", "/x.jpg", "train\\..\\x.jpg", "C:/x.jpg"])
def test_archive_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    archive = write_archive(tmp_path / "a.zip", extra=[name])
    with pytest.raises(ValueError, match="leads out"):
        photos.unpack_archive(archive, tmp_path / "food11", COUNTS, classes=2)
    assert list(tmp_path.iterdir()) == [archive]


def test_archive_with_a_link_is_refused(tmp_path):
    archive = write_archive(tmp_path / "a.zip")
    link = zipfile.ZipInfo("train/pizza/link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "a") as bundle:
        bundle.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match="link"):
        photos.unpack_archive(archive, tmp_path / "food11", COUNTS, classes=2)
    assert list(tmp_path.iterdir()) == [archive]


def test_archive_with_other_counts_or_classes_is_refused(tmp_path):
    archive = write_archive(tmp_path / "a.zip")
    for counts, classes in ((COUNTS | {"test": 3}, 2), (COUNTS, 11)):
        with pytest.raises(ValueError, match="'test': 2"):
            photos.unpack_archive(archive, tmp_path / "food11", counts, classes)
    assert list(tmp_path.iterdir()) == [archive]


def test_interrupted_unpacking_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    archive = write_archive(tmp_path / "a.zip")
    monkeypatch.setattr(photos.shutil, "copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        photos.unpack_archive(archive, tmp_path / "food11", COUNTS, classes=2)
    assert list(tmp_path.iterdir()) == [archive]


def test_food101_draw_is_fixed_and_without_overlap(tmp_path):
    root = tmp_path / "food-101"
    (root / "meta").mkdir(parents=True)
    for part, number in (("train", 9), ("test", 6)):
        listed = {name: [f"{name}/{part}{n}" for n in range(number)] for name in demo.DISHES}
        (root / "meta" / f"{part}.json").write_text(json.dumps(listed))
        for photo in sum(listed.values(), []):
            (root / "images" / photo).parent.mkdir(parents=True, exist_ok=True)
            (root / "images" / f"{photo}.jpg").write_bytes(photo.encode())
    drawn = []
    for target in (tmp_path / "one", tmp_path / "two"):
        photos.sample_food101(root, target, train=7, validation=3, test=3)
        files = sorted(target.glob("*/*/*.jpg"))
        assert len({file.read_bytes() for file in files}) == len(files) == 11 * 13
        assert len(list(target.glob("train/sushi/train*.jpg"))) == 7
        assert len(list(target.glob("validation/sushi/test*.jpg"))) == 3
        drawn.append([file.relative_to(target) for file in files])
    assert drawn[0] == drawn[1]
    (root / "images" / "sushi").rename(root / "elsewhere")
    with pytest.raises(ValueError, match="incomplete"):
        photos.sample_food101(root, tmp_path / "three", train=7, validation=3, test=3)
    assert not (tmp_path / "three").exists()


def test_download_falls_back_and_fails_in_plain_words(tmp_path, monkeypatch, capsys):
    def unreachable(target, cache):
        raise OSError("no network\nand a long story")

    def fetch(target, cache):
        demo.draw_demo(target, {"train": 1, "validation": 1, "test": 1}, size=8)

    target = tmp_path / "food11"
    monkeypatch.setattr(photos, "socket", SimpleNamespace(setdefaulttimeout=lambda seconds: None))
    monkeypatch.setattr(photos, "fetch_course_archive", unreachable)
    monkeypatch.setattr(photos, "fetch_food101", unreachable)
    with pytest.raises(SystemExit, match="Check the network"):
        photos.download_food11(target, tmp_path / "cache")
    assert len(capsys.readouterr().out.splitlines()) == 2 and not target.exists()
    monkeypatch.setattr(photos, "fetch_food101", fetch)
    photos.download_food11(target, tmp_path / "cache")
    assert "is a draw from Food-101" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists already"):
        photos.download_food11(target, tmp_path / "cache")


def test_demo_is_complete_and_the_same_every_time(tmp_path):
    per_split = {"train": 2, "validation": 1, "test": 1}
    sets = []
    for target, seed in ((tmp_path / "a", 0), (tmp_path / "b", 0), (tmp_path / "c", 1)):
        demo.draw_demo(target, per_split, size=32, seed=seed)
        files = sorted(target.glob("*/*/*.jpg"))
        assert len(files) == 11 * 4 and len(photos.count_photos(target)["train"]) == 11
        sets.append([file.read_bytes() for file in files])
    assert sets[0] == sets[1] and not set(sets[0]) & set(sets[2])
    before = files[0].stat().st_mtime_ns
    demo.draw_demo(target, per_split, size=32, seed=1)
    assert files[0].stat().st_mtime_ns == before
    files[0].unlink()
    with pytest.raises(SystemExit, match="exists already"):
        demo.draw_demo(target, per_split, size=32, seed=1)


def test_copies_across_splits_are_found_and_nothing_else(tmp_path):
    demo.draw_demo(tmp_path / "demo", {"train": 3, "validation": 1, "test": 1}, size=96)
    files = sorted((tmp_path / "demo").glob("*/*/*.jpg"))
    splits = [file.parts[-3] for file in files]
    sizes, hashes, errors = photos.scan_photos(files)
    assert not errors and (sizes == 96).all() and hashes.shape == (55, 256)
    assert photos.near_duplicates(hashes, splits) == []
    original = Image.open(tmp_path / "demo/train/pizza/000.jpg")
    changed = ImageEnhance.Brightness(original.resize((70, 70))).enhance(0.8)
    changed.save(tmp_path / "copy.jpg", quality=60)
    files.append(tmp_path / "copy.jpg")
    source = files.index(tmp_path / "demo/train/pizza/000.jpg")
    hashes = photos.scan_photos(files)[1]
    pairs = photos.near_duplicates(hashes, [*splits, "test"])
    assert [pair[:2] for pair in pairs] == [(source, 55)]
    assert photos.near_duplicates(hashes, [*splits, "train"]) == []  # a copy within one split


def test_unreadable_files_are_reported(tmp_path):
    photo = demo.draw_dish("sushi", 96, "0")
    photo.save(tmp_path / "good.jpg")
    content = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.jpg").write_text("not a photo")
    files = sorted(tmp_path.iterdir())
    sizes, hashes, errors = photos.scan_photos(files)
    assert [file.name for file, _ in errors] == ["text.jpg", "truncated.jpg"]
    assert "truncated" in errors[1][1] and sizes.tolist() == [[96, 96], [0, 0], [0, 0]]
    assert photos.near_duplicates(hashes, ["train", "validation", "test"]) == []
    assert [len(part) for part in photos.scan_photos([])] == [0, 0, 0]


def test_contact_sheet_is_a_picture(tmp_path):
    strip = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8)
    photos.contact_sheet({f"class_{n}": (strip, strip) for n in range(25)}, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width == 1350
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
