"""Choose the best runs by validation, measure them on the test split, compare them.

    python evaluate.py --chosen --data food11            the whole study: writes summary.json
    python evaluate.py --run NAME --split validation     one run
    python evaluate.py --best --image lunch.jpg photos/  top 3 classes of any photos

Writes results/evaluations/NAME.SPLIT.json for each run measured. The only script that shows test
photos to a network; what is chosen is chosen before that, by validation accuracy.
"""

import functools
import hashlib
import io
import itertools
import math
from pathlib import Path
from statistics import mean

from common import Parser, add_place_flags, read_json, read_runs, run_name, write_json

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import engine
import models

METRICS_FORMAT = 2  # raise it when an evaluation says more, so that old ones are made again
SIZE_FLAGS = ("train_photos", "seed")  # what a chosen model's runs on fewer photos differ in
CASE_FLAGS = ("learning_rate", "batch_size", "seed")  # what runs of one case of a backbone do


# ---------------------------------------------------------------------------------------------
# Metrics


def confusion_matrix(labels, predicted, classes):
    """int [classes, classes]: rows are true classes, columns predicted ones; int [N] each."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


def metrics(labels, probabilities, classes):
    """Accuracy with its 95% Wilson interval, top-3 accuracy, confusion matrix, and precision,
    recall and F1 of each class.

    labels: int [N]; probabilities: float [N, classes]; classes: names. A ratio with nothing below
    the line is 0.
    """
    predicted = probabilities.argmax(1)
    matrix = confusion_matrix(labels, predicted, len(classes))
    hits, accuracy = np.diag(matrix), float((labels == predicted).mean())
    best_three = np.argsort(-probabilities, axis=1, kind="stable")[:, :3]

    def ratio(above, below):
        return np.divide(above, below, out=np.zeros(len(classes)), where=below > 0)

    precision, recall = ratio(hits, matrix.sum(0)), ratio(hits, matrix.sum(1))
    f1 = ratio(2 * precision * recall, precision + recall)
    return {
        "accuracy": accuracy,
        "interval_95": list(wilson_interval(accuracy, len(labels))),
        "top3_accuracy": float((best_three == labels[:, None]).any(axis=1).mean()),
        "confusion_matrix": matrix.tolist(),
        "per_class": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(matrix[i].sum()),
            }
            for i, name in enumerate(classes)
        },
    }


def wilson_interval(accuracy, total):
    """95% interval (low, high) of an accuracy (fraction) measured on `total` photos.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    z = 1.959964
    center = (accuracy + z * z / (2 * total)) / (1 + z * z / total)
    spread = math.sqrt(accuracy * (1 - accuracy) / total + z * z / (4 * total * total))
    half = z * spread / (1 + z * z / total)
    # Rounding must not put the accuracy outside.
    return max(0.0, min(accuracy, center - half)), min(1.0, max(accuracy, center + half))


def mcnemar(first, second):
    """Exact McNemar test on the same photos: (difference, interval_95, p_value).

    first, second: bool [N], whether each photo was classified right. difference: accuracy of
    `first` minus that of `second`; p_value: two-sided, binomial. McNemar, "Note on the sampling
    error of the difference between correlated proportions or percentages", Psychometrika 1947.
    The interval is Clopper and Pearson's (Biometrika 1934) for the share of gains among the photos
    that only one of them got right: it excludes zero exactly where p_value < 0.05.
    """
    gains, losses = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = gains + losses
    tail = binomial_tail(min(gains, losses), discordant, 0.5)
    high, low = largest_share(gains, discordant), 1 - largest_share(losses, discordant)
    interval = [(2 * share - 1) * discordant / len(first) for share in (low, high)]
    return (gains - losses) / len(first), interval, min(1.0, 2 * tail)


def binomial_tail(count, total, share):
    """Probability of `count` or fewer successes in `total` trials that each succeed with `share`.

    share: above 0 and below 1. By logarithms: powers of it would underflow.
    """
    probability = 0.0
    for k in range(count + 1):
        ways = math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
        probability += math.exp(ways + k * math.log(share) + (total - k) * math.log(1 - share))
    return probability


def largest_share(count, total):
    """The share for which `count` or fewer of `total` have a probability of 2.5%, by bisection."""
    if count == total:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        if binomial_tail(count, total, share) > 0.025:
            low = share
        else:
            high = share
    return share


