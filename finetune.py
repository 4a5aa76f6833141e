"""Fine-tune a pre-trained backbone: the last layer, or the last N convolutions and the last layer.

    python finetune.py --data food11 --backbone mobilenet_v2 --unfreeze-convolutions 0
    python finetune.py --data food11 --backbone mobilenet_v2 --unfreeze-convolutions 2
    python finetune.py --data food11 --backbone shufflenet_v2_x1_0 --learning-rate 0.001 0.003

The frozen part of the network runs once per augmented view of each photo, not once per epoch; its
output is kept in memory and the rest is trained on that, by the loop of train_scratch.py. Writes
results/runs/NAME.json and results/checkpoints/NAME.pt. It opens train/ and validation/ only.
"""

import time

import torch
from torch import nn

import data
import models
import runs
import train_scratch


def build_parser():
    parser = runs.Parser(__doc__)
    parser.add_argument("--backbone", choices=runs.BACKBONES, metavar="NETWORK",
                        default="mobilenet_v2", help=", ".join(runs.BACKBONES))  # fmt: skip
    parser.add_argument("--weights", metavar="W", default="IMAGENET1K_V1", help="that name, none "
                        "(random), or a file of torchvision's state dict")  # fmt: skip
    parser.add_argument("--unfreeze-convolutions", type=runs.number(int, 0), default=0,
                        help="how many of the last convolutions to train; 0: FC only")  # fmt: skip
    runs.add_training_flags(
        parser,
        image_size=288,
        batch_size=64,
        learning_rate=[0.001],
        optimizer="adamw",
        weight_decay=0.05,
        dropout=0.2,
        crop_scale=0.5,
        flip=0.5,
        rotation=0.0,
        jitter=0.1,
    )
    parser.add_argument("--views", type=runs.number(int, 1), default=4,
                        help="augmented views of each photo; the epochs take turns")  # fmt: skip
    parser.add_argument("--feature-memory", type=runs.number(float, 0), default=4.0, metavar="GIB",
                        help="memory for outputs of the frozen part; if they need more it runs "
                        "in every step")  # fmt: skip
    for action in parser._actions:  # several learning rates share one pass of the frozen part
        if action.dest == "learning_rate":
            action.nargs, action.help = "+", "highest learning rate; each value is a run of its own"
    return parser


class FrozenThenTrained(nn.Module):
    """The frozen part without gradient, its output rounded to half precision, then the rest."""

    def __init__(self, frozen, trained):
        super().__init__()
        self.frozen, self.trained = frozen, trained

    def forward(self, images):
        with torch.no_grad():
            features = self.frozen(images).half().float()
        return self.trained(features)


class FeatureLoader:
    """A data.Loader that yields stored features instead of photos: the same order and views.

    features: half [views, N, ...], output of the frozen part; yields (float32 [B, ...], labels).
    """

    def __init__(self, loader, features):
        self.loader, self.features, self.labels = loader, features, loader.labels

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        view = self.features[self.loader.epoch % len(self.features)]
        order = self.loader.order().to(view.device)
        for index in order.tensor_split(len(self)):
            labels = self.labels[index.to(self.labels.device)]
            yield view[index].to(labels.device).float(), labels
        self.loader.epoch += 1


@torch.no_grad()
def compute_features(frozen, loader, views, context):
    """Run the frozen part over every photo once per view -> half [views, N, ...]."""
    features, count, everything = None, len(loader.labels), torch.arange(len(loader.labels))
    for number in range(views):
        start = 0
        view = None if loader.augmentation is None else loader.view(number)
        for images, _ in loader.batches(everything, view):
            with context:
                output = frozen(images.contiguous(memory_format=train_scratch.MEMORY_FORMAT))
            if features is None:
                shape = (views, count, *output.shape[1:])
                features = torch.empty(shape, dtype=torch.half, device=output.device)
            features[number, start : start + len(output)] = output
            start += len(output)
    return features


def feature_bytes(frozen, photos, image_size, device):
    """Memory that compute_features() will need for `photos` photos, bytes."""
    with torch.no_grad():
        output = frozen(torch.zeros(1, 3, image_size, image_size, device=device))
    return photos * output.numel() * 2


def main(argv=None):
    parser = build_parser()
    config = vars(parser.parse_args(argv))
    start, rates, wanted_name = time.perf_counter(), config["learning_rate"], config["name"]
    features, shared = None, 0.0
    for rate in rates:
        config = config | {"learning_rate": rate, "name": wanted_name}
        if wanted_name and len(rates) > 1:
            config["name"] = f"{wanted_name}-lr{rate:g}"
        count = config["unfreeze_convolutions"]
        prefix = f"{config['backbone']}-{f'last{count}' if count else 'fc'}"
        train, validation, described, name = train_scratch.start_run(parser, config, prefix)
        if name is None:
            continue
        device = train_scratch.pick_device(config["device"])
        torch.manual_seed(config["seed"])
        model = models.build_backbone(
            config["backbone"], len(train.classes), config["weights"], count, config["dropout"]
        )
        model.to(device, memory_format=train_scratch.MEMORY_FORMAT)
        before, cut = models.frozen_state(model), model.first_trained()
        frozen, trained = models.fold_batch_norm(model[:cut]), model[cut:]
        frozen.to(memory_format=train_scratch.MEMORY_FORMAT)
        augmentation = {key: config[key] for key in runs.SCRATCH_AUGMENTATION}
        views = min(config["views"], config["epochs"])
        train_loader = data.Loader(
            train, config["batch_size"], device, augmentation, config["seed"], views
        )
        validation_loader = data.Loader(validation, 64, device)
        photos = len(train.labels) * views + len(validation.labels)
        needed = feature_bytes(frozen, photos, config["image_size"], device) / 2**30
        if needed <= config["feature_memory"]:
            if features is None:
                begin = time.perf_counter()
                context = train_scratch.autocast(device, config["precision"])
                features = [
                    compute_features(frozen, loader, loader.views or 1, context)
                    for loader in (train_loader, validation_loader)
                ]
                shared = time.perf_counter() - begin
            loaders = [
                FeatureLoader(loader, stored)
                for loader, stored in zip((train_loader, validation_loader), features, strict=True)
            ]
            part = trained
        else:
            print(
                f"{name}: features need {needed:.1f} GiB, --feature-memory is "
                f"{config['feature_memory']:g}: the frozen part runs in every step"
            )
            loaders, part = (train_loader, validation_loader), FrozenThenTrained(frozen, trained)
        history, best, state = train_scratch.fit(part, *loaders, config, device, name)
        unchanged = models.is_unchanged(model, before)
        if not unchanged:
            raise SystemExit(f"{name}: a frozen tensor has changed in training; please report it")
        state = {
            key.removeprefix("trained."): value
            for key, value in state.items()
            if not key.startswith("frozen.")
        }
        model.load_state_dict({**model.state_dict(), **state}, strict=True)
        train_scratch.save(
            "finetune",
            name,
            config,
            described,
            model,
            (history, best, model.to("cpu").state_dict()),
            start,
            device,
            frozen_unchanged=unchanged,
        )
        start = time.perf_counter() - shared  # every run needed the features


if __name__ == "__main__":
    runs.run_main(main)
