"""What several test modules train with."""

import signal

import common

import torch
from torch import nn

import data
import models
import train_scratch

TINY = ["--image-size", "32", "--batch-size", "14", "--epochs", "6", "--device", "cpu"]
TINY += ["--crop-scale", "0.6", "--cutmix", "0", "--precision", "float32", "--threads", "1"]
# On so few photos most of a step would be Muon's products.
TINY += ["--optimizer", "adamw", "--learning-rate", "0.002"]


def train(photos, *flags):
    """Train from scratch on a handful of photos; return all runs in results/, name -> content."""
    train_scratch.main(["--data", str(photos), *TINY, *flags])
    return common.read_runs("results")


@torch.no_grad()
def lively_weights(photos, backbone):
    """A weights file of random weights whose features differ from photo to photo.

    The statistics of batch norm are those of the photos: without, random features all look alike.
    """
    torch.manual_seed(0)
    network = models.load_torchvision(backbone, "none").train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    images = data.load_split(photos, "train", 64).images
    for _ in range(3):
        for batch in images.split(14):
            network(data.normalise(batch))
    torch.save(network.state_dict(), "lively.pth")
    return "lively.pth"


def default_signals():
    """For Popen's preexec_fn: take signals as in a terminal, where a batch system ignores some."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
