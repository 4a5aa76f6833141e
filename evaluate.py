"""Choose the best runs by validation, measure them on the test split, compare them.

    python evaluate.py --chosen --data food11            the whole study: writes summary.json
    python evaluate.py --run NAME --split validation     one run
    python evaluate.py --best --image lunch.jpg photos/  top 3 classes of any photos
    python evaluate.py --settings plain                  the flags that the grid chose

Writes results/evaluations/NAME.SPLIT.json for each run measured. The only script that shows test
photos to a network; what is chosen is chosen before that, by validation accuracy.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path
from statistics import mean

import numpy as np
import torch

import data
import engine
import models


def confusion_matrix(labels, predicted, classes):
    """int64 [classes, classes]: rows are true classes, columns predicted ones; int [N] each."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


def metrics(labels, predicted, classes):
    """Accuracy with its 95% interval, confusion matrix, precision, recall and F1 of each class.

    labels, predicted: int [N]; classes: names. A ratio with nothing below the line is 0.
    """
    matrix = confusion_matrix(labels, predicted, len(classes))
    hits, accuracy = np.diag(matrix), float(matrix.trace() / matrix.sum())
    guessed, support = matrix.sum(0), matrix.sum(1)
    precision, recall = hits / np.maximum(guessed, 1), hits / np.maximum(support, 1)
    f1 = 2 * hits / np.maximum(guessed + support, 1)
    rows = np.stack([precision, recall, f1], 1).tolist()
    per_class = [dict(zip(("precision", "recall", "f1"), row, strict=True)) for row in rows]
    return {
        "accuracy": accuracy,
        "interval_95": wilson_interval(accuracy, len(labels)),
        "confusion_matrix": matrix.tolist(),
        "per_class": dict(zip(classes, per_class, strict=True)),
    }


