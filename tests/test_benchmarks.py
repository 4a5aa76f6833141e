"""The benchmarks run from end to end on a handful of photos."""

import os
import subprocess
import sys
from pathlib import Path

from common import read_json

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def run(script, *flags):
    command = [sys.executable, str(FOLDER / script), *flags, "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_recipes_are_trained_evaluated_and_compared(photos):
    flags = ["--data", str(photos), "--image-size", "32", "--epochs", "1", "--seeds", "0", "1"]
    printed = run("recipes.py", *flags, "--recipes", "published", "plain", "--output", "out")
    rows = read_json("out/recipes-32-published-plain.json", "rows")["rows"]
    assert [row["photos"] for row in rows] == ["validation"] * 2 + ["test"] * 2 + ["both"] * 2
    published, plain = (row["by_seed"] for row in rows[-2:])
    difference = sum(plain) / 2 - sum(published) / 2
    assert rows[-1]["difference"] == pytest.approx(difference)
    low, high = rows[-1]["difference_interval_95"]
    assert low <= difference <= high
    assert rows[-2]["difference"] == 0
    assert printed.count("difference to the first") == 6
    config = read_json("out/runs/published-32-seed1.json", "config")["config"]
    assert config["schedule"] == "constant" and config["batch_size"] == 32


def test_growth_prints_a_line_for_each_size_and_falls_back(photos):
    before = sorted(photos.rglob("*"))
    printed = run("growth.py", "--data", str(photos), "--factors", "1", "3", "--image-size", "32")
    lines = [line for line in printed.splitlines() if " MiB" in line]
    assert [line.split()[0] for line in lines if " photos: decode" in line] == ["42", "126"]
    assert sum(line.startswith("check ") for line in lines) == 2
    assert sum(line.startswith("evaluation ") for line in lines) == 2
    assert "with 4 GiB" in lines[-2] and "with 0 GiB" in lines[-1]
    assert printed.count("the frozen part runs in every step") == 1
    assert sorted(photos.rglob("*")) == before and not list(Path().iterdir())


def test_speed_measures_both_loops(photos):
    flags = ["--data", str(photos), "--rows", "scratch-64", "fc", "--rounds", "1", "--epochs", "1"]
    printed = run("speed.py", *flags, "--weights", "none", "--output", "speed.json")
    for row in read_json("speed.json", "rows")["rows"]:
        for side in ("standard", "ours"):
            [result] = row[side]
            [seconds] = result["epochs"]
            assert result["seconds"] == pytest.approx(result["other_seconds"] + seconds)
            assert result["images_per_second"] == pytest.approx(42 / seconds)
    assert printed.count("start to end of the process") == 2
    assert printed.count("share of those products") == 1


def test_a_step_is_timed_in_one_process_and_in_two(photos):
    flags = ["--data", str(photos), "--models", "residual", "--batch-sizes", "14", "--image-size"]
    printed = run("step.py", *flags, "32", "--processes", "1", "2", "--seconds", "0.1")
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines()[2:]]
    assert [row[:4] for row in rows] == [["residual", "14", n, "eager"] for n in ("1", "2")]
    assert all(float(row[4]) >= float(row[5]) > 0 for row in rows)


def test_the_gpu_tables_need_a_gpu_and_say_so(photos):
    settings = {**os.environ, "DATA": str(photos), "PYTHON": sys.executable, "DEVICE": "cuda:99"}
    command = ["bash", str(FOLDER / "gpu.sh")]
    result = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert result.returncode != 0 and "cuda:99: not available here" in result.stderr
    assert not result.stdout
