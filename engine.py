"""One training loop, and what a run leaves behind. train_scratch.py and finetune.py use it.

A run is one combination of settings with one seed. Every random number of it is a function of the
seed and the epoch, so a run that was interrupted goes on from its last stored epoch and ends where
it would have ended.
"""

import argparse
import atexit
import contextlib
import ctypes
import gc
import hashlib
import io
import itertools
import math
import os
import platform
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from common import atomic_file, cpu_count, lock, number, read_json, read_runs, run_name, write_json

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import models

# Flags in which two calls of the same run may differ: where and how fast it happens. Other threads
# round differently, no more.
PLACE_FLAGS = (
    "data",
    "output",
    "cache",
    "device",
    "threads",
    "name",
    "best_of_grid",
    "checkpoint_seconds",
    "feature_memory",
)
# Flags that the prefix of a run's name spells out; others appear in it if not at their default.
PREFIX_FLAGS = ("model", "backbone", "unfreeze_convolutions")
# Flags that take several values, so their defaults are lists; each combination is a run. They are
# also what the runs of one network's grid and its dropout variants differ in.
PLURAL_FLAGS = ("seed", "batch_size", "dropout", "learning_rate")
EVALUATION_BATCH = 64


# ---------------------------------------------------------------------------------------------
# Flags and runs


def add_training_flags(parser):
    """The flags that both training scripts share with the same defaults."""
    flag = parser.add_argument
    flag("--name", type=run_name, help="name of the run; default: made from its settings")
    flag("--epochs", type=number(int, 1), default=50, help="times each photo is seen")
    flag("--batch-size", type=number(int, 1), nargs="+", default=[64], help="photos per step")
    flag("--train-photos", type=number(int, 0), default=0, help="most photos of a class; 0: all")
    flag("--seed", type=number(int, 0, 2**31), nargs="+", default=[0], help="random seed")
    flag("--best-of-grid", action="store_true", help="take rate and batch size of the best run")
    flag(
        "--schedule",
        choices=("linear", "constant"),
        default="linear",
        help="of the learning rate after the warm-up",
    )
    flag(
        "--warmup-epochs",
        type=number(float, 0),
        default=2.0,
        help="of linear rise of the learning rate",
    )
    flag("--label-smoothing", type=number(float, 0, 1), default=0.1, help="of the cross-entropy")
    flag(
        "--precision",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of matrix products",
    )
    flag("--threads", type=number(int, 1), default=cpu_count(), help="of the CPU; affect rounding")
    flag("--deterministic", action="store_true", help="the same numbers again on a GPU; slower")
    flag("--checkpoint-seconds", type=number(float, 0), default=30.0, help="between stored states")


class Photos(NamedTuple):
    """What training sees. description: classes, counts, fingerprint, as in a run's JSON."""

    train: data.Split
    validation: data.Split
    description: dict


def load_photos(arguments, device):
    """Decode the training and validation photos, or find them decoded; return Photos.

    They go to the device here, once for all runs, if they fit.
    """
    splits = []
    for name in ("train", "validation"):
        split = data.load_split(arguments.data, name, arguments.image_size, arguments.cache)
        splits.append(split._replace(images=data.on_device(split.images, device)))
    train, validation = splits
    classes, files, ignored = data.list_photos(arguments.data)
    counts = {split: data.count_photos(files[split]) for split in files}
    unread = [f"{split}/{name}" for split in ignored for name in ignored[split]]
    if unread:
        print(f"{arguments.data}: not read, since no photos: {len(unread)}, such as {unread[0]}")
    fingerprint = f"{train.fingerprint[:16]}-{validation.fingerprint[:16]}"
    description = {"fingerprint": fingerprint, "classes": classes, "counts": counts}
    return Photos(train, validation, description)


def photos_of_run(photos, run):
    """The Photos of a run: those of --train-photos, or all."""
    if not run.train_photos:
        return photos
    train = data.take_photos(photos.train, run.train_photos, run.seed)
    counts = {**photos.description["counts"], "train": data.count_photos(train.files)}
    return photos._replace(train=train, description={**photos.description, "counts": counts})


