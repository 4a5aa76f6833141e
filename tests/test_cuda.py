"""The CUDA path where there is no GPU: CUDA tensors are fake, with device and shape but no data."""

from argparse import Namespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import engine
import evaluate
import finetune
import models

pytestmark = [
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="a torch without CUDA"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]
CUDA = torch.device("cuda")
RUN = Namespace(
    output="results",
    name="fake",
    optimizer="muon",
    learning_rate=0.02,
    weight_decay=0.3,
    seed=0,
    epochs=1,
    schedule="linear",
    warmup_epochs=1.0,
    label_smoothing=0.1,
    precision="auto",
    cutmix=1.0,
    sam_share=1.0,
    sam_radius=0.1,
    logit_adjustment=1.0,
    image_size=32,
    checkpoint_seconds=30.0,
)
STRONG = data.Augmentation(0.2, 15.0, 0.3, 0.5)


class PretendCuda(TorchDispatchMode):
    """CPU tensors are real and CUDA tensors fake; `crossings` lists what went between the two.

    To mix them is an error, as on a GPU, and so is what a GPU would quietly copy, such as an index.
    """

    def __init__(self):
        super().__init__()
        self.crossings = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options, name = options or {}, function.overloadpacket.__name__
        tensors = [t for t in tree_leaves((arguments, options)) if isinstance(t, torch.Tensor)]
        real = [t for t in tensors if not isinstance(t, FakeTensor)]
        target = torch.device(options.get("device") or "cuda").type
        if len(real) == len(tensors) and (target == "cpu" or not options.get("device")):
            with unset_fake_temporarily():
                return function(*arguments, **options)
        copies = name in ("_to_copy", "copy_") and (target == "cpu" or real)
        assert copies or not real, f"{function}: a CPU tensor among CUDA ones"
        if copies or name == "_local_scalar_dense":  # float(), item(), if
            self.crossings.append(name)
        if name.startswith("_fused_adamw"):  # torch has no fake one for tensors as learning rates
            return None
        if name == "_local_scalar_dense":
            return 0.0 if arguments[0].is_floating_point() else 0
        if copies and target == "cpu":
            with unset_fake_temporarily():
                return torch.zeros(
                    arguments[0].shape, dtype=options.get("dtype", arguments[0].dtype)
                )
        return function(*arguments, **options)


@pytest.fixture
def cuda(monkeypatch):
    """A PretendCuda in force. Without a driver autograd's engine fails: gradients are made up."""

    def made_up(loss, inputs=None):
        wanted = leaves(loss.grad_fn) if inputs is None else inputs
        gradients = [torch.empty_like(tensor) for tensor in wanted]
        for tensor, gradient in zip(wanted, gradients, strict=True):
            if inputs is None:
                tensor.grad = gradient
        return gradients

    monkeypatch.setattr(torch.Tensor, "backward", made_up)
    monkeypatch.setattr(torch.autograd, "grad", made_up)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    data.constants.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True), PretendCuda() as mode:
        yield mode
    data.constants.cache_clear()


def leaves(node):
    """The parameters that the graph of `node` ends in."""
    seen, found, queue = {None}, [], [node]
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            found += [node.variable] if hasattr(node, "variable") else []
            queue += [before for before, _ in node.next_functions]
    return found


def both_splits(photos, image_size):
    splits = [data.load_split(photos, split, image_size) for split in ("train", "validation")]
    return engine.Photos(*splits, {"fingerprint": "any"})


def scratch(photos, name, batch_size):
    """Train for an epoch; return the model."""
    splits = both_splits(photos, 32)
    model = models.SCRATCH[name](3, dropout=0.2).to(CUDA, memory_format=torch.channels_last)
    train_loader = data.Loader(splits.train, batch_size, CUDA, STRONG)
    engine.fit(model, train_loader, data.Loader(splits.validation, 64, CUDA), RUN, splits)
    return model


def transfer(photos, count, batch_size):
    """The same for the last layers of a backbone, on kept features."""
    splits = both_splits(photos, 64)
    model = models.build_backbone("mobilenet_v3_small", 3, "none", count)
    model.to(CUDA, memory_format=torch.channels_last)
    cut, loaders = model.first_trained(), []
    frozen = models.fold_batch_norm(model[:cut])
    for split, augmentation in ((splits.train, STRONG), (splits.validation, None)):
        loader = data.Loader(split, batch_size, CUDA, augmentation, views=2)
        features = finetune.compute_features(frozen, loader, 2, engine.autocast(CUDA, "auto"))
        assert features.device.type == "cuda"
        loaders.append(finetune.FeatureLoader(loader, features))
    settings = {key: value for key, value in vars(RUN).items() if key != "cutmix"}
    run = Namespace(**{**settings, "optimizer": "adamw"})
    engine.fit(model[cut:], *loaders, run, splits)
    return model


@pytest.mark.parametrize(
    ("train", "what"), [(scratch, "plain"), (scratch, "residual"), (transfer, 0), (transfer, 2)]
)
def test_nothing_goes_between_cpu_and_gpu_within_a_step(photos, cuda, train, what):
    crossings = []
    for batch_size in (21, 21, 14):  # 2 steps an epoch, then 3; the first call fills caches
        cuda.crossings.clear()
        model = train(photos, what, batch_size)
        crossings.append(list(cuda.crossings))
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert crossings[1] == crossings[2]


def test_evaluation_stays_on_the_gpu(photos, cuda):
    model = models.SCRATCH["plain"](3).to(CUDA, memory_format=torch.channels_last).eval()
    split = data.load_split(photos, "validation", 32)
    context, crossings = engine.autocast(CUDA, "auto"), []
    for batch_size in (21, 21, 7):
        cuda.crossings.clear()
        for images, _ in data.Loader(split, batch_size, CUDA):
            probabilities = evaluate.predict(model, images, context, flip=True)
            maps = evaluate.activation_maps(model, images, context)
            assert probabilities.device.type == maps.device.type == "cuda"
        crossings.append(list(cuda.crossings))
    assert crossings[1] == crossings[2]
