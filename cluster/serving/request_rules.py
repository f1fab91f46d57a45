"""What a request to the API may ask for: told in one line, with status 400, before vLLM sees it."""

import base64
import binascii
import hmac
import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BODY_BYTES = 64 * 2**20
MOST_PIXELS = 50_000_000
"""Largest picture that is decoded; it takes 150 MB then."""

_TOOLS = ("tools", "functions")
_TOOL_CHOICES = ("tool_choice", "function_call")
_OTHER_PROMPT = ("chat_template", "mm_processor_kwargs", "media_io_kwargs")
_OTHER_MEDIA = ("video_url", "audio_url", "input_audio", "input_video", "image_embeds")


@dataclass(frozen=True)
class RequestRules:
    """The rules of one policy.

    Attributes:
        forbidden_ids: Tokens that no response may hold.
        largest_side: Largest width and height of a picture that the model takes, pixels; None where it is resized.
        defaults: What a request that does not say otherwise is taken to say.
        system_prompt: The system's turn of a conversation that has none; None for none.
    """

    forbidden_ids: frozenset[int]
    largest_side: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None

    def refusal(self, request: object) -> str | None:
        """Returns why a request is not answered; None where it keeps to the rules."""
        if not isinstance(request, Mapping):
            # Told by vLLM, which knows what it lacks.
            return None
        return _of_prompt(request) or _of_tools(request) or self._of_tokens(request) or self._of_media(request)

    def completed(self, request: object) -> Mapping[str, Any] | None:
        """Returns a request with what it leaves to the policy; None where it stays as it is."""
        if not isinstance(request, Mapping):
            return None
        whole = {**self.defaults, **request}
        messages = request.get("messages")
        if self.system_prompt is not None and isinstance(messages, list) and not _has_system_turn(messages):
            whole["messages"] = [{"role": "system", "content": self.system_prompt}, *messages]
        return None if whole == dict(request) else whole

    def _of_tokens(self, request: Mapping[str, Any]) -> str | None:
        allowed = request.get("allowed_token_ids")
        if isinstance(allowed, list) and allowed and all(token in self.forbidden_ids for token in allowed):
            return "allowed_token_ids: special tokens are never sampled, and nothing else is allowed; name others"
        return None

    def _of_media(self, request: Mapping[str, Any]) -> str | None:
        for kind, url in _media(request):
            if kind in _OTHER_MEDIA:
                return f"{kind}: this policy sees pictures only; send one as image_url"
            if url[:5].lower() != "data:":
                return (
                    "image_url: pictures come as data URLs (data:image/png;base64,...); nothing is fetched from "
                    "elsewhere, and no local file is read"
                )
            problem = self._of_picture(url)
            if problem is not None:
                return f"image_url: {problem}"
        return None

    def _of_picture(self, url: str) -> str | None:
        head, comma, data = url.partition(",")
        if not comma or not head.endswith(";base64"):
            return "a data URL is data:image/png;base64, and then the picture in Base64"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                # Reads the picture's head only.
                width, height = Image.open(io.BytesIO(base64.b64decode(data, validate=True))).size
        except Image.DecompressionBombError:
            return f"the picture has more than {MOST_PIXELS} pixels; send a smaller one"
        except (binascii.Error, OSError, ValueError) as error:
            return f"the picture cannot be read ({str(error).partition(' <')[0]})"
        if width * height > MOST_PIXELS:
            return f"the picture has {width} x {height} pixels, at most {MOST_PIXELS} are taken; send a smaller one"
        if self.largest_side is not None and max(width, height) > self.largest_side:
            return (
                f"the picture has {width} x {height} pixels; this model takes pictures as the task makes them, at most "
                f"{self.largest_side} pixels a side"
            )
        return None


class RulesMiddleware:
    """ASGI middleware that answers 400 to requests that do not keep to the rules.

    Args:
        app: The API.
        rules: The rules.
        api_key: What requests must carry; the API itself refuses those that do not.
    """

    def __init__(self, app: ASGIApp, rules: RequestRules, api_key: str | None) -> None:
        self._app, self._rules = app, rules
        self._authorization = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http" or scope["method"] != "POST" or not self._authorized(scope):
            await self._app(scope, receive, send)
            return
        messages, body = await _read(receive)
        request = None if body is None else _parsed(body)
        refusal = (
            f"the request has more than {MOST_BODY_BYTES // 2**20} MiB; send a smaller picture"
            if body is None
            else self._rules.refusal(request)
        )
        if refusal is None:
            whole = self._rules.completed(request)
            if whole is not None:
                full = json.dumps(whole).encode()
                messages = [{"type": "http.request", "body": full, "more_body": False}]
                scope = {**scope, "headers": _with_length(scope["headers"], len(full))}
            await self._app(scope, _replayed(messages, receive), send)
            return
        error = {"message": refusal, "type": "BadRequestError", "param": refusal.partition(":")[0], "code": 400}
        await JSONResponse({"error": error}, 400)(scope, receive, send)

    def _authorized(self, scope: Scope) -> bool:
        if self._authorization is None:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._authorization)


def _of_prompt(request: Mapping[str, Any]) -> str | None:
    # vLLM names flags of its own server here, which this one has not.
    named = next((key for key in _OTHER_PROMPT if request.get(key)), None)
    return None if named is None else f"{named}: prompts and pictures are processed as in training; leave it out"


def _of_tools(request: Mapping[str, Any]) -> str | None:
    # Tools that are not to be called would stand in the prompt all the same, which is that of training.
    named = [key for key in _TOOLS if request.get(key)]
    named += [key for key in _TOOL_CHOICES if request.get(key) not in (None, "none")]
    if not named:
        return None
    return (
        f"{named[0]}: this policy calls no tools, it answers with thoughts and an action as in training; leave it out"
    )


def _media(node: object) -> Iterator[tuple[str, str]]:
    """Yields the media that a request's messages name: their key, and their URL."""
    if isinstance(node, list):
        for entry in node:
            yield from _media(entry)
    elif isinstance(node, Mapping):
        for key, value in node.items():
            if key in ("image_url", *_OTHER_MEDIA):
                url = value.get("url") if isinstance(value, Mapping) else value
                yield key, url if isinstance(url, str) else ""
            elif key in ("messages", "input", "content"):
                yield from _media(value)


async def _read(receive: Receive) -> tuple[list[Message], bytes | None]:
    """Returns what was received, and the whole body; None in its place where it is too large."""
    messages, body = [], bytearray()
    while True:
        message = await receive()
        messages.append(message)
        body += message.get("body", b"")
        if len(body) > MOST_BODY_BYTES:
            return messages, None
        if message["type"] != "http.request" or not message.get("more_body", False):
            return messages, bytes(body)


def _parsed(body: bytes) -> object:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _has_system_turn(messages: list[Any]) -> bool:
    return any(isinstance(turn, Mapping) and turn.get("role") in ("system", "developer") for turn in messages)


def _with_length(headers: Sequence[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*kept, (b"content-length", str(length).encode())]


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    """Returns a `receive` that gives what was received already, and then what comes."""
    waiting = iter(messages)

    async def again() -> Message:
        return next(waiting, None) or await receive()

    return again
