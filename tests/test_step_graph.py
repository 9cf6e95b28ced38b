"""Recorded steps against plain ones; needs a GPU, since a recording is one of CUDA's."""

import pandas as pd
import pytest
import torch

import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
OPTIONS = ["--task", "sst2", "--epoch", "4", "--train_batch_size", "4", "--learning_rate", "1e-2"]


@pytest.mark.parametrize("more", [[], ["--gradient_accumulation_steps", "2"]])
def test_a_recorded_run_gives_the_same_history(more, tiny_base, comments, tmp_path, monkeypatch):
    """With dropout, so that the random numbers must be the same, too."""
    monkeypatch.chdir(tmp_path)
    options = ["--base_model_name", str(tiny_base), "--dataset_name", str(comments), *OPTIONS, *more]
    histories, replays = {}, []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph):
        replays.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    for name in ("recorded", "plain"):
        if name == "plain":
            monkeypatch.setattr(train, "GraphedStep", lambda step, parameters: step)
        assert train.main([*options, "--adapters_name", name]) == 0
        histories[name] = pd.read_csv(f"models/{name}/history.csv")
    assert len(replays) == 16
    pd.testing.assert_frame_equal(histories["recorded"], histories["plain"], rtol=1e-2)
