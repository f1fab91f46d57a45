import math

import pytest

from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.config_io import apply_overrides, dump_config, load_config, load_yaml, parse_config
from gflowvlm.shared.errors import UserError


def test_a_configuration_comes_back_from_yaml_as_it_was(tmp_path):
    config = RunConfig.model_validate({"seed": 3, "learner": {"learning_rate": 1e-5}, "objective": {"loss": "subtb"}})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_overrides_are_dotted_and_typed():
    settings = apply_overrides({"learner": {"steps": 5}}, ["learner.steps=7", "learner.learning_rate=1e-3", "seed=2"])
    config = parse_config(settings, "test")
    assert (config.learner.steps, config.learner.learning_rate, config.seed) == (7, 1e-3, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.stps=3", "unknown key 'learner.stps'; did you mean 'learner.steps'"),
        ("zzz=3", "unknown key 'zzz'"),
        ("learner.steps=-1", "learner.steps = -1"),
        ("learner.steps=many", "learner.steps = 'many'"),
        ("learner.learning_rate=.nan", "learner.learning_rate"),
        ("rollout.group_size=1", "var_tb needs"),
        ("rollout.group_size=1 objective.loss=grpo", "grpo needs"),
        ("rollout.epsilon=0.1 objective.loss=ppo", "set rollout.epsilon=0.0"),
        ("sampler.temperature=0.7 objective.loss=grpo", "set sampler.temperature=1.0"),
        ("learner.publish_every=2 objective.loss=ppo", "set learner.publish_every=1"),
        ("rollout.demonstrations=sets/a objective.loss=ppo", "set rollout.demonstrations=null"),
        ("rollout.demonstrations=sets/a objective.loss=sft", "set rollout.group_size=1"),
        ("buffer.capacity=3", "must hold a batch"),
        ("learner.sharding=fsdp", "set learner.workers to at least 2"),
        ("learner.sharding=ddp learner.workers=2", "learner.sharding = 'ddp'"),
        ("policy.max_response_tokens=512", "must be below"),
        ("learner.offload=true", "set sampler.sleep_level=1"),
        ("sampler.sleep_level=1", "vLLM sleeps on GPUs only"),
        ("sampler.sleep_level=2 sampler.engine=transformers", "sleeps at level 1"),
        ("sampler.sleep_level=1 sampler.gpus_per_replica=1 learner.gpus_per_worker=1", "must not exceed 1 together"),
        ("sampler.sleep_level=1 sampler.gpus_per_replica=0.5 sampler.replicas=2", "set sampler.replicas=1"),
        ("sampler.sleep_level=1 sampler.engine=transformers learner.workers=2", "set learner.workers=1"),
        ("sampler.sleep_level=1 sampler.engine=transformers scaling.automatic=true", "set scaling.automatic=false"),
        ("policy.load_in=2bit", "policy.load_in = '2bit'"),
        ("policy.load_in=4bit learner.sharding=fsdp learner.workers=2", "does not go with learner.sharding"),
        (
            "policy.load_in=4bit learner.offload=true sampler.sleep_level=1 sampler.engine=transformers",
            "learner.offload",
        ),
        ('sampler.node_labels={"a":"-b"}', "sampler.node_labels.a = '-b': is no condition"),
        ('rollout.node_labels={"-a":"b"}', "rollout.node_labels.-a"),
        ('learner.node_labels={"a":1}', "learner.node_labels.a = 1"),
        ('sampler.resources_per_replica={"GPU":1}', "is no custom resource"),
        ('cluster.control_resources={"slot":0}', "cluster.control_resources.slot = 0"),
        ("learner", "section.key=value"),
        ("seed.x=1", "'seed' is a value, not a section"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(override, message):
    with pytest.raises(UserError) as error:
        parse_config(apply_overrides({"seed": 0}, override.split()), "preset x")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_mapping_is_named(tmp_path):
    for content in ("- a\n- b\n", "a: [1", "\x00"):
        path = tmp_path / "c.yaml"
        path.write_text(content)
        with pytest.raises(UserError, match=r"c\.yaml"):
            load_yaml(path)
    with pytest.raises(UserError, match=r"missing\.yaml"):
        load_yaml(tmp_path / "missing.yaml")


@pytest.mark.parametrize("loss", ["ppo", "grpo"])
def test_on_policy_losses_learn_from_new_groups_alone_and_from_as_many_as_the_others(loss):
    others = RunConfig()
    config = RunConfig.model_validate({"objective": {"loss": loss}})
    assert config.groups_per_batch == config.fresh_groups_per_step == others.fresh_groups_per_step
    assert config.fresh_per_step == others.fresh_per_step
    peak = config.objective.policy_gradient.learning_rate
    assert config.optimization.learning_rate == peak
    shape = others.learner.final_learning_rate / others.learner.learning_rate
    assert config.optimization.final_learning_rate == pytest.approx(shape * peak)
    assert others.optimization == others.learner
    assert (config.replay.newest_share, config.replay.max_staleness) == (1.0, 0)
    assert others.groups_per_batch == others.learner.groups_per_batch > others.fresh_groups_per_step
    assert others.replay == others.buffer


def test_new_data_of_a_step_are_whole_groups():
    config = RunConfig.model_validate(
        {"learner": {"groups_per_batch": 5}, "buffer": {"newest_share": 0.5}, "rollout": {"group_size": 8}}
    )
    assert config.fresh_per_step % 8 == 0
    assert config.fresh_per_step == 16
    none = RunConfig.model_validate({"buffer": {"newest_share": 0.0}})
    assert none.fresh_groups_per_step == 1
    assert math.isfinite(none.objective.subtb_lambda)
