"""Runs are named by their settings, recorded whole, never repeated, and go on where they were."""

import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import engine
import finetune
import models
import train_scratch

CPU = torch.device("cpu")
SMALL = "--image-size 32 --batch-size 21 --precision float32 --device cpu --crop-scale 0.6 "
ADAMW = SMALL + "--optimizer adamw --learning-rate 0.002 "
# As in a plain loop: the learning rate and all neurons stay.
TUNE = SMALL + "--backbone mobilenet_v3_small --weights w.pth --learning-rate 0.01 --dropout 0 "
MIXED = "--dropout 0.3 --cutmix 0.7 --sam-share 0.4 "
TUNE += "--warmup-epochs 0 --schedule constant --epochs 3 --views 2 "


def train(photos, flags, output="results"):
    """Train from scratch, or fine-tune; return a list of all runs in `output`, sorted by name."""
    if "--backbone" in flags and not Path("w.pth").exists():
        # Random weights; with statistics of these photos, or all features would be alike.
        network = models.load_torchvision("mobilenet_v3_small", "none").train()
        for module in network.modules():
            module.momentum = 1.0
        network(data.normalise(data.load_split(photos, "train", 32).images))
        torch.save(network.state_dict(), "w.pth")
    script = finetune if "--backbone" in flags else train_scratch
    script.main(["--data", str(photos), "--output", output, *flags.split()])
    return list(engine.read_runs(output).values())


def losses(run):
    return [row[key] for row in run["history"] for key in ("train_loss", "validation_loss")]


def state_of(run):
    """The tensors of a run's checkpoint, by name."""
    file = engine.checkpoint_file(run["config"]["output"], run["name"])
    return torch.load(file, weights_only=True)["state"]


@pytest.mark.parametrize("flags", [SMALL + "--weight-decay 0.01 ", ADAMW])
def test_a_run_learns_separable_photos_and_records_what_it_did(photos, flags):
    [run] = train(photos, flags + "--epochs 4")
    assert run["best"]["validation_accuracy"] == 1
    assert run["best"] == max(run["history"], key=engine.merit)
    assert [row["epoch"] for row in run["history"]] == [1, 2, 3, 4]
    assert run["best"].keys() == {"epoch", "learning_rate", *engine.SHOWN, "seconds"}
    keys = "name kind config data environment model history best seconds images_per_second"
    assert set(run) == {*keys.split(), "checkpoint_sha256"}
    assert run["data"]["counts"]["train"] == [14, 14, 14]
    model = models.SCRATCH["plain"](3)
    model.load_state_dict(state_of(run))
    loader = data.Loader(data.load_split(photos, "validation", 32), 64, CPU)
    found = engine.validate(model, loader, Namespace(precision="float32"))
    assert {**run["best"], **found} == pytest.approx(run["best"])


def test_a_name_tells_each_setting_that_is_not_at_its_default(photos):
    def names(flags):
        parser = train_scratch.build_parser()
        arguments = parser.parse_args(["--data", str(photos), *flags.split()])
        return [run.name for run in engine.unfinished_runs(parser, arguments, "plain")]

    assert names("--output elsewhere --device cpu") == ["plain-lr0.02-bs64-seed0"]
    assert names("--batch-size 8 9") == ["plain-lr0.02-bs8-seed0", "plain-lr0.02-bs9-seed0"]
    assert names("--epochs 20 --dropout 0.3") == ["plain-lr0.02-bs64-dropout0.3-seed0-epochs20"]


@pytest.mark.parametrize(("flags", "computed"), [(ADAMW, []), (TUNE, [3, 0, 5, 0])])
def test_a_run_is_the_same_alone_and_where_it_shares_features(photos, monkeypatch, flags, computed):
    flags += "--epochs 1 --dropout 0.2 --learning-rate 0.005 --seed 5 "
    [alone] = train(photos, flags, "alone")
    loader, seeds, compute = finetune.FeatureLoader, [], finetune.FeatureLoader.compute_all
    monkeypatch.setattr(loader, "compute_all", lambda own: seeds.append(own.seed) or compute(own))
    runs = train(photos, flags + "--learning-rate 0.003 0.005 --seed 3 5")
    assert seeds == computed  # once for both learning rates; validation is not augmented
    assert len({str(losses(run)) for run in runs}) == 4
    assert runs[3]["name"] == alone["name"] and losses(runs[3]) == losses(alone)


def test_a_finished_run_is_not_repeated_nor_mixed_with_other_photos(photos):
    train(photos, ADAMW + "--epochs 1")
    [path] = Path("results/runs").iterdir()
    before = path.read_bytes(), path.stat().st_mtime_ns
    train(photos, ADAMW + "--epochs 1")
    other = shutil.copytree(photos, "other")
    Path(other, "validation/red/0.jpg").unlink()
    with pytest.raises(SystemExit, match="^.*seed0.* is of other photos.*$"):
        train(other, ADAMW + "--epochs 1")
    assert before == (path.read_bytes(), path.stat().st_mtime_ns)


@pytest.mark.parametrize("flags", [ADAMW, TUNE])
def test_training_needs_no_test_photos(photos, flags):
    shutil.copytree(photos, "untested", ignore=shutil.ignore_patterns("test"))
    assert train("untested", flags + "--epochs 1")[0]["best"]


