"""Draw every figure of a study from the JSON files of its folder of results; needs no GPU.

    python plot.py --output results --data food11    results/*.json -> results/figures/*.png

Colours are safe for colour-blind readers, intervals 95%, and photos are drawn as data.decode()
shows them to a network.
"""

import argparse
import itertools
import json
import os
from pathlib import Path

import matplotlib.style
import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

import data

WIDTH = 9.0  # inches; the width of a page in print is 7
matplotlib.style.use("tableau-colorblind10")
matplotlib.rcParams["figure.constrained_layout.use"] = True
matplotlib.rcParams["text.parse_math"] = False  # a class name may hold a dollar sign
BARE = {"frame_on": False, "xticks": [], "yticks": []}  # axes that show nothing but a photo


def use_fonts(texts):
    """Let matplotlib use installed fonts that have every character, or say which are missing."""
    missing, families = {ord(letter) for text in texts for letter in text}, []
    fonts = [font for font in font_manager.fontManager.ttflist if "Last Resort" not in font.name]
    for font in sorted(fonts, key=lambda font: font.name != "DejaVu Sans"):  # its own comes first
        known = missing and missing & font_manager.get_font(font.fname).get_charmap().keys()
        if known:
            families.append(font.name)
            missing -= known
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", *families]
    if missing:
        print(f"no installed font has {''.join(map(chr, missing))[:20]}: try Noto Sans CJK")


def save(figure, path):
    """Write the PNG, whole or not at all, and print its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    figure.savefig(unfinished, format="png", dpi=110)
    os.replace(unfinished, path)
    print(path)


def grid_of(runs, network):
    """The runs among which a network's setting was chosen: of the lowest seed, without dropout."""
    own = [run for run in runs.values() if run["model"]["name"] == network]
    own = [run for run in own if "-dropout" not in run["name"]]
    first = min((run["config"]["seed"] for run in own), default=None)
    return [run for run in own if run["config"]["seed"] == first]


def draw_curves(path, columns):
    """Loss above accuracy, training dashed; columns: {title: {label: history of a run}}."""
    labels = list(dict.fromkeys(itertools.chain(*columns.values())))
    figure = Figure(figsize=(WIDTH, 5))
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    for (title, lines), column in zip(columns.items(), axes.T, strict=True):
        column[0].set_title(title)
        column[1].set_xlabel("epoch")
        for axis, measure in zip(column, ("loss", "accuracy"), strict=True):
            for label, split in itertools.product(lines, ("train", "validation")):
                values = [row[f"{split}_{measure}"] for row in lines[label]]
                epochs, style = range(1, len(values) + 1), "--" if split == "train" else "-"
                axis.plot(epochs, values, style, color=f"C{labels.index(label)}")
    firsts = [history[0] for lines in columns.values() for history in lines.values() if history]
    # A run that diverged must not flatten all others.
    axes[0, 0].set(ylabel="loss", ylim=(None, 1.2 * max(row["train_loss"] for row in firsts)))
    axes[1, 0].set(ylabel="accuracy", ylim=(0, 1.02))
    axes[1, 0].yaxis.set_major_formatter(PercentFormatter(1))
    handles = [Line2D([], [], color=f"C{i}", label=label) for i, label in enumerate(labels)]
    handles.append(Line2D([], [], color="black", linestyle="--", label="training (distorted)"))
    handles.append(Line2D([], [], color="black", label="validation"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    save(figure, path)


def draw_grid(path, panels):
    """Best validation accuracies; panels: {title: {(row, column): (accuracy, chosen)}}."""
    figure, lines = Figure(figsize=(WIDTH, 1.2 * len(panels) + 0.5)), (len(panels) + 1) // 2
    for number, (title, cells) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(lines, 2, number)
        rows, columns = (sorted({place[i] for place in cells}) for i in (0, 1))
        values = np.full((len(rows), len(columns)), np.nan)
        for (row, column), (accuracy, chosen) in cells.items():
            y, x = rows.index(row), columns.index(column)
            values[y, x] = accuracy
            axis.text(x, y, f"{accuracy:.1%}", ha="center", va="center")
            if chosen:
                axis.add_patch(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, fill=False, linewidth=2))
        highest = 2 * np.nanmax(values) - np.nanmin(
            values
        )  # half of the colours: text stays legible
        axis.imshow(values, cmap="Blues", aspect="auto", vmax=highest)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_xticks(range(len(columns)), [f"{column:g}" for column in columns])
        axis.set(title=title, xlabel="learning rate")
    figure.suptitle("Best validation accuracy; framed: chosen")
    save(figure, path)


def draw_overview(path, rows):
    """Validation and test accuracy of all chosen models, the best above."""
    rows = sorted(rows, key=lambda row: row["validation_accuracy"])
    test = np.array([row["test_accuracy"] for row in rows])
    low, high = np.array([row["test_interval_95"] for row in rows]).T
    figure, places = Figure(figsize=(WIDTH, 1.2 + 0.33 * len(rows))), range(len(rows))
    axis = figure.subplots()
    validation = [row["validation_accuracy"] for row in rows]
    axis.plot(validation, places, "o", markerfacecolor="white", label="validation, which chose")
    bars = [test - low, high - test]
    axis.errorbar(test, places, xerr=bars, fmt="s", capsize=3, label="test, with its 95% interval")
    for place in places:
        axis.text(low[place], place, f"{test[place]:.1%}  ", ha="right", va="center")
    axis.set_yticks(places, [row["label"] for row in rows])
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.margins(x=0.15)
    figure.legend(loc="outside lower center", ncols=2)
    save(figure, path)


def draw_confusion(path, label, evaluations):
    """Counts over all seeds, true classes down and predicted ones across."""
    counts = np.sum([evaluation["confusion_matrix"] for evaluation in evaluations], axis=0)
    classes = [name.replace("_", " ") for name in evaluations[0]["classes"]]
    axis = Figure(figsize=[2.4 + 0.34 * len(classes)] * 2).subplots()
    axis.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmax=1.8)
    for y, x in np.argwhere(counts):
        axis.text(x, y, counts[y, x], ha="center", va="center")
    axis.set_xticks(range(len(classes)), classes, rotation=90)
    axis.set_yticks(range(len(classes)), classes)
    title = f"{label}: {counts.trace()} of {counts.sum()} right"
    axis.set(xlabel="predicted", ylabel="true", title=title)
    save(axis.figure, path)


