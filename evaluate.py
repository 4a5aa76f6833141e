"""Measure finished runs on a split. The only script that shows test photos to a network.

    python evaluate.py --run plain-lr0.02-bs64-seed0 --split test
    python evaluate.py --chosen --split test          every run that summary.json names as chosen
    python evaluate.py --run NAME --image lunch.jpg   top 3 classes for any photo

Writes results/evaluations/NAME.SPLIT.json.
"""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import models
import runs
import train_scratch


def confusion_matrix(labels, predicted, classes):
    """int [classes, classes]: rows are true classes, columns predicted ones; int [N] each."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


def metrics(labels, predicted, classes):
    """Accuracy, its 95% Wilson interval, confusion matrix, and precision, recall, F1 by class.

    labels, predicted: int [N]; classes: list of names. A ratio with nothing below the line is 0.
    """
    matrix = confusion_matrix(labels, predicted, len(classes))
    hits, accuracy = np.diag(matrix), float((labels == predicted).mean())

    def ratio(above, below):
        return np.divide(above, below, out=np.zeros(len(classes)), where=below > 0)

    precision, recall = ratio(hits, matrix.sum(0)), ratio(hits, matrix.sum(1))
    f1 = ratio(2 * precision * recall, precision + recall)
    return {
        "accuracy": accuracy,
        "interval_95": list(runs.wilson_interval(accuracy, len(labels))),
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


def load_model(output, name, device):
    """Return (model in eval mode on `device`, checkpoint) of a finished run."""
    path = Path(output, "checkpoints", f"{name}.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config, classes = checkpoint["config"], checkpoint["classes"]
        if checkpoint["kind"] == "scratch":
            model = models.SCRATCH[config["model"]](len(classes))
        else:
            model = models.build_backbone(config["backbone"], len(classes), "none")
        model.load_state_dict(checkpoint["state"])
    except FileNotFoundError:
        known = ", ".join(p.stem for p in sorted(path.parent.glob("*.pt"))) or "none"
        raise SystemExit(f"no checkpoint {path}. Finished runs there: {known}.") from None
    except (RuntimeError, OSError, EOFError, LookupError, TypeError, ValueError, AttributeError,
            pickle.UnpicklingError):  # fmt: skip
        raise SystemExit(
            f"{path} is damaged or of another version. Delete it and train again."
        ) from None
    return model.to(device, memory_format=train_scratch.MEMORY_FORMAT).eval(), checkpoint


@torch.no_grad()
def predict(model, images, context, flip=False):
    """Class probabilities float32 [B, classes] of normalised photos float32 [B, 3, H, W].

    flip: mean of the probabilities of each photo and of its mirror image.
    """
    with context:
        logits = model(images.contiguous(memory_format=train_scratch.MEMORY_FORMAT))
    probabilities = logits.float().nan_to_num().softmax(1)  # a diverged run gives no numbers
    if flip:
        probabilities = (probabilities + predict(model, images.flip(3), context)) / 2
    return probabilities


def activation_maps(model, images, context):
    """Where `model` sees its predicted class: float32 [B, h, w] in 0..1, at the last convolution.

    images: normalised photos float32 [B, 3, H, W]. Selvaraju et al., "Grad-CAM", ICCV 2017, but
    relative to the mean over the photo, since batch norm follows and takes any offset away.
    """
    outputs = []

    def keep(_module, _inputs, output):
        outputs.append(output if output.requires_grad else output.requires_grad_())

    *_, last = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    hook = last.register_forward_hook(keep)
    with torch.enable_grad(), context:
        logits = model(images.contiguous(memory_format=train_scratch.MEMORY_FORMAT)).float()
    hook.remove()
    [gradient] = torch.autograd.grad(logits.amax(1).sum(), outputs)
    weights = gradient.float().mean((2, 3), keepdim=True)
    features = outputs[0].detach().float()
    features = features - features.mean((2, 3), keepdim=True)
    maps = F.relu((weights * features).sum(1)).nan_to_num()
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)


def examples(labels, predicted, probabilities):
    """Indices of the most confident right photos, then wrong ones: 6 each, of 6 classes."""
    chosen = []
    for right in (True, False):
        seen = set()
        for i in probabilities.argsort()[::-1].tolist():
            if (labels[i] == predicted[i]) == right and labels[i] not in seen and len(seen) < 6:
                seen.add(labels[i])
                chosen.append(i)
    return chosen


def evaluate_run(name, arguments, device):
    """Evaluate one run on the split and write its JSON, unless that is there and still true."""
    suffix = "-flip" if arguments.flip else ""
    path = Path(arguments.output, "evaluations", f"{name}.{arguments.split}{suffix}.json")
    checkpoint_file = Path(arguments.output, "checkpoints", f"{name}.pt")
    model, checkpoint = load_model(arguments.output, name, device)
    config, classes = checkpoint["config"], checkpoint["classes"]
    split = data.load_split(arguments.data, arguments.split, config["image_size"], arguments.cache)
    if split.classes != classes:
        raise SystemExit(f"{name} was trained on the classes {', '.join(classes)}; "
                         f"{arguments.data} has others.")  # fmt: skip
    stamp = hashlib.sha256(checkpoint_file.read_bytes()).hexdigest() + split.fingerprint
    if path.exists() and runs.read_json(path).get("stamp") == stamp:
        return runs.read_json(path)
    context = train_scratch.autocast(device, config["precision"])
    loader = data.Loader(split, 64, device)
    batches = [predict(model, images, context, arguments.flip) for images, _ in loader]
    probabilities = torch.cat(batches).cpu().numpy()
    labels, predicted = split.labels.numpy(), probabilities.argmax(1)
    result = {"name": name, "split": arguments.split, "flip": arguments.flip, "stamp": stamp}
    result |= {"classes": classes, **metrics(labels, predicted, classes)}
    columns = split.files, labels, predicted, probabilities.max(1)
    result["predictions"] = [
        {"file": file, "label": int(label), "predicted": int(guess), "probability": float(p)}
        for file, label, guess, p in zip(*columns, strict=True)
    ]
    shown = examples(labels, predicted, probabilities.max(1))
    maps = activation_maps(model, data.normalise(split.images[shown].to(device)), context).tolist()
    result["activation_maps"] = [
        {"photo": i, "map": [[round(value, 3) for value in row] for row in rows]}
        for i, rows in zip(shown, maps, strict=True)
    ]
    runs.write_json(path, result)
    return result


def classify_photos(name, arguments, device):
    """Print the three most probable classes of each photo in arguments.image."""
    model, checkpoint = load_model(arguments.output, name, device)
    config, classes = checkpoint["config"], checkpoint["classes"]
    context = train_scratch.autocast(device, config["precision"])
    for file in arguments.image:
        try:
            pixels, _ = data.decode(file, config["image_size"])
        except OSError as error:
            raise SystemExit(f"{file}: not a readable photo ({error})") from None
        image = data.normalise(torch.tensor(pixels)[None].to(device))
        row = predict(model, image, context, arguments.flip)[0].cpu()
        best = [f"{classes[i]} {row[i]:.1%}" for i in row.argsort(descending=True)[:3].tolist()]
        print(f"{file}: {', '.join(best)}")


def main(argv=None):
    parser = runs.Parser(__doc__)
    runs.add_place_flags(parser)
    parser.add_argument(
        "--run",
        type=runs.run_name_type,
        nargs="+",
        metavar="NAME",
        default=[],
        help="finished runs",
    )
    parser.add_argument("--chosen", action="store_true", help="the runs chosen in summary.json")
    parser.add_argument("--split", choices=("validation", "test"), default="validation",
                        help="of the photos")  # fmt: skip
    parser.add_argument("--flip", action="store_true", help="average over photo and mirror image")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="photos to classify")
    arguments = parser.parse_args(argv)
    names = list(arguments.run)
    if arguments.chosen:
        summary = runs.read_json(Path(arguments.output, "summary.json"), "models")
        names += [name for model in summary["models"] for name in model["runs"]]
    if not names:
        parser.error("name the runs to evaluate with --run, or give --chosen")
    device = train_scratch.pick_device(arguments.device)
    for name in dict.fromkeys(names):
        if arguments.image:
            classify_photos(name, arguments, device)
            continue
        result = evaluate_run(name, arguments, device)
        low, high = result["interval_95"]
        print(f"{name}  {arguments.split} accuracy {result['accuracy']:.1%} "
              f"(95% interval {low:.1%} to {high:.1%})")  # fmt: skip


if __name__ == "__main__":
    runs.run_main(main)
