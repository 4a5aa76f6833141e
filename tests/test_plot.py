"""The figures: drawn from made-up results, complete, never a traceback for a bad folder."""

import json

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

import plot

CLASSES = ["apple_pie", "hot_dog", "ice_cream", "sushi"]
FIGURES = {
    "curves_plain",
    "curves_residual",
    "curves_transfer",
    "settings_plain",
    "settings_residual",
    "grid_heatmap",
    "dropout",
    "transfer",
    "overview",
    "confusion_plain-0.001-s0_test",
    "confusion_residual-0.001-s0_test",
    "confusion_mobilenet_v2-u0_test",
    "confusion_mobilenet_v2-u2_test",
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_run(output, name, model, top, epochs=12, classes=CLASSES, **more):
    """The JSON of a run that climbs to accuracy `top`, failed if that is None; its summary line."""
    history = []
    for accuracy in np.linspace(0.1, top or 0.2, epochs):
        losses = {"train_loss": None, "validation_loss": 30 * (1 - accuracy)}
        history.append({"train_accuracy": accuracy, "validation_accuracy": accuracy, **losses})
    best = {"epoch": epochs if top else None, "validation_accuracy": top, "validation_loss": 1}
    run = {"name": name, "kind": "", "config": {}, "model": {}, "seconds": 1, "history": history}
    run = {**run, "data": {"classes": classes}, "checkpoint_sha256": ""}
    write(output / f"runs/{name}.json", {**run, "best": best if top else None})
    setting = {"learning_rate": 0.001, "batch_size": 32, "dropout": 0, "chosen": True}
    return {"run": name, "model": model, **setting, **best, **more}


def write_evaluation(output, name, classes, photos):
    draw, predictions = np.random.default_rng(len(name)), []
    matrix = np.zeros((len(classes), len(classes)), int)
    for label, class_name in enumerate(classes):
        for i in range(photos):
            guess = int(draw.choice([label, draw.integers(len(classes))]))
            matrix[label, guess] += 1
            prediction = {"file": f"{class_name}/{i}.jpg", "label": label, "predicted": guess}
            predictions.append({**prediction, "probability": draw.random()})
    maps = [{"photo": i, "map": [[0, 0.5], [1, 0.2]]} for i in range(0, len(predictions), 5)]
    content = {"name": name, "split": "test", "classes": classes, "predictions": predictions}
    content = {**content, "confusion_matrix": matrix.tolist(), "activation_maps": maps}
    write(output / f"evaluations/{name}.test.json", content)


def write_study(output, classes=CLASSES, photos=25, epochs=12, seeds=1):
    """Runs, evaluations and summary as the scripts leave them; returns the summary."""
    stages = ("grid", "choices", "dropout", "transfer", "models", "sizes", "slopes")
    summary = {key: [] for key in (*stages, "failed", "left_out", "comparisons")}
    look = {"epochs": epochs, "classes": classes}

    def choose(label, kind, lines, test=0.7):
        row = {"label": label, "kind": kind, "runs": [line["run"] for line in lines]}
        row["parameters"], row["trainable_parameters"] = 2_237_963, 14_091
        row["validation_accuracy"] = lines[0]["validation_accuracy"]
        row["test_accuracy"], row["test_interval_95"] = test, [0.6, 0.8]
        summary["models"].append(row)
        for name in row["runs"] if test else []:
            write_evaluation(output, name, classes, photos)

    for model, top in (("plain", 0.55), ("residual", 0.61)):
        other = {"learning_rate": 0.03, "batch_size": 128, "chosen": False}
        summary["grid"].append(write_run(output, f"{model}-0.03", model, 0.2, **look, **other))
        names = [f"{model}-0.001-s{seed}" for seed in range(seeds)]
        chosen = [write_run(output, name, model, top, **look) for name in names]
        choose(f"{model} CNN", "scratch", chosen)
        more = {"dropout": 0.5, "chosen": False}
        dropped = write_run(output, f"{model}-dropout", model, 0.4, **look, **more)
        choose(f"{model} CNN (dropout 0.5)", "scratch", [dropped], test=None)
        summary["grid"] += chosen
        summary["dropout"] += [*chosen, dropped]
    for count, case in ((0, "FC only"), (2, "last 2 convolutions + FC")):
        more, name = {"unfreeze_convolutions": count}, f"mobilenet_v2-u{count}"
        line = write_run(output, name, "mobilenet_v2", 0.85 + count / 40, **look, **more)
        summary["transfer"].append(line)
        choose(f"mobilenet_v2 ({case})", "finetune", [line])
    write(output / "summary.json", summary)
    return summary


def draw(output, *flags):
    """Names of the figures drawn; each must show something, and nothing cut off at its edges."""
    plot.main(["--output", str(output), *flags])
    for path in (output / "figures").iterdir():
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
        assert pixels.shape[0] > 200 and pixels.shape[1] > 400 and pixels.std() > 5, path
        pixels[2:-2, 2:-2] = 255
        assert pixels.min() == 255, f"{path}: something is cut off"
    return {path.stem for path in (output / "figures").iterdir()}


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn in a test, by the names of their files."""
    drawn, save = {}, plot.save

    def keep(figure, path, *rest):
        drawn[path.stem] = figure
        save(figure, path, *rest)

    monkeypatch.setattr(plot, "save", keep)
    return drawn


def text(figure):
    return "\n".join(part.get_text() for part in figure.findobj(Text))


def test_every_figure_is_drawn_the_same_each_time(tmp_path):
    write_study(tmp_path)
    assert draw(tmp_path) == FIGURES
    first = {path: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    draw(tmp_path)
    assert all(path.read_bytes() == content for path, content in first.items())


def test_several_seeds_are_added_up(tmp_path, figures):
    write_study(tmp_path, seeds=3)
    assert draw(tmp_path) == FIGURES
    paths = (tmp_path / "evaluations").glob("plain-0.001-s*")
    matrices = [json.loads(path.read_text())["confusion_matrix"] for path in paths]
    total, shown = np.sum(matrices, axis=0), text(figures["confusion_plain-0.001-s0_test"])
    assert len(matrices) == 3 and "3 seeds" in shown and "60.0% to 80.0%" in shown
    assert f"{total.trace() / total.sum():.1%} of 100 test photos" in shown
    assert set(total.diagonal().astype(str)) <= set(shown.split())
    assert "55.0%\n3 seeds" in text(figures["grid_heatmap"])
    assert "mean of best 55.0% at epoch 12, 12, 12" in text(figures["curves_plain"])


def test_failed_runs_are_shown_as_failed(tmp_path, figures):
    summary = write_study(tmp_path)
    for name, model, epochs in (("lost", "plain", 3), ("at-once", "other", 0)):
        more = {"learning_rate": 0.9, "chosen": False}
        summary["grid"].append(write_run(tmp_path, name, model, None, epochs, **more))
    write(tmp_path / "summary.json", {**summary, "failed": [{"run": "lost", "reason": "NaN"}]})
    assert draw(tmp_path) == FIGURES | {"curves_other", "settings_other"}
    assert text(figures["grid_heatmap"]).count("failed") == 2
    assert "failed" in text(figures["curves_plain"]) and "failed" in text(figures["curves_other"])


def test_mistakes_are_shown_upright_where_the_photos_are(tmp_path, figures):
    write_study(tmp_path)
    for name in CLASSES:
        (tmp_path / "photos/test" / name).mkdir(parents=True)
        for number in range(20):  # of 25: the others are missing
            photo = Image.new("RGB", (60, 30), (200, 10 * number, 40))
            orientation = photo.getexif()
            orientation[0x0112] = 6  # lies on its side
            photo.save(tmp_path / "photos/test" / name / f"{number}.jpg", exif=orientation)
        (tmp_path / "photos/test" / name / "3.jpg").write_bytes(b"not a photo")
    best = ("residual-0.001-s0", "mobilenet_v2-u2")  # from scratch and pre-trained
    sheets = {f"{kind}_{name}" for kind in ("mistakes", "attention", "pairs") for name in best}
    assert draw(tmp_path, "--data", str(tmp_path / "photos")) == FIGURES | sheets
    shown = [panel.images for panel in figures[f"mistakes_{best[0]}"].axes]
    assert [images[0].get_array().shape for images in shown] == [(60, 30, 3)] * 12
    assert text(figures[f"attention_{best[0]}"]).count("as ") > 1
    shown = [panel for panel in figures[f"pairs_{best[0]}"].axes if panel.images]
    assert len(shown) > 1 and all(
        " as " in f" {panel.get_title()}".replace("\n", " ") for panel in shown
    )


def test_stages_that_have_not_run_are_skipped(tmp_path, capsys):
    summary = write_study(tmp_path)
    write(tmp_path / "summary.json", {**summary, "transfer": [], "dropout": [], "models": []})
    names = ("curves_plain", "curves_residual", "settings_plain", "settings_residual")
    assert draw(tmp_path) == {*names, "grid_heatmap"}
    assert capsys.readouterr().out.count("skipped") == 3


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"grid": [{}]}'])
def test_a_bad_summary_ends_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(SystemExit, match="summary.json.*`python evaluate.py --chosen") as stop:
        plot.main(["--output", str(tmp_path)])
    assert len(str(stop.value).splitlines()) == 1


def test_a_lost_run_is_named(tmp_path):
    write_study(tmp_path)
    (tmp_path / "runs/plain-0.03.json").unlink()
    with pytest.raises(SystemExit, match="lacks: plain-0.03.*`python evaluate.py --chosen"):
        plot.main(["--output", str(tmp_path)])


@pytest.mark.parametrize(
    "classes", (["cat", "dog"], [f"a_rather_long_name_{i}" for i in range(30)])
)
def test_few_and_many_classes_fit(tmp_path, classes):
    write_study(tmp_path, classes, photos=130, epochs=1, seeds=3)
    assert draw(tmp_path) == FIGURES


def test_a_model_name_that_leads_elsewhere_is_refused(tmp_path):
    write_study(tmp_path / "results")
    path = tmp_path / "results/summary.json"
    path.write_text(path.read_text().replace('"model": "plain"', '"model": "x/../../../evil"'))
    with pytest.raises(SystemExit, match="leads out of the folder"):
        plot.main(["--output", str(tmp_path / "results")])
    assert [entry.name for entry in tmp_path.iterdir()] == ["results"]


def test_accuracy_over_the_number_of_photos_is_one_line_a_network(tmp_path, figures):
    rows = [
        {
            "label": label,
            "photos_per_class": photos,
            "test_accuracy": 0.5,
            "test_interval_95": [0.4, 0.6],
        }
        for label in ("plain CNN", "mobilenet_v2 (FC only)")
        for photos in (25, 50, 99.6)
    ]
    plot.draw_sizes(tmp_path / "sizes.png", rows)
    shown = text(figures["sizes"])
    assert "plain CNN" in shown and "mobilenet_v2 (FC only)" in shown and "100" in shown
