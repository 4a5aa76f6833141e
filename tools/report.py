"""Write a study up: report.md and report.pdf in its folder of results, from JSON and figures.

    python tools/report.py --output results

Every number and every judgement is computed from the results; the code is taken from the source.
Two models are called different only where a paired test on the same photos says so.
"""

import inspect
import itertools
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Parser, atomic_file, best_models, read_runs

import engine
import evaluate
import models
import plot

# ---------------------------------------------------------------------------------------------
# What the report says, in Markdown. A function that has nothing to say returns "".


def table(head, rows, caption):
    """A table whose columns are aligned in the Markdown, too."""
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[c.ljust(width) for c, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded) + f"\n\n*{caption}*"


def code(*functions):
    sources = [textwrap.dedent(inspect.getsource(function)) for function in functions]
    return "\n\n".join(f"```python\n{source}```" for source in sources)


def listing(items):
    """a, b and c; with semicolons if a name has a comma of its own."""
    *first, last = items
    if first and any("," in item for item in items):
        return f"{'; '.join(first)}; and {last}"
    return f"{', '.join(first)} and {last}" if first else last


def half_width(photos, accuracy):
    """Half the 95% interval of an accuracy near `accuracy` on that many photos, in points."""
    return 196 * (accuracy * (1 - accuracy) / photos) ** 0.5


def compared(summary, a, b):
    """How two chosen models compare on test photos, or None if they have not been.

    Returns (line of the summary's comparisons, difference a - b, its interval: low, high), in
    points.
    """
    for line in summary["comparisons"]:
        if {line["a"], line["b"]} == {a, b}:
            sign = 100 if line["a"] == a else -100
            low, high = sorted(sign * bound + 0.0 for bound in line["interval_95"])  # no "-0.0"
            return line, sign * line["difference"] + 0.0, low, high
    return None


def describe_pair(summary, a, b):
    """A sentence on two chosen models, if they have been compared on test photos."""
    found = compared(summary, a, b)
    if found is None:
        return ""
    line, difference, low, high = found
    if low == high == 0:  # right on the very same photos
        return f"On the same test photos {a} is exactly as accurate as {b}."
    apart, verdict = "exactly as accurate as", "this study can't tell them apart"
    if difference != 0:
        apart = f"{abs(difference):.1f} points {'better' if difference > 0 else 'worse'} than"
    if line["different"]:
        verdict = f"they differ, and {a if difference > 0 else b} is the better one"
    return f"""On the same test photos {a} is {apart} {b} (95% interval {low:+.1f} to {high:+.1f},
p = {line["p_value"]:.2g}, {line.get("method", "exact McNemar test")}), so {verdict}."""


def compare_pairs(summary, pairs, question):
    """What the paired tests decide of some pairs (a, b) of models: (sentence, table), or two "".

    question: what the pairs are about, such as "whether dropout helps".
    """
    rows, methods = [], set()
    decided = {}  # (a, better or worse) -> those it is compared to
    for a, b in pairs:
        found = compared(summary, a, b)
        if found is None:
            continue
        line, difference, low, high = found
        methods.add(line.get("method", "exact McNemar test"))
        interval, verdict = f"{low:+.1f} to {high:+.1f}", "yes" if line["different"] else "no"
        rows.append((a, b, f"{difference:+.1f}", interval, f"{line['p_value']:.2g}", verdict))
        if line["different"]:
            decided.setdefault((a, "better" if difference > 0 else "worse"), []).append(b)
    if not rows:
        return "", ""
    sentence = f"This study does not decide {question}."
    if decided:
        alike = {}  # (better or worse, than which) -> models
        for (a, how), others in decided.items():
            alike.setdefault((how, listing(others)), []).append(a)
        found = [
            f"{listing(own)} {'are' if len(own) > 1 else 'is'} {how} than {others}"
            for (how, others), own in alike.items()
        ]
        sentence = f"By the paired tests {'; '.join(found)}."
        left = len(rows) - sum(map(len, decided.values()))
        if left:
            sentence += f" {left} of {len(rows)} comparisons are not decided."
    head = "a", "against b", "a - b, points", "95% interval", "p", "decided"
    caption = f"Differences in test accuracy on the same photos; {listing(sorted(methods))}."
    return sentence, table(head, rows, caption)


