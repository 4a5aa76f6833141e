"""Fine-tune a pre-trained backbone: the last layer, or the last N convolutions and the last layer.

    python finetune.py --data food11 --backbone mobilenet_v2 --unfreeze-convolutions 0
    python finetune.py --data food11 --backbone mobilenet_v2 --unfreeze-convolutions 2
    python finetune.py --backbone shufflenet_v2_x1_0 --learning-rate 0.001 0.003 --seed 0 1 2

The frozen part of the network runs once per augmented view of each photo, not once per epoch; its
output is kept in memory, for all runs that share it, and the rest is trained on that by the loop of
engine.py. What is written and read is as with train_scratch.py.
"""

import time

from common import Parser, add_place_flags, number

import torch
import torch.distributed as dist

import data
import engine
import models


def build_parser():
    parser = Parser(__doc__)
    add_place_flags(parser)
    engine.add_training_flags(parser)
    flag = parser.add_argument
    share, names = number(float, 0, 1), ", ".join(models.BACKBONES)
    flag("--backbone", choices=models.BACKBONES, default="mobilenet_v2", metavar="B", help=names)
    flag("--weights", default="IMAGENET1K_V1", help="name in torchvision, none (random), or a file")
    flag(
        "--unfreeze-convolutions",
        type=number(int, 0),
        default=0,
        help="how many of the last to train",
    )
    flag("--image-size", type=number(int, 32, 2048), default=288, help="side of the photos, pixels")
    flag("--learning-rate", type=number(float, 1e-12), nargs="+", default=[0.001], help="peak")
    flag("--dropout", type=number(float, 0, 0.99), nargs="+", default=[0.2], help="before the FC")
    flag("--optimizer", choices=("muon", "adamw"), default="adamw", help="muon: for matrices")
    flag("--weight-decay", type=number(float, 0), default=0.05, help="decoupled")
    flag(
        "--crop-scale", type=number(float, 0.01, 1), default=0.5, help="smallest crop, of the area"
    )
    flag("--rotation", type=number(float, 0, 180), default=0.0, help="largest, degrees")
    flag("--jitter", type=share, default=0.1, help="largest change of colours, as a fraction")
    flag("--flip", type=share, default=0.5, help="probability of a mirrored photo")
    flag("--views", type=number(int, 1), default=4, help="of each photo; the epochs take turns")
    flag(
        "--feature-memory",
        type=number(float, 0),
        default=4.0,
        help="for kept features, GiB a process",
    )
    return parser


class FrozenLoader:
    """A data.Loader that yields features instead of photos, computed anew for every batch.

    Yields (float32 [B, ...], rounded to half precision as in FeatureLoader, labels int64 [B]).
    """

    def __init__(self, loader, frozen, context):
        self.loader, self.frozen, self.context = loader, frozen, context
        self.labels, self.device, self.set_epoch = loader.labels, loader.device, loader.set_epoch

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for images, labels in self.loader:
            with torch.no_grad(), self.context:
                features = self.frozen(images)
            yield features.half().float(), labels


class FeatureLoader:
    """A data.Loader that yields stored features instead of photos: the same order and views.

    features: half [views, N, ...], output of the frozen part, as many views as loader.views (one
    without an Augmentation); yields (float32 [B, ...], labels).
    """

    def __init__(self, loader, features):
        self.loader, self.features = loader, features
        self.labels, self.device, self.set_epoch = loader.labels, loader.device, loader.set_epoch

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        of_this_view = self.features[self.loader.epoch % len(self.features)]
        order = self.loader.order().to(of_this_view.device)
        for index in self.loader.shares(order):
            features = of_this_view[index].float()
            if features.ndim == 4:
                features = features.contiguous(memory_format=torch.channels_last)
            yield features, self.labels[index]


