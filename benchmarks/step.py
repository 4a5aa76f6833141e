"""How long does a training step take: as it is, as a CUDA graph, in one process, in several?

    python benchmarks/step.py --data food11
    python benchmarks/step.py --data food11 --models plain --batch-sizes 32 --processes 1 2 4 8

A step is what train_scratch.py does with a batch before SAM begins: gather, augment, CutMix,
forward, backward, both optimizers. Captured, all of it is one CUDA graph, on GPUs only. Several
processes start together, each with a network of its own, and share the device. Prints a table in
Markdown.
"""

import itertools
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Parser, number

import torch
import torch.nn.functional as F

import data
import engine
import models
import train_scratch


def build_step(flags, device):
    """A network and photos on the device -> a function that trains one step and returns nothing."""
    [run] = engine.combinations(train_scratch.build_parser().parse_args(flags))
    split = data.load_split(run.data, "train", run.image_size, run.cache)
    model = models.SCRATCH[run.model](len(split.classes), run.dropout)
    model.to(device, memory_format=torch.channels_last).train()
    augmentation = data.Augmentation(run.crop_scale, run.rotation, run.jitter, run.flip)
    loader = data.Loader(split, run.batch_size, device, augmentation, run.seed)
    images, labels = split.images.to(device), loader.labels
    theta, color = loader.draw_view(0)
    index = loader.shares(loader.order().to(device))[0]
    [square] = engine.draw_squares(1, 1.0, run.image_size, device)
    factor, classes = torch.ones((), device=device), len(split.classes)
    shift, smoothing = torch.zeros(classes, device=device), run.label_smoothing
    optimizers = engine.build_optimizers(model, run)
    context = engine.autocast(device, run.precision)

    def step():
        inputs = data.augment(images[index], theta[index], color[index])
        targets = F.one_hot(labels[index], classes).float()
        inputs, targets = engine.cutmix(inputs, targets, square)
        engine.set_learning_rates(optimizers, factor)
        engine.train_step(model, optimizers, inputs, targets, shift, 1.0, 0, smoothing, context)

    for group in optimizers[-1].param_groups:  # AdamW refuses capture without
        group["capturable"] = device.type == "cuda"
    return step


def capture(step):
    """A function that replays `step` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # whatever is made at the first call is made outside of the graph
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def measure(flags, device_name, captured, seconds, barrier):
    """In a process of its own: (milliseconds a step, milliseconds of it that the host is busy)."""
    torch.set_num_threads(1)
    engine.reuse_memory()
    device = engine.pick_device(device_name)
    step = build_step(flags, device)
    if captured:
        step = capture(step)
    for _ in range(5):
        step()
    engine.synchronise(device)
    barrier.wait()
    steps, begin, host = 0, time.perf_counter(), 0.0
    while time.perf_counter() - begin < seconds:
        submitted = time.perf_counter()
        for _ in range(10):
            step()
        host += time.perf_counter() - submitted
        engine.synchronise(device)
        steps += 10
    return 1000 * (time.perf_counter() - begin) / steps, 1000 * host / steps


def measure_together(count, *arguments):
    """measure() in `count` processes at once -> the medians."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(count, spawn) as pool:
        barrier = manager.Barrier(count, timeout=120)  # one that fails ends all
        jobs = [pool.submit(measure, *arguments, barrier) for _ in range(count)]
        return [median(column) for column in zip(*(job.result() for job in jobs), strict=True)]


def main(argv=None):
    parser = Parser(__doc__)
    flag, many = parser.add_argument, {"nargs": "+"}
    names = tuple(models.SCRATCH)
    flag("--data", default="food11", metavar="DIR", help="folder of photos")
    flag("--cache", default=".cache", metavar="DIR", help="folder of decoded photos")
    flag("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    flag("--models", choices=names, default=list(names), help="networks", **many)
    flag("--batch-sizes", type=number(int, 2), default=[32, 64], help="photos a step", **many)
    flag("--processes", type=number(int, 1), default=[1, 4], help="at the same time", **many)
    flag("--image-size", type=number(int, 32, 2048), default=96, help="side of photos, pixels")
    flag("--seconds", type=number(float, 0.01), default=2.0, help="of each measurement")
    arguments = parser.parse_args(argv)
    device = engine.pick_device(arguments.device)
    ways = [False, True] if device.type == "cuda" else [False]
    data.load_split(arguments.data, "train", arguments.image_size, arguments.cache)
    print("| network | batch | processes | step | ms a step | host, ms a step | images/s, all |")
    print("|---|---|---|---|---|---|---|")
    rows = itertools.product(arguments.models, arguments.batch_sizes, arguments.processes, ways)
    for model, batch, count, captured in rows:
        flags = ["--data", arguments.data, "--cache", arguments.cache, "--model", model]
        flags += ["--batch-size", str(batch), "--image-size", str(arguments.image_size)]
        cell = f"| {model} | {batch} | {count} | {'captured' if captured else 'eager'}"
        try:
            step, host = measure_together(
                count, flags, arguments.device, captured, arguments.seconds
            )
        except RuntimeError as error:  # a step that this torch can't capture
            print(f"{cell} | {(str(error) or repr(error)).splitlines()[0]} | | |", flush=True)
            continue
        rate = count * batch / step * 1000
        print(f"{cell} | {step:.2f} | {host:.2f} | {rate:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