def scratch_labels(summary):
    """Labels of the chosen networks from scratch: (without dropout, with)."""
    labels = [row["label"] for row in summary["models"] if row["kind"] == "scratch"]
    dropouts = [label for label in labels if ", dropout " in label]
    return [label for label in labels if label not in dropouts], dropouts


def compare_networks(summary):
    """Sentences on the chosen networks from scratch, each against the one before it."""
    pairs = itertools.pairwise(scratch_labels(summary)[0])
    return " ".join(describe_pair(summary, b, a) for a, b in pairs)


def compare_dropout(summary):
    """(sentence, table) on dropout against none."""
    pairs = [(label, label.split(", dropout ")[0]) for label in scratch_labels(summary)[1]]
    return compare_pairs(summary, pairs, "whether dropout helps")


def compare_cases(summary):
    """(sentence, table) on training more layers of each backbone against the last one alone."""
    labels = [row["label"] for row in summary["models"] if row["kind"] == "finetune"]
    pairs = [(label, f"{label.split(', ')[0]}, FC only") for label in labels]
    return compare_pairs(summary, pairs, "whether training more than the last layer helps")


def compare_backbones(summary, best):
    """(sentence, table) on the best fine-tuned network against the best of each other backbone."""
    best_of = {}
    for row in sorted(summary["models"], key=lambda row: row["validation_accuracy"]):
        if row["kind"] == "finetune":  # the last one, the best, stays
            best_of[row["label"].split(", ")[0]] = row
    others = [row["label"] for row in best_of.values() if row["label"] != best["label"]]
    pairs = [(best["label"], other) for other in others]
    return compare_pairs(summary, pairs, "which backbone is the best")


def in_short(summary, best):
    """What the study found, for those who read no further."""
    lines = []
    for row in best.values():
        kind = "from scratch" if row["kind"] == "scratch" else "pre-trained"
        accuracy = evaluate.format_accuracy(row, "test")
        text = f"The best network {kind}, chosen on validation, is {row['label']}"
        lines.append(f"{text}: {accuracy} of the test photos.")
    if len(best) == 2:
        lines.append(describe_pair(summary, best["finetune"]["label"], best["scratch"]["label"]))
    lines.append(compare_networks(summary))
    lines += [compare_dropout(summary)[0], compare_cases(summary)[0]]
    if "finetune" in best:
        lines.append(compare_backbones(summary, best["finetune"])[0])
    return "\n\n".join(line for line in lines if line)


def results_table(rows, caption):
    head = ["model", "validation [95%]", "test [95%]", "gap", "trained", "seconds"]
    lines, fresh = [], any(row.get("fresh_seeds") for row in rows)
    if fresh:
        head.insert(3, "test, fresh seeds")
        caption += (
            " Fresh seeds only repeat what others chose: their mean is not too good by choice."
        )
    for row in rows:
        accuracies = [evaluate.format_accuracy(row, split) for split in ("validation", "test")]
        gap = "" if row["gap"] is None else f"{100 * row['gap']:+.1f}"
        cost = f"{row['trainable_parameters']:,}", f"{row['seconds']:.0f}"
        if fresh:
            mean = row["fresh_test_accuracy"]
            accuracies.append("" if mean is None else f"{mean:.1%}")
        lines.append((row["label"], *accuracies, gap, *cost))
    more = "Gap is validation minus test in points, trained the number of parameters."
    return table(head, lines, f"{caption} {more}")


def title_block(runs):
    """On what, when and with what the runs were made."""
    environments = [run["environment"] for run in runs.values()]
    used = {}
    for key in ("date", "device", "precision", "torch", "torchvision"):
        used[key] = sorted({str(each[key]) for each in environments if key in each})
    dates = used.pop("date")
    when = [f"runs of {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"] if dates else []
    versions = [f"{key} {listing(values)}" for key, values in used.items() if values]
    folder = Path(next(iter(runs.values()))["config"]["data"]).name
    return f"*Photos in {folder}; {'; '.join(when + versions)}.*"


