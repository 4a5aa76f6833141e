"""What holds for any input: hypothesis looks for one for which it does not."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

import data
import engine
import evaluate
from tests.helpers import train

CPU = torch.device("cpu")
FEW = settings(deadline=None, max_examples=60, derandomize=True)
CALM = settings(FEW, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)


@FEW
@given(some.lists(some.tuples(some.integers(0, 3), some.integers(0, 3)), min_size=1, max_size=60))
def test_metrics_count_every_photo_once(pairs):
    labels, predicted = np.array(pairs).T
    result = evaluate.metrics(labels, np.eye(4)[predicted], list("abcd"))
    matrix = np.array(result["confusion_matrix"])
    assert matrix.sum() == len(pairs)
    assert np.trace(matrix) / len(pairs) == pytest.approx(result["accuracy"])
    low, high = result["interval_95"]
    assert 0 <= low <= result["accuracy"] <= high <= 1
    assert result["accuracy"] <= result["top3_accuracy"] <= 1


@FEW
@given(some.integers(1, 4), some.integers(2, 40), some.integers(0, 2**32 - 1))
def test_a_comparison_turned_round_is_its_mirror_image(seeds, photos, seed):
    first, second = np.random.default_rng(seed).random((2, seeds, photos)) < 0.6
    one, other = (evaluate.paired_difference(*pair) for pair in ((first, second), (second, first)))
    assert one["difference"] == pytest.approx(-other["difference"])
    assert one["interval_95"] == pytest.approx([-bound for bound in other["interval_95"][::-1]])
    assert one["p_value"] == pytest.approx(other["p_value"]) and 0 <= one["p_value"] <= 1
    assert one["interval_95"][0] <= one["difference"] + 1e-9
    assert evaluate.paired_difference(first, first)["p_value"] == 1


@FEW
@given(some.integers(1, 200), some.integers(1, 70), some.integers(0, 9), some.booleans())
def test_a_loader_gives_every_photo_once_in_even_batches(photos, batch_size, epoch, shuffled):
    images = torch.zeros(photos, 3, 2, 2, dtype=torch.uint8)
    split = data.Split(images, torch.arange(photos), [], ["a", "b"], "")
    strength = data.Augmentation(0.5, 10.0, 0.2, 0.5) if shuffled else None
    loader = data.Loader(split, batch_size, CPU, strength)
    loader.set_epoch(epoch)
    labels = [labels for _, labels in loader]
    sizes = [len(part) for part in labels]
    assert sorted(torch.cat(labels).tolist()) == list(range(photos))
    assert len(sizes) == len(loader) and max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


@FEW
@given(some.dictionaries(some.text("abc", min_size=1), some.integers(), max_size=4))
def test_settings_leave_out_the_places_and_nothing_else(config):
    places = dict.fromkeys(engine.PLACE_FLAGS, "anywhere")
    assert engine.settings({**config, **places}) == config


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """A folder with one finished run, and the flags that made it."""
    output = tmp_path_factory.mktemp("finished")
    train(photos, "--epochs", "1", "--name", "one", "--output", str(output))
    return output


def mangle(content, seed):
    """Bytes with a few of them changed, cut out or doubled."""
    choice, content = random.Random(seed), bytearray(content)
    for _ in range(choice.randint(1, 4)):
        place = choice.randrange(len(content))
        end = place + choice.randint(1, 30)
        what = choice.randrange(3)
        if what == 0:
            content[place] ^= 1 << choice.randrange(8)
        elif what == 1:
            del content[place:end]
        else:
            content[place:place] = content[place:end]
        if not content:
            break
    return bytes(content)


@settings(CALM, max_examples=150)
@given(some.integers(0, 2**32))
def test_a_mangled_file_of_a_run_is_one_line_or_harmless(finished, tmp_path, seed):
    whole = Path(finished, "runs/one.json").read_bytes()
    path = tmp_path / "runs" / "one.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(mangle(whole, seed))
    try:
        assert evaluate.summarise(tmp_path) == evaluate.summarise(finished)
    except SystemExit as error:
        assert len(str(error).splitlines()) == 1


@settings(CALM, max_examples=60)
@given(some.integers(0, 2**32))
def test_a_mangled_checkpoint_is_refused(finished, photos, tmp_path, seed):
    whole = Path(finished, "checkpoints/one.pt").read_bytes()
    mangled = mangle(whole, seed)
    for folder in ("runs", "checkpoints"):
        Path(tmp_path, folder).mkdir(exist_ok=True)
    Path(tmp_path, "runs/one.json").write_bytes(Path(finished, "runs/one.json").read_bytes())
    Path(tmp_path, "checkpoints/one.pt").write_bytes(mangled)
    if mangled != whole:
        with pytest.raises(SystemExit, match="is damaged"):
            evaluate.load_model(tmp_path, "one", CPU)


@settings(CALM, max_examples=60)
@given(some.integers(0, 2**32))
def test_a_mangled_state_is_not_used(tmp_path, seed):
    path = tmp_path / "one.unfinished"
    engine.write_state(path, {"belongs_to": ["x"], "history": [1, 2, 3]})
    whole = path.read_bytes()
    mangled = mangle(whole, seed)
    path.write_bytes(mangled)
    assert mangled == whole or engine.read_state(path, ["x"]) is None


@CALM
@given(some.integers(0, 2**32))
def test_a_mangled_map_is_made_again(photos, tmp_path, seed):
    cache = tmp_path / str(seed)
    first = data.load_split(photos, "test", 32, cache)
    pixels = first.images.clone()
    path = random.Random(seed).choice(sorted(cache.glob("*.[jp]*")))  # not the lock
    path.write_bytes(mangle(path.read_bytes(), seed))
    again = data.load_split(photos, "test", 32, cache)
    assert torch.equal(again.images, pixels)
