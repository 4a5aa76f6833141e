"""The loop learns, records what it did, and never repeats or loses finished work."""

import contextlib
import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import common

import pytest
import torch

import data
import engine
import evaluate
import finetune
import models
import train_scratch
from tests.helpers import TINY, default_signals, lively_weights, train

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
FINETUNE = ["--image-size", "64", "--batch-size", "9", "--device", "cpu", "--weights", "none"]
FINETUNE += ["--precision", "float32", "--learning-rate", "0.01", "--dropout", "0", "--views", "2"]


def without_seconds(run):
    return [{**epoch, "seconds": None} for epoch in run["history"]]


def state_of(name, output="results"):
    return evaluate.load_model(output, name, CPU)[1]["state"]


def assert_same_run(first, second):
    """Both runs, by name in results/, are the same bit for bit but for the seconds."""
    runs = common.read_runs("results")
    assert without_seconds(runs[first]) == without_seconds(runs[second])
    assert runs[first]["best"] == runs[second]["best"]
    other = state_of(second)
    for key, tensor in state_of(first).items():
        assert torch.equal(tensor, other[key]), key


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
    assert run["config"]["batch_size"] == 14 and run["config"]["learning_rate"] == 0.002
    assert set(run["data"]) == {"fingerprint", "classes", "counts"}
    assert run["data"]["counts"]["test"] == {"blue": 5, "green": 5, "red": 5}
    versions, machine = {"date", "python", "torch", "torchvision"}, {"device", "precision"}
    assert set(run["environment"]) == versions | machine | {"threads", "processes"}
    assert run["model"]["convolutions"] == 5 and run["model"]["linear_layers"] == 2
    assert [epoch["epoch"] for epoch in run["history"]] == [1, 2, 3, 4, 5, 6]
    keys = {f"{split}_{what}" for split in ("train", "validation") for what in ("loss", "accuracy")}
    assert set(run["history"][0]) == keys | {"epoch", "learning_rate", "seconds"}
    best = max(run["history"], key=lambda e: (e["validation_accuracy"], -e["validation_loss"]))
    assert run["best"].items() <= best.items()
    assert run["seconds"] > 0 and run["images_per_second"] > 0


def test_the_checkpoint_is_the_best_epoch(photos):
    ((name, run),) = train(photos, "--epochs", "3").items()
    model, _ = evaluate.load_model("results", name, CPU)
    loader = data.Loader(data.load_split(photos, "validation", 32), 64, CPU)
    loss, accuracy = engine.validate(model, loader, engine.autocast(CPU, "float32"))
    assert accuracy == run["best"]["validation_accuracy"]
    assert loss == pytest.approx(run["best"]["validation_loss"], rel=1e-4)


def test_every_combination_of_values_is_a_run_and_none_is_trained_twice(photos, capsys):
    flags = ["--epochs", "1", "--learning-rate", "0.01", "0.02", "--seed", "0", "1"]
    assert len(train(photos, *flags, "--batch-size", "7", "14", "--dropout", "0", "0.5")) == 16
    before = {path: path.stat().st_mtime_ns for path in Path("results/runs").iterdir()}
    capsys.readouterr()
    train(photos, *flags, "--batch-size", "14", "--dropout", "0", "--threads", "2")
    assert capsys.readouterr().out.count("finished before") == 4
    assert before == {path: path.stat().st_mtime_ns for path in Path("results/runs").iterdir()}
    assert len(train(photos, "--epochs", "2")) == 17  # another name: nothing is overwritten


def test_a_run_alone_and_among_others_is_the_same(photos):
    train(photos, "--epochs", "2", "--seed", "0", "1")
    train(photos, "--epochs", "2", "--seed", "1", "--name", "alone")
    assert_same_run("alone", "plain-lr0.002-bs14-seed1-epochs2-" + common_suffix())


def common_suffix():
    """What TINY adds to a run's name."""
    names = [name for name in common.read_runs("results") if "seed1" in name]
    return names[0].partition("epochs2-")[2]


def test_training_opens_no_photo_of_the_test_split(photos, monkeypatch):
    opened, read = [], data.decode
    monkeypatch.setattr(data, "decode", lambda path, size: opened.append(path) or read(path, size))
    train(photos, "--epochs", "1")
    finetune.main(["--data", str(photos), *FINETUNE, "--epochs", "1"])
    assert {path.parts[-3] for path in opened} == {"train", "validation"}


