"""The vLLM sampler against plain transformers: the same tokens in, the same log-probabilities out."""

import asyncio
import importlib
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from gflowvlm.actors import rendered_prompts
from gflowvlm.actors.sampling import (
    PromptTooLongError,
    SampleRequest,
    SampleResponse,
    SamplerUnavailableError,
    UnknownVersionError,
)
from gflowvlm.actors.vllm_arguments import engine_arguments
from gflowvlm.actors.vllm_sampler import VllmSampler
from gflowvlm.learner.tiny_policy import build_tiny_policy
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.pictures import decode_pictures
from gflowvlm.shared.policy_inputs import PolicyInputs
from tests.actors.tiny_adapters import config, request, write_policy

pytestmark = pytest.mark.slow

Runner = Callable[[Callable[[VllmSampler], Coroutine[Any, Any, Any]]], Any]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy"), adapters=5)


@pytest.fixture(scope="module")
def run(policy: Path) -> Iterator[Runner]:
    """Runs a coroutine on the loop of one engine that all tests here share."""

    async def path_of(version: int) -> Path:
        path = policy / f"adapter-{version}"
        if not path.is_dir():
            raise UnknownVersionError(f"no version {version}")
        return path

    with asyncio.Runner() as runner:
        before = psutil.Process().children(recursive=True)
        sampler = VllmSampler(config("vllm"), str(policy / "model"), path_of)
        processes = [p for p in psutil.Process().children(recursive=True) if p not in before and "VLLM" in p.name()]
        assert len(processes) > 0

        def call(body: Callable[[VllmSampler], Coroutine[Any, Any, Any]]) -> Any:
            return runner.run(asyncio.wait_for(body(sampler), 240))

        yield call
        sampler.shutdown()
        assert psutil.wait_procs(processes, timeout=10)[1] == [], "the engine left processes behind"


async def sample_all(sampler: VllmSampler, requests: list[SampleRequest]) -> list[SampleResponse]:
    return await asyncio.gather(*(sampler.sample(r) for r in requests))


@torch.inference_mode()
def scored(policy: Path, asked: SampleRequest, response: SampleResponse) -> torch.Tensor:
    """What transformers and PEFT give each sampled token."""
    model = AutoModelForImageTextToText.from_pretrained(policy / "model", dtype=torch.float32).eval()
    if response.version > 0:
        model = PeftModel.from_pretrained(model, str(policy / f"adapter-{response.version}")).eval()
    inputs = PolicyInputs.load(str(policy / "model")).encode([asked.prompt], [asked.image])
    length = inputs["input_ids"].shape[1]
    ids = torch.tensor([response.token_ids])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    log_probs = model(**inputs).logits[0, length - 1 : -1].log_softmax(-1)
    return log_probs.gather(1, ids[0][:, None]).squeeze(1)


def test_the_engines_prompt_tokens_are_the_learners(policy: Path, run: Runner) -> None:
    asked = [request(number) for number in range(3)]

    async def body(sampler: VllmSampler) -> list[list[int]]:
        return [await sampler.prompt_ids(one) for one in asked]

    inputs = PolicyInputs.load(str(policy / "model"))
    expected = [inputs.encode([one.prompt], [one.image])["input_ids"][0].tolist() for one in asked]
    assert run(body) == expected