def combinations(arguments):
    """A list with an argparse.Namespace for each combination of the plural flags."""
    values, runs = [getattr(arguments, flag) for flag in PLURAL_FLAGS], []
    for chosen in itertools.product(*values):
        run = argparse.Namespace(**vars(arguments))
        for flag, value in zip(PLURAL_FLAGS, chosen, strict=True):
            setattr(run, flag, value)
        runs.append(run)
    return runs


def unfinished_runs(parser, arguments, prefix, photos):
    """Yield an argparse.Namespace for each combination of the plural flags that is not finished.

    It has one value where `arguments` has several, and the run's name; `prefix` is what the name
    begins with. While a run is in use no other process trains it, but for those of one torchrun,
    which train it together.
    """
    rank, _ = data.processes()
    runs = combinations(arguments)
    if arguments.name and len(runs) > 1:
        raise SystemExit(f"--name {arguments.name}: of {len(runs)} runs; name one only.")
    for run in runs:
        run.name = arguments.name or make_name(parser, run, prefix)
        path = Path(run.output, ".locks", run.name)
        holding = lock(path) if rank == 0 else contextlib.nullcontext(True)
        with holding as mine:
            if not mine:
                why_not = "another process is training it, left alone"
            else:
                why_not = why_finished(run, photos)
            why_not = of_first_process(why_not)
            if why_not:
                print(f"{run.name}: {why_not}")
            else:
                yield run


def make_name(parser, run, prefix):
    """Build a run's name: prefix, what the grid varies, then what is not at its default."""
    name = f"{prefix}-lr{run.learning_rate:g}-bs{run.batch_size}"
    if [run.dropout] != parser.get_default("dropout"):
        name += f"-dropout{run.dropout:g}"
    name += f"-seed{run.seed}"
    for key, value in vars(run).items():
        if key in PLACE_FLAGS + PREFIX_FLAGS + PLURAL_FLAGS or value == parser.get_default(key):
            continue
        text = f"{value:g}" if isinstance(value, float) else re.sub(r"[^\w.]+", "_", str(value))
        name += f"-{key.replace('_', '')}{text}"
    if len(name) > 200:
        raise SystemExit(f"{name}: too long for the name of a file, give another with --name")
    return name


def settings(config, without=()):
    """The part of a run's config that decides its result: a dict of flag to value."""
    left_out = (*PLACE_FLAGS, *without)
    return {key: value for key, value in config.items() if key not in left_out}


def differing_flags(config, other, without=()):
    """Flags that decide the result of a run, as they are typed, in which two configs differ."""
    ours, theirs = settings(config, without), settings(other, without)
    different = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    return sorted(key.replace("_", "-") for key in different)


def why_finished(run, photos):
    """What to say of this run if output/ holds it, with these settings, of these photos, or None.

    Exits with one line if its name is taken by a run with others: nothing finished is overwritten.
    """
    path = Path(run.output, "runs", f"{run.name}.json")
    if not path.exists():
        return None
    stored = read_json(path, "config", "data", "best")
    other = differing_flags(vars(run), stored["config"])
    if stored["data"]["fingerprint"] != photos.description["fingerprint"]:
        other.append("photos")
    if other:
        raise SystemExit(
            f"{path} is a run with other {', '.join(other)}: give another "
            "--output (OUT of run_all.sh) or --name, or delete it."
        )
    if "failed" in stored:
        return f"failed before, {stored['failed']}; delete {path} to try it again"
    if checkpoint_file(run.output, run.name).exists():
        return "finished before with the same settings and photos"
    return None


def setting_of(stored):
    """(learning rate, batch size) of a run's JSON: what a grid varies besides the seed."""
    return stored["config"]["learning_rate"], stored["config"]["batch_size"]


def choosing_seeds(runs):
    """The seeds that every setting (learning rate, batch size) has; all if none has all settings.

    runs: a non-empty list of contents of runs' JSON. Seeds that only repeat what was chosen have no
    say in the choice: their mean is free of the optimism of having been chosen.
    """
    seeds = {}
    for stored in runs:
        seeds.setdefault(setting_of(stored), set()).add(stored["config"]["seed"])
    shared = set.intersection(*seeds.values())
    return shared if shared else set.union(*seeds.values())