@torch.no_grad()
def compute_features(frozen, loader, views, context):
    """Run the frozen part over every photo once per view -> half [views, N, ...]."""
    features = None
    everything = torch.arange(len(loader.labels), device=loader.device)
    for view in range(views):
        batches = loader.batches(everything, loader.draw_view(view))
        for index, (images, _) in zip(loader.shares(everything), batches, strict=True):
            with context:
                output = frozen(images)
            if features is None:
                shape = (views, len(everything), *output.shape[1:])
                features = torch.zeros(shape, dtype=torch.half, device=output.device)
            features[view, index] = output.half()
        _, count = data.processes()
        if count > 1:  # the others' photos are still zero here
            with engine.together():
                dist.all_reduce(features[view])
    return features


def feature_gibibytes(frozen, photo_count, image_size, device):
    """Memory that compute_features() will need for so many photos, GiB, a float."""
    with torch.no_grad():
        output = frozen(torch.zeros(1, 3, image_size, image_size, device=device))
    return photo_count * output.numel() * 2 / 2**30


def main(argv=None):
    parser = build_parser()
    arguments = parser.parse_args(argv)
    device = engine.set_up(arguments)
    photos = engine.load_photos(arguments, device)
    if arguments.best_of_grid:
        arguments = engine.take_best_of_grid(parser, arguments, photos)
    unfrozen = arguments.unfreeze_convolutions
    prefix = f"{arguments.backbone}-last{unfrozen}" if unfrozen else f"{arguments.backbone}-fc"
    views = min(arguments.views, arguments.epochs)
    train_features, validation_features = None, None
    seed_of_features, feature_seconds = None, 0.0
    for run in engine.unfinished_runs(parser, arguments, prefix, photos):
        of_run = engine.photos_of_run(photos, run)
        torch.manual_seed(run.seed)
        model = models.build_backbone(
            run.backbone, len(photos.train.classes), run.weights, unfrozen, run.dropout
        )
        model.to(device, memory_format=torch.channels_last)
        before = models.frozen_state(model)
        cut = model.first_trained()
        frozen = models.fold_batch_norm(model[:cut]).to(memory_format=torch.channels_last)
        trained = model[cut:]  # its layers are those of `model`, under the same names
        augmentation = data.Augmentation(run.crop_scale, run.rotation, run.jitter, run.flip)
        train_loader = data.Loader(
            of_run.train, run.batch_size, device, augmentation, run.seed, views
        )
        validation_loader = data.Loader(photos.validation, engine.EVALUATION_BATCH, device)
        context = engine.autocast(device, run.precision)
        total = views * len(of_run.train.labels) + len(photos.validation.labels)
        needed = feature_gibibytes(frozen, total, run.image_size, device)
        if needed > run.feature_memory:
            print(
                f"{run.name}: features need {needed:.1f} GiB, --feature-memory is "
                f"{run.feature_memory:g}: the frozen part runs in every step"
            )
            train_loader = FrozenLoader(train_loader, frozen, context)
            validation_loader = FrozenLoader(validation_loader, frozen, context)
        else:
            if run.seed != seed_of_features:  # another seed draws other views, or photos
                train_features, validation_features = None, None  # frees their memory
                begin = time.perf_counter()
                # In batches of one size: runs that share features may have others.
                source = data.Loader(
                    of_run.train, engine.EVALUATION_BATCH, device, augmentation, run.seed
                )
                train_features = compute_features(frozen, source, views, context)
                validation_features = compute_features(frozen, validation_loader, 1, context)
                engine.synchronise(device)
                feature_seconds, seed_of_features = time.perf_counter() - begin, run.seed
            train_loader = FeatureLoader(train_loader, train_features)
            validation_loader = FeatureLoader(validation_loader, validation_features)
        result = engine.fit(trained, train_loader, validation_loader, run, of_run)
        if not models.is_unchanged(model, before):
            raise SystemExit(f"{run.name}: a frozen tensor has changed; please report it")
        if result.failed is None:
            trained.load_state_dict(result.best_state)
        result = result._replace(
            best_state=model.to("cpu").state_dict(), seconds=result.seconds + feature_seconds
        )
        engine.save_run("finetune", run, of_run, model, result, frozen_unchanged=True)


if __name__ == "__main__":
    main()