def student_t(freedom):
    """Student's t: float [N] values t, rising, and float [N] the probabilities of |T| beyond them.

    freedom: at least 1. T is sqrt(freedom) tan(angle) for an angle whose density is proportional to
    cos(angle) ** (freedom - 1).
    """
    angle = (np.arange(100_000) + 0.5) / 100_000 * np.pi / 2
    density = np.cos(angle) ** (freedom - 1)
    beyond = density[::-1].cumsum()[::-1] / density.sum()
    return freedom**0.5 * np.tan(angle), beyond


def paired_difference(first, second):
    """Compare two models on the same photos with the same seeds -> a dict for the JSON.

    first, second: bool [seeds, photos], whether each photo was classified right. With one seed the
    exact McNemar test: it holds for other photos, but for these two runs only. With several the
    mean over seeds of each photo is compared, and the interval holds for other photos and other
    seeds: variance of both, as of two crossed random effects; Student's t with the degrees of
    freedom of Satterthwaite (Biometrics Bulletin 1946), few where it is the seeds that differ.
    """
    seeds, photos = first.shape
    if seeds == 1:
        method = "exact McNemar test of one run each"
        difference, interval, p_value = mcnemar(first[0], second[0])
    else:
        method = f"over photos and {seeds} seeds"
        differences = first.astype(float) - second  # of each photo with each seed: -1, 0 or 1
        difference = float(differences.mean())
        by_photo, by_seed = differences.mean(0), differences.mean(1)
        interaction = differences - by_photo - by_seed[:, None] + difference
        freedom_of_both = (seeds - 1) * (photos - 1)
        of_photos, of_seeds = by_photo.var(ddof=1) / photos, by_seed.var(ddof=1) / seeds
        of_both = (interaction**2).sum() / freedom_of_both / (seeds * photos)
        # The interaction's part is in both of the others, so it is taken off once.
        variance = float(max(of_photos, of_seeds, of_photos + of_seeds - of_both))
        if variance == 0:  # the same difference on every photo with every seed
            half, p_value = 0.0, 1.0 if difference == 0 else 0.0
        else:
            terms = of_photos**2 / (photos - 1) + of_seeds**2 / (seeds - 1)
            terms += of_both**2 / freedom_of_both
            t, beyond = student_t(max(1.0, variance**2 / terms))
            standard_error = variance**0.5
            half = standard_error * float(np.interp(0.05, beyond[::-1], t[::-1]))
            p_value = min(1.0, float(np.interp(abs(difference) / standard_error, t, beyond)))
        interval = [difference - half, difference + half]
    return {
        "difference": difference,
        "interval_95": interval,
        "p_value": p_value,
        "different": p_value < 0.05,
        "method": method,
    }


# ---------------------------------------------------------------------------------------------
# Networks


def load_model(output, name, device):
    """Return (model in eval mode on `device`, checkpoint) of a finished run.

    The bytes must be those whose digest stands in the run's JSON.
    """
    run = read_json(Path(output, "runs", f"{name}.json"), "checkpoint_sha256")
    if "failed" in run:
        raise SystemExit(f"{name} has failed, {run['failed']}: it has no weights.")
    path = engine.checkpoint_file(output, name)
    if not path.is_file():
        raise SystemExit(f"no checkpoint {path}: copy it there, or train the run again.")
    content = path.read_bytes()
    damaged = f"{path} is damaged, or of another models.py: delete it and train again."
    if run["checkpoint_sha256"] != hashlib.sha256(content).hexdigest():
        raise SystemExit(damaged)
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        config, classes = checkpoint["config"], checkpoint["classes"]
        if checkpoint["kind"] == "scratch":
            model = models.SCRATCH[config["model"]](len(classes), config["dropout"])
        else:
            model = models.build_backbone(config["backbone"], len(classes), "none")
        model.load_state_dict(checkpoint["state"])
    except Exception:  # a file of another version makes torch raise anything
        raise SystemExit(damaged) from None
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint


@torch.no_grad()
def predict(model, images, context, flip=False):
    """Class probabilities float32 [B, classes] of normalised photos float32 [B, 3, H, W].

    flip: mean of the probabilities of each photo and of its mirror image.
    """
    with context:
        logits = model(images)
    probabilities = logits.float().softmax(1)
    if flip:
        probabilities = (probabilities + predict(model, images.flip(3), context)) / 2
    return probabilities


