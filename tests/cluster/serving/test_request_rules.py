"""What a request asks for and does not get is told with status 400, and everything else reaches vLLM as it was sent."""

import asyncio
import base64
import io
import json

import httpx
import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from gflowvlm.cluster.serving import request_rules
from gflowvlm.cluster.serving.request_rules import RequestRules, RulesMiddleware

RULES = RequestRules(frozenset({0, 1, 3}), largest_side=64)
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}


def data_url(width=64, height=64):
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def with_picture(url, **options):
    picture = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{"role": "user", "content": [picture, {"type": "text", "text": "Target: 5"}]}], **options}


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (with_picture("file:///etc/passwd"), "image_url: pictures come as data URLs"),
        (with_picture("http://example.com/x.png"), "image_url: pictures come as data URLs"),
        (with_picture("FILE:///x"), "no local file is read"),
        (with_picture(None), "image_url: pictures come as data URLs"),
        (with_picture("data:image/png,abc"), "image_url: a data URL is"),
        (with_picture("data:image/png;base64,@@"), "image_url: the picture cannot be read"),
        (with_picture("data:image/png;base64,AAAA"), "the picture cannot be read (cannot identify image file)"),
        (with_picture(data_url(65, 10)), "65 x 10 pixels; this model takes pictures as the task makes them"),
        (with_picture(data_url(), tools=[FUNCTION]), "tools: this policy calls no tools"),
        (with_picture(data_url(), tools=[FUNCTION], tool_choice="none"), "tools: this policy calls no tools"),
        (with_picture(data_url(), tool_choice="auto"), "tool_choice: this policy calls no tools"),
        (with_picture(data_url(), functions=[{"name": "f"}]), "functions: this policy calls no tools"),
        (with_picture(data_url(), allowed_token_ids=[1]), "allowed_token_ids: special tokens are never sampled"),
        (with_picture(data_url(), chat_template="{{ x }}"), "chat_template: prompts and pictures are processed as in"),
        (with_picture(data_url(), mm_processor_kwargs={"size": 9}), "mm_processor_kwargs: prompts and pictures"),
        (with_picture(data_url(), media_io_kwargs={"image": {}}), "media_io_kwargs: prompts and pictures"),
        ({"prompt": "x", "allowed_token_ids": [0, 3]}, "allowed_token_ids: special tokens are never sampled"),
        ({"input": [{"content": [{"type": "input_image", "image_url": "file:///x"}]}]}, "image_url: pictures come as"),
        ({"messages": [{"content": [{"type": "video_url", "video_url": {"url": "x"}}]}]}, "video_url: this policy"),
        ({"messages": [{"content": [{"type": "input_audio", "input_audio": {}}]}]}, "input_audio: this policy sees"),
    ],
)  # fmt: skip
def test_what_a_policy_does_not_do_is_refused_in_one_line(request_, said):
    refusal = RULES.refusal(request_)
    assert said in refusal
    assert "\n" not in refusal


@pytest.mark.parametrize(
    "request_",
    [
        with_picture(data_url()),
        with_picture(data_url(1, 1), tools=[], tool_choice="none", allowed_token_ids=[1, 50]),
        with_picture("DATA:image/png;base64," + data_url().partition(",")[2]),
        {"prompt": "Target: 5", "allowed_token_ids": None},
        {"messages": "no list"},
        {"messages": [{"content": "text"}, 5]},
        [],
        None,
    ],
)
def test_what_keeps_to_the_rules_is_left_to_vllm(request_):
    assert RULES.refusal(request_) is None


def test_a_picture_too_large_to_be_decoded_is_refused_whatever_the_model_takes():
    any_size = RequestRules(frozenset())
    assert any_size.refusal(with_picture(data_url(3000, 3000))) is None
    assert "10000 x 10000 pixels" in any_size.refusal(with_picture(data_url(10_000, 10_000)))
    # More than twice what Pillow takes for a bomb.
    assert "more than 50000000 pixels" in any_size.refusal(with_picture(data_url(14_000, 14_000)))


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"got": (await request.body()).decode(), "path": request.url.path})


def post(body, api_key=None, rules=RULES, **headers):
    app = Starlette(routes=[Route("/v1/{path:path}", echo, methods=["POST", "GET"])])
    app.add_middleware(RulesMiddleware, rules=rules, api_key=api_key)

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://policy") as client:
            return await client.post("/v1/chat/completions", content=body, headers=headers)

    return asyncio.run(ask())


def test_a_request_that_keeps_to_the_rules_arrives_as_it_was_sent():
    body = json.dumps(with_picture(data_url()))
    assert post(body).json() == {"got": body, "path": "/v1/chat/completions"}
    assert post("no json").json()["got"] == "no json"


def test_what_a_request_does_not_say_is_as_in_training_and_what_it_says_stays():
    rules = RequestRules(frozenset(), defaults={"add_special_tokens": True})
    for said in ({}, {"add_special_tokens": False}):
        body = {**with_picture(data_url()), **said}
        assert json.loads(post(json.dumps(body), rules=rules).json()["got"]) == {"add_special_tokens": True, **body}
    assert post("no json", rules=rules).json()["got"] == "no json"


def test_a_conversation_without_a_systems_turn_gets_the_one_of_training():
    rules = RequestRules(frozenset(), system_prompt="Be brief.")
    asked = with_picture(data_url())
    got = json.loads(post(json.dumps(asked), rules=rules).json()["got"])
    assert got["messages"] == [{"role": "system", "content": "Be brief."}, *asked["messages"]]
    asked["messages"].insert(0, {"role": "system", "content": "Be long."})
    assert json.loads(post(json.dumps(asked), rules=rules).json()["got"]) == asked


def test_a_refusal_is_an_error_as_openai_clients_read_it():
    answer = post(json.dumps(with_picture("file:///etc/passwd")))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith("image_url: pictures come as data URLs")
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", "image_url", 400)


def test_a_request_that_is_too_large_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(request_rules, "MOST_BODY_BYTES", 2**20)
    answer = post("x" * (2**20 + 1))
    assert answer.status_code == 400
    assert "more than 1 MiB" in answer.json()["error"]["message"]


def test_what_comes_without_the_key_is_not_looked_at():
    body = json.dumps(with_picture("file:///etc/passwd"))
    assert post(body, api_key="secret").json()["got"] == body
    assert post(body, api_key="secret", Authorization="Bearer secret").status_code == 400