def best_setting(runs):
    """Choose (learning rate, batch size) by best validation accuracy, mean over choosing_seeds().

    Ties are broken by the lower validation loss. runs: a non-empty list of contents of runs' JSON;
    a setting of which a run has failed is not chosen unless all have.
    """
    groups, seeds = {}, choosing_seeds(runs)
    for stored in runs:
        if stored["config"]["seed"] in seeds:
            groups.setdefault(setting_of(stored), []).append(stored["best"])

    def merit(key):
        bests = groups[key]
        if None in bests:
            return -1.0, 0.0
        accuracy = sum(best["validation_accuracy"] for best in bests) / len(bests)
        return accuracy, -sum(best["validation_loss"] for best in bests) / len(bests)

    return max(sorted(groups), key=merit)


def take_best_of_grid(parser, arguments, photos):
    """A copy of `arguments` with the learning rate and batch size that the finished grid chose.

    The grid: the runs in output/ that have the settings of `arguments` but for what a grid varies,
    with the dropout that is the default, on all training photos.
    """
    vary = (*PLURAL_FLAGS, "train_photos")
    wanted = settings(vars(arguments), vary)
    grid = [
        stored
        for stored in read_runs(arguments.output).values()
        if settings(stored["config"], vary) == wanted
        and not stored["config"]["train_photos"]
        and [stored["config"]["dropout"]] == parser.get_default("dropout")
        and stored["data"]["fingerprint"] == photos.description["fingerprint"]
    ]
    if not grid:
        raise SystemExit(
            f"--best-of-grid: {arguments.output} has no finished run of this network with these "
            "settings."
        )
    learning_rate, batch_size = of_first_process(best_setting(grid))
    best = argparse.Namespace(**vars(arguments))
    best.learning_rate, best.batch_size = [learning_rate], [batch_size]
    return best


# ---------------------------------------------------------------------------------------------
# Device and precision


def set_up(arguments):
    """Threads, memory and, under torchrun, group of this process; return its torch.device."""
    torch.set_num_threads(arguments.threads)
    if arguments.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    reuse_memory()
    device = pick_device(arguments.device)
    if "LOCAL_RANK" in os.environ:  # torchrun has started this process, and others
        device = join_processes(device, arguments.threads)
    return device


