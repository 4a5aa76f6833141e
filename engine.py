"""One training loop, and what a run leaves behind. train_scratch.py and finetune.py use it.

A run is one combination of settings with one seed, and its name says which. Every random number of
it is a function of the seed and the epoch, so a run that was interrupted goes on from its last
stored epoch and ends where it would have ended.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import models

# Flags that take several values; each combination is a run, and seeds are the outermost loop: the
# runs of one seed share the features of finetune.py.
PLURAL_FLAGS = ("seed", "batch_size", "dropout", "learning_rate")
# Flags that are no part of a run's name: where it is computed, and what the name begins with.
PLACE_FLAGS = ("data", "output", "cache", "device", "checkpoint_seconds", "feature_memory")
SILENT_FLAGS = PLURAL_FLAGS + PLACE_FLAGS + ("model", "backbone", "unfreeze_convolutions")
EVALUATION_BATCH = 64
warnings.filterwarnings("ignore", ".*without CUDA graph capture")  # the steps before a recorded one
SHOWN = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")


# ---------------------------------------------------------------------------------------------
# Flags and runs


def number(kind, low, high=1e9):
    """An argparse type: an int or float within [low, high]."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:  # as nan never is
            raise ValueError
        return value

    convert.__name__ = f"{kind.__name__} (from {low:g} to {high:g})"  # argparse quotes it
    return convert


def add_place_flags(parser):
    """The flags that say where things are, the same in all scripts that compute."""
    flag = parser.add_argument
    flag("--data", default="food11", help="folder of photos")
    flag("--output", default="results", help="folder of results")
    flag("--cache", default=".cache", help="folder of decoded photos")
    flag("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")


def add_training_flags(parser):
    """The flags that both training scripts share; each sets the defaults that are missing here."""
    add_place_flags(parser)
    flag, share = parser.add_argument, number(float, 0, 1)
    flag("--image-size", type=number(int, 32, 4096), help="side of the photos, pixels")
    flag("--epochs", type=number(int, 1), default=50, help="times each photo is seen")
    flag("--learning-rate", type=number(float, 1e-12), nargs="+", help="its peak")
    flag(
        "--batch-size", type=number(int, 1), nargs="+", default=[64], help="photos a step, at most"
    )
    flag("--dropout", type=number(float, 0, 0.99), nargs="+", help="before the FC layers")
    flag("--seed", type=number(int, 0), nargs="+", default=[0], help="of all random numbers")
    flag("--weight-decay", type=number(float, 0), help="decoupled")
    flag("--schedule", choices=("linear", "constant"), default="linear", help="after the warm-up")
    flag("--warmup-epochs", type=number(float, 0), default=2.0, help="of rising learning rate")
    flag("--label-smoothing", type=share, default=0.1, help="of the cross-entropy")
    flag("--crop-scale", type=number(float, 0.01, 1), help="smallest crop, share of the area")
    flag("--rotation", type=number(float, 0, 180), help="largest, degrees")
    flag("--jitter", type=share, help="largest change of colours, as a fraction")
    flag("--flip", type=share, default=0.5, help="probability of a mirrored photo")
    flag("--precision", choices=("auto", "bfloat16", "float32"), default="auto", help="of products")
    flag("--checkpoint-seconds", type=number(float, 0), default=30.0, help="between stored states")


def run_name(parser, network, config):
    """The name of a run: network, what is tuned, seed, then each setting not at its default."""
    name = f"{network}-lr{config['learning_rate']:g}-bs{config['batch_size']}"
    if [config["dropout"]] != parser.get_default("dropout"):
        name += f"-dropout{config['dropout']:g}"
    name += f"-seed{config['seed']}"
    for key, value in config.items():
        if key not in SILENT_FLAGS and value != parser.get_default(key):
            text = f"{value:g}" if isinstance(value, float) else str(value).replace("/", "_")
            name += f"-{key.replace('_', '')}{text}"
    return name


def network_of(name):
    """What a run's name begins with: "plain", or "mobilenet_v2-last2"."""
    return name.split("-lr")[0]