def last_epoch(run):
    """Accuracies of the last epoch, in words: on training and on validation photos."""
    last = run["history"][-1]
    return f"""{last["train_accuracy"]:.1%} of the training photos, distorted and mixed as they are
there, and {last["validation_accuracy"]:.1%} of the validation photos"""


def nine_tenths(run):
    """The first epoch with nine tenths of the best validation accuracy."""
    history = run["history"]
    best = max(epoch["validation_accuracy"] for epoch in history)
    return next(e["epoch"] for e in history if e["validation_accuracy"] >= 0.9 * best)


def photos(run):
    counts, classes, warning = run["data"]["counts"], run["data"]["classes"], ""
    train, validation, test = (sum(counts[s].values()) for s in ("train", "validation", "test"))
    if Path(run["config"]["data"]).name == "demo":
        warning = "THESE ARE NO RESULTS: the photos are made-up drawings, a demonstration."
    rows = [(name, *(counts[split][name] for split in counts)) for name in classes]
    caption = "Photos of each class in each split."
    if len(rows) > 40:
        rows = sorted(rows, key=lambda row: row[1])[:20]
        caption = "Photos in each split, of the 20 classes with the fewest to train."
    return f"""## The photos

{warning}

An accuracy near 80% on the {test:,} test photos has a 95% interval of ±{half_width(test, 0.8):.0f}
points, so only large differences can be found with them. There are {train + validation + test:,}
photos of {len(classes)} classes: {train:,} to train, {validation:,} for every choice, {test:,} for
the last measurement only.

{table(("class", *counts), rows, caption)}"""


def architectures(run):
    config, plain, names = run["config"], models.PlainCNN, {}
    for name, build in models.SCRATCH.items():
        network = build(len(run["data"]["classes"]))
        layers, count = models.describe(network, config["image_size"]), models.counts(network)
        head = [column for column in layers[0] if column != "state"]
        caption = f"Layers at {config['image_size']} px: {count['convolutions']} convolutions, "
        caption += f"{count['linear_layers']} fully connected layers, {count['parameters']:,} "
        caption += "parameters. Output is channels, height, width."
        text = table(head, [[layer[key] for key in head] for layer in layers], caption)
        names.setdefault(text, []).append(name)
    layers = "\n\n".join(f"The {listing(own)} network:\n\n{text}" for text, own in names.items())
    optimizer, end = config["optimizer"], "falls linearly to zero"
    if optimizer == "muon":
        optimizer = """Muon: each update of a matrix is made nearly orthogonal, so that all its
directions are learned at the same pace; AdamW at a tenth of the rate takes what is no matrix, the
first convolution and the last layer"""
    if config.get("schedule") == "constant":
        end = "stays"
    same = (
        "The two networks have the same layers and the same weights; only the skip sets them apart."
    )
    return f"""## Part 1: networks from scratch

{same if len(names) == 1 and len(models.SCRATCH) == 2 else ""}

{layers}

A block is convolution, 2 x 2 max pooling, batch normalisation and ReLU, five times; the mean over
all positions goes into the fully connected layers. Pooling halves the side of the feature maps, so
that each block sees twice as far and costs less. Batch normalisation keeps the scale of each
channel steady, so that a high learning rate works; ReLU costs next to nothing and does not
saturate.

{code(plain.__init__, plain.block, plain.forward)}

The residual network adds the input of a block, pooled by the average, to its output, from the
second block on, with zeros for the channels that are new:

{code(models.ResidualCNN.block)}

The loss is cross-entropy with label smoothing {config["label_smoothing"]:g}. The optimizer is
{optimizer}. The learning rate rises over {config["warmup_epochs"]:g} epochs, then {end}. Each photo
of a batch gets its own crop (at least {config["crop_scale"]:.0%} of the area), flip, rotation (up
to {config["rotation"]:g} degrees) and colours; CutMix pastes a square of another photo into it with
probability {config["cutmix"]:g}. Training accuracy is counted on these distorted photos.

{code(engine.orthogonalise) if config["optimizer"] == "muon" else ""}

Accuracy and confusion matrix are computed by hand; recall, precision and F1 follow from the matrix:

{code(evaluate.confusion_matrix)}"""


