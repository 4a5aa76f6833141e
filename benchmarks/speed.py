"""How fast is this study? The same training twice in one run: the usual PyTorch loop, and ours.

    python benchmarks/speed.py                                     on made-up photos
    python benchmarks/speed.py --data food11 --rows scratch-96 fc --output speed.json

"standard" is the loop that everybody writes: ImageFolder, torchvision's transforms, a DataLoader
with a worker for every core, AdamW, float32, loss.item() and the whole network in every step.
"ours" is main() of train_scratch.py and finetune.py with their default flags. Network, photos,
batch size, epochs and trained layers are the same. The two take turns, in fresh processes.
"""

import math
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout, suppress
from io import StringIO
from itertools import chain, islice, product
from multiprocessing import get_context, get_start_method, set_start_method
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

__torch_imported__ = time.time()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import finetune
import models
import optimizers
import runs
import train_scratch

SIDES, SIZES = ("standard", "ours"), (64, 96, 128)
TUNE = (finetune, "--backbone", "mobilenet_v2", "--image-size", "224", "--unfreeze-convolutions")
# name: (what is measured, text of the table, our script and its flags)
ROWS = {
    f"scratch-{size}": ("rate", f"scratch, {size} px", train_scratch, "--image-size", str(size))
    for size in SIZES
} | {
    "scratch": ("total", "scratch, 96 px, decoding + {} epochs", train_scratch),
    "fc": ("total", "MobileNetV2, 224 px, FC only, {} epochs", *TUNE, "0"),
    "last2": ("total", "MobileNetV2, 224 px, last 2 conv., {} epochs", *TUNE, "2"),
    "first-start": ("start", "first start to first step, 96 px", train_scratch),
    "second-start": ("start", "second start to first step, 96 px", train_scratch),
}
UNITS = {"rate": "{:,.0f} images/s", "total": "{:,.1f} s", "start": "{:.2f} s"}
LAYOUT = "{:45}{:>16}{:>16}{:>22}{:>14}{:>10}{:>9}"


def now(device):
    """Seconds, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def standard_loaders(config, device):
    """[training DataLoader, validation DataLoader], as everybody has them."""
    from torchvision import datasets, transforms

    size, jitter = config["image_size"], config["jitter"]
    augmentation = [
        transforms.RandomResizedCrop(size, scale=(config["crop_scale"], 1)),
        transforms.RandomHorizontalFlip(config["flip"]),
        transforms.ColorJitter(jitter, jitter, jitter),
    ]
    if config["rotation"]:
        augmentation.append(transforms.RandomRotation(config["rotation"]))
    plain, loaders = [transforms.Resize(size), transforms.CenterCrop(size)], []
    normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for split, steps in (("train", augmentation), ("validation", plain)):
        transform = transforms.Compose([*steps, transforms.ToTensor(), normalise])
        dataset = datasets.ImageFolder(Path(config["data"], split), transform)
        loaders.append(torch.utils.data.DataLoader(
            dataset, config["batch_size"], shuffle=split == "train", num_workers=runs.cpu_count(),
            pin_memory=device.type == "cuda", persistent_workers=True
        ))  # fmt: skip
    return loaders


def standard_epoch(model, batches, device, optimizer=None):
    """One epoch of training, or of validation without an optimizer; returns the sum of losses."""
    model.train(optimizer is not None)
    running_loss = 0.0
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        with torch.set_grad_enabled(optimizer is not None):
            loss = F.cross_entropy(model(images), labels)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        running_loss += loss.item()
    return running_loss


def measure_standard(script, flags, device, epochs, max_steps):
    """The standard loop, all of it -> seconds of set-up, of whole epochs' training, validation."""
    config, begin = vars(script.build_parser().parse_args(flags)), now(device)
    train_loader, validation_loader = standard_loaders(config, device)
    classes, dropout = len(train_loader.dataset.classes), config["dropout"]
    if script is finetune:  # torchvision's network, frozen but for the last layers
        wanted = config["weights"], config["unfreeze_convolutions"], dropout
        model = models.build_backbone(config["backbone"], classes, *wanted)
    else:
        model = models.SCRATCH[config["model"]](classes, dropout)
    model.to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.001)
    steps, training, validation = min(len(train_loader), max_steps or math.inf), [], []
    phases = (train_loader, optimizer, steps, training), (validation_loader, None, None, validation)
    for epoch, (loader, chosen, limit, seconds) in product(range(epochs), phases):
        start, batches = now(device), iter(loader)
        batches = chain([next(batches)], batches)
        start = start if epoch else now(device)  # the workers start once, not in every epoch
        standard_epoch(model, islice(batches, limit), device, chosen)
        seconds.append(now(device) - start)
    share, setup = steps / len(train_loader), now(device) - begin - sum(training + validation)
    return {"setup": setup, "training": [seconds / share for seconds in training],
            "validation": validation, "measured": epochs * share}  # fmt: skip


