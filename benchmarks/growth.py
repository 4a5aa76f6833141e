"""Does it stay fast and small when the data grows? Food-11's number of photos, times 1, 10, 100.

    python benchmarks/growth.py                                 on made-up photos
    python benchmarks/growth.py --data food11 --factors 1 10    on your photos, linked

All photos are linked, not copied. A line is a fresh process: check the folder; decode the training
photos, find them again, train; evaluate on the test split. The last two lines fine-tune with and
without kept features. For Linux (/proc).
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Parser, number, read_runs, split_folder

import data
import evaluate
import finetune
import train_scratch
from tools.prepare import check, draw_demo


def link_photos(source, target, factor):
    """Make `target` a data folder with `factor` links to each photo of the data folder `source`."""
    _, files, _ = data.list_photos(source)  # exits with one line if it is no data folder
    for split, names in files.items():
        photos = split_folder(source, split)
        for name in names:
            photo = photos / name
            folder = Path(target, split, photo.parent.name)
            folder.mkdir(parents=True, exist_ok=True)
            for copy in range(factor):
                (folder / f"{copy}-{photo.name}").symlink_to(photo.resolve())


def memory():
    """Memory of this process that is not a file's, MiB; the caches of files are the system's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


def look_over(directory, place, flags, arguments):
    """Check the photos -> a line of text."""
    start = time.perf_counter()
    with redirect_stdout(StringIO()) as printed:
        check(Path(directory), Path(place, "photos.png"))
    seconds = time.perf_counter() - start
    [pairs] = [line for line in printed.getvalue().splitlines() if "near-duplicate" in line]
    return f"check {seconds:,.1f} s, memory {memory():,.0f} MiB; {pairs.split()[0]} pairs of copies"


def grow(directory, place, flags, arguments):
    """Decode, find again, train -> a line of text."""
    size = arguments.image_size
    start = time.perf_counter()
    data.load_split(directory, "train", size, place)
    decoded = time.perf_counter()
    train = data.load_split(directory, "train", size, place)
    found, photos = time.perf_counter(), len(train.labels)
    flags = [*flags, "--image-size", str(size), "--epochs", str(arguments.epochs)]
    train_scratch.main([*flags, "--sam-share", "0"])  # all epochs of a kind, however few
    [run] = read_runs(place).values()
    epoch = run["history"][-1]["seconds"]
    return (
        f"{photos:,} photos: decode {1000 * (decoded - start) / photos:.2f} ms a photo, find again "
        f"{found - decoded:.2f} s, epoch {epoch:,.1f} s, a step of it "
        f"{1000 * epoch * run['config']['batch_size'] / photos:.0f} ms, map on disk "
        f"{train.images.nbytes / 2**20:,.0f} MiB, memory {memory():,.0f} MiB"
    )


def measure_test(directory, place, flags, arguments):
    """Evaluate the run of grow() on the test split -> a line of text."""
    [name] = read_runs(place)
    start = time.perf_counter()
    evaluate.main([*flags, "--run", name])
    seconds = time.perf_counter() - start
    [file] = Path(place, "evaluations").glob("*.json")
    return (
        f"evaluation {seconds:,.1f} s, JSON {file.stat().st_size / 2**20:,.1f} MiB, memory "
        f"{memory():,.0f} MiB"
    )


def tune(directory, place, flags, budget):
    """Two epochs of FC-only fine-tuning with `budget` GiB for features -> a line of text."""
    finetune.main([*flags, "--epochs", "2", "--image-size", "224", "--feature-memory", str(budget)])
    [run] = read_runs(place).values()
    return (
        f"fine-tuning with {budget} GiB for features: {run['seconds']:.1f} s, memory "
        f"{memory():,.0f} MiB, validation {run['best']['validation_accuracy']:.1%}"
    )


def print_alone(function, directory, place, flags, value):
    """Print what a function above returns in a fresh process; the runs print their own lines."""
    flags = ["--data", directory, "--cache", place, "--output", place, *flags]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        print(pool.submit(function, directory, place, flags, value).result(), flush=True)


def main(argv=None):
    parser = Parser(__doc__)
    flag, count = parser.add_argument, number(int, 1)
    flag("--data", metavar="DIR", help="folder of photos; without it photos are made up")
    flag("--factors", type=count, nargs="+", default=[1, 10, 100], help="how often each photo")
    flag("--image-size", type=count, default=96, help="of the network trained from scratch")
    flag("--epochs", type=count, default=2, help="of training; the last one is told")
    flag("--weights", default="none", help="of MobileNetV2; a name, a file or none")
    flag("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    arguments = parser.parse_args(argv)
    with TemporaryDirectory(prefix="growth-", dir=".") as folder:
        source, flags = arguments.data or f"{folder}/photos", ["--device", arguments.device]
        if not arguments.data:
            draw_demo(Path(source), {"train": 200, "validation": 25, "test": 25}, size=256)
        for factor in arguments.factors:
            directory, place = f"{folder}/{factor}", f"{folder}/grown-{factor}"
            link_photos(source, directory, factor)
            for step in (look_over, grow, measure_test):
                print_alone(step, directory, place, flags, arguments)
        for budget in (4, 0):
            tuning = [*flags, "--weights", arguments.weights]
            print_alone(tune, source, f"{folder}/tuned-{budget}", tuning, budget)


if __name__ == "__main__":
    main()
