"""The transformers sampler: exact log-probabilities, one version per response, batches of any company."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from gflowvlm.actors.sampling import PromptTooLongError, SampleRequest, SampleResponse
from gflowvlm.actors.transformers_sampler import TransformersSampler
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs
from tests.actors.tiny_adapters import config, request, write_adapter, write_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy"), adapters=2)


def with_sampler(policy: Path, body: Callable[[TransformersSampler], Coroutine[Any, Any, Any]], **sampler: Any) -> Any:
    async def run() -> Any:
        made = TransformersSampler(config(**sampler), str(policy / "model"))
        try:
            return await asyncio.wait_for(body(made), 60)
        finally:
            made.shutdown()

    return asyncio.run(run())


async def sample_all(sampler: TransformersSampler, requests: list[SampleRequest]) -> list[SampleResponse]:
    return await asyncio.gather(*(sampler.sample(r) for r in requests))


@torch.inference_mode()
def scores(policy: Path, asked: SampleRequest, response: SampleResponse, adapter: Path | None) -> list[float]:
    """Raw log-probabilities of a response, one forward pass per response, nothing padded."""
    model = AutoModelForImageTextToText.from_pretrained(policy / "model", dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    inputs = PolicyInputs.load(str(policy / "model")).encode([asked.prompt], [asked.image])
    length = inputs["input_ids"].shape[1]
    ids = torch.tensor([response.token_ids])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    log_probs = model(**inputs).logits[0, length - 1 : -1].log_softmax(-1)
    return log_probs.gather(1, ids[0][:, None]).squeeze(1).tolist()


def test_log_probabilities_are_the_raw_models_whatever_temperature_mask_and_company(policy: Path) -> None:
    async def body(sampler: TransformersSampler) -> None:
        await sampler.load(1, policy / "adapter-1")
        asked = [request(i, temperature=t, version=v) for i, (t, v) in enumerate([(1.0, 0), (0.5, 1), (2.0, 1)])]
        for one, response in zip(asked, await sample_all(sampler, asked), strict=True):
            assert response.version == one.version
            adapter = policy / "adapter-1" if response.version == 1 else None
            expected = scores(policy, one, response, adapter)
            assert response.log_probs == pytest.approx(expected, abs=1e-4)

    with_sampler(policy, body)


def test_forbidden_tokens_are_never_sampled_and_the_end_token_stops(policy: Path) -> None:
    async def body(sampler: TransformersSampler) -> None:
        inputs = PolicyInputs.load(str(policy / "model"))
        # Hot enough that every token is about as likely as any other: forbidden ones would show up.
        asked = [request(i, temperature=20.0, max_tokens=40) for i in range(96)]
        responses = await sample_all(sampler, asked)
        sampled = [token for response in responses for token in response.token_ids]
        assert set(sampled).isdisjoint(inputs.forbidden_ids)
        assert inputs.done_id in sampled
        ended = [r for r in responses if inputs.end_id in r.token_ids]
        assert ended
        assert all(r.token_ids.index(inputs.end_id) == len(r.token_ids) - 1 for r in ended)
        assert all(len(r.log_probs) == len(r.token_ids) <= 40 for r in responses)
        assert all(r.text == inputs.decode(r.token_ids) for r in responses)

    with_sampler(policy, body)


def test_a_new_adapter_takes_effect_and_the_old_one_can_be_asked_for_until_it_is_retired(policy: Path) -> None:
    async def body(sampler: TransformersSampler) -> None:
        greedy = request(temperature=0.0)
        base = await sampler.sample(greedy)
        await sampler.load(1, policy / "adapter-1")
        first = await sampler.sample(greedy)
        await sampler.load(2, policy / "adapter-2")
        second = await sampler.sample(greedy)
        assert [base.version, first.version, second.version] == [0, 1, 2]
        assert len({tuple(r.token_ids) for r in (base, first, second)}) == 3
        asked = [request(temperature=0.0, version=v) for v in (2, 0, 1)]
        mixed = await sample_all(sampler, asked)
        assert [r.token_ids for r in mixed] == [second.token_ids, base.token_ids, first.token_ids]
        await sampler.retire()
        assert sampler.stats()["loaded_versions"] == [2]
        assert (await sampler.sample(greedy)).token_ids == second.token_ids
        assert (await sampler.sample(request(temperature=0.0, version=0))).token_ids == base.token_ids

    with_sampler(policy, body)


def test_a_seed_repeats_a_response_in_any_company(policy: Path) -> None:
    async def body(sampler: TransformersSampler) -> None:
        alone = await sampler.sample(request(seed=7))
        company = await sample_all(sampler, [request(i) for i in range(5)] + [request(seed=7)])
        assert company[-1].token_ids == alone.token_ids
        assert len({tuple(r.token_ids) for r in company}) > 1

    with_sampler(policy, body)


def test_sampling_follows_the_softmax_at_the_requests_temperature(policy: Path) -> None:
    draws, temperature = 600, 0.25
    first = request(max_tokens=1)

    async def body(sampler: TransformersSampler) -> list[int]:
        asked = [replace(first, temperature=temperature, seed=seed) for seed in range(draws)]
        return [response.token_ids[0] for response in await sample_all(sampler, asked)]

    sampled = with_sampler(policy, body, max_num_seqs=256)
    inputs = PolicyInputs.load(str(policy / "model"))
    model = AutoModelForImageTextToText.from_pretrained(policy / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(**inputs.encode([first.prompt], [first.image])).logits[0, -1]
    logits[inputs.forbidden_ids] = float("-inf")
    expected = (logits / temperature).softmax(-1)
    counted = torch.bincount(torch.tensor(sampled), minlength=len(expected)) / draws
    # The ten likeliest tokens, within five standard errors.
    for token in expected.topk(10).indices:
        share = expected[token].item()
        assert counted[token].item() == pytest.approx(share, abs=5 * (share * (1 - share) / draws) ** 0.5)


def test_two_engines_and_two_starts_of_one_draw_differently_and_requests_with_a_seed_alike(policy: Path) -> None:
    asked = [*(request(i) for i in range(8)), *(request(i, seed=i) for i in range(8))]

    async def body(sampler: TransformersSampler) -> list[list[int]]:
        return [response.token_ids for response in await sample_all(sampler, asked)]

    one, other = with_sampler(policy, body), with_sampler(policy, body)
    assert one[:8] != other[:8]
    assert one[8:] == other[8:]


def test_a_prompt_beyond_the_longest_fails_alone(policy: Path) -> None:
    async def body(sampler: TransformersSampler) -> None:
        long = replace(request(), prompt="Target: 5 " * 400)
        asked = [request(0), long, request(1)]
        # In one batch with others.
        answers = await asyncio.gather(*(sampler.sample(one) for one in asked), return_exceptions=True)
        assert [type(answer) for answer in answers] == [SampleResponse, PromptTooLongError, SampleResponse]
        assert "leaves no room in sampler.max_model_len" in str(answers[1])
        with pytest.raises(PromptTooLongError, match="max_model_len"):
            await sampler.sample(long)
        assert len((await sampler.sample(request())).token_ids) > 0
        await sampler.check_health()

    with_sampler(policy, body)


def test_a_response_says_whether_a_limit_ended_it(policy: Path) -> None:
    inputs = PolicyInputs.load(str(policy / "model"))

    async def body(sampler: TransformersSampler) -> list[SampleResponse]:
        return await sample_all(sampler, [request(i, temperature=20.0, max_tokens=40, seed=i) for i in range(96)])

    responses = with_sampler(policy, body)
    assert {response.cut for response in responses} == {True, False}
    for response in responses:
        assert response.cut == (response.token_ids[-1] != inputs.end_id)
        assert len(response.token_ids) == 40 or not response.cut


def test_what_a_prompt_leaves_of_the_models_length_is_no_matter_of_its_company(policy: Path) -> None:
    inputs = PolicyInputs.load(str(policy / "model"))
    short, long = request(), replace(request(), prompt="Target: 5 " * 20)
    lengths = [inputs.encode([one.prompt], [one.image])["input_ids"].shape[1] for one in (short, long)]
    asked = [replace(one, temperature=0.0, max_tokens=400) for one in (short, long)]

    async def body(sampler: TransformersSampler) -> list[SampleResponse]:
        together = await sample_all(sampler, asked)
        assert [r.token_ids for r in together] == [(await sampler.sample(one)).token_ids for one in asked]
        return together

    longest = lengths[1] + 8
    responses = with_sampler(policy, body, max_model_len=longest)
    for response, length in zip(responses, lengths, strict=True):
        assert response.cut
        assert length + len(response.token_ids) == longest


def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(policy: Path, tmp_path: Path) -> None:
    async def body(sampler: TransformersSampler) -> None:
        bad = write_adapter(policy / "model", tmp_path / "bad", seed=1)
        (bad / "adapter_model.safetensors").write_bytes(b"no safetensors")
        with pytest.raises(UserError, match="cannot apply"):
            await sampler.load(1, bad)
        assert sampler.newest == 0
        await sampler.load(1, policy / "adapter-1")
        assert (await sampler.sample(request())).version == 1

    with_sampler(policy, body)


def test_without_a_gpu_asked_for_it_samples_on_the_cpu_where_torch_sees_one(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    async def body(sampler: TransformersSampler) -> None:
        (response,) = await sample_all(sampler, [request(0)])
        assert len(response.token_ids) > 0

    with_sampler(policy, body)


def test_a_gpu_that_is_asked_for_and_not_there_is_refused(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"sampler\.gpus_per_replica = 1, but torch"):
        TransformersSampler(config(gpus_per_replica=1.0), str(policy / "model"))


def test_a_sampler_that_slept_answers_as_before(policy: Path) -> None:
    async def body(sampler: TransformersSampler) -> None:
        await sampler.load(1, policy / "adapter-1")
        asked = [request(i, seed=i, version=version) for i in range(2) for version in (0, 1)]
        before = await sample_all(sampler, asked)
        await sampler.sleep(1)
        await sampler.wake_up()
        assert await sample_all(sampler, asked) == before

    with_sampler(policy, body)


def test_the_model_of_a_sleeping_sampler_leaves_its_device_and_comes_back(policy: Path) -> None:
    async def body(sampler: TransformersSampler) -> None:
        moved: list[torch.device] = []
        sampler._device, move = torch.device("meta"), sampler._model.to
        sampler._model.to = lambda device: moved.append(device) or move(torch.device("cpu"))
        await sampler.sleep(1)
        await sampler.wake_up()
        assert [device.type for device in moved] == ["cpu", "meta"]

    with_sampler(policy, body)
