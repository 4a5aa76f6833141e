"""Getting photos never leaves half a folder; looking them over finds copies and broken files."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from tools import prepare


@pytest.fixture(autouse=True)
def pile(tmp_path, monkeypatch):
    """In an empty current folder, pile/ with 20 photos of pizza and 5 of _other."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("pizza", 20), ("_other", 5)):
        Path("pile", name).mkdir(parents=True)
        for n in range(count):
            prepare.draw_dish("pizza", f"{name} {n}").save(f"pile/{name}/{n}.png")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*.*g")}


def test_split_is_80_10_10_of_each_class_and_always_alike(capsys):
    for target in ("one", "other"):
        prepare.main(["--split", "pile", "--data", target])
    assert f"{'pizza':24}         16          2          2\n" in capsys.readouterr().out
    assert contents("one") == contents("other")
    assert sorted(contents("one").values()) == sorted(contents("pile").values())


@pytest.mark.parametrize("flags", ["--split pile", "--split x", "--demo --data pile", "--download"])
def test_what_is_refused_is_one_line_and_leaves_nothing(monkeypatch, flags):
    monkeypatch.setattr("urllib.request.urlopen", None)  # as good as no network
    Path("pile/third").mkdir()
    with pytest.raises(SystemExit, match="^(pile.third: 0 photos|.*'x'|pile exists|no Food-11).*$"):
        prepare.main(flags.split())
    assert len([*Path().rglob("*")]) == 1 + 3 + 25  # pile, its folders and its photos


def test_copies_across_splits_are_found_and_unreadable_photos_named(capsys):
    prepare.main(["--split", "pile", "--data", "mine"])
    train, test = Path("mine/train/pizza"), Path("mine/test/pizza")
    Image.open(min(train.iterdir())).resize((60, 60)).save(test / "small.jpg", quality=60)
    sixteen_bits = np.arange(0, 60000, 40, dtype=np.uint16).reshape(50, 30)
    for folder in (train, test):
        Image.fromarray(sixteen_bits).save(folder / "deep.png")
    (test / "list.csv").touch()
    prepare.main(["--data", "mine"])
    copies = f"  {min(train.iterdir())}  {test}/small.jpg\n  {train}/deep.png  {test}/deep.png\n"
    named = (
        f"1 files not read as photos\n  {test}/list.csv\n2 copies across splits, at most 20 named\n"
    )
    assert capsys.readouterr().out.endswith(named + copies)
    (test / "broken.png").touch()
    with pytest.raises(SystemExit, match=f"{test}/broken.png"):
        prepare.main(["--data", "mine"])


def test_of_digits_fewer_than_one_pair_in_10000_counts_as_copies():
    choice, photos = np.random.default_rng(0), []
    for number in range(400):
        font, place = ImageFont.load_default(choice.uniform(77, 115)), choice.uniform(54, 74, 2)
        image = Image.new("RGB", (128, 128))
        ImageDraw.Draw(image).text(tuple(place), f"{number % 4}", "white", font, "mm")
        photos.append(np.asarray(image.rotate(choice.uniform(-15, 15))).transpose(2, 0, 1))
    assert len([*prepare.find_copies(photos, [200, 400])]) < 200 * 200 / 10_000


def test_archive_that_leads_out_or_holds_other_photos_is_refused(monkeypatch):
    monkeypatch.setattr(prepare, "COURSE_COUNTS", {"train": 22, "validation": 11, "test": 11})
    link = zipfile.ZipInfo("food11/train/0/link")
    link.external_attr = 0o120777 << 16
    for extra in ("../x", "/x", link, "test/0/x.jpg", "__MACOSX/test/0/._0.jpg"):
        with zipfile.ZipFile("a.zip", "w") as archive:
            for n in range(44):
                split = ("train", "train", "validation", "test")[n % 4]
                archive.writestr(f"food11/{split}/{n // 4}/{n}.jpg", b"photo")
            archive.writestr(extra, b"photo")
        if extra != "__MACOSX/test/0/._0.jpg":
            with pytest.raises(SystemExit, match="leads out|not {"):
                prepare.new_folder(Path("new"), prepare.unpack_archive, "a.zip")
    prepare.new_folder(Path("new"), prepare.unpack_archive, "a.zip")
    assert {path.name for path in Path().iterdir()} == {"a.zip", "new", "pile"}
