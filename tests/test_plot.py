"""The figures: drawn from made-up results, complete, never a traceback for a bad folder."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import plot
from runs import wilson_interval

CLASSES = ["apple_pie", "hot_dog", "ice_cream", "sushi"]


def write_results(output: Path, classes=CLASSES, photos=25, epochs=12, seeds=1) -> None:
    """A whole study as the training scripts leave it: grid, dropout, fine-tuning, evaluations."""
    draw, total = random.Random(0), photos * len(classes)
    summary = {"grid": [], "dropout": [], "transfer": [], "models": [], "choices": {}}

    def write(path, content):
        path = output / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    def add(stage, name, model, top, rate, batch=64, dropout=0, chosen=False, unfreeze=None):
        """One run that climbs to accuracy `top`; returns its entry in the summary."""
        history = []
        for epoch in range(1, epochs + 1):
            climb = 1 - math.exp(-3 * epoch / epochs)
            train, validation = 1.15 * top * climb, top * climb + draw.uniform(-0.03, 0.03)
            history.append(
                {
                    "epoch": epoch,
                    "learning_rate": rate,
                    "train_accuracy": min(1, max(0, train)),
                    "train_loss": None if top < 0.1 and epoch > 5 else 2.5 * (1 - train * 0.8),
                    "validation_accuracy": round(min(1, max(0, validation)) * total) / total,
                    "validation_loss": 40 if top < 0.1 else 2.6 * (1 - validation * 0.8),
                    "seconds": 2,
                }
            )
        best = max(history, key=lambda row: row["validation_accuracy"])
        shared = {key: best[key] for key in ("epoch", "validation_accuracy", "validation_loss")}
        counts = {split: dict.fromkeys(classes, photos) for split in ("validation", "test")}
        run = {"name": name, "history": history, "best": shared, "seconds": 60}
        run |= {"kind": "scratch", "config": {}, "model": {}}
        write(f"runs/{name}.json", run | {"data": {"classes": classes, "counts": counts}})
        entry = {"run": name, "model": model, "learning_rate": rate, "batch_size": batch}
        entry |= {"dropout": dropout, "seed": 0, "chosen": chosen, "seconds": 60, **shared}
        if unfreeze is not None:
            entry["unfreeze_convolutions"] = unfreeze
        summary[stage].append(entry)
        return entry

    def evaluate(name, accuracy):
        matrix, predictions = [[0] * len(classes) for _ in classes], []
        for label, class_name in enumerate(classes):
            for number in range(photos):
                right = draw.random() < accuracy
                guess = label if right else draw.randrange(len(classes))
                matrix[label][guess] += 1
                row = {"file": f"{class_name}/{number}.jpg", "label": label, "predicted": guess}
                predictions.append(row | {"probability": draw.uniform(0.4, 1)})
        accuracy = sum(matrix[i][i] for i in range(len(classes))) / total
        interval = wilson_interval(accuracy, total)
        evaluation = {"name": name, "split": "test", "accuracy": accuracy, "interval_95": interval}
        evaluation |= {"confusion_matrix": matrix, "classes": classes, "predictions": predictions}
        maps = [{"photo": i, "map": [[0, 0.5], [1, 0.2]]} for i in range(0, total, 5)]
        evaluation |= {"activation_maps": maps}
        write(f"evaluations/{name}.test.json", evaluation)
        return accuracy, interval

    def choose(label, kind, entries, measured=True):
        """Add the row of a chosen model to the overview; evaluates it on test if `measured`."""
        accuracy = sum(entry["validation_accuracy"] for entry in entries) / len(entries)
        row = {"label": label, "kind": kind, "runs": [entry["run"] for entry in entries]}
        row |= {"parameters": 2_237_963, "trainable_parameters": 14_091}
        row |= {"validation_accuracy": accuracy, "test_accuracy": None, "test_interval_95": None}
        row["validation_interval_95"] = wilson_interval(accuracy, total)
        for name in row["runs"] if measured else []:
            row["test_accuracy"], row["test_interval_95"] = evaluate(name, accuracy - 0.03)
        summary["models"].append(row)

    for model, top in (("plain", 0.55), ("residual", 0.61)):
        for rate, factor in ((0.0003, 0.8), (0.001, 1), (0.03, 0.1)):
            for batch in (32, 128):
                chosen = (rate, batch) == (0.001, 32)
                names = [f"{model}-{rate}-{batch}-s{s}" for s in range(seeds if chosen else 1)]
                setting = {"rate": rate, "batch": batch, "chosen": chosen}
                entries = [add("grid", name, model, top * factor, **setting) for name in names]
                if chosen:
                    choose(f"{model} CNN", "scratch", entries)
                    summary["dropout"] += entries
        for dropout in (0.3, 0.5):
            entry = add(
                "dropout", f"{model}-d{dropout}", model, top - dropout / 5, 0.001, 32, dropout
            )
            choose(f"{model} CNN, dropout {dropout}", "scratch", [entry], measured=False)
    for unfreeze in (0, 2):
        for model, top in (("mobilenet_v2", 0.85), ("mobilenet_v3_small", 0.8)):
            for rate in (0.001, 0.01):
                name, chosen = f"{model}-u{unfreeze}-{rate}", rate == 0.001
                setting = {"rate": rate, "chosen": chosen, "unfreeze": unfreeze}
                entry = add("transfer", name, model, top + unfreeze / 40 - rate, **setting)
                if chosen:
                    choose(plot.setting_name(entry).replace("\n", ", "), "finetune", [entry])
    write("summary.json", summary)


FIGURES = {
    "curves_plain",
    "curves_residual",
    "curves_transfer",
    "grid_heatmap",
    "dropout",
    "transfer",
    "overview",
    "confusion_plain-0.001-32-s0_test",
    "confusion_residual-0.001-32-s0_test",
    "confusion_mobilenet_v2-u0-0.001_test",
    "confusion_mobilenet_v2-u2-0.001_test",
    "confusion_mobilenet_v3_small-u0-0.001_test",
    "confusion_mobilenet_v3_small-u2-0.001_test",
}


def drawn(output: Path) -> set[str]:
    """Names of the figures in `output`; each must show something, and nothing cut at its edges."""
    for path in (output / "figures").iterdir():
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
            assert image.format == "PNG"
        assert pixels.shape[0] > 200 and pixels.shape[1] > 400 and pixels.std() > 5, path
        pixels[2:-2, 2:-2] = 255
        assert pixels.min() == 255, f"{path}: something is cut off"
    return {path.stem for path in (output / "figures").iterdir()}


def test_every_figure_is_drawn_the_same_each_time(tmp_path):
    write_results(tmp_path, seeds=2)
    plot.main(["--output", str(tmp_path)])
    assert drawn(tmp_path) == FIGURES
    first = {path: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    plot.main(["--output", str(tmp_path)])
    assert all(path.read_bytes() == content for path, content in first.items())


def test_mistakes_are_shown_where_the_photos_are(tmp_path):
    write_results(tmp_path)
    for name in CLASSES:
        (tmp_path / "photos/test" / name).mkdir(parents=True)
        for number in range(20):  # of 25: the others are missing
            photo = Image.new("RGB", (60, 30 + number), (200, 10 * number, 40))
            orientation = photo.getexif()
            orientation[0x0112] = 6  # lies on its side
            photo.save(tmp_path / "photos/test" / name / f"{number}.jpg", exif=orientation)
        (tmp_path / "photos/test" / name / "3.jpg").write_bytes(b"not a photo")
    plot.main(["--output", str(tmp_path), "--data", str(tmp_path / "photos")])
    names = "residual-0.001-32-s0", "mobilenet_v2-u2-0.001"
    sheets = {f"{kind}_{name}" for kind in ("mistakes", "attention") for name in names}
    assert drawn(tmp_path) == FIGURES | sheets  # the best from scratch and the best pre-trained
    with Image.open(tmp_path / f"figures/attention_{names[0]}.png") as sheet:
        pixels = np.array(sheet.convert("RGB"), dtype=int)
    assert (pixels[..., 0] - pixels[..., 2]).max() > 80, "photos are grey there, maps are not"


def test_a_photo_is_turned_upright(tmp_path, monkeypatch):
    photo = Image.new("RGB", (60, 30), "red")
    orientation = photo.getexif()
    orientation[0x0112] = 6
    (tmp_path / "test").mkdir()
    photo.save(tmp_path / "test/a.jpg", exif=orientation)
    sizes = []
    monkeypatch.setattr(plot, "save", lambda figure, *_: sizes.append(figure.axes[0].images[0]))
    wrong = {"file": "a.jpg", "label": 0, "predicted": 1, "probability": 0.9}
    evaluation = {"classes": ["a", "b"], "predictions": [wrong], "split": "test"}
    plot.draw_mistakes(tmp_path / "x.png", evaluation, "any", tmp_path)
    assert sizes[0].get_array().shape == (60, 30, 3)


def test_stages_that_have_not_run_are_skipped(tmp_path, capsys):
    write_results(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary |= {"transfer": [], "dropout": [], "models": []}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    plot.main(["--output", str(tmp_path)])
    assert drawn(tmp_path) == {"curves_plain", "curves_residual", "grid_heatmap"}
    skipped = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(skipped) == 3


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"grid": [{}]}'])
def test_bad_summary_ends_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(SystemExit, match="summary.json") as stop:
        plot.main(["--output", str(tmp_path)])
    assert len(str(stop.value).splitlines()) == 1


def test_a_lost_run_is_named(tmp_path):
    write_results(tmp_path)
    (tmp_path / "runs/plain-0.0003-32-s0.json").unlink()
    with pytest.raises(SystemExit, match="plain-0.0003-32-s0.*summary.py"):
        plot.main(["--output", str(tmp_path)])


@pytest.mark.parametrize(
    "classes", (["cat", "dog"], [f"a_rather_long_name_{i}" for i in range(30)])
)
def test_few_and_many_classes_fit(tmp_path, classes):
    write_results(tmp_path, classes, photos=130, epochs=1)
    plot.main(["--output", str(tmp_path)])
    assert drawn(tmp_path) == FIGURES