def join_processes(device, threads):
    """Take a place among the processes of torchrun -> the torch.device of this one."""
    local_rank, local_count = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device.type not in ("cpu", "cuda"):
        raise SystemExit(
            f"torchrun: processes can't exchange gradients on {device.type}: --device cpu."
        )
    torch.set_num_threads(max(1, threads // local_count))
    if device.type == "cuda":
        if local_count > torch.cuda.device_count():
            raise SystemExit(f"torchrun: {local_count} processes need as many GPUs.")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # Named, since torch 2.6 knows no default on a Mac (pytorch issue 149537).
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    atexit.register(leave_processes)
    if dist.get_rank() > 0:  # one process speaks for all; errors go to stderr
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, open to the end
    return device


def leave_processes():
    """End the group's threads while Python still runs: they hold tensors.

    A network that has been trained, which waits for the garbage collector, would keep them alive.
    """
    gc.collect()
    dist.destroy_process_group()


def synchronise(device):
    """Wait until the device has done what it was given: before its time is taken."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def of_first_process(value):
    """`value` of the first process of torchrun, in all of them."""
    values, (_, count) = [value], data.processes()
    if count > 1:
        with together():
            dist.broadcast_object_list(values)
    return values[0]


@contextlib.contextmanager
def together():
    """Around what the processes of torchrun exchange: one line if another of them has ended."""
    try:
        yield
    except RuntimeError as error:  # gloo has no type of its own for it
        _, count = data.processes()
        if count == 1 or not re.search("gloo|NCCL|onnection|peer", str(error)):
            raise
        raise SystemExit(
            f"a process of this torchrun has ended ({str(error).splitlines()[0]}). Start again to "
            "go on from the last stored epoch."
        ) from None


def pick_device(name):
    """torch.device for `auto`, `cpu`, `cuda`, `cuda:1` or `mps`; exits if it is not there."""
    if name == "auto":
        found = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if found else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise SystemExit(f"--device {name}: not available here ({reason})") from None
    return device


def reuse_memory():
    """Make the C library keep freed memory for the next step, as the GPU's allocator does.

    Left alone glibc returns each large tensor to the system and gets it back zeroed, page by page:
    a sixth of a training step on the CPU. Elsewhere this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no memory outside the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the heap


def product_dtype(device, precision):
    """The dtype of products. `auto` is bfloat16 where the hardware multiplies in it."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # A CPU without these instructions emulates bfloat16, slower than float32. torch 2.6
            # has no public way to ask; get_capabilities() came later.
            probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
            native = device.type == "cpu" and probe is not None and probe()
        precision = "bfloat16" if native else "float32"
    return getattr(torch, precision)


def autocast(device, precision):
    """The context of the forward pass, see product_dtype()."""
    dtype = product_dtype(device, precision)
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


# ---------------------------------------------------------------------------------------------
# Optimizers and schedule


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is made (nearly) orthogonal: for matrices and kernels.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. A kernel
    [out, in, k, k] counts as the matrix [out, k * k * in]. Decoupled weight decay. dtype: of the
    products. The learning rate may be a tensor. The foreach functions do for all matrices in one
    launch what would take one for each; torch's own optimizers use them, and there are no public
    ones (torch 2.6 to 2.14).
    """

    def __init__(self, parameters, lr, weight_decay, dtype, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights, momentum = group["params"], group["momentum"]
            gradients = [weight.grad for weight in weights]
            for weight in weights:
                if "average" not in self.state[weight]:
                    self.state[weight]["average"] = torch.zeros_like(weight)
            averages = [self.state[weight]["average"] for weight in weights]
            torch._foreach_lerp_(averages, gradients, 1 - momentum)
            updates = torch._foreach_lerp(gradients, averages, momentum)  # Nesterov
            learning_rate = torch.as_tensor(group["lr"], device=weights[0].device)
            torch._foreach_mul_(weights, 1 - learning_rate * group["weight_decay"])
            for weight, update in zip(weights, updates, strict=True):
                if update.ndim == 4:  # in channels_last order, where flattening copies nothing
                    update = update.permute(0, 2, 3, 1)
                matrix = update.flatten(1)
                scale = max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
                update = orthogonalise(matrix, self.dtype).view(update.shape)
                if update.ndim == 4:
                    update = update.permute(0, 3, 1, 2)
                weight.addcmul_(update, learning_rate, value=-scale)


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


def build_optimizers(model, run):
    """A list of optimizers for what is not frozen in `model`, whose last layer is registered last.

    With --optimizer muon Muon takes all matrices and kernels but those of the last layer, AdamW the
    rest at a tenth of the learning rate and a weight decay of 0.01. Otherwise, or where nothing is
    left for Muon, AdamW takes all, at the learning rate and weight decay given. Biases and batch
    norm are not decayed.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    last = [parameter for parameter in trained if parameter.ndim > 1][-1]  # registered last
    of_muon, of_adamw, vectors = [], [], []
    for parameter in trained:
        if parameter.ndim <= 1:
            vectors.append(parameter)
        elif run.optimizer == "muon" and parameter is not last:
            of_muon.append(parameter)
        else:
            of_adamw.append(parameter)
    optimizers, adamw_rate, adamw_decay = [], run.learning_rate, run.weight_decay
    if of_muon:
        dtype = product_dtype(trained[0].device, run.precision)
        muon = Muon(of_muon, lr=run.learning_rate, weight_decay=run.weight_decay, dtype=dtype)
        optimizers, adamw_rate, adamw_decay = [muon], run.learning_rate / 10, 0.01
    groups = [
        {"params": of_adamw, "weight_decay": adamw_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizers.append(torch.optim.AdamW(groups, lr=adamw_rate, fused=True))
    for group in parameter_groups(optimizers):
        group["highest_lr"] = group["lr"]
    return optimizers


def parameter_groups(optimizers):
    """All parameter groups, dicts, of a list of optimizers."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def set_learning_rates(optimizers, factor):
    """Every learning rate becomes `factor`, float [] on the device, times its highest value."""
    for group in parameter_groups(optimizers):
        group["lr"] = group["highest_lr"] * factor


def learning_rate_factor(epoch, epochs, warmup, schedule):
    """Linear rise over `warmup` epochs, then linear fall to zero, or none; `epoch` is a float."""
    warmup = min(warmup, epochs / 2)
    if epoch < warmup:
        return epoch / warmup
    return 1.0 if schedule == "constant" else (epochs - epoch) / (epochs - warmup)


# ---------------------------------------------------------------------------------------------
# Training


def draw_squares(steps, probability, image_size, device):
    """Draw for each step whether CutMix is used, and on which square -> a list, one for each step.

    With `probability` it is int64 [4] on the device: first row, row after the last, first column,
    column after the last. Otherwise it is None.
    """
    happens, kept, x, y = torch.rand(steps, 4).unbind(1)  # uniform in [0, 1), float32 [steps]
    side = (image_size * (1 - kept).sqrt()).long()
    top = (y * (image_size - side + 1)).long()
    left = (x * (image_size - side + 1)).long()
    squares = torch.stack([top, top + side, left, left + side], 1).to(device)
    mixed = (happens < probability).tolist()
    return [square if mix else None for square, mix in zip(squares, mixed, strict=True)]


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


def logit_shift(photos, strength):
    """What is added to the logits in the training loss, float32 [classes]; `strength` 0: nothing.

    The logarithm of how much larger a class's share is among the training than among the validation
    photos: without it a network expects rare classes to be as rare as in training. Zero where the
    shares are the same. Menon et al., "Long-tail learning via logit adjustment", ICLR 2021.
    """
    shares = []
    for split in (photos.train, photos.validation):
        counts = torch.bincount(split.labels, minlength=len(split.classes))
        shares.append(counts / counts.sum())
    return strength * (shares[0] / shares[1]).log()


def sam_epochs(config):
    """How many of the epochs of a run with this config, the last ones, are trained by SAM."""
    if not config.get("sam_radius"):  # fine-tuning has none
        return 0
    return round(config["epochs"] * config["sam_share"])


@torch.no_grad()
def climb(parameters, radius):
    """Move the parameters, in place, to where the loss is highest within `radius`.

    To first order, by their gradients; radius is the norm of all moves together. Returns the moves,
    a tensor for each. For the foreach functions see Muon. Foret et al., "Sharpness-aware
    minimization" (SAM), ICLR 2021.
    """
    gradients = [parameter.grad for parameter in parameters]
    scale = radius / (nn.utils.get_total_norm(gradients) + 1e-12)
    moves = torch._foreach_mul(gradients, scale)
    torch._foreach_add_(parameters, moves)
    return moves


def train_step(model, optimizers, inputs, targets, shift, weight, radius, label_smoothing, context):
    """One step -> loss, float [], and logits, float [B, classes], both on the device.

    inputs: float [B, ...], targets: float [B, classes], probabilities, shift: float [classes], see
    logit_shift(). The host reads none of them, so that no step waits for the one before it, and a
    CUDA graph could capture it once AdamW is `capturable` (benchmarks/step.py). weight: of the
    loss, a number, 1 in a single process. radius: of climb(), a number, 0 for none. With one there
    are two passes: the loss and the logits returned are those of the first; the second draws its
    own dropout, and batch norm's statistics take in both. context: of the forward pass, see
    autocast().
    """

    def compute_gradients():
        with context:
            logits = model(inputs)
        logits = logits.float()
        loss = F.cross_entropy(logits + shift, targets, label_smoothing=label_smoothing)
        model.zero_grad()
        (loss * weight).backward()
        return loss.detach(), logits.detach()

    loss, logits = compute_gradients()
    if radius:  # gradients of where the loss is highest, for a step from where we were
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        moves = climb(trained, radius)
        compute_gradients()
        with torch.no_grad():
            torch._foreach_sub_(trained, moves)
    for optimizer in optimizers:
        optimizer.step()
    return loss, logits


def train_one_epoch(model, loader, optimizers, epoch, shift, run, context):
    """Train on every photo once; return mean loss and accuracy as the network saw them, floats.

    Both are of distorted photos. The loss has label smoothing, CutMix and `shift` in it, unlike
    that of validate(); the accuracy counts the label of the photo that another was pasted into.
    Sums stay on the device and are read once, at the end.
    """
    rank, count = data.processes()
    seed = run.seed * 1_000_003 + epoch  # large and odd: seeds and epochs give numbers of their own
    torch.manual_seed(seed)  # of CutMix, the same in all processes, and of dropout
    squares = [None] * len(loader)
    probability = getattr(run, "cutmix", 0)  # features of a frozen part can't be mixed
    if probability:
        squares = draw_squares(len(loader), probability, run.image_size, loader.device)
    if rank > 0:
        torch.manual_seed(seed + 7_368_787 * rank)
    factors = []  # of the learning rates, at points within the epoch: no step has rate zero
    for step in range(len(loader)):
        now = epoch + (step + 1) / (len(loader) + 1)
        factors.append(learning_rate_factor(now, run.epochs, run.warmup_epochs, run.schedule))
    factors = torch.tensor(factors, device=loader.device)
    radius = 0
    if epoch >= run.epochs - sam_epochs(vars(run)):
        radius = run.sam_radius
    sizes = [len(batch) for batch in loader.labels.tensor_split(len(loader))]  # of all processes
    loader.set_epoch(epoch)
    model.train()
    loss_sum = torch.zeros((), device=loader.device)
    correct = torch.zeros((), device=loader.device)
    steps = zip(loader, squares, factors, sizes, strict=True)
    for (inputs, labels), square, factor, size in steps:
        # The mean over processes that DistributedDataParallel takes becomes that over photos.
        weight = len(labels) * count / size
        targets = F.one_hot(labels, num_classes=len(shift)).float()
        if square is not None:
            inputs, targets = cutmix(inputs, targets, square)
        set_learning_rates(optimizers, factor)
        loss, logits = train_step(
            model, optimizers, inputs, targets, shift, weight, radius, run.label_smoothing, context
        )
        loss_sum += loss * len(labels)
        correct += (logits.argmax(1) == labels).sum()
    return means(loss_sum, correct, loader)


@torch.no_grad()
def validate(model, loader, context):
    """Mean cross-entropy and accuracy over a loader, floats."""
    model.eval()
    loss_sum = torch.zeros((), device=loader.device)
    correct = torch.zeros((), device=loader.device)
    for inputs, labels in loader:
        with context:
            logits = model(inputs)
        logits = logits.float()
        loss_sum += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return means(loss_sum, correct, loader)


def means(loss_sum, correct, loader):
    """[mean loss, accuracy] over all photos of a loader, floats.

    loss_sum, correct: float [], the sums of this process.
    """
    sums = torch.stack([loss_sum, correct]).cpu().double()
    _, count = data.processes()
    if count > 1:
        dist.all_reduce(sums)
    return (sums / len(loader.labels)).tolist()


class Result(NamedTuple):
    """What fit() returns. best, best_state (tensors on the CPU): None if the run failed."""

    history: list  # a dict for each epoch
    best: dict | None  # epoch, validation_accuracy, validation_loss
    best_state: dict | None
    seconds: float
    failed: str | None  # why the run ended before its last epoch


def fit(model, train_loader, validation_loader, run, photos):
    """Train `model` for run.epochs, from the stored state of the run if there is one -> Result.

    The best epoch has the highest validation accuracy, the lower loss on ties. The loaders yield
    inputs that `model` takes: photos, or features of its frozen part. run: flags; CutMix, SAM and
    logit adjustment count as off where a script has no flag for them. photos: the Photos of the
    run. Exits with one line if batches are too small.
    """
    rank, count = data.processes()
    device = train_loader.device
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    trains_norms = any(norm.weight.requires_grad for norm in norms)
    smallest = len(train_loader.labels) // (len(train_loader) * count)  # of a process's batches
    if smallest < 1 or (trains_norms and smallest < 2):
        raise SystemExit(
            "every process needs a photo in each step, two where batch norm is trained: a larger "
            "--batch-size"
        )
    context = autocast(device, run.precision)
    optimizers = build_optimizers(model, run)
    shift = logit_shift(photos, getattr(run, "logit_adjustment", 0)).to(device)
    file = checkpoint_file(run.output, run.name).with_suffix(".unfinished")
    versions = [str(torch.__version__), str(product_dtype(device, run.precision))]
    belongs_to = [settings(vars(run)), photos.description["fingerprint"], str(model), *versions]
    stored = of_first_process(read_state(file, belongs_to) if rank == 0 else None)
    history, best, best_state, seconds = [], None, None, 0.0
    if stored is not None:
        history, best, best_state = stored["history"], stored["best"], stored["best_state"]
        seconds = stored["seconds"]
        model.load_state_dict(stored["model"])
        for optimizer, state in zip(optimizers, stored["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        print(f"{run.name}: goes on after epoch {len(history)}")
    network = over_processes(model, device) if count > 1 else model
    written = time.perf_counter()
    for epoch in range(len(history), run.epochs):
        begin = time.perf_counter()
        with together():
            train_loss, train_accuracy = train_one_epoch(
                network, train_loader, optimizers, epoch, shift, run, context
            )
            loss, accuracy = validate(network, validation_loader, context)
        took = time.perf_counter() - begin
        seconds += took
        if not (math.isfinite(train_loss) and math.isfinite(loss)):
            where = f"epoch {epoch + 1}, learning rate {run.learning_rate:g}"
            return Result(history, None, None, seconds, f"the loss is not finite in {where}")
        history.append(
            {
                "epoch": epoch + 1,
                "learning_rate": float(optimizers[0].param_groups[0]["lr"]),
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "validation_loss": loss,
                "validation_accuracy": accuracy,
                "seconds": took,
            }
        )
        top = max(history, key=lambda row: (row["validation_accuracy"], -row["validation_loss"]))
        if top["epoch"] == epoch + 1:  # of equal ones max() takes the first
            best = {"epoch": epoch + 1, "validation_accuracy": accuracy, "validation_loss": loss}
            best_state = {
                key: tensor.detach().to("cpu", copy=True)
                for key, tensor in model.state_dict().items()
            }
        print_progress(run, history, len(train_loader.labels))
        due = time.perf_counter() - written >= run.checkpoint_seconds
        if due and rank == 0 and epoch + 1 < run.epochs:
            state = {
                "belongs_to": belongs_to,
                "history": history,
                "best": best,
                "best_state": best_state,
                "seconds": seconds,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            write_state(file, state)
            written = time.perf_counter()
    return Result(history, best, best_state, seconds, None)


def over_processes(model, device):
    """`model` as DistributedDataParallel: gradients are averaged over the processes of torchrun.

    Batch norm sees the whole batch on GPUs. For CPUs torch has no such batch norm: there each
    process norms its own share, and the first one's statistics are kept.
    """
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with together():
        return DistributedDataParallel(model)


def print_progress(run, history, photo_count):
    """One line on a terminal, rewritten each epoch; about ten lines in a log file."""
    epoch, last, terminal = len(history), history[-1], sys.stdout.isatty()
    if not terminal and epoch % max(1, run.epochs // 10) and epoch != run.epochs:
        return
    first, to_come = run.epochs - sam_epochs(vars(run)), run.epochs - epoch
    if epoch <= first:  # those by SAM, still to come, have two passes
        to_come = first - epoch + 2 * (run.epochs - first)
    text = (
        f"{run.name}  epoch {epoch}/{run.epochs}  train {last['train_loss']:.3f} "
        f"{last['train_accuracy']:.1%}  validation {last['validation_loss']:.3f} "
        f"{last['validation_accuracy']:.1%}  {photo_count / last['seconds']:,.0f} images/s  "
        f"{last['seconds'] * to_come:.0f} s left"
    )
    print(text, end="\n" if not terminal or epoch == run.epochs else "\x1b[K\r", flush=True)


# ---------------------------------------------------------------------------------------------
# Files


def checkpoint_file(output, name):
    """Path of the weights of a run's best epoch."""
    return Path(output, "checkpoints", f"{name}.pt")


def serialise(content):
    """What torch.save writes, bytes, and the sha256 of that, hexadecimal."""
    buffer = io.BytesIO()  # torch.save would turn a full disk into an error of its own
    torch.save(content, buffer)
    return buffer.getvalue(), hashlib.sha256(buffer.getbuffer()).hexdigest()


def write_state(path, state):
    """Store an unfinished run: the sha256 of what follows, a line feed, what torch.save writes."""
    written, digest = serialise(state)
    with atomic_file(path) as file:
        file.write(digest.encode() + b"\n" + written)


def read_state(path, belongs_to):
    """What write_state() stored, None if nothing; says so if it is damaged or of another run."""
    if not path.exists():
        return None
    digest, _, written = path.read_bytes().partition(b"\n")
    if hashlib.sha256(written).hexdigest().encode() != digest:
        print(f"{path} is damaged and not used: the run begins again")
        return None
    state = torch.load(io.BytesIO(written), map_location="cpu", weights_only=True)
    if state["belongs_to"] != belongs_to:
        print(f"{path} is of other settings, photos, network, precision or torch: begun again")
        return None
    return state


def save_run(kind, run, photos, model, result, **more):
    """Write the checkpoint, then the run's JSON: the JSON's presence means finished.

    model: the whole network, result.best_state its state dict. more: further keys of the JSON. Of
    the processes of one torchrun only the first writes.
    """
    rank, _ = data.processes()
    if rank > 0:
        return
    config = vars(run)
    path = checkpoint_file(run.output, run.name)
    digest = None
    if result.failed is None:
        checkpoint = {
            "state": result.best_state,
            "config": config,
            "kind": kind,
            "name": run.name,
            "classes": photos.train.classes,
        }
        written, digest = serialise(checkpoint)
        with atomic_file(path) as file:
            file.write(written)
    training = sum(epoch["seconds"] for epoch in result.history)
    content = {
        "name": run.name,
        "kind": kind,
        "config": config,
        "data": photos.description,
        "environment": environment(run.device, run.precision),
        "model": {"name": getattr(run, "model", None) or run.backbone, **models.counts(model)},
        "history": result.history,
        "best": result.best,
        "seconds": result.seconds,
        "images_per_second": len(photos.train.labels) * len(result.history) / max(training, 1e-9),
        "checkpoint_sha256": digest,
        **more,
    }
    if result.failed is not None:
        content["failed"] = result.failed
    write_json(Path(run.output, "runs", f"{run.name}.json"), content)
    path.with_suffix(".unfinished").unlink(missing_ok=True)
    if result.failed is not None:
        print(f"{run.name}: failed, {result.failed}")
    else:
        print(
            f"{run.name}: best validation accuracy {result.best['validation_accuracy']:.1%} in "
            f"epoch {result.best['epoch']}, {result.seconds:.0f} s{study_progress(run.output)}"
        )


def study_progress(output):
    """How far run_all.sh has come, ", run 7 of 37, 12 minutes left"; empty outside of it."""
    if "STUDY_RUNS" not in os.environ:
        return ""
    total = int(os.environ["STUDY_RUNS"])
    begun = float(os.environ["STUDY_START"])
    finished = [path.stat().st_mtime for path in Path(output, "runs").glob("*.json")]
    here = max(1, sum(moment >= begun for moment in finished))
    number_of_run = min(total, len(finished))
    minutes = (time.time() - begun) / here * (total - number_of_run) / 60
    return f", run {number_of_run} of {total}, {minutes:.0f} minutes left"


def environment(device, precision):
    """Versions, the name of the device, its precision and the date, for the run's JSON."""
    device = pick_device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "device": f"{device.type} {name}",
        "precision": str(product_dtype(device, precision)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "processes": data.processes()[1],
    }
