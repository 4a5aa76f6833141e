"""Muon, AdamW and the learning-rate schedule.

The optimizers have the two things that the training loop uses, `param_groups` and `step()`, and
are not torch.optim.Optimizers: constructing one imports torch's compiler, which takes longer than
the first epoch of a small study on a GPU.
"""

import torch
from torch.optim.adamw import adamw


class Muon:
    """Momentum whose every update is made (nearly) orthogonal: for matrices and kernels.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. A kernel
    [out, in, k, k] counts as the matrix [out, k * k * in]. Decoupled weight decay.
    """

    def __init__(self, parameters, lr, weight_decay, momentum=0.95):
        self.param_groups = [{"params": parameters, "lr": lr, "weight_decay": weight_decay}]
        self.averages = [torch.zeros_like(parameter) for parameter in parameters]
        self.momentum = momentum

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        for weight, average in zip(group["params"], self.averages, strict=True):
            average.lerp_(weight.grad, 1 - self.momentum)
            update = weight.grad.lerp(average, self.momentum)  # Nesterov
            if update.ndim == 4:  # in channels_last order, where flattening copies nothing
                update = update.permute(0, 2, 3, 1)
            matrix = update.flatten(1)
            scale = max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
            update = orthogonalise(matrix).view(update.shape)
            if update.ndim == 4:
                update = update.permute(0, 3, 1, 2)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.sub_(update, alpha=group["lr"] * scale)


def orthogonalise(matrix):
    """Five Newton-Schulz steps towards the nearest (semi-)orthogonal matrix, in bfloat16."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        polynomial = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return (x.T if tall else x).to(matrix.dtype, memory_format=torch.contiguous_format)


class AdamW:
    """torch's own AdamW (Loshchilov and Hutter, ICLR 2019), in one fused call a group."""

    def __init__(self, groups, lr):
        self.param_groups = [group | {"lr": lr} for group in groups]
        self.states = []
        for group in groups:
            moments = [[torch.zeros_like(p) for p in group["params"]] for _ in range(2)]
            steps = [torch.zeros((), device=p.device) for p in group["params"]]
            self.states.append((*moments, [], steps))

    @torch.no_grad()
    def step(self):
        for group, state in zip(self.param_groups, self.states, strict=True):
            parameters = group["params"]
            fused = parameters[0].device.type in ("cpu", "cuda")
            adamw(parameters, [p.grad for p in parameters], *state, fused=fused, amsgrad=False,
                  beta1=0.9, beta2=0.999, eps=1e-8, lr=group["lr"], maximize=False,
                  weight_decay=group["weight_decay"])  # fmt: skip


def build_optimizers(model, config):
    """Optimizers for what is not frozen. Biases and batch norm are not decayed.

    With Muon it takes the matrices and kernels, at the learning rate; AdamW takes the rest, the
    last layer and a convolution of the three colours, at a tenth of it.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    rate, decay = config["learning_rate"], config["weight_decay"]
    optimizers = []
    if config["optimizer"] == "muon":
        inner = [matrix for matrix in matrices[:-1] if matrix.shape[1] != 3]
        if inner:
            optimizers.append(Muon(inner, lr=rate, weight_decay=decay))
        matrices = [matrix for matrix in matrices[:-1] if matrix.shape[1] == 3] + matrices[-1:]
        rate, decay = rate / 10, 0.01
    groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [*optimizers, AdamW(groups, lr=rate)]


def learning_rate_factor(epoch, epochs, warmup):
    """Linear rise over `warmup` epochs, then linear fall to zero; `epoch` is a float."""
    warmup = min(warmup, epochs / 2)
    return epoch / warmup if epoch < warmup else (epochs - epoch) / (epochs - warmup)