def measure_ours(script, flags, device, epochs, _):
    """The same of main() of our script, and its best validation accuracy."""
    validate, begin, validation = train_scratch.validate, now(device), []

    def timed_validate(*arguments):
        start = now(device)
        result = validate(*arguments)
        validation.append(now(device) - start)
        return result

    train_scratch.validate = timed_validate
    with TemporaryDirectory() as output:
        script.main([*flags, "--output", output, "--epochs", str(epochs)])
        elapsed, [run] = now(device) - begin, runs.read_runs(output).values()
    seconds = [entry["seconds"] for entry in run["history"]]
    training = [a - b for a, b in zip(seconds, validation, strict=True)]
    return {"setup": elapsed - sum(seconds), "training": training, "validation": validation,
            "measured": epochs, "accuracy": run["best"]["validation_accuracy"]}  # fmt: skip


def measure(name, side, arguments, places, launched):
    """One measurement of one side of a row -> dict for the JSON; memory in MiB."""
    kind, _, script, *flags = ROWS[name]
    device = train_scratch.pick_device(arguments["device"])
    set_start_method(arguments["workers"], force=True)  # not spawn, as this process was
    result = {"import_torch": __torch_imported__ - launched}

    def stop(step, optimizer):
        step(optimizer)
        now(device)
        result["value"] = time.time() - __torch_imported__
        raise TimeoutError

    if kind == "start":  # AdamW is the last to step, in ours after Muon
        for optimizer in (torch.optim.AdamW, optimizers.AdamW):
            optimizer.step = lambda self, step=optimizer.step: stop(step, self)
    elif side == "standard" or script is finetune:  # the clock is to start after the imports
        import torchvision  # noqa: F401
    most, epochs = None, arguments["epochs"]
    if kind == "rate":
        epochs = 1 + arguments["rate_epochs"]  # the first to warm up
    elif side == "standard":
        most = arguments["max_steps"]
        epochs = 1 if most else min(epochs, arguments["standard_epochs"])
    elif script is train_scratch:
        epochs = min(epochs, arguments["our_epochs"])
    with TemporaryDirectory(dir=places) as new, suppress(TimeoutError), redirect_stdout(StringIO()):
        cache = new if kind == "total" or name == "first-start" else f"{places}/decoded"
        flags += ["--data", arguments["data"], "--cache", cache, "--device", str(device)]
        flags += ["--weights", arguments["weights"]] if script is finetune else []
        function = {"standard": measure_standard, "ours": measure_ours}[side]
        result |= function(script, flags, device, epochs, most)
        if kind == "rate":
            result["value"] = arguments["photos"]["train"] / mean(result["training"][1:])
        else:
            seconds = list(map(sum, zip(result["training"], result["validation"], strict=True)))
            rest = (arguments["epochs"] - epochs) * mean(seconds[1:] or seconds)
            result["value"] = result["setup"] + sum(seconds) + rest
    unit = 2**20 if sys.platform == "darwin" else 2**10
    for key, who in (("", resource.RUSAGE_SELF), ("worker_", resource.RUSAGE_CHILDREN)):
        result[f"{key}memory"] = resource.getrusage(who).ru_maxrss / unit
    result["device_memory"] = torch.cuda.max_memory_reserved() / 2**20  # 0 without a GPU
    return result | (ceiling(device, int(flags[1])) if kind == "rate" else {})


def ceiling(device, image_size):
    """bfloat16 operations a second of a large matrix product; operations to train one image."""
    best = 0.0
    for side in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192, 16384):
        a, b = torch.randn(2, side, side, device=device).bfloat16()
        c, begin = a @ b, now(device)
        while time.perf_counter() - begin < 0.3:
            start = now(device)
            torch.mm(a, b, out=c)
            best = max(best, 2 * side**3 / (now(device) - start))
    # Each weight once a pixel; forward, and backward to the inputs and to the weights.
    work = [6 * math.prod(layer["output"][1:]) * layer["parameters"]
            for layer in models.describe(models.PlainCNN(11), image_size)
            if layer["type"] in ("Conv2d", "Linear")]  # fmt: skip
    return {"ceiling": best, "operations": sum(work)}


def prepare(arguments, places):
    """Draw the photos if none are given, fetch the weights, decode -> dict of what is here."""
    photos = arguments["data"] or f"{places}/photos"
    if not arguments["data"]:
        from tools import demo

        demo.draw_demo(Path(photos), size=256)  # about the size of Food-11's
    about = train_scratch.environment(train_scratch.pick_device(arguments["device"]))
    counts = {split: len(files) for split, files in data.list_photos(photos)[1].items()}
    if {"fc", "last2"} & set(arguments["rows"]):
        models.load_torchvision("mobilenet_v2", arguments["weights"])
    for size, split in product(SIZES, ("train", "validation")):
        data.load_split(photos, split, size, f"{places}/decoded")
    return {"environment": about | {"cores": runs.cpu_count()}, "data": photos, "photos": counts}


