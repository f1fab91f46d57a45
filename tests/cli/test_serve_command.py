"""`gflowvlm serve` as its users meet it: a real engine, a real OpenAI client, one game, and an orderly end."""

import asyncio
import base64
import io
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from PIL import Image

from gflowvlm.actors.sampling import SampleRequest, SampleResponse
from gflowvlm.actors.transformers_sampler import TransformersSampler
from gflowvlm.envs.base import TaskEnv
from gflowvlm.envs.registry import make_env
from gflowvlm.run.models import resolve_model
from gflowvlm.run.setup import new_run
from gflowvlm.shared.cluster_settings import ClusterSettings
from gflowvlm.shared.config import RunConfig, SamplerSettings
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import EndReason
from tests.actors.tiny_adapters import write_adapter
from tests.shared.json_answers import parse_response
from tests.whole_runs import MARK, ROOT, assert_nothing_is_left, processes_of, wait_for

pytestmark = pytest.mark.slow

MODEL = resolve_model("numberline-tiny")
CONFIG = RunConfig(
    sampler=SamplerSettings(kv_cache_gib=0.03, max_num_seqs=32, start_timeout_s=240.0),
    cluster=ClusterSettings(dashboard=False, object_store_mib=80),
)
KEY = uuid.uuid4().hex


class Served:
    """A running `gflowvlm serve`."""

    def __init__(self, folder: Path) -> None:
        run = new_run(CONFIG, folder / "walker")
        # Small enough to leave the policy able to play.
        write_adapter(Path(MODEL), run.adapter(1), seed=1, scale=0.02)
        run.best.write_text('{"version": 1}')
        self.adapter, self.log = run.adapter(1), folder / "serve.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gflowvlm.cli.main", "serve", str(run.root), "--port", str(self.port)],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "COLUMNS": "200",
                "GFLOWVLM_API_KEY": KEY,
                MARK: str(self.log),
            },
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, timeout=60.0, max_retries=0)

    def ask(self, env: TaskEnv, model: str = "walker", **options: Any) -> Any:
        """Sends an environment's picture and prompt as a chat message."""
        url = f"data:image/png;base64,{base64.b64encode(env.image_png()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": env.prompt()}]
        messages: Any = [{"role": "user", "content": content}]
        extra = {"return_token_ids": True, **options.pop("extra_body", {})}
        return self.client.chat.completions.create(model=model, messages=messages, extra_body=extra, **options)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests here; the last test ends it."""
    made = Served(tmp_path_factory.mktemp("served"))
    try:
        wait_for(lambda: "Ctrl-C ends it" in made.log.read_text(), "the address", made.process, made.log)
        yield made
    finally:
        if made.process.poll() is None:
            made.process.terminate()
            made.process.wait(timeout=90)


def at_start(seed: int) -> TaskEnv:
    env = make_env(CONFIG.task)
    env.reset(seed=seed)
    return env


def by_transformers(served: Served, asked: list[tuple[TaskEnv, int]]) -> list[SampleResponse]:
    """Greedy responses of the sampler that is not vLLM's to environments, each by an adapter version."""

    async def body() -> list[SampleResponse]:
        sampler = TransformersSampler(CONFIG, MODEL)
        await sampler.load(1, served.adapter)
        length = CONFIG.policy.max_response_tokens
        requests = [SampleRequest(env.prompt(), env.image_png(), length, 0.0, version) for env, version in asked]
        answers = await asyncio.gather(*(sampler.sample(request) for request in requests))
        sampler.shutdown()
        return list(answers)

    return asyncio.run(body())


def test_what_is_printed_is_where_it_listens(served: Served) -> None:
    told = served.log.read_text()
    assert f"OpenAI-compatible API: {served.url}/v1" in told
    assert "models: walker, walker-base" in told
    assert "adapter version 1" in told
    assert "WARNING" not in told
    assert KEY not in told
    assert [model.id for model in served.client.models.list()] == ["walker-base", "walker"]


def test_an_openai_client_plays_a_game_to_its_end(served: Served) -> None:
    env = at_start(seed=3)
    while env.end is None:
        text = served.ask(env, temperature=0.0).choices[0].message.content
        action = parse_response(text).action
        env.step("" if action is None else action)
    assert env.end in (EndReason.DONE, EndReason.STEP_LIMIT)
    assert len(env.past_actions) > 0


