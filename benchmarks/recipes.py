"""Recipes for training from scratch, compared over several seeds on the same photos and resolution.

    python benchmarks/recipes.py --data food11 --recipes published plain residual --seeds 0 1 2
    python benchmarks/recipes.py --data food11 --recipes plain residual --seeds 0 1 2 3 4

"plain" and "residual" are train_scratch.py with its defaults and the learning rate and batch size
given here. "published" is a recipe found in solutions of this task: a plain CNN of the same
five widths, flattened into a 1024-wide FC layer with dropout 0.5, Adam at a constant 0.0001,
batches of 32, flips and rotations up to 20 degrees, 50 epochs, the best epoch by validation.
Finished runs are kept in --output and not trained again.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Parser, add_place_flags, number, write_json

import numpy as np
import torch.nn.functional as F
from torch import nn

import evaluate
import models
import train_scratch

PUBLISHED = """--optimizer adamw --weight-decay 0 --learning-rate 0.0001 --warmup-epochs 0
--schedule constant --batch-size 32 --dropout 0.5 --label-smoothing 0 --cutmix 0 --crop-scale 1
--jitter 0 --rotation 20 --flip 0.5 --sam-share 0 --logit-adjustment 0"""


class PublishedCNN(models.PlainCNN):
    """Convolution, batch norm, ReLU, max pooling, five times; flatten; FC 1024; dropout; FC."""

    widths = (32, 64, 128, 256, 512)

    def __init__(self, classes, dropout=0.5, image_size=96):
        super().__init__(classes, dropout)
        self.fc1 = nn.Linear(512 * (image_size // 32) ** 2, 1024)
        self.fc2 = nn.Linear(1024, classes)

    def forward(self, images):
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = self.pool(F.relu(norm(convolution(x))))
        return self.fc2(self.dropout(F.relu(self.fc1(x.flatten(1)))))


def train(recipe, seed, arguments):
    """Train one run of a recipe, measure it on validation and test; return its name."""
    name = f"{recipe}-{arguments.image_size}-seed{seed}"
    place = ["--data", arguments.data, "--output", arguments.output]
    place += ["--cache", arguments.cache, "--device", arguments.device]
    flags = ["--model", recipe, "--name", name, "--seed", str(seed)]
    flags += ["--image-size", str(arguments.image_size), "--epochs", str(arguments.epochs)]
    chosen = f"--learning-rate {arguments.learning_rate} --batch-size {arguments.batch_size}"
    recipe_flags = PUBLISHED if recipe == "published" else chosen
    train_scratch.main([*place, *flags, *recipe_flags.split()])
    for split in ("validation", "test"):
        evaluate.main([*place, "--run", name, "--split", split])
    return name


def compare(names, photos, splits, output):
    """Print and return a dict for each recipe; names: recipe -> names of its runs, by seed."""
    rows, first = [], None
    for recipe, trained in names.items():
        right = []
        for name in trained:
            evaluations = [evaluate.read_evaluation(output, name, split) for split in splits]
            right.append(np.concatenate([evaluate.right_photos(one) for one in evaluations]))
        right = np.array(right)  # bool [seeds, photos]
        first = right if first is None else first
        difference, accuracy = evaluate.paired_difference(right, first), float(right.mean())
        row = {
            "recipe": recipe,
            "photos": photos,
            "accuracy": accuracy,
            "interval_95": list(evaluate.wilson_interval(accuracy, right.shape[1])),
            "by_seed": right.mean(1).tolist(),
            "spread": evaluate.spread(right.mean(1)),
            "difference": difference["difference"],  # to the first recipe
            "difference_interval_95": difference["interval_95"],
        }
        rows.append(row)
        low, high = difference["interval_95"]
        print(
            f"{recipe:10} {right.shape[1]:6} photos, {photos:10}  {accuracy:.1%}  difference to "
            f"the first {100 * row['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        )
    return rows


def main(argv=None):
    parser = Parser(__doc__)
    add_place_flags(parser)
    parser.set_defaults(output="results/recipes")
    flag, recipes = parser.add_argument, ("published", *models.SCRATCH)
    flag("--recipes", nargs="+", choices=recipes, default=["published", "plain"], help="compared")
    flag("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2], help="one run each")
    flag("--image-size", type=number(int, 32, 2048), default=96, help="side of photos, pixels")
    flag("--epochs", type=number(int, 1), default=50, help="of every run")
    flag("--learning-rate", type=number(float, 0), default=0.02, help="not of published")
    flag("--batch-size", type=number(int, 1), default=64, help="not of published")
    arguments = parser.parse_args(argv)
    models.SCRATCH["published"] = partial(PublishedCNN, image_size=arguments.image_size)
    names = {recipe: [] for recipe in arguments.recipes}
    for seed in arguments.seeds:  # in turns: interrupted, it has the same seeds of all
        for recipe, trained in names.items():
            trained.append(train(recipe, seed, arguments))
    places = {"validation": ["validation"], "test": ["test"], "both": ["validation", "test"]}
    rows = []
    for photos, splits in places.items():
        rows += compare(names, photos, splits, arguments.output)
    file = f"recipes-{arguments.image_size}-{'-'.join(names)}.json"
    write_json(Path(arguments.output, file), {"arguments": vars(arguments), "rows": rows})


if __name__ == "__main__":
    main()