@pytest.mark.parametrize("flags", [SMALL + MIXED, TUNE + "--unfreeze-convolutions 2 "])
def test_a_killed_run_ends_bit_for_bit_as_the_uninterrupted(photos, monkeypatch, capsys, flags):
    flags += "--epochs 3 --checkpoint-seconds 0"
    [whole] = train(photos, flags, "whole")
    with monkeypatch.context() as patch:
        validations = iter([engine.validate] * 2)
        patch.setattr(engine, "validate", lambda *inputs: next(validations)(*inputs))
        with pytest.raises(StopIteration):  # in epoch 3, the one with SAM
            train(photos, flags)
    [run] = train(photos, flags)
    assert "goes on after epoch 2" in capsys.readouterr().out
    state = state_of(run)
    assert all(torch.equal(tensor, state[key]) for key, tensor in state_of(whole).items())
    assert losses(whole) == losses(run)


def test_a_loss_that_is_not_finite_ends_the_run_and_not_the_study(photos):
    good, lost = train(photos, ADAMW + "--epochs 1 --learning-rate 1e9 0.002")
    assert "the loss is not finite in epoch" in lost["failed"] and lost["best"] is None
    assert good["best"] and good["checkpoint_sha256"] and not lost["checkpoint_sha256"]


@pytest.mark.parametrize(
    "flags",
    ["--batch-size 0", "--learning-rate nan", "--dropout 2", "--device moon", "--data none"],
)
def test_what_is_wrong_is_one_line_that_names_the_flag(photos, capsys, flags):
    with pytest.raises(SystemExit) as error:
        train(photos, SMALL + flags)
    *usage, line = (capsys.readouterr().err or error.value.code).splitlines()
    assert flags.split()[0] in line and (not usage or error.value.code == 2)


def test_cutmix_pastes_a_square_of_the_photo_before_and_mixes_the_labels():
    images = torch.arange(3.0)[:, None, None, None].expand(3, 3, 2, 2)
    mixed, targets = engine.cutmix(images, torch.eye(3), torch.tensor([1, 2, 0, 1]))
    assert mixed[1, 2].tolist() == [[1, 1], [0, 1]] and (mixed[0, :, 1, 0] == 2).all()
    assert targets[1].tolist() == [0.25, 0.75, 0]
    mixed, targets = engine.cutmix(images, torch.eye(3), torch.tensor([2, 2, 1, 1]))
    assert torch.equal(mixed, images) and torch.equal(targets, torch.eye(3))


def test_a_step_is_along_the_gradient_of_the_highest_loss_within_the_radius():
    layer, labels = torch.nn.Linear(4, 3, bias=False), torch.arange(6) % 3
    inputs = torch.randn(6, 4)
    start = layer.weight.detach().clone().requires_grad_()

    def gradient(weight):
        loss = F.cross_entropy(inputs @ weight.T, labels)
        return torch.autograd.grad(loss, weight)[0]

    here = gradient(start)
    there = gradient(start + 0.5 * here / here.norm())
    optimizer = torch.optim.SGD([{"params": layer.parameters(), "peak": 0.2}], torch.tensor(1.0))
    run = Namespace(cutmix=0.0, label_smoothing=0.0, precision="float32")
    step = engine.make_step(layer, [optimizer], run, torch.zeros(2), 3, 0.5)
    step(inputs, labels, None, torch.tensor(0.5))
    torch.testing.assert_close(layer.weight, start - 0.1 * there)


def test_muon_has_every_matrix_but_the_output_layer():
    model = models.SCRATCH["plain"](3)
    run = Namespace(optimizer="muon", learning_rate=0.1, weight_decay=0.3, precision="float32")
    muon, adamw = engine.build_optimizers(model, run, 3, CPU)
    [matrices], [output, vectors] = muon.param_groups, adamw.param_groups
    assert len(matrices["params"]) == 6 and len(vectors["params"]) == 12
    assert output["params"][0] is model.fc2.weight and vectors["weight_decay"] == 0
    assert (matrices["peak"], vectors["peak"]) == (0.1, 0.01)


@pytest.mark.parametrize("last", [0, 2])
def test_frozen_is_frozen_and_the_rest_trains_like_the_whole_network(photos, last):
    flags = TUNE + f"--unfreeze-convolutions {last}"
    [kept] = train(photos, flags)
    [every] = train(photos, flags + " --feature-memory 0", "every")
    torch.manual_seed(0)
    model = models.build_backbone("mobilenet_v3_small", 3, "w.pth", last, 0.0)
    start, state = model.state_dict(), state_of(kept)
    moved = {key for key in state if not torch.equal(start[key], state[key])}
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    # With a batch norm its statistics move.
    assert moved == {key for key in state if f"{key.rpartition('.')[0]}.weight" in trained}
    assert kept["frozen_unchanged"] and len(trained) == 2 + 3 * last
    [optimizer] = engine.build_optimizers(model, Namespace(**kept["config"]), 3, CPU)
    augmentation = data.Augmentation(0.6, 0.0, 0.1, 0.5)
    loader = data.Loader(data.load_split(photos, "train", 32), 21, CPU, augmentation)
    draw, history = loader.draw_view, []
    loader.draw_view = lambda number: draw(number % 2)
    model.train()
    for loader.epoch in range(3):
        for inputs, labels in loader:
            history.append(F.cross_entropy(model(inputs), labels, label_smoothing=0.1))
            optimizer.zero_grad()
            history[-1].backward()
            optimizer.step()
    history = torch.stack(history).view(3, -1).mean(1).tolist()
    assert losses(kept)[::2] == pytest.approx(history, rel=1e-3)
    assert losses(kept) == pytest.approx(losses(every), rel=1e-3)


def test_two_processes_of_torchrun_have_the_losses_of_one(photos):
    flags = TUNE + "--batch-size 14 --epochs 2"
    [one] = train(photos, flags, "one")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [finetune.__file__, "--data", str(photos), *flags.split()]
    subprocess.run([sys.executable, "-m", *torchrun, *script], check=True, capture_output=True)
    [two] = engine.read_runs("results").values()
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
