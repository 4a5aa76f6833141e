"""Write a study up: report.md and report.pdf in its folder of results, from JSON and figures.

    python tools/report.py --output results

Every number and every judgement is computed from the results, but for those of larger trials of the
skip, which are quoted with their source; the code is taken from the source. Two models are called
different only where a paired test on the same photos says so.
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

from common import Parser, atomic_file, best_models, printable

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
    """a, b and c."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def paragraph(*sentences):
    """What is not "", with spaces between."""
    return " ".join(sentence for sentence in sentences if sentence)


def together(seeds):
    return f", {seeds} seeds together" if seeds > 1 else ""


def mean_of(seeds):
    return f" (mean of {seeds} seeds)" if seeds > 1 else ""


def half_width(photos, accuracy):
    """Half the 95% interval of an accuracy near `accuracy` on that many photos, in points."""
    low, high = evaluate.wilson_interval(accuracy, photos)
    return 100 * (high - low) / 2


def compared(summary, a, b):
    """How two chosen models compare on test photos, or None if they have not been.

    Returns (line of the summary's comparisons, difference a - b, its interval: low, high), in
    points.
    """
    for line in summary["comparisons"]:
        if {line["a"], line["b"]} == {a, b}:
            difference, (low, high) = line["difference"], line["interval_95"]
            if line["a"] != a:
                difference, low, high = 0 - difference, 0 - high, 0 - low  # no "-0.0"
            return line, 100 * difference, 100 * low, 100 * high
    return None


def is_better(summary, a, b):
    """Whether a paired test on test photos has shown chosen model a to be better than b."""
    found = compared(summary, a, b)
    return found is not None and found[0]["different"] and found[1] > 0


def describe_pair(summary, a, b):
    """A sentence on two chosen models, if they have been compared on test photos."""
    found = compared(summary, a, b)
    if found is None:
        return ""
    line, difference, low, high = found
    if low == high == 0:  # right on the very same photos
        return f"On the same test photos {a} is exactly as accurate as {b}."
    apart = "exactly as accurate as"
    if difference != 0:
        apart = f"{abs(difference):.1f} points {'better' if difference > 0 else 'worse'} than"
    verdict = "" if line["different"] else ": this study can't tell them apart"
    return f"""On the same test photos {a} is {apart} {b} (95% interval {low:+.1f} to {high:+.1f},
p {probability(line["p_value"])}, {line["method"]}){verdict}."""


def probability(p_value):
    return f"= {p_value:.2g}" if p_value >= 0.001 else "< 0.001"


def compare_pairs(summary, pairs, question):
    """What the paired tests decide of some pairs (a, b) of models: (sentence, table), or two "".

    question: what the pairs are about, such as "whether dropout helps". Of several pairs one may
    look decided by chance, so each must pass 0.05 divided by their number (Bonferroni).
    """
    found = [(a, b, compared(summary, a, b)) for a, b in pairs]
    found = [(a, b, numbers) for a, b, numbers in found if numbers is not None]
    if not found:
        return "", ""
    rows, decided, level = [], [], 0.05 / len(found)
    for a, b, (line, difference, low, high) in found:
        interval = f"{low:+.1f} to {high:+.1f}"
        p_value = probability(line["p_value"]).removeprefix("= ")
        rows.append((a, b, f"{difference:+.1f}", interval, p_value, line["method"]))
        if line["p_value"] < level:
            decided.append(f"{a} is {'better' if difference > 0 else 'worse'} than {b}")
    number = len(decided) if decided else "None"
    differences = span([difference for _, _, (_, difference, _, _) in found])
    which = f": {'; '.join(decided)}." if decided else f" ({differences} points on test)."
    decide = "decide" if len(decided) > 1 else "decides"
    sentence = f"{number} of {len(rows)} paired comparisons {decide} {question}{which}"
    head = "a", "against b", "a - b, points", "95% interval", "p", "method"
    caption = "Differences in test accuracy on the same photos. A pair counts as decided if "
    caption += f"p < {level:.3g}"
    if len(rows) > 1:
        caption += ": 0.05 divided by the number of pairs"
        caption += ", so that more than an interval without 0 is asked for"
    caption += "."
    return sentence, table(head, rows, caption)


def scratch_labels(summary):
    """Labels of the chosen networks from scratch: (without dropout, with)."""
    labels = [row["label"] for row in summary["models"] if row["kind"] == "scratch"]
    dropouts = [label for label in labels if " (dropout " in label]
    return [label for label in labels if label not in dropouts], dropouts


def network_of(label):
    """The network of a label, without dropout or case."""
    return label.split(" (")[0]


def compare_networks(summary):
    """Sentences on the chosen networks from scratch, each against the one before it."""
    pairs = itertools.pairwise(scratch_labels(summary)[0])
    return paragraph(*(describe_pair(summary, b, a) for a, b in pairs))


def best_of_backbones(summary):
    """The better case of each backbone, rows of the summary, the best by validation first."""
    best_of = {}
    for row in sorted(summary["models"], key=lambda row: -row["validation_accuracy"]):
        if row["kind"] == "finetune":
            best_of.setdefault(network_of(row["label"]), row)
    return list(best_of.values())


def paired_verdicts(summary):
    """What the paired tests decide of dropout, of backbones, of training more layers.

    Three pairs (sentence, table), see compare_pairs().
    """
    dropout = [(label, network_of(label)) for label in scratch_labels(summary)[1]]
    labels = [row["label"] for row in best_of_backbones(summary)]
    backbones = [(labels[0], other) for other in labels[1:]]
    labels = [row["label"] for row in summary["models"] if row["kind"] == "finetune"]
    cases = [(label, f"{network_of(label)} (FC only)") for label in labels]
    return (
        compare_pairs(summary, dropout, "whether dropout helps"),
        compare_pairs(summary, backbones, "whether the best backbone is better than another"),
        compare_pairs(summary, cases, "whether training more than the last layer helps"),
    )


