"""Recipes for training from scratch, compared over several seeds on the same photos and resolution.

    python benchmarks/recipes.py --data food11 --recipes published plain residual --seeds 0 1 2
    python benchmarks/recipes.py --data food11 --recipes plain residual --seeds 0 1 2 3 4

"plain" and "residual" are train_scratch.py with its defaults and the learning rate and batch size
given here. "published" is what most published solutions of this task do: a plain CNN of the same
five widths, flattened into a 1024-wide FC layer with dropout 0.5, Adam at a constant 0.0001,
batches of 32, flips and rotations up to 20 degrees, 50 epochs, the best epoch by validation.
Finished runs are kept in --output and not trained again.
"""

import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate
import models
import optimizers
import runs
import summary
import train_scratch

PUBLISHED = """--optimizer adamw --weight-decay 0 --learning-rate 0.0001 --warmup-epochs 0
--batch-size 32 --dropout 0.5 --label-smoothing 0 --cutmix 0 --crop-scale 1 --jitter 0
--rotation 20 --flip 0.5"""


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
    """Train and evaluate one run of a recipe; return its name."""
    name = f"{recipe}-{arguments.image_size}-seed{seed}"
    place = ["--data", arguments.data, "--output", arguments.output, "--cache", arguments.cache,
             "--device", arguments.device]  # fmt: skip
    flags = ["--model", recipe, "--name", name, "--seed", str(seed)]
    flags += ["--image-size", str(arguments.image_size), "--epochs", str(arguments.epochs)]
    factor = optimizers.learning_rate_factor
    if recipe == "published":
        flags, factor = flags + PUBLISHED.split(), lambda *_: 1.0
    else:
        flags += ["--learning-rate", str(arguments.learning_rate)]
        flags += ["--batch-size", str(arguments.batch_size)]
    with mock.patch.object(optimizers, "learning_rate_factor", factor):
        train_scratch.main(place + flags)
    for split in ("validation", "test"):
        evaluate.main([*place, "--run", name, "--split", split])
    return name


def right(names, split, output):
    """Whether each photo was classified right by each run: float [runs, photos]."""
    evaluations = [summary.read_evaluation(output, name, split) for name in names]
    return np.array([
        [p["label"] == p["predicted"] for p in evaluation["predictions"]]
        for evaluation in evaluations
    ], dtype=float)  # fmt: skip


def main():
    parser = runs.Parser(__doc__)
    runs.add_place_flags(parser)
    parser.set_defaults(output="results/recipes")
    models.SCRATCH["published"] = PublishedCNN
    flag = parser.add_argument
    flag("--recipes", nargs="+", choices=tuple(models.SCRATCH), default=["published", "plain"],
         help="what to compare; the differences are to the first")  # fmt: skip
    flag("--seeds", type=runs.number(int, 0), nargs="+", default=[0, 1, 2], help="one run each")
    flag("--image-size", type=runs.number(int, 32, 2048), default=96)
    flag("--epochs", type=runs.number(int, 1), default=50)
    flag("--learning-rate", type=runs.number(float, 0), default=0.02, help="not of published")
    flag("--batch-size", type=runs.number(int, 1), default=64, help="not of published")
    arguments = parser.parse_args()
    models.SCRATCH["published"] = partial(PublishedCNN, image_size=arguments.image_size)
    names = {recipe: [] for recipe in arguments.recipes}
    for seed in arguments.seeds:  # in turns, so that an interrupted comparison is still one
        for recipe, trained in names.items():
            trained.append(train(recipe, seed, arguments))
    lines = []
    for photos in ("validation", "test", "both"):
        splits = ("validation", "test") if photos == "both" else (photos,)
        hits = {
            recipe: np.concatenate([right(trained, s, arguments.output) for s in splits], axis=1)
            for recipe, trained in names.items()
        }
        for recipe, table in hits.items():
            total, by_seed = table.shape[1], table.mean(1).tolist()
            low, high = runs.wilson_interval(table.mean(), total)
            line = {"recipe": recipe, "photos": photos, "accuracy": float(table.mean()),
                    "interval_95": [low, high], "by_seed": by_seed,
                    "spread": summary.spread(by_seed)}  # fmt: skip
            text = f"{recipe:10} {photos:10} {total:5} photos  {table.mean():.1%} "
            text += f"[{low:.1%}, {high:.1%}]  seeds {' '.join(f'{a:.1%}' for a in by_seed)}"
            if recipe != arguments.recipes[0]:
                apart = table - hits[arguments.recipes[0]]
                # Other photos would differ, and so would other seeds.
                variance = apart.mean(0).var(ddof=1) / total
                if len(apart) > 1:
                    variance += apart.mean(1).var(ddof=1) / len(apart)
                half = 1.959964 * variance**0.5
                line |= {"difference": float(apart.mean()), "difference_interval_95":
                         [float(apart.mean() - half), float(apart.mean() + half)]}  # fmt: skip
                text += f"  difference to {arguments.recipes[0]} {100 * apart.mean():+.1f} "
                text += f"[{100 * (apart.mean() - half):+.1f}, {100 * (apart.mean() + half):+.1f}]"
            lines.append(line)
            print(text)
    about = {"arguments": vars(arguments), "rows": lines}
    file = f"recipes-{arguments.image_size}-{'-'.join(names)}.json"
    runs.write_json(Path(arguments.output, file), about)


if __name__ == "__main__":
    runs.run_main(main)