def wilson_interval(accuracy, total):
    """95% interval [low, high] of an accuracy (fraction) measured on `total` photos.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    z = 1.959964
    center = (accuracy + z * z / (2 * total)) / (1 + z * z / total)
    spread = math.sqrt(accuracy * (1 - accuracy) / total + z * z / (4 * total * total))
    half = z * spread / (1 + z * z / total)
    # Rounding must not put the accuracy outside.
    return [max(0.0, min(accuracy, center - half)), min(1.0, max(accuracy, center + half))]


def difference(first, second, draws=10_000):
    """Accuracy of `first` minus that of `second`, with a 95% interval -> a dict for the JSON.

    first, second: bool [seeds, photos], whether each photo was classified right. Percentiles of a
    bootstrap over photos and over seeds, each drawn with replacement: the interval holds for other
    photos and other seeds, with one seed for these two runs. Efron, Annals of Statistics 1979.
    """
    gains, random = first.astype(float) - second, np.random.default_rng(0)
    seeds, photos = gains.shape
    of_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    of_photos = random.multinomial(photos, np.full(photos, 1 / photos), draws) / photos
    interval = np.quantile(((of_seeds @ gains) * of_photos).sum(1), [0.025, 0.975]).tolist()
    return {"difference": float(gains.mean()), "interval_95": interval, "seeds": seeds}


# ---------------------------------------------------------------------------------------------
# Runs


def load_model(output, name, device):
    """Return (model in eval mode on `device`, the run's JSON) of a finished run.

    Exits with one line if the bytes are not those whose digest stands in the JSON.
    """
    file, path = engine.checkpoint_file(output, name), Path(output, "runs", f"{name}.json")
    if not path.is_file() or not file.is_file():
        raise SystemExit(f"{path} or {file} is missing: train the run first")
    run = json.loads(path.read_text())
    if run["checkpoint_sha256"] != hashlib.sha256(file.read_bytes()).hexdigest():
        raise SystemExit(f"{file} is damaged: delete it and {path}, and train the run again")
    config, classes = run["config"], len(run["data"]["classes"])
    if run["kind"] == "scratch":
        model = models.SCRATCH[config["model"]](classes)
    else:
        model = models.build_backbone(config["backbone"], classes, "none")
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state"])
    return model.to(device, memory_format=torch.channels_last).eval(), run


@torch.no_grad()
def predict(model, run, images):
    """Class probabilities float32 [B, classes], on the CPU, of photos float32 [B, 3, H, W]."""
    with engine.autocast(images.device, run["config"]["precision"]):
        logits = model(images)
    return logits.float().softmax(1).cpu()


def evaluate_run(name, split_name, arguments, device):
    """Measure one run on a split, write its JSON and return it."""
    model, run = load_model(arguments.output, name, device)
    if run["data"]["fingerprint"] != engine.fingerprint(arguments.data):
        raise SystemExit(f"{name} was trained on other photos than those in {arguments.data}")
    size = run["config"]["image_size"]
    split = data.load_split(arguments.data, split_name, size, arguments.cache)
    loader = data.Loader(split, engine.EVALUATION_BATCH, device)
    highest, predicted = torch.cat([predict(model, run, images) for images, _ in loader]).max(1)
    columns = (split.files, split.labels.tolist(), predicted.tolist(), highest.tolist())
    keys = ("file", "label", "predicted", "probability")
    evaluation = {"name": name, "split": split_name, "classes": split.classes}
    evaluation |= metrics(split.labels.numpy(), predicted.numpy(), split.classes)
    rows = zip(*columns, strict=True)
    evaluation["predictions"] = [dict(zip(keys, row, strict=True)) for row in rows]
    engine.write_json(f"{arguments.output}/evaluations/{name}.{split_name}.json", evaluation)
    print(f"{split_name} {evaluation['accuracy']:.1%}  {name}")
    return evaluation


def find_files(path):
    """A file, or all in a folder that are not hidden, links followed."""
    if not path.is_dir():
        return [path]
    return [file for entry in data.visible(path) for file in find_files(entry)]


def classify(name, places, output, device):
    """Print the three most probable classes of each photo; exits with a line for what is none."""
    model, run = load_model(output, name, device)
    files = [file for place in places for file in find_files(Path(place))]
    size, classes = run["config"]["image_size"], run["data"]["classes"]
    # strict asks decode_all() for one more, which is when it names what is no photo.
    for file, pixels in zip(files, data.decode_all(files, size), strict=True):
        if pixels is not None:
            image = data.normalise(torch.tensor(pixels)[None].to(device))
            top = zip(*predict(model, run, image)[0].sort(descending=True), strict=True)
            print(f"{file}:", *[f"{classes[label]} {share:.1%}" for share, label in top][:3])


# ---------------------------------------------------------------------------------------------
# The study


def of_networks(output):
    """The runs that have not failed, by network: {"plain": [a run's JSON, ...], ...}.

    Exits with one line if the names say that those of a network differ in more than what is tuned.
    """
    networks, settings = {}, {}
    for name, run in engine.read_runs(output).items():
        network, rest = engine.network_of(name), name.split("-seed")[1].partition("-")[2]
        if settings.setdefault(network, rest) != rest:
            raise SystemExit(
                f"{output}: {rest or settings[network]} not in all {network}: move some"
            )
        if run["best"]:
            networks.setdefault(network, []).append(run)
    if not networks:
        raise SystemExit(f"{output}/runs holds no run that succeeded: train one first")
    return networks


def setting(run):
    """What the grid of a network varies, of a run's JSON: (learning rate, batch size)."""
    return run["config"]["learning_rate"], run["config"]["batch_size"]


def choose(runs):
    """The setting chosen for a network: of its best run by validation, without --dropout.

    The lowest seed chooses, others repeat what was chosen.
    """
    grid = [run for run in runs if "-dropout" not in run["name"]] or runs
    return setting(max(grid, key=lambda run: (-run["config"]["seed"], engine.merit(run["best"]))))


def chosen_models(output):
    """A row for each chosen model, all its seeds together: the `models` of summary.json."""
    rows = []
    for network, runs in of_networks(output).items():
        by_dropout = {}
        for run in runs:
            if setting(run) == choose(runs):
                by_dropout.setdefault(run["config"]["dropout"], []).append(run)
        for dropout, seeds in sorted(by_dropout.items()):
            own = f", dropout {dropout:g}" if "-dropout" in seeds[0]["name"] else ""
            row = {"label": network + own, "network": network, "kind": seeds[0]["kind"]}
            row["runs"] = {str(run["config"]["seed"]): run["name"] for run in seeds}
            row["validation_accuracy"] = mean(run["best"]["validation_accuracy"] for run in seeds)
            row["trained_parameters"] = seeds[0]["model"]["trainable_parameters"]
            row["seconds"] = mean(run["seconds"] for run in seeds)
            rows.append(row)
    return rows


def questions(rows):
    """Pairs of rows whose difference answers a question, the one that claims more first."""
    simplest = {}  # of each network: the row without dropout, which comes first
    pairs = [(row, simplest.setdefault(row["network"], row)) for row in rows]
    for network, row in simplest.items():
        simpler = "plain" if row["kind"] == "scratch" else f"{network.split('-last')[0]}-fc"
        pairs.append((row, simplest.get(simpler, row)))
    best = {row["kind"]: row for row in sorted(rows, key=lambda row: row["validation_accuracy"])}
    pairs.append((best.get("finetune"), best.get("scratch")))
    return [(a, b) for a, b in pairs if a and b and a is not b]


def summarise(arguments, device):
    """Measure every chosen model on the test split, compare them, write summary.json."""
    rows, right, comparisons = chosen_models(arguments.output), {}, []
    for row in rows:
        for name in row["runs"].values():
            predictions = evaluate_run(name, "test", arguments, device)["predictions"]
            right[name] = [guess["label"] == guess["predicted"] for guess in predictions]
        row["test_accuracy"] = float(np.mean([right[name] for name in row["runs"].values()]))
        row["test_interval_95"] = wilson_interval(row["test_accuracy"], len(predictions))
    for a, b in questions(rows):
        shared = [seed for seed in a["runs"] if seed in b["runs"]]
        first, second = ([right[row["runs"][seed]] for seed in shared] for row in (a, b))
        gain = difference(np.array(first), np.array(second))
        comparisons.append({"a": a["label"], "b": b["label"], **gain})
    summary = {"models": rows, "comparisons": comparisons}
    engine.write_json(f"{arguments.output}/summary.json", summary)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    engine.add_place_flags(parser)
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    what("--chosen", action="store_true", help="the best of each network, on test, compared")
    what("--run", nargs="+", metavar="NAME", help="finished runs, on --split")
    what("--best", action="store_true", help="the best model by validation, on --image")
    what("--settings", metavar="NETWORK", help="print the flags that its grid chose")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--image", nargs="+", metavar="PATH", help="photos or folders of photos")
    arguments = parser.parse_args(argv)
    device = engine.pick_device(arguments.device)
    if arguments.settings:
        rate, batch_size = choose(of_networks(arguments.output)[arguments.settings])
        print(f"--learning-rate {rate} --batch-size {batch_size}")
    elif arguments.chosen:
        summarise(arguments, device)
    elif arguments.best:
        best = max(chosen_models(arguments.output), key=lambda row: row["validation_accuracy"])
        classify([*best["runs"].values()][0], arguments.image or [], arguments.output, device)
    else:
        for name in arguments.run:
            evaluate_run(name, arguments.split, arguments, device)


if __name__ == "__main__":
    main()
