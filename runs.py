"""What a run is: its flags, its name, its JSON file, whether it is finished, which one is best.

Shared by every script. It imports no torch, so what needs only the JSON files starts at once.
"""

import argparse
import contextlib
import difflib
import json
import math
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

SPLITS = ("train", "validation", "test")
BACKBONES = ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "shufflenet_v2_x1_0")
# Flags that say where a run happens, not what it computes: they never make a run a different one.
PLACE_FLAGS = ("data", "output", "name", "device", "cache", "feature_memory")
# What training from scratch does to the photos unless told otherwise.
SCRATCH_AUGMENTATION = {"crop_scale": 0.2, "rotation": 15.0, "jitter": 0.3, "flip": 0.5}
# Flags that a run's name spells out anyway; any other appears in it when not at its default.
NAMED_FLAGS = ("model", "backbone", "unfreeze_convolutions", "learning_rate", "batch_size",
               "dropout", "seed")  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse with defaults in every help line, and a suggestion for a mistyped flag."""

    def __init__(self, documentation):
        summary, _, examples = documentation.partition("\n\n")
        super().__init__(
            description=summary,
            epilog=examples,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )

    def error(self, message):
        known = list(self._option_string_actions)
        for word in re.findall(r"--[\w-]+", message) if "unrecognized" in message else []:
            near = difflib.get_close_matches(word, known, n=1)
            message += f" (did you mean {near[0]}?)" if near else ""
        raise SystemExit(f"{self.prog}: {message}. `python {self.prog} --help` lists the flags.")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of the examples; show N for a number, and defaults where there are."""

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "metavar", super()._get_default_metavar_for_optional(action))

    def _get_help_string(self, action):
        nothing = action.default is None or action.default is False or action.default == []
        return action.help if nothing else super()._get_help_string(action)


def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float within [low, high]."""

    def convert(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name} {limits}")
        return value

    convert.metavar = "N" if kind is int else "X"
    return convert


def run_name_type(text):
    """An argparse type: a name that is one file name in the results folder."""
    if not re.fullmatch(r"\w[\w.+ -]{0,199}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name of a run: letters, digits and . + - _ only, at most 200"
        )
    return text


def add_place_flags(parser):
    """The flags that say where things are, the same in every script."""
    parser.add_argument("--data", default="food11", metavar="DIR", help="folder of photos")
    parser.add_argument("--output", default="results", metavar="DIR", help="folder of results")
    parser.add_argument("--cache", default=".cache", metavar="DIR", help="folder of decoded photos")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")


def add_training_flags(parser, **defaults):
    """The flags of the training loop, the same in both training scripts, and run-specific ones."""
    integer, real, flag = number(int, 1), number(float, 0), parser.add_argument
    add_place_flags(parser)
    flag("--name", type=run_name_type, metavar="NAME", help="name of the run and of its files; "
         "made from the settings unless given")  # fmt: skip
    flag("--image-size", type=number(int, 32, 2048), help="side of the square photos, pixels")
    flag("--epochs", type=integer, default=50, help="times each photo is seen")
    flag("--batch-size", type=integer, help="photos per step")
    flag("--learning-rate", type=number(float, 1e-12), help="highest learning rate")
    flag("--optimizer", choices=("muon", "adamw"), help="muon: matrices by Muon at the "
         "learning rate, the rest by AdamW at a tenth of it")  # fmt: skip
    flag("--weight-decay", type=real, help="decoupled weight decay; beside Muon, AdamW has 0.01")
    flag("--warmup-epochs", type=real, default=2.0, help="epochs of linear rise to the highest "
         "learning rate; from there it falls linearly to zero")  # fmt: skip
    flag(
        "--dropout", type=number(float, 0, 0.99), help="probability to drop an input of an FC layer"
    )
    flag("--label-smoothing", type=number(float, 0, 1), default=0.1, help="of the cross-entropy")
    flag("--crop-scale", type=number(float, 0.01, 1), help="smallest crop, share of the area")
    flag("--flip", type=number(float, 0, 1), help="probability of a mirrored photo")
    flag("--rotation", type=number(float, 0, 180), help="largest rotation, degrees")
    flag("--jitter", type=number(float, 0, 1), help="largest change of brightness, contrast and "
         "saturation, as a fraction")  # fmt: skip
    flag("--seed", type=number(int, 0, 2**31 - 1), default=0, help="of weights, order of the "
         "photos and augmentation")  # fmt: skip
    flag("--precision", choices=("auto", "bfloat16", "float32"), default="auto",
         help="auto: bfloat16 where the device computes in it")  # fmt: skip
    parser.set_defaults(**defaults)


def run_name(parser, config, prefix):
    """Build a run's name from its settings: what NAMED_FLAGS list, then what is not at default."""
    name = f"{prefix}-lr{config['learning_rate']:g}-bs{config['batch_size']}"
    if config["dropout"] != parser.get_default("dropout"):
        name += f"-dropout{config['dropout']:g}"
    name += f"-seed{config['seed']}"
    for key, value in config.items():
        default = parser.get_default(key)
        if key in PLACE_FLAGS + NAMED_FLAGS or value == default or default is None:
            continue
        text = f"{value:g}" if isinstance(value, float) else re.sub(r"[^\w.]+", "_", str(value))
        name += f"-{key.replace('_', '')}{text}"
    return name


