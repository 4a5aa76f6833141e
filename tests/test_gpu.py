"""What only a GPU can show: the step as a CUDA graph gives the numbers of the eager one."""

import pytest
import torch

import engine
import finetune
import train_scratch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SMALL = "--device cuda --image-size 64 --batch-size 6 --epochs 4 --checkpoint-seconds 0 "
MIXED = SMALL + "--model residual --dropout 0.2 --cutmix 0.5 --sam-share 0.5"
TUNED = SMALL + "--backbone mobilenet_v3_small --weights none --unfreeze-convolutions 16"


def train(photos, flags, output):
    """A list of the losses and accuracies of each epoch."""
    script = finetune if "--backbone" in flags else train_scratch
    script.main(["--data", str(photos), "--output", output, *flags.split()])
    [run] = engine.read_runs(output).values()
    return [row[key] for row in run["history"] for key in engine.SHOWN]


@pytest.mark.parametrize("flags", [MIXED, TUNED])
def test_the_step_as_a_graph_gives_the_numbers_of_the_eager_one(photos, monkeypatch, flags):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    replays, graphs, replay = [], torch.cuda.CUDAGraph, torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(graphs, "replay", lambda own: replays.append(own) or replay(own))
    graph = train(photos, flags, "graph")
    assert len(replays) == 28 - 3 * len(set(replays))  # after three steps of each graph
    monkeypatch.setattr(engine, "Graphed", lambda step: step)
    assert train(photos, flags, "eager") == graph
