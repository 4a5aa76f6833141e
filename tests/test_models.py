"""The networks are what the study says they are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models


def leaves(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", models.SCRATCH)
def test_scratch_networks_have_five_convolutions_and_two_linear_layers(name):
    model = models.SCRATCH[name](11, dropout=0.3)
    assert len(leaves(model, nn.Conv2d)) == 5
    assert len(leaves(model, nn.Linear)) == 2
    assert len(leaves(model, nn.BatchNorm2d)) == 5 and leaves(model, nn.MaxPool2d)
    kinds = [row["type"] for row in models.describe(model, 64)]
    assert kinds.count("Conv2d") == 5 and kinds.count("Linear") == 2  # each runs once
    for size in (32, 64, 97):
        assert model(torch.rand(2, 3, size, size)).shape == (2, 11)


def test_plain_and_residual_start_from_the_same_parameters():
    torch.manual_seed(3)
    plain = models.PlainCNN(11).state_dict()
    torch.manual_seed(3)
    residual = models.ResidualCNN(11).state_dict()
    assert plain.keys() == residual.keys()
    assert all(torch.equal(plain[key], residual[key]) for key in plain)


def test_residual_path_adds_the_pooled_input_and_nothing_else():
    torch.manual_seed(0)
    plain, residual = models.PlainCNN(11).eval(), models.ResidualCNN(11).eval()
    residual.load_state_dict(plain.state_dict())
    x = torch.rand(2, 64, 8, 8)
    added = residual.block(2, x) - plain.block(2, x)
    torch.testing.assert_close(added[:, :64], F.avg_pool2d(x, 2))
    assert not added[:, 64:].any()
    images = torch.rand(2, 3, 64, 64)
    assert not torch.allclose(plain(images), residual(images))


@pytest.mark.parametrize("name", models.BACKBONES)
@pytest.mark.parametrize("count", [0, 2])
def test_only_the_last_layers_are_trained(name, count):
    model = models.build_backbone(name, 7, "none", count)
    executed = [row for row in models.describe(model, 64) if row["type"] in ("Conv2d", "Linear")]
    order = [row["layer"] for row in executed if ".fc" not in row["layer"]]  # no squeeze-excitation
    assert order[-1] == f"{len(model) - 1}"
    trained = {key.rpartition(".")[0] for key, p in model.named_parameters() if p.requires_grad}
    convolutions = [layer for layer in order if isinstance(model.get_submodule(layer), nn.Conv2d)]
    found = [convolution for convolution, _norm in models.main_convolutions(model)]
    assert found == [model.get_submodule(layer) for layer in convolutions]
    expected = set(convolutions[len(convolutions) - count :]) | {order[-1]}
    norms = {layer for layer in trained if isinstance(model.get_submodule(layer), nn.BatchNorm2d)}
    assert trained - norms == expected and len(norms) == count
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("name", models.BACKBONES)
def test_the_sequence_of_blocks_computes_what_torchvision_computes(name):
    network = models.load_torchvision(name, "none").eval()
    torch.manual_seed(0)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0, 0.1)
    torch.save(network.state_dict(), "weights.pth")
    model = models.build_backbone(name, 1000, "weights.pth").eval()
    last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    model[-1].load_state_dict(last.state_dict())
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model(images), network(images))


@pytest.mark.parametrize("name", models.BACKBONES)
def test_folding_batch_norm_changes_nothing_but_rounding(name):
    torch.manual_seed(0)
    model = models.build_backbone(name, 5, "none")
    for norm in leaves(model, nn.BatchNorm2d):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.data.uniform_(0.5, 1.5)
    folded, images = models.fold_batch_norm(model), torch.rand(2, 3, 64, 64)
    assert not leaves(folded, nn.BatchNorm2d)
    torch.testing.assert_close(folded(images), model.eval()(images), rtol=1e-3, atol=1e-4)


def test_frozen_batch_norm_stays_in_eval_mode_when_the_model_trains():
    model = models.build_backbone("mobilenet_v2", 5, "none", 2).train()
    modes = [norm.training for norm in leaves(model, nn.BatchNorm2d)]
    assert modes == [False] * (len(modes) - 2) + [True, True]
    before = models.frozen_state(model)
    model(torch.rand(4, 3, 64, 64)).sum().backward()
    assert models.is_unchanged(model, before)
    model[0][1].running_mean += 1e-3
    assert not models.is_unchanged(model, before)


def test_frozen_state_leaves_out_exactly_what_is_trained():
    model = models.build_backbone("shufflenet_v2_x1_0", 5, "none", 1)
    missing = model.state_dict().keys() - models.frozen_state(model).keys()
    tensors = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    head = len(model) - 1
    trained = {"18.0.weight", *(f"18.1.{tensor}" for tensor in tensors)}
    assert missing == trained | {f"{head}.weight", f"{head}.bias"}


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_broken_weights_file_is_one_clear_line(content, tmp_path):
    (tmp_path / "broken.pth").write_bytes(content)
    with pytest.raises(SystemExit, match="not a state dict"):
        models.build_backbone("mobilenet_v2", 5, str(tmp_path / "broken.pth"))
    with pytest.raises(SystemExit, match="neither a file nor one of"):
        models.build_backbone("mobilenet_v2", 5, "IMAGENET")


def test_the_layer_table_says_what_is_in_a_network(capsys):
    models.main(["residual", "mobilenet_v2", "--weights", "none", "--image-size", "64"])
    scratch, backbone = capsys.readouterr().out.split("mobilenet_v2, 64 x 64 px")
    assert scratch.count("Conv2d") == 5 and scratch.count("Linear") == 2
    assert "5 convolutions, 2 linear layers" in scratch and "frozen" not in scratch
    assert backbone.count("Conv2d") == 52 and backbone.count("Conv2d") - 2 == sum(
        "Conv2d" in line and "frozen" in line for line in backbone.splitlines()
    )


def test_more_convolutions_than_there_are_is_one_clear_line():
    with pytest.raises(SystemExit, match="shufflenet_v2_x1_0 has only"):
        models.build_backbone("shufflenet_v2_x1_0", 5, "none", 500)