def effect(lines, key, photos):
    """What the learning rate or the batch size does: (sentence, whether it is beyond chance).

    lines: of the grid of one network; photos: how many there are for validation.
    """
    groups = {}
    for line in sorted(lines, key=lambda line: line[key]):
        groups.setdefault(line[key], []).append(line["validation_accuracy"])
    if len(groups) == 1:
        return "", False
    means = {value: np.mean(accuracies) for value, accuracies in groups.items()}
    low, high, middle = min(means.values()), max(means.values()), np.mean(list(means.values()))
    chance = 2**0.5 * half_width(photos * len(lines) / len(groups), middle)
    beyond = 100 * (high - low) > chance
    numbers = listing([f"{mean:.1%} at {value:g}" for value, mean in means.items()])
    sentence = f"""By {key.replace("_", " ")} the mean is {numbers}: {100 * (high - low):.1f} points
apart, where chance alone can give {chance:.1f}."""
    return sentence, beyond


def grid_of(model, chosen, summary, runs):
    """What the grid of one network shows, and the course of its chosen run, the first seed."""
    lines = [
        line
        for line in summary["grid"]
        if line["model"] == model
        and line["seed"] == chosen["seed"]  # other seeds repeat the chosen setting only
        and line["validation_accuracy"] is not None
    ]
    run, accuracies = runs[chosen["run"]], [line["validation_accuracy"] for line in lines]
    limits = dict.fromkeys(f"{limit(accuracies):.1%}" for limit in (min, max))
    total, history = sum(run["data"]["counts"]["validation"].values()), run["history"]
    effects = {key.replace("_", " "): effect(lines, key, total) for key in plot.SETTING}
    moved = [key for key, (_, beyond) in effects.items() if beyond]
    finding = "Neither learning rate nor batch size moves it by more than chance."
    if moved:
        finding = f"Beyond chance it is moved by the {listing(moved)}."
    losses = np.array([epoch["validation_loss"] for epoch in history], dtype=float)
    low, judgement = np.nanargmin(losses), "is near its lowest to the end: no overfitting"
    if losses[-1] > 1.05 * losses[low]:
        judgement = f"rises from {losses[low]:.2f} in epoch {low + 1} to {losses[-1]:.2f} at the "
        judgement += "end: it overfits"
    return f"""The {model} network reaches {" to ".join(limits)} on validation, the best epoch of
each setting. {finding} {" ".join(sentence for sentence, _ in effects.values())} Chosen: learning
rate {chosen["learning_rate"]:g}, batch {chosen["batch_size"]}; with seed {chosen["seed"]} it gets
to nine tenths of its best accuracy in epoch {nine_tenths(run)} of {len(history)}. In the last epoch
it is right on {last_epoch(run)}. Its validation loss {judgement}."""


def grid(summary, runs):
    chosen = {model: lines[0] for model, lines in summary["choices"].items()}
    texts = "\n\n".join(grid_of(model, line, summary, runs) for model, line in chosen.items())
    over_each_other = "\n".join(
        f"![The {model} network, all settings over each other.](<figures/settings_{model}.png>)"
        for model in chosen
    )
    apart = "\n\n".join(
        f"![The {model} network, each setting by itself.](<figures/curves_{model}.png>)"
        for model in chosen
    )
    failures, failed = summary.get("failed", []), ""
    if failures:
        rows = [(failure["run"], "failed", failure["reason"]) for failure in failures]
        failed = table(("run", "outcome", "reason"), rows, "Runs that failed.")
    return f"""## Learning rates and batch sizes

{texts}

{over_each_other}

![Best validation accuracy of each setting.](<figures/grid_heatmap.png>)

{failed}

{apart}"""


def why_dropout(rows, runs):
    """What the courses of the chosen networks without dropout say of it."""
    courses, by_heart = [], []
    for row in rows:
        run = runs[row["runs"][0]]
        last = run["history"][-1]
        courses.append(f"{row['label']} {last_epoch(run)}")
        if last["train_accuracy"] - last["validation_accuracy"] >= 0.05:
            by_heart.append(row["label"])
    reason = """None of them knows its training photos by heart, so there is little that dropout
could prevent, and the units left out may be missed in what is learned in these epochs."""
    if by_heart:
        reason = f"""{listing(by_heart)} begins to know the training photos by heart, which is what
dropout may prevent."""
    return f"""Without dropout the last epoch is right on: {"; ".join(courses)}. {reason}"""


