"""The networks are what the study says they are."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import models

IMAGES = torch.rand(4, 3, 64, 64)


@pytest.mark.parametrize("name", models.SCRATCH)
def test_both_cnns_have_five_convolutions_and_two_fully_connected_layers(name):
    ran = Counter(row["type"] for row in models.describe(models.SCRATCH[name](11), 64))
    assert ran == {"Conv2d": 5, "MaxPool2d": 5, "BatchNorm2d": 5, "Linear": 2, "Dropout": 2}


def test_residual_is_plain_plus_skips_without_parameters():
    with torch.random.fork_rng():
        plain = models.PlainCNN(11).eval()
    residual = models.ResidualCNN(11).eval()
    assert plain.state_dict().keys() == residual.state_dict().keys()
    assert models.is_unchanged(residual, plain.state_dict())  # the same start
    x = torch.rand(2, 32, 8, 8)
    pooled = x.view(2, 32, 4, 2, 4, 2).mean((3, 5))
    added = residual.block(1, x) - plain.block(1, x)
    torch.testing.assert_close(added, torch.cat([pooled, 0 * pooled], 1))
    assert not torch.allclose(plain(IMAGES), residual(IMAGES))


@pytest.mark.parametrize("name", models.BACKBONES)
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_last_convolutions_are_trained_and_frozen_is_frozen(name, count):
    model = models.build_backbone(name, 7, "none", count)
    rows = models.describe(model, 64)  # in execution order
    norms = [place for place, row in enumerate(rows) if row["type"] == "BatchNorm2d"]
    last = [row for place in norms[len(norms) - count :] for row in rows[place - 1 : place + 1]]
    layers = {row["layer"] for row in [*last, rows[-1]]}
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trained = {key for key in before if key.rpartition(".")[0] in layers}
    assert models.frozen_state(model).keys() == before.keys() - trained
    model.train()(IMAGES)
    moved = {key for key, t in model.state_dict().items() if not torch.equal(t, before[key])}
    assert trained == moved | {key for key, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", models.BACKBONES)
def test_a_backbone_computes_what_torchvision_computes_folded_or_not(name):
    network = models.load_torchvision(name, "none")
    network(IMAGES)  # moves the statistics of batch norm
    network.eval()
    torch.save(network.state_dict(), "weights.pth")
    model = models.build_backbone(name, 1000, "weights.pth").eval()
    *_, last = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
    model[-1].load_state_dict(last.state_dict())
    expected, folded = network(IMAGES), models.fold_batch_norm(model)
    torch.testing.assert_close(model(IMAGES), expected)
    torch.testing.assert_close(folded(IMAGES), expected, rtol=1e-3, atol=1e-4)
    assert "BatchNorm2d" not in str(folded)


def test_one_changed_bit_is_noticed():
    model = models.build_backbone("mobilenet_v3_small", 5, "none")
    before = models.frozen_state(model)
    assert models.is_unchanged(model, before)
    model[0][1].running_var.view(torch.int32)[3] += 1
    assert not models.is_unchanged(model, before)


class Code:
    def __reduce__(self):
        return Path.touch, (Path("has_run"),)


@pytest.mark.parametrize("weights", ["IMAGENET", "damaged.pth", "code.pth"])
def test_weights_that_cannot_be_had_are_one_line_and_no_code_is_run(weights):
    Path("damaged.pth").write_text("PK")
    torch.save(Code(), "code.pth")
    with pytest.raises(SystemExit, match=f"^.*{weights} of .* --weights IMAGENET1K_V1.*$"):
        models.build_backbone("mobilenet_v2", 5, weights)
    assert not Path("has_run").exists()
