"""One run over several processes of torchrun is the run of one process."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import common

import pytest

import finetune
import train_scratch
from tests.helpers import TINY, default_signals, lively_weights

ROOT = Path(__file__).parent.parent
LAST_LAYER = ["--backbone", "mobilenet_v3_small", "--unfreeze-convolutions", "0", "--views", "2"]
LAST_LAYER += ["--weights", "none", "--image-size", "64", "--batch-size", "9", "--dropout", "0"]
LAST_LAYER += ["--epochs", "3", "--precision", "float32", "--device", "cpu", "--threads", "2"]


@contextlib.contextmanager
def torchrun(processes, script, photos, *flags):
    """Start a script in so many processes; they end with the block."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(ROOT / script), "--data", str(photos), *flags]
    job = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    try:
        yield job
    finally:
        job.terminate()
        job.communicate(timeout=60)


def run(processes, script, photos, *flags):
    with torchrun(processes, script, photos, *flags) as job:
        out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    return out


@pytest.mark.parametrize("memory", ["0", "4"])
def test_two_processes_train_a_last_layer_to_the_same_losses(photos, memory):
    flags = [*LAST_LAYER, "--feature-memory", memory]
    flags += ["--weights", lively_weights(photos, "mobilenet_v3_small")]
    finetune.main(["--data", str(photos), *flags, "--name", "one"])
    out = run(2, "finetune.py", photos, *flags, "--name", "two")
    assert len(re.findall("best validation accuracy", out)) == 1  # one speaks for all
    runs = common.read_runs("results")
    one, two = runs["one"], runs["two"]
    assert two["environment"]["processes"] == 2
    for first, second in zip(one["history"], two["history"], strict=True):
        for key in ("train_loss", "validation_loss"):
            assert second[key] == pytest.approx(first[key], rel=2e-3), key
        assert second["validation_accuracy"] == pytest.approx(first["validation_accuracy"], abs=0.1)


def test_more_processes_than_photos_in_a_step_are_refused(photos):
    with torchrun(2, "finetune.py", photos, *LAST_LAYER, "--batch-size", "1") as job:
        _, err = job.communicate(timeout=120)
    assert job.returncode != 0 and "a larger --batch-size" in err


def test_what_the_first_process_refuses_is_one_line_of_all(photos):
    train_scratch.main(["--data", str(photos), *TINY, "--epochs", "1", "--name", "mine"])
    flags = [*TINY, "--epochs", "2", "--name", "mine"]
    with torchrun(2, "train_scratch.py", photos, *flags) as job:
        _, err = job.communicate(timeout=120)
    assert job.returncode != 0 and "is a run with other epochs" in err
    assert "of_first_process" not in err  # no traceback of ours


def test_two_processes_train_from_scratch_to_the_same_accuracy(photos):
    flags = [*TINY, "--optimizer", "muon", "--learning-rate", "0.02"]
    flags += ["--weight-decay", "0.01", "--seed", "0", "1"]
    run(2, "train_scratch.py", photos, *flags)
    runs = common.read_runs("results").values()
    assert [trained["best"]["validation_accuracy"] for trained in runs] == [1.0, 1.0]


def test_a_dead_process_ends_all_in_one_line_and_one_process_goes_on(photos, capsys):
    flags = [*TINY, "--epochs", "40", "--name", "long", "--checkpoint-seconds", "0"]
    state = Path("results/checkpoints/long.unfinished")
    with torchrun(2, "train_scratch.py", photos, *flags) as job:
        while not state.exists():
            assert job.poll() is None
            time.sleep(0.05)
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True, check=True
        )
        os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
        _, err = job.communicate(timeout=60)
    assert job.returncode != 0
    ours = err.partition("Traceback")[0]  # what follows is torchrun's own
    assert ours.count("tart again to go on from the last stored epoch") == 1
    train_scratch.main(["--data", str(photos), *flags])
    assert re.search(r"goes on after epoch \d+", capsys.readouterr().out)
    assert len(common.read_runs("results")["long"]["history"]) == 40
