"""Numbers that can be trusted: metrics and intervals, what is chosen, what is measured."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import engine
import evaluate
import train_scratch


def run(photos, flags):
    evaluate.main(["--data", str(photos), "--device", "cpu", *flags.split()])


def test_metrics_are_those_worked_out_by_hand():
    labels, predicted = np.array([[0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 0, 0, 1]])
    result = evaluate.metrics(labels, predicted, ["a", "b", "c"])
    assert result["confusion_matrix"] == [[3, 1, 0], [1, 1, 0], [1, 1, 0]]
    first = {"precision": 3 / 5, "recall": 3 / 4, "f1": 2 / 3}
    assert result["per_class"]["a"] == pytest.approx(first) and result["accuracy"] == 0.5
    assert result["per_class"]["c"] == dict.fromkeys(first, 0)


@pytest.mark.parametrize(("hits", "interval"), [(0, (0, 0.2775)), (8, (0.4902, 0.9433))])
def test_wilson_intervals_are_the_published_ones(hits, interval):
    assert evaluate.wilson_interval(hits / 10, 10) == pytest.approx(interval, abs=1e-4)


def test_the_interval_of_a_difference_tells_a_gain_from_luck():
    one, other = np.random.default_rng(0).random((2, 3, 500))
    gain = evaluate.difference(one < 0.8, other < 0.6)
    assert 0 < gain["interval_95"][0] < gain["difference"] < gain["interval_95"][1]
    assert np.prod(evaluate.difference(one < 0.8, other < 0.8)["interval_95"]) < 0  # low < 0 < high
    low, high = evaluate.difference(one[:1] < 0.8, other[:1] < 0.6)["interval_95"]
    error = np.subtract(one[0] < 0.8, other[0] < 0.6, dtype=float).std() / 500**0.5
    assert high - low == pytest.approx(3.92 * error, rel=0.05)


def test_the_lowest_seed_chooses_by_validation_and_dropout_has_no_say(capsys):
    def chosen_with(rate, accuracy, loss, rest="-seed0"):
        best = accuracy and {"validation_accuracy": accuracy, "validation_loss": loss}
        config = {"learning_rate": rate, "batch_size": 32, "seed": int(rest[-1])}
        name = f"plain-lr{rate}-bs32{rest}"
        engine.write_json(f"results/runs/{name}.json", dict(name=name, config=config, best=best))
        run("photos", "--settings plain")
        return capsys.readouterr().out.split()[1]

    assert chosen_with(0.01, 0.6, 1.0) == "0.01"
    assert chosen_with(0.02, 0.6, 0.9) == "0.02"
    assert chosen_with(0.04, 0.9, 0.1, "-seed1") == "0.02"
    assert chosen_with(0.05, 0.9, 0.1, "-dropout0.5-seed0") == "0.02"
    assert chosen_with(0.06, None, None) == "0.02"  # failed
    assert chosen_with(0.07, 0.7, 1.1) == "0.07"
    with pytest.raises(SystemExit, match="^.*epochs20 not in all plain.*$"):
        chosen_with(0.08, 0.1, 1.0, "-seed0-epochs20")


@pytest.fixture(scope="module")
def study(photos, tmp_path_factory):
    """Results: plain (one run not to be chosen, one that failed), with dropout, residual."""
    output = tmp_path_factory.mktemp("study")
    flags = f"--data {photos} --output {output} --cache {output} --image-size 32 --epochs 3 "
    flags += "--device cpu --optimizer adamw --cutmix 0 --crop-scale 0.6 --learning-rate 0.003 "
    for more in ("1e-9 1e9", "--dropout 0.3", "--model residual"):
        train_scratch.main((flags + more).split())
    return output


def test_the_chosen_are_measured_on_test_and_compared(photos, study):
    run(photos, f"--output {study} --chosen")
    summary = json.loads(Path(study, "summary.json").read_text())
    rows, pairs = summary["models"], {line["a"]: line["b"] for line in summary["comparisons"]}
    assert [row["label"] for row in rows] == ["plain", "plain, dropout 0.3", "residual"]
    assert pairs == {"plain, dropout 0.3": "plain", "residual": "plain"}
    assert rows[0]["runs"]["0"].startswith("plain-lr0.003-bs64-seed0")
    measured = json.loads(Path(study, f"evaluations/{rows[0]['runs']['0']}.test.json").read_text())
    right = [guess["label"] == guess["predicted"] for guess in measured["predictions"]]
    assert len(right) == 15 and np.trace(measured["confusion_matrix"]) == sum(right)
    assert np.mean(right) == measured["accuracy"] == rows[0]["test_accuracy"]
    assert measured["per_class"].keys() == {"blue", "green", "red"}


def test_any_photos_are_classified_and_what_is_none_is_named(photos, study, capsys):
    shutil.copytree(photos / "test/green", "lunch/monday")
    shutil.copytree("lunch/monday", "lunch/.hidden")
    Path("lunch/0.jfif").symlink_to(photos / "test/blue/0.jpg")
    Path("lunch/linked").symlink_to(photos / "test/red")
    Path("lunch/notes.txt").write_text("no photo")
    with pytest.raises(SystemExit, match=r"^[^\n]*\n.*lunch/notes.txt: .*$"):
        run(photos, f"--output {study} --best --image lunch")
    found = [" ".join(line.split()[:2]) for line in capsys.readouterr().out.splitlines()]
    assert found[:2] == ["lunch/0.jfif: blue", "lunch/linked/0.jpg: red"]
    assert len(found) == 11 and found[10] == "lunch/monday/4.jpg: green"


def test_other_photos_than_a_run_was_trained_on_are_refused(photos, study):
    shutil.copytree(photos, "other")
    Path("other/train/red/0.jpg").unlink()
    with pytest.raises(SystemExit, match="^.* was trained on other photos than those in other$"):
        run("other", f"--output {study} --chosen")


def test_a_damaged_checkpoint_is_one_line_and_no_code_of_any_is_run(photos, study):
    shutil.copytree(study, "results")
    name, content = next(iter(engine.read_runs("results").items()))
    file = engine.checkpoint_file("results", name)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemExit, match="^.* is damaged: .*$"):
        run(photos, f"--run {name}")
    code = type("Code", (), {"__reduce__": lambda self: (Path.touch, (Path("ran"),))})
    torch.save({"state": code()}, file)
    content["checkpoint_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    engine.write_json(f"results/runs/{name}.json", content)
    with pytest.raises(Exception, match="Weights only"):
        run(photos, f"--run {name}")
    assert not Path("ran").exists()