def activation_maps(model, images, context):
    """Where `model` sees its predicted class: float32 [B, h, w] in 0..1, at the last convolution.

    images: normalised photos float32 [B, 3, H, W]. Selvaraju et al., "Grad-CAM", ICCV 2017, but
    minus the mean over the photo, so that a channel that is bright everywhere does not count.
    """
    outputs = []

    def keep(_module, _inputs, output):
        outputs.append(output if output.requires_grad else output.requires_grad_())

    *_, last = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    hook = last.register_forward_hook(keep)
    with torch.enable_grad(), context:
        logits = model(images).float()
    hook.remove()
    [gradient] = torch.autograd.grad(logits.amax(1).sum(), outputs)
    weights = gradient.float().mean((2, 3), keepdim=True)
    features = outputs[0].detach().float()
    features = features - features.mean((2, 3), keepdim=True)
    maps = F.relu((weights * features).sum(1))
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)


def examples(labels, predicted, confidence):
    """Indices of the most confident right photos, then wrong ones: 6 each, of 6 classes."""
    chosen = []
    for right in (True, False):
        seen = set()
        for i in confidence.argsort()[::-1].tolist():
            if (labels[i] == predicted[i]) == right and labels[i] not in seen and len(seen) < 6:
                seen.add(labels[i])
                chosen.append(i)
    return chosen


@functools.cache
def is_of(fingerprint, directory, image_size, cache):
    """Whether a run with this fingerprint in its JSON has seen the photos of a data folder."""
    train, validation = fingerprint.split("-")
    for name, seen in (("validation", validation), ("train", train)):  # the smaller one first
        if data.load_split(directory, name, image_size, cache).fingerprint[:16] != seen:
            return False
    return True


def evaluate_run(name, split_name, arguments, device):
    """Evaluate one run on a split and write its JSON, unless that is there and still true."""
    path = Path(arguments.output, "runs", f"{name}.json")
    run = read_json(path, "config", "data", "checkpoint_sha256")
    size, cache = run["config"]["image_size"], arguments.cache
    split = data.load_split(arguments.data, split_name, size, cache)
    ending = f"{split_name}-flip" if arguments.flip else split_name
    if not is_of(run["data"]["fingerprint"], arguments.data, size, cache):
        if not arguments.other_photos:
            raise SystemExit(
                f"{name} was trained on other photos than those in {arguments.data}. Give that "
                "folder with --data, or --other-photos to measure it on these."
            )
        ending += f"-{split.fingerprint[:8]}"  # the evaluation on its own photos stays
    evaluation_path = Path(arguments.output, "evaluations", f"{name}.{ending}.json")
    of_what = {
        "checkpoint_sha256": run["checkpoint_sha256"],
        "photos": split.fingerprint,
        "format": METRICS_FORMAT,
    }
    if evaluation_path.exists():
        stored = read_json(evaluation_path)
        if all(stored.get(key) == value for key, value in of_what.items()):
            return stored
    model, checkpoint = load_model(arguments.output, name, device)
    classes = checkpoint["classes"]
    if split.classes != classes:
        raise SystemExit(
            f"{name} was trained on the classes {', '.join(classes)}; {arguments.data} has others."
        )
    context = engine.autocast(device, run["config"]["precision"])
    loader = data.Loader(split, engine.EVALUATION_BATCH, device)
    batches = [predict(model, images, context, arguments.flip) for images, _ in loader]
    probabilities, labels = torch.cat(batches).cpu().numpy(), split.labels.numpy()
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    shown = examples(labels, predicted, confidence)
    maps = activation_maps(model, data.normalise(split.images[shown].to(device)), context).tolist()
    evaluation = {
        "name": name,
        "split": split_name,
        "flip": arguments.flip,
        **of_what,
        "classes": classes,
        **metrics(labels, probabilities, classes),
        "predictions": [
            {"file": file, "label": int(label), "predicted": int(guess), "probability": float(p)}
            for file, label, guess, p in zip(
                split.files, labels, predicted, confidence, strict=True
            )
        ],
        "activation_maps": [
            {"photo": i, "map": [[round(value, 3) for value in row] for row in rows]}
            for i, rows in zip(shown, maps, strict=True)
        ],
    }
    write_json(evaluation_path, evaluation)
    return evaluation


