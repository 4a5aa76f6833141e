"""Draw every figure of the study from the JSON files of a results folder; needs no GPU.

    python plot.py                                    results/*.json -> results/figures/*.png
    python plot.py --output results --data food11     also the photos of the worst mistakes

Training is dashed orange, validation solid blue with filled circles, test vermillion with hollow
squares: safe for colour-blind readers (Okabe-Ito) and in grey print. Intervals are Wilson's, 95%.
"""

import itertools
import math
import textwrap
from pathlib import Path

from common import Parser, atomic_file, best_models, printable, read_json, read_runs, split_folder

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image, ImageOps

WIDTH = 9.0  # inches; at 110 dots per inch about the width of a page on GitHub
matplotlib.rcParams.update(
    {
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.prop_cycle": matplotlib.cycler(  # Okabe-Ito
            color=(
                "#0072B2",
                "#D55E00",
                "#009E73",
                "#CC79A7",
                "#E69F00",
                "#56B4E9",
                "black",
                "grey",
            )
        ),
        "grid.color": "#E4E4E4",
        "legend.frameon": False,
        "text.parse_math": False,  # a class name may hold a dollar sign
    }
)
TRAINING = {"color": "#E69F00", "linestyle": "--", "label": "training"}
VALIDATION = {"color": "#0072B2", "marker": "o", "label": "validation"}
TEST = {"color": "#D55E00", "marker": "s", "markerfacecolor": "white", "label": "test"}
BARE = {"frame_on": False, "xticks": [], "yticks": []}  # axes that show nothing but a photo
MANY_CLASSES = 60  # more, and a confusion matrix has no room for counts
TOO_MANY_CLASSES = 300  # more, and it has none for names either
SETTING = ("learning_rate", "batch_size")
CASE = ("model", "unfreeze_convolutions")


def save(figure, path, title, *styles):
    """Add a title and a legend below the panels, write the PNG in one step, print its path."""
    figure.suptitle(title, fontsize=11)
    if styles:
        handles = [Line2D([], [], **style) for style in styles]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(styles))
    with atomic_file(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})
    print(path)


def group(lines, *keys):
    """Lines of a table by their values of `keys`, in first-seen order: the seeds of a setting."""
    groups = {}
    for line in lines:
        groups.setdefault(tuple(line[key] for key in keys), []).append(line)
    return groups


def mean_accuracy(seeds):
    """Mean of the best validation accuracies of a setting; NaN if one of its runs failed."""
    return np.array([seed["validation_accuracy"] for seed in seeds], float).mean()  # None is NaN


def setting_name(line):
    """Learning rate and batch size, which set a run apart from the others of a grid."""
    name = f"learning rate {line['learning_rate']:g}, batch {line['batch_size']}"
    return f"chosen: {name}" if line["chosen"] else name


def outcome(seeds):
    """What became of the runs of a setting: best accuracy and its epochs, or how many failed."""
    epochs = [seed["epoch"] for seed in seeds]
    if None in epochs:
        return f"failed: {epochs.count(None)} of {len(seeds)} runs"
    best = "best" if len(seeds) == 1 else "mean of best"
    text = f"{best} {mean_accuracy(seeds):.1%} at epoch {', '.join(map(str, epochs))}"
    return textwrap.fill(text, 40)


