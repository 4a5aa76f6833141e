"""Train a CNN from scratch on a folder of photos. finetune.py uses the same loop.

    python train_scratch.py --data food11 --model residual
    python train_scratch.py --data food11 --model plain --learning-rate 0.02 --batch-size 64
    python train_scratch.py --data food11 --model plain --best-of-grid --dropout 0.3

Writes results/runs/NAME.json and results/checkpoints/NAME.pt once the last epoch is done.
It opens the photos of train/ and validation/ only.
"""

import contextlib
import ctypes
import io
import math
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import models
import optimizers
import runs

MEMORY_FORMAT = torch.channels_last


def build_parser():
    parser = runs.Parser(__doc__)
    parser.add_argument("--model", choices=tuple(models.SCRATCH), default="plain", help="network")
    runs.add_training_flags(
        parser,
        image_size=96,
        batch_size=64,
        learning_rate=0.02,
        optimizer="muon",
        weight_decay=0.3,
        dropout=0.0,
        **runs.SCRATCH_AUGMENTATION,
    )
    parser.add_argument("--cutmix", type=runs.number(float, 0, 1), default=0.5,
                        help="probability that a batch is mixed by CutMix")  # fmt: skip
    parser.add_argument("--best-of-grid", action="store_true", help="take learning rate and batch "
                        "size from the best finished run of this model in --output")  # fmt: skip
    return parser


def pick_device(name):
    """torch.device for `auto`, `cpu`, `cuda`, `cuda:1` or `mps`; exits if it is not there."""
    if name == "auto":
        found = torch.accelerator.is_available()
        return torch.accelerator.current_accelerator() if found else torch.device("cpu")
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


def autocast(device, precision):
    """The context of the forward pass. `auto` is bfloat16 where the hardware multiplies in it."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # a CPU without these instructions emulates bfloat16, slower than float32
            probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
            native = device.type == "cpu" and probe is not None and probe()
        precision = "bfloat16" if native else "float32"
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def cutmix(images, labels, probability, generator):
    """With `probability`, paste a random square of one photo of the batch into another.

    Returns (images, other labels int64 [B], share of the pixels that kept their own label). Yun
    et al., ICCV 2019. One square per batch: nothing here waits for the device.
    """
    happens, share, x, y = torch.rand(4, generator=generator).tolist()
    if happens >= probability:
        return images, labels, 1.0
    size = images.shape[-1]
    side = int(size * math.sqrt(1 - share))
    rows = slice(int(y * (size - side + 1)), int(y * (size - side + 1)) + side)
    columns = slice(int(x * (size - side + 1)), int(x * (size - side + 1)) + side)
    partner = images.roll(1, 0)  # the order is shuffled anyway
    images[:, :, rows, columns] = partner[:, :, rows, columns]
    return images, labels.roll(1, 0), 1 - (side / size) ** 2


@torch.no_grad()
def validate(model, loader, context):
    """Mean cross-entropy and accuracy over a loader, floats."""
    model.eval()
    loss = correct = 0
    for inputs, labels in loader:
        with context:
            logits = model(inputs.contiguous(memory_format=memory_format(inputs))).float()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    total = len(loader.labels)
    return float(loss) / total, float(correct) / total


def memory_format(tensor):
    return MEMORY_FORMAT if tensor.ndim == 4 else torch.contiguous_format


def fit(model, train_loader, validation_loader, config, device, name):
    """Train; return (history, best, state dict of the best epoch on the CPU).

    The best epoch has the highest validation accuracy, the lower loss on ties. The loaders yield
    inputs that `model` takes: photos, or features of its frozen part. Losses and hits are summed
    on the device and read once an epoch.
    """
    context = autocast(device, config["precision"])
    every = optimizers.build_optimizers(model, config)
    groups = [group for optimizer in every for group in optimizer.param_groups]
    highest = [group["lr"] for group in groups]
    generator = torch.Generator().manual_seed(config["seed"])
    epochs, steps, total = config["epochs"], len(train_loader), len(train_loader.labels)
    history, best_key, start = [], (-1.0, 0.0), time.perf_counter()
    for epoch in range(epochs):
        epoch_start = time.perf_counter()
        model.train()
        loss_sum = correct = torch.zeros((), device=device)
        for step, (inputs, labels) in enumerate(train_loader):
            now = epoch + (step + 1) / (steps + 1)
            factor = optimizers.learning_rate_factor(now, epochs, config["warmup_epochs"])
            for group, rate in zip(groups, highest, strict=True):
                group["lr"] = rate * factor
            other, share = labels, 1.0
            if config.get("cutmix"):
                inputs, other, share = cutmix(inputs, labels, config["cutmix"], generator)
            with context:
                logits = model(inputs.contiguous(memory_format=memory_format(inputs))).float()
            smoothing = config["label_smoothing"]
            loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
            if share < 1:
                mixed = F.cross_entropy(logits, other, label_smoothing=smoothing)
                loss = share * loss + (1 - share) * mixed
            model.zero_grad()
            loss.backward()
            for optimizer in every:
                optimizer.step()
            loss_sum = loss_sum + loss.detach() * len(labels)
            correct = correct + (logits.detach().argmax(1) == labels).sum()
        train_loss, train_accuracy = float(loss_sum) / total, float(correct) / total
        validation_loss, validation_accuracy = validate(model, validation_loader, context)
        history.append({
            "epoch": epoch + 1,
            "learning_rate": config["learning_rate"] * factor,
            "train_loss": finite(train_loss),
            "train_accuracy": train_accuracy,
            "validation_loss": finite(validation_loss),
            "validation_accuracy": validation_accuracy,
            "seconds": time.perf_counter() - epoch_start,
        })  # fmt: skip
        key = (validation_accuracy, -validation_loss)
        if key > best_key:
            best_key = key
            best = {k: history[-1][k] for k in ("epoch", "validation_accuracy", "validation_loss")}
            best_state = {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}
        progress(name, history, epochs, total, time.perf_counter() - start)
    return history, best, best_state


def finite(loss):
    """A loss for JSON, which has no infinity: None once training has diverged."""
    return loss if math.isfinite(loss) else None


def progress(name, history, epochs, photos, seconds):
    """One line on a terminal, rewritten each epoch; about ten lines in a log file."""
    epoch, last, terminal = len(history), history[-1], sys.stdout.isatty()
    if not terminal and epoch % max(1, epochs // 10) and epoch != epochs:
        return
    text = (
        f"{name}  epoch {epoch}/{epochs}  train {last['train_loss'] or math.nan:.3f} "
        f"{last['train_accuracy']:.1%}  validation {last['validation_loss'] or math.nan:.3f} "
        f"{last['validation_accuracy']:.1%}  {photos * epoch / seconds:,.0f} images/s  "
        f"{seconds / epoch * (epochs - epoch):.0f} s left"
    )
    ending = "\n" if not terminal or epoch == epochs else "\x1b[K\r"
    print(text, end=ending, flush=True)


def environment(device):
    """Versions and the name of the device, for the run's JSON."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "device": f"{device.type} {name}",
        "threads": torch.get_num_threads(),
    }


