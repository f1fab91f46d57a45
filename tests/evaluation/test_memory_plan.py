"""The memory plan: what is held on each device, what does not fit and what to do, and measured peaks beside it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig
from transformers.models.idefics3 import Idefics3Config

from gflowvlm.evaluation.memory_plan import GIB, Memory, memory_plan
from gflowvlm.learner.memory import PlannedModel, PromptSize
from gflowvlm.learner.tiny_policy import TinyShape, build_tiny_policy
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.studies.benchmarks.workload import made_groups

PROMPT = PromptSize(tokens=400, patches=576)
SMALL = LlamaConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2
)
VISION = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
MODEL = Idefics3Config(text_config=SMALL, vision_config=VISION, tie_word_embeddings=False)


def config(*, sampler=None, learner=None, policy=None):
    return RunConfig.model_validate(
        {
            "policy": {"dtype": "bfloat16", **(policy or {})},
            "sampler": {"gpus_per_replica": 0.5, "gpu_memory_utilization": 0.4, **(sampler or {})},
            "learner": {"gpus_per_worker": 0.5, "token_budget": 2048, **(learner or {})},
        }
    )


def planned(run, gpu_gib=8.0, main_gib=64.0):
    return memory_plan(run, MODEL, PROMPT, Memory(int(gpu_gib * GIB), int(main_gib * GIB)))


def part(phase, process, purpose):
    return next(p.bytes for p in phase.parts if (p.process, p.purpose) == (process, purpose))


def test_side_by_side_the_gpu_holds_vllms_share_and_the_learners_step():
    device, main = planned(config()).devices
    (phase,) = device.phases
    share = sum(p.bytes for p in phase.parts if p.process == "sampler")
    assert share == pytest.approx(0.4 * 8 * GIB, rel=1e-3)
    weights = part(phase, "learner", "weights")
    assert weights == part(phase, "sampler", "weights") == 2 * planned(config()).parameters
    assert part(phase, "learner", "optimiser") == 2 * part(phase, "learner", "gradients")
    assert device.problems == ()
    assert main.name == "main memory"


def test_by_turns_the_gpu_holds_the_larger_of_both_phases_and_main_memory_what_sleeps():
    together = planned(config()).devices[0]
    by_turns, main = planned(config(sampler={"sleep_level": 1})).devices
    steps, plays = by_turns.phases
    assert (steps.name, plays.name) == ("the learner steps", "the sampler plays")
    assert by_turns.needed == max(steps.needed, plays.needed) < together.needed
    assert part(main.phases[0], "sampler", "weights while it sleeps") >= part(plays, "sampler", "weights")
    moved = planned(config(sampler={"sleep_level": 1}, learner={"offload": True})).devices[0].phases[1]
    assert part(moved, "learner", "waiting") < part(plays, "learner", "waiting")


def test_gpus_of_their_own_are_planned_apart_and_weights_in_fewer_bits_are_smaller():
    apart = planned(config(sampler={"gpus_per_replica": 1, "replicas": 2}, learner={"gpus_per_worker": 1})).devices
    assert [device.name for device in apart[:2]] == ["each of 2 sampler's GPUs", "the learner's GPU"]
    whole = part(apart[1].phases[0], "learner", "weights")
    fewer = planned(config(policy={"load_in": "4bit"}, learner={"gpus_per_worker": 1})).devices[1]
    assert part(fewer.phases[0], "learner", "weights") < 0.7 * whole


@pytest.mark.parametrize(
    ("run", "gpu_gib", "said"),
    [
        (config(policy={"dtype": "float32"}), 3.0, "set policy.dtype=bfloat16"),
        (config(sampler={"gpu_memory_utilization": 0.8}), 7.0, "set sampler.gpu_memory_utilization=0."),
        (config(sampler={"gpu_memory_utilization": 0.6}), 3.0, "set sampler.sleep_level=1"),
        (config(sampler={"gpu_memory_utilization": 0.05}), 8.0, "vLLM's share is 0.40 GiB"),
        (config(sampler={"gpus_per_replica": 0}, learner={"gpus_per_worker": 1}), 1.5, "gradient_checkpointing=true"),
    ],
)
def test_what_does_not_fit_says_what_to_do(run, gpu_gib, said):
    problems = planned(run, gpu_gib).problems
    assert any(said in problem for problem in problems), problems


def test_a_share_that_is_advised_fits():
    problems = planned(config(sampler={"gpu_memory_utilization": 0.8}), 7.0).problems
    share = float(problems[0].rpartition("=")[2])
    assert planned(config(sampler={"gpu_memory_utilization": share}), 7.0).problems == []


def test_main_memory_that_is_too_small_and_gpus_that_are_not_known():
    run = RunConfig()
    assert "needs" in memory_plan(run, MODEL, PROMPT, Memory(main=2 * GIB)).problems[0]
    unknown = memory_plan(config(), MODEL, PROMPT, Memory()).devices
    assert [device.available for device in unknown] == [None, None]
    assert all(device.problems == () and device.needed > 0 for device in unknown)


def test_the_plan_as_json_is_plain(tmp_path):
    content = json.loads(json.dumps(planned(config(sampler={"sleep_level": 1})).as_json()))
    assert {row["phase"] for row in content["devices"][0]["parts"]} == {"the learner steps", "the sampler plays"}
    assert content["devices"][0]["needed_gib"] < content["devices"][0]["available_gib"] == 8.0


SIZES = {
    "256 wide": TinyShape(text_hidden=256, text_mlp=768, text_layers=4, head_dim=64),
    "384 wide": TinyShape(text_hidden=384, text_mlp=1152, text_layers=6, text_heads=6, head_dim=64),
}
# What is given back goes back to the system at once, so that the peak is of what is held.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_learners_measured_peak_is_near_its_plan(size, tmp_path):
    model = str(build_tiny_policy(tmp_path / "model", shape=SIZES[size]))
    inputs = PolicyInputs.load(model)
    settings = {"policy": {"model": model}, "learner": {"token_budget": 2048}}
    steps = [(t, step) for group in made_groups(RunConfig(), inputs, 2) for t in group for step in t.steps]
    longest = max(len(step.response_ids) for _, step in steps)
    settings["policy"]["max_response_tokens"] = longest
    run = RunConfig.model_validate(settings)
    prompts = (inputs.encode([step.prompt], [t.images[step.image]])["input_ids"].shape[1] for t, step in steps)
    plan = PlannedModel(run, model).learner(PromptSize(max(prompts), patches=64))
    program = Path(__file__).with_name("measured_learner.py")
    environment = {**os.environ, **ALLOCATOR, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(program), run.model_dump_json(), model]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=True)
    found = json.loads(child.stdout.splitlines()[-1])
    measured = found["peak"] - found["before"]
    print(f"{size}: planned {plan.peak / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert 0.8 < plan.peak / measured < 1.9