def draw_curves(path, who, lines, runs, column_key, row_key, headings):
    """Accuracy above loss for each value of column_key and row_key; one line per seed.

    lines: of a table of the summary; runs: their JSON, and headings: of their panels, by run.
    """
    columns = sorted({line[column_key] for line in lines})
    rows = sorted({line[row_key] for line in lines})
    figure = Figure(figsize=(max(WIDTH, 3.2 * len(columns)), 0.9 + 2.4 * len(rows)))
    axes = figure.subplots(2 * len(rows), len(columns), sharex=True, sharey="row", squeeze=False)
    for (column, row), seeds in group(lines, column_key, row_key).items():
        first, own = 2 * rows.index(row), axes[:, columns.index(column)]
        for seed in seeds:
            history = runs[seed["run"]]["history"]
            dot = [] if seed["epoch"] is None else [seed["epoch"] - 1]
            look = {"linewidth": 1.6 / len(seeds) ** 0.5, "markevery": dot}
            for panel, measure in ((own[first], "accuracy"), (own[first + 1], "loss")):
                for split, style in (("train", TRAINING), ("validation", VALIDATION)):
                    # Results of other versions may hold null for NaN: a gap in the line.
                    values = np.array([epoch[f"{split}_{measure}"] for epoch in history], float)
                    panel.plot(range(1, len(values) + 1), values, **look, **style)
        own[first].set_title(f"{headings[seeds[0]['run']]}\n{outcome(seeds)}")
    # A diverged run must not flatten all others: cut at twice the loss of guessing evenly.
    top, cut = 2 * math.log(len(runs[lines[0]["run"]]["data"]["classes"])), ""
    for index in range(len(rows)):
        above, below = axes[2 * index, 0], axes[2 * index + 1, 0]
        above.set(ylabel="accuracy", ylim=(0, 1.02), yticks=[0, 0.25, 0.5, 0.75, 1])
        above.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        highest = below.get_ylim()[1]
        if highest > top:
            cut = f" (loss cut at {top:.1f})"
        below.set(ylabel="loss", ylim=(0, min(top, highest)))
    for panel in axes[-1]:
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.align_ylabels()
    title = f"{who}: learning curves; the dot marks the best epoch by validation accuracy{cut}"
    save(figure, path, title, TRAINING, VALIDATION)


def draw_overlay(path, model, lines, runs):
    """Validation accuracy above loss of all settings of one network, over each other.

    The lines of the first seed; each is named at its end, the names in the order of the ends.
    """
    lines = [seeds[0] for seeds in group(lines, *SETTING).values()]
    lines = [line for line in lines if line["epoch"] is not None]  # not those that failed
    figure = Figure(figsize=(5.6, 6))
    axes = figure.subplots(2, 1, sharex=True)
    rates = sorted({line["learning_rate"] for line in lines})
    batches = sorted({line["batch_size"] for line in lines})
    for panel, measure in zip(axes, ("accuracy", "loss"), strict=True):
        ends = []
        for line in lines:
            history = runs[line["run"]]["history"]
            values = np.array([epoch[f"validation_{measure}"] for epoch in history], float)
            color = f"C{rates.index(line['learning_rate'])}"
            panel.plot(
                range(1, len(values) + 1),
                values,
                color=color,
                linestyle=("-", "--", ":", "-.")[batches.index(line["batch_size"]) % 4],
                linewidth=2 if line["chosen"] else 1,
            )
            name = f"{line['learning_rate']:g}, batch {line['batch_size']}"
            name += " (chosen)" if line["chosen"] else ""
            ends.append((len(values), values[-1], name, color))
        ends.sort(key=lambda end: -end[1])
        # Accuracy ends near the top of its panel, loss near the bottom, and so do the names.
        span = min(0.9, 0.11 * (len(ends) - 1))
        top = 0.95 if measure == "accuracy" else 0.05 + span
        places = np.linspace(top, top - span, len(ends))
        for place, (epoch, value, name, color) in zip(places, ends, strict=True):
            panel.annotate(
                name,
                (epoch, value),
                (1.06, place),
                textcoords="axes fraction",
                color=color,
                va="center",
                fontsize=9,
                arrowprops={
                    "arrowstyle": "-",
                    "color": color,
                    "linewidth": 0.5,
                    "relpos": (0, 0.5),
                },
            )
        panel.set_ylabel(f"validation {measure}")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[0].set_title("at the right: learning rate, batch size", loc="right")
    axes[1].set_xlabel("epoch")
    axes[1].xaxis.set_major_locator(MaxNLocator(5, integer=True))
    save(figure, path, f"{model}: all settings over each other")


def draw_cells(panel, shades, texts, rows, columns, size=10):
    """A table of `texts` {(row, column): text}; the higher the shade (0..1), the darker a cell."""
    panel.imshow(shades, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), text in texts.items():
        color = "white" if shades[row, column] > 0.55 else "black"
        panel.text(column, row, text, ha="center", va="center", color=color, fontsize=size)
    panel.grid(False)
    panel.set_yticks(range(len(rows)), rows)
    panel.set_xticks(range(len(columns)), columns)


