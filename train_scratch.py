"""Train one of the two CNNs from scratch on a folder of photos.

    python train_scratch.py --data food11 --model residual
    python train_scratch.py --model plain --learning-rate 0.01 0.02 0.04 --batch-size 32 64

Flags that take several values train a run for each combination. A run writes
results/runs/NAME.json and results/checkpoints/NAME.pt once its last epoch is done; interrupted, it
goes on where it was. Only the photos of train/ and validation/ are opened.
"""

import argparse

import torch

import data
import engine
import models


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flag, share = parser.add_argument, engine.number(float, 0, 1)
    flag("--model", choices=tuple(models.SCRATCH), default="plain", help="network")
    engine.add_training_flags(parser)
    flag("--optimizer", choices=("muon", "adamw"), default="muon", help="muon: of all matrices")
    flag("--cutmix", type=share, default=0.5, help="probability that a batch is mixed by CutMix")
    flag("--sam-share", type=share, default=0.4, help="of the epochs, the last, trained by SAM")
    flag("--sam-radius", type=engine.number(float, 0), default=0.1, help="SAM's step uphill")
    parser.set_defaults(image_size=96, learning_rate=[0.02], dropout=[0.0], weight_decay=0.3)
    parser.set_defaults(crop_scale=0.2, rotation=15.0, jitter=0.3)
    return parser


def main(argv=None):
    parser = build_parser()
    arguments = parser.parse_args(argv)
    device = engine.pick_device(arguments.device)
    runs = engine.unfinished_runs(parser, arguments, arguments.model)
    if not runs:
        return
    train, validation = engine.load_photos(arguments, device)
    validation_loader = data.Loader(validation, engine.EVALUATION_BATCH, device)
    for run in runs:
        torch.manual_seed(run.seed)
        model = models.SCRATCH[run.model](len(train.classes), run.dropout)
        model.to(device, memory_format=torch.channels_last)
        augmentation = data.Augmentation(run.crop_scale, run.rotation, run.jitter, run.flip)
        share = engine.processes()
        train_loader = data.Loader(train, run.batch_size, device, augmentation, run.seed, share)
        result = engine.fit(model, train_loader, validation_loader, run, len(train.classes))
        engine.save_run("scratch", run, (train, validation), model, *result)


if __name__ == "__main__":
    main()
