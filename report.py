"""Write the study up: results/report.md and results/report.pdf, from the JSON files and figures.

    python report.py --output results

Every number and every judgement is computed from the results; the code is taken from the source.
Two models are called different only where an exact paired test on the same photos says so.
"""

import inspect
import textwrap
from pathlib import Path

import numpy as np

import evaluate
import models
import optimizers
import runs
import summary as tables
from tools import typeset


def text(*sentences):
    """A block (see tools/typeset.py); sentences that are None are left out."""
    return "text", " ".join(sentence for sentence in sentences if sentence)


def listing(items):
    """a, b and c."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def code(caption, *objects):
    sources = [textwrap.dedent(inspect.getsource(thing)).rstrip() for thing in objects]
    return "code", "\n\n".join(sources), caption


def resolution(photos, accuracy):
    """How far apart, in points, two accuracies have to be for 95% confidence in a difference."""
    return 196 * (2 * accuracy * (1 - accuracy) / photos) ** 0.5


def results_table(rows, caption):
    head = "model", "validation [95%]", "test [95%]", "gap", "parameters trained", "seconds"
    body = []
    for row in rows:
        gap = "" if row["gap"] is None else f"{100 * row['gap']:+.1f}"
        cells = row["label"], tables.percent(row, "validation"), tables.percent(row, "test"), gap
        body.append((*cells, f"{row['trainable_parameters']:,}", f"{row['seconds']:.0f}"))
    return "table", [head, *body], caption


def photos(run):
    counts, classes = run["data"]["counts"], run["data"]["classes"]
    total = {split: sum(counts[split].values()) for split in counts}
    yield "heading", "1. The photos"
    if Path(run["config"]["data"]).name == "demo":
        yield text("THESE ARE NO RESULTS: the photos are made-up drawings, a demonstration.")
    yield text(
        f"{sum(total.values()):,} photos of {len(classes)} classes: {total['train']:,} to train,",
        f"{total['validation']:,} for every choice, {total['test']:,} for the last measurement",
        f"only. An accuracy near 80% on {total['test']:,} photos has a 95% interval of about",
        f"±{resolution(total['test'], 0.8) / 2**0.5:.0f} points.",
    )
    rows = [(name, *(counts[split][name] for split in counts)) for name in classes]
    yield "table", [("class", *counts), *rows], "Photos of each class in each split."


def architectures(run):
    config, plain = run["config"], models.PlainCNN
    yield "heading", "2. Two networks from scratch"
    for name, network in models.SCRATCH.items():
        network = network(len(run["data"]["classes"]))
        layers, count = models.describe(network, config["image_size"]), models.counts(network)
        columns = [column for column in layers[0] if column != "state"]
        rows = [columns, *([row[column] for column in columns] for row in layers)]
        yield (
            "table",
            rows,
            (
                f"The {name} network at {config['image_size']} px: {count['convolutions']} "
                f"convolutions, {count['linear_layers']} fully connected layers, "
                f"{count['parameters']:,} parameters. Output is channels, height, width."
            ),
        )
    yield text(
        "A block is convolution, 2 x 2 max pooling, batch normalisation and ReLU, five times; the",
        "mean over all positions goes into the fully connected layers. ReLU costs next to nothing",
        "and does not saturate; batch normalisation keeps the scale of each channel steady, so",
        "that a high learning rate works. The residual network adds the pooled input of a block to",
        "its output, from the second block on, with zeros for the channels that are new. A skip",
        "has no parameters: both networks have the same layers and the same start.",
    )
    muon = (
        "Muon: each update of a matrix is made nearly orthogonal, so that all its directions are "
        "learned at the same pace; AdamW at a tenth of the rate takes what is no matrix, the first "
        "convolution and the last layer."
    )
    yield text(
        f"The loss is cross-entropy with label smoothing {config['label_smoothing']:g}. The",
        f"optimizer is {muon if config['optimizer'] == 'muon' else config['optimizer'] + '.'}",
        f"The learning rate rises over {config['warmup_epochs']:g} epochs, then falls linearly to",
        f"zero. Each photo of a batch gets its own crop (at least {config['crop_scale']:.0%} of",
        f"the area), flip, rotation (up to {config['rotation']:g} degrees) and colours; CutMix",
        f"pastes a square of another photo into it with probability {config['cutmix']:g}.",
    )
    yield code("Convolutions and FC layers:", plain.__init__, plain.block, plain.forward)
    yield code("The skip:", models.ResidualCNN.block)
    yield code("What makes an update of Muon orthogonal:", optimizers.orthogonalise)
    yield code("How accuracy is computed:", evaluate.confusion_matrix, evaluate.metrics)


def effect(grid, key, what, total):
    """A sentence on what the learning rate or the batch size does."""
    values = sorted({entry[key] for entry in grid})
    means = [
        np.mean([e["validation_accuracy"] for e in grid if e[key] == value]) for value in values
    ]
    limit = resolution(total * len(grid) / len(values), np.mean(means))
    apart = 100 * (max(means) - min(means))
    numbers = listing(f"{mean:.1%} at {v:g}" for v, mean in zip(values, means, strict=True))
    return (
        f"By {what} the mean best validation accuracy is {numbers}: {apart:.1f} points apart, "
        f"{'more' if apart > limit else 'less'} than the {limit:.1f} that chance alone can give."
    )


def grid(study, finished, figures):
    yield "heading", "3. Learning rates and batch sizes"
    for model, chosen in study["choices"].items():
        entries = [entry for entry in study["grid"] if entry["model"] == model]
        run = finished[chosen[0]["run"]]
        total, history = sum(run["data"]["counts"]["validation"].values()), run["history"]
        accuracies, last = [entry["validation_accuracy"] for entry in entries], history[-1]
        nearly = 0.9 * max(epoch["validation_accuracy"] for epoch in history)
        early = next(e["epoch"] for e in history if e["validation_accuracy"] >= nearly)
        losses = [epoch["validation_loss"] or np.inf for epoch in history]
        low = int(np.argmin(losses))
        judgement = "is near its lowest to the end: no overfitting"
        if losses[-1] > 1.05 * losses[low]:
            judgement = f"rises from {losses[low]:.2f} in epoch {low + 1} to {losses[-1]:.2f} at "
            judgement += "the end: it overfits"
        yield "figure", figures / f"curves_{model}.png", f"The {model} network, all settings."
        yield text(
            f"The {model} network reaches {min(accuracies):.1%} to {max(accuracies):.1%} on",
            f"validation. {effect(entries, 'learning_rate', 'learning rate', total)}",
            effect(entries, "batch_size", "batch size", total),
            f"Chosen: learning rate {chosen[0]['learning_rate']:g}, batch",
            f"{chosen[0]['batch_size']}. It gets to nine tenths of its best accuracy in epoch",
            f"{early} of {len(history)}. In the last epoch it is right on",
            f"{last['train_accuracy']:.1%} of the training photos, distorted and mixed as they",
            f"are there, and on {last['validation_accuracy']:.1%} of the validation photos. Its",
            f"validation loss {judgement}.",
        )
    yield "figure", figures / "grid_heatmap.png", "Best validation accuracy of each setting."


def scratch(study, figures):
    rows = [row for row in study["models"] if row["kind"] == "scratch"]
    plain = [row for row in rows if "dropout" not in row["label"]]
    labels = [row["label"] for row in plain]
    yield "heading", "4. The best of each, and what the skip does"
    yield results_table(plain, "The best setting of each network by validation accuracy.")
    yield text(
        "Chosen as the best of many epochs and settings on few photos, a model looks better on",
        "validation than it is; the gap to the test accuracy says by how much.",
        *(tables.describe_pair(study, a, b) for a, b in zip(labels[1:], labels, strict=False)),
    )
    yield "heading", "5. Dropout"
    yield text(
        "Dropout acts on the input of both fully connected layers, where every unit sees the whole",
        "photo and units can come to rely on each other. The convolutions have none: batch",
        "normalisation and the distorted photos regularise them already.",
        *(tables.describe_pair(study, r["label"], r["label"].split(", dropout")[0]) for r in rows),
    )
    yield results_table(rows, "Without and with dropout, at the setting chosen without.")
    yield "figure", figures / "dropout.png", "Dropout, with 95% intervals."


def errors(row, output, figures, heading):
    """Confusion matrix of a chosen model, the classes it mixes up, its mistakes."""
    name = row["runs"][0]
    evaluation = tables.read_evaluation(output, name)
    if evaluation is None:
        return
    matrix, classes = np.array(evaluation["confusion_matrix"]), evaluation["classes"]
    below = zip(*np.tril_indices(len(classes), -1), strict=True)
    mixed = [(int(matrix[i, j] + matrix[j, i]), classes[i], classes[j]) for i, j in below]
    pairs = [f"{a} and {b} ({n} times)" for n, a, b in sorted(mixed, reverse=True)[:3] if n]
    extremes, order = [], sorted(evaluation["per_class"].items(), key=lambda i: i[1]["recall"])
    for label, numbers in (order[-1], order[0]):
        low, high = runs.wilson_interval(numbers["recall"], numbers["support"])
        extremes.append(f"{label} ({numbers['recall']:.0%} [{low:.0%}, {high:.0%}])")
    yield "heading", heading
    yield text(
        f"{row['label']}: most often mixed up are {listing(pairs) if pairs else 'none'}. The best",
        f"recognised class is {extremes[0]}, the worst {extremes[1]}.",
    )
    for file, caption in (
        (f"confusion_{name}_test", "Confusion matrix"),
        (f"mistakes_{name}", "Most confident mistakes"),
        (f"attention_{name}", "Where it looks: class-activation maps"),
    ):
        yield "figure", figures / f"{file}.png", f"{caption}, {row['label']}."


def weights_of(run):
    name = run["config"]["weights"]
    return "random weights" if name == "none" else f"pre-trained weights ({name})"


def transfer(study, finished, figures):
    rows = [row for row in study["models"] if row["kind"] == "finetune"]
    yield "heading", "7. Fine-tuning pre-trained networks"
    yield text(
        "A network that has learned a million photos of ImageNet has filters for edges, textures",
        "and parts. Fine-tuning replaces its last layer by one for the new classes and trains that",
        "alone, or the last convolutions with it. The rest is frozen: a few thousand photos are",
        "too few to improve millions of weights and enough to spoil them, and what is frozen has",
        "to be computed only once for each view of a photo.",
    )
    body = [("network, case", "parameters", "trained", "frozen", "frozen part unchanged")]
    for row in rows:
        run, total = finished[row["runs"][0]], row["parameters"]
        trained = row["trainable_parameters"]
        cells = row["label"], f"{total:,}", f"{trained:,}", f"{total - trained:,}"
        body.append((*cells, "yes, bit for bit" if run["frozen_unchanged"] else "no"))
    yield "table", body, "What was frozen, and whether its weights and statistics stayed as loaded."
    starts = sorted({weights_of(finished[row["runs"][0]]) for row in rows})
    yield results_table(rows, f"The best learning rate of each by validation; {listing(starts)}.")
    labels = [row["label"] for row in rows if not row["label"].endswith("FC only")]
    yield text(
        *(tables.describe_pair(study, name, name.split(", ")[0] + ", FC only") for name in labels)
    )
    yield "figure", figures / "transfer.png", "Fine-tuned networks, with 95% intervals."
    yield "figure", figures / "curves_transfer.png", "Fine-tuning, learning curves."


def conclusion(study, finished, best):
    yield "heading", "9. From scratch against pre-trained"
    if len(best) == 2:
        one, other = best["finetune"], best["scratch"]
        yield text(
            tables.describe_pair(study, one["label"], other["label"]),
            f"{other['label']} trains {other['trainable_parameters']:,} parameters in",
            f"{other['seconds']:.0f} s, {one['label']} {one['trainable_parameters']:,} in",
            f"{one['seconds']:.0f} s, on top of its {weights_of(finished[one['runs'][0]])}.",
        )
    pairs, every = study["comparisons"], list(finished.values())
    rows = sorted(study["models"], key=lambda row: -row["validation_accuracy"])
    yield results_table(rows, "All chosen models.")
    about = [run["environment"] for run in every]
    yield text(
        f"Of {len(pairs)} pairs of chosen models {sum(p['different'] for p in pairs)} differ by",
        "the paired test at 5%; if none really differed, one in twenty would all the same.",
        f"The study took {sum(run['seconds'] for run in every) / 60:.0f} minutes of training in",
        f"{len(every)} runs, on {listing(sorted({a['device'] for a in about}))} with torch",
        f"{listing(sorted({a['torch'] for a in about}))}; seeds",
        f"{listing(sorted({str(run['config']['seed']) for run in every}))}.",
    )


def write_blocks(output):
    """The blocks of the report (see tools/typeset.py) for a results folder."""
    study = runs.read_json(output / "summary.json", "models", "comparisons", "choices", "grid")
    finished, figures = runs.read_runs(output), output / "figures"
    if not study["models"] or not finished:
        raise SystemExit(f"{output}/summary.json lists no model: train one first.")
    best = {}
    for row in sorted(study["models"], key=lambda row: row["validation_accuracy"]):
        best[row["kind"]] = row
    yield "title", "How well can a small CNN learn a few thousand photos?"
    yield from photos(next(iter(finished.values())))
    if "scratch" in best:
        yield from architectures(finished[best["scratch"]["runs"][0]])
        yield from grid(study, finished, figures)
        yield from scratch(study, figures)
        yield from errors(best["scratch"], output, figures, "6. Where it errs: from scratch")
    if "finetune" in best:
        yield from transfer(study, finished, figures)
        yield from errors(best["finetune"], output, figures, "8. Where it errs: fine-tuned")
    yield from conclusion(study, finished, best)
    yield "figure", figures / "overview.png", "All chosen models, with 95% intervals."


def main(argv=None):
    parser = runs.Parser(__doc__)
    parser.add_argument("--output", default="results", metavar="DIR", help="folder of results")
    output = Path(parser.parse_args(argv).output)
    blocks = [b for b in write_blocks(output) if b[0] != "figure" or b[1].exists()]
    for name, write in (("report.md", typeset.write_markdown), ("report.pdf", typeset.write_pdf)):
        with runs.atomic_file(output / name) as file:
            write(blocks, file, output)
        print(output / name)


if __name__ == "__main__":
    runs.run_main(main)
