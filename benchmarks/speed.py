"""How many images a second are trained on, here and by the loop that everybody writes?

    python benchmarks/speed.py --data food11 --output speed.json
    python benchmarks/speed.py --data food11 --rows scratch --rounds 1 --device cpu

The usual loop is ImageFolder, torchvision's transforms and a DataLoader with a worker for each
processor, AdamW, cross-entropy, float32, loss.item() and the whole network in every step. Ours is
main() of train_scratch.py (row scratch: plain CNN, 96 px) or finetune.py (rows fc and last2:
MobileNetV2, 288 px) with its defaults: SAM, two passes a step, in the last 40% of scratch, bfloat16
where the hardware multiplies in it, features of a frozen part kept.
Network, photos, batch size 64 and what is trained are the same.

The two take turns, each in a fresh process. An epoch is training and validation; images/s are the
training photos by its mean seconds. The first epoch, which warms up, counts as long as the second:
so ours has as large a share of SAM as a whole run. For fine-tuning the time to compute the features
counts too, spread over the 50 epochs of a whole run. What else comes before the first epoch counts
on neither side; of ours that is decoding every photo once.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import engine
import finetune
import models
import train_scratch

PLACE = "--data {data} --device {device} --epochs {epochs} --output {space} --cache {space} "
TUNE = PLACE + "--backbone mobilenet_v2 --weights {weights} --image-size 288 --batch-size 64 "
ROWS = {
    "scratch": PLACE + "--model plain --image-size 96 --batch-size 64",
    "fc": TUNE + "--unfreeze-convolutions 0",
    "last2": TUNE + "--unfreeze-convolutions 2",
}
USUAL_EPOCHS, WHOLE_RUN = 3, 50


def usual_loaders(config, workers):
    """Yield the DataLoader of train/, then of validation/, as strongly augmented as ours."""
    from torchvision import datasets  # only here: ours is to start without
    from torchvision import transforms as t

    size, jitter, pin = config.image_size, config.jitter, torch.cuda.is_available()
    view = [t.RandomResizedCrop(size, (config.crop_scale, 1)), t.RandomRotation(config.rotation)]
    view += [t.ColorJitter(jitter, jitter, jitter), t.RandomHorizontalFlip(config.flip)]
    splits = {"train": view, "validation": [t.Resize(size), t.CenterCrop(size)]}
    end = [t.ToTensor(), t.Normalize(data.PIXEL_MEAN, data.PIXEL_STD)]
    options = {"num_workers": workers, "persistent_workers": True, "pin_memory": pin}
    for split, steps in splits.items():
        photos = datasets.ImageFolder(data.split_folder(config.data, split), t.Compose(steps + end))
        yield torch.utils.data.DataLoader(photos, config.batch_size[0], split == "train", **options)


def train_usual(config, workers):
    """The usual loop -> what of a run's JSON says how long it took."""
    device, history = engine.pick_device(config.device), []
    loaders = list(usual_loaders(config, workers))
    classes = len(loaders[0].dataset.classes)
    model = models.PlainCNN(classes)
    if hasattr(config, "backbone"):  # frozen but for the last layers
        last = config.unfreeze_convolutions
        model = models.build_backbone(config.backbone, classes, config.weights, last)
    optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=0.001)
    for _ in range(USUAL_EPOCHS):
        begin = time.perf_counter()
        for loader in loaders:
            model.train(loader is loaders[0])
            for batch in loader:
                images, labels = (part.to(device, non_blocking=True) for part in batch)
                with torch.set_grad_enabled(model.training):
                    loss = torch.nn.functional.cross_entropy(model(images), labels)
                if model.training:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                loss.item()
        history.append({"seconds": time.perf_counter() - begin})
    return {"history": history, "seconds": sum(epoch["seconds"] for epoch in history)}


def measure(side, flags, workers):
    """In a fresh process: one side of a row -> a run's JSON and its images_per_second."""
    script = finetune if "--backbone" in flags else train_scratch
    config = script.build_parser().parse_args(flags)
    if side == "usual":
        run = train_usual(config, workers)
    else:
        script.main(flags)
        [run] = engine.read_runs(config.output).values()
    epochs = [epoch["seconds"] for epoch in run["history"]]
    seconds = mean([epochs[1], *epochs[1:]]) + (run["seconds"] - sum(epochs)) / WHOLE_RUN
    return {**run, "images_per_second": len(data.list_photos(config.data, "train").files) / seconds}


def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag, count, names = parser.add_argument, engine.number, tuple(ROWS)
    flag("--data", required=True, help="folder of photos")
    flag("--rows", nargs="+", choices=names, default=names, help="what to measure")
    flag("--rounds", type=count(int, 1), default=3, help="measurements of each side")
    # From 5 on 40% of them can be SAM's, and fine-tuning has all its views.
    flag("--epochs", type=count(int, 5), default=10, help=f"of ours; usual: {USUAL_EPOCHS}")
    flag("--workers", type=count(int, 1), default=os.cpu_count(), help="of the usual loop")
    flag("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    flag("--weights", default="IMAGENET1K_V1", help="of MobileNetV2: that name, none or a file")
    flag("--output", metavar="FILE", default="results/speed.json", help="every number")
    settings, rows = {**vars(parser.parse_args(argv)), "processors": os.cpu_count()}, {}
    # As in run_all.sh, for both sides; read when a process starts.
    os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="2147483647")
    fresh = torch.multiprocessing.get_context("spawn")
    for row in settings["rows"]:
        rows[row] = {"ours": [], "usual": []}
        for side in ["ours", "usual"] * settings["rounds"]:
            print(f"{row}: {side}", flush=True)
            with TemporaryDirectory() as space, ProcessPoolExecutor(1, fresh) as process:
                flags = [part.format(space=space, **settings) for part in ROWS[row].split()]
                rows[row][side] += process.map(measure, [side], [flags], [settings["workers"]])
        engine.write_json(settings["output"], {**settings, "rows": rows})
    print(*rows[row]["ours"][0]["environment"].values(), f"{os.cpu_count()} processors")
    print("row      usual images/s   ours images/s   times faster (range)")
    for row, sides in rows.items():
        ours, usual = ([one["images_per_second"] for one in side] for side in sides.values())
        times = [a / b for a, b in zip(ours, usual, strict=True)]
        spread = f"{median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
        print(f"{row:8}{median(usual):15,.0f}{median(ours):16,.0f}   {spread}")


if __name__ == "__main__":
    main()
