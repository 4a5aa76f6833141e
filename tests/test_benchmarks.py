"""The benchmarks run from end to end on a handful of photos."""

import subprocess
import sys
from pathlib import Path

import pytest

import runs

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def run(script, *flags):
    command = [sys.executable, str(FOLDER / script), *flags, "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_recipes_are_trained_evaluated_and_compared(photos):
    flags = ["--data", str(photos), "--image-size", "32", "--epochs", "1", "--seeds", "0", "1"]
    printed = run("recipes.py", *flags, "--recipes", "published", "plain", "--output", "out")
    rows = runs.read_json("out/recipes-32-published-plain.json", "rows")["rows"]
    assert [row["photos"] for row in rows] == ["validation"] * 2 + ["test"] * 2 + ["both"] * 2
    published, plain = (row["by_seed"] for row in rows[-2:])
    difference = sum(plain) / 2 - sum(published) / 2
    assert rows[-1]["difference"] == pytest.approx(difference)
    low, high = rows[-1]["difference_interval_95"]
    assert low <= difference <= high
    assert printed.count("seeds") == 6


def test_growth_prints_a_line_for_each_size_and_falls_back(photos):
    flags = ["--data", str(photos), "--factors", "1", "3", "--image-size", "32", "--steps", "4"]
    lines = run("growth.py", *flags).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["42", "126"]
    assert "enough, features kept" in lines[3] and "too small, no features kept" in lines[4]


def test_speed_measures_both_loops(photos):
    flags = ["--data", str(photos), "--rows", "scratch", "--rounds", "1", "--epochs", "1"]
    run("speed.py", *flags, "--output", "speed.json")
    [row] = runs.read_json("speed.json", "rows")["rows"]
    assert len(row["ratios"]) == 1 and row["ratios"][0] > 0
    assert row["ours"][0]["measured"] == row["standard"][0]["measured"] == 1
