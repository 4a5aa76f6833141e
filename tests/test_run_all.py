"""One command runs the whole study, and a second call has nothing left to do."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import read_json, read_runs, write_json

import pytest

from tests.helpers import default_signals

ROOT = Path(__file__).parent.parent
# A study of a minute: few photos, and as many runs as the stages need.
SMALL = {
    "DATA": "photos",
    "OUT": "out",
    "EPOCHS": "2",
    "IMAGE_SIZE": "32",
    "FINETUNE_IMAGE_SIZE": "64",
    "LEARNING_RATES": "0.01 0.02",
    "BATCH_SIZES": "14",
    "DROPOUTS": "0.2",
    "BACKBONES": "mobilenet_v3_small",
    "WEIGHTS": "none",
    "FC_LEARNING_RATES": "0.01",
    "LAST2_LEARNING_RATES": "0.01",
}


@pytest.fixture
def clone(tmp_path, photos):
    """The tracked kind of files alone, as in a fresh clone, and a handful of photos."""
    for path in [p for kind in ("py", "sh", "txt", "ipynb") for p in ROOT.glob(f"*.{kind}")]:
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "photos").symlink_to(photos)
    return tmp_path


def environment(settings):
    return os.environ | {"PYTHON": sys.executable, "JOBS": "2", "DEVICE": "cpu"} | settings


def run_all(clone, *arguments, **settings):
    return subprocess.run(
        ["bash", "run_all.sh", *arguments],
        cwd=clone,
        env=environment(settings),
        capture_output=True,
        text=True,
    )


def test_the_demo_goes_through_every_stage_and_the_notebook_shows_it(clone):
    result = run_all(clone, "--demo")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.count("These are NOT results") == 2
    assert "run 24 of 24, 0 minutes left" in result.stdout
    output = clone / "results" / "demo"
    summary = read_json(output / "summary.json")
    assert len(summary["grid"]) == 8 and len(summary["dropout"]) == 6
    assert len(summary["transfer"]) == 12 and len(summary["models"]) == 12
    assert all(row["test_accuracy"] is not None for row in summary["models"])
    runs = read_runs(output).values()
    assert all(run["frozen_unchanged"] for run in runs if run["kind"] == "finetune")
    best = max(row["test_accuracy"] for row in summary["models"])
    assert best > 0.4, "the networks learned nothing from the drawings"
    assert len(list((output / "figures").glob("*.png"))) > 10
    report = (output / "report.md").read_text()
    links = re.findall(r"\]\(<(.*?)>\)", report)
    assert len(links) > 8 and all((output / link).is_file() for link in links)
    assert (output / "report.pdf").read_bytes().startswith(b"%PDF")
    runs_before = {p: p.stat().st_mtime_ns for p in (output / "runs").iterdir()}
    start = time.perf_counter()
    # The notebook makes the second call, shows the results and trains one network by hand.
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "food11.ipynb"]
    notebook = environment({"RUN_ALL": "--demo"})
    result = subprocess.run(command, cwd=clone, env=notebook, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert time.perf_counter() - start < 180
    assert runs_before == {p: p.stat().st_mtime_ns for p in (output / "runs").iterdir()}
    executed = (clone / "food11.nbconvert.ipynb").read_text()
    assert executed.count("image/png") >= 4 and "best validation accuracy" in executed


def test_list_prints_commands_that_can_be_run_alone(clone):
    result = run_all(clone, "--list", SEEDS="0 1", DATA="my photos", OUT="it's")
    lines = result.stdout.splitlines()
    assert len(lines) == 12 + 6 + 10 + 6 and not (clone / "results").exists()
    for words in map(shlex.split, lines):
        assert words[0] == sys.executable and words[1] in ("train_scratch.py", "finetune.py")
        assert words[words.index("--data") + 1] == "my photos"
        assert words[words.index("--output") + 1] == "it's"


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ([], {"DATA": "nowhere"}, "nowhere: no such folder"),
        (["--demmo"], {}, "unknown argument --demmo"),
        ([], {"DROPOUTS": "2"}, "argument --dropout: '2' is not a number"),
        (["--list"], {"EPOCHS": "0"}, "argument --epochs: '0' is not a whole number"),
        ([], {"JOBS": "0"}, "JOBS=0: how many commands at a time"),
    ],
)
def test_bad_input_is_said_before_any_work(clone, arguments, settings, message):
    result = run_all(clone, *arguments, **{**SMALL, **settings})
    assert result.returncode != 0 and message in result.stdout + result.stderr
    assert not (clone / "out/runs").exists() and not (clone / ".cache").exists()


def test_another_study_in_the_folder_of_results_is_said_before_any_work(clone):
    runs = ROOT / "results" / "reference" / "runs"  # 50 epochs, 17 runs of each network at least
    shutil.copytree(runs, clone / "out/runs")
    result = run_all(clone, **SMALL)
    assert result.returncode != 0 and not (clone / "out/photos.txt").exists()
    assert "runs with other epochs, image-size, weights: a study of its own" in result.stderr
    shutil.rmtree(clone / "out/runs")
    (clone / "out/runs").mkdir()
    shutil.copy(runs / "plain-lr0.01-bs32-seed0.json", clone / "out/runs")  # one by hand is none
    assert run_all(clone, "--list", **SMALL).returncode == 0


def test_an_empty_setting_leaves_its_part_out(clone):
    settings = {"PYTHON": "false"}  # without the packages nothing is checked
    listed = run_all(clone, "--list", BACKBONES="", DROPOUTS="", **settings).stdout
    assert "finetune.py" not in listed and "dropout" not in listed
    assert len(listed.splitlines()) == 12
    assert "train_scratch.py" not in run_all(clone, "--list", MODELS="", **settings).stdout
    assert "nothing to train" in run_all(clone, MODELS="", BACKBONES="").stderr


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, "ended too early"
        time.sleep(0.05)


def started(clone, **settings):
    return subprocess.Popen(
        ["bash", "run_all.sh"],
        cwd=clone,
        env=environment({**SMALL, **settings}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=default_signals,
    )


def training(clone):
    """Command lines of the training scripts that run in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == clone:
                found.append((process / "cmdline").read_bytes())
        except OSError:  # has ended meanwhile
            continue
    return [line for line in found if b"train_scratch.py" in line or b"finetune.py" in line]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux's /proc")