def unfinished_runs(parser, arguments, network):
    """A list with an argparse.Namespace, and its name, for each combination that is not finished.

    Exits with one line if a finished one is of other photos.
    """
    runs, photos = [], fingerprint(arguments.data)
    for values in itertools.product(*(getattr(arguments, flag) for flag in PLURAL_FLAGS)):
        config = {**vars(arguments), **dict(zip(PLURAL_FLAGS, values, strict=True))}
        name = run_name(parser, network, config)
        path = Path(arguments.output, "runs", f"{name}.json")
        if not path.exists():
            runs.append(argparse.Namespace(**config, name=name, photos=photos))
        elif json.loads(path.read_text())["data"]["fingerprint"] != photos:
            raise SystemExit(f"{path} is of other photos: give another --output")
        else:
            print(f"{name}: finished before")
    return runs


def fingerprint(directory):
    """What tells the photos that training sees from others: a hash of their names and sizes."""
    splits = (data.list_photos(directory, split) for split in ("train", "validation"))
    return "-".join(split.fingerprint for split in splits)


def load_photos(arguments, device):
    """Decode the training and validation photos, or find them decoded -> two data.Split.

    They go to the device here, once for all runs, if they fit.
    """
    splits = []
    for name in ("train", "validation"):
        split = data.load_split(arguments.data, name, arguments.image_size, arguments.cache)
        if device.type == "cuda" and split.images.nbytes < torch.cuda.mem_get_info(device)[1] / 4:
            split = split._replace(images=split.images.to(device))
        splits.append(split)
    return splits


# ---------------------------------------------------------------------------------------------
# Device, precision, processes


def pick_device(name):
    """torch.device for `auto`, `cpu`, `cuda`, `cuda:1` or `mps`; exits if it is not there.

    Under torchrun this process joins the others, each with a GPU of its own.
    """
    if name == "auto":
        found = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if found else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device {name}: {str(error).splitlines()[0]}") from None
    if torch.device(name).index:  # CUDA graphs are recorded on the current device
        torch.cuda.set_device(name)
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if name.startswith("cuda") else "gloo")
        if dist.get_rank() > 0:  # one process speaks for all
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, open to the end
    return torch.device(name)


def processes():
    """(rank of this process, their number) under torchrun; (0, 1) without."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def product_dtype(device, precision):
    """The dtype of products. `auto` is bfloat16 where the hardware multiplies in it."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # emulated it is slower than float32; torch 2.6 has no public way to ask
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.bfloat16 if native else torch.float32


def autocast(device, precision):
    """The context of the forward pass. No cast weight is kept: a CUDA graph would not renew it."""
    enabled = product_dtype(device, precision) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


# ---------------------------------------------------------------------------------------------
# Optimizers and schedule


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is made (nearly) orthogonal: for matrices and kernels.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. A kernel
    [out, in, k, k] counts as the matrix [out, k * k * in]. Decoupled weight decay. The learning
    rates are tensors, float []; dtype: of the products.
    """

    def __init__(self, groups, dtype, momentum=0.95):
        super().__init__(groups, {"momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if "average" not in self.state[weight]:
                    self.state[weight]["average"] = torch.zeros_like(weight)
                average = self.state[weight]["average"].lerp_(weight.grad, 1 - momentum)
                matrix = weight.grad.lerp(average, momentum).flatten(1)  # Nesterov
                update = orthogonalise(matrix, self.dtype).view(weight.shape)
                weight.mul_(1 - rate * group["weight_decay"])
                weight.addcmul_(update, rate, value=-(max(1, len(matrix) / matrix.shape[1]) ** 0.5))


def orthogonalise(matrix, dtype):
    """Five Newton-Schulz steps towards the nearest (semi-)orthogonal matrix, in `dtype`.

    matrix: float [rows, columns] -> the same shape and dtype. The coefficients are Jordan's.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        polynomial = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return (x.T if tall else x).to(matrix.dtype)


