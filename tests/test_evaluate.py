"""Numbers that can be trusted: metrics, intervals, paired tests, choices."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import common

import numpy as np
import pytest
import torch
from torch import nn

import engine
import evaluate
from tests.helpers import TINY, train

ROOT = Path(__file__).parent.parent
ONE_EPOCH = ["--epochs", "1", "--learning-rate", "0.005"]  # right on some photos, wrong on others


def run_evaluate(photos, *flags):
    evaluate.main(["--data", str(photos), "--device", "cpu", *flags])


def choose(photos):
    """Choose, measure on test, compare; return the content of summary.json."""
    run_evaluate(photos, "--chosen")
    return common.read_json("results/summary.json")


def change_run(run, **values):
    """Write other values into the JSON of a finished run."""
    path = Path("results/runs", f"{run}.json")
    common.write_json(path, {**common.read_json(path), **values})


# Metrics


def certain(predicted, classes):
    """Probabilities float [N, classes] of a network without doubt."""
    return np.eye(classes)[predicted]


def test_metrics_of_a_hand_worked_example():
    labels, predicted = np.array([0, 0, 0, 0, 1, 1, 2, 2]), np.array([0, 0, 0, 1, 1, 0, 0, 1])
    result = evaluate.metrics(labels, certain(predicted, 3), ["a", "b", "c"])
    assert result["confusion_matrix"] == [[3, 1, 0], [1, 1, 0], [1, 1, 0]]
    assert result["accuracy"] == 0.5
    assert result["per_class"]["a"] == {
        "precision": pytest.approx(3 / 5),
        "recall": pytest.approx(3 / 4),
        "f1": pytest.approx(2 / 3),
        "support": 4,
    }
    assert result["per_class"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "support": 2}


def test_top3_accuracy_of_a_hand_worked_example():
    row = [0.4, 0.3, 0.2, 0.07, 0.03]
    result = evaluate.metrics(np.arange(5), np.array([row] * 5), list("abcde"))
    assert result["accuracy"] == 1 / 5 and result["top3_accuracy"] == 3 / 5
    undecided = evaluate.metrics(np.array([0, 0]), np.full((2, 5), 0.2), list("abcde"))
    assert undecided["top3_accuracy"] >= undecided["accuracy"]


def test_metrics_agree_with_a_slow_count_on_random_input():
    random = np.random.default_rng(0)
    labels, predicted = random.integers(0, 5, 300), random.integers(0, 4, 300)
    result = evaluate.metrics(labels, certain(predicted, 5), list("abcde"))
    for true in range(5):
        both = sum(a == b == true for a, b in zip(labels, predicted, strict=True))
        said, is_ = sum(predicted == true), sum(labels == true)
        values = result["per_class"]["abcde"[true]]
        assert values["recall"] == pytest.approx(both / is_)
        assert values["precision"] == pytest.approx(both / said if said else 0)
        for other in range(5):
            count = sum(a == true and b == other for a, b in zip(labels, predicted, strict=True))
            assert result["confusion_matrix"][true][other] == count


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [  # Newcombe, Statistics in Medicine 1998, table I
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_of_known_cases(hits, total, low, high):
    assert evaluate.wilson_interval(hits / total, total) == pytest.approx((low, high), abs=1e-4)


def test_an_activation_map_is_bright_where_the_class_is():
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model[0].weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0]])[:, :, None, None]
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0, 1, 2] = images[1, 1, 3, 0] = 5  # red: class 0, green: class 1
    for frozen in (False, True):
        maps = evaluate.activation_maps(model.requires_grad_(not frozen), images, nullcontext())
        assert torch.equal(maps, (images.sum(1) > 0).float())


# Comparisons


def right(both, first_only, second_only, neither):
    """Two bool [photos] of which so many are right for both, one or none."""
    counts = [both, first_only, second_only, neither]
    return np.repeat([True, True, False, False], counts), np.repeat([True, False] * 2, counts)


def test_mcnemar_of_hand_worked_cases():
    first, second = right(3, 6, 1, 0)
    difference, (low, high), p_value = evaluate.mcnemar(first, second)
    assert difference == 0.5 and low < 0.5 < high
    assert p_value == pytest.approx(2 * (1 + 7) / 2**7)  # at most 1 of 7 coins shows a head
    assert evaluate.mcnemar(first, first) == (0.0, [0.0, 0.0], 1.0)
    # Clopper and Pearson's 95% interval of 8 in 20 is 0.1912 to 0.6395.
    _, interval, _ = evaluate.mcnemar(*right(20, 8, 12, 0))
    assert interval == pytest.approx([(2 * 0.1912 - 1) / 2, (2 * 0.6395 - 1) / 2], abs=1e-4)


@pytest.mark.parametrize("gains", range(0, 40, 3))
def test_the_interval_of_a_difference_excludes_zero_where_the_paired_test_does(gains):
    difference, (low, high), p_value = evaluate.mcnemar(*right(0, gains, 20, 55))
    assert low <= difference <= high
    assert (low > 0 or high < 0) == (p_value < 0.05)


def test_several_seeds_are_compared_together():
    random = np.random.default_rng(0)
    first, second = random.random((3, 300)) < 0.8, random.random((3, 300)) < 0.6
    line = evaluate.paired_difference(first, second)
    assert line["difference"] == pytest.approx(first.mean() - second.mean())
    low, high = line["interval_95"]
    assert 0 < low < line["difference"] < high < 0.3
    assert line["different"] and line["p_value"] < 0.01 and "3 seeds" in line["method"]
    swapped = evaluate.paired_difference(second, first)
    assert swapped["difference"] == -line["difference"]
    assert swapped["interval_95"] == pytest.approx([-high, -low])
    same = evaluate.paired_difference(first, first)
    assert same["p_value"] == 1 and same["interval_95"] == [0, 0] and not same["different"]


@pytest.mark.parametrize("freedom, limit", [(1, 12.706), (2, 4.303), (10, 2.228), (1000, 1.962)])
def test_student_t_has_its_known_limits(freedom, limit):
    t, beyond = evaluate.student_t(freedom)
    assert np.interp(limit, t, beyond) == pytest.approx(0.05, abs=1e-4)
    assert beyond[0] == pytest.approx(1) and (np.diff(t) > 0).all() and (np.diff(beyond) <= 0).all()


@pytest.mark.parametrize("spread", [0, 0.03])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_equal_models_are_seldom_called_different(seeds, spread):
    random, alarms = np.random.default_rng(0), 0
    for _ in range(400):
        # Photos are easy or hard, each model finds some of its own easier, seeds have luck: equal.
        ease = random.random((2, 1, 250)) * 0.5 + random.random(250) * 0.5
        ease = ease + random.normal(0, spread, (2, seeds, 1))
        first, second = random.random((2, seeds, 250)) < ease
        alarms += evaluate.paired_difference(first, second)["different"]
    assert alarms / 400 < 0.08


def test_seeds_of_the_study_are_averaged_and_all_compared(photos):
    seeds = ["--seed", "0", "1", "2"]
    train(photos, *ONE_EPOCH, *seeds)
    train(photos, *ONE_EPOCH, *seeds, "--model", "residual")
    summary = choose(photos)
    plain, residual = summary["models"]
    assert [len(row["runs"]) for row in (plain, residual)] == [3, 3]
    for row in (plain, residual):
        evaluations = [evaluate.read_evaluation("results", name) for name in row["runs"]]
        accuracies = [evaluation["accuracy"] for evaluation in evaluations]
        assert row["test_accuracy"] == pytest.approx(np.mean(accuracies))
        assert row["test_spread"] == pytest.approx(np.std(accuracies, ddof=1))
        low, high = row["test_interval_95"]
        assert low <= row["test_accuracy"] <= high
        assert row["gap"] == pytest.approx(row["validation_accuracy"] - row["test_accuracy"])
    [line] = summary["comparisons"]
    assert (line["a"], line["b"]) == (plain["label"], residual["label"])
    assert "3 seeds" in line["method"]
    assert line["difference"] == pytest.approx(plain["test_accuracy"] - residual["test_accuracy"])
    assert line["interval_95"][0] <= line["difference"] <= line["interval_95"][1]


def test_models_are_compared_on_the_seeds_that_both_have(photos):
    train(photos, *ONE_EPOCH, "--seed", "0", "1", "2")
    train(photos, *ONE_EPOCH, "--seed", "1", "2", "--model", "residual")
    summary = choose(photos)
    plain, residual = (
        np.mean(
            [evaluate.read_evaluation("results", name)["accuracy"] for name in row["runs"][-2:]]
        )
        for row in summary["models"]
    )
    assert summary["comparisons"][0]["difference"] == pytest.approx(plain - residual)
    assert "2 seeds" in summary["comparisons"][0]["method"]


# Choices


def fake(rate, batch, accuracy, loss, seed=0):
    best = {"validation_accuracy": accuracy, "validation_loss": loss, "epoch": 1}
    return {"config": {"learning_rate": rate, "batch_size": batch, "seed": seed}, "best": best}


def test_the_choice_is_by_mean_validation_accuracy_then_loss():
    lucky = [fake(0.1, 32, 0.9, 1, seed=0), fake(0.1, 32, 0.1, 1, seed=1)]
    steady = [fake(0.2, 64, 0.6, 1, seed=0), fake(0.2, 64, 0.6, 1, seed=1)]
    assert engine.best_setting(lucky + steady) == (0.2, 64)
    assert engine.best_setting([fake(1, 32, 0.5, 2), fake(2, 32, 0.5, 1)]) == (2, 32)
    failed, other_seed = {**fake(1, 32, 0, 0), "best": None}, fake(1, 32, 1.0, 0, seed=1)
    assert engine.best_setting([failed, other_seed, fake(2, 32, 0.5, 1)]) == (2, 32)


def test_seeds_that_repeat_the_choice_have_no_say_in_it(photos):
    grid = [fake(0.1, 32, 0.6, 1), fake(0.2, 32, 0.5, 1)]
    repeats = [fake(0.1, 32, 0.2, 1, seed=seed) for seed in (1, 2)]
    assert engine.choosing_seeds(grid + repeats) == {0}
    assert engine.best_setting(grid + repeats) == (0.1, 32)
    train(photos, *ONE_EPOCH, "--learning-rate", "0.01", "0.02")
    train(photos, *ONE_EPOCH, "--best-of-grid", "--seed", "1", "2")
    [row] = choose(photos)["models"]
    assert row["seeds"] == [0, 1, 2] and row["fresh_seeds"] == [1, 2]
    runs = common.read_runs("results")
    expected = np.mean([runs[name]["best"]["validation_accuracy"] for name in row["runs"][1:]])
    assert row["fresh_validation_accuracy"] == pytest.approx(expected)
    accuracies = [evaluate.read_evaluation("results", name)["accuracy"] for name in row["runs"][1:]]
    assert row["fresh_test_accuracy"] == pytest.approx(np.mean(accuracies))


def test_the_slope_per_doubling_is_that_of_the_accuracies():
    random = np.random.default_rng(0)
    ease, sizes = random.random(4000), np.array([25, 50, 100, 200])
    right = np.array([ease < 0.3 + 0.05 * np.log2(size / 25) for size in sizes])
    found = evaluate.slope_per_doubling(sizes, right)
    low, high = found["interval_95"]
    assert found["slope"] == pytest.approx(np.polyfit(np.log2(sizes), right.mean(1), 1)[0])
    assert low < found["slope"] < high and 0.004 < high - low < 0.02


def test_runs_on_fewer_photos_stand_apart_with_their_slope(photos):
    train(photos, *ONE_EPOCH, "--learning-rate", "0.01", "0.02")
    for count in ("4", "7"):
        train(photos, *ONE_EPOCH, "--best-of-grid", "--train-photos", count)
    summary = choose(photos)
    assert [row["photos_per_class"] for row in summary["sizes"]] == [4, 7, 14]
    assert all(row["fresh_seeds"] == [] for row in summary["sizes"])
    assert len(summary["models"]) == 1 and len(summary["grid"]) == 2 and not summary["left_out"]
    assert [line["label"] for line in summary["slopes"]] == ["plain CNN"]


def test_of_equally_good_models_the_first_is_taken():
    rows = [
        {"kind": "scratch", "label": label, "validation_accuracy": accuracy}
        for label, accuracy in (("low", 0.5), ("first", 0.9), ("second", 0.9))
    ]
    assert common.best_models(rows) == {"scratch": rows[1]}


def test_the_whole_study_from_the_grid_to_the_summary(photos, capsys):
    train(photos, "--learning-rate", "0.002", "0.004")
    train(photos, "--best-of-grid", "--dropout", "0.2")
    summary = choose(photos)
    assert len(summary["grid"]) == 2 and len(summary["dropout"]) == 2
    assert summary["failed"] == summary["left_out"] == []
    [choice] = summary["choices"]["plain"]
    first, second = summary["grid"]  # both have learned all there is: the loss decides
    assert first["validation_accuracy"] == second["validation_accuracy"] == 1.0
    assert choice == min(summary["grid"], key=lambda line: line["validation_loss"])
    row = summary["models"][0]
    assert row["runs"] == [choice["run"]] and row["label"] == "plain CNN"
    result = common.read_json(f"results/evaluations/{choice['run']}.test.json")
    hits = [p["label"] == p["predicted"] for p in result["predictions"]]
    assert row["test_accuracy"] == result["accuracy"] == np.mean(hits) == 1.0
    assert len(hits) == np.trace(result["confusion_matrix"]) == 15
    classes = [result["predictions"][e["photo"]]["label"] for e in result["activation_maps"]]
    assert sorted(classes) == [0, 1, 2]  # all right: the most confident photo of each class
    for example in result["activation_maps"]:
        assert np.shape(example["map"]) == (2, 2) and np.max(example["map"]) in (0, 1)
    [line] = summary["comparisons"]
    assert line["method"] == "exact McNemar test of one run each" and not line["different"]
    table = capsys.readouterr().out
    assert evaluate.format_accuracy(row, "test") in table and "plain CNN (dropout 0.2)" in table


def test_an_evaluation_is_made_once_for_the_same_weights_and_photos(photos):
    train(photos, *ONE_EPOCH, "--name", "one")
    run_evaluate(photos, "--run", "one")
    path = Path("results/evaluations/one.validation.json")
    before = path.stat().st_ino
    run_evaluate(photos, "--run", "one")
    assert path.stat().st_ino == before
    for file in Path("results").glob("*/one.[pj][ts]*"):
        file.unlink()
    train(photos, *ONE_EPOCH, "--name", "one", "--seed", "1")
    run_evaluate(photos, "--run", "one")
    assert path.stat().st_ino != before


def test_best_is_the_best_by_validation(photos, capsys):
    train(photos, *ONE_EPOCH, "--name", "poor")
    train(photos, *ONE_EPOCH, "--name", "rich", "--model", "residual")
    for name, accuracy in (("poor", 0.1), ("rich", 0.9)):
        best = common.read_runs("results")[name]["best"]
        change_run(name, best={**best, "validation_accuracy": accuracy})
    capsys.readouterr()
    run_evaluate(photos, "--best")
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("rich  validation accuracy")
    assert [path.name for path in Path("results/evaluations").iterdir()] == ["rich.validation.json"]
    assert not Path("results/summary.json").exists()


def test_runs_of_other_photos_or_settings_are_left_out_by_name(photos, tmp_path, capsys):
    other = shutil.copytree(photos, tmp_path / "other")
    (other / "train" / "red" / "0.jpg").unlink()
    train(photos, *ONE_EPOCH, "--seed", "0", "1")
    train(photos, *ONE_EPOCH, "--seed", "1", "--name", "the-same-again")
    train(photos, "--epochs", "2", "--name", "longer")
    train(other, *ONE_EPOCH, "--name", "of-other-photos")
    lost = ["--optimizer", "adamw", "--learning-rate", "1e30", "--name", "others-failed"]
    train(other, "--epochs", "1", *lost)
    summary = choose(photos)
    assert summary["left_out"] == ["longer", "of-other-photos", "others-failed", "the-same-again"]
    assert "study: longer, of-other-photos, others-failed" in capsys.readouterr().out
    assert summary["models"][0]["seeds"] == [0, 1]


def test_the_study_is_that_on_the_photos_given(photos, tmp_path):
    other = shutil.copytree(photos, tmp_path / "other")
    (other / "train" / "red" / "0.jpg").unlink()
    train(photos, *ONE_EPOCH, "--seed", "0", "1")
    train(other, *ONE_EPOCH, "--name", "of-other-photos")
    assert choose(other)["models"][0]["runs"] == ["of-other-photos"]
    run_evaluate(other, "--best")
    assert Path("results/evaluations/of-other-photos.validation.json").exists()
    with pytest.raises(SystemExit, match="was trained on other photos"):  # a training photo less
        run_evaluate(photos, "--run", "of-other-photos", "--split", "test")


def test_a_failed_run_is_named_and_never_chosen(photos, capsys):
    flags = ["--optimizer", "adamw", "--epochs", "2"]
    train(photos, *flags, "--learning-rate", "1e30", "0.002")
    [lost] = [run for run in common.read_runs("results").values() if "failed" in run]
    assert lost["best"] is None and "not finite" in lost["failed"]
    summary = choose(photos)
    assert summary["failed"] == [{"run": lost["name"], "reason": lost["failed"]}]
    assert f"failed: {lost['name']}, the loss is not finite" in capsys.readouterr().out
    assert [line["learning_rate"] for line in summary["choices"]["plain"]] == [0.002]
    assert {line["learning_rate"] for line in summary["grid"]} == {0.002, 1e30}
    train(photos, *flags, "--best-of-grid", "--dropout", "0.2", "--name", "dropped")
    assert common.read_runs("results")["dropped"]["config"]["learning_rate"] == 0.002
    with pytest.raises(SystemExit, match="has failed, the loss is not finite"):
        run_evaluate(photos, "--run", lost["name"])
    train(photos, *flags, "--learning-rate", "1e30")
    assert "failed before, the loss is not finite" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--run typo: results/runs has dropped, plain"):
        run_evaluate(photos, "--run", "typo")


def test_a_study_in_which_all_runs_failed_is_one_clear_line(photos):
    train(photos, "--optimizer", "adamw", "--learning-rate", "1e30")
    with pytest.raises(SystemExit, match="no run without dropout, on all photos"):
        choose(photos)


# What does not belong together, or is damaged


def test_other_photos_are_refused_or_measured_into_a_file_of_their_own(photos, tmp_path):
    train(photos, *ONE_EPOCH, "--name", "one")
    run_evaluate(photos, "--run", "one", "--split", "test")
    [path] = Path("results/evaluations").iterdir()
    before = path.read_bytes()
    other = shutil.copytree(photos, tmp_path / "other")
    for split in ("validation", "test"):
        (other / split / "red" / "0.jpg").unlink()
    flags = ["--run", "one", "--split", "test"]
    with pytest.raises(SystemExit, match="one was trained on other photos than those in .*other"):
        run_evaluate(other, *flags)
    run_evaluate(other, *flags, "--other-photos")
    assert path.read_bytes() == before
    [new] = set(Path("results/evaluations").iterdir()) - {path}
    assert len(common.read_json(new)["predictions"]) == 14
    for split in ("train", "validation", "test"):
        (other / split / "red").rename(other / split / "rose")
    with pytest.raises(SystemExit, match="trained on the classes blue, green, red"):
        run_evaluate(other, *flags, "--other-photos")


def test_a_test_photo_more_is_measured_anew(photos, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "copy")
    train(copy, *ONE_EPOCH, "--dropout", "0", "0.2")
    choose(copy)
    shutil.copy(copy / "train" / "red" / "0.jpg", copy / "test" / "red" / "new.jpg")
    first, second = common.read_runs("results")
    run_evaluate(copy, "--run", first, "--split", "test")  # one knows the new photo, one does not
    summary = choose(copy)
    assert len(evaluate.read_evaluation("results", second)["predictions"]) == 16
    assert len(summary["comparisons"]) == 1


def test_models_measured_on_different_photos_are_not_compared(photos, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "copy")
    train(copy, *ONE_EPOCH, "--dropout", "0", "0.2")
    first, second = common.read_runs("results")
    run_evaluate(copy, "--run", first, "--split", "test")
    for photo in list(copy.glob("test/*/*.jpg")):
        photo.rename(photo.with_name(f"new-{photo.name}"))
    run_evaluate(copy, "--run", second, "--split", "test")
    run_evaluate(copy, "--chosen", "--split", "validation")
    assert common.read_json("results/summary.json")["comparisons"] == []


def test_a_damaged_checkpoint_is_one_clear_line(photos):
    train(photos, *ONE_EPOCH, "--name", "one")
    path = Path("results/checkpoints/one.pt")
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (b"", content[: len(content) // 2], b"\0" * 1000, flipped):
        path.write_bytes(damaged)
        with pytest.raises(SystemExit, match="one.pt is damaged"):
            run_evaluate(photos, "--run", "one")
    path.unlink()
    with pytest.raises(SystemExit, match="no checkpoint"):
        run_evaluate(photos, "--run", "one")


@pytest.mark.parametrize(
    "flags", [["--run", "../one"], ["--run", "a/b"], ["--chosen", "--flip"], []]
)
def test_a_bad_command_line_is_one_clear_line(photos, capsys, flags):
    with pytest.raises(SystemExit) as error:
        run_evaluate(photos, *flags)
    assert error.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_name_inside_a_run_file_leads_nowhere_else(photos, tmp_path):
    """Results may come from others; --chosen must not write beside them."""
    train(photos, *ONE_EPOCH, "--name", "one")
    for folder, suffix in (("runs", "json"), ("checkpoints", "pt")):
        Path(tmp_path, "evil").mkdir(exist_ok=True)
        shutil.copy(f"results/{folder}/one.{suffix}", f"evil/x.{suffix}")
    change_run("one", name="../../evil/x")
    before = sorted(Path("evil").iterdir())
    with pytest.raises(SystemExit, match="one.json"):
        choose(photos)
    assert sorted(Path("evil").iterdir()) == before


# Any photos


def test_image_takes_files_and_folders_and_goes_on_past_a_bad_file(photos, tmp_path, capsys):
    train(photos, "--name", "one")
    train(photos, *ONE_EPOCH, "--name", "two")
    folder = shutil.copytree(photos / "test" / "green", tmp_path / "lunch" / "monday").parent
    (folder / "broken.jpg").write_bytes(b"no photo")
    (folder / "._hidden.jpg").write_bytes(b"what an archive of a Mac leaves")
    (folder / "notes.txt").write_text("no photo, and not called one")
    photo = photos / "test" / "blue" / "1.jpg"
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1 files could not be read"):
        run_evaluate(photos, "--run", "one", "two", "--image", str(folder), str(photo))
    model, *lines = capsys.readouterr().out.splitlines()
    assert model == "one:" and lines[7] == "two:" and len(lines) == 15
    assert lines[0].startswith(f"{folder / 'broken.jpg'}: not a readable photo")
    for line in lines[1:6]:
        assert line.startswith(f"{folder / 'monday'}") and ".jpg: green " in line
    assert lines[6].startswith(f"{photo}: blue ") and lines[6].count("%") == 3
    run_evaluate(photos, "--run", "one", "--image", str(photo), "--flip")
    assert f"{photo}: blue " in capsys.readouterr().out


def test_image_waits_for_no_pipe_in_a_folder(photos, tmp_path):
    train(photos, *ONE_EPOCH, "--name", "one")
    folder = shutil.copytree(photos / "test" / "green", tmp_path / "lunch")
    os.mkfifo(folder / "pipe.jpg")
    command = [sys.executable, str(ROOT / "evaluate.py"), "--run", "one", "--device", "cpu"]
    command += ["--image", str(folder)]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    assert printed.count("green") >= 5


def test_flip_is_the_mean_of_photo_and_mirror_image(photos):
    train(photos, *ONE_EPOCH, "--name", "one")
    run_evaluate(photos, "--run", "one", "--flip")
    assert common.read_json("results/evaluations/one.validation-flip.json")["flip"] is True
    model, _ = evaluate.load_model("results", "one", torch.device("cpu"))
    images = torch.rand(4, 3, 32, 32)
    both = [evaluate.predict(model, view, nullcontext()) for view in (images, images.flip(3))]
    flipped = evaluate.predict(model, images, nullcontext(), flip=True)
    torch.testing.assert_close(flipped, torch.stack(both).mean(0))


def test_names_that_are_no_utf8_pass_through_a_terminal_that_knows_ascii_only(photos, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "copy")
    bad = Path(os.fsdecode(os.fsencode(copy) + b"/lunch-\xe9.jpg"))
    try:
        bad.write_bytes(b"no photo")
    except OSError:
        pytest.skip("this file system takes no such name")
    for split in ("train", "validation", "test"):
        folder = (copy / split / "red").rename(copy / split / "café")
        photo = (folder / "0.jpg").rename(folder / os.fsdecode(b"caf\xe9.jpg"))
        (copy / split / "green").rename(copy / split / os.fsdecode(b"th\xe9"))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}

    def command(script, *flags):
        words = [sys.executable, str(ROOT / script), *flags]
        return subprocess.run(words, capture_output=True, text=True, env=environment)

    place = ["--data", str(copy), "--device", "cpu"]
    trained = command("train_scratch.py", *place, *TINY, "--name", "one")
    assert trained.returncode == 0, trained.stderr
    evaluated = command("evaluate.py", *place, "--chosen")
    assert evaluated.returncode == 0, evaluated.stderr
    files = [p["file"] for p in evaluate.read_evaluation("results", "one")["predictions"]]
    assert "café/caf\udce9.jpg" in files
    for script in ("plot.py", "tools/report.py"):
        drawn = command(script)
        assert drawn.returncode == 0, drawn.stderr
    assert "th\\udce9" in Path("results/report.md").read_text()
    classified = command("evaluate.py", *place, "--run", "one", "--image", str(photo), str(bad))
    assert classified.returncode == 1 and "Traceback" not in classified.stderr
    assert "caf\\udce9.jpg: caf\\xe9 " in classified.stdout
    assert "lunch-\\udce9.jpg: not a readable photo" in classified.stdout