def scratch(summary, runs):
    rows = [row for row in summary["models"] if row["kind"] == "scratch"]
    without, with_dropout = scratch_labels(summary)
    plain = [row for row in rows if row["label"] in without]
    courses = listing([f"{nine_tenths(runs[row['runs'][0]])} ({row['label']})" for row in plain])
    written = f"""## The best of each, and what the skip does

{compare_networks(summary)}

{results_table(plain, "The best setting of each network by validation accuracy.")}

Skips were made for networks of dozens of layers, whose gradients fade on their way back, so that
without skips they hardly learn. Five layers with batch normalisation do: nine tenths of the best
validation accuracy are there in epoch {courses}. What a skip can still do is hand the features of
one block on to later ones; how it is built matters more than whether it is there
(results/EXPERIMENTS.md, fourth round). Chosen as the best of many epochs and settings on few
photos, a model looks better on validation than it is; the gap to the test accuracy says by how
much."""
    if not with_dropout:
        return written
    verdict, differences = compare_dropout(summary)
    return f"""{written}

## Dropout

{verdict} Dropout acts on the input of both fully connected layers, where every unit sees the whole
photo and units can come to rely on each other. The convolutions have none: batch normalisation and
the distorted photos regularise them already.

{differences}

{why_dropout(plain, runs)}

![Dropout, with 95% intervals.](<figures/dropout.png>)"""


def errors(row, other, output, title):
    """What a chosen model, all its seeds together, mixes up, and whether the model `other` does."""
    evaluations = plot.read_evaluations(output, row)
    if not evaluations:
        return ""
    classes, label, name = evaluations[0]["classes"], row["label"], row["runs"][0]
    split, seeds = evaluations[0]["split"], len(evaluations)
    matrix = plot.add_up(evaluations)
    worst = plot.confused_pairs(matrix)[:5]
    finding, meaning, pairs = f"Nothing is mixed up by {label}.", "", ""
    if worst:
        count, true, taken_for = worst[0]
        share = sum(count for count, _, _ in worst) / (matrix.sum() - matrix.trace())
        finding = f"""Most often {label} mixes up {classes[true]} and {classes[taken_for]}; the
pairs below are {share:.0%} of its mistakes."""
        meaning = """A pair that both kinds of networks mix up looks alike on these photos; one that
only the network from scratch mixes up takes features that it has not learned from them."""
        head = ["classes", "mixed up", "first taken for second", "second for first"]
        lines = [
            [f"{classes[i]}, {classes[j]}", count, matrix[i, j], matrix[j, i]]
            for count, i, j in worst
        ]
        theirs = plot.read_evaluations(output, other) if other else []
        caption = f"Mixed up most often on {split} photos"
        caption += f", {seeds} seeds together." if seeds > 1 else "."
        if theirs and theirs[0]["split"] == split:
            head.append(f"mixed up by {other['label']}")
            counts = plot.add_up(theirs)
            for line, (_, i, j) in zip(lines, worst, strict=True):
                line.append(f"{(counts[i, j] + counts[j, i]) * seeds / len(theirs):.0f}")
        pairs = table(head, lines, caption)
    recalls, extremes = matrix.diagonal() / matrix.sum(1), []
    order = recalls.argsort(kind="stable")
    for i in (order[-1], order[0]):
        low, high = evaluate.wilson_interval(recalls[i], matrix[i].sum() / seeds)
        extremes.append(f"{classes[i]} ({recalls[i]:.0%} [{low:.0%}, {high:.0%}])")
    return f"""## {title}

{finding} The best recognised class is {extremes[0]}, the worst {extremes[1]}. {meaning}

{pairs}

![Confusion matrix, {label}.](<figures/confusion_{name}_{split}.png>)
![Photos of what it mixes up.](<figures/pairs_{name}.png>)

![Where it looks: class-activation maps.](<figures/attention_{name}.png>)"""


def weights_of(run):
    name = run["config"]["weights"]
    return "random weights" if name == "none" else f"pre-trained weights ({name})"