def classify_photos(name, arguments, device):
    """Print the three most probable classes of each photo in arguments.image, files or folders.

    Returns how many of these could not be read.
    """
    model, checkpoint = load_model(arguments.output, name, device)
    config, classes, unread = checkpoint["config"], checkpoint["classes"], 0
    context = engine.autocast(device, config["precision"])
    print(f"{name}:")
    for place in map(Path, arguments.image):
        files = [place]
        if place.is_dir():
            files = [path for path in sorted(place.rglob("*")) if data.has_photo_name(path)]
        if not files:
            print(f"{place}: no photos in it")
            unread += 1
        for file in files:
            try:
                pixels, _ = data.decode(file, config["image_size"])
            except OSError as error:
                print(f"{file}: not a readable photo ({error})")
                unread += 1
                continue
            image = data.normalise(torch.tensor(pixels)[None].to(device))
            row = predict(model, image, context, arguments.flip)[0].cpu()
            order = row.argsort(descending=True)[:3].tolist()
            print(f"{file}: {', '.join(f'{classes[i]} {row[i]:.1%}' for i in order)}")
    return unread


# ---------------------------------------------------------------------------------------------
# The study: what was chosen, and how it compares


def label_of(config):
    """What a chosen model is called in every table and figure."""
    if "model" in config:
        dropout = f" (dropout {config['dropout']:g})" if config["dropout"] else ""
        return f"{config['model']} CNN{dropout}"
    count = config["unfreeze_convolutions"]
    case = f"last {count} convolutions + FC" if count else "FC only"
    return f"{config['backbone']} ({case})"


def largest_group(runs, vary):
    """The runs that differ in nothing but the flags `vary`; if there are several such groups the
    largest, of equal ones that with the most epochs."""
    groups = {}
    for run in runs:
        groups.setdefault(str(sorted(engine.settings(run["config"], vary).items())), []).append(run)
    return max(groups.values(), key=lambda group: (len(group), group[0]["config"]["epochs"]))


def table_line(run, chosen):
    """One line of the tables `grid`, `dropout` and `transfer` of summary.json."""
    config, best = run["config"], run["best"] or {}
    line = {
        "run": run["name"],
        "model": run["model"]["name"],
        "learning_rate": config["learning_rate"],
        "batch_size": config["batch_size"],
        "dropout": config["dropout"],
        "seed": config["seed"],
        "epoch": best.get("epoch"),
        "validation_accuracy": best.get("validation_accuracy"),
        "validation_loss": best.get("validation_loss"),
        "seconds": run["seconds"],
        "chosen": chosen,
    }
    if "unfreeze_convolutions" in config:
        line["unfreeze_convolutions"] = config["unfreeze_convolutions"]
    return line


def spread(values):
    """Standard deviation over seeds; None for a single seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def model_row(runs, choosing, output):
    """One chosen model over its seeds: accuracies with intervals, gap, cost.

    choosing: the seeds whose runs decided the choice. The mean over the others, `fresh`, is free of
    the optimism of that. Only the test accuracy has an interval: the validation photos have chosen
    what they measure. `seconds` are of the fastest run, which had its processor most to itself.
    """
    seeds = [run["config"]["seed"] for run in runs]
    validation = [run["best"]["validation_accuracy"] for run in runs]
    evaluations = [read_evaluation(output, run["name"]) for run in runs]
    measured = all(  # and not trained anew since
        evaluation and evaluation["checkpoint_sha256"] == run["checkpoint_sha256"]
        for run, evaluation in zip(runs, evaluations, strict=True)
    )
    row = {
        "label": label_of(runs[0]["config"]),
        "kind": runs[0]["kind"],
        "runs": [run["name"] for run in runs],
        "seeds": seeds,
        "validation_accuracy": mean(validation),
        "validation_spread": spread(validation),
        "test_accuracy": None,
        "test_spread": None,
        "test_interval_95": None,
        "gap": None,
        "fresh_seeds": [seed for seed in seeds if seed not in choosing],
        "fresh_validation_accuracy": None,
        "fresh_test_accuracy": None,
        "parameters": runs[0]["model"]["parameters"],
        "trainable_parameters": runs[0]["model"]["trainable_parameters"],
        "seconds": min(run["seconds"] for run in runs),
    }
    fresh = [seeds.index(seed) for seed in row["fresh_seeds"]]
    if fresh:
        row["fresh_validation_accuracy"] = mean(validation[i] for i in fresh)
    if measured:
        test = [evaluation["accuracy"] for evaluation in evaluations]
        row["test_accuracy"], row["test_spread"] = mean(test), spread(test)
        test_photos = len(evaluations[0]["predictions"])
        row["test_interval_95"] = list(wilson_interval(mean(test), test_photos))
        row["gap"] = mean(validation) - mean(test)
        if fresh:
            row["fresh_test_accuracy"] = mean(test[i] for i in fresh)
    return row


def read_evaluation(output, name, split="test"):
    """The content of an evaluation's JSON, or None if it has not been made, or by other code."""
    path = Path(output, "evaluations", f"{name}.{split}.json")
    evaluation = read_json(path, "accuracy", "predictions") if path.exists() else {}
    return evaluation if evaluation.get("format") == METRICS_FORMAT else None


