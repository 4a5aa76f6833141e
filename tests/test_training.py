"""The loop learns, records what it did, and never repeats or loses finished work."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import evaluate
import finetune
import models
import optimizers
import runs
import train_scratch
from tools import run_queue

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = ["--image-size", "32", "--batch-size", "14", "--epochs", "6", "--device", "cpu"]
TINY += ["--crop-scale", "0.6", "--cutmix", "0", "--precision", "float32"]


def train(photos, *flags):
    train_scratch.main(["--data", str(photos), *TINY, *flags])
    return runs.read_runs("results")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("model", ["plain", "residual"])
def test_a_tiny_run_learns_a_separable_set(photos, model, optimizer):
    rate = {"muon": "0.02", "adamw": "0.002"}[optimizer]
    flags = ["--optimizer", optimizer, "--learning-rate", rate, "--weight-decay", "0.01"]
    (run,) = train(photos, "--model", model, *flags).values()
    assert run["best"]["validation_accuracy"] == 1.0


def test_the_json_has_what_it_promises(photos):
    ((name, run),) = train(photos).items()
    assert name == run["name"] and run["kind"] == "scratch"
    assert run["config"]["batch_size"] == 14 and run["config"]["learning_rate"] == 0.02
    assert set(run["data"]) == {"fingerprint", "classes", "counts"}
    assert run["data"]["counts"]["test"] == {"blue": 5, "green": 5, "red": 5}
    assert {"python", "torch", "torchvision", "device"} <= set(run["environment"])
    assert run["model"]["convolutions"] == 5 and run["model"]["linear_layers"] == 2
    assert [entry["epoch"] for entry in run["history"]] == [1, 2, 3, 4, 5, 6]
    assert set(run["history"][0]) == {
        "epoch",
        "learning_rate",
        "train_loss",
        "train_accuracy",
        "validation_loss",
        "validation_accuracy",
        "seconds",
    }
    key = max((e["validation_accuracy"], -e["validation_loss"], e["epoch"]) for e in run["history"])
    assert run["best"] == {
        "epoch": key[2],
        "validation_accuracy": key[0],
        "validation_loss": -key[1],
    }
    assert run["seconds"] > 0 and run["images_per_second"] > 0


def test_the_checkpoint_is_the_best_epoch(photos):
    ((name, run),) = train(photos, "--epochs", "3").items()
    model, checkpoint = evaluate.load_model("results", name, CPU)
    split = data.load_split(photos, "validation", 32)
    loss, accuracy = train_scratch.validate(
        model, data.Loader(split, 256, CPU), train_scratch.autocast(CPU, "float32")
    )
    assert accuracy == run["best"]["validation_accuracy"]
    assert loss == pytest.approx(run["best"]["validation_loss"], abs=1e-5)


def test_a_finished_run_is_skipped_unless_settings_or_photos_differ(photos, capsys):
    train(photos, "--epochs", "1")
    before = Path("results/runs").stat().st_mtime_ns
    train(photos, "--epochs", "1")
    assert "not run again" in capsys.readouterr().out
    assert Path("results/runs").stat().st_mtime_ns == before
    assert len(train(photos, "--epochs", "2")) == 2  # another name: nothing is overwritten


def test_training_is_reproducible(photos):
    train(photos, "--name", "a", "--epochs", "2")
    runs_ = train(photos, "--name", "b", "--epochs", "2")
    losses = [[entry["train_loss"] for entry in runs_[name]["history"]] for name in "ab"]
    assert losses[0] == losses[1]


def test_training_opens_no_photo_of_the_test_split(photos, monkeypatch):
    opened, read = [], data.decode
    monkeypatch.setattr(data, "decode", lambda path, size: opened.append(path) or read(path, size))
    train(photos, "--epochs", "1")
    finetune.main(["--data", str(photos), *FINETUNE, "--epochs", "1"])
    assert {path.parts[-3] for path in opened} == {"train", "validation"}


def test_the_best_of_the_grid_sets_learning_rate_and_batch_size(photos):
    train(photos, "--epochs", "1", "--learning-rate", "0.02")
    content = json.loads(next(Path("results/runs").iterdir()).read_text())
    content["config"] |= {"learning_rate": 0.5, "batch_size": 9}
    content["best"]["validation_accuracy"] = 1.01
    runs.write_json("results/runs/better.json", content)
    train(photos, "--epochs", "1", "--best-of-grid", "--dropout", "0.3", "--name", "dropped")
    config = runs.read_json("results/runs/dropped.json")["config"]
    assert (config["learning_rate"], config["batch_size"]) == (0.5, 9)
    with pytest.raises(SystemExit, match="no finished run"):
        train(photos, "--epochs", "7", "--best-of-grid")


FINETUNE = ["--image-size", "64", "--batch-size", "9", "--device", "cpu", "--weights", "none"]
FINETUNE += ["--precision", "float32", "--learning-rate", "0.01", "--dropout", "0", "--views", "2"]


def lively_weights(backbone):
    """A weights file of random weights whose features do differ from photo to photo."""
    network = models.load_torchvision(backbone, "none").train()
    for _ in range(20):  # sets the statistics of batch norm
        network(torch.rand(8, 3, 64, 64))
    torch.save(network.state_dict(), "lively.pth")
    return "lively.pth"


@pytest.mark.parametrize("backbone", runs.BACKBONES)
@pytest.mark.parametrize("count", ["0", "2"])
def test_training_on_kept_features_equals_ordinary_training(photos, backbone, count):
    flags = ["--data", str(photos), "--backbone", backbone, "--unfreeze-convolutions", count]
    flags += [*FINETUNE, "--epochs", "3", "--weights", lively_weights(backbone)]
    finetune.main([*flags, "--name", "kept"])
    finetune.main([*flags, "--name", "ordinary", "--feature-memory", "0"])
    results = runs.read_runs("results")
    states = [evaluate.load_model("results", name, CPU)[1]["state"] for name in results]
    for key, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][key], atol=2e-3, rtol=2e-3)
    for ours, theirs in zip(*(run["history"] for run in results.values()), strict=True):
        for key in ("train_loss", "validation_loss"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3)
    assert all(run["frozen_unchanged"] is True for run in results.values())


@pytest.mark.parametrize("count", ["0", "3"])
def test_fine_tuning_works_with_muon(photos, count):
    flags = ["--data", str(photos), *FINETUNE, "--epochs", "1", "--optimizer", "muon"]
    finetune.main([*flags, "--unfreeze-convolutions", count])
    assert len(runs.read_runs("results")) == 1


def test_several_learning_rates_are_runs_of_their_own(photos):
    flags = ["--data", str(photos), *FINETUNE, "--epochs", "1", "--learning-rate", "0.01", "0.02"]
    finetune.main(flags)
    rates = [run["config"]["learning_rate"] for run in runs.read_runs("results").values()]
    assert sorted(rates) == [0.01, 0.02]


def test_cutmix_pastes_a_square_and_reports_its_share():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 20, 20).clone()
    labels, generator = torch.arange(4), torch.Generator().manual_seed(1)
    mixed, other, share = train_scratch.cutmix(images, labels, 1.0, generator)
    assert torch.equal(other, labels.roll(1))
    kept = (mixed == labels[:, None, None, None]).float().mean((1, 2, 3))
    torch.testing.assert_close(kept, torch.full((4,), share))
    assert set(mixed[0].unique().tolist()) == {0.0, 3.0}


def test_muon_updates_are_nearly_orthogonal():
    torch.manual_seed(0)
    for shape in ((16, 40), (40, 16)):
        values = torch.linalg.svdvals(optimizers.orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.4


def test_adamw_takes_the_steps_of_torchs_class():
    ours, theirs = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    config = {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.0}
    [optimizer] = optimizers.build_optimizers(ours, config)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.0)
    for inputs in torch.randn(3, 4, 3):
        for model, one in ((ours, optimizer), (theirs, reference)):
            model.zero_grad()
            model(inputs).square().sum().backward()
            one.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_the_learning_rate_rises_and_falls():
    factors = [optimizers.learning_rate_factor(e, 10, 2) for e in (0, 1, 2, 6, 10)]
    assert factors == [0, 0.5, 1, 0.5, 0]


def test_divergence_is_recorded_as_json_without_infinity(photos):
    flags = ["--optimizer", "adamw", "--learning-rate", "1e12", "--epochs", "2"]
    (run,) = train(photos, *flags).values()
    assert run["history"][-1]["train_loss"] is None
    assert math.isfinite(run["best"]["validation_accuracy"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning-rat", "1"], "did you mean --learning-rate?"),
        (["--epochs", "0"], "not a whole number at least 1"),
        (["--dropout", "nan"], "not a number from 0 to 0.99"),
        (["--device", "cuda:99"], "--device cuda:99: not available here"),
        (["--data", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(photos, flags, message):
    command = [sys.executable, str(ROOT / "train_scratch.py"), "--data", str(photos), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(photos):
    train(photos, "--epochs", "1")
    before = sorted(path for path in Path("results").rglob("*") if path.is_file())
    resource = pytest.importorskip("resource")  # a limit on file size stands in for a full disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SystemExit, match="cannot be written .*kept"):
            train(photos, "--epochs", "1", "--seed", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == sorted(path for path in Path("results").rglob("*") if path.is_file())


def test_nothing_finished_is_overwritten(photos):
    train(photos, "--epochs", "1", "--name", "mine")
    with pytest.raises(SystemExit, match="other settings or photos"):
        train(photos, "--epochs", "2", "--name", "mine")
    for name in ("../mine", "a/b", "x" * 300, ""):
        with pytest.raises(SystemExit, match="is no name of a run"):
            train(photos, "--epochs", "1", "--name", name)
    assert len(runs.read_runs("results")["mine"]["history"]) == 1


def test_batches_of_one_photo_are_refused_in_one_line(photos):
    command = [sys.executable, str(ROOT / "train_scratch.py"), "--data", str(photos), *TINY]
    result = subprocess.run([*command, "--batch-size", "1"], capture_output=True, text=True)
    assert result.returncode == 1 and "larger --batch-size" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_queue_runs_commands_and_stops_at_a_failure(photos):
    common = f"--data {photos} --image-size 32 --epochs 1 --device cpu"
    good = f"python train_scratch.py {common} --name good"
    bad = "python train_scratch.py --data nowhere --name bad"
    late = f"python train_scratch.py {common} --best-of-grid --name late"
    for jobs in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-m", "tools.run_queue", "--jobs", jobs],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            input=f"{good}\n\n{bad}\n{late}\n",
            capture_output=True,
            text=True,
        )
        assert result.returncode != 0 and "nowhere: no such folder" in result.stderr
        assert set(runs.read_runs("results")) == {"good"}
    with pytest.raises(SystemExit, match="not a training command"):
        run_queue.parse("rm -r x")
