"""One command runs the whole study, and a second call has nothing left to do."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runs

ROOT = Path(__file__).parent.parent


@pytest.fixture
def clone(tmp_path):
    """The tracked kind of files alone, as in a fresh clone."""
    for path in [p for kind in ("py", "sh", "txt", "ipynb") for p in ROOT.glob(f"*.{kind}")]:
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    return tmp_path


def run_all(clone, *arguments, **settings):
    environment = os.environ | {"PYTHON": sys.executable, "JOBS": "2", "DEVICE": "cpu"} | settings
    command = ["bash", "run_all.sh", *arguments]
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)


def test_the_demo_goes_through_every_stage_and_the_notebook_shows_it(clone):
    result = run_all(clone, "--demo")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.count("These are NOT results") == 2
    output = clone / "results" / "demo"
    summary = runs.read_json(output / "summary.json")
    assert len(summary["grid"]) == 12 and len(summary["dropout"]) == 6
    assert len(summary["transfer"]) == 12 and len(summary["models"]) == 12
    assert all(row["test_accuracy"] is not None for row in summary["models"])
    assert all(run["frozen_unchanged"] for run in runs.read_runs(output).values()
               if run["kind"] == "finetune")  # fmt: skip
    best = max(row["test_accuracy"] for row in summary["models"])
    assert best > 0.4, "the networks learned nothing from the drawings"
    assert len(list((output / "figures").glob("*.png"))) > 10
    report = (output / "report.md").read_text()
    links = re.findall(r"\]\(<(.*?)>\)", report)
    assert len(links) > 8 and all((output / link).is_file() for link in links)
    assert "On the same test photos residual CNN is" in report
    assert (output / "report.pdf").read_bytes().startswith(b"%PDF")
    runs_before = {p: p.stat().st_mtime_ns for p in (output / "runs").iterdir()}
    start = time.perf_counter()
    # The notebook makes the second call, shows the results and trains one network by hand.
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "food11.ipynb"]
    environment = os.environ | {"RUN_ALL": "--demo", "DEVICE": "cpu"}
    result = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert time.perf_counter() - start < 120
    assert runs_before == {p: p.stat().st_mtime_ns for p in (output / "runs").iterdir()}
    executed = (clone / "food11.nbconvert.ipynb").read_text()
    assert executed.count("image/png") >= 4 and "best validation accuracy" in executed


def test_list_prints_the_training_commands_and_runs_nothing(clone):
    result = run_all(clone, "--list", SEEDS="0 1")
    lines = result.stdout.splitlines()
    assert len(lines) == 2 * (12 + 4 + 6)
    assert all(line.startswith(("python train_scratch.py", "python finetune.py")) for line in lines)
    assert not (clone / "results").exists()


def test_paths_may_hold_spaces_and_quotes(clone):
    result = run_all(clone, "--list", DATA="my photos", OUT="it's")
    words = shlex.split(result.stdout.splitlines()[0])
    assert words[words.index("--data") + 1] == "my photos"
    assert words[words.index("--output") + 1] == "it's"


def test_a_failure_stops_the_study_with_its_reason(clone):
    result = run_all(clone, DATA="nowhere")
    assert result.returncode != 0 and "nowhere: no such folder" in result.stderr
    result = run_all(clone, "--demmo")
    assert result.returncode != 0 and "unknown argument --demmo" in result.stderr