def in_short(summary, best, verdicts):
    """What the study found, for those who read no further."""
    lines = []
    for kind, row in best.items():
        name = "from scratch" if kind == "scratch" else "fine-tuned"
        others = [other for other in summary["models"] if other["kind"] == kind and other != row]
        accuracy = evaluate.format_accuracy(row, "validation")
        text = f"Best {name} on validation: {row['label']}, {accuracy}"
        if others:
            second = max(others, key=lambda other: other["validation_accuracy"])
            accuracy = evaluate.format_accuracy(second, "validation")
            text += f" (next: {second['label']}, {accuracy})"
        lines.append(f"{text}. On test: {evaluate.format_accuracy(row, 'test')}.")
    if len(best) == 2:
        lines.append(describe_pair(summary, best["finetune"]["label"], best["scratch"]["label"]))
    lines.append(compare_networks(summary))
    lines += verdicts
    return "\n\n".join(line for line in lines if line)


def how_to_read(summary):
    """What the numbers of all tables of results mean."""
    rows = summary["models"]
    text = """Brackets are 95% intervals for other test photos, not for other seeds. Validation
accuracies have none: these photos chose epoch, setting and model, so accuracies on them tend to be
too high. Gap is validation minus test accuracy, in points."""
    counts = sorted({len(row["seeds"]) for row in rows})
    if counts[-1] > 1:
        several = " or ".join(str(count) for count in counts if count > 1)
        text += f" ± is the standard deviation over {several} seeds"
        text += "; there is one seed where it is missing." if counts[0] == 1 else "."
    if counts[0] == 1 and summary["comparisons"]:
        text += """ A paired test of two models with one seed compares two runs: what it decides
holds for other test photos, not for other seeds."""
    if counts[-1] > 1 and summary["comparisons"]:
        text += """ A paired test of models with several seeds takes photos and seeds as samples
(crossed random effects, Student's t, Satterthwaite's degrees of freedom)."""
    if any(row["fresh_seeds"] for row in rows):
        text += """ Fresh seeds had no part in choosing learning rate and batch size, so that their
mean owes nothing to that choice."""
    seconds = "of the fastest run"
    if any(row["kind"] == "finetune" for row in rows):
        seconds += ", features of frozen layers included"
    return f"""{text} Trained: number of parameters trained. Seconds: {seconds}; other runs may have
shared the machine, so the seconds are no measure of a network's speed."""


def results_table(rows, caption):
    """Accuracies of chosen models, how much they train and how long."""
    head = ["model", "validation", "test [95%]", "gap", "trained", "seconds"]
    lines, fresh = [], any(row["fresh_seeds"] for row in rows)
    if fresh:
        head.insert(3, "test, fresh seeds")
    for row in rows:
        cells = [row["label"], *(evaluate.format_accuracy(row, s) for s in ("validation", "test"))]
        if fresh:
            mean = row["fresh_test_accuracy"]
            cells.append("" if mean is None else f"{mean:.1%}")
        cells.append("" if row["gap"] is None else f"{100 * row['gap']:+.1f}")
        lines.append([*cells, f"{row['trainable_parameters']:,}", f"{row['seconds']:.0f}"])
    return table(head, lines, caption)


def values_of(runs, key):
    """All values of a key of the runs' environment, in order."""
    return sorted({str(run["environment"][key]) for run in runs.values()})


def title_block(runs):
    """On what, when and with what the runs were made."""
    folder = Path(next(iter(runs.values()))["config"]["data"]).name
    parts = [f"Photos in {folder}"]
    dates = values_of(runs, "date")
    end = "" if dates[0] == dates[-1] else f" to {dates[-1]}"
    parts.append(f"runs of {dates[0]}{end}")
    for key in ("device", "precision", "torch", "torchvision"):
        parts.append(f"{key} {listing(values_of(runs, key))}")
    return f"*{'; '.join(parts)}.*"


def validation_losses(run):
    """Of every epoch, float [epochs]; NaN for a null."""
    return np.array([epoch["validation_loss"] for epoch in run["history"]], dtype=float)


def overfitting(run):
    """What the validation loss says at the end of a run, in words, and whether it has risen."""
    losses = validation_losses(run)
    low = int(np.nanargmin(losses))
    if losses[-1] > 1.05 * losses[low]:
        words = f"rises from {losses[low]:.2f} in epoch {low + 1} to {losses[-1]:.2f} at the end"
        return words, True
    return f"is {losses[-1]:.2f} at the end, {losses[low]:.2f} at its lowest", False


def edge(rates, chosen):
    """A sentence if the chosen learning rate is the lowest or the highest that was tried."""
    if len(rates) < 2 or chosen not in (min(rates), max(rates)):
        return ""
    end, other = ("lowest", "lower") if chosen == min(rates) else ("highest", "higher")
    return f"That is the {end} learning rate tried: a {other} one may do better."


def photos(run):
    counts, classes, warning = run["data"]["counts"], run["data"]["classes"], ""
    train, validation, test = (sum(counts[s].values()) for s in ("train", "validation", "test"))
    if Path(run["config"]["data"]).name == "demo":
        warning = "THESE ARE NO RESULTS: the photos are made-up drawings, a demonstration."
    rows = [(name, *(counts[split][name] for split in counts)) for name in classes]
    caption = "Photos of each class in each split."
    if len(rows) > 40:
        rows = sorted(rows, key=lambda row: row[1])[:20]
        caption = "Photos in each split, of the 20 classes with the fewest to train, or as few."
    return f"""## The photos

{warning}

{train + validation + test:,} photos of {len(classes)} classes: {train:,} to train, {validation:,}
for every choice, {test:,} for the last measurement only. An accuracy near 80% on the test photos
has a 95% interval of ±{half_width(test, 0.8):.2g} points.

{table(("class", *counts), rows, caption)}"""


