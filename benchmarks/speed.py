"""How fast is this study? The same training twice in one run: the usual PyTorch loop, and ours.

    python benchmarks/speed.py                                     on made-up photos
    python benchmarks/speed.py --data food11 --rows scratch-96 fc --output speed.json

"standard" is the loop that everybody writes: ImageFolder, torchvision's transforms, a DataLoader
with a worker for every core, AdamW, float32, loss.item() and the whole network in every step.
"ours" is main() of train_scratch.py and finetune.py with their default flags. Network, photos,
batch size, epochs and trained layers are the same. The two take turns, in fresh processes that
begin with no photo decoded. An epoch is training and validation; images/s are the training photos
by its seconds. The time of --epochs is extrapolated from the few that run, by all but the first.
"""

import math
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Parser, cpu_count, number, read_runs, split_folder, write_json

import torch
import torch.nn.functional as F

import data
import engine
import finetune
import models
import train_scratch

TUNE = "--backbone mobilenet_v2 --image-size 224 --unfreeze-convolutions"
ROWS = {  # name: script and its flags
    "scratch-64": (train_scratch, "--image-size 64"),
    "scratch-96": (train_scratch, "--image-size 96"),
    "scratch-128": (train_scratch, "--image-size 128"),
    "fc": (finetune, f"{TUNE} 0"),
    "last2": (finetune, f"{TUNE} 2"),
}
MEASURES = {  # key of the JSON: text of the table
    "images_per_second": "training, images/s",
    "seconds": "start to end of the process, s",
    "other_seconds": "of these not in an epoch, s",
    "memory": "peak memory without workers, MiB",
    "device_memory": "peak memory of the GPU, MiB",
}
# That run at most. After the first, which warms up, ours has the share of SAM that all 50 have, and
# the 4 views of fine-tuning.
EPOCHS = {"standard": 2, "ours": 6}


def standard_loaders(config, device):
    """[training DataLoader, validation DataLoader], as everybody has them."""
    from torchvision import datasets, transforms  # only here: ours is to start without

    size, jitter = config.image_size, config.jitter
    augmentation = [
        transforms.RandomResizedCrop(size, scale=(config.crop_scale, 1)),
        transforms.RandomHorizontalFlip(config.flip),
        transforms.ColorJitter(jitter, jitter, jitter),
    ]
    if config.rotation:
        augmentation.append(transforms.RandomRotation(config.rotation))
    plain, loaders = [transforms.Resize(size), transforms.CenterCrop(size)], []
    normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for split, steps in (("train", augmentation), ("validation", plain)):
        transform = transforms.Compose([*steps, transforms.ToTensor(), normalise])
        loader = torch.utils.data.DataLoader(
            datasets.ImageFolder(split_folder(config.data, split), transform),
            config.batch_size[0],
            shuffle=split == "train",
            num_workers=cpu_count(),
            pin_memory=device.type == "cuda",
            persistent_workers=True,
            multiprocessing_context=multiprocessing.get_all_start_methods()[0],  # the usual one
        )
        loaders.append(loader)
    return loaders


def standard_epoch(model, batches, device, optimizer=None):
    """One epoch of training, or of validation without an optimizer."""
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


def train_standard(script, flags):
    """The standard loop with the flags of a script -> seconds of each epoch."""
    config, seconds = script.build_parser().parse_args(flags), []
    device = engine.pick_device(config.device)
    train_loader, validation_loader = standard_loaders(config, device)
    classes, dropout = len(train_loader.dataset.classes), config.dropout[0]
    if script is finetune:  # torchvision's network, frozen but for the last layers
        model = models.build_backbone(
            config.backbone, classes, config.weights, config.unfreeze_convolutions, dropout
        )
    else:
        model = models.SCRATCH[config.model](classes, dropout)
    model.to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.001)
    for _ in range(config.epochs):
        begin = time.perf_counter()
        standard_epoch(model, train_loader, device, optimizer)
        standard_epoch(model, validation_loader, device)
        seconds.append(time.perf_counter() - begin)
    return seconds


def train_ours(script, flags):
    """main() of our script -> seconds of each epoch."""
    with TemporaryDirectory() as output, redirect_stdout(StringIO()):
        script.main([*flags, "--output", output])
        [run] = read_runs(output).values()
    return [epoch["seconds"] for epoch in run["history"]]


def measure(side, name, flags):
    """In a fresh process: seconds of each epoch of one side of a row, and memory in MiB."""
    train = {"standard": train_standard, "ours": train_ours}[side]
    epochs = train(ROWS[name][0], flags)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return epochs, {
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
        "device_memory": torch.cuda.max_memory_reserved() / 2**20,  # 0 without a GPU
    }


