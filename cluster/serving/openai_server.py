"""vLLM's own OpenAI-compatible server around a policy: prompts and sampling rules are those of training.

Imports vLLM, so it is imported only where an engine runs.
"""

from argparse import Namespace
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import FrontendArgs
from vllm.entrypoints.openai.models.protocol import LoRAModulePath
from vllm.v1.engine.async_llm import AsyncLLM

from gflowvlm.actors.vllm_arguments import engine_arguments, forbidding_biases
from gflowvlm.actors.vllm_sampler import GuardedEngine
from gflowvlm.cluster.serving.request_rules import RequestRules, RulesMiddleware
from gflowvlm.cluster.serving.served_policy import ServedPolicy
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.policy_inputs import PolicyInputs

NO_MEDIA_DOMAIN = "only-data-urls.invalid"
"""The one host that pictures may be fetched from; it cannot exist (RFC 2606). Pictures come as data URLs."""


class PolicyEngine(AsyncLLM):
    """An engine that keeps to the sampling rules of training, whatever a request asks for."""

    _forbidden: Mapping[int, float]

    def forbid(self, biases: Mapping[int, float]) -> None:
        """Gives the logit biases of every request; call it before the first one."""
        self._forbidden = biases

    def generate(self, prompt: Any, sampling_params: Any, *args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        """Generates as `AsyncLLM.generate`; special tokens are never sampled, and `[DONE]` is never left out."""
        sampling_params.logit_bias = {**(sampling_params.logit_bias or {}), **self._forbidden}
        sampling_params.skip_special_tokens = False
        answers: AsyncGenerator[Any, None] = super().generate(prompt, sampling_params, *args, **options)
        return answers


class OpenRoutes:
    """ASGI middleware that answers 404 to all but the API and the health check.

    vLLM's server has further routes that answer prompts, and guards only those under ``/v1`` with the key.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        path = scope.get("path", "")
        if scope["type"] == "lifespan" or path == "/health" or path.startswith("/v1/"):
            await self._app(scope, receive, send)
        else:
            await JSONResponse({"error": {"message": f"no route {path}", "code": 404}}, 404)(scope, receive, send)


class OpenAIServer:
    """An engine with its adapter, and the API around it."""

    def __init__(self, policy: ServedPolicy, api_key: str | None) -> None:
        """Starts the engine; takes from seconds (tiny models) to minutes.

        Args:
            policy: What to serve.
            api_key: What requests must carry as bearer token; None lets everyone in.

        Raises:
            UserError: vLLM cannot serve this model under these settings.
        """
        inputs = PolicyInputs.load(policy.model, prompts=policy.config.policy)
        self._policy, self._api_key = policy, api_key
        self._arguments = _engine_arguments(policy, inputs)
        self._engine = GuardedEngine(self._arguments, PolicyEngine)
        self._engine.client.forbid(forbidding_biases(inputs.forbidden_ids) or {})
        self._plain_chat_template = inputs.plain_chat_template
        self._rules = RequestRules(
            frozenset(inputs.forbidden_ids),
            _largest_side(inputs),
            # vLLM adds none to a conversation of itself.
            {"add_special_tokens": True} if inputs.adds_beginning else {},
            policy.config.policy.system_prompt,
        )

    async def build_app(self) -> ASGIApp:
        """Loads the adapter and returns the API as an ASGI application.

        Raises:
            UserError: vLLM cannot apply the adapter.
        """
        policy, client = self._policy, self._engine.client
        frontend = FrontendArgs(
            lora_modules=None if policy.adapter is None else [LoRAModulePath(policy.name, str(policy.adapter))],
            # Training gives the chat template a list of parts too.
            chat_template_content_format="openai",
            chat_template=self._plain_chat_template,
            api_key=None if self._api_key is None else [self._api_key],
            disable_fastapi_docs=True,
            middleware=[f"{OpenRoutes.__module__}.{OpenRoutes.__qualname__}"],
        )
        # vLLM's parser makes one flat namespace of both.
        flat = Namespace(**(vars(frontend) | vars(self._arguments)))
        tasks = await client.get_supported_tasks()
        app = build_app(flat, tasks, client.model_config)
        try:
            await init_app_state(client, app.state, flat, tasks)
        except ValueError as error:
            reason = one_line(error, 300)
            raise UserError(f"adapter {policy.adapter}: vLLM cannot apply it ({reason})") from None
        # vLLM's launcher puts its HTTP server here, and its error handler asks it to end with the engine. Here Serve
        # replaces the replica.
        app.state.server = SimpleNamespace(should_exit=False)
        return RulesMiddleware(app, self._rules, self._api_key)

    def check_health(self) -> None:
        """Raises `SamplerUnavailableError` when a process of the engine is gone."""
        self._engine.check()

    def shutdown(self) -> None:
        """Ends the engine and its processes."""
        self._engine.shutdown()


def _largest_side(inputs: PolicyInputs) -> int | None:
    """Returns the largest side of a picture that a model takes as it is; None where pictures are resized for it."""
    pictures = inputs.processor.image_processor
    if getattr(pictures, "do_resize", True):
        return None
    sides = [side for side in dict(pictures.size).values() if side is not None]
    return max(sides) if sides else None


def _engine_arguments(policy: ServedPolicy, inputs: PolicyInputs) -> Any:
    config = policy.config
    return replace(
        engine_arguments(config, inputs),
        served_model_name=[policy.base_name],
        # What a request that says nothing gets; the length is also the longest that one can ask for.
        override_generation_config={
            "temperature": config.sampler.temperature,
            "max_new_tokens": config.policy.max_response_tokens,
        },
        enable_lora=policy.adapter is not None,
        # The adapter, and the empty slot that vLLM's CPU kernels need (see `engine_arguments`).
        max_loras=2,
        # Never pickle.
        load_format="safetensors",
        allowed_media_domains=[NO_MEDIA_DOMAIN],
    )