def architectures(run, trained):
    """The networks named in `trained`, and the recipe by the settings of one run."""
    config, plain, names = run["config"], models.PlainCNN, {}
    for name in trained:
        network = models.SCRATCH[name](len(run["data"]["classes"]), 0.0)
        layers, count = models.describe(network, config["image_size"]), models.counts(network)
        head = [column for column in layers[0] if column != "state"]
        caption = f"Layers at {config['image_size']} px: {count['convolutions']} convolutions, "
        caption += f"{count['linear_layers']} fully connected layers, {count['parameters']:,} "
        caption += "parameters. Output is channels, height, width."
        text = table(head, [[layer[key] for key in head] for layer in layers], caption)
        names.setdefault(text, []).append(name)
    layers = "\n\n".join(f"The {listing(own)} network:\n\n{text}" for text, own in names.items())
    counts = np.array(list(run["data"]["counts"]["train"].values()))
    shares = counts / counts.sum()
    # Half of the mixed photos show more of the other one, which may be of the same class.
    by_heart = 1 - config["cutmix"] / 2 * (1 - (shares**2).sum())
    optimizer, end = config["optimizer"], "falls linearly to zero"
    decay = f"Weight decay is {config['weight_decay']:g}"
    if optimizer == "muon":
        optimizer = """Muon: each update of a matrix is made nearly orthogonal, so that all its
directions are learned at the same pace; AdamW at a tenth of the rate takes what is no matrix and
the last layer"""
        decay += ", for AdamW's part 0.01"
    if config["schedule"] == "constant":
        end = "stays"
    warmup = min(config["warmup_epochs"], config["epochs"] / 2)
    mixed, flat, rare = "", "", ""
    if config["cutmix"]:
        mixed = f"""{config["cutmix"]:.0%} of the batches are mixed by CutMix: a square of each
photo, of random size, is replaced by that of another one. A mixed photo has but one right answer,
so that in training even a network that knows all photos by heart would hardly get beyond
{by_heart:.0%}."""
    last = engine.sam_epochs(config)
    if last:
        flat = f"""In the last {last} of the {config["epochs"]} epochs a step takes its gradients
where the loss is highest within a radius of {config["sam_radius"]:g} (SAM: Foret et al., ICLR 2021;
late in training: Zhou et al., ICLR 2025). So it prefers minima that are flat, in which other photos
find a low loss too, and costs a second pass."""
    if makes_up_for_rare_classes(run):
        strength = config["logit_adjustment"]
        times = "" if strength == 1 else f"{strength:g} times "
        rare = f"""The loss expects each class as often as it is in validation, not as in training:
{times}the logarithm of the ratio of its shares is added to its logit there (Menon et al., ICLR
2021)."""
    same = """The two networks have the same layers, as many weights and the same ones to begin
with; only the skip sets them apart."""
    skip = f"""The residual network adds the input of a block, pooled by the average, to its output,
from the second block on, with zeros for the channels that are new:

{code(models.ResidualCNN.block)}"""
    blocks = f"""A block is convolution, 2 x 2 max pooling, batch normalisation and ReLU, five
times; the mean over all positions goes into the fully connected layers. Pooling halves the side of
the feature maps, so that each block sees twice as far and may have twice the channels at the same
cost. Batch normalisation keeps the scale of each channel steady, so that a high learning rate
works.

{code(plain.__init__, plain.block, plain.forward)}"""
    return f"""## Part 1: networks from scratch

{same if len(names) == 1 and set(trained) == {"plain", "residual"} else ""}

{layers}

{blocks if {"plain", "residual"} & set(trained) else ""}

{skip if "residual" in trained else ""}

Each run sees every photo {config["epochs"]} times and keeps the epoch that is best on validation.
The loss is cross-entropy with label smoothing {config["label_smoothing"]:g}. The optimizer is
{optimizer}. {decay}; biases and batch norm have none. The learning rate rises over {warmup:g}
epochs, then {end}. Each photo of a batch gets its own crop (at least {config["crop_scale"]:.0%} of
the area), flip, rotation (up to {config["rotation"]:g} degrees) and colours.
{paragraph(mixed, flat, rare)}

Training loss and accuracy are of these distorted photos, the loss with label smoothing; validation
loss and accuracy are of undistorted ones, without. So compare the course of the two, not their
height.

Accuracy and confusion matrix are computed by hand; recall, precision and F1 follow from the matrix:

{code(evaluate.confusion_matrix)}"""


