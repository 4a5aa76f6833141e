"""Every network of the study, and nothing about training.

    python models.py plain residual mobilenet_v2    print them layer by layer

PlainCNN and ResidualCNN are written out here; the backbones are torchvision's, viewed as a
straight sequence of blocks, with all but the last few layers frozen.
"""

import argparse
import copy
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

BACKBONES = ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "shufflenet_v2_x1_0")


class PlainCNN(nn.Module):
    """Five convolutions and two fully connected layers.

    A block is convolution, max pooling, batch norm, ReLU. Pooling comes first because the two
    that follow then touch a quarter of the pixels. float [B, 3, H, W] -> logits [B, classes],
    H and W at least 32. `dropout` acts on the input of both fully connected layers.
    """

    widths = (32, 64, 128, 256, 384)

    def __init__(self, classes, dropout=0.0):
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False)
            for before, after in itertools.pairwise((3, *self.widths))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in self.widths)
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(dropout)
        self.fc1 = nn.Linear(self.widths[-1], 256)
        self.fc2 = nn.Linear(256, classes)
        for convolution in self.convolutions:  # He et al., ICCV 2015
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")

    def block(self, index, x):
        """Block `index` (0 to 4): float [B, C, H, W] -> [B, C', H / 2, W / 2]."""
        return F.relu(self.norms[index](self.pool(self.convolutions[index](x))))

    def forward(self, images):
        x = images
        for index in range(len(self.convolutions)):
            x = self.block(index, x)
        x = x.mean((2, 3))  # global average: [B, 384]
        x = F.relu(self.fc1(self.dropout(x)))
        return self.fc2(self.dropout(x))


class ResidualCNN(PlainCNN):
    """PlainCNN with a skip around every block but the first, and nothing else changed.

    He et al., "Deep residual learning for image recognition", CVPR 2016, with their option A,
    which has no parameters: the skip is zero in the added channels. It is pooled by the average
    and added after the ReLU, so that what it carries is neither the largest value alone nor cut
    off; pooled by the maximum and added before the ReLU it was a point worse than no skip
    (results/EXPERIMENTS.md).
    """

    def block(self, index, x):
        y = super().block(index, x)
        if index == 0:  # three colours are no features yet
            return y
        skip = F.avg_pool2d(x, 2)  # F.pad begins with the last dimension: width, height, channels
        return y + F.pad(skip, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))


SCRATCH = {"plain": PlainCNN, "residual": ResidualCNN}


class Backbone(nn.Sequential):
    """A pre-trained network as a straight sequence of blocks: float [B, 3, H, W] -> logits float
    [B, classes]."""

    def train(self, mode=True):
        """Like nn.Module.train, but frozen batch norm stays in eval mode: its statistics stay."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self

    def first_trained(self):
        """Index of the first block that differs from step to step: trained, or dropout."""
        for index, block in enumerate(self):
            if isinstance(block, nn.Dropout) or any(p.requires_grad for p in block.parameters()):
                return index


def build_backbone(name, classes, weights="IMAGENET1K_V1", unfreeze_convolutions=0, dropout=0.2):
    """Return a Backbone with a new last Linear, everything frozen but that and the last
    `unfreeze_convolutions` convolutions with their batch norms.

    weights: a name that torchvision knows, "none" (random) or a file with a state dict of the
    1000-class network. Exits with one line if they cannot be had.
    """
    network = load_torchvision(name, weights)
    if name.startswith("shufflenet"):
        stages = [*network.stage2, *network.stage3, *network.stage4]
        features = [network.conv1, network.maxpool, *stages, network.conv5]
        head = [network.fc]
    else:
        features, head = [*network.features], [*network.classifier]
    head = [layer for layer in head if not isinstance(layer, nn.Dropout)]
    last = nn.Linear(head[-1].in_features, classes)
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = Backbone(*features, *pooled, *head[:-1], nn.Dropout(dropout), last)
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # on a CPU, bfloat16 in place takes twice as long
    model.requires_grad_(False)
    last.requires_grad_(True)
    convolutions = main_convolutions(model)
    if unfreeze_convolutions > len(convolutions):
        raise SystemExit(f"--unfreeze-convolutions: {name} has only {len(convolutions)}.")
    for convolution, norm in convolutions[len(convolutions) - unfreeze_convolutions :]:
        nn.ModuleList([convolution, norm]).requires_grad_(True)
    return model


def load_torchvision(name, weights):
    """torchvision's network `name` with `weights` as in build_backbone."""
    from torchvision.models import get_model, get_model_weights  # takes a second: only when needed

    try:
        if weights != "none" and not Path(weights).is_file():
            return get_model(name, weights=get_model_weights(name)[weights])
        network = get_model(name, weights=None)
        if weights != "none":
            network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        return network
    except Exception as error:  # whatever the network, the disk or a damaged file make torch raise
        reason = str(error).strip().split("\n")[0]
        names = ", ".join(entry.name for entry in get_model_weights(name))
        raise SystemExit(
            f"the weights {weights} of {name} cannot be had ({reason}). Give --weights {names}, "
            f"none or a file; downloads are kept in {torch.hub.get_dir()}/checkpoints."
        ) from None


