"""Draw every figure of the study from the JSON files of a results folder; needs no GPU.

    python plot.py                                    results/*.json -> results/figures/*.png
    python plot.py --output results --data food11     also the photos of the worst mistakes

Training is dashed orange, validation solid blue with filled circles, test vermillion with hollow
squares: safe for colour-blind readers (Okabe-Ito) and in grey print. Intervals are Wilson's, 95%.
"""

import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image, ImageOps

from runs import Parser, atomic_file, read_json, read_runs, run_main

WIDTH = 9.0  # inches; at 110 dots per inch about the width of a page on GitHub
LOOK = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "text.parse_math": False,  # a class name may hold a dollar sign
}
matplotlib.rcParams.update(LOOK)
TRAINING = {"color": "#E69F00", "linestyle": "--", "label": "training"}
VALIDATION = {"color": "#0072B2", "marker": "o", "label": "validation"}
TEST = {"color": "#D55E00", "marker": "s", "markerfacecolor": "white", "label": "test"}
SETTING = ("learning_rate", "batch_size")
CASE = ("model", "unfreeze_convolutions")


def save(figure: Figure, path: Path, title: str, *styles: dict) -> None:
    """Add a title and a legend below the panels, write the PNG in one step, print its path."""
    figure.suptitle(title, fontsize=11)
    if styles:
        handles = [Line2D([], [], **style) for style in styles]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(styles))
    with atomic_file(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})
    print(path)