def right_photos(evaluation):
    """Whether each photo of an evaluation was classified right: bool [photos].

    Evaluations of the same `photos`, their fingerprint, have them in the same order.
    """
    predictions = evaluation["predictions"]
    return np.array([photo["label"] == photo["predicted"] for photo in predictions])


def compare(rows, output):
    """Paired comparisons of all rows measured on the same test photos, on the seeds they share."""
    comparisons = []
    measured = [row for row in rows if row["test_accuracy"] is not None]
    right, photos = {}, {}
    for row in measured:
        for name, seed in zip(row["runs"], row["seeds"], strict=True):
            evaluation = read_evaluation(output, name)
            right[row["label"], seed] = right_photos(evaluation)
            photos[row["label"], seed] = evaluation["photos"]
    for a, b in itertools.combinations(measured, 2):
        seeds = [seed for seed in a["seeds"] if seed in b["seeds"]]
        if seeds and len({photos[row["label"], seed] for row in (a, b) for seed in seeds}) == 1:
            first = np.array([right[a["label"], seed] for seed in seeds])
            second = np.array([right[b["label"], seed] for seed in seeds])
            line = {"a": a["label"], "b": b["label"], **paired_difference(first, second)}
            comparisons.append(line)
    return comparisons


def at_setting(runs, setting):
    """The runs that have not failed, of one (learning rate, batch size)."""
    return [run for run in runs if run["best"] and engine.setting_of(run) == setting]


def add_scratch(summary, name, runs, output):
    """Add one network from scratch: its grid, what was chosen, and that with dropout.

    Runs of seeds that only repeat what was chosen are no part of the grid.
    """
    grid = [run for run in runs if run["config"]["dropout"] == 0]
    if not grid:
        return
    setting, choosing = engine.best_setting(grid), engine.choosing_seeds(grid)
    chosen, with_dropout = at_setting(grid, setting), at_setting(runs, setting)
    summary["grid"] += [
        table_line(run, run in chosen) for run in grid if run["config"]["seed"] in choosing
    ]
    if not chosen:  # all of them failed
        return
    summary["choices"][name] = [table_line(run, True) for run in chosen]
    summary["dropout"] += [table_line(run, run in chosen) for run in with_dropout]
    for dropout in sorted({run["config"]["dropout"] for run in with_dropout}):
        seeds = [run for run in with_dropout if run["config"]["dropout"] == dropout]
        summary["models"].append(model_row(seeds, choosing, output))


def add_transfer(summary, runs, output):
    """Add one case of one backbone: every learning rate, and what was chosen."""
    chosen = at_setting(runs, engine.best_setting(runs))
    summary["transfer"] += [table_line(run, run in chosen) for run in runs]
    if chosen:
        summary["models"].append(model_row(chosen, engine.choosing_seeds(runs), output))