def transfer(summary, runs, best):
    rows = [row for row in summary["models"] if row["kind"] == "finetune"]
    starts = {weights_of(runs[row["runs"][0]]) for row in rows}
    changed = [
        row["label"]
        for row in rows
        if not all(runs[name]["frozen_unchanged"] for name in row["runs"])
    ]
    frozen = "After training all frozen weights and statistics are as loaded, bit for bit."
    if changed:
        frozen = f"NOT as loaded are frozen weights of {listing(changed)}: these rows are wrong."
    verdict, differences = compare_cases(summary)
    verdict_of_backbones, of_backbones = compare_backbones(summary, best)
    return f"""## Part 2: fine-tuning pre-trained networks

{verdict_of_backbones} {verdict} A network that has learned a million photos of ImageNet has filters
for edges, textures and parts. Fine-tuning replaces its last layer by one for the new classes and
trains that alone, or the last convolutions with it. The rest is frozen: a few thousand photos are
too few to improve millions of weights and enough to spoil them, and what is frozen has to be
computed only once for each view of a photo. {frozen}

{results_table(rows, f"The best learning rate of each by validation; {listing(sorted(starts))}.")}

{of_backbones}

{differences}

{why_more_layers(rows, runs)}

![Fine-tuned networks, with 95% intervals.](<figures/transfer.png>)

![Fine-tuning, learning curves.](<figures/curves_transfer.png>)"""


def why_more_layers(rows, runs):
    """What the last epochs say of training two more convolutions, for each backbone."""
    sentences, of_label = [], {row["label"]: runs[row["runs"][0]] for row in rows}
    for label, run in of_label.items():
        name, case = label.split(", ", 1)
        alone = of_label.get(f"{name}, FC only")
        if alone is None or alone is run:
            continue
        gains = {
            split: 100 * (run["history"][-1][split] - alone["history"][-1][split])
            for split in ("train_accuracy", "validation_accuracy")
        }
        sentences.append(
            f"{name}, {case}: {gains['train_accuracy']:+.1f} points on training photos, "
            f"{gains['validation_accuracy']:+.1f} on validation photos"
        )
    if not sentences:
        return ""
    return f"""What the added weights learn, last epoch against last epoch of FC only:
{"; ".join(sentences)}. Where the first number is far above the second, they learn the training
photos themselves rather than the dishes."""


def sizes(summary, best):
    """What more training photos are worth; "" if that was not measured."""
    slopes = summary.get("slopes")
    if not slopes:
        return ""
    lines, helped, open_ = [], [], []
    for row in slopes:
        slope, low, high = (100 * value for value in (row["slope"], *row["interval_95"]))
        lines.append((row["label"], f"{slope:+.1f}", f"{low:+.1f} to {high:+.1f}"))
        (helped if low > 0 else open_).append(row["label"])
    finding = f"More photos help {listing(helped)}." if helped else ""
    if open_:
        finding += f" Whether they help {listing(open_)} this study can't tell."
    own = [row for row in summary["sizes"] if row["label"] == slopes[0]["label"]]
    counts = listing([f"{row['photos_per_class']:.0f}" for row in own])
    return f"""## How many photos does it take?

{finding} {catch_up(summary, best)} What twice as many photos are worth is measured from {counts}
photos a class. The intervals hold for other test photos, not for other seeds; one more doubling may
be worth as much, what lies beyond it these numbers do not say.

{table(("network", "points per doubling", "95% interval"), lines, "A straight line in log photos.")}

![Test accuracy over the number of training photos a class.](<figures/sizes.png>)"""


def catch_up(summary, best):
    """How far the best network from scratch, on all photos, is from the best fine-tuned on few."""
    slope_of = {row["label"]: row["slope"] for row in summary["slopes"]}
    if len(best) < 2 or not all(row["label"] in slope_of for row in best.values()):
        return ""
    scratch, finetuned = (
        [row for row in summary["sizes"] if row["label"] == best[kind]["label"]]
        for kind in ("scratch", "finetune")
    )
    most, fewest = scratch[-1], finetuned[0]
    after = most["test_accuracy"] + slope_of[most["label"]]
    return f"""With {fewest["photos_per_class"]:.0f} photos a class {fewest["label"]} is right on
{evaluate.format_accuracy(fewest, "test")} of the test photos, {most["label"]} with
{most["photos_per_class"]:.0f} on {evaluate.format_accuracy(most, "test")}, and twice as many would
take it to {after:.0%} if its slope held."""