def grid_of(model, chosen, summary, runs):
    """What the grid of one network shows, and the course of its chosen run, the first seed."""
    lines = [line for line in summary["grid"] if line["model"] == model]
    rates, run = {line["learning_rate"] for line in lines}, runs[chosen["run"]]
    finished = [line for line in lines if line["validation_accuracy"] is not None]
    if not finished:
        return f"No run of the grid of the {model} network has come to its end."
    accuracies = [line["validation_accuracy"] for line in finished]
    low, high = f"{min(accuracies):.1%}", f"{max(accuracies):.1%}"
    reached = low if low == high else f"{low} to {high}"
    means = []
    for key in plot.SETTING:
        groups = sorted(plot.group(finished, key).items())
        values = [f"{plot.mean_accuracy(own):.1%} ({value:g})" for (value,), own in groups]
        means.append(f"by {key.replace('_', ' ')} {', '.join(values)}")
    if len(finished) < len(lines):  # the means would be over different settings
        compared_means = "some of its runs have failed"
    else:
        compared_means = f"the means are {listing(means)}"
    [row] = [row for row in summary["models"] if chosen["run"] in row["runs"]]
    chance = "With one seed it is open how much of this is chance."
    if row["validation_spread"] is not None:
        chance = f"""By chance alone, from seed to seed, the chosen setting varies by
{100 * row["validation_spread"]:.1f} points (standard deviation over {len(row["seeds"])} seeds)."""
    count = sum(run["data"]["counts"]["validation"].values())
    middle = np.mean(accuracies)
    chance += f""" An accuracy near {middle:.0%} on {count:,} photos has a 95% interval of
±{half_width(count, middle):.1f} points, even if these have chosen nothing."""
    settings = plot.group(lines, *plot.SETTING)
    best = settings.pop((chosen["learning_rate"], chosen["batch_size"]), [])
    accuracy = plot.mean_accuracy(best) if best else None
    ties = [own[0] for own in settings.values() if plot.mean_accuracy(own) == accuracy]
    tie, at_edge = "", edge(rates, chosen["learning_rate"])
    if ties:
        names = listing([plot.setting_name(line) for line in ties])
        tie = f"As accurate: {names}; the lower validation loss decided."
    if not all(edge(rates, line["learning_rate"]) for line in ties):
        at_edge = ""
    loss, overfits = overfitting(run)
    judgement = "no sign of overfitting (which would be a rise by more than 5%)"
    if overfits:
        judgement = "it overfits (a rise by more than 5%)"
    return paragraph(
        f"""The {model} network reaches {reached} on validation, the best epoch of each setting;
{compared_means}.""",
        chance,
        f"Chosen: learning rate {chosen['learning_rate']:g}, batch {chosen['batch_size']}.",
        at_edge,
        tie,
        f"Its validation loss (seed {chosen['seed']}) {loss}: {judgement}.",
    )


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
    failures, failed = summary["failed"], ""
    if failures:
        rows = [(failure["run"], failure["reason"]) for failure in failures]
        failed = table(("run", "reason"), rows, "Runs that failed.")
    return f"""## Learning rates and batch sizes

{texts}

{over_each_other}

![Best validation accuracy of each setting.](<figures/grid_heatmap.png>)

{failed}

{apart}"""


def at_equal_settings(summary, runs):
    """Sentences on validation accuracy at the settings of the grid, each network against the one
    before it."""
    lines = {}
    for line in summary["grid"]:
        if line["validation_accuracy"] is not None:
            settings = engine.settings(runs[line["run"]]["config"], ("model",))
            setting = tuple(sorted(settings.items()))
            lines.setdefault(line["model"], {})[setting] = 100 * line["validation_accuracy"]
    sentences = []
    for (first, own), (second, other) in itertools.pairwise(lines.items()):
        differences = [other[setting] - own[setting] for setting in own.keys() & other.keys()]
        if differences:
            mean = np.mean(differences)
            sentences.append(
                f"At equal settings {second} is on average {abs(mean):.1f} points "
                f"{'below' if mean < 0 else 'above'} {first} on validation "
                f"({span(differences)} in {len(differences)} pairs of runs)."
            )
    return paragraph(*sentences)


def what_the_gap_is(rows, runs):
    """How far validation is above test, and what of it picking the best epoch explains."""
    if not rows or all(row["gap"] is None for row in rows):
        return ""
    counts, picked = runs[rows[0]["runs"][0]]["data"]["counts"], []
    for row in rows:
        gains = [
            runs[name]["best"]["validation_accuracy"]
            - runs[name]["history"][-1]["validation_accuracy"]
            for name in row["runs"]
        ]
        picked.append(f"{100 * np.mean(gains):.1f} ({row['label']})")
    validation, test = (sum(counts[split].values()) for split in ("validation", "test"))
    gaps = []
    for row in rows:
        if row["fresh_test_accuracy"] is not None:
            gap = row["fresh_validation_accuracy"] - row["fresh_test_accuracy"]
            gaps.append(f"{100 * gap:.1f} ({row['label']})")
    fresh = f"Of the fresh seeds alone the gap is {listing(gaps)} points." if gaps else ""
    middle = np.mean([row["validation_accuracy"] for row in rows])
    luck = np.hypot(half_width(validation, middle), half_width(test, middle))
    return f"""The gap is the optimism of choosing, the epoch and the setting, plus the luck of two
samples of photos, which is within {luck:.0f} points either way in 95 of 100 studies. The best epoch
is above the last one by {listing(picked)} points on validation: part of that is optimism.
{fresh}"""


def scratch(summary, runs, dropout):
    """The chosen networks from scratch, and dropout: (sentence, table), see compare_pairs()."""
    rows = [row for row in summary["models"] if row["kind"] == "scratch"]
    without, with_dropout = scratch_labels(summary)
    plain = [row for row in rows if row["label"] in without]
    skips = ""
    if [row["label"] for row in plain] == ["plain CNN", "residual CNN"]:
        few = "Five layers may be few enough to learn without."
        if is_better(summary, "residual CNN", "plain CNN"):
            few = ""
        skips = f"""Skips were made for networks of dozens of layers: without them a deeper one had
a higher training error than a shallower one, in spite of batch normalisation (He et al.). {few} In
larger trials, one setting for both, 6050 test photos of Food-11's dishes at 64 px, the skip gave
+0.2 points [-2.1, +2.5] (3 seeds) and, by an earlier recipe, +0.1 [-0.8, +1.0] (5 seeds, learning
rate 0.02). How it is built may matter more: pooled by the maximum and added before the ReLU it gave
-1.0 [-1.8, -0.3] (5 seeds, learning rate 0.04; results/EXPERIMENTS.md)."""
    written = f"""## The best of each{", and what the skip does" if skips else ""}

{paragraph(compare_networks(summary), at_equal_settings(summary, runs))}

{results_table(plain, "The best setting of each network by validation accuracy.")}

{skips}

{what_the_gap_is(plain, runs)}"""
    if not with_dropout:
        return written
    ends, acts, needless = [], "", True
    for row in plain:
        run = runs[row["runs"][0]]
        last, (_, overfits) = run["history"][-1], overfitting(run)
        ends.append(
            f"{last['train_accuracy']:.1%} where validation accuracy is "
            f"{last['validation_accuracy']:.1%} ({row['label']}, seed {row['seeds'][0]})"
        )
        if overfits or last["train_accuracy"] > last["validation_accuracy"]:
            needless = False
    if {"plain", "residual"} >= set(summary["choices"]):
        acts = """Dropout acts on the input of both fully connected layers, where every unit sees
the whole photo and units can come to rely on each other. The convolutions have none: batch
normalisation and the distorted photos regularise them already."""
    little = ""
    if needless:
        little = """Training accuracy is not above validation accuracy, and validation loss ends
within 5% of its lowest: no sign of what dropout prevents."""
    why = f"""{acts} Dropout can help a network that knows its training photos much better than
others. Without it training accuracy, on distorted photos, is at the end {listing(ends)}. {little}
Learning rate and batch size are those chosen without dropout."""
    return f"""{written}

## Dropout

{paragraph(dropout[0], why)}

{dropout[1]}

{results_table([row for row in rows if row not in plain], "The networks with dropout.")}

![Dropout, with 95% intervals.](<figures/dropout.png>)"""