def add_sizes(summary, runs, study, output):
    """Add the runs with --train-photos, and the slope of each network over its numbers of photos.

    They are those that differ from a chosen model, which is the largest size, in nothing else.
    """
    run_of = {run["name"]: run for run in study}
    for model in summary["models"]:
        label, rows = model["label"], []
        on_all = [run_of[name] for name in model["runs"]]
        same = engine.settings(on_all[0]["config"], SIZE_FLAGS)
        on_fewer = [run for run in runs if engine.settings(run["config"], SIZE_FLAGS) == same]
        if not on_fewer:
            continue
        seed = on_fewer[0]["config"]["seed"]
        for run in on_fewer + on_all:
            if run["config"]["seed"] != seed:
                continue
            classes = run["data"]["counts"]["train"]
            size = sum(classes.values()) / len(classes)
            if run["best"] is not None and size not in [r["photos_per_class"] for r in rows]:
                rows.append({"photos_per_class": size, **model_row([run], [seed], output)})
        rows.sort(key=lambda row: row["photos_per_class"])
        summary["sizes"] += rows
        measured = [row for row in rows if row["test_accuracy"] is not None]
        evaluations = [read_evaluation(output, row["runs"][0]) for row in measured]
        test_photos = {evaluation["photos"] for evaluation in evaluations}
        if len(measured) == len(rows) > 1 and len(test_photos) == 1:
            sizes = np.array([row["photos_per_class"] for row in rows])
            right = np.array([right_photos(evaluation) for evaluation in evaluations])
            summary["slopes"].append({"label": label, **slope_per_doubling(sizes, right)})


def slope_per_doubling(sizes, right, draws=2000):
    """Least-squares slope of accuracy over log2 of the number of training photos.

    sizes: float [sizes], photos per class; right: bool [sizes, test photos]. Returns slope and
    interval_95, a percentile bootstrap over test photos, the same ones at all sizes. It holds for
    other test photos, not for other seeds or training photos. Efron, Annals of Statistics 1979.
    """
    x = np.log2(sizes) - np.log2(sizes).mean()
    of_photo = x @ right / (x @ x)  # each photo's part of the slope
    random = np.random.default_rng(0)
    resampled = [random.choice(of_photo, len(of_photo)).mean() for _ in range(draws)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"slope": float(of_photo.mean()), "interval_95": [float(low), float(high)]}


def summarise(output, directory=None, cache=None):
    """Build summary.json, but for the comparisons, from the runs and evaluations in `output`.

    A study is the runs on the same photos, of each network those that differ only in what is tuned,
    one for each combination of settings. The photos are those of the data folder `directory`; if it
    is None, or no run is of them, those of the most runs. cache: of decoded photos.
    """
    runs = list(read_runs(output).values())
    if not runs:
        raise SystemExit(f"{output}/runs holds no finished run: train one first.")
    fingerprints = [run["data"]["fingerprint"] for run in runs]
    fingerprint = max(sorted(set(fingerprints)), key=fingerprints.count)
    if directory is not None:
        size = min(run["config"]["image_size"] for run in runs)  # fingerprints know no size
        for known in set(fingerprints):
            if is_of(known, directory, size, cache):
                fingerprint = known
    study, known = [], []
    for run in runs:
        run_settings = engine.settings(run["config"])
        if run["data"]["fingerprint"] == fingerprint and run_settings not in known:
            study.append(run)
            known.append(run_settings)  # the same again under another --name is no other seed
    study.sort(key=lambda run: (run["config"]["dropout"], run["config"]["seed"], run["name"]))
    scratch, transfer, sizes = {}, {}, []
    for run in study:
        name = run["model"]["name"]
        if run["config"]["train_photos"]:
            sizes.append(run)
        elif run["kind"] == "scratch":
            scratch.setdefault(name, []).append(run)
        else:
            case = run["config"]["unfreeze_convolutions"], name
            transfer.setdefault(case, []).append(run)
    summary = {
        "grid": [],
        "choices": {},
        "dropout": [],
        "transfer": [],
        "models": [],
        "sizes": [],
        "slopes": [],
    }
    for name, members in sorted(scratch.items()):
        add_scratch(summary, name, largest_group(members, engine.PLURAL_FLAGS), output)
    for _case, members in sorted(transfer.items()):
        add_transfer(summary, largest_group(members, CASE_FLAGS), output)
    add_sizes(summary, sizes, study, output)
    summary["failed"] = [
        {"run": run["name"], "reason": run["failed"]} for run in study if "failed" in run
    ]
    lines = summary["grid"] + summary["dropout"] + summary["transfer"] + summary["failed"]
    named = {line["run"] for line in lines} | {row["runs"][0] for row in summary["sizes"]}
    summary["left_out"] = [run["name"] for run in runs if run["name"] not in named]
    return summary


