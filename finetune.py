"""Fine-tune a pre-trained backbone: the last layer, or the last N convolutions and the last layer.

    python finetune.py --data food11 --backbone mobilenet_v2 --unfreeze-convolutions 0
    python finetune.py --data food11 --backbone mobilenet_v2 --unfreeze-convolutions 2
    python finetune.py --backbone shufflenet_v2_x1_0 --learning-rate 0.001 0.003 --seed 0 1 2

The frozen part of the network runs once per augmented view of each photo, not once per epoch; its
output is kept in memory, for all runs that share it, and the rest is trained on that by the loop of
engine.py. What is written and read is as with train_scratch.py.
"""

import argparse
import time

import torch

import data
import engine
import models


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flag, count = parser.add_argument, engine.number(int, 0)
    flag("--backbone", choices=models.BACKBONES, default="mobilenet_v2", help="network")
    flag("--weights", default="IMAGENET1K_V1", help="name in torchvision, none (random), or a file")
    flag("--unfreeze-convolutions", type=count, default=0, help="how many of the last to train")
    engine.add_training_flags(parser)
    flag("--views", type=engine.number(int, 1), default=4, help="of each photo, used in turns")
    memory = engine.number(float, 0)
    flag("--feature-memory", type=memory, default=4.0, help="for kept features, GiB a process")
    parser.set_defaults(image_size=288, learning_rate=[0.001], dropout=[0.2], weight_decay=0.05)
    parser.set_defaults(crop_scale=0.5, rotation=0.0, jitter=0.1)
    # AdamW alone; features of a frozen part can't be mixed by CutMix.
    parser.set_defaults(optimizer="adamw", cutmix=0.0, sam_share=0.0, sam_radius=0.0)
    return parser


class FeatureLoader(data.Loader):
    """A data.Loader that yields what `frozen` makes of photos: float32 [n, ...].

    Epoch e has the views (not the order) of epoch e % views. kept: half [N, ...] of each view, or
    None to compute them in every step; both ways they are rounded to half precision.
    """

    def __init__(self, frozen, views, context, *arguments):
        super().__init__(*arguments)
        self.frozen, self.context, self.kept = frozen, context, None
        self.views = views if self.augmentation else 1

    def draw_view(self, number):
        """(number of the view, its parameters as in data.Loader)."""
        return number % self.views, super().draw_view(number % self.views)

    @torch.no_grad()
    def compute(self, index, parameters):
        """Features of photos int64 [n] in one view: half [n, ...]."""
        images = super().inputs(index, parameters)
        with self.context:
            return self.frozen(images).half()

    def compute_all(self):
        """Features of all photos: a list with half [N, ...] for each view."""
        kept, chunks = [], torch.arange(len(self.labels)).split(engine.EVALUATION_BATCH)
        for number in range(self.views):
            _, parameters = self.draw_view(number)
            steps = data.progress(chunks, len(chunks), f"view {number + 1} of {self.views}")
            kept.append(torch.cat([self.compute(i.to(self.device), parameters) for i in steps]))
        return kept

    def inputs(self, index, view):
        number, parameters = view
        features = self.kept[number][index] if self.kept else self.compute(index, parameters)
        if features.ndim == 4:
            features = features.contiguous(memory_format=torch.channels_last)
        return features.float()


def gibibytes(frozen, photo_count, image_size, device):
    """Memory that the features of so many photos take, GiB."""
    with torch.no_grad():
        output = frozen(torch.zeros(1, 3, image_size, image_size, device=device))
    return photo_count * output.numel() * 2 / 2**30


def main(argv=None):
    parser = build_parser()
    arguments = parser.parse_args(argv)
    device = engine.pick_device(arguments.device)
    last = arguments.unfreeze_convolutions
    network = f"{arguments.backbone}-last{last}" if last else f"{arguments.backbone}-fc"
    runs = engine.unfinished_runs(parser, arguments, network)
    if not runs:
        return
    train, validation = engine.load_photos(arguments, device)
    kept, feature_seconds = {}, 0.0  # features of the runs of one seed
    for run in runs:
        torch.manual_seed(run.seed)
        classes = len(train.classes)
        model = models.build_backbone(run.backbone, classes, run.weights, last, run.dropout)
        model.to(device, memory_format=torch.channels_last)
        before, cut = models.frozen_state(model), model.first_trained()
        frozen = models.fold_batch_norm(model[:cut]).to(memory_format=torch.channels_last)
        views = min(run.views, run.epochs)
        shared = (frozen, views, engine.autocast(device, run.precision))
        augmentation = data.Augmentation(run.crop_scale, run.rotation, run.jitter, run.flip)
        order = (augmentation, run.seed, engine.processes())
        loaders = [
            FeatureLoader(*shared, train, run.batch_size, device, *order),
            FeatureLoader(*shared, validation, engine.EVALUATION_BATCH, device),
        ]
        photos = views * len(train.labels) + len(validation.labels)
        needed = gibibytes(frozen, photos, run.image_size, device)
        if needed > run.feature_memory:
            print(f"features need {needed:.1f} GiB (--feature-memory): computed in every step")
        elif run.seed not in kept:
            kept, begin = {}, time.perf_counter()  # frees those of the last seed
            kept[run.seed] = [loader.compute_all() for loader in loaders]
            feature_seconds = time.perf_counter() - begin
        for loader, features in zip(loaders, kept.get(run.seed, [None, None]), strict=True):
            loader.kept = features
        # The trained layers are those of `model`, under the same names.
        history, failed = engine.fit(model[cut:], *loaders, run, classes)
        unchanged = models.is_unchanged(model, before)
        about = {"seconds": feature_seconds, "frozen_unchanged": unchanged}
        engine.save_run("finetune", run, (train, validation), model, history, failed, **about)
        if not unchanged:
            raise SystemExit(f"{run.name}: a frozen tensor has changed; please report it")


if __name__ == "__main__":
    main()