def build_optimizers(model, run, classes, device):
    """A list of optimizers for what is not frozen in `model`.

    With --optimizer muon Muon takes all matrices and kernels but the output layer's, the matrix
    with a row for each class, and AdamW the rest at a tenth of the learning rate and a weight decay
    of 0.01. Otherwise AdamW takes all. Biases and batch norm are not decayed.
    """

    def is_for_muon(parameter):
        output = parameter.ndim == 2 and len(parameter) == classes
        return run.optimizer == "muon" and parameter.ndim > 1 and not output

    def group(parameters, peak, decay):  # learning rates that a CUDA graph can change
        rate = torch.tensor(peak, device=device)
        return {"params": parameters, "lr": rate, "peak": peak, "weight_decay": decay}

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    of_muon = [parameter for parameter in trained if is_for_muon(parameter)]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    others = [p for p in trained if p.ndim > 1 and not is_for_muon(p)]
    peak, decay, optimizers = run.learning_rate, run.weight_decay, []
    if of_muon:
        optimizers.append(Muon([group(of_muon, peak, decay)], product_dtype(device, run.precision)))
        peak, decay = peak / 10, 0.01
    groups = [group(others, peak, decay), group(vectors, peak, 0.0)]
    return [*optimizers, torch.optim.AdamW(groups, fused=True, capturable=device.type == "cuda")]


def learning_rate_factor(epoch, run):
    """Linear rise in the warm-up, then linear fall to zero, or none; `epoch` is a float."""
    warmup = min(run.warmup_epochs, run.epochs / 2)
    if epoch < warmup:
        return epoch / warmup
    return 1.0 if run.schedule == "constant" else (run.epochs - epoch) / (run.epochs - warmup)


# ---------------------------------------------------------------------------------------------
# Training


def draw_squares(steps, probability, image_size, generator):
    """Draw the CutMix square of each step: int64 [steps, 4], first row, row after the last, first
    column, column after the last. With a probability of 1 - `probability` it is empty."""
    happens, kept, x, y = torch.rand(steps, 4, generator=generator).unbind(1)
    side = (image_size * (1 - kept).sqrt()).long() * (happens < probability)
    top, left = ((place * (image_size - side + 1)).long() for place in (y, x))
    return torch.stack([top, top + side, left, left + side], 1)


def cutmix(images, targets, square):
    """Paste a square of each photo of the batch into the next one, and mix their targets likewise.

    images: float [B, C, H, W]; targets: float [B, classes], probabilities; square: int64 [4], see
    draw_squares, one for the batch. Returns both: image i with a square of image i - 1 (the first
    with one of the last), target i with as large a share of target i - 1. Yun et al., ICCV 2019.
    """
    line = torch.arange(images.shape[-1], device=images.device)
    top, bottom, left, right = square
    rows, columns = (line >= top) & (line < bottom), (line >= left) & (line < right)
    inside = rows[:, None] & columns
    pasted = inside.float().mean()  # as a share of the photo
    images = torch.where(inside, images.roll(1, 0), images)
    return images, torch.lerp(targets.roll(1, 0), targets, 1 - pasted)


@torch.no_grad()
def climb(parameters, radius):
    """Move the parameters, in place, to where the loss is highest within `radius`.

    To first order, by their gradients; radius is the norm of all moves together. Returns the moves,
    a tensor for each. Foret et al., "Sharpness-aware minimization" (SAM), ICLR 2021.
    """
    gradients = [parameter.grad for parameter in parameters]
    scale = radius / (nn.utils.get_total_norm(gradients) + 1e-12)
    moves = [gradient * scale for gradient in gradients]
    for parameter, move in zip(parameters, moves, strict=True):
        parameter.add_(move)
    return moves