def draw_grid(path, lines):
    """Best validation accuracy (mean over seeds) by learning rate and batch size of each model."""
    models = group(lines, "model")
    rates, batches = (sorted({line[key] for line in lines}) for key in SETTING)
    width = max(WIDTH, 1 + 1.1 * len(models) * len(rates))
    figure = Figure(figsize=(width, 1.4 + 0.75 * len(batches)))
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    accuracies = [line["validation_accuracy"] for line in lines if line["epoch"] is not None]
    low, high = min(accuracies, default=0), max(accuracies, default=0)
    for panel, ((model,), own) in zip(axes, models.items(), strict=True):
        shades, texts = np.full((len(batches), len(rates)), np.nan), {}
        for (rate, batch), seeds in group(own, *SETTING).items():
            row, column = batches.index(batch), rates.index(rate)
            mean = mean_accuracy(seeds)
            shades[row, column] = 0.8 * (mean - low) / max(high - low, 1e-9)
            texts[row, column] = "failed" if np.isnan(mean) else f"{mean:.1%}"
            if len(seeds) > 1:
                texts[row, column] += f"\n{len(seeds)} seeds"
            if any(seed["chosen"] for seed in seeds):
                corner = (column - 0.47, row - 0.46)
                panel.add_patch(Rectangle(corner, 0.94, 0.92, fill=False, linewidth=2.5))
        draw_cells(panel, shades, texts, batches, [f"{rate:g}" for rate in rates])
        panel.set(title=model, xlabel="learning rate")
    axes[0].set_ylabel("batch size")
    save(figure, path, "Best validation accuracy of each setting; the frame marks the chosen one")


