"""Recipes for training from scratch, compared over several seeds on the same photos and resolution.

    python benchmarks/recipes.py --data food11 --recipes published plain residual --seeds 0 1 2
    python benchmarks/recipes.py --data food11 --recipes plain residual --learning-rate 0.01

"plain" and "residual" are train_scratch.py with its defaults and the flags given here (one value
each). "published" is a recipe found in solutions of this task: a plain CNN of nearly the same
widths, flattened into a 1024-wide FC layer with dropout 0.5, Adam at a constant 0.0001, batches of
32, flips and rotations up to 20 degrees. The best epoch by validation of each run is measured on
both splits. Printed, and written to OUTPUT/recipes-SIZE.json: mean accuracy over the seeds with
its Wilson interval, and the gain over the recipe named first, with an interval over photos and
seeds. Finished runs in --output are not trained again; a failed one ends the comparison.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import engine
import evaluate
import models
import train_scratch

PUBLISHED = """--optimizer adamw --weight-decay 0 --learning-rate 0.0001 --warmup-epochs 0
--schedule constant --batch-size 32 --dropout 0.5 --label-smoothing 0 --cutmix 0 --crop-scale 1
--jitter 0 --rotation 20 --flip 0.5 --sam-share 0"""


class PublishedCNN(models.PlainCNN):
    """Convolution, batch norm, ReLU, max pooling, five times; flatten; FC 1024; dropout; FC."""

    widths, image_size = (32, 64, 128, 256, 512), 96

    def __init__(self, classes, dropout=0.5):
        super().__init__(classes, dropout)
        self.fc1 = torch.nn.Linear(self.widths[-1] * (self.image_size // 32) ** 2, 1024)
        self.fc2 = torch.nn.Linear(1024, classes)

    def forward(self, x):
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = self.pool(torch.relu(norm(convolution(x))))
        return self.fc2(self.dropout(torch.relu(self.fc1(x.flatten(1)))))


def train(recipe, flags):
    """Train the runs of a recipe that are not finished; return the names of all, by seed."""
    flags = [*flags, "--model", recipe, *(PUBLISHED.split() if recipe == "published" else [])]
    train_scratch.main(flags)
    parser = train_scratch.build_parser()
    config = vars(parser.parse_args(flags))
    single = config | {key: config[key][0] for key in engine.PLURAL_FLAGS}
    return [engine.run_name(parser, recipe, {**single, "seed": seed}) for seed in config["seed"]]


def right_photos(names, split, config, device):
    """bool [seeds, photos]: which photos of a split these runs classify right."""
    runs = [evaluate.evaluate_run(name, split, config, device)["predictions"] for name in names]
    right = [[guess["label"] == guess["predicted"] for guess in run] for run in runs]
    return torch.tensor(right).numpy()


def main(argv=None):
    parser = argparse.ArgumentParser(epilog="All other flags are those of train_scratch.py.")
    known = ("published", "plain", "residual")
    parser.add_argument("--recipes", nargs="+", choices=known, default=known, help="compared")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"], help="one run each")
    own, flags = parser.parse_known_args(argv)
    flags = ["--output", "results/recipes", *flags, "--seed", *own.seeds]
    config = train_scratch.build_parser().parse_args(flags)
    device, size = engine.pick_device(config.device), config.image_size
    PublishedCNN.image_size, models.SCRATCH["published"] = size, PublishedCNN
    names = {recipe: train(recipe, flags) for recipe in own.recipes}
    rows = []
    text = "{recipe:9} {split:10} {accuracy:6.1%} ({interval_95[0]:.1%} to {interval_95[1]:.1%}),"
    gain_text = "gain {difference:+.1%} ({interval_95[0]:+.1%} to {interval_95[1]:+.1%})"
    for split in ("validation", "test"):
        right = {recipe: right_photos(names[recipe], split, config, device) for recipe in names}
        for recipe, each in right.items():
            accuracy, gain = float(each.mean()), evaluate.difference(each, right[own.recipes[0]])
            row = {"recipe": recipe, "split": split, "accuracy": accuracy, "gain_over_first": gain}
            row["interval_95"] = evaluate.wilson_interval(accuracy, each.shape[1])
            rows.append({**row, "accuracy_by_seed": each.mean(1).tolist()})
            print(text.format(**row), gain_text.format(**gain))
    engine.write_json(f"{config.output}/recipes-{size}.json", {"runs": names, "rows": rows})


if __name__ == "__main__":
    main()