def settings(config, without=()):
    """The part of a config that decides the result, as a hashable value."""
    skip = PLACE_FLAGS + tuple(without)
    return tuple(sorted((key, str(value)) for key, value in config.items() if key not in skip))


@contextlib.contextmanager
def atomic_file(path):
    """Open a temporary binary file beside `path`; rename it to `path` if all goes well.

    Whoever reads `path` sees the old content or the new one, never half of it. Exits with one
    line if the disk is full or the folder cannot be written.
    """
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(handle, "wb") as file:
            yield file
        os.chmod(temporary, 0o666 & ~UMASK)
        os.replace(temporary, path)
    except OSError as error:
        raise SystemExit(
            f"{path}: cannot be written ({error.strerror or error}). Free some space or choose "
            "another folder; what was finished before is kept."
        ) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


UMASK = os.umask(0)
os.umask(UMASK)


def write_json(path, value):
    """Write JSON atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")


def read_json(path, *keys):
    """Read a JSON object that has `keys`; exits with one line if it is missing or broken."""
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict) or not content.keys() >= set(keys):
            raise ValueError(f"not an object with {', '.join(keys)}")
        return content
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such file. Run the step that writes it first.") from None
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: cannot be read ({error}). Delete it and run again.") from None


def read_runs(output):
    """All finished runs under output/runs: name -> content, sorted by name."""
    keys = ("name", "kind", "config", "data", "model", "history", "best", "seconds")
    return {
        path.stem: read_json(path, *keys) for path in sorted(Path(output, "runs").glob("*.json"))
    }


def finished(output, name, config, fingerprint):
    """Whether the run is finished with these settings on these photos.

    Exits with one line if its name is taken by a run with others: nothing finished is overwritten.
    """
    path = Path(output, "runs", f"{name}.json")
    if not path.exists() or not Path(output, "checkpoints", f"{name}.pt").exists():
        return False
    run = read_json(path, "config", "data")
    if settings(run["config"]) == settings(config) and run["data"]["fingerprint"] == fingerprint:
        return True
    raise SystemExit(f"{path} is a run with other settings or photos: give another --output or "
                     "--name, or delete it.")  # fmt: skip


def best_setting(runs):
    """Choose (learning rate, batch size) by best validation accuracy, mean over seeds.

    Ties are broken by the lower validation loss. runs: a non-empty iterable of run contents.
    """
    groups = {}
    for run in runs:
        key = run["config"]["learning_rate"], run["config"]["batch_size"]
        best = run["best"]
        if best["validation_loss"] is None:  # diverged
            best = best | {"validation_loss": math.inf}
        groups.setdefault(key, []).append(best)

    def mean_best(key):
        bests = groups[key]
        accuracy = sum(best["validation_accuracy"] for best in bests) / len(bests)
        return accuracy, -sum(best["validation_loss"] for best in bests) / len(bests)

    return max(sorted(groups), key=mean_best)


def grid_of(runs, config, fingerprint):
    """The runs without dropout, on the photos of `fingerprint`, that differ from `config` only in
    what the grid varies."""
    vary = ("learning_rate", "batch_size", "dropout", "seed")
    wanted = settings(config, vary)
    return [
        run
        for run in runs.values()
        if settings(run["config"], vary) == wanted
        and run["config"]["dropout"] == 0
        and run["data"]["fingerprint"] == fingerprint
    ]


def wilson_interval(accuracy, total):
    """95% interval (low, high) of an accuracy (fraction) measured on `total` photos.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    z = 1.959964
    center = (accuracy + z * z / (2 * total)) / (1 + z * z / total)
    spread = math.sqrt(accuracy * (1 - accuracy) / total + z * z / (4 * total * total))
    half = z * spread / (1 + z * z / total)
    return max(0.0, center - half), min(1.0, center + half)


def run_main(main):
    """Call a script's main(); end with one line instead of a traceback where the user is to act."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted: finished runs are kept, start again to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sys.exit(f"{error.filename or 'output'}: {error.strerror or error}")
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        sys.exit("batch norm cannot train on one photo at a time: choose a larger --batch-size")
    except MemoryError:
        sys.exit("out of memory: choose a smaller --batch-size or --image-size")
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        sys.exit("out of device memory: choose a smaller --batch-size or --image-size")


def cpu_count():
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