def errors(row, other, runs, output, title):
    """What a chosen model, all its seeds together, mixes up, and whether the model `other` does."""
    evaluations = plot.read_evaluations(output, row)
    if not evaluations:
        return ""
    classes, label, name = evaluations[0]["classes"], row["label"], row["runs"][0]
    split, seeds = evaluations[0]["split"], len(evaluations)
    matrix = plot.add_up(evaluations)
    worst = plot.confused_pairs(matrix)[:5]
    finding, pairs = f"Nothing is mixed up by {label}.", ""
    if worst:
        count, true, taken_for = worst[0]
        share = sum(count for count, _, _ in worst) / (matrix.sum() - matrix.trace())
        finding = f"Most often {label} mixes up {classes[true]} and {classes[taken_for]}"
        finding += f"; the pairs below are {share:.0%} of its mistakes." if share < 1 else "."
        head = ["classes", "mixed up", "first taken for second", "second for first"]
        lines = [
            [f"{classes[i]}, {classes[j]}", count, matrix[i, j], matrix[j, i]]
            for count, i, j in worst
        ]
        theirs = plot.read_evaluations(output, other) if other else []
        caption = f"Mixed up most often on {split} photos{together(seeds)}."
        if theirs and theirs[0]["split"] == split:
            head.append(f"mixed up by {other['label']}")
            counts = plot.add_up(theirs)
            for line, (_, i, j) in zip(lines, worst, strict=True):
                line.append(f"{(counts[i, j] + counts[j, i]) * seeds / len(theirs):.0f}")
        pairs = table(head, lines, caption)
    looks = "Where the first seed looks: bright speaks for the predicted class (Grad-CAM)."
    f1 = of_classes(evaluations, "f1")
    low, high = f1.argmin(), f1.argmax()
    extremes = ""
    if f1[low] < f1[high]:
        extremes = f"""By F1 {classes[high]} is recognised best ({f1[high]:.0%}), {classes[low]}
worst ({f1[low]:.0%})."""
    return f"""## {title}

{paragraph(finding, extremes)}
{towards_frequent(matrix, seeds, runs[name], label)}

{pairs}

![Confusion matrix, {label}.](<figures/confusion_{name}_{split}.png>)
![The pairs mixed up most, the first seed's mistakes.](<figures/pairs_{name}.png>)

![{looks}](<figures/attention_{name}.png>)"""


def of_classes(evaluations, key):
    """Recall, precision or F1 of each class, the mean over seeds: float [classes]."""
    return np.mean(
        [
            [evaluation["per_class"][name][key] for name in evaluation["classes"]]
            for evaluation in evaluations
        ],
        axis=0,
    )


def towards_frequent(matrix, seeds, run, label):
    """How many mistakes take a class with fewer training photos for one with more; "" if none.

    matrix: confusion matrices of that many seeds together; run: one of them.
    """
    data = run["data"]
    photos = np.array([data["counts"]["train"][name] for name in data["classes"]])
    rarer = photos[:, None] < photos  # [true, predicted]
    gained, lost = matrix[rarer].sum(), matrix[rarer.T].sum()
    measured_alike = len(set(matrix.sum(1))) == 1  # or else the frequent classes err more often
    if gained + lost == 0 or not measured_alike:
        return ""
    # The seeds share their test photos, so their mistakes count as those of one.
    if abs(gained - lost) / seeds < 1.96 * np.sqrt((gained + lost) / seeds):
        verdict = "half would be no bias, and chance alone may be as far from it"
    else:
        verdict = f"a bias to the {'more frequent' if gained > lost else 'rarer'} ones"
    corrected = "makes up" if makes_up_for_rare_classes(run) else "does not make up"
    return f"""Of {gained + lost} mistakes ({label}{together(seeds)}) between classes with unequal
numbers of photos to train {gained} take the rarer class for the more frequent one: {verdict}. Its
loss {corrected} for rare classes."""


def makes_up_for_rare_classes(run):
    """Whether the loss of a run was shifted, see engine.logit_shift()."""
    counts = [list(run["data"]["counts"][split].values()) for split in ("train", "validation")]
    shares = [np.array(numbers) / sum(numbers) for numbers in counts]
    strength = run["config"].get("logit_adjustment")  # none in fine-tuning and earlier versions
    return bool(strength) and not np.allclose(*shares)


def weights_of(run):
    name = run["config"]["weights"]
    return "random weights" if name == "none" else f"pre-trained weights ({name})"