def describe_data(config, splits):
    """Classes, counts and a fingerprint of the photos that training sees, for the run's JSON."""
    classes, files = data.list_photos(config["data"])
    counts = {
        split: {c: sum(f.startswith(c + "/") for f in files[split]) for c in classes}
        for split in files
    }
    fingerprint = "-".join(split.fingerprint[:16] for split in splits)
    return {"fingerprint": fingerprint, "classes": classes, "counts": counts}


def save(kind, name, config, described, model, result, start, device, **more):
    """Write the checkpoint, then the run's JSON: the JSON's presence means finished."""
    history, best, best_state = result
    content = {"state": best_state, "config": config, "kind": kind, "name": name}
    content |= {"classes": described["classes"]}
    buffer = io.BytesIO()  # torch.save would turn a full disk into an error of its own
    torch.save(content, buffer)
    with runs.atomic_file(Path(config["output"], "checkpoints", f"{name}.pt")) as file:
        file.write(buffer.getbuffer())
    training = sum(entry["seconds"] for entry in history)
    photos = sum(described["counts"]["train"].values()) * len(history)
    content = {"name": name, "kind": kind, "config": config, "data": described}
    content |= {"environment": environment(device)}
    model_name = config.get("model") or config["backbone"]
    content |= {"model": {"name": model_name, **models.counts(model)}}
    content |= {"history": history, "best": best, "seconds": time.perf_counter() - start}
    content |= {"images_per_second": photos / training, **more}
    runs.write_json(Path(config["output"], "runs", f"{name}.json"), content)
    print(
        f"{name}: best validation accuracy {best['validation_accuracy']:.1%} in epoch "
        f"{best['epoch']}, {content['seconds']:.0f} s"
    )


def start_run(parser, config, prefix):
    """What both training scripts begin with: data, run name, and whether it is finished.

    Returns (train Split, validation Split, description for the JSON, run name or None if the run
    is finished already).
    """
    splits = [
        data.load_split(config["data"], split, config["image_size"], config["cache"])
        for split in ("train", "validation")
    ]
    described = describe_data(config, splits)
    reuse_memory()
    if config.pop("best_of_grid", False):
        grid = runs.grid_of(runs.read_runs(config["output"]), config, described["fingerprint"])
        if not grid:
            raise SystemExit(f"--best-of-grid: {config['output']} has no finished run of "
                             f"{config['model']} with these settings.")  # fmt: skip
        config["learning_rate"], config["batch_size"] = runs.best_setting(grid)
    name = config["name"] or runs.run_name(parser, config, prefix)
    with runs.atomic_file(Path(config["output"], "checkpoints", ".writable")):
        pass  # rather fail now than after the last epoch
    if runs.finished(config["output"], name, config, described["fingerprint"]):
        print(f"{name}: finished before with the same settings and photos, not run again")
        name = None
    return *splits, described, name


def main(argv=None):
    start = time.perf_counter()
    parser = build_parser()
    config = vars(parser.parse_args(argv))
    train, validation, described, name = start_run(parser, config, config["model"])
    if name is None:
        return
    device = pick_device(config["device"])
    torch.manual_seed(config["seed"])
    model = models.SCRATCH[config["model"]](len(train.classes), config["dropout"])
    model.to(device, memory_format=MEMORY_FORMAT)
    augmentation = {key: config[key] for key in runs.SCRATCH_AUGMENTATION}
    train_loader = data.Loader(train, config["batch_size"], device, augmentation, config["seed"])
    validation_loader = data.Loader(validation, 64, device)
    result = fit(model, train_loader, validation_loader, config, device, name)
    save("scratch", name, config, described, model, result, start, device)


if __name__ == "__main__":
    runs.run_main(main)