def conclusion(summary, runs, best):
    """All chosen models, and what the runs of the study have cost."""
    title, duel, tests = "All chosen models", "", ""
    if len(best) == 2:
        title, one, other = "From scratch against pre-trained", best["finetune"], best["scratch"]
        duel = f"""{describe_pair(summary, one["label"], other["label"])}
{other["label"]} trains {other["trainable_parameters"]:,} parameters in {other["seconds"]:.0f} s,
{one["label"]} {one["trainable_parameters"]:,} in {one["seconds"]:.0f} s, on top of its
{weights_of(runs[one["runs"][0]])}."""
    pairs = [line["different"] for line in summary["comparisons"]]
    if pairs:
        tests = f"""Of {len(pairs)} pairs of chosen models {sum(pairs)} differ by the paired test at
5%; if none really differed, one in twenty would all the same.
"""
    left_out = summary.get("left_out", [])
    if left_out:
        tests += f"Left out, of other settings or photos: {listing(left_out)}.\n"
    rows = sorted(summary["models"], key=lambda row: -row["validation_accuracy"])
    # Features are computed once for all learning rates, and stand in the seconds of each run.
    shared = {}
    for run in runs.values():
        case = run["model"]["name"], run["config"].get("unfreeze_convolutions")
        shared[case, run["config"]["seed"]] = run.get("feature_seconds", 0.0)
    alone = [run["seconds"] - run.get("feature_seconds", 0.0) for run in runs.values()]
    minutes = (sum(alone) + sum(shared.values())) / 60
    devices, versions = (
        listing(sorted({run["environment"][key] for run in runs.values()}))
        for key in ("device", "torch")
    )
    seeds = listing([str(n) for n in sorted({run["config"]["seed"] for run in runs.values()})])
    precisions = {run["environment"].get("precision") for run in runs.values()} - {None}
    unlike = ""
    if len(precisions) > 1:
        unlike = f"""Runs in {listing(sorted(precisions))} were made on processors of different
speed: their seconds do not compare.
"""
    return f"""## {title}

{duel}

{results_table(rows, "All chosen models.")}

{tests}{unlike}The study took {minutes:.0f} minutes of training in {len(runs)} runs, on {devices}
with torch {versions}; seeds {seeds}.

![All chosen models, with 95% intervals.](<figures/overview.png>)"""


FIGURE = re.compile(r"!\[(.*)\]\(<(.*)>\)")


def write_report(output):
    """The report on a folder of results: a list of blocks of Markdown, without missing figures."""
    runs = read_runs(output)
    summary = plot.read_summary(output, runs)
    if not summary["models"]:
        raise SystemExit(f"{output}/summary.json lists no model: train one first.")
    lines = summary["grid"] + summary["dropout"] + summary["transfer"]
    runs = {name: runs[name] for name in sorted({line["run"] for line in lines})}
    best = best_models(summary["models"])
    parts = ["# How well can a small CNN learn a few thousand photos?", title_block(runs)]
    parts.append(in_short(summary, best))
    parts.append(photos(runs[summary["models"][0]["runs"][0]]))
    scratch_best, finetune_best = best.get("scratch"), best.get("finetune")
    if scratch_best:
        parts.append(architectures(runs[scratch_best["runs"][0]]))
    if summary["choices"] or summary.get("failed"):
        parts.append(grid(summary, runs))
    if scratch_best:
        parts.append(scratch(summary, runs))
        parts.append(errors(scratch_best, finetune_best, output, "Where it errs: from scratch"))
    if finetune_best:
        parts.append(transfer(summary, runs, finetune_best))
        parts.append(errors(finetune_best, scratch_best, output, "Where it errs: fine-tuned"))
    parts.append(sizes(summary, best))
    parts.append(conclusion(summary, runs, best))
    blocks = []
    # A blank line ends a block, but not within a function, where indented code follows.
    for block in re.split(r"\n\n+(?! )", "\n\n".join(part for part in parts if part)):
        if not block.startswith("!["):
            blocks.append(block)
            continue
        found = [(text, path) for text, path in FIGURE.findall(block) if (output / path).exists()]
        if found:  # figures on lines without a blank one between them stand beside each other
            blocks.append("\n".join(f"![{text}](<{path}>)" for text, path in found))
            blocks.append(f"*{' '.join(text for text, _ in found)}*")
    return blocks