def test_the_best_of_the_grid_sets_learning_rate_and_batch_size(photos):
    train(photos, "--epochs", "1", "--learning-rate", "0.02")
    [run] = common.read_runs("results").values()
    run["config"] |= {"learning_rate": 0.5, "batch_size": 9}
    run["best"]["validation_accuracy"] = 1.01
    run["name"] = "better"
    common.write_json("results/runs/better.json", run)
    train(photos, "--epochs", "1", "--best-of-grid", "--dropout", "0.3", "--name", "dropped")
    config = common.read_runs("results")["dropped"]["config"]
    assert (config["learning_rate"], config["batch_size"]) == (0.5, 9)
    with pytest.raises(SystemExit, match="no finished run"):
        train(photos, "--epochs", "7", "--best-of-grid")


@pytest.mark.parametrize("backbone", models.BACKBONES)
@pytest.mark.parametrize("count", ["0", "2"])
def test_training_on_kept_features_equals_ordinary_training(photos, backbone, count):
    flags = ["--data", str(photos), "--backbone", backbone, "--unfreeze-convolutions", count]
    flags += [*FINETUNE, "--epochs", "3", "--weights", lively_weights(photos, backbone)]
    flags += ["--threads", "2"]  # with one, other batch sizes round otherwise, which Adam magnifies
    finetune.main([*flags, "--name", "kept"])
    finetune.main([*flags, "--name", "ordinary", "--feature-memory", "0"])
    runs, ordinary = common.read_runs("results"), state_of("ordinary")
    for key, tensor in state_of("kept").items():
        torch.testing.assert_close(tensor, ordinary[key], atol=2e-3, rtol=2e-3)
    for kept, other in zip(runs["kept"]["history"], runs["ordinary"]["history"], strict=True):
        for key in ("train_loss", "validation_loss"):
            assert kept[key] == pytest.approx(other[key], rel=1e-3)
    assert all(run["frozen_unchanged"] is True for run in runs.values())


def test_a_last_layer_learns_what_its_features_tell(photos):
    flags = ["--data", str(photos), "--backbone", "mobilenet_v3_small", *FINETUNE, "--epochs", "8"]
    flags += ["--learning-rate", "0.003", "--weights", lively_weights(photos, "mobilenet_v3_small")]
    finetune.main(flags)
    [run] = common.read_runs("results").values()
    assert run["best"]["validation_accuracy"] > 0.7  # by chance 0.33


def test_a_run_that_changed_what_is_frozen_is_not_kept(photos, monkeypatch):
    monkeypatch.setattr(models, "is_unchanged", lambda *_: False)
    with pytest.raises(SystemExit, match="a frozen tensor has changed"):
        finetune.main(["--data", str(photos), *FINETUNE, "--epochs", "1"])
    assert common.read_runs("results") == {}


@pytest.mark.parametrize("count", ["0", "3"])
def test_fine_tuning_works_with_muon_and_several_values(photos, count):
    flags = ["--data", str(photos), *FINETUNE, "--epochs", "1", "--optimizer", "muon"]
    flags += ["--learning-rate", "0.01", "0.02", "--seed", "0", "1"]
    finetune.main([*flags, "--unfreeze-convolutions", count])
    runs = common.read_runs("results").values()
    settings = {(run["config"]["learning_rate"], run["config"]["seed"]) for run in runs}
    assert settings == {(0.01, 0), (0.01, 1), (0.02, 0), (0.02, 1)}


def test_cutmix_pastes_a_square_and_mixes_the_targets_by_its_share():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 20, 20).clone()
    own = torch.arange(4)[:, None, None, None]
    torch.manual_seed(0)
    for square in engine.draw_squares(20, 1.0, 20, CPU):
        mixed, targets = engine.cutmix(images, torch.eye(4), square)
        kept = (mixed == own).float().mean((1, 2, 3))
        torch.testing.assert_close(targets, kept.diag() + (1 - kept).diag().roll(1, 0))
        assert set(mixed[0].unique().tolist()) <= {0.0, 3.0}


def test_cutmix_happens_with_its_probability():
    torch.manual_seed(0)
    squares = engine.draw_squares(1000, 0.3, 20, CPU)
    assert 250 < sum(square is not None for square in squares) < 350


def test_muon_updates_are_nearly_orthogonal():
    torch.manual_seed(0)
    for shape in ((16, 40), (40, 16), (16, 8, 3, 3)):
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape)
        engine.Muon([weight], lr=1.0, weight_decay=0.0, dtype=torch.bfloat16).step()
        update = weight.detach().flatten(1)
        values = torch.linalg.svdvals(update) / max(1, update.shape[0] / update.shape[1]) ** 0.5
        assert values.min() > 0.5 and values.max() < 1.4


