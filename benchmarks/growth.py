"""Does it stay fast and small when the data grows? Food-11's number of photos, times 1, 10, 100.

    python benchmarks/growth.py                                 on made-up photos
    python benchmarks/growth.py --data food11 --factors 1 10    on your training photos, linked

The photos of train/ are linked (not copied) under new names as often as the factor says. Each
line is a fresh process: decoding them all, finding them again, then training steps from scratch.
The last two lines fine-tune MobileNetV2 on the original number of photos for two epochs, once with
the features of its frozen part in memory and once with a budget too small for them.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from itertools import chain, islice, repeat
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import runs

BATCH_SIZE = 64


def link_photos(source, target, factor):
    """Make `target` a data folder with `factor` links to each training photo of `source`."""
    for split in runs.SPLITS:
        copies = factor if split == "train" else 1
        for photo in Path(source, split).glob("*/*.*"):
            folder = Path(target, split, photo.parent.name)
            folder.mkdir(parents=True, exist_ok=True)
            for copy in range(copies):
                os.link(photo, folder / f"{copy}-{photo.name}")


def memory():
    """Memory of this process that is not a file's, MiB; the caches of files are the system's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


def grow(directory, cache, image_size, steps, device):
    """Decode, load again, train `steps` steps -> numbers for one line of the table."""
    import torch.nn.functional as F

    import data
    import models
    import optimizers
    import train_scratch

    device, begin = train_scratch.pick_device(device), time.perf_counter()
    data.load_split(directory, "train", image_size, cache)
    decoded = time.perf_counter()
    train = data.load_split(directory, "train", image_size, cache)
    found = time.perf_counter()
    train_scratch.reuse_memory()
    model = models.PlainCNN(len(train.classes))
    model.to(device, memory_format=train_scratch.MEMORY_FORMAT)
    config = {"learning_rate": 0.02, "weight_decay": 0.3, "optimizer": "muon"}
    every = optimizers.build_optimizers(model, config)
    context, seconds = train_scratch.autocast(device, "auto"), []
    loader = data.Loader(train, BATCH_SIZE, device, runs.SCRATCH_AUGMENTATION)
    for images, labels in islice(chain.from_iterable(repeat(loader)), steps):
        with context:
            logits = model(images.contiguous(memory_format=train_scratch.MEMORY_FORMAT)).float()
        model.zero_grad()
        F.cross_entropy(logits, labels).backward()
        for optimizer in every:
            optimizer.step()
        seconds.append(time.perf_counter())
    half = len(seconds) // 2  # the first half warms up
    return {
        "photos": len(train.labels),
        "decode_milliseconds": 1000 * (decoded - begin) / len(train.labels),
        "find_seconds": found - decoded,
        "step_milliseconds": 1000 * (seconds[-1] - seconds[half]) / (len(seconds) - 1 - half),
        "map_mebibytes": train.images.nbytes / 2**20,
        "memory_mebibytes": memory(),
    }


def tune(directory, cache, weights, budget, device):
    """Two epochs of FC-only fine-tuning with a budget for the features, GiB -> dict."""
    import finetune

    begin = time.perf_counter()
    with TemporaryDirectory() as output, redirect_stdout(StringIO()) as printed:
        finetune.main(["--data", directory, "--cache", cache, "--output", output, "--weights",
                       weights, "--epochs", "2", "--views", "2", "--device", device,
                       "--image-size", "224", "--feature-memory", str(budget)])  # fmt: skip
        [run] = runs.read_runs(output).values()
    return {
        "seconds": time.perf_counter() - begin,
        "fallback": "runs in every step" in printed.getvalue(),
        "accuracy": run["best"]["validation_accuracy"],
        "memory_mebibytes": memory(),
    }


def alone(function, *arguments):
    """What one of the functions above returns in a fresh process."""
    command = [sys.executable, __file__, "--child", json.dumps([function.__name__, *arguments])]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr.strip().splitlines()[-1])
    return json.loads(result.stdout.splitlines()[-1])


def main():
    if sys.argv[1:2] == ["--child"]:
        name, *arguments = json.loads(sys.argv[2])
        return print(json.dumps(globals()[name](*arguments)))
    count, parser = runs.number(int, 1), runs.Parser(__doc__)
    flag = parser.add_argument
    flag("--data", metavar="DIR", help="folder of photos; without it photos are made up")
    flag("--factors", type=count, nargs="+", default=[1, 10, 100], help="how often each photo")
    flag("--image-size", type=count, default=64, help="of the network trained from scratch")
    flag("--steps", type=runs.number(int, 4), default=60, help="training steps, the first half "
         "to warm up")  # fmt: skip
    flag("--weights", default="none", help="of MobileNetV2; a name, a file or none")
    flag("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="growth-", dir=".") as places:
        source = arguments.data or f"{places}/photos"
        if not arguments.data:
            from tools import demo

            demo.draw_demo(Path(source), {"train": 200, "validation": 25, "test": 25}, size=256)
        print("photos   decode      find again   training step   map on disk   memory")
        for factor in arguments.factors:
            directory, cache = f"{places}/{factor}", f"{places}/cache-{factor}"
            link_photos(source, directory, factor)
            row = alone(grow, directory, cache, arguments.image_size, arguments.steps,
                        arguments.device)  # fmt: skip
            print("{photos:<9,}{decode_milliseconds:.2f} ms{find_seconds:12.2f} s"
                  "{step_milliseconds:13.0f} ms{map_mebibytes:12,.0f} MiB"
                  "{memory_mebibytes:9,.0f} MiB".format(**row), flush=True)  # fmt: skip
        for budget in (4.0, 0.0):
            row = alone(tune, source, f"{places}/cache", arguments.weights, budget,
                        arguments.device)  # fmt: skip
            how = "too small, no features kept" if row["fallback"] else "enough, features kept"
            print(
                f"fine-tuning, 2 epochs, budget {budget:g} GiB ({how}): {row['seconds']:.1f} s, "
                f"{row['memory_mebibytes']:,.0f} MiB, validation {row['accuracy']:.1%}"
            )


if __name__ == "__main__":
    runs.run_main(main)