def make_step(network, optimizers, run, sums, classes, radius):
    """The training step: a function of tensors that never change their shape, and adds to `sums`.

    It takes inputs float [B, ...], labels int64 [B], a square of draw_squares() and the factor of
    the learning rates, float []. sums: float [2], loss and accuracy of the batches so far. radius:
    of climb(), 0 for none. With one there are two passes: loss and accuracy are those of the
    first. The host reads nothing of it, so a GPU can replay the step as one CUDA graph.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    context, identity = autocast(sums.device, run.precision), torch.eye(classes).to(sums.device)

    def compute_gradients(inputs, targets):
        with context:
            logits = network(inputs)
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, label_smoothing=run.label_smoothing)
        network.zero_grad()
        loss.backward()
        return loss.detach(), logits.detach()

    def step(inputs, labels, square, factor):
        targets = identity[labels]  # float [B, classes]
        if run.cutmix:
            inputs, targets = cutmix(inputs, targets, square)
        loss, logits = compute_gradients(inputs, targets)
        if radius:  # gradients of where the loss is highest, for a step from where we were
            moves = climb(trained, radius)
            compute_gradients(inputs, targets)
            with torch.no_grad():
                for parameter, move in zip(trained, moves, strict=True):
                    parameter.sub_(move)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"].copy_(group["peak"] * factor)
            optimizer.step()
        sums.add_(torch.stack([loss, (logits.argmax(1) == labels).float().mean()]))

    return Graphed(step) if sums.is_cuda and processes()[1] == 1 else step


class Graphed:
    """A function of tensors that is recorded on its fourth call and replayed from then on.

    Launching the kernels of a step one by one takes the host longer than the GPU needs to run them.
    The first three calls are ordinary ones on a side stream, as torch asks for: they make what a
    graph can't, such as the states of optimizers.
    """

    def __init__(self, function):
        self.function, self.warm_ups, self.graph = function, 3, None

    def __call__(self, *inputs):
        if self.warm_ups:
            self.warm_ups -= 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.function(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.function(*self.inputs)
        for own, tensor in zip(self.inputs, inputs, strict=True):
            own.copy_(tensor)
        self.graph.replay()


def train_one_epoch(network, loader, step, sums, epoch, run):
    """Train on each photo once, but for the few left over; return mean loss and accuracy.

    Both are of distorted photos, as the network saw them. The loss has label smoothing and CutMix
    in it, unlike that of validate(); the accuracy counts the label of the photo that another was
    pasted into. Sums stay on the device and are read once, at the end.
    """
    rank, count = processes()
    seed = run.seed * 1_000_003 + epoch  # large and odd: no two of seed and epoch share numbers
    torch.manual_seed(seed + 7_368_787 * rank)  # of dropout
    generator = torch.Generator().manual_seed(seed + 1)
    squares = draw_squares(loader.steps, run.cutmix, run.image_size, generator).to(loader.device)
    # At points within the epoch: no step has rate zero.
    moments = torch.linspace(epoch, epoch + 1, loader.steps + 2)[1:-1].tolist()
    factors = torch.tensor([learning_rate_factor(m, run) for m in moments], device=loader.device)
    loader.epoch = epoch
    network.train()
    sums.zero_()
    for (inputs, labels), square, factor in zip(loader, squares, factors, strict=True):
        step(inputs, labels, square, factor)
    if count > 1:
        dist.all_reduce(sums)
    loss, accuracy = (sums.cpu().double() / (loader.steps * count)).tolist()
    rate = run.learning_rate * factors[-1].item()
    return {"learning_rate": rate, "train_loss": loss, "train_accuracy": accuracy}


@torch.no_grad()
def validate(network, loader, run):
    """Mean cross-entropy and accuracy over a loader."""
    network.eval()
    sums, context = torch.zeros(2, device=loader.device), autocast(loader.device, run.precision)
    for inputs, labels in loader:
        with context:
            logits = network(inputs)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        sums += torch.stack([loss, (logits.argmax(1) == labels).sum()])
    loss, accuracy = (sums.cpu().double() / len(loader.labels)).tolist()
    return {"validation_loss": loss, "validation_accuracy": accuracy}


def fit(model, train_loader, validation_loader, run, classes):
    """Train `model` for run.epochs, from the stored state of the run if there is one.

    The loaders yield inputs that `model` takes: photos, or features of its frozen part. Returns
    (history, a dict for each epoch; why it failed, or None) and leaves the weights of the best
    epoch in `model` unless it failed.
    """
    device, (rank, count) = train_loader.device, processes()
    # Over the processes of torchrun gradients are averaged; each norms its own share of a batch.
    network = DistributedDataParallel(model) if count > 1 else model
    optimizers = build_optimizers(model, run, classes, device)
    file = checkpoint_file(run.output, run.name).with_suffix(f".{run.photos}")  # of these photos
    history, best_state = [], None
    print(f"{run.name}\nepoch  train: loss, accuracy; validation: loss, accuracy")
    if file.exists():
        stored = torch.load(file, map_location=device, weights_only=True)
        history, best_state = stored["history"], stored["best_state"]
        model.load_state_dict(stored["model"])
        for optimizer, state in zip(optimizers, stored["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        print(f"goes on after epoch {len(history)}")
    sums, written = torch.zeros(2, device=device), time.perf_counter()
    make = partial(make_step, network, optimizers, run, sums, classes)
    plain_step, sam_step = make(0), make(run.sam_radius)
    for epoch in range(len(history), run.epochs):
        begin = time.perf_counter()
        last = epoch >= run.epochs - round(run.epochs * run.sam_share)
        step = sam_step if last else plain_step
        row = {"epoch": epoch + 1}
        row |= train_one_epoch(network, train_loader, step, sums, epoch, run)
        row |= validate(model, validation_loader, run)
        row["seconds"] = time.perf_counter() - begin
        if not all(map(math.isfinite, row.values())):
            return history, f"the loss is not finite in epoch {epoch + 1}"
        history.append(row)
        if sys.stdout.isatty() or (epoch + 1) % max(1, run.epochs // 10) == 0:
            numbers, left = "  ".join(f"{row[key]:.3f}" for key in SHOWN), run.epochs - epoch - 1
            print(f"{epoch + 1:5}  {numbers}  {row['seconds'] * left:.0f} s left", flush=True)
        if max(history, key=merit) is history[-1]:  # of equal ones the first
            best_state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        if rank == 0 and time.perf_counter() - written >= run.checkpoint_seconds:
            state = {"history": history, "best_state": best_state, "model": model.state_dict()}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            write_file(file, partial(torch.save, state))
            written = time.perf_counter()
    model.load_state_dict(best_state)
    return history, None


def merit(row):
    """What the best epoch has most of: validation accuracy, the lower loss on ties."""
    return row["validation_accuracy"], -row["validation_loss"]


# ---------------------------------------------------------------------------------------------
# Files


def checkpoint_file(output, name):
    """Path of the weights of a run's best epoch."""
    return Path(output, "checkpoints", f"{name}.pt")