def draw_dots(path, title, rows):
    """A line for each (label, row of the summary's `models`); what is not evaluated is left out."""
    figure = Figure(figsize=(WIDTH, 1.3 + 0.5 * len(rows)))
    axes = figure.subplots()
    for place, (_, row) in enumerate(rows):
        for shift, split, style in ((-0.17, "validation", VALIDATION), (0.17, "test", TEST)):
            accuracy, y = row[f"{split}_accuracy"], place + shift
            if accuracy is not None:
                end, bar = accuracy, None
                if split == "test":  # validation photos have chosen what they measure
                    low, end = row["test_interval_95"]
                    bar = np.abs([[accuracy - low], [end - accuracy]])
                axes.errorbar(accuracy, y, xerr=bar, capsize=3, **style)
                axes.text(end, y, f"   {accuracy:.1%}", va="center", fontsize=9)
    left, right = axes.get_xlim()
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= 1])
    axes.set(xlim=(left, right + 0.06 * (right - left)), ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlabel("accuracy (bars: 95% intervals over test photos)")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.grid(axis="y", visible=False)
    save(figure, path, title, VALIDATION, TEST)


def class_names(evaluation):
    return [printable(name).replace("_", " ") for name in evaluation["classes"]]


def shorten(name, most):
    """A name of at most `most` characters: if it is longer, its beginning and its end."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def add_up(evaluations):
    """Confusion matrix, int64 [classes, classes], of all seeds of a model together."""
    return np.sum([evaluation["confusion_matrix"] for evaluation in evaluations], axis=0)


def draw_confusion(path, row, evaluations):
    """Counts, true classes down and predicted ones across; the shades of a row sum to 1.

    row: of the summary's `models`; evaluations: of all its seeds on one split, added up.
    """
    counts = add_up(evaluations)
    split, seeds = evaluations[0]["split"], len(evaluations)
    classes = [shorten(name, 28) for name in class_names(evaluations[0])]
    side, many = min(WIDTH, max(5.8, 3 + 0.26 * len(classes))), len(classes) > MANY_CLASSES
    named = len(classes) <= TOO_MANY_CLASSES
    if many and named:  # large enough for their names
        side = 5 + 0.1 * len(classes)
    figure = Figure(figsize=(side, 0.9 * side))
    axes = figure.subplots()
    shades = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    cells = [] if many else np.ndenumerate(counts)
    texts = {place: str(count) for place, count in cells if count > 0}
    draw_cells(axes, shades, texts, classes, classes, size=min(10, 240 / len(classes)))
    axes.tick_params(axis="x", labelrotation=90)
    if many and named:
        axes.tick_params(labelsize=6)
    axes.set(xlabel="predicted", ylabel="true")
    if not named:
        hint = "classes by their number in the evaluation's JSON"
        axes.set(xticks=[0, len(classes) - 1], yticks=[0, len(classes) - 1])
        axes.set(xticklabels=[0, len(classes) - 1], yticklabels=[0, len(classes) - 1])
        axes.tick_params(axis="both", labelsize=10, labelrotation=0)
        axes.set(xlabel=f"predicted, {hint}", ylabel=f"true, {hint}")
    name = row["label"] if seeds == 1 else f"{row['label']}, sum over {seeds} seeds"
    right = f"{counts.trace() / counts.sum():.1%} of {counts.sum() // seeds} {split} photos right"
    if split == "test":
        low, high = row["test_interval_95"]
        right += f" (95% interval {low:.1%} to {high:.1%})"
    save(figure, path, f"{textwrap.fill(name, 60)}\n{right}")


def draw_sizes(path, sizes):
    """Test accuracy over training photos a class, a line for each network, 95% intervals."""
    figure = Figure(figsize=(WIDTH, 5.5))
    axes = figure.subplots()
    marks = itertools.cycle("os^Dvp*")
    for number, ((label,), rows) in enumerate(group(sizes, "label").items()):
        photos = np.array([row["photos_per_class"] for row in rows])
        accuracy = np.array([row["test_accuracy"] for row in rows])
        low, high = np.array([row["test_interval_95"] for row in rows]).T
        axes.errorbar(
            photos * 1.015**number,  # beside each other
            100 * accuracy,
            [100 * (accuracy - low), 100 * (high - accuracy)],
            marker=next(marks),
            label=label,
            linewidth=1.2,
            capsize=2,
        )
    axes.set_xscale("log", base=2)
    shown = sorted({round(row["photos_per_class"]) for row in sizes})
    axes.set_xticks(shown, shown)
    axes.set(xlabel="training photos a class, on average", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    save(figure, path, "How many photos does it take? With 95% intervals over test photos")


def read_photo(path):
    """A photo upright, in RGB, at most 320 pixels a side; None if it is missing or damaged."""
    try:
        with Image.open(path) as image:
            image.thumbnail((320, 320))
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def draw_mistakes(path, label, evaluation, data):
    """The 12 most confident mistakes whose photos can be read in the folder `data`."""
    photos, classes = [], class_names(evaluation)
    for guess in sorted(evaluation["predictions"], key=lambda guess: -guess["probability"]):
        if guess["label"] != guess["predicted"] and len(photos) < 12:
            photo = read_photo(split_folder(data, evaluation["split"]) / guess["file"])
            if photo is not None:  # else the next one takes its place
                photos.append((photo, guess))
    if not photos:
        print(f"skipped {path}: no mistake, or no photo of one in {data}")
        return
    rows = math.ceil(len(photos) / 4)
    figure = Figure(figsize=(WIDTH, 0.5 + 2.7 * rows))
    axes = figure.subplots(rows, 4, squeeze=False, subplot_kw=BARE).ravel()
    for panel, (photo, guess) in zip(axes, photos, strict=False):
        panel.imshow(photo)
        true = f"true: {classes[guess['label']]}"
        predicted = f"predicted: {classes[guess['predicted']]} ({guess['probability']:.0%})"
        panel.set_title(f"{textwrap.fill(true, 30)}\n{textwrap.fill(predicted, 30)}")
    save(figure, path, f"{label}: most confident mistakes on {evaluation['split']} photos")


def confused_pairs(counts):
    """Pairs of classes that are mixed up, the most often mixed first.

    counts: a confusion matrix, int64 [classes, classes]. Returns a list of (how often, class,
    class), the classes as their numbers, the one that is more often taken for the other first.
    """
    pairs = []
    for i, j in itertools.combinations(range(len(counts)), 2):
        true, taken_for = (i, j) if counts[i, j] >= counts[j, i] else (j, i)
        if counts[true, taken_for]:
            pairs.append((int(counts[i, j] + counts[j, i]), true, taken_for))
    return sorted(pairs, key=lambda pair: -pair[0])


def draw_pairs(path, label, evaluations, data):
    """Photos of the three most mixed up pairs of classes, a row each, those of the first seed."""
    classes, rows = class_names(evaluations[0]), []
    guesses = sorted(evaluations[0]["predictions"], key=lambda guess: -guess["probability"])
    for _, one, other in confused_pairs(add_up(evaluations))[:3]:
        row = []
        for guess in guesses:
            if {guess["label"], guess["predicted"]} == {one, other} and len(row) < 4:
                photo = read_photo(split_folder(data, evaluations[0]["split"]) / guess["file"])
                if photo is not None:
                    row.append((ImageOps.fit(photo, (240, 240)), guess))
        rows.append(row)
    if not any(rows):
        print(f"skipped {path}: nothing is mixed up, or no photo of it in {data}")
        return
    figure = Figure(figsize=(5.6, 0.6 + 1.8 * len(rows)))
    axes = figure.subplots(len(rows), 4, squeeze=False, subplot_kw=BARE)
    for panels, row in zip(axes, rows, strict=True):
        for panel, (photo, guess) in zip(panels, row, strict=False):
            panel.imshow(photo)
            names = [classes[guess[key]] for key in ("label", "predicted")]
            true, predicted = (shorten(name, 18) for name in names)
            panel.set_title(f"{true}\nas {predicted}", fontsize=8)
    save(figure, path, f"{textwrap.fill(label, 60)}\nwhat it mixes up most")


def draw_attention(path, label, evaluation, data):
    """Photos under their class-activation maps: right ones above, wrong ones below."""
    classes, rows = class_names(evaluation), {"right": [], "wrong": []}
    for example in evaluation.get("activation_maps", []):
        guess = evaluation["predictions"][example["photo"]]
        photo = read_photo(split_folder(data, evaluation["split"]) / guess["file"])
        if photo is not None:
            right = guess["label"] == guess["predicted"]
            rows["right" if right else "wrong"].append((guess, photo, example["map"]))
    if not rows["right"] and not rows["wrong"]:
        print(f"skipped {path}: no class-activation map, or no photo of one in {data}")
        return
    figure = Figure(figsize=(WIDTH, 3.9))
    axes = figure.subplots(2, 6, squeeze=False, subplot_kw=BARE)
    for panels, (name, examples) in zip(axes, rows.items(), strict=True):
        panels[0].set_ylabel(name)
        for panel, (guess, photo, values) in zip(panels, examples, strict=False):
            heat = Image.fromarray(np.array(values, np.float32)).resize((240, 240))
            panel.imshow(ImageOps.fit(photo.convert("L"), (240, 240)), cmap="gray")
            panel.imshow(np.array(heat), cmap="inferno", alpha=0.5, vmin=0, vmax=1)
            title = shorten(classes[guess["label"]], 20)
            if name == "wrong":
                title += f"\nas {shorten(classes[guess['predicted']], 17)}"
            panel.set_title(title)
    save(figure, path, f"{label}: what speaks for the predicted class (bright)")


def read_summary(output):
    """The content of summary.json and the runs that it names: name -> content of the JSON.

    Exits with one line if it, or one of its runs, is missing.
    """
    path, runs = output / "summary.json", read_runs(output)
    advice = f"`python evaluate.py --chosen --output {output}` writes it anew."
    try:
        keys = ("grid", "choices", "dropout", "transfer", "models", "sizes", "slopes")
        summary = read_json(path, *keys, "failed", "left_out", "comparisons")
    except SystemExit as error:
        raise SystemExit(f"{error} {advice}") from None
    lines = summary["grid"] + summary["dropout"] + summary["transfer"]
    rows = summary["models"] + summary["sizes"]
    names = {line["run"] for line in lines}.union(*[row["runs"] for row in rows])
    if any(Path(line["model"]).name != line["model"] for line in lines):
        raise SystemExit(f"{path}: a model's name leads out of the folder. {advice}")
    if not runs.keys() >= names:
        lost = ", ".join(sorted(names - runs.keys()))
        raise SystemExit(f"{path} names runs that {output}/runs lacks: {lost}. {advice}")
    return summary, {name: runs[name] for name in sorted(names)}


def read_evaluations(output, row):
    """Evaluations of all seeds of a chosen model, on test or else on validation: a list of dicts.

    The list is empty if no split has been measured with every seed.
    """
    for split in ("test", "validation"):
        paths = [output / "evaluations" / f"{name}.{split}.json" for name in row["runs"]]
        if row[f"{split}_accuracy"] is not None and all(path.is_file() for path in paths):
            keys = ("split", "classes", "confusion_matrix", "predictions")
            return [read_json(path, *keys) for path in paths]
    return []


def draw_all(output, data):
    """Draw what the summary lists; a stage that has not been run is skipped with one line."""
    summary, runs = read_summary(output)
    figures, grid, models = output / "figures", summary["grid"], summary["models"]
    row_of = {name: row for row in models for name in row["runs"]}
    labels = {name: row["label"].replace(" (", "\n(") for name, row in row_of.items()}
    for stage in ("grid", "transfer", "models"):
        if not summary[stage]:
            print(f"skipped the figures of `{stage}`: summary.json lists no run of it yet")
    headings = {line["run"]: setting_name(line) for line in grid}
    for (model,), lines in group(grid, "model").items():
        draw_curves(figures / f"curves_{model}.png", model, lines, runs, *SETTING, headings)
        draw_overlay(figures / f"settings_{model}.png", model, lines, runs)
    if grid:
        draw_grid(figures / "grid_heatmap.png", grid)
    cases = group(summary["dropout"], "model", "dropout")
    if any(line["dropout"] for line in summary["dropout"]):
        names = [seeds[0]["run"] for seeds in cases.values()]
        rows = [(labels[name], row_of[name]) for name in names]
        draw_dots(figures / "dropout.png", "Dropout in front of the fully connected layers", rows)
    else:
        print("skipped dropout.png: summary.json lists no run with dropout yet")
    chosen = [line for line in summary["transfer"] if line["chosen"]]
    if chosen:
        names = [seeds[0]["run"] for _, seeds in sorted(group(chosen, *CASE).items())]
        rows = [(labels[name], row_of[name]) for name in names]
        draw_dots(figures / "transfer.png", "Fine-tuning pre-trained networks", rows)
        draw_curves(figures / "curves_transfer.png", "Fine-tuning", chosen, runs, *CASE, labels)
    sizes = [row for row in summary["sizes"] if row["test_accuracy"] is not None]
    if sizes:
        draw_sizes(figures / "sizes.png", sizes)
    ranked = sorted(models, key=lambda row: -row["validation_accuracy"])
    if ranked:
        text = "{label}\n{parameters:,} parameters, {trainable_parameters:,} trained"
        rows = [(text.format(**row), row) for row in ranked]
        draw_dots(figures / "overview.png", "All chosen models", rows)
    best = best_models(models).values()  # one from scratch and one pre-trained
    for row in ranked:
        name, label = row["runs"][0], row["label"]  # the first seed stands for all
        evaluations = read_evaluations(output, row)
        if not evaluations:
            print(f"skipped the confusion matrix of {name}: not evaluated yet")
            continue
        split = evaluations[0]["split"]
        draw_confusion(figures / f"confusion_{name}_{split}.png", row, evaluations)
        if data and row in best:
            draw_pairs(figures / f"pairs_{name}.png", label, evaluations, data)
            draw_mistakes(figures / f"mistakes_{name}.png", label, evaluations[0], data)
            draw_attention(figures / f"attention_{name}.png", label, evaluations[0], data)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--output", default="results", metavar="DIR", help="folder of results")
    parser.add_argument("--data", metavar="DIR", help="folder of photos: draw mistakes too")
    arguments = parser.parse_args(argv)
    draw_all(Path(arguments.output), arguments.data)


if __name__ == "__main__":
    main()