def draw_sheet(path, photos, titles, columns):
    """Photos, each [3, H, W], in rows of so many, under their titles."""
    rows = max(1, -(-len(photos) // columns))
    figure = Figure(figsize=(WIDTH, 1.2 * rows * WIDTH / columns))
    axes = figure.subplots(rows, columns, squeeze=False, subplot_kw=BARE).ravel()
    for axis, photo, title in zip(axes, photos, titles, strict=False):
        axis.imshow(np.moveaxis(np.asarray(photo), 0, 2))
        axis.set_title(title, fontsize=9)
    save(figure, path)


def draw_mistakes(path, evaluation, directory):
    """The 12 most confident mistakes, with the photos of the data folder."""
    wrong = [guess for guess in evaluation["predictions"] if guess["label"] != guess["predicted"]]
    wrong = sorted(wrong, key=lambda guess: -guess["probability"])[:12]
    folder, titles = data.split_folder(directory, evaluation["split"]), []
    for guess in wrong:
        true, other = (evaluation["classes"][guess[key]] for key in ("label", "predicted"))
        titles.append(f"{true}, taken for\n{other} ({guess['probability']:.0%})")
    draw_sheet(path, [data.decode(folder / guess["file"], 224) for guess in wrong], titles, 4)


def draw_photos(path, directory):
    """Three training photos of each class (of twelve), as stored and as a network may see them."""
    split, folder = data.list_photos(directory, "train"), data.split_folder(directory, "train")
    mean, std = data.PIXEL_MEAN[:, None, None], data.PIXEL_STD[:, None, None]
    generator, photos, titles = torch.Generator().manual_seed(0), [], []
    for name in split.classes[:12]:
        own = (split.labels == split.classes.index(name)).nonzero().flatten().tolist() * 3
        stored = np.stack([data.decode(folder / split.files[i], 128) for i in own[:3]])
        view = data.draw_augmentation(3, generator, *data.Augmentation(0.2, 15.0, 0.3, 0.5))
        seen = data.augment(torch.from_numpy(stored), *view) * std + mean
        photos += [*stored, *seen.clamp(0, 1)]
        titles += [name, "", "", "as a network", "may see them", ""]
    draw_sheet(path, photos, titles, 6)


def draw_study(figures, rows, runs):
    """What the runs tell: curves of each network from scratch, of fine-tuning, all grids."""
    panels, transfer, chosen = {}, {}, [name for row in rows for name in row["runs"].values()]
    for network, kind in dict.fromkeys((row["network"], row["kind"]) for row in rows):
        backbone, _, case = network.rpartition("-")  # a network from scratch has no "-"
        columns = {}
        for run in grid_of(runs, network):
            rate, batch = run["config"]["learning_rate"], f"batch {run['config']['batch_size']}"
            columns.setdefault(batch, {})[f"learning rate {rate:g}"] = run["history"]
            if run["best"]:
                cell = run["best"]["validation_accuracy"], run["name"] in chosen
                panels.setdefault(case, {})[backbone or batch, rate] = cell
            if run["name"] in chosen and backbone:
                transfer.setdefault(case, {})[backbone] = run["history"]
        if kind == "scratch":
            draw_curves(figures / f"curves_{network}.png", columns)
    if transfer:
        draw_curves(figures / "curves_transfer.png", transfer)
    draw_grid(figures / "grid.png", panels)


def draw_tests(output, rows, directory):
    """Confusion matrices of the best model of each network from scratch, and of each case of
    fine-tuning; mistakes of the best from scratch and of the best fine-tuned."""
    best_of_case, best_of_kind = {}, {}
    for row in sorted(rows, key=lambda row: row["validation_accuracy"]):
        best_of_case[row["network"].rpartition("-")[2]] = row
        best_of_kind[row["kind"]] = row
    for row in best_of_case.values():
        files = [output / "evaluations" / f"{name}.test.json" for name in row["runs"].values()]
        evaluations = [json.loads(file.read_text()) for file in files]
        figures, name = output / "figures", f"{row['network']}.png"
        draw_confusion(figures / f"confusion_{name}", row["label"], evaluations)
        if row is best_of_kind[row["kind"]]:
            draw_mistakes(figures / f"mistakes_{name}", evaluations[0], directory)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", default="results", help="folder of results (results)")
    parser.add_argument("--data", default="food11", help="folder of photos (food11)")
    arguments = parser.parse_args(argv)
    output = Path(arguments.output)
    if not (output / "summary.json").is_file():
        raise SystemExit(f"{output} has no summary.json: run evaluate.py --chosen first")
    rows = json.loads((output / "summary.json").read_text())["models"]
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(output.glob("runs/*.json"))}
    use_fonts(next(iter(runs.values()))["data"]["classes"])
    draw_study(output / "figures", rows, runs)
    draw_overview(output / "figures" / "overview.png", rows)
    draw_tests(output, rows, arguments.data)
    draw_photos(output / "figures" / "photos.png", arguments.data)


if __name__ == "__main__":
    main()
