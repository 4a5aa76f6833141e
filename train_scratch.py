"""Train one of the two CNNs from scratch on a folder of photos.

    python train_scratch.py --data food11 --model residual
    python train_scratch.py --model plain --learning-rate 0.01 0.02 0.04 --batch-size 32 64
    python train_scratch.py --model plain --best-of-grid --dropout 0.2 0.4

Flags that take several values train a run for each combination. A run writes
results/runs/NAME.json and results/checkpoints/NAME.pt once its last epoch is done; interrupted, it
goes on where it was. Only the photos of train/ and validation/ are opened.
"""

from common import Parser, add_place_flags, number

import torch

import data
import engine
import models


def build_parser():
    parser = Parser(__doc__)
    add_place_flags(parser)
    engine.add_training_flags(parser)
    flag = parser.add_argument
    share = number(float, 0, 1)
    flag("--model", choices=tuple(models.SCRATCH), default="plain", help="network")
    flag("--image-size", type=number(int, 32, 2048), default=96, help="side of the photos, pixels")
    flag("--learning-rate", type=number(float, 1e-12), nargs="+", default=[0.02], help="peak")
    flag("--dropout", type=number(float, 0, 0.99), nargs="+", default=[0.0], help="before each FC")
    flag("--optimizer", choices=("muon", "adamw"), default="muon", help="muon: for matrices")
    flag("--weight-decay", type=number(float, 0), default=0.3, help="decoupled; of Muon's matrices")
    flag(
        "--crop-scale", type=number(float, 0.01, 1), default=0.2, help="smallest crop, of the area"
    )
    flag("--rotation", type=number(float, 0, 180), default=15.0, help="largest, degrees")
    flag("--jitter", type=share, default=0.3, help="largest change of colours, as a fraction")
    flag("--flip", type=share, default=0.5, help="probability of a mirrored photo")
    flag("--cutmix", type=share, default=0.5, help="probability that a batch is mixed by CutMix")
    flag("--sam-share", type=share, default=0.4, help="of the epochs, at the end, trained by SAM")
    flag("--sam-radius", type=number(float, 0), default=0.1, help="SAM's step uphill; 0: no SAM")
    flag("--logit-adjustment", type=number(float, 0), default=1.0, help="for rare classes; 0: none")
    return parser


def main(argv=None):
    parser = build_parser()
    arguments = parser.parse_args(argv)
    device = engine.set_up(arguments)
    photos = engine.load_photos(arguments, device)
    if arguments.best_of_grid:
        arguments = engine.take_best_of_grid(parser, arguments, photos)
    for run in engine.unfinished_runs(parser, arguments, arguments.model, photos):
        of_run = engine.photos_of_run(photos, run)
        torch.manual_seed(run.seed)
        model = models.SCRATCH[run.model](len(photos.train.classes), run.dropout)
        model.to(device, memory_format=torch.channels_last)
        augmentation = data.Augmentation(run.crop_scale, run.rotation, run.jitter, run.flip)
        train_loader = data.Loader(of_run.train, run.batch_size, device, augmentation, run.seed)
        validation_loader = data.Loader(photos.validation, engine.EVALUATION_BATCH, device)
        result = engine.fit(model, train_loader, validation_loader, run, of_run)
        engine.save_run("scratch", run, of_run, model, result)


if __name__ == "__main__":
    main()