def transfer(summary, runs, best, backbones, cases):
    """The fine-tuned networks; backbones, cases: (sentence, table), see compare_pairs()."""
    rows = [row for row in summary["models"] if row["kind"] == "finetune"]
    starts = {weights_of(runs[row["runs"][0]]) for row in rows}
    config, learned = runs[best["runs"][0]]["config"], ""
    if config["weights"] != "none":
        learned = """A network that has learned over a million photos of ImageNet has filters for
edges, textures and parts. """
    two_layers = ""
    if any(row["label"].startswith("mobilenet_v3") for row in rows):
        two_layers = """MobileNetV3's classifier has two layers; the first one stays frozen."""
    matrices = "\n".join(
        f"![Confusion matrix, {row['label']}.](<figures/confusion_{row['runs'][0]}_test.png>)"
        for row in best_of_backbones(summary)[1:3]
    )
    return f"""## Part 2: fine-tuning pre-trained networks

{paragraph(backbones[0], cases[0])}

{learned}Fine-tuning replaces the last layer by one for the new classes and trains that alone, or
the last convolutions with it, each with its batch norm. The rest is frozen, batch-norm statistics
too, so that it has to be computed only once for each view of a photo. {two_layers} After training
all that is frozen is as loaded, bit for bit; if it is not, the run ends with an error. The
optimizer is {config["optimizer"]}, with weight
decay {config["weight_decay"]:g}, {config["epochs"]} epochs, dropout {config["dropout"]:g} before
the last layer, label smoothing {config["label_smoothing"]:g}; photos are of {config["image_size"]}
px, {min(config["views"], config["epochs"])} views of each in turns (crops of at least
{config["crop_scale"]:.0%} of the area, flips, colours). {trained_convolutions(rows, runs)}

{tuning(summary, runs)}

{results_table(rows, f"The best learning rate of each by validation; {listing(sorted(starts))}.")}

{backbones[1]}

{cases[1]}

{why_more_layers(summary, rows, runs)}

![Fine-tuning, learning curves.](<figures/curves_transfer.png>)

{matrices}"""


def trained_convolutions(rows, runs):
    """Which convolutions of each backbone are trained, where any are."""
    sentences = []
    for row in rows:
        run = runs[row["runs"][0]]
        count = run["config"]["unfreeze_convolutions"]
        if not count:
            continue
        name = run["config"]["backbone"]
        network = models.build_backbone(name, len(run["data"]["classes"]), "none", count)
        kinds = [
            f"{layer.kernel_size[0]} x {layer.kernel_size[0]} from {layer.in_channels} to "
            f"{layer.out_channels} channels"
            for layer, _norm in models.main_convolutions(network)[-count:]
        ]
        sentences.append(f"{name}: {listing(kinds)}")
    return f"The convolutions trained are, of {'; of '.join(sentences)}." if sentences else ""


def tuning(summary, runs):
    """Validation accuracy of every setting of every case, by the first seed that tried it."""
    settings = sorted(plot.group(summary["transfer"], *plot.SETTING))
    rows = []
    for lines in plot.group(summary["transfer"], *plot.CASE).values():
        cells = dict.fromkeys(settings, "")
        for setting, seeds in plot.group(lines, *plot.SETTING).items():
            accuracy, star = seeds[0]["validation_accuracy"], " *" if seeds[0]["chosen"] else ""
            cells[setting] = "failed" if accuracy is None else f"{accuracy:.1%}{star}"
        rows.append((evaluate.label_of(runs[lines[0]["run"]]["config"]), *cells.values()))
    head = "learning rate, batch", *(f"{rate:g}, {batch}" for rate, batch in settings)
    caption = """Validation accuracy of the first seed; * is chosen, by the mean where several
seeds tried all. One at an end of its row might do better beyond."""
    if len({batch for _, batch in settings}) == 1:
        caption += " Batch size was not tuned."
    return table(head, rows, caption)


def why_more_layers(summary, rows, runs):
    """What the courses of training more convolutions say, for each backbone."""
    sentences, of_convolutions, of_last_layer, helps = [], [], {}, False
    for row in rows:
        own = [runs[name] for name in row["runs"]]
        known = np.mean([run["history"][-1]["train_accuracy"] for run in own])
        if not own[0]["config"]["unfreeze_convolutions"]:
            of_last_layer[row["label"]] = known
            continue
        of_convolutions.append(known)
        if is_better(summary, row["label"], f"{network_of(row['label'])} (FC only)"):
            helps = True
        right = np.mean([run["history"][-1]["validation_accuracy"] for run in own])
        losses = [validation_losses(run) for run in own]
        rise = np.mean([loss[-1] / np.nanmin(loss) - 1 for loss in losses])
        epochs = listing([str(run["best"]["epoch"]) for run in own])
        sentences.append(
            f"At the end {row['label']} is right on {known:.1%} of the training photos and on "
            f"{right:.1%} of the validation photos{mean_of(len(own))}, its validation loss "
            f"{rise:.0%} above its lowest; kept is epoch {epochs}"
        )
    if not sentences:
        return ""
    why = ""
    if not helps and of_last_layer and min(of_convolutions) > max(0.98, *of_last_layer.values()):
        alone = [f"{known:.0%} ({network_of(label)})" for label, known in of_last_layer.items()]
        why = f"""The last layer alone gets {listing(alone)} of the training photos right: what
the convolutions add may go into knowing the others by heart."""
    return f"{'. '.join(sentences)}. {why}"


def sizes_of(summary, label):
    """The rows of one network in the summary's `sizes`, the smallest number of photos first."""
    return [row for row in summary["sizes"] if row["label"] == label]


def points_per_doubling(less, more):
    """Test accuracy of a row over that of one on fewer photos, in points for each doubling."""
    doublings = np.log2(more["photos_per_class"] / less["photos_per_class"])
    return 100 * (more["test_accuracy"] - less["test_accuracy"]) / doublings


def span(points):
    """Lowest and highest of some differences, such as +9.0 to +11.7; one number if they agree."""
    low, high = (f"{round(value, 1) + 0:+.1f}" for value in (min(points), max(points)))  # no -0.0
    return low if low == high else f"{low} to {high}"