# ---------------------------------------------------------------------------------------------
# The page setter: title, headings, text, tables, pictures and code on A4

PAGE, MARGIN, GAP = (8.27, 11.69), 0.75, 0.15  # inches
WIDTH = PAGE[0] - 2 * MARGIN
FIGURE_HEIGHT = 3.4  # inches, at most
# How a block begins: the inches that must be left for it on a page, its look (size in points).
LOOKS = {
    "# ": (0.0, {"size": 18, "weight": "bold"}),
    "## ": (2.0, {"size": 13, "weight": "bold"}),
    "![": (0.0, {}),
    "| ": (1.2, {"size": 7, "family": "DejaVu Sans Mono"}),
    "```": (0.6, {"size": 7, "family": "DejaVu Sans Mono"}),
    "*": (0.0, {"size": 8, "style": "italic"}),
    "": (1.2, {"size": 9}),
}


def set_pages(blocks, folder, file):
    """Write the blocks of write_report(folder) as a PDF to an open binary file."""
    pages, y = [], 0.0  # y: inches above the bottom edge of the last page
    for block in blocks:
        start = next(start for start in LOOKS if block.startswith(start))
        room, look = LOOKS[start]
        if start == "![":
            row = [Image.open(folder / path).convert("RGB") for _, path in FIGURE.findall(block)]
            shapes = [picture.width / picture.height for picture in row]
            height = min(FIGURE_HEIGHT, (WIDTH - GAP * (len(row) - 1)) / sum(shapes))
            # No larger than its letters need: a page's are smaller than a screen's.
            height = min(height, 0.7 * row[0].height / row[0].info.get("dpi", (110, 110))[0])
            caption, left = 0.35, y - MARGIN
            if 0.7 * height < left - caption < height:  # a little smaller, and it fits the page
                height = left - caption
            lines, room = [row], height + caption
        elif start == "| ":  # as large as fits; a letter of this font is 0.602 of its size wide
            lines = [line[2:-2].replace(" | ", "   ") for line in block.split("\n")]
            look = {**look, "size": min(7, 72 * WIDTH / 0.602 / len(lines[0]))}
        elif start == "```":
            lines = block.split("\n")[1:-1]
        else:  # a letter is about 0.55 of its size wide; a line of wide ones goes into the margin
            letters = int(72 * WIDTH / 0.55 / look["size"])
            lines = textwrap.wrap(block.removeprefix(start).removesuffix("*"), letters)
        if start != "![":
            height = 1.4 * look["size"] / 72
        for line in lines:
            if y - max(room, height) < MARGIN:
                pages.append(Figure(figsize=PAGE, layout="none"))
                y = PAGE[1] - MARGIN
            room, y = 0.0, y - height
            if start == "![":
                x = (PAGE[0] - height * sum(shapes) - GAP * (len(row) - 1)) / 2
                for picture, shape in zip(row, shapes, strict=True):
                    box = np.divide((x, y, height * shape, height), PAGE * 2)
                    axes = pages[-1].add_axes(box)
                    axes.imshow(picture, aspect="auto", interpolation="none")
                    axes.axis("off")
                    x += height * shape + GAP
            else:
                pages[-1].text(MARGIN / PAGE[0], y / PAGE[1], line, **look)
        y -= 0.14
    with PdfPages(file, metadata={"Title": blocks[0][2:], "CreationDate": None}) as pdf:
        for number, page in enumerate(pages, 1):
            page.text(0.5, 0.4 / PAGE[1], number, size=8, ha="center")
            pdf.savefig(page)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--output", default="results", metavar="DIR", help="folder of results")
    output = Path(parser.parse_args(argv).output)
    blocks = write_report(output)
    with atomic_file(output / "report.md") as file:
        file.write("\n\n".join(blocks).encode() + b"\n")
    with atomic_file(output / "report.pdf") as file:
        set_pages(blocks, output, file)
    print(f"{output}/report.md, {output}/report.pdf")


if __name__ == "__main__":
    main()
