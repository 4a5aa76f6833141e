"""Optimizers and the learning-rate schedule. Muon is written out: torch has it since 2.9 only."""

import torch


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is made (nearly) orthogonal: for matrices and kernels.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. A kernel
    [out, in, k, k] counts as the matrix [out, in * k * k]. Decoupled weight decay.
    """

    def __init__(self, parameters, lr, weight_decay, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(average, group["momentum"])  # Nesterov
                update = orthogonalise(update.reshape(len(update), -1))
                update *= max(1, update.shape[0] / update.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update.view(weight.shape), alpha=group["lr"])


def orthogonalise(matrix):
    """Five Newton-Schulz steps towards the nearest (semi-)orthogonal matrix, in bfloat16."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        polynomial = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return (x.T if tall else x).float()


def build_optimizers(model, config, device):
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
    fused = device.type in ("cpu", "cuda")
    if config["optimizer"] == "sgd":
        optimizers.append(torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True))
    else:
        optimizers.append(torch.optim.AdamW(groups, lr=rate, fused=fused))
    return optimizers


def learning_rate_factor(epoch, epochs, warmup):
    """Linear rise over `warmup` epochs, then linear fall to zero; `epoch` is a float."""
    warmup = min(warmup, epochs / 2)
    return epoch / warmup if epoch < warmup else (epochs - epoch) / (epochs - warmup)