def main_convolutions(model):
    """[[convolution, its batch norm], ...] in execution order, without squeeze-excitation.

    In these networks modules are registered in the order in which they run, and only the
    convolutions of squeeze-excitation have no batch norm after them; tests check both.
    """
    found = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            convolution = module
        elif isinstance(module, nn.BatchNorm2d):
            found.append([convolution, module])
    return found


def fold_batch_norm(frozen):
    """A copy of a network in eval mode, each batch norm folded into the convolution before it.

    The same function with a third less work. Jacob et al., CVPR 2018, section 3.2.
    """
    folded = copy.deepcopy(frozen).eval()
    for parent in list(folded.modules()):
        for (key, module), (after, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(module, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, key, fuse_conv_bn_eval(module, norm))
                setattr(parent, after, nn.Identity())
    return folded.requires_grad_(False)


def frozen_state(model):
    """Copies of every tensor that training must leave alone: state dict name -> tensor.

    That is every frozen parameter, and every buffer of a batch norm that is frozen.
    """
    state = {}
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(name, recurse=False))
        frozen = {key: p for key, p in parameters.items() if not p.requires_grad}
        state.update(frozen)
        if len(frozen) == len(parameters):
            state.update(module.named_buffers(name, recurse=False))
    return {key: tensor.detach().clone() for key, tensor in state.items()}


def is_unchanged(model, frozen):
    """True if every tensor of `frozen` (see frozen_state) is still the same, bit for bit."""
    state = model.state_dict()
    return all(torch.equal(state[name], frozen[name]) for name in frozen)


def counts(model):
    """Parameters and layers as they stand in a run's JSON."""
    modules = list(model.modules())
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "convolutions": sum(isinstance(module, nn.Conv2d) for module in modules),
        "linear_layers": sum(isinstance(module, nn.Linear) for module in modules),
    }


def describe(model, image_size):
    """Run one image of zeros through `model`; return a row (dict) per layer, in execution order."""
    rows, names = [], {module: name for name, module in model.named_modules()}

    def record(module, _inputs, output):
        parameters = list(module.parameters())
        trained = any(p.requires_grad for p in parameters)
        rows.append(
            {
                "layer": names[module],
                "type": type(module).__name__,
                "kernel": getattr(module, "kernel_size", ""),
                "stride": getattr(module, "stride", ""),
                "output": list(output.shape[1:]),
                "parameters": sum(p.numel() for p in parameters),
                "state": ("trained" if trained else "frozen") if parameters else "-",
            }
        )

    hooks = [m.register_forward_hook(record) for m in names if not list(m.children())]
    model.eval()(torch.zeros(1, 3, image_size, image_size))
    for hook in hooks:
        hook.remove()
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    flag, names = parser.add_argument, (*SCRATCH, *BACKBONES)
    flag("network", nargs="+", choices=names, metavar="NETWORK", help=", ".join(names))
    flag("--classes", type=int, default=11, help="outputs of the last layer (11)")
    flag("--image-size", type=int, default=224, help="of the square photos, pixels (224)")
    flag("--weights", default="IMAGENET1K_V1", help="that name (default), none, or a file")
    arguments = parser.parse_args(argv)
    for name in arguments.network:
        if name in SCRATCH:
            model = SCRATCH[name](arguments.classes)
        else:  # the second case; in the first the last layer alone is trained
            model = build_backbone(name, arguments.classes, arguments.weights, 2)
        layers = describe(model, arguments.image_size)
        rows = [layers[0].keys(), *([str(cell) for cell in row.values()] for row in layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print(f"\n{name}, {arguments.image_size} x {arguments.image_size} px")
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
        print(", ".join(f"{value:,} {key}" for key, value in counts(model).items()))


if __name__ == "__main__":
    main()
