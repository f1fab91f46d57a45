"""Learners on 1, 2 and 4 processes (gloo), with the whole base model each and with a part of it.

One start of four processes serves all tests here: their imports cost more than what they do.
"""

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

from gflowvlm.learner.distributed import Ranks
from gflowvlm.learner.learner import Learner
from gflowvlm.learner.model import load_policy
from gflowvlm.learner.sharding import load_sharded_policy
from gflowvlm.shared.config import PolicySettings, RunConfig
from gflowvlm.shared.errors import UserError
from tests.learner.conftest import TrajectoryMaker

WORLDS = (2, 4)
SHARDINGS = ("none", "fsdp")
WAIT = datetime.timedelta(seconds=240)
FILES = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "optimizer.safetensors", "state.json"]


def config(sharding, dtype):
    """With all that a step can have: a head, the reference policy, checkpointed blocks, a clip that bites.

    Little fits into a pass, so that the ranks have different numbers of them.
    """
    return RunConfig(
        objective={"loss": "fl_subtb", "residual_clip": None},
        policy={"dtype": dtype, "gradient_checkpointing": True},
        learner={
            "steps": 20,
            "warmup_steps": 0,
            "workers": 4,
            "sharding": sharding,
            "learning_rate": 1e-4,
            "head_learning_rate": 1e-4,
            "grad_clip": 0.1,
            "token_budget": 700,
        },
    )


def learn(learner, batches):
    """Takes steps; returns their gradients and metrics, and the parameters after the last."""
    gradients, metrics = [], []
    for batch in batches:
        metrics.append({key: value for key, value in learner.step(batch).items() if "seconds" not in key})
        gradients.append(torch.cat([p.grad.flatten() for p in learner._optimization.parameters]))
    parameters = torch.cat([p.detach().flatten() for p in learner._optimization.parameters])
    return {"gradients": torch.stack(gradients), "metrics": metrics, "parameters": parameters}


def base_weights(learner):
    """How many numbers of the base model this process holds."""
    base = [p for p in learner.policy.parameters() if not p.requires_grad]
    return sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in base)


def llava_next(folder):
    """Writes a tiny model of the class of the 7B presets, whose blocks are other ones."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = MistralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    both = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=63, image_grid_pinpoints=[[28, 56]]
    )
    LlavaNextForConditionalGeneration(both).save_pretrained(folder)


def llava_pass(policy):
    """Returns the logits of one prompt, and the adapter's gradients of their sum."""
    # A picture of two tiles: 4 tokens of the overview, 8 of the tiles, 2 that end the rows.
    ids = torch.tensor([[1, 5, *[63] * 14, 7, 8, 9]])
    pixels = torch.linspace(-1, 1, 3 * 3 * 28 * 28).view(1, 3, 3, 28, 28)
    inputs = {"attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_sizes": torch.tensor([[28, 56]])}
    logits = policy(input_ids=ids, use_cache=False, **inputs).logits
    logits.float().logsumexp(-1).sum().backward()
    gradients = [p.grad.flatten() for p in policy.parameters() if p.requires_grad]
    return torch.cat([logits.detach().float().flatten(), *gradients])


def run_llava(model, ranks):
    settings = PolicySettings(dtype="bfloat16", gradient_checkpointing=True)
    whole = load_policy(settings, model, seed=0, device=ranks.device)
    sharded = load_sharded_policy(settings, model, seed=0, ranks=ranks)
    return {"whole": llava_pass(whole), "sharded": llava_pass(sharded)}


def run_rank(rank, folder, model, batches):
    """One of four processes: everything with every number of learners that it takes part in."""
    torch.set_num_threads(1)
    found = {}
    for world in WORLDS:
        if rank < world:
            store = f"file://{folder}/store{world}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=WAIT)
            for sharding in SHARDINGS:
                found[f"{sharding} {world}"] = run_float32(sharding, model, batches, rank, world, Path(folder))
            found[f"llava {world}"] = run_llava(f"{folder}/llava", Ranks(rank, world, torch.device("cpu")))
            dist.destroy_process_group()
    torch.save(found, f"{folder}/rank{rank}.pt")


def run_float32(sharding, model, batches, rank, world, folder):
    learner = Learner(config(sharding, "float32"), model, rank, world)
    result = {"base_weights": base_weights(learner)}
    # One rank wants something scored, the others only take part.
    result["scores"] = learner.score(batches[0][:2] if rank == 0 else [])
    if rank == 0:
        # Saving is one rank's affair at any time, so after a pass without a way back too.
        learner.save_adapter(folder / f"{sharding} {world} adapter")
    result |= learn(learner, batches[:2])
    if rank == 0:
        learner.save(folder / f"{sharding} {world}")
    result["next"] = learn(learner, batches[2:])
    resumed = Learner(config(sharding, "float32"), model, rank, world)
    resumed.load(folder / f"{sharding} {world // 2}")
    result["resumed"] = learn(resumed, batches[2:])
    if world == 2:
        result["bfloat16"] = learn(Learner(config(sharding, "bfloat16"), model, rank, world), batches[:1])
    return result


