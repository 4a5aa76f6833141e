"""What all scripts share and needs no torch: the command line, files that are whole, JSON.

Importing it also sets how a script ends, see the last lines.
"""

import argparse
import contextlib
import difflib
import fcntl
import hashlib
import json
import math
import os
import re
import signal
import sys
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, a suggestion for a mistyped flag, defaults in the help.

    documentation: the script's docstring; its first paragraph says what it does, the rest how.
    """

    def __init__(self, documentation):
        summary, _, examples = documentation.partition("\n\n")
        super().__init__(
            description=summary, epilog=examples, allow_abbrev=False, formatter_class=HelpFormatter
        )

    def error(self, message):
        if "unrecognized" in message:
            # argparse has no public list of its flags (Python 3.10 to 3.14).
            for word in re.findall(r"--[\w-]+", message):
                for near in difflib.get_close_matches(word, self._option_string_actions, n=1):
                    message += f" (did you mean {near}?)"
        self.exit(2, f"{self.prog}: {message}. `python {self.prog} --help` lists the flags.\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of the examples and show defaults, but not the empty ones."""

    # Private, but what argparse's own formatters override (Python 3.10 to 3.14).
    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float within [low, high]."""

    def convert(text):
        try:
            value = kind(text)
            fits = math.isfinite(value) and low <= value <= high
        except (ValueError, OverflowError):
            fits = False
        if not fits:
            limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name} {limits}")
        return value

    return convert


def run_name(text):
    """An argparse type: the name of a run, which is one file name in the results folder."""
    if not re.fullmatch(r"\w[\w.+ -]{0,199}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name of a run: a letter or digit, then letters, digits, spaces and "
            ". + - _, at most 200"
        )
    return text


def add_folder_flags(parser, data_help="folder of photos", data="food11"):
    """The flags that say in which folders things are, the same in every script."""
    flag = parser.add_argument
    flag("--data", default=data, metavar="DIR", help=data_help)
    flag("--output", default="results", metavar="DIR", help="folder of results")
    flag("--cache", default=".cache", metavar="DIR", help="folder of decoded photos")


def add_place_flags(parser):
    """add_folder_flags() and the device, of what computes with networks."""
    add_folder_flags(parser)
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")


def split_folder(directory, split):
    """Path of a split in a data folder: val/ is taken for validation/."""
    folder = Path(directory, split)
    if split == "validation" and not folder.is_dir() and Path(directory, "val").is_dir():
        folder = Path(directory, "val")
    return folder


def printable(text):
    """`text` with bytes of a file name that are no UTF-8 spelled out, as \\udce9."""
    return text.encode("utf-8", "backslashreplace").decode()


def cpu_count(limit="/sys/fs/cgroup/cpu.max"):
    """Processors that this process may use.

    limit: the file in which Linux tells a container its share, "quota period" or "max period".
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # no such file; no limit
        quota, period = map(int, Path(limit).read_text().split())
        count = min(count, max(1, quota // period))
    return count


@contextlib.contextmanager
def atomic_file(path):
    """Open a temporary binary file beside `path`; rename it to `path` if all goes well.

    Whoever reads `path` sees the old content or the new one, never half of it, also after a power
    failure. Exits with one line if the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise SystemExit(
            f"{path}: cannot be written ({error.strerror or error}). Free some space or choose "
            "another folder; what was finished before is kept."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(path, wait=False):
    """Yield True while this process holds the lock `path`, False if another process has it.

    With `wait` it waits for the other to end. The system frees a lock when its process ends,
    however it ends. Exits with one line if the folder cannot be written.
    """
    path, mine = Path(path), True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115, closed below
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        mine = False
    except OSError as error:  # some network file systems know no locks
        text = f"{path.parent}: cannot be written or locked ({error.strerror})"
        raise SystemExit(f"{text}. Choose another folder.") from None
    with file:  # it stays: who deletes it may delete the lock of another process
        yield mine


def checksum(value):
    """sha256, hexadecimal, of a JSON object but for its key `checksum`."""
    rest = {key: value[key] for key in value if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, allow_nan=False).encode()).hexdigest()


def write_json(path, value):
    """Write a JSON object and its checksum, atomically."""
    with atomic_file(path) as file:
        content = {**value, "checksum": checksum(value)}
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def read_json(path, *keys):
    """Read a JSON object that has `keys`; exits with one line if it is missing or damaged.

    An object without a checksum, written by hand or by another program, is taken as it is.
    """
    try:
        value = json.loads(Path(path).read_text())
        intact = isinstance(value, dict) and value.get("checksum") in (None, checksum(value))
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such file. Run the step that writes it first.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path}: cannot be read ({error}). Delete it and run again.") from None
    if not intact or not value.keys() >= set(keys):
        raise SystemExit(f"{path}: damaged, changed or incomplete. Delete it and run again.")
    return value


def read_runs(output):
    """All finished runs under output/runs: name -> content of the JSON, sorted by name.

    Exits with one line if a file is not what save_run() of engine.py writes.
    """
    keys = ("name", "kind", "config", "data", "model", "history", "best", "seconds")
    best_keys = {"epoch", "validation_accuracy", "validation_loss"}
    runs = {}
    for path in sorted(Path(output, "runs").glob("*.json")):
        run = read_json(path, *keys, "checkpoint_sha256")
        best = dict.fromkeys(best_keys) if run["best"] is None else run["best"]  # it has failed
        tables = (run["config"], run["data"], run["model"], best)
        fits = all(isinstance(table, dict) for table in tables) and best.keys() >= best_keys
        # A name from a file becomes the name of other files: it must not lead elsewhere.
        if not fits or run["name"] != path.stem:
            raise SystemExit(f"{path}: does not describe the run {path.stem}. Delete it.")
        runs[path.stem] = run
    return runs


def best_models(models):
    """The best by validation accuracy of each kind, of the rows `models` of summary.json.

    Returns {"scratch": row, "finetune": row}, or fewer. Of equals the first in the file is taken.
    """
    best = {}
    for row in models:
        kind = row["kind"]
        if kind not in best or row["validation_accuracy"] > best[kind]["validation_accuracy"]:
            best[kind] = row
    return best


# What torch says of it, which has a type of its own for CUDA alone (2.6 to 2.14), and numpy.
OUT_OF_MEMORY = "out of memory|can't allocate|Unable to allocate|ALLOC_FAILED"


def show_uncaught(kind, error, traceback):
    """What Python prints when a script ends by an exception: one line where that says all."""
    if issubclass(kind, KeyboardInterrupt):
        if "STUDY_RUNS" not in os.environ:  # run_all.sh says it once for all that it started
            print("\ninterrupted. Start again to go on from the last stored epoch", file=sys.stderr)
    elif issubclass(kind, BrokenPipeError):  # who read our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif issubclass(kind, MemoryError) or re.search(OUT_OF_MEMORY, str(error)):
        print(
            "out of memory: choose a smaller --batch-size, --image-size or --feature-memory, or "
            "fewer runs at a time (JOBS)",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, traceback)


# Ctrl-C, a polite kill and a closed terminal end a script alike, even while torch is imported.
sys.excepthook = show_uncaught
for ending in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(ending) == signal.SIG_DFL:
        signal.signal(ending, signal.default_int_handler)
for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):  # a file name may hold what the terminal can't show
        stream.reconfigure(errors="backslashreplace")

# Before torch, which imports numpy itself and swallows a Ctrl-C that comes meanwhile (torch 2.14).
import numpy  # noqa: E402, F401