def alone(function, *arguments):
    """What a function returns in a fresh process."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except Exception as error:
        raise SystemExit(f"speed.py: {(str(error) or repr(error)).splitlines()[0]}") from None


def measure_row(name, arguments, places):
    """All rounds of a row, the sides in turn; prints its line -> the row for the JSON."""
    kind, text, *_ = ROWS[name]
    standard, ours = rounds = [], []
    for _ in range(arguments["rounds"]):
        for side, results in zip(SIDES, rounds, strict=True):
            results.append(alone(measure, name, side, arguments, places, time.time()))
    pairs = [(a["value"], b["value"]) for a, b in zip(standard, ours, strict=True)]
    ratios = [b / a if kind == "rate" else a / b for a, b in pairs]
    row = {"row": name, "what": text.format(arguments["epochs"]), "share": "", "ratios": ratios,
           "standard": standard, "ours": ours}  # fmt: skip
    cells = [UNITS[kind].format(median(side)) for side in zip(*pairs, strict=True)]
    if kind == "rate":
        top = max(result["ceiling"] for result in standard + ours)
        row["share"] = f"{ours[0]['operations'] * median(b for _, b in pairs) / top:.1%}"
        row["note"] = f"large bfloat16 matrix products reach {top / 1e12:.3g} TFLOP/s"
    elif kind == "start":
        row["note"] = f"beyond `import torch`, {median(r['import_torch'] for r in ours):.1f} s"
    else:
        run = [results[0]["measured"] for results in rounds]
        cells = [c + "*" * (n < arguments["epochs"]) for c, n in zip(cells, run, strict=True)]
        row["note"] = (f"best validation accuracy of ours {ours[0]['accuracy']:.1%}; "
                       f"epochs measured: standard {run[0]:.2g}, ours {run[1]}")  # fmt: skip
    cells.append(f"{median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})")
    for results in rounds:
        peaks = [max(result[f"{key}memory"] for result in results) for key in ("", "device_")]
        cells.append(" + ".join(f"{peak:,.0f}" for peak in peaks if peak))
    print(LAYOUT.format(row["what"], *cells, row["share"]), flush=True)
    return row


def main():
    count, parser = runs.number(int, 1), runs.Parser(__doc__)
    flag = parser.add_argument
    flag("--data", metavar="DIR", help="folder of photos; without it photos are made up")
    flag("--rounds", type=count, default=3, help="measurements of each side")
    flag("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    flag("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to measure")
    flag("--output", metavar="FILE", help="JSON with every number")
    flag("--weights", default="IMAGENET1K_V1", help="of MobileNetV2; a name, a file or none")
    flag("--epochs", type=count, default=50, help="of the rows that say so")
    flag("--standard-epochs", type=count, default=1, help="epochs of those that standard runs")
    flag("--our-epochs", type=count, default=10, help="the same of ours, from scratch only")
    flag("--max-steps", type=count, help="standard runs part of one epoch, so many steps")
    flag("--rate-epochs", type=count, default=2, help="epochs timed for images/s, after one more")
    arguments, rows = vars(parser.parse_args()), []
    with TemporaryDirectory(prefix="speed-") as places:
        here = alone(prepare, arguments, places)
        about, photos = here["environment"], here["photos"]
        print("{device}, {cores} cores, torch {torch};".format(**about),
              "{train} + {validation}".format(**photos), "made-up " * (not arguments["data"])
              + f"photos; medians of {arguments['rounds']} rounds\n")  # fmt: skip
        arguments |= {"data": here["data"], "photos": photos, "workers": get_start_method()}
        print(LAYOUT.format("", *SIDES, "times faster", "MiB standard", "MiB ours", "of bf16"))
        for name in [None, *arguments["rows"]]:  # None: an --output that cannot be written says so
            rows += [measure_row(name, arguments, places)] if name else []
            if arguments["output"]:
                runs.write_json(arguments["output"], here | {"settings": arguments, "rows": rows})
    print("\n* extrapolated. MiB: peak of the process (+ of the GPU); a worker of standard's up to "
          f"{max(r['worker_memory'] for row in rows for r in row['standard']):,.0f}, shared pages "
          "included.\nof bf16: convolutions and linear layers of ours, forward and backward, as a "
          "share of large matrix products.")  # fmt: skip
    print(*(f"{row['row']}: {row['note']}" for row in rows), sep="\n")


if __name__ == "__main__":
    runs.run_main(main)