@pytest.fixture(scope="module")
def found(tiny_model, tiny_inputs, tmp_path_factory):
    """Returns the folder of the checkpoints, what one learner found, and what each of four processes did."""
    folder = tmp_path_factory.mktemp("sharding")
    make_trajectory = TrajectoryMaker(tiny_inputs)
    # With the second batch three of four ranks have nothing to do.
    batches = [make_trajectory.batch(instances=count) for count in (3, 1, 2)]
    learner = Learner(config("none", "float32"), tiny_model)
    alone = {"base_weights": base_weights(learner), "scores": learner.score(batches[0][:2])}
    alone |= learn(learner, batches[:2])
    for sharding in SHARDINGS:
        learner.save(folder / f"{sharding} 1")
    alone["next"] = learn(learner, batches[2:])
    llava_next(folder / "llava")
    mp.spawn(run_rank, (str(folder), tiny_model, batches), nprocs=max(WORLDS))
    for world in WORLDS:
        resumed = Learner(config("none", "float32"), tiny_model)
        resumed.load(folder / f"fsdp {world}")
        alone[f"resumed from {world}"] = learn(resumed, batches[2:])
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(max(WORLDS))]
    return folder, alone, ranks


def assert_same_step(found, expected):
    """Holds to rounding."""
    scale = float(expected["gradients"].abs().max())
    torch.testing.assert_close(found["gradients"], expected["gradients"], rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(found["parameters"], expected["parameters"], rtol=1e-4, atol=1e-6)
    for mine, others in zip(found["metrics"], expected["metrics"], strict=True):
        same = [key for key in others if key != "micro_batches"]
        assert {key: mine[key] for key in same} == pytest.approx({key: others[key] for key in same}, rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_many_learners_step_as_one_does(found, sharding, world):
    _, alone, ranks = found
    for rank in range(world):
        mine = ranks[rank][f"{sharding} {world}"]
        assert_same_step(mine, alone)
        assert_same_step(mine["next"], alone["next"])
        assert torch.equal(mine["parameters"], ranks[0][f"{sharding} {world}"]["parameters"])


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_a_sharded_base_model_changes_nothing_but_what_each_learner_holds(found, world):
    folder, alone, ranks = found
    for rank in range(world):
        whole, part = ranks[rank][f"none {world}"], ranks[rank][f"fsdp {world}"]
        assert whole["base_weights"] == alone["base_weights"]
        assert part["base_weights"] == pytest.approx(alone["base_weights"] / world, rel=0.01)
        for name in ("gradients", "parameters"):
            assert torch.equal(part[name], whole[name])
        assert part["metrics"] == whole["metrics"]
        assert part["scores"] == whole["scores"]
        if world == 2:
            assert torch.equal(part["bfloat16"]["gradients"], whole["bfloat16"]["gradients"])
    for name in (*FILES, "head.safetensors"):
        assert (folder / f"fsdp {world}" / name).read_bytes() == (folder / f"none {world}" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_one_rank_of_a_sharded_model_scores_with_the_help_of_the_others(found, world):
    _, alone, ranks = found
    flat = [value for steps in ranks[0][f"fsdp {world}"]["scores"] for tokens in steps for value in tokens]
    assert flat == pytest.approx([value for steps in alone["scores"] for tokens in steps for value in tokens], rel=1e-5)
    assert all(ranks[rank][f"fsdp {world}"]["scores"] == [] for rank in range(1, world))


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_checkpoint_of_fewer_learners_is_gone_on_with_by_more(found, sharding, world):
    _, alone, ranks = found
    for rank in range(world):
        assert_same_step(ranks[rank][f"{sharding} {world}"]["resumed"], alone["next"])


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_a_checkpoint_of_sharded_learners_is_gone_on_with_by_one(found, world):
    _, alone, _ = found
    assert_same_step(alone[f"resumed from {world}"], alone["next"])


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_the_class_of_the_7b_presets_computes_the_same_sharded_in_bfloat16(found, world):
    _, _, ranks = found
    for rank in range(world):
        result = ranks[rank][f"llava {world}"]
        assert result["whole"].abs().max() > 0
        assert torch.equal(result["sharded"], result["whole"])


def test_a_model_without_known_blocks_is_refused(monkeypatch):
    policy = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    monkeypatch.setattr("gflowvlm.learner.sharding.empty_policy", lambda *_: policy)
    monkeypatch.setattr("gflowvlm.learner.sharding.load_policy", lambda *_, **__: policy)
    with pytest.raises(UserError, match=r"learner\.sharding: no transformer blocks are known in Sequential"):
        load_sharded_policy(PolicySettings(), "any", seed=0, ranks=Ranks(0, 1, torch.device("cpu")))