def test_one_signal_ends_the_study_within_two_seconds(clone):
    settings, locks = {"EPOCHS": "2000", "MODELS": "plain", "BACKBONES": ""}, clone / "out/.locks"
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        shutil.rmtree(locks, ignore_errors=True)
        with started(clone, **settings) as process:
            wait_for(lambda: len(list(locks.glob("*"))) >= 2, process)  # two runs are trained
            second = run_all(clone, **SMALL)
            assert second.returncode != 0 and f"process {process.pid}" in second.stderr
            process.send_signal(ending)
            begin = time.perf_counter()
            _, printed = process.communicate(timeout=20)
        assert process.returncode == 130 and time.perf_counter() - begin < 2
        assert not training(clone)
        assert printed.strip().splitlines() == [
            "run_all.sh: interrupted; the next call goes on from what is stored"
        ]


def test_a_failure_stops_the_study_with_its_reason_and_the_rest_goes_on_later(clone):
    (clone / "out/runs").mkdir(parents=True)
    taken = clone / "out/runs" / "plain-lr0.01-bs14-seed0-epochs2-imagesize32.json"
    run = read_json(ROOT / "results/reference/runs/plain-lr0.01-bs32-seed0.json")
    write_json(taken, {**run, "name": taken.stem})  # with other settings
    temporary = clone / "temporary"
    temporary.mkdir()
    settings = {**SMALL, "BACKBONES": ""}
    result = run_all(clone, **settings, TMPDIR=str(temporary))
    assert result.returncode != 0 and not list(temporary.glob("tmp.*"))
    assert "failed: " in result.stderr and "train_scratch.py --image-size 32" in result.stderr
    assert taken.name in result.stderr
    assert not list((clone / "out/runs").glob("*dropout0.2-seed*")) and not training(clone)
    taken.unlink()
    result = run_all(clone, **{**settings, "LEARNING_RATES": "0.01 1e30"})
    assert result.returncode != 0 and "some runs failed" in result.stderr  # and nothing else
    summary = read_json(clone / "out/summary.json")
    assert {failure["run"].split("-")[0] for failure in summary["failed"]} == {"plain", "residual"}
    assert all(row["test_accuracy"] is not None for row in summary["models"])
    assert (clone / "out/report.pdf").exists()
