"""Which trained policy is served: found in a run or an adapter's folder, and checked before anything starts."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field
from safetensors import safe_open

from gflowvlm.actors.adapter_store import CONFIG_FILE, WEIGHTS_FILE, check_adapter
from gflowvlm.evaluation.playing import best_version
from gflowvlm.run.adapters import published_adapter
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.models import resolve_model
from gflowvlm.run.paths import check_paths, with_absolute_paths
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.config_io import apply_overrides, load_config, parse_config
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.settings import Settings
from gflowvlm.shared.trajectory import BASE_VERSION

API_KEY_VARIABLE = "GFLOWVLM_API_KEY"
"""Environment variable of the key that requests must carry; read where a replica runs, never passed on."""

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")

_LORA_WEIGHT = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")


class ServeArguments(Settings):
    """What to serve: the ``args`` of the application in a Serve configuration."""

    policy: str = Field(description="Run folder, or folder of an adapter in PEFT format.")
    model: str | None = Field(None, description="Base model instead of the run's; an adapter's folder needs one.")
    version: int | None = Field(None, ge=0, description="Adapter version of the run; null takes the best.")
    name: str | None = Field(None, description="Model name in the API; null takes the folder's.")
    replicas: int | None = Field(None, ge=1, le=256, description="null takes sampler.replicas.")
    require_api_key: bool = Field(True, description=f"Replicas start only where {API_KEY_VARIABLE} is set.")
    settings: list[str] = Field([], description="Settings to change, section.key=value.")


@dataclass(frozen=True)
class ServedPolicy:
    """A policy that was found and checked.

    Attributes:
        config: The run's configuration; a default one around a bare adapter.
        model: Directory of the base model, or its hub name.
        adapter: The adapter's folder; None serves the base model alone.
        version: The adapter's version in its run; None for a bare adapter.
        name: The adapter's model name in the API.
        require_api_key: Whether a replica without a key must not start.
    """

    config: RunConfig
    model: str
    adapter: Path | None
    version: int | None
    name: str
    require_api_key: bool

    @property
    def base_name(self) -> str:
        """The base model's name in the API."""
        return f"{self.name}-base"

    @property
    def model_names(self) -> list[str]:
        """Every model name in the API, the policy's first."""
        return [self.base_name] if self.adapter is None else [self.name, self.base_name]


def served_policy(arguments: ServeArguments) -> ServedPolicy:
    """Finds and checks what shall be served.

    Raises:
        UserError: No such run, adapter, version or model; files that are no safetensors; an adapter that does
            not fit the model.
    """
    root = Path(arguments.policy).expanduser().resolve()
    if RunFolder(root).config.is_file():
        config, version, adapter = _of_run(RunFolder(root), arguments)
    elif (root / CONFIG_FILE).is_file():
        config, version, adapter = _of_adapter(root, arguments), None, root
    else:
        raise UserError(
            f"{arguments.policy}: neither a run folder (config.yaml) nor an adapter in PEFT format ({CONFIG_FILE})"
        )
    # Replicas have working directories of their own.
    config = with_absolute_paths(config)
    check_paths(config)
    model = resolve_model(config.policy.model)
    if adapter is not None:
        check_adapter(adapter)
        check_fits(adapter, model)
    name = arguments.name if arguments.name is not None else re.sub(r"[^A-Za-z0-9._-]", "-", root.name)
    if MODEL_NAME.fullmatch(name) is None:
        raise UserError(f"model name {name!r}: use letters, digits, dots, dashes and underscores; --name gives another")
    return ServedPolicy(config, model, adapter, version, name, arguments.require_api_key)


def check_fits(adapter: Path, model: str) -> None:
    """Checks that every weight of an adapter belongs to a linear layer of the model, and has its shape.

    The model is built without weights, so this costs seconds also for a large one.

    Raises:
        UserError: A layer is missing or has another shape, or the model's configuration cannot be loaded.
    """
    layers = _linear_layers(model)
    for (layer, factor), shape in _lora_shapes(adapter).items():
        sizes = layers.get(layer)
        if sizes is None:
            raise UserError(
                f"adapter {adapter}: it adapts {layer!r}, which model {model!r} does not have as a linear layer; "
                "name the model that it was trained on"
            )
        # A has shape (rank, inputs), B (outputs, rank).
        found = shape[1] if factor == "A" else shape[0]
        expected = sizes[0] if factor == "A" else sizes[1]
        if found != expected:
            raise UserError(
                f"adapter {adapter}: lora_{factor} of {layer!r} has shape {shape}, but that layer of model {model!r} "
                f"has {sizes[0]} inputs and {sizes[1]} outputs; name the model that it was trained on"
            )


def _of_run(folder: RunFolder, arguments: ServeArguments) -> tuple[RunConfig, int, Path | None]:
    config = load_config(folder.config, _overrides(arguments))
    version = best_version(folder) if arguments.version is None else arguments.version
    if version == BASE_VERSION:
        return config, version, None
    return config, version, published_adapter(folder, version)


def _of_adapter(root: Path, arguments: ServeArguments) -> RunConfig:
    if arguments.model is None:
        raise UserError(f"{arguments.policy}: an adapter alone; name the model it belongs to (--model)")
    if arguments.version is not None:
        raise UserError(f"{arguments.policy}: an adapter has no versions; leave out --version, or give a run folder")
    check_adapter(root)
    described = json.loads((root / CONFIG_FILE).read_text(encoding="utf-8"))
    policy = {
        "lora_rank": described.get("r"),
        "lora_targets": sorted({layer.rpartition(".")[2] for layer, _ in _lora_shapes(root)}),
    }
    return parse_config(apply_overrides({"policy": policy}, _overrides(arguments)), str(root / CONFIG_FILE))


def _lora_shapes(adapter: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """Returns the shape of an adapter's factors, by the name of the layer and ``A`` or ``B``."""
    shapes = {}
    with safe_open(adapter / WEIGHTS_FILE, framework="numpy") as weights:
        for key in weights.keys():  # noqa: SIM118 - a file, not a mapping
            match, shape = _LORA_WEIGHT.fullmatch(key), weights.get_slice(key).get_shape()
            if match is None or len(shape) != 2:
                raise UserError(f"adapter {adapter}: {key!r} is no LoRA weight of a linear layer; vLLM serves no other")
            shapes[match["layer"], match["factor"]] = (shape[0], shape[1])
    return shapes


def _overrides(arguments: ServeArguments) -> list[str]:
    # JSON is YAML, and keeps a name that looks like a number a name.
    model = [] if arguments.model is None else [f"policy.model={json.dumps(arguments.model)}"]
    replicas = [] if arguments.replicas is None else [f"sampler.replicas={arguments.replicas}"]
    return [*model, *replicas, *arguments.settings]


def _linear_layers(model: str) -> dict[str, tuple[int, int]]:
    """Returns inputs and outputs of a model's linear layers by name."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            built = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise UserError(f"model {model!r}: no vision-language model can be built from it ({reason})") from None
    linear = (torch.nn.Linear,)
    return {
        name: (module.in_features, module.out_features)
        for name, module in built.named_modules()
        if isinstance(module, linear)
    }