def write_file(path, write):
    """Call write(other path), then rename: `path` is what was there or all that is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    write(unfinished)
    os.replace(unfinished, path)


def write_json(path, content):
    """Write a dict as JSON, whole or not at all."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_file(Path(path), lambda unfinished: unfinished.write_text(text))


def read_runs(output):
    """All finished runs under output/runs: name -> content of the JSON, sorted by name."""
    paths = sorted(Path(output, "runs").glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def save_run(kind, run, splits, model, history, failed, seconds=0.0, **more):
    """Write the checkpoint, then the run's JSON: the JSON's presence means finished.

    model: the whole network with its best weights; seconds: of what was computed before training;
    more: further keys of the JSON. Of the processes of torchrun only the first writes.
    """
    if processes()[0] > 0:
        return
    config, classes = vars(run), splits[0].classes
    digest, best = None, max(history, key=merit, default=None)
    file, device = checkpoint_file(run.output, run.name), next(model.parameters()).device
    if failed:
        more["failed"], best = failed, None
        print(f"failed: {failed}")
    else:
        checkpoint = {"state": {key: value.cpu() for key, value in model.state_dict().items()}}
        checkpoint |= {"config": config, "kind": kind, "name": run.name, "classes": classes}
        write_file(file, partial(torch.save, checkpoint))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        print(f"best validation accuracy {best['validation_accuracy']:.1%}")
    counts = [torch.bincount(split.labels, minlength=len(classes)).tolist() for split in splits]
    training_seconds = sum(row["seconds"] for row in history)
    content = {
        "name": run.name,
        "kind": kind,
        "config": config,
        "data": {
            "fingerprint": run.photos,
            "classes": classes,
            "counts": dict(zip(("train", "validation"), counts, strict=True)),
        },
        "environment": {
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "precision": str(product_dtype(device, run.precision)),
        },
        "model": {"name": network_of(run.name), **models.counts(model)},
        "history": history,
        "best": best,
        "seconds": training_seconds + seconds,
        "images_per_second": len(splits[0].labels) * len(history) / max(training_seconds, 1e-9),
        "checkpoint_sha256": digest,
        **more,
    }
    write_json(Path(run.output, "runs", f"{run.name}.json"), content)
    file.with_suffix(f".{run.photos}").unlink(missing_ok=True)