def sizes(summary, runs, best):
    """What more training photos are worth; "" if that was not measured."""
    if not summary["slopes"]:
        return ""
    counts = sorted({round(row["photos_per_class"]) for row in summary["sizes"]})
    lines = []
    slopes, first_steps, last_steps = ({"scratch": [], "finetune": []} for _ in range(3))
    for line in summary["slopes"]:
        rows, cells = sizes_of(summary, line["label"]), dict.fromkeys(counts, "")
        for row in rows:
            cells[round(row["photos_per_class"])] = f"{row['test_accuracy']:.1%}"
        slope, (low, high) = 100 * line["slope"], line["interval_95"]
        interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
        lines.append((line["label"], *cells.values(), f"{slope:+.1f}", interval))
        kind = rows[0]["kind"]
        slopes[kind].append(slope)
        first_steps[kind].append(points_per_doubling(*rows[:2]))
        last_steps[kind].append(points_per_doubling(*rows[-2:]))
    worth = []
    for kind, networks in (("scratch", "from scratch"), ("finetune", "that are fine-tuned")):
        if slopes[kind]:
            text = f"{span(slopes[kind])} points to networks {networks}"
            if len(counts) > 2:
                text += f" (from the two smallest numbers of photos {span(first_steps[kind])}, "
                text += f"from the two largest {span(last_steps[kind])})"
            worth.append(text)
    rows = sizes_of(summary, summary["slopes"][0]["label"])
    less, more = (runs[row["runs"][0]]["data"]["counts"]["train"] for row in rows[-2:])
    unchanged, rarer = sum(more[name] == less[name] for name in more), ""
    if unchanged:
        rarer = f"""The last step adds no photo to {unchanged} of the {len(more)} classes, which
have no more: it makes them rarer."""
    columns = [f"{count} photos" for count in counts]
    head = "network", *columns, "points per doubling", "95% interval"
    caption = """Test accuracy by photos a class, on average, and its slope, of a straight line
over the logarithm of the number of photos."""
    return f"""## How many photos does it take?

Twice as many photos, and with them twice as many steps in as many epochs, are worth on average
{listing(worth)}. {catch_up(summary, best)} {rarer} Measured with one seed, at the settings that
were chosen with all photos; the intervals hold for other test photos, not for other seeds. What
lies beyond these numbers was not measured.

{table(head, lines, caption)}

![Test accuracy over the number of training photos a class.](<figures/sizes.png>)"""


def catch_up(summary, best):
    """How far the best network from scratch, on all photos, is from the best fine-tuned on few."""
    measured = [row["label"] for row in summary["slopes"]]
    if len(best) < 2 or not all(row["label"] in measured for row in best.values()):
        return ""
    most = sizes_of(summary, best["scratch"]["label"])[-1]
    fewest = sizes_of(summary, best["finetune"]["label"])[0]
    return f"""With {fewest["photos_per_class"]:.0f} photos a class {fewest["label"]} is right on
{evaluate.format_accuracy(fewest, "test")} of the test photos, {most["label"]} with
{most["photos_per_class"]:.0f} on {evaluate.format_accuracy(most, "test")}."""


def by_class(best, runs, output):
    """Recall, precision and F1 of each class of the best models, mean over seeds."""
    head, columns, recalls, names, seeds, split = ["class", "to train"], [], [], [], 1, None
    for row in best.values():
        evaluations = plot.read_evaluations(output, row)
        if not evaluations or split not in (None, evaluations[0]["split"]):
            continue
        split, classes = evaluations[0]["split"], evaluations[0]["classes"]
        counts = runs[row["runs"][0]]["data"]["counts"]["train"]
        names.append(row["label"])
        seeds = max(seeds, len(evaluations))
        head += [f"{network_of(row['label'])}: recall", "precision", "F1"]
        recall = of_classes(evaluations, "recall")
        recalls.append(recall)
        columns += [recall, of_classes(evaluations, "precision"), of_classes(evaluations, "f1")]
    if not columns:
        return ""
    shown, which = range(len(classes)), ""
    if len(classes) > 40:
        shown = np.argsort(columns[-1])[:20]
        which = f" The 20 classes with the lowest F1 of {names[-1]}."
    rows = [
        (classes[i], counts[classes[i]], *(f"{column[i]:.0%}" for column in columns)) for i in shown
    ]
    caption = f"Each class, {split} photos{', mean over seeds' if seeds > 1 else ''}: "
    caption += f"{', then '.join(names)}.{which}"
    finding = ""
    if len(recalls) == 2:
        gains = 100 * (recalls[1] - recalls[0])
        least, most = gains.argmin(), gains.argmax()
        finding = f"""The recall of {names[1]} minus that of {names[0]} is {gains[least]:+.0f}
points in {classes[least]}, {gains[most]:+.0f} in {classes[most]}, in other classes between.\n\n"""
    return finding + table(head, rows, caption)


def conclusion(summary, runs, best, output):
    """The best from scratch against the best fine-tuned, the cost of all runs, every class."""
    title, duel = "All chosen models", ""
    if len(best) == 2:
        title, one, other = "From scratch against fine-tuned", best["finetune"], best["scratch"]
        one_run, other_run = runs[one["runs"][0]], runs[other["runs"][0]]
        costs = f"""{one["label"]} starts from {weights_of(one_run)} and trains
{one["trainable_parameters"]:,} of its {one["parameters"]:,} parameters on photos of
{one_run["config"]["image_size"]} px, {other["label"]} all of its {other["parameters"]:,} on photos
of {other_run["config"]["image_size"]} px: the difference is not that of the start alone."""
        duel = paragraph(describe_pair(summary, one["label"], other["label"]), costs)
    minutes = sum(run["seconds"] for run in runs.values()) / 60
    seeds = listing([str(n) for n in sorted({run["config"]["seed"] for run in runs.values()})])
    shared = ", shared features counted in each," if "finetune" in best else ""
    cost = f"""The seconds of all {len(runs)} runs{shared} add up to {minutes:.0f} minutes; seeds:
{seeds}."""
    if summary["left_out"]:
        cost += f" Left out, of no part in the study: {listing(summary['left_out'])}."
    return f"""## {title}

{duel}

![All chosen models, with 95% intervals.](<figures/overview.png>)

{cost}

{by_class(best, runs, output)}"""