def test_a_state_is_rendered_once_however_many_rollouts_stand_before_it(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []

    def counted(image: bytes) -> Any:
        decoded.append(image)
        return decode_pictures(image)

    monkeypatch.setattr(rendered_prompts, "decode_pictures", counted)
    one = replace(request(1), temperature=0.0, prompt="Target: 4\nState 0: picture")
    other = replace(request(2), prompt="Target: 3\nState 0: picture")
    asked = [*[one] * 8, replace(one, image=other.image), replace(one, prompt=other.prompt), *[one] * 8]

    async def body(sampler: VllmSampler) -> list[SampleResponse]:
        return [*await sample_all(sampler, asked[:10]), *await sample_all(sampler, asked[10:])]

    responses = run(body)
    assert decoded == [one.image, other.image, one.image]
    assert all(response.token_ids == responses[0].token_ids for response in [*responses[:8], *responses[10:]])
    assert responses[8].token_ids != responses[0].token_ids


def test_log_probabilities_agree_with_transformers_per_token_under_lora(policy: Path, run: Runner) -> None:
    asked = [request(i, temperature=t, version=v) for i in range(2) for t in (0.5, 1.0, 2.0) for v in (0, 1, 2)]

    async def body(sampler: VllmSampler) -> list[SampleResponse]:
        return await sample_all(sampler, asked)

    for one, response in zip(asked, run(body), strict=True):
        assert response.version == one.version
        difference = (torch.tensor(response.log_probs) - scored(policy, one, response)).abs().max().item()
        assert difference <= 1e-4


def test_seeded_requests_beyond_what_fits_into_one_step_are_answered_the_same_again(run: Runner) -> None:
    # vLLM takes a seeded request's random numbers back where only a part of its prompt fits, which fails on a CPU.
    asked = [replace(request(i), prompt=f"{i} " * 100, seed=i, max_tokens=4) for i in range(64)]

    async def body(sampler: VllmSampler) -> list[SampleResponse]:
        return await sample_all(sampler, asked)

    first, again = ([response.token_ids for response in run(body)] for _ in range(2))
    assert first == again


def test_forbidden_tokens_are_never_sampled_and_the_end_token_stops(policy: Path, run: Runner) -> None:
    inputs = PolicyInputs.load(str(policy / "model"))

    async def body(sampler: VllmSampler) -> list[SampleResponse]:
        return await sample_all(sampler, [request(i, temperature=2.0, max_tokens=60) for i in range(128)])

    responses = run(body)
    sampled = [token for response in responses for token in response.token_ids]
    assert set(sampled).isdisjoint(inputs.forbidden_ids)
    assert inputs.done_id in sampled
    ended = [r for r in responses if inputs.end_id in r.token_ids]
    assert ended
    assert all(r.token_ids.index(inputs.end_id) == len(r.token_ids) - 1 for r in ended)
    assert all(len(r.log_probs) == len(r.token_ids) <= 60 for r in responses)
    assert all(r.text == inputs.decode(r.token_ids) for r in responses)


def test_a_new_version_takes_effect_and_pinned_ones_still_answer(policy: Path, run: Runner) -> None:
    greedy = request(temperature=0.0)

    async def body(sampler: VllmSampler) -> None:
        base = await sampler.sample(replace(greedy, version=0))
        seen = []
        for version in (1, 2, 3):
            await sampler.load(version, policy / f"adapter-{version}")
            seen.append(await sampler.sample(greedy))
            assert seen[-1].version == version == sampler.newest
            await sampler.retire()
            assert sampler.stats()["loaded_versions"] == [version]
        assert len({tuple(r.token_ids) for r in [base, *seen]}) == 4
        # Version 1 was retired; asking for it brings it back, and the newest stays the newest.
        assert (await sampler.sample(replace(greedy, version=1))).token_ids == seen[0].token_ids
        assert (await sampler.sample(greedy)).token_ids == seen[2].token_ids
        with pytest.raises(UnknownVersionError):
            await sampler.sample(replace(greedy, version=9))

    run(body)


def test_a_batch_of_more_versions_than_fit_gets_each_answer_from_the_version_asked_for(
    policy: Path, run: Runner
) -> None:
    asked = [request(i, temperature=1.0, version=i % 6) for i in range(24)]

    async def body(sampler: VllmSampler) -> list[SampleResponse]:
        return await sample_all(sampler, asked)

    for one, response in zip(asked, run(body), strict=True):
        assert response.version == one.version
        difference = (torch.tensor(response.log_probs) - scored(policy, one, response)).abs().max().item()
        assert difference <= 1e-4, f"version {one.version}"


def test_a_temperature_that_the_engine_does_not_sample_at_is_refused_in_one_line(run: Runner) -> None:
    async def body(sampler: VllmSampler) -> None:
        with pytest.raises(UserError, match=r"sampler\.temperature"):
            await sampler.sample(request(temperature=4.0))

    run(body)


def test_a_prompt_beyond_the_longest_fails_alone(policy: Path, run: Runner) -> None:
    inputs, longest = PolicyInputs.load(str(policy / "model")), config("vllm").sampler.max_model_len

    def tokens(words: int) -> int:
        return inputs.encode(["5 " * words], [request().image])["input_ids"].shape[1]

    just_too_long = next(words for words in range(longest) if tokens(words) >= longest)

    async def body(sampler: VllmSampler) -> None:
        # Too long without the picture's tokens, and with them only.
        for words in (4 * longest, just_too_long):
            with pytest.raises(PromptTooLongError, match=r"leaves no room in sampler\.max_model_len"):
                await sampler.sample(replace(request(), prompt="5 " * words))
        last = await sampler.sample(replace(request(), prompt="5 " * (just_too_long - 1)))
        assert last.cut == (last.token_ids[-1] != inputs.end_id)
        assert len((await sampler.sample(request())).token_ids) > 0

    run(body)


def test_a_response_says_whether_a_limit_ended_it(policy: Path, run: Runner) -> None:
    inputs = PolicyInputs.load(str(policy / "model"))

    async def body(sampler: VllmSampler) -> list[SampleResponse]:
        return await sample_all(sampler, [request(i, temperature=2.0, max_tokens=40, seed=i) for i in range(96)])

    responses = run(body)
    assert {response.cut for response in responses} == {True, False}
    assert all(response.cut == (response.token_ids[-1] != inputs.end_id) for response in responses)


def test_every_start_of_an_engine_has_a_seed_of_its_own(policy: Path) -> None:
    seeds = {engine_arguments(config("vllm"), PolicyInputs.load(str(policy / "model"))).seed for _ in range(3)}
    assert len(seeds) == 3


def test_an_engine_that_cannot_start_gives_its_own_process_reason(policy: Path) -> None:
    settings = config("vllm")
    settings = settings.model_copy(update={"sampler": settings.sampler.model_copy(update={"kv_cache_gib": 1e-4})})
    with pytest.raises(UserError, match=r"vLLM cannot serve it .*ValueError: No available memory for the cache"):
        VllmSampler(settings, str(policy / "model"))


def test_an_adapter_that_does_not_fit_is_refused_and_the_engine_lives(
    policy: Path, run: Runner, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_bytes((policy / "adapter-1" / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no safetensors")

    async def body(sampler: VllmSampler) -> None:
        with pytest.raises(UserError, match="cannot apply"):
            await sampler.load(50, tmp_path)
        assert sampler.newest < 50
        assert len((await sampler.sample(request())).token_ids) > 0

    run(body)


@pytest.mark.parametrize(("asked", "on_cpu"), [(0.0, False), (1.0, True)])
def test_an_engine_that_computes_elsewhere_than_asked_for_is_refused(
    policy: Path, monkeypatch: pytest.MonkeyPatch, asked: float, on_cpu: bool
) -> None:
    # Before the platform is another: vLLM looks at it on import.
    importlib.import_module("vllm.engine.arg_utils")
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: on_cpu), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match=f"sampler.gpus_per_replica = {asked:g}, but the vLLM that is installed"):
        engine_arguments(config(gpus_per_replica=asked), PolicyInputs.load(str(policy / "model")))
    # Whoever asked for none sees none either.
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("" if asked == 0 else "0")


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_slept_answers_as_before_with_its_newest_adapter(run: Runner, policy: Path, level: int) -> None:
    # vLLM on a CPU keeps its memory; the engine's scheduler, caches and adapters go the same way as on a GPU.
    async def body(sampler: VllmSampler) -> None:
        await sampler.load(5, policy / "adapter-5")
        asked = [request(n, temperature=0.0, version=version) for n in range(3) for version in (None, 0)]
        before = await sample_all(sampler, asked)
        await sampler.sleep(level)
        await sampler.wake_up()
        assert sampler.stats()["loaded_versions"] == [5]
        after = await sample_all(sampler, asked)
        assert {response.version for response in after} == {0, 5}
        assert [r.token_ids for r in after] == [r.token_ids for r in before]
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(torch.tensor(one.log_probs), torch.tensor(other.log_probs), atol=1e-5, rtol=0)
        # A version that went with the sleep is loaded again for a request that names it.
        assert (await sampler.sample(request(1, version=2))).version == 2

    run(body)


def test_an_engine_whose_weights_changed_in_its_sleep_is_not_used_again(
    run: Runner, policy: Path, tmp_path: Path
) -> None:
    other = build_tiny_policy(tmp_path / "other", seed=9)

    async def body(sampler: VllmSampler) -> None:
        await sampler.sample(request())
        await sampler.sleep(1)
        client = sampler._engine.client
        await client.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        with pytest.raises(UserError, match=r"^sampler\.sleep_level = 1: [^\n]* gives other log-probabilities [^\n]*$"):
            await sampler.wake_up()
        await client.collective_rpc("reload_weights", kwargs={"weights_path": str(policy / "model")})
        # Asked again, as the client does: the answer is compared again, too.
        await sampler.wake_up()
        assert (await sampler.sample(request())).token_ids

    run(body)


def test_a_killed_engine_fails_its_requests_and_the_health_check(run: Runner) -> None:
    async def body(sampler: VllmSampler) -> None:
        await sampler.check_health()
        asked = [asyncio.create_task(sampler.sample(request(i, max_tokens=400))) for i in range(8)]
        await asyncio.sleep(0.5)
        (pid,) = sampler.stats()["engine_pids"]
        os.kill(pid, signal.SIGKILL)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(a, SampleResponse | SamplerUnavailableError) for a in answers)
        assert any(isinstance(a, SamplerUnavailableError) for a in answers)
        with pytest.raises(SamplerUnavailableError):
            await sampler.check_health()
        assert sampler.stats()["in_flight"] == 0

    run(body)
