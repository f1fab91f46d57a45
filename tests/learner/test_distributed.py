import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gflowvlm.learner.distributed import Ranks
from gflowvlm.learner.learner import Learner

PROCESSES = 2


def run_rank(rank, folder, configs, model, batches):
    """One of two learner processes; leaves what it found in a file."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    results = {loss: train(config, model, batches, rank, PROCESSES) for loss, config in configs.items()}
    try:
        Ranks(rank, PROCESSES, torch.device("cpu")).shard(batches[rank])
    except RuntimeError as error:
        results["different batches"] = str(error)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def train(config, model, batches, rank=0, world_size=1):
    learner = Learner(config, model, rank, world_size)
    metrics, gradients = [], []
    for batch in batches:
        metrics.append(learner.step(batch))
        gradients.append(torch.cat([p.grad.flatten() for p in learner._optimization.parameters]))
    trained = torch.cat([p.detach().flatten() for p in learner._optimization.parameters])
    centre = torch.zeros(()) if learner._head is None else learner._head.centre
    return {"metrics": metrics, "gradients": torch.stack(gradients), "trained": trained, "centre": centre}


def rewarded(trajectories):
    """With rewards that differ within every group; every other trajectory is an expert's."""
    rewards = [[float((i * 7 + s) % 5) for s in range(len(t.steps))] for i, t in enumerate(trajectories)]
    return [dataclasses.replace(t, original_rewards=rewards[i], expert=i % 2 == 0) for i, t in enumerate(trajectories)]


@pytest.mark.slow
def test_two_learners_equal_one_and_notice_different_batches(tiny_model, make_config, make_trajectory, tmp_path):
    settings = {"grad_clip": 1e6, "learning_rate": 1e-5, "final_learning_rate": 1e-5}
    configs = {
        loss: make_config(objective={"loss": loss, "residual_clip": None}, learner=settings)
        for loss in ("var_tb", "subtb", "tb", "fl_subtb", "ppo", "grpo", "sft")
    }
    # In the second batch there is nothing for the second rank.
    batches = [rewarded(make_trajectory.batch(instances=count)) for count in (3, 1)]
    mp.spawn(run_rank, (str(tmp_path), configs, tiny_model, batches), nprocs=PROCESSES)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(PROCESSES)]

    assert all("different batches" in rank["different batches"] for rank in ranks)
    for loss, config in configs.items():
        first, second = (rank[loss] for rank in ranks)
        alone = train(config, tiny_model, batches)
        assert torch.equal(first["trained"], second["trained"])
        assert torch.equal(first["centre"], second["centre"])
        torch.testing.assert_close(first["centre"], alone["centre"])
        assert torch.equal(first["gradients"], second["gradients"])
        scale = float(alone["gradients"].abs().max())
        torch.testing.assert_close(first["gradients"], alone["gradients"], rtol=1e-4, atol=1e-5 * scale)
        assert first["metrics"] == second["metrics"]
        for found, expected in zip(first["metrics"], alone["metrics"], strict=True):
            same = [key for key in expected if "seconds" not in key and key != "micro_batches"]
            assert {key: found[key] for key in same} == pytest.approx({key: expected[key] for key in same}, rel=1e-4)


def shards(trajectories, world_size, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    monkeypatch.setattr(Ranks, "agree", lambda self, _: True)
    return [Ranks(rank, world_size, torch.device("cpu")).shard(trajectories) for rank in range(world_size)]


def test_whole_instances_go_to_one_rank_and_the_load_is_even(make_trajectory, monkeypatch):
    trajectories = make_trajectory.batch(instances=6)
    parts = shards(trajectories, 2, monkeypatch)
    assert sorted(t.trajectory_id for part in parts for t in part) == sorted(t.trajectory_id for t in trajectories)
    instances = [{t.instance_id for t in part} for part in parts]
    assert instances[0].isdisjoint(instances[1])
    loads = [sum(len(t.steps) for t in part) for part in parts]
    assert abs(loads[0] - loads[1]) <= 8
    assert parts == shards(trajectories, 2, monkeypatch)


def test_more_than_one_learner_needs_a_process_group():
    with pytest.raises(RuntimeError, match="process group"):
        Ranks(0, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="rank 2"):
        Ranks(2, 2, torch.device("cpu"))