def fastest_product(name):
    """In a fresh process: operations a second of a large matrix product, in the precision in which
    a device trains: a processor without bfloat16 units takes minutes for one in bfloat16."""
    device, seconds = engine.pick_device(name), []
    dtype = engine.product_dtype(device, "auto")
    side = 4096 if device.type == "cpu" else 16384
    a, b, c = torch.randn(3, side, side, device=device, dtype=dtype)
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, b, out=c)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def operations(image_size, photos):
    """Operations of the products in an epoch of the plain CNN: training and validation.

    Of an epoch in the mean: in some a step has two passes (SAM).
    """
    forward = sum(
        2 * math.prod(layer["output"][1:]) * layer["parameters"]  # each weight once a pixel
        for layer in models.describe(models.PlainCNN(11), image_size)
        if layer["type"] in ("Conv2d", "Linear")
    )
    passes = 1 + train_scratch.build_parser().get_default("sam_share")
    # Training also goes backward, to the inputs and to the weights.
    return forward * (3 * passes * photos["train"] + photos["validation"])


def alone(function, *arguments):
    """Return what a function returns in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_row(name, directory, photos, arguments):
    """All rounds of a row, the sides in turn -> {"standard": [dict, ...], "ours": [dict, ...]}."""
    script, text = ROWS[name]
    results = {"standard": [], "ours": []}
    for side in list(results) * arguments.rounds:
        number_of_epochs = min(arguments.epochs, EPOCHS[side])
        with TemporaryDirectory() as cache:
            flags = [*text.split(), "--data", directory, "--cache", cache]
            flags += ["--device", arguments.device, "--epochs", str(number_of_epochs)]
            flags += ["--weights", arguments.weights] if script is finetune else []
            start = time.perf_counter()
            epochs, memory = alone(measure, side, name, flags)
            process_seconds = time.perf_counter() - start
        epoch = mean(epochs[1:] or epochs)
        result = {
            "images_per_second": photos["train"] / epoch,
            "seconds": process_seconds + (arguments.epochs - number_of_epochs) * epoch,
            "other_seconds": process_seconds - sum(epochs),
            "epochs": epochs,
            **memory,
        }
        results[side].append(result)
    return results


def print_row(name, results):
    """Medians over the rounds, and how many times faster ours is: median and range."""
    print(f"{name}: {ROWS[name][0].__name__}.py {ROWS[name][1]}")
    for key, title in MEASURES.items():
        standard, ours = ([result[key] for result in side] for side in results.values())
        if not any(ours):  # no GPU
            continue
        line = f"  {title:36}{median(standard):>12,.1f}{median(ours):>12,.1f}"
        if key in ("images_per_second", "seconds", "other_seconds"):
            ratios = [a / b for a, b in zip(standard, ours, strict=True)]
            if key == "images_per_second":
                ratios = [1 / ratio for ratio in ratios]
            line += f"   {median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})"
        print(line, flush=True)


def main(argv=None):
    parser = Parser(__doc__)
    flag, count = parser.add_argument, number(int, 1)
    flag("--data", metavar="DIR", help="folder of photos; without it photos are made up")
    flag("--rounds", type=count, default=3, help="measurements of each side")
    flag("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    flag("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to measure")
    flag("--output", metavar="FILE", help="JSON with every number")
    flag("--weights", default="IMAGENET1K_V1", help="of MobileNetV2; a name, a file or none")
    flag("--epochs", type=count, default=50, help="of the training whose time is told")
    arguments, rows = parser.parse_args(argv), []
    with TemporaryDirectory(prefix="speed-") as folder:
        directory = arguments.data or f"{folder}/photos"
        if not arguments.data:
            from tools.prepare import draw_demo  # not in the processes that are measured

            draw_demo(Path(directory), size=256)  # about the size of Food-11's
        photos = {split: len(files) for split, files in data.list_photos(directory)[1].items()}
        if {"fc", "last2"} & set(arguments.rows):  # a download is not to be measured
            models.load_torchvision("mobilenet_v2", arguments.weights)
        about = {**engine.environment(arguments.device, "auto"), "cores": cpu_count()}
        top = alone(fastest_product, arguments.device)
        print("{device}, {cores} cores, torch {torch};".format(**about), photos)
        print(f"{about['precision']} products of large matrices reach {top / 1e12:.3g} TFLOP/s")
        print(f"{arguments.epochs} epochs, medians of {arguments.rounds} rounds")
        print(f"{'':38}{'standard':>12}{'ours':>12}   times faster (range)")
        for name in arguments.rows:
            row = measure_row(name, directory, photos, arguments)
            print_row(name, row)
            if ROWS[name][0] is train_scratch:
                size = int(ROWS[name][1].split()[-1])
                rate = median(result["images_per_second"] for result in row["ours"])
                share = operations(size, photos) * rate / photos["train"] / top
                print(f"  share of those products that ours reaches {share:.0%}", flush=True)
            rows.append({"row": name, **row})
            if arguments.output:
                content = {"environment": about, "photos": photos, "settings": vars(arguments)}
                write_json(arguments.output, {**content, "peak": top, "rows": rows})


if __name__ == "__main__":
    main()
