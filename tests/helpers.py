"""What several test modules train with."""

import signal

import common

import train_scratch

TINY = ["--image-size", "32", "--batch-size", "14", "--epochs", "6", "--device", "cpu"]
TINY += ["--crop-scale", "0.6", "--cutmix", "0", "--precision", "float32", "--threads", "1"]


def train(photos, *flags):
    """Train from scratch on a handful of photos; return all runs in results/, name -> content."""
    train_scratch.main(["--data", str(photos), *TINY, *flags])
    return common.read_runs("results")


def default_signals():
    """For Popen's preexec_fn: take signals as in a terminal, where a batch system ignores some."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
