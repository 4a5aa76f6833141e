import numpy as np
import pytest
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 50, 40)}


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A separable data folder: three classes, noisy photos of one colour each, odd sizes."""
    directory, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 14), ("validation", 7), ("test", 5)):
        for name, colour in COLOURS.items():
            (directory / split / name).mkdir(parents=True)
            for number in range(count):
                size = (40 + 3 * number, 44, 3)
                pixels = np.clip(colour + random.normal(0, 40, size), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(directory / split / name / f"{number}.jpg")
    return directory


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """Each test works in a folder of its own: caches and results never meet."""
    monkeypatch.chdir(tmp_path)
