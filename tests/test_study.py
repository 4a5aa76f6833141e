"""run_all.sh from end to end, at a few seconds a stage; figures."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import finetune
import plot
import train_scratch

ROOT = Path(__file__).resolve().parents[1]
FILES = "settings.txt photos.txt layers.txt summary.json report.md report.pdf finished.txt"
FIGURES = "curves_plain curves_transfer grid overview confusion_plain mistakes_plain photos"


def run_all(*arguments, **settings):
    environment = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", **settings}
    command = ["bash", str(ROOT / "run_all.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_demo_makes_every_file_and_a_second_call_does_nothing(tmp_path):
    small = {"MODELS": "plain", "LEARNING_RATES": "0.02", "BATCH_SIZES": "64", "DROPOUTS": "0.4"}
    places = {"OUT": str(tmp_path / "a study"), "CACHE": str(tmp_path / "a cache")}
    first = run_all("--demo", EPOCHS="1", **small, **places)
    assert first.returncode == 0, first.stdout + first.stderr
    output = tmp_path / "a study" / "demo"
    figures = {path.stem for path in output.glob("figures/*.png")}
    assert {path.name for path in output.iterdir()} >= set(FILES.split())
    assert figures >= set(FIGURES.split())
    runs = {path: path.stat().st_mtime_ns for path in output.rglob("*.json")}
    again = run_all("--demo", EPOCHS="1", **small, **places)
    assert again.returncode == 0 and "finished before" in again.stdout
    assert runs == {path: path.stat().st_mtime_ns for path in output.rglob("*.json")}
    other = run_all("--demo", EPOCHS="2", **small, **places)
    assert other.returncode == 1 and "EPOCHS=1" in other.stderr and "EPOCHS=2" in other.stderr


def test_the_listed_commands_are_the_grid_and_parse():
    lines = run_all("--list").stdout.splitlines()
    assert len(lines) == 4 + 6 + 2
    for line in lines[:10]:
        _, script, *flags = shlex.split(line)
        module = {"train_scratch.py": train_scratch, "finetune.py": finetune}[script]
        assert len(module.build_parser().parse_args(flags).learning_rate) >= 3


def test_letters_that_no_font_has_are_said(capsys):
    plot.use_fonts(["caf\U000f1234"])
    assert "no installed font has \U000f1234" in capsys.readouterr().out