SOURCES = """*Sources: He et al., CVPR 2016 (skips); Yun et al., ICCV 2019 (CutMix); Jordan et al.,
2024 (Muon); Sandler et al., CVPR 2018, Howard et al., ICCV 2019, Ma et al., ECCV 2018 (backbones);
Selvaraju et al., ICCV 2017 (Grad-CAM); Wilson, 1927; McNemar, 1947; Satterthwaite, 1946.*"""

WHOLE_WORDS = {"break_long_words": False, "break_on_hyphens": False}
FIGURE = re.compile(r"!\[(.*)\]\(<(.*)>\)")
LIST = re.compile(r"[-*+>] |\d+[.)] ")


def write_report(output):
    """The report on a folder of results: a list of blocks of Markdown, without missing figures."""
    summary, runs = plot.read_summary(output)
    if not summary["models"]:
        raise SystemExit(f"{output}/summary.json lists no model: train one first.")
    best = best_models(summary["models"])
    dropout, backbones, cases = paired_verdicts(summary)
    parts = ["# How well can a small CNN learn a few thousand photos?", title_block(runs)]
    parts.append(in_short(summary, best, [dropout[0], cases[0], backbones[0]]))
    parts.append(how_to_read(summary))
    notes = output / "notes.md"  # of the author: what only they know of photos and weights
    if notes.is_file():
        parts.append(notes.read_text(errors="replace"))
    parts.append(photos(runs[summary["models"][0]["runs"][0]]))
    scratch_best, finetune_best = best.get("scratch"), best.get("finetune")
    if scratch_best:
        trained = [name for name in models.SCRATCH if name in summary["choices"]]
        parts.append(architectures(runs[scratch_best["runs"][0]], trained))
    if summary["choices"] or summary["failed"]:
        parts.append(grid(summary, runs))
    if scratch_best:
        parts.append(scratch(summary, runs, dropout))
        parts.append(
            errors(scratch_best, finetune_best, runs, output, "Where it errs: from scratch")
        )
    if finetune_best:
        parts.append(transfer(summary, runs, finetune_best, backbones, cases))
        parts.append(errors(finetune_best, scratch_best, runs, output, "Where it errs: fine-tuned"))
    parts.append(sizes(summary, runs, best))
    parts.append(conclusion(summary, runs, best, output))
    parts.append(SOURCES)
    blocks = []
    # A blank line ends a block, but not within a function, where indented code follows.
    for block in re.split(r"\n\n+(?! )", printable("\n\n".join(part for part in parts if part))):
        if not block.startswith("!["):
            is_text = not block.startswith(("#", "|", "```")) and not LIST.match(block)
            blocks.append(textwrap.fill(block, 100, **WHOLE_WORDS) if is_text else block)
            continue
        found = [(text, path) for text, path in FIGURE.findall(block) if (output / path).exists()]
        if found:  # figures on lines without a blank one between them stand beside each other
            blocks.append("\n".join(f"![{text}](<{path}>)" for text, path in found))
            blocks.append(f"*{' '.join(text for text, _ in found)}*")
    return blocks


# ---------------------------------------------------------------------------------------------
# The page setter: title, headings, text, tables, pictures and code on A4

PAGE, MARGIN, GAP = (8.27, 11.69), 0.6, 0.15  # inches
WIDTH = PAGE[0] - 2 * MARGIN
FIGURE_HEIGHT = 3.2  # inches, at most
CAPTION = 0.5  # inches, for the words below a figure or table
# How a block begins: the inches that must be left for it on a page, if set_pages() does not compute
# them, its look (size in points).
LOOKS = {
    "# ": (0.0, {"size": 18, "weight": "bold"}),
    "## ": (2.0, {"size": 13, "weight": "bold"}),
    "![": (0.0, {}),
    "| ": (0.0, {"size": 7, "family": "DejaVu Sans Mono"}),
    "```": (0.6, {"size": 7, "family": "DejaVu Sans Mono"}),
    "*": (0.0, {"size": 8, "style": "italic"}),
    "": (1.2, {"size": 9}),
}


def set_pages(blocks, folder, file):
    """Write the blocks of write_report(folder) as a PDF to an open binary file."""
    pages, y = [], 0.0  # y: inches above the bottom edge of the last page
    for block in blocks:
        is_list = LIST.match(block)
        start = "" if is_list else next(start for start in LOOKS if block.startswith(start))
        room, look = LOOKS[start]
        if start == "![":
            row = [Image.open(folder / path).convert("RGB") for _, path in FIGURE.findall(block)]
            shapes = [picture.width / picture.height for picture in row]
            height = min(FIGURE_HEIGHT, (WIDTH - GAP * (len(row) - 1)) / sum(shapes))
            # No larger than its letters need: a page's are smaller than a screen's.
            height = min(height, 0.7 * row[0].height / row[0].info.get("dpi", (110, 110))[0])
            left = y - MARGIN - CAPTION
            if 0.7 * height < left < height:  # a little smaller, and it fits the page
                height = left
            lines, room = [row], height + CAPTION
        elif start == "| ":  # as large as fits; a letter of this font is 0.602 of its size wide
            lines = [line[2:-2].replace(" | ", "   ") for line in block.split("\n")]
            look = {**look, "size": min(7, 72 * WIDTH / 0.602 / len(lines[0]))}
        elif start == "```":
            lines = block.split("\n")[1:-1]
        else:  # how wide a letter is on average; a line of wide ones goes into the margin
            letter = look["size"] * (0.6 if "weight" in look else 0.52)
            letters = int(72 * WIDTH / letter)
            text = block if is_list else block.removeprefix(start).removesuffix("*")
            parts = text.split("\n") if is_list else [text]
            lines = [line for part in parts for line in textwrap.wrap(part, letters, **WHOLE_WORDS)]
        if start != "![":
            height = 1.4 * look["size"] / 72
        if start == "*":
            room = height * len(lines)
        elif start == "| ":
            room = min(PAGE[1] / 2, height * len(lines) + CAPTION)
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
