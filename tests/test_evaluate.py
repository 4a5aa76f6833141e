"""Numbers that can be trusted: metrics, intervals, paired tests, choices."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import evaluate
import runs
import summary
import train_scratch
from tests.test_training import TINY


def test_metrics_of_a_hand_worked_example():
    labels, predicted = np.array([0, 0, 0, 0, 1, 1, 2, 2]), np.array([0, 0, 0, 1, 1, 0, 0, 1])
    result = evaluate.metrics(labels, predicted, ["a", "b", "c"])
    assert result["confusion_matrix"] == [[3, 1, 0], [1, 1, 0], [1, 1, 0]]
    assert result["accuracy"] == 0.5
    assert result["per_class"]["a"] == {
        "precision": pytest.approx(3 / 5),
        "recall": pytest.approx(3 / 4),
        "f1": pytest.approx(2 / 3),
        "support": 4,
    }
    assert result["per_class"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "support": 2}


def test_metrics_agree_with_a_slow_count_on_random_input():
    random = np.random.default_rng(0)
    labels, predicted = random.integers(0, 5, 300), random.integers(0, 4, 300)
    result = evaluate.metrics(labels, predicted, list("abcde"))
    for true in range(5):
        both = sum(a == b == true for a, b in zip(labels, predicted, strict=True))
        said, is_ = sum(predicted == true), sum(labels == true)
        values = result["per_class"]["abcde"[true]]
        assert values["recall"] == pytest.approx(both / is_)
        assert values["precision"] == pytest.approx(both / said if said else 0)
        for other in range(5):
            count = sum(a == true and b == other for a, b in zip(labels, predicted, strict=True))
            assert result["confusion_matrix"][true][other] == count


def test_wilson_interval_of_known_cases():
    # Newcombe, Statistics in Medicine 1998, table I: 81/263, 15/148, 0/20, 1/29
    for hits, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert runs.wilson_interval(hits / total, total) == pytest.approx((low, high), abs=1e-4)


def test_mcnemar_of_hand_worked_cases():
    first, second = [True] * 6 + [False] + [True] * 3, [False] * 6 + [True] * 4
    difference, (low, high), p_value = summary.mcnemar(first, second)
    assert difference == 0.5 and low < 0.5 < high
    assert p_value == pytest.approx(2 * (1 + 7) / 2**7)  # at most 1 of 7 coins shows a head
    assert summary.mcnemar(first, first) == (0.0, [0.0, 0.0], 1.0)
    # Clopper and Pearson's 95% interval of 8 in 20 is 0.1912 to 0.6395.
    first, second = [True] * 8 + [False] * 12 + [True] * 20, [False] * 8 + [True] * 32
    assert summary.mcnemar(first, second)[1] == pytest.approx(
        [(2 * 0.1912 - 1) / 2, (2 * 0.6395 - 1) / 2], abs=1e-4
    )


@pytest.mark.parametrize("gains", range(0, 40, 3))
def test_the_interval_of_a_difference_excludes_zero_where_the_paired_test_does(gains):
    first = [True] * gains + [False] * (20 + 55)
    second = [False] * gains + [True] * 20 + [False] * 55
    difference, (low, high), p_value = summary.mcnemar(first, second)
    assert low <= difference <= high
    assert (low > 0 or high < 0) == (p_value < 0.05)


def fake(rate, batch, accuracy, loss, seed=0):
    best = {"validation_accuracy": accuracy, "validation_loss": loss, "epoch": 1}
    return {"config": {"learning_rate": rate, "batch_size": batch, "seed": seed}, "best": best}


def test_the_choice_is_by_mean_validation_accuracy_then_loss():
    lucky = [fake(0.1, 32, 0.9, 1, seed=0), fake(0.1, 32, 0.1, 1, seed=1)]
    steady = [fake(0.2, 64, 0.6, 1, seed=0), fake(0.2, 64, 0.6, 1, seed=1)]
    assert runs.best_setting(lucky + steady) == (0.2, 64)
    assert runs.best_setting([fake(1, 32, 0.5, 2), fake(2, 32, 0.5, 1)]) == (2, 32)
    assert runs.best_setting([fake(1, 32, 0.5, None), fake(2, 32, 0.5, 1)]) == (2, 32)


def test_an_activation_map_is_bright_where_the_class_is():
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model[0].weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0]])[:, :, None, None]
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0, 1, 2] = images[1, 1, 3, 0] = 5  # red: class 0, green: class 1
    for frozen in (False, True):
        maps = evaluate.activation_maps(model.requires_grad_(not frozen), images, nullcontext())
        assert torch.equal(maps, (images.sum(1) > 0).float())


def test_evaluation_summary_and_classification_of_a_real_run(photos, capsys):
    common = ["--data", str(photos)]
    for rate in ("0.01", "0.02"):
        train_scratch.main([*common, *TINY, "--learning-rate", rate])
    train_scratch.main([*common, *TINY, "--best-of-grid", "--dropout", "0.2"])
    summary.main([])
    evaluate.main([*common, "--chosen", "--split", "test", "--device", "cpu"])
    summary.main([])
    content = runs.read_json("results/summary.json")
    assert len(content["grid"]) == 2 and len(content["dropout"]) == 2
    (choice,) = content["choices"]["plain"]
    row = next(row for row in content["models"] if row["runs"] == [choice["run"]])
    result = runs.read_json(f"results/evaluations/{choice['run']}.test.json")
    assert row["test_accuracy"] == result["accuracy"] and len(result["predictions"]) == 15
    hits = [p["label"] == p["predicted"] for p in result["predictions"]]
    assert sum(hits) / 15 == result["accuracy"] == 1.0
    assert np.trace(result["confusion_matrix"]) == 15
    classes = [result["predictions"][e["photo"]]["label"] for e in result["activation_maps"]]
    assert sorted(classes) == [0, 1, 2]  # all right: the most confident photo of each class
    for example in result["activation_maps"]:
        assert np.shape(example["map"]) == (2, 2) and np.max(example["map"]) in (0, 1)
    assert len(content["comparisons"]) == 1 and not content["comparisons"][0]["different"]
    capsys.readouterr()
    photo = str(photos / "test" / "green" / "1.jpg")
    evaluate.main([*common, "--run", choice["run"], "--image", photo, "--device", "cpu"])
    assert capsys.readouterr().out.split(": ")[1].startswith("green ")


def test_a_diverged_run_can_be_evaluated_and_summarised(photos):
    flags = ["--data", str(photos), *TINY, "--epochs", "1", "--optimizer", "adamw"]
    train_scratch.main([*flags, "--learning-rate", "1e30", "--name", "lost"])
    summary.main([])
    evaluate.main(["--data", str(photos), "--chosen", "--split", "test", "--device", "cpu"])
    summary.main([])
    assert runs.read_json("results/summary.json")["models"][0]["test_accuracy"] <= 0.5


def test_runs_on_other_photos_are_not_taken_for_seeds():
    config = {"learning_rate": 1, "batch_size": 2, "seed": 0, "epochs": 2}
    members = [{"config": config, "data": {"fingerprint": f}} for f in ("a", "b", "b")]
    assert summary.largest_group(members, ("seed",)) == members[1:]
    longer = [member | {"config": config | {"epochs": 50}} for member in members[1:]]
    assert summary.largest_group([*members, *longer], ("seed",)) == longer


def test_a_damaged_checkpoint_is_one_clear_line(photos):
    train_scratch.main(["--data", str(photos), *TINY, "--epochs", "1", "--name", "one"])
    path = Path("results/checkpoints/one.pt")
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\0" * 1000):
        path.write_bytes(damaged)
        with pytest.raises(SystemExit, match="one.pt is damaged"):
            evaluate.main(["--data", str(photos), "--run", "one", "--device", "cpu"])
    shutil.rmtree("results/checkpoints")
    with pytest.raises(SystemExit, match="no checkpoint"):
        evaluate.main(["--data", str(photos), "--run", "one", "--device", "cpu"])
