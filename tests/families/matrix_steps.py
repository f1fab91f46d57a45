"""Steps of the matrix that are more than one command: the match of both sides, a served answer, a plain PEFT load."""

import asyncio
import base64
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from gflowvlm.actors.samplers import make_sampler
from gflowvlm.learner.model import load_adapted
from gflowvlm.run.folder import RunFolder
from gflowvlm.shared.policy_inputs import PolicyInputs
from tests.families.agreement import PROMPTS, SIZES, difference, lively_policy, picture, sampling

TOLERANCE = 1e-4
START_S, ANSWER_S, END_S = 400.0, 120.0, 90.0


def match(folder: Path, engine: str) -> None:
    """Compares an engine's log-probabilities with the learner's, base model and adapter."""
    model = folder / "model"
    config = sampling(engine)
    policy, inputs = lively_policy(config, model), PolicyInputs.load(str(model))
    adapter = folder / "lively-adapter"
    policy.save_pretrained(adapter)
    sampler = make_sampler(config, str(model), engine)

    async def both() -> tuple[float, float]:
        await sampler.load(1, adapter)
        return await difference(sampler, policy, inputs, 0), await difference(sampler, policy, inputs, 1)

    try:
        found = asyncio.run(both())
    finally:
        sampler.shutdown()
    print(f"RESULT {found[0]:.1e} / {found[1]:.1e}")
    if max(found) > TOLERANCE:
        raise SystemExit(1)


def match_transformers(folder: Path) -> None:
    """The transformers sampler against the learner."""
    match(folder, "transformers")


def match_vllm(folder: Path) -> None:
    """VLLM against the learner."""
    match(folder, "vllm")


def peft(folder: Path) -> None:
    """Loads a trained adapter with PEFT alone and compares it with the learner's policy."""
    tuned, adapter = folder / "sft", _run(folder).adapter(2)
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tuned), adapter).eval()
    ours = load_adapted(str(tuned), "float32", adapter)
    encoded = PolicyInputs.load(str(tuned)).encode([PROMPTS[0]], [picture(0, SIZES[0])])
    with torch.no_grad():
        found = float((plain(**encoded).logits - ours(**encoded).logits).abs().max())
    print(f"RESULT {found:.1e}")
    if found > TOLERANCE:
        raise SystemExit(1)


def serve(folder: Path) -> None:
    """Starts `serve` on a run, and compares an answer's prompt with the learner's."""
    run, tuned = _run(folder).root, folder / "sft"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "gflowvlm", "serve", str(run), "--version", "2", "--port", str(port)]
    served = subprocess.Popen(command, start_new_session=True)
    try:
        answer = _ask(f"http://127.0.0.1:{port}", served, run.name)
    finally:
        served.send_signal(signal.SIGINT)
        try:
            served.wait(END_S)
        except subprocess.TimeoutExpired:
            os.killpg(served.pid, signal.SIGKILL)
    inputs = PolicyInputs.load(str(tuned))
    expected = inputs.encode([PROMPTS[0]], [picture(0, SIZES[0])])["input_ids"][0].tolist()
    same = answer["prompt_token_ids"] == expected
    print(f"RESULT {len(answer['choices'][0]['token_ids'])} tokens answered{'' if same else ', to another prompt'}")
    if not same:
        raise SystemExit(1)


def _run(folder: Path) -> RunFolder:
    """Returns the run that vLLM sampled for; where there is none, that of the transformers sampler."""
    run = RunFolder(folder / "run-vllm")
    return run if run.adapter(2).is_dir() else RunFolder(folder / "run-transformers")


def _ask(url: str, served: "subprocess.Popen[bytes]", name: str) -> dict[str, Any]:
    deadline = time.monotonic() + START_S
    with httpx.Client(base_url=url, timeout=ANSWER_S) as client:
        while True:
            try:
                if client.get("/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if served.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("serve did not come up")
            time.sleep(1.0)
        shown = base64.b64encode(picture(0, SIZES[0])).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{shown}"}},
            {"type": "text", "text": PROMPTS[0]},
        ]
        request = {
            "model": name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 8,
            "return_token_ids": True,
        }
        answered = client.post("/v1/chat/completions", json=request)
    if answered.status_code != 200:
        raise SystemExit(f"serve answered {answered.status_code}: {answered.text[:400]}")
    found: dict[str, Any] = answered.json()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps = {step.__name__: step for step in (match_transformers, match_vllm, peft, serve)}
    steps[sys.argv[1]](Path(sys.argv[2]))
