"""`gflowvlm serve`: the trained policy behind an OpenAI-compatible address."""

import os
from typing import Annotated

import typer

from gflowvlm.run.console import terminal
from gflowvlm.shared.errors import UserError


def register(app: typer.Typer) -> None:
    """Adds the command to the application."""

    @app.command()
    def serve(
        policy: Annotated[
            str,
            typer.Argument(
                metavar="RUN_OR_ADAPTER", help="Folder of a run, or of an adapter (PEFT).", show_default=False
            ),
        ],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[KEY=VALUE]...",
                help="Settings to change, for example `sampler.max_num_seqs=8 policy.max_response_tokens=128`.",
                show_default=False,
            ),
        ] = None,
        version: Annotated[
            int | None,
            typer.Option(min=0, help="Adapter version; 0 is the base model [default: the best].", show_default=False),
        ] = None,
        model: Annotated[
            str | None, typer.Option(help="Base model; needed with an adapter's folder.", show_default=False)
        ] = None,
        name: Annotated[
            str | None, typer.Option(help="Model name in the API [default: the folder's].", show_default=False)
        ] = None,
        host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
        replicas: Annotated[
            int | None,
            typer.Option(
                min=1, max=256, help="Engines that share the requests [default: the run's].", show_default=False
            ),
        ] = None,
        api_key: Annotated[
            str | None,
            typer.Option(
                envvar="GFLOWVLM_API_KEY",
                help="Key that requests must carry. Set it by the variable: other users see a command's arguments.",
                show_default=False,
            ),
        ] = None,
    ) -> None:
        """Serve a trained policy by vLLM's OpenAI-compatible API, over Ray Serve.

        The engine has the run's settings; prompts and sampling are those of training. The adapter is the model
        NAME, the model it was trained on NAME-base. Ctrl-C ends everything.

        Examples: `gflowvlm serve runs/NAME`, `gflowvlm serve runs/NAME --version 20 --port 8001`,
        `gflowvlm serve ADAPTER --model models/numberline-7b policy.dtype=bfloat16`

        On a cluster: `docs/serving.md`.
        """
        # Imported here so that --help and wrong arguments answer at once.
        from gflowvlm.cluster.serving.served_policy import API_KEY_VARIABLE, ServeArguments, served_policy
        from gflowvlm.cluster.serving.session import Address, serve_until_stopped

        if api_key is not None:
            if api_key.strip() == "":
                raise UserError(f"--api-key: the key is empty; give one, or unset {API_KEY_VARIABLE}")
            # The replicas' processes inherit it; nothing else is told.
            os.environ[API_KEY_VARIABLE] = api_key
        arguments = ServeArguments(
            policy=policy,
            model=model,
            version=version,
            name=name,
            replicas=replicas,
            require_api_key=api_key is not None,
            settings=overrides or [],
        )
        found, address = served_policy(arguments), Address(host, port)
        address.check()
        serve_until_stopped(found, address, terminal())