@pytest.mark.parametrize("radius", [0, 0.5])
def test_a_step_takes_the_gradient_where_the_shifted_loss_is_highest_within_the_radius(radius):
    torch.manual_seed(0)
    model, inputs, labels = torch.nn.Linear(4, 3), torch.randn(8, 4), torch.arange(8) % 3
    shift, targets = torch.tensor([0.0, 1.0, -1.0]), torch.eye(3)[labels]

    def loss(weight, bias):
        logits = inputs @ weight.T + bias + shift
        return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)

    start = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    here = torch.autograd.grad(loss(*start), start)
    norm = sum(gradient.square().sum() for gradient in here).sqrt()
    moved = [w + radius * g / norm for w, g in zip(start, here, strict=True)]
    there = torch.autograd.grad(loss(*moved), moved)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "highest_lr": 0.2}], lr=1.0)
    engine.set_learning_rates([optimizer], torch.tensor(0.5))
    told, _ = engine.train_step(
        model, [optimizer], inputs, targets, shift, 1.0, radius, 0.1, contextlib.nullcontext()
    )
    torch.testing.assert_close(told, loss(*start).detach())
    for weight, before, gradient in zip(model.parameters(), start, there, strict=True):
        torch.testing.assert_close(weight.detach(), (before - 0.1 * gradient).detach())


def test_sam_is_of_the_last_epochs(photos):
    runs = train(photos, "--sam-share", "0", "--name", "none")
    for share in ("0.4", "1"):
        runs = train(photos, "--sam-share", share, "--name", share)
    losses = {name: [row["train_loss"] for row in run["history"]] for name, run in runs.items()}
    equal = [a == b for a, b in zip(losses["none"], losses["0.4"], strict=True)]
    # The loss of an epoch is that before each step, so also of the first epoch with SAM it differs.
    assert equal == [True, True, True, True, False, False]
    assert losses["1"][0] != losses["none"][0]


def test_rare_classes_are_expected_as_often_as_in_validation(photos):
    splits = [data.load_split(photos, split, 32) for split in ("train", "validation")]
    photos = engine.Photos(*splits, {})
    assert engine.logit_shift(photos, 1.0).tolist() == [0.0, 0.0, 0.0]
    twice = splits[0]._replace(labels=torch.tensor([0, 0, 1, 2]))
    expected = torch.tensor([3 / 2, 3 / 4, 3 / 4]).log()
    for strength in (0.5, 1.0):
        shift = engine.logit_shift(photos._replace(train=twice), strength)
        torch.testing.assert_close(shift, strength * expected)


def test_the_learning_rate_rises_and_falls():
    def factors(schedule):
        return [engine.learning_rate_factor(e, 10, 2, schedule) for e in (0, 1, 2, 6, 10)]

    assert factors("linear") == [0, 0.5, 1, 0.5, 0]
    assert factors("constant") == [0, 0.5, 1, 1, 1]


def command(photos, *flags):
    return [sys.executable, str(ROOT / "train_scratch.py"), "--data", str(photos), *TINY, *flags]