def format_accuracy(row, split):
    """Accuracy of a row of the summary's `models` on a split, its spread over seeds, interval."""
    if row[f"{split}_accuracy"] is None:
        return "not evaluated"
    text, deviation = f"{row[f'{split}_accuracy']:.1%}", row[f"{split}_spread"]
    if deviation is not None:
        text += f" ± {100 * deviation:.1f}"
    if split == "test":
        low, high = row["test_interval_95"]
        text += f" [{low:.1%}, {high:.1%}]"
    return text


def print_summary(summary):
    """The chosen models as a table, then what failed or does not belong to the study."""
    width = max(len(row["label"]) for row in summary["models"])
    head = f"{'chosen model':{width}}  {'validation':13}  {'test [95%]':30}"
    print(f"{head}  gap   fresh seeds")
    for row in summary["models"]:
        gap = "" if row["gap"] is None else f"{100 * row['gap']:+.1f}"
        validation, test = format_accuracy(row, "validation"), format_accuracy(row, "test")
        mean_of_fresh = row["fresh_test_accuracy"]
        fresh = "" if mean_of_fresh is None else f"{mean_of_fresh:.1%}"
        print(f"{row['label']:{width}}  {validation:13}  {test:30}  {gap:5} {fresh}".rstrip())
    for failure in summary["failed"]:
        print(f"failed: {failure['run']}, {failure['reason']}")
    if summary["left_out"]:
        print(f"left out, of no part in the study: {', '.join(summary['left_out'])}")


def main(argv=None):
    parser = Parser(__doc__)
    add_place_flags(parser)
    flag = parser.add_argument
    flag("--run", type=run_name, nargs="+", default=[], metavar="NAME", help="finished runs")
    flag("--best", action="store_true", help="the best model by validation, its first seed")
    flag("--chosen", action="store_true", help="the best of each network; writes summary.json")
    flag("--split", choices=("validation", "test"), help="default: validation; test with --chosen")
    flag("--flip", action="store_true", help="average over photo and mirror image")
    flag("--image", nargs="+", metavar="PATH", help="photos or folders of photos to classify")
    flag("--other-photos", action="store_true", help="also photos that the run does not know")
    arguments = parser.parse_args(argv)
    if arguments.chosen and (arguments.flip or arguments.other_photos):
        parser.error("--chosen measures without --flip and --other-photos; name runs with --run")
    names, split = list(arguments.run), arguments.split or "validation"
    if arguments.best or arguments.chosen:
        directory = None if arguments.image else arguments.data  # other photos need no study's
        summary = summarise(arguments.output, directory, arguments.cache)
        rows, sizes = summary["models"], summary["sizes"]
        if not rows:
            what = "no run without dropout, on all photos, that has not failed"
            raise SystemExit(f"{arguments.output}/runs: {what}.")
    if arguments.best:
        names.append(max(rows, key=lambda row: row["validation_accuracy"])["runs"][0])
    if arguments.chosen:
        split = arguments.split or "test"
        names += [name for row in rows + sizes for name in row["runs"]]
    if not names:
        parser.error("name runs with --run, or give --best or --chosen")
    stored = sorted(path.stem for path in Path(arguments.output, "runs").glob("*.json"))
    for name in arguments.run:
        if name not in stored:
            raise SystemExit(f"--run {name}: {arguments.output}/runs has {', '.join(stored)}.")
    device = engine.pick_device(arguments.device)
    if arguments.image:
        for name in dict.fromkeys(names):
            unread = classify_photos(name, arguments, device)  # the same photos for every model
        if unread:
            raise SystemExit(f"{unread} files could not be read, see above")
        return
    for name in dict.fromkeys(names):
        evaluation = evaluate_run(name, split, arguments, device)
        low, high = evaluation["interval_95"]
        print(
            f"{name}  {split} accuracy {evaluation['accuracy']:.1%} "
            f"(95% interval {low:.1%} to {high:.1%})"
        )
    if arguments.chosen:
        summary = summarise(arguments.output, arguments.data, arguments.cache)
        summary["comparisons"] = compare(summary["models"], arguments.output)
        write_json(Path(arguments.output, "summary.json"), summary)
        print_summary(summary)


if __name__ == "__main__":
    main()