def group(entries: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Entries that share the values of `keys` (the seeds of one setting), in first-seen order."""
    groups: dict[tuple, list[dict]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry[key] for key in keys), []).append(entry)
    return groups


def setting_name(entry: dict) -> str:
    """What sets this run apart: learning rate and batch size, or what fine-tuning trained."""
    count = entry.get("unfreeze_convolutions")
    if count is None:
        chosen = "chosen: " if entry["chosen"] else ""
        return f"{chosen}learning rate {entry['learning_rate']:g}, batch {entry['batch_size']}"
    case = f"last {count} convolutions + FC" if count else "FC only"
    return f"{entry['model']}\n{case}"


def draw_curves(path: Path, who: str, entries: list, finished: dict, column_key: str, row_key: str):
    """Accuracy above loss for each value of column_key and row_key; one line per seed."""
    columns, rows = (sorted({entry[key] for entry in entries}) for key in (column_key, row_key))
    figure = Figure(figsize=(WIDTH, 0.9 + 3.4 * len(rows)))
    axes = figure.subplots(2 * len(rows), len(columns), sharex=True, sharey="row", squeeze=False)
    for (column, row), seeds in group(entries, column_key, row_key).items():
        pair = axes[2 * rows.index(row) :, columns.index(column)][:2]
        for entry in seeds:
            history, best = finished[entry["run"]]["history"], [entry["epoch"] - 1]
            width = 1.6 / len(seeds) ** 0.5
            for panel, measure in zip(pair, ("accuracy", "loss"), strict=True):
                for split, style in (("train", TRAINING), ("validation", VALIDATION)):
                    # A loss that became NaN is stored as null: the line has a gap there.
                    line = np.array([epoch[f"{split}_{measure}"] for epoch in history], dtype=float)
                    epochs = range(1, len(line) + 1)
                    panel.plot(epochs, line, linewidth=width, markevery=best, **style)
        mean = np.mean([entry["validation_accuracy"] for entry in seeds])
        epochs = ", ".join(str(entry["epoch"]) for entry in seeds)
        best = "best" if len(seeds) == 1 else "mean of best"
        pair[0].set_title(f"{setting_name(seeds[0])}\n{best} {mean:.1%} at epoch {epochs}")
    # A diverged run must not flatten all others: cut at twice the loss of guessing evenly.
    top = 2 * np.log(max(2, len(finished[entries[0]["run"]]["data"]["classes"])))
    cut = f" (loss cut at {top:.1f})" if max(p.get_ylim()[1] for p in axes[1::2, 0]) > top else ""
    for above, below in zip(axes[::2, 0], axes[1::2, 0], strict=True):
        above.set(ylabel="accuracy", ylim=(0, 1.02), yticks=[0, 0.25, 0.5, 0.75, 1])
        above.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        below.set(ylabel="loss", ylim=(0, min(top, below.get_ylim()[1])))
    for panel in axes[-1]:
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.align_ylabels()
    title = f"{who}: learning curves; the dot marks the best epoch by validation accuracy{cut}"
    save(figure, path, title, TRAINING, VALIDATION)


def draw_cells(panel, shades: np.ndarray, texts: dict[tuple, str], rows, columns, size=10) -> None:
    """A table of `texts` {(row, column): text}; the higher the shade (0..1), the darker a cell."""
    panel.imshow(shades, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), text in texts.items():
        color = "white" if shades[row, column] > 0.55 else "black"
        panel.text(column, row, text, ha="center", va="center", color=color, fontsize=size)
    panel.grid(False)
    panel.set_yticks(range(len(rows)), rows)
    panel.set_xticks(range(len(columns)), columns)


def draw_grid(path: Path, entries: list[dict]) -> None:
    """Best validation accuracy (mean over seeds) by learning rate and batch size of each model."""
    models = group(entries, "model")
    rates, batches = (sorted({entry[key] for entry in entries}) for key in SETTING)
    figure = Figure(figsize=(WIDTH, 1.4 + 0.75 * len(batches)))
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    accuracies = [entry["validation_accuracy"] for entry in entries]
    low, span = min(accuracies), max(accuracies) - min(accuracies) or 1
    for panel, ((model,), own) in zip(axes, models.items(), strict=True):
        shades, texts = np.full((len(batches), len(rates)), np.nan), {}
        for (rate, batch), seeds in group(own, *SETTING).items():
            row, column = batches.index(batch), rates.index(rate)
            mean = np.mean([entry["validation_accuracy"] for entry in seeds])
            shades[row, column] = 0.8 * (mean - low) / span
            texts[row, column] = f"{mean:.1%}\n{len(seeds)} seeds" if seeds[1:] else f"{mean:.1%}"
            if seeds[0]["chosen"]:
                corner, look = (column - 0.47, row - 0.46), {"fill": False, "linewidth": 2.5}
                panel.add_patch(Rectangle(corner, 0.94, 0.92, **look))
        draw_cells(panel, shades, texts, batches, [f"{rate:g}" for rate in rates])
        panel.set(title=model, xlabel="learning rate")
    axes[0].set_ylabel("batch size")
    save(figure, path, "Best validation accuracy of each setting; the frame marks the chosen one")


def draw_dots(path: Path, rows: list[tuple[str, dict]], title: str) -> None:
    """A line for each (label, row of the summary's `models`); what is not evaluated is left out."""
    figure = Figure(figsize=(WIDTH, 1.4 + 0.6 * len(rows)))
    axes = figure.subplots()
    for place, (_, row) in enumerate(rows):
        for y, split, style in ((-0.17, "validation", VALIDATION), (0.17, "test", TEST)):
            accuracy, interval = row[f"{split}_accuracy"], row[f"{split}_interval_95"]
            if accuracy is not None:
                spread = np.abs(np.subtract(interval, accuracy))[:, None]
                axes.errorbar(accuracy, place + y, xerr=spread, capsize=3, **style)
                axes.text(interval[1], place + y, f"  {accuracy:.1%}", va="center", fontsize=9)
    left, right = axes.get_xlim()
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= 1])
    axes.set(xlim=(left, right + 0.06 * (right - left)), ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlabel("accuracy (bars: 95% intervals)")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.grid(axis="y", visible=False)
    save(figure, path, title, VALIDATION, TEST)


def draw_confusion(path: Path, evaluation: dict, label: str) -> None:
    """Counts, true classes down and predicted ones across; the shades of a row sum to 1."""
    counts, (low, high) = np.array(evaluation["confusion_matrix"]), evaluation["interval_95"]
    classes = [textwrap.shorten(name.replace("_", " "), 28) for name in evaluation["classes"]]
    side = min(WIDTH, 5 + 0.4 * len(classes))
    figure = Figure(figsize=(side, 0.9 * side))
    axes = figure.subplots()
    shades = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    texts = {place: str(count) for place, count in np.ndenumerate(counts) if count}
    draw_cells(axes, shades, texts, classes, classes, size=min(10, 240 / len(classes)))
    axes.tick_params(axis="x", labelrotation=90)
    axes.set(xlabel="predicted", ylabel="true")
    title = f"{label}\n{evaluation['accuracy']:.1%} of {counts.sum()} {evaluation['split']} photos"
    save(figure, path, f"{title} right (95% interval {low:.1%} to {high:.1%})")


def read_photo(path: Path) -> Image.Image | None:
    """A photo upright, in RGB, at most 320 pixels a side; None if it is missing or damaged."""
    try:
        with Image.open(path) as image:
            image.thumbnail((320, 320))
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def draw_mistakes(path: Path, evaluation: dict, label: str, data: Path) -> None:
    """The 12 most confident mistakes whose photos can be read."""
    photos, classes = [], [name.replace("_", " ") for name in evaluation["classes"]]
    for mistake in sorted(evaluation["predictions"], key=lambda row: -row["probability"]):
        if mistake["label"] == mistake["predicted"] or len(photos) == 12:
            continue
        if photo := read_photo(data / evaluation["split"] / mistake["file"]):
            photos.append((photo, mistake))  # else the next one takes its place
    if not photos:
        return print(f"skipped {path}: no mistake, or no photo of one in {data}")
    rows = -(-len(photos) // 4)
    figure = Figure(figsize=(WIDTH, 0.5 + 2.7 * rows))
    bare = {"frame_on": False, "xticks": [], "yticks": []}
    axes = figure.subplots(rows, 4, squeeze=False, subplot_kw=bare).ravel()
    for panel, (photo, mistake) in zip(axes, photos, strict=False):
        panel.imshow(photo)
        lines = [f"true: {classes[mistake['label']]}"]
        lines += [f"predicted: {classes[mistake['predicted']]} ({mistake['probability']:.0%})"]
        panel.set_title("\n".join(textwrap.fill(line, 30) for line in lines))
    save(figure, path, f"{label}: most confident mistakes on {evaluation['split']} photos")


def draw_attention(path: Path, evaluation: dict, label: str, data: Path) -> None:
    """Photos under their class-activation maps: right ones above, wrong ones below."""
    classes, rows = (
        [name.replace("_", " ") for name in evaluation["classes"]],
        {True: [], False: []},
    )
    for example in evaluation.get("activation_maps", []):
        guess = evaluation["predictions"][example["photo"]]
        if photo := read_photo(data / evaluation["split"] / guess["file"]):
            photo = ImageOps.fit(photo.convert("L"), (240, 240))
            heat = Image.fromarray(np.array(example["map"], np.float32)).resize((240, 240))
            rows[guess["label"] == guess["predicted"]].append((guess, photo, np.array(heat)))
    if not any(rows.values()):
        return print(f"skipped {path}: no class-activation map, or no photo of one in {data}")
    figure, bare = Figure(figsize=(WIDTH, 4.4)), {"frame_on": False, "xticks": [], "yticks": []}
    axes = figure.subplots(2, 6, squeeze=False, subplot_kw=bare)
    for panels, (right, examples) in zip(axes, rows.items(), strict=True):
        panels[0].set_ylabel("right" if right else "wrong")
        for panel, (guess, photo, heat) in zip(panels, examples, strict=False):
            panel.imshow(photo, cmap="gray")
            panel.imshow(heat, cmap="inferno", alpha=0.5, vmin=0, vmax=1)
            lines = [classes[guess["label"]], f"as {classes[guess['predicted']]}"][: 2 - right]
            panel.set_title("\n".join(textwrap.shorten(line, 20) for line in lines))
    save(figure, path, f"{label}: what speaks for the predicted class (bright)")


def draw_all(output: Path, data: str | None) -> None:
    """Draw what the summary lists; a stage that has not been run is skipped with one line."""
    summary, finished = read_json(output / "summary.json"), read_runs(output)
    found = [read_json(path) for path in sorted(output.glob("evaluations/*.json"))]
    evaluations = {(evaluation["name"], evaluation["split"]): evaluation for evaluation in found}
    figures, grid, models = output / "figures", summary["grid"], summary["models"]
    row_of = {name: row for row in models for name in row["runs"]}
    for stage in ("grid", "dropout", "transfer", "models"):
        if not summary[stage]:
            print(f"skipped the figures of `{stage}`: summary.json lists no run of it yet")
    for (model,), entries in group(grid, "model").items():
        draw_curves(figures / f"curves_{model}.png", f"{model} CNN", entries, finished, *SETTING)
    if grid:
        draw_grid(figures / "grid_heatmap.png", grid)
    rows = [
        (f"{model}, dropout {rate:g}", row_of[seeds[0]["run"]])
        for (model, rate), seeds in group(summary["dropout"], "model", "dropout").items()
    ]
    if rows:
        draw_dots(figures / "dropout.png", rows, "Dropout in front of the fully connected layers")
    chosen = [entry for entry in summary["transfer"] if entry["chosen"]]
    if chosen:
        cases = [seeds[0] for _, seeds in sorted(group(chosen, *CASE).items())]
        rows = [(setting_name(case), row_of[case["run"]]) for case in cases]
        draw_dots(figures / "transfer.png", rows, "Fine-tuning pre-trained networks")
        draw_curves(figures / "curves_transfer.png", "Fine-tuning", chosen, finished, *CASE)
    if models:
        models = sorted(models, key=lambda row: -row["validation_accuracy"])
        trained = "{label}\n{parameters:,} parameters, {trainable_parameters:,} trained"
        rows = [(trained.format(**row), row) for row in models]
        draw_dots(figures / "overview.png", rows, "All chosen models")
    best = {model["kind"]: model for model in reversed(models)}  # from scratch and pre-trained
    for model in models:
        name = model["runs"][0]  # of several seeds the first
        splits = [split for split in ("test", "validation") if (name, split) in evaluations]
        if not splits:
            print(f"skipped the confusion matrix of {name}: not evaluated yet")
            continue
        evaluation, label = evaluations[name, splits[0]], model["label"]
        draw_confusion(figures / f"confusion_{name}_{splits[0]}.png", evaluation, label)
        if data and model is best[model["kind"]]:
            draw_mistakes(figures / f"mistakes_{name}.png", evaluation, label, Path(data))
            draw_attention(figures / f"attention_{name}.png", evaluation, label, Path(data))


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--output", default="results", metavar="DIR", help="folder of results")
    parser.add_argument("--data", metavar="DIR", help="folder of photos: draw mistakes too")
    options = parser.parse_args(arguments)
    source = Path(options.output, "summary.json")
    advice = f"run `python summary.py --output {options.output}` first"
    if not source.is_file():
        raise SystemExit(f"plot.py: no {source}: {advice}")
    try:
        draw_all(source.parent, options.data)
    except (KeyError, TypeError) as error:
        raise SystemExit(f"plot.py: {source} does not fit ({error!r}): {advice}") from error


if __name__ == "__main__":
    run_main(main)