def test_prompt_and_response_are_token_for_token_those_of_training_in_a_mixed_batch(served: Served) -> None:
    envs = [at_start(seed) for seed in range(4)]
    # A later state as well, with its history in the prompt.
    envs[0].step("+")
    asked = [(env, version) for env in envs for version in (0, 1)]
    with ThreadPoolExecutor(len(asked)) as pool:
        names = {0: "walker-base", 1: "walker"}
        answers = list(pool.map(lambda one: served.ask(one[0], names[one[1]], temperature=0.0), asked))
    inputs = PolicyInputs.load(MODEL)
    prompts = [inputs.encode([e.prompt()], [e.image_png()])["input_ids"][0].tolist() for e, _ in asked]
    assert [answer.prompt_token_ids for answer in answers] == prompts
    expected = by_transformers(served, asked)
    assert [answer.choices[0].token_ids for answer in answers] == [e.token_ids for e in expected]
    assert [answer.choices[0].message.content for answer in answers] == [e.text for e in expected]


def test_the_adapter_and_the_base_model_answer_differently(served: Served) -> None:
    def log_probs(model: str) -> list[float]:
        answer = served.ask(at_start(seed=0), model, temperature=0.0, logprobs=True)
        return [entry.logprob for entry in answer.choices[0].logprobs.content]

    assert max(abs(a - b) for a, b in zip(log_probs("walker"), log_probs("walker-base"), strict=False)) > 1e-3


def test_special_tokens_are_never_sampled_whatever_a_request_asks_for(served: Served) -> None:
    inputs = PolicyInputs.load(MODEL)
    wanted = {str(token): 100 for token in inputs.forbidden_ids}
    answer = served.ask(at_start(seed=1), temperature=2.0, n=32, logit_bias=wanted, seed=5)
    sampled = [token for choice in answer.choices for token in choice.token_ids]
    assert len(sampled) > 32
    assert set(sampled).isdisjoint(inputs.forbidden_ids)
    # [DONE] may be sampled, and stays in the text.
    wanted = {str(inputs.done_id): 100}
    answer = served.ask(at_start(seed=1), max_tokens=3, logit_bias=wanted, extra_body={"skip_special_tokens": True})
    assert answer.choices[0].message.content == "[DONE]" * 3


def test_requests_that_say_nothing_get_trainings_temperature_and_length(served: Served) -> None:
    choices = served.ask(at_start(seed=1), n=16, seed=7).choices
    assert len({choice.message.content for choice in choices}) > 1
    answer = served.ask(at_start(seed=1), max_tokens=400, logit_bias={str(PolicyInputs.load(MODEL).end_id): -100})
    assert answer.usage.completion_tokens == CONFIG.policy.max_response_tokens


def test_a_model_that_is_not_served_is_404(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        served.ask(at_start(seed=1), model="walker-2")


def large_picture() -> str:
    picture = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(picture, "PNG")
    return f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1/x.png", "pictures come as data URLs"),
        ("file:///etc/passwd", "pictures come as data URLs"),
        (large_picture(), "has more than 50000000 pixels"),
        ("data:image/png;base64,AAAA", "the picture cannot be read"),
    ],
    ids=["elsewhere", "file", "large", "none"],
)
def test_pictures_that_are_not_taken_are_status_400(served: Served, url: str, said: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    messages: Any = [{"role": "user", "content": content}]
    with pytest.raises(openai.BadRequestError, match=said):
        served.client.chat.completions.create(model="walker", messages=messages)


def test_what_a_policy_does_not_do_is_status_400_and_it_goes_on_answering(served: Served) -> None:
    env = at_start(seed=1)
    padding = PolicyInputs.load(MODEL).forbidden_ids[:1]
    with pytest.raises(openai.BadRequestError, match="special tokens are never sampled"):
        served.ask(env, extra_body={"allowed_token_ids": padding})
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    for choice in ("auto", "required", "none"):
        with pytest.raises(openai.BadRequestError, match="this policy calls no tools"):
            served.ask(env, tools=[tool], tool_choice=choice)
    assert served.ask(env).choices[0].message.content


def test_without_the_key_only_the_health_check_answers_and_other_routes_are_closed(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert httpx.get(f"{served.url}/health", timeout=10).status_code == 200
    body = {"model": "walker", "prompt": "1"}
    headers = {"Authorization": f"Bearer {KEY}"}
    for path in ("/invocations", "/tokenize", "/metrics", "/docs", "/openapi.json", "/v1x"):
        assert httpx.post(f"{served.url}{path}", json=body, headers=headers, timeout=10).status_code == 404, path


def test_it_listens_on_loopback_only(served: Served) -> None:
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in listening if c.laddr.port == served.port} == {"127.0.0.1"}


def test_sigterm_ends_every_process(served: Served) -> None:
    assert len(processes_of(served.log)) > 3
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(timeout=90) == 0, served.log.read_text()[-3000:]
    assert_nothing_is_left(served.log)
    assert served.log.read_text().rstrip().endswith("stopped")
    assert "Traceback" not in served.log.read_text()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health", timeout=5)