def launch(photos, *flags):
    return subprocess.Popen(
        command(photos, *flags), stderr=subprocess.PIPE, text=True, preexec_fn=default_signals
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning-rat", "1"], "did you mean --learning-rate?"),
        (["--epochs", "0"], "not a whole number at least 1"),
        (["--dropout", "nan"], "not a number from 0 to 0.99"),
        (["--device", "cuda:99"], "--device cuda:99: not available here"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--batch-size", "1"], "a larger --batch-size"),
        (["--name", "../mine"], "is no name of a run"),
        (["--name", "mine", "--seed", "0", "1"], "name one only"),
    ],
)
def test_bad_input_is_one_clear_line(photos, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        train(photos, *flags)
    said = capsys.readouterr().err if error.value.code == 2 else str(error.value)
    assert message in said and len(said.strip().splitlines()) == 1


def test_a_refusal_is_all_that_a_process_prints(photos):
    result = subprocess.run(command(photos, "--data", "no"), capture_output=True, text=True)
    assert result.returncode != 0 and result.stderr.startswith("no: no such folder")
    assert len(result.stderr.splitlines()) == 1 and not result.stdout


def files_in(output):
    """Files that hold results; locks hold nothing."""
    return sorted(p for p in Path(output).rglob("*") if p.is_file() and ".locks" not in p.parts)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(photos):
    train(photos, "--epochs", "1")
    before = files_in("results")
    resource = pytest.importorskip("resource")  # a limit on file size stands in for a full disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SystemExit, match="cannot be written .*kept"):
            train(photos, "--epochs", "1", "--seed", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == files_in("results")


def test_nothing_finished_is_overwritten(photos):
    train(photos, "--epochs", "1", "--name", "mine")
    with pytest.raises(SystemExit, match="other epochs"):
        train(photos, "--epochs", "2", "--name", "mine")
    assert len(common.read_runs("results")["mine"]["history"]) == 1


def test_a_device_without_memory_is_one_line_that_says_what_helps(photos, monkeypatch, capsys):
    def full_gpu(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB ...")

    def full_cpu(*_):
        torch.zeros(2**52)

    monkeypatch.setattr(engine, "train_one_epoch", full_gpu)
    with pytest.raises(torch.OutOfMemoryError) as in_training:
        train(photos)
    monkeypatch.setattr(finetune, "compute_features", full_cpu)
    with pytest.raises(RuntimeError) as in_features:
        finetune.main(["--data", str(photos), *FINETUNE])
    capsys.readouterr()
    with pytest.raises(MemoryError) as in_python:
        bytearray(2**60)
    for raised in (in_training, in_features, in_python):  # what Python calls as a script ends
        sys.excepthook(raised.type, raised.value, raised.tb)
        message = capsys.readouterr().err
        assert message.startswith("out of memory: choose a smaller --batch-size")
        assert "--feature-memory" in message and message.count("\n") == 1


def test_the_last_layer_alone_trains_on_single_photos(photos):
    finetune.main(["--data", str(photos), *FINETUNE, "--batch-size", "1", "--epochs", "1"])
    [run] = common.read_runs("results").values()
    assert run["config"]["batch_size"] == 1 and "failed" not in run


def test_deterministic_training_runs(photos):
    try:
        (run,) = train(photos, "--epochs", "1", "--deterministic", "--cutmix", "1").values()
        assert run["config"]["deterministic"] and torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


# What was interrupted goes on


class PowerCut(Exception):
    pass


def interrupted(monkeypatch, main, flags, epochs):
    """Call main(flags), and end it once `epochs` epochs are done."""
    validate, count = engine.validate, iter(range(epochs))

    def cut(*arguments):
        if next(count, None) is None:
            raise PowerCut
        return validate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "validate", cut)
        with pytest.raises(PowerCut):
            main(flags)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_interrupted_run_ends_bit_for_bit_where_it_would_have(
    photos, monkeypatch, capsys, optimizer
):
    flags = ["--data", str(photos), *TINY, "--cutmix", "0.5", "--dropout", "0.3"]
    flags += ["--optimizer", optimizer, "--learning-rate", "0.005", "--checkpoint-seconds", "0"]
    train_scratch.main([*flags, "--name", "whole"])
    for epochs in (1, 4, 5):
        name = f"cut{epochs}"
        interrupted(monkeypatch, train_scratch.main, [*flags, "--name", name], epochs)
        train_scratch.main([*flags, "--name", name])
        assert f"{name}: goes on after epoch {epochs}" in capsys.readouterr().out
        assert_same_run("whole", name)
    assert not list(Path("results/checkpoints").glob("*.unfinished"))


@pytest.mark.parametrize("memory", ["0", "4"])
def test_an_interrupted_fine_tuning_goes_on(photos, monkeypatch, capsys, memory):
    flags = ["--data", str(photos), *FINETUNE, "--epochs", "5", "--unfreeze-convolutions", "2"]
    flags += ["--backbone", "mobilenet_v3_small"]
    flags += ["--threads", "1", "--dropout", "0.2", "--feature-memory", memory]
    finetune.main([*flags, "--name", "whole"])
    flags += ["--name", "cut", "--checkpoint-seconds", "0"]
    interrupted(monkeypatch, finetune.main, flags, 3)
    finetune.main(flags)
    assert "goes on after epoch 3" in capsys.readouterr().out
    assert_same_run("whole", "cut")


def test_an_interrupted_fine_tuning_goes_on_with_less_memory(photos, monkeypatch, capsys):
    flags = ["--data", str(photos), *FINETUNE, "--epochs", "3", "--name", "cut"]
    flags += ["--backbone", "mobilenet_v3_small", "--checkpoint-seconds", "0"]
    interrupted(monkeypatch, finetune.main, flags, 1)
    finetune.main([*flags, "--feature-memory", "0"])
    assert "goes on after epoch 1" in capsys.readouterr().out


def test_a_run_goes_on_only_in_the_precision_it_began_in(photos, monkeypatch, capsys):
    flags = ["--data", str(photos), *TINY, "--precision", "auto", "--name", "cut"]
    flags += ["--checkpoint-seconds", "0"]
    monkeypatch.setattr(engine, "product_dtype", lambda *_: torch.float32)
    interrupted(monkeypatch, train_scratch.main, flags, 1)
    monkeypatch.setattr(engine, "product_dtype", lambda *_: torch.bfloat16)  # another machine
    interrupted(monkeypatch, train_scratch.main, flags, 0)
    printed = capsys.readouterr().out
    assert "of other settings" in printed and "goes on after" not in printed


def test_a_run_goes_on_only_with_the_network_it_began_with(photos, monkeypatch, capsys):
    flags = ["--data", str(photos), *TINY, "--name", "cut", "--checkpoint-seconds", "0"]
    interrupted(monkeypatch, train_scratch.main, flags, 1)
    monkeypatch.setattr(models.PlainCNN, "widths", (16, 16, 16, 16, 16))  # edited meanwhile
    train_scratch.main(flags)
    printed = capsys.readouterr().out
    assert "of other settings" in printed and "goes on after" not in printed


def test_a_state_that_does_not_belong_or_is_damaged_is_not_used(photos, monkeypatch, capsys):
    flags = ["--data", str(photos), *TINY, "--name", "cut", "--checkpoint-seconds", "0"]
    interrupted(monkeypatch, train_scratch.main, flags, 2)
    state = Path("results/checkpoints/cut.unfinished")
    content = bytearray(state.read_bytes())
    train_scratch.main([*flags, "--jitter", "0.1"])
    assert "of other settings" in capsys.readouterr().out
    Path("results/runs/cut.json").unlink()
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    train_scratch.main(flags)
    assert "is damaged and not used" in capsys.readouterr().out
    train(photos, "--name", "whole")
    assert_same_run("whole", "cut")


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_loses_no_finished_epoch(photos, ending):
    flags = ["--epochs", "4000", "--name", "long", "--checkpoint-seconds", "0"]
    with launch(photos, *flags) as process:
        state = Path("results/checkpoints/long.unfinished")
        while not state.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(ending)
        start = time.perf_counter()
        _, printed = process.communicate(timeout=20)
    assert time.perf_counter() - start < 2 and process.returncode != 0
    lines = printed.strip().splitlines()
    assert len(lines) == (0 if ending == signal.SIGKILL else 1)
    assert engine.read_state(state, None) is None  # whole, but of another run
    content = state.read_bytes().partition(b"\n")[2]
    assert torch.load(io.BytesIO(content), weights_only=True)["history"]


def test_two_processes_share_the_runs_of_a_grid(photos):
    flags = ["--epochs", "3", "--learning-rate", "0.01", "0.02", "0.04", "--seed", "0", "1"]
    both = [
        subprocess.Popen(command(photos, *flags), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "".join(printed).count("best validation accuracy") == 6
    assert len(common.read_runs("results")) == 6


def test_a_diverged_run_ends_at_once_and_the_grid_goes_on(photos):
    flags = ["--optimizer", "adamw", "--learning-rate", "1e30", "0.002", "--epochs", "3"]
    lost, good = train(photos, *flags).values()
    if "failed" in good:
        lost, good = good, lost
    assert lost["failed"] == "the loss is not finite in epoch 1, learning rate 1e+30"
    assert lost["best"] is None and len(good["history"]) == 3


@pytest.mark.parametrize("seconds", [0.3, 0.7, 1.1])
def test_ctrl_c_while_torch_is_imported_shows_no_traceback(photos, seconds):
    with launch(photos) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=20)
    # One line; two when it falls into the milliseconds where torch's C++ aborts by itself.
    assert process.returncode != 0 and len(printed.strip().splitlines()) in (1, 2), printed


def test_a_container_counts_its_share_of_the_processors(tmp_path):
    limit = tmp_path / "cpu.max"
    limit.write_text("100000 100000\n")
    assert common.cpu_count(limit) == 1
    limit.write_text("max 100000\n")
    assert common.cpu_count(limit) == common.cpu_count(tmp_path / "none") >= 1
