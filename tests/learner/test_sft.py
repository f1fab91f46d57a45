"""Supervised fine-tuning: which tokens count, that it learns, resumes, and prepares foreign models."""

import io
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import normalizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from gflowvlm.learner import output_head
from gflowvlm.learner.output_head import OutputHead
from gflowvlm.learner.schedule import rate_to_zero
from gflowvlm.learner.sft import SftExample, SftSettings, check_demonstrations, load_for_sft, sft_loss
from gflowvlm.learner.sft_trainer import SftProgress, SftTrainer
from gflowvlm.learner.sft_weights import scale_head
from gflowvlm.learner.tiny_policy import build_tiny_policy
from gflowvlm.shared.answer_formats.json_answers import JsonAnswers
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.policy_inputs import PolicyInputs
from tests.shared.json_answers import format_response


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_policy(tmp_path_factory.mktemp("tiny"), seed=0)


def example(number: int, action: str = "+", extra: str = "") -> SftExample:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (number * 20 % 256, 90, 10)).save(buffer, "PNG")
    response = format_response(action, f"{number} is below 50", {"current": number, "target": 50})
    return SftExample("Which number?" + extra, buffer.getvalue(), response)


class Numbers:
    """A source of examples; counts which steps were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def batch(self, step: int, size: int) -> Sequence[SftExample]:
        self.asked.append(step)
        rng = random.Random(step)
        return [example(rng.randrange(4), rng.choice("+-"), " again" * rng.randrange(3)) for _ in range(size)]


def train(trainer: SftTrainer, folder: Path, until: int | None = None) -> list[SftProgress]:
    seen: list[SftProgress] = []
    trainer.train(Numbers(), folder / "checkpoint", seen.append, lambda: trainer.step == until)
    return seen


def test_content_is_what_the_json_says() -> None:
    text = format_response("[DONE]", "3 equals 3", {"current": 13, "target": -2.5})
    assert [text[left:right] for left, right in JsonAnswers().content_chars(text)] == [
        "13",
        "-2.5",
        "3 equals 3",
        "[DONE]",
    ]


def test_the_loss_is_the_weighted_cross_entropy_of_the_response_alone(tiny: Path) -> None:
    network, inputs = load_for_sft(str(tiny), SftSettings())
    one = example(7)
    ids = inputs.encode_response(one.response)
    content = {"7", "5", "0", "+", " is below "}
    weights = torch.tensor([5.0 if inputs.tokenizer.decode([i]) in content else 1.0 for i in ids])
    assert 6 <= (weights == 5).sum() < len(ids)
    batch = inputs.encode([one.prompt], [one.image])
    tokens = torch.cat([batch["input_ids"], torch.tensor([ids])], dim=1)
    with torch.no_grad():
        logits = network(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=batch["pixel_values"]
        ).logits
        log_probs = logits[0, -len(ids) - 1 : -1].log_softmax(-1)[torch.arange(len(ids)), ids]
        total, weight = sft_loss(network, inputs, [one], content_weight=5.0)
    assert weight == weights.sum()
    assert total.item() == pytest.approx(-(weights * log_probs).sum().item(), rel=1e-5)


def test_padding_changes_nothing(tiny: Path) -> None:
    network, inputs = load_for_sft(str(tiny), SftSettings())
    examples = [example(3), example(47, "[DONE]", " and a much longer prompt"), example(12, "-")]
    with torch.no_grad():
        together = sft_loss(network, inputs, examples, 5.0)
        alone = sum(sft_loss(network, inputs, [e], 5.0) for e in examples)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loss_in_chunks_is_that_of_all_logits(tiny: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    network, inputs = load_for_sft(str(tiny), SftSettings())
    monkeypatch.setattr(output_head, "CHUNK_LOGITS", {"cpu": 7 * len(inputs.tokenizer)})
    examples = [example(3), example(47, "[DONE]", " and a much longer prompt")]
    in_chunks = OutputHead(network)
    batch = inputs.encode([examples[0].prompt], [examples[0].image])
    in_chunks.observe(lambda: network(**batch).logits)
    found = []
    for head in (in_chunks, OutputHead(network)):
        network.zero_grad()
        loss = sft_loss(network, inputs, examples, 5.0, precision, head)[0]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)])
    assert in_chunks.in_chunks
    bounds = {"float32": {"atol": 1e-4, "rtol": 1e-5}, "bfloat16": {"atol": 0.2, "rtol": 0.05}}[precision]
    torch.testing.assert_close(found[0], found[1], **bounds)


def test_micro_batches_give_the_same_step(tiny: Path, tmp_path: Path) -> None:
    losses = []
    for micro_batch in (1, 8):
        settings = SftSettings(steps=3, batch_size=6, micro_batch=micro_batch, warmup_steps=1)
        trainer = SftTrainer(*load_for_sft(str(tiny), settings), settings)
        losses.append([p.loss for p in train(trainer, tmp_path)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_training_lowers_the_loss(tiny: Path, tmp_path: Path) -> None:
    settings = SftSettings(steps=40, batch_size=8, warmup_steps=4)
    seen = train(SftTrainer(*load_for_sft(str(tiny), settings), settings), tmp_path)
    assert [p.step for p in seen] == list(range(1, 41))
    assert seen[-1].loss < 0.5 * seen[0].loss


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tiny: Path, tmp_path: Path) -> None:
    settings = SftSettings(steps=8, batch_size=4, warmup_steps=2, checkpoint_every=100)
    whole = SftTrainer(*load_for_sft(str(tiny), settings), settings)
    expected = train(whole, tmp_path / "whole")
    train(SftTrainer(*load_for_sft(str(tiny), settings), settings), tmp_path, until=5)
    resumed = SftTrainer.resume(tmp_path / "checkpoint", settings)
    assert resumed.step == 5
    seen = train(resumed, tmp_path)
    assert [p.step for p in seen] == [6, 7, 8]
    assert [p.loss for p in seen] == pytest.approx([p.loss for p in expected[5:]], rel=1e-5)
    for ours, theirs in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_checkpoints_hold_no_pickle(tiny: Path, tmp_path: Path) -> None:
    settings = SftSettings(steps=2, batch_size=2, checkpoint_every=1)
    train(SftTrainer(*load_for_sft(str(tiny), settings), settings), tmp_path)
    suffixes = {path.suffix for path in (tmp_path / "checkpoint").iterdir()}
    assert suffixes == {".json", ".safetensors", ".jinja"}
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 1


@pytest.mark.parametrize("damage", ["missing", "state", "optimizer", "model"])
def test_a_damaged_checkpoint_is_a_user_error(tiny: Path, tmp_path: Path, damage: str) -> None:
    settings = SftSettings(steps=2, batch_size=2, checkpoint_every=1)
    train(SftTrainer(*load_for_sft(str(tiny), settings), settings), tmp_path)
    checkpoint = tmp_path / "checkpoint"
    names = {"state": "state.json", "optimizer": "optimizer.safetensors", "model": "model.safetensors"}
    if damage == "missing":
        checkpoint = tmp_path / "nothing"
    else:
        (checkpoint / names[damage]).write_bytes(b"\x00\x01")
    with pytest.raises(UserError):
        SftTrainer.resume(checkpoint, settings)


def test_a_checkpoint_refuses_other_settings(tiny: Path, tmp_path: Path) -> None:
    settings = SftSettings(steps=2, batch_size=2, checkpoint_every=1)
    train(SftTrainer(*load_for_sft(str(tiny), settings), settings), tmp_path)
    with pytest.raises(UserError, match="learning_rate"):
        SftTrainer.resume(tmp_path / "checkpoint", settings.model_copy(update={"learning_rate": 0.5}))


def without_done(tiny: Path, folder: Path) -> Path:
    """Copies a model and takes `[DONE]`, its last token, out of tokenizer and embeddings."""
    network, inputs = load_for_sft(str(tiny), SftSettings())
    network.resize_token_embeddings(inputs.done_id, mean_resizing=False)
    network.save_pretrained(folder)
    inputs.processor.save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "[DONE]"]
    file.write_text(json.dumps(content))
    return folder


def test_a_model_without_done_gets_it_where_that_is_asked(tiny: Path, tmp_path: Path) -> None:
    bare = without_done(tiny, tmp_path / "bare")
    written = PreTrainedTokenizerFast.from_pretrained(bare).encode("[DONE]")
    assert len(written) > 1
    settings = SftSettings(
        steps=2, batch_size=4, micro_batch=2, dtype="bfloat16", gradient_checkpointing=True, learning_rate=1e-4
    )
    network, inputs = load_for_sft(str(bare), settings, done_token=True)
    rows = network.get_input_embeddings().weight
    torch.testing.assert_close(rows[-1].float(), rows[written].float().mean(dim=0), rtol=0.02, atol=1e-3)
    trainer = SftTrainer(network, inputs, settings)
    assert all(torch.isfinite(torch.tensor(p.loss)) for p in train(trainer, tmp_path))
    trainer.save_model(tmp_path / "made")
    made = PolicyInputs.load(str(tmp_path / "made"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "made")
    assert made.done_id == inputs.done_id
    assert model.config.text_config.vocab_size == made.done_id + 1
    assert model.dtype == torch.bfloat16


def test_a_model_that_cannot_be_loaded_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        load_for_sft(str(tmp_path / "nowhere"), SftSettings())


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    settings = SftSettings(steps=100, learning_rate=1.0, warmup_steps=10)
    rates = [rate_to_zero(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0) == pytest.approx(rates[10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.01


def test_a_scaled_head_scales_every_logit_and_leaves_the_embedding_alone(tiny: Path) -> None:
    network, inputs = load_for_sft(str(tiny), SftSettings())
    batch = inputs.encode(["one"], [example(7).image])
    embedding = network.get_input_embeddings().weight.clone()
    with torch.no_grad():
        before = network(**batch).logits
        scale_head(network, 2.0)
        torch.testing.assert_close(network(**batch).logits, 2 * before)
    torch.testing.assert_close(network.get_input_embeddings().weight, embedding, rtol=0, atol=0)


def test_a_head_that_is_the_embedding_is_not_scaled(tiny: Path) -> None:
    network, _ = load_for_sft(str(tiny), SftSettings())
    network.get_output_embeddings().weight = network.get_input_embeddings().weight
    with pytest.raises(UserError, match="head-scale"):
        scale_head(network, 2.0)


def test_no_bars_for_local_files_stand_between_the_steps(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers_logging.enable_progress_bar()
    model = build_tiny_policy(tmp_path / "model", seed=0)
    transformers_logging.enable_progress_bar()
    network, inputs = load_for_sft(str(model), SftSettings())
    SftTrainer(network, inputs, SftSettings()).save_model(tmp_path / "saved")
    assert capfd.readouterr().err == ""


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def test_bfloat16_rounds_no_update_away_before_the_model_is_saved(tiny: Path, tmp_path: Path) -> None:
    settings = SftSettings(steps=20, batch_size=4, warmup_steps=2, learning_rate=1e-5, dtype="bfloat16")
    network, inputs = load_for_sft(str(tiny), settings)
    before = weights(network)
    trainer = SftTrainer(network, inputs, settings)
    train(trainer, tmp_path)
    after = weights(network)
    changed = sum(int((after[name] != weight).sum()) for name, weight in before.items())
    # Rows of tokens that no example shows move by weight decay alone, less than float32 has digits for.
    assert changed / sum(weight.numel() for weight in before.values()) > 0.9
    trainer.save_model(tmp_path / "made")
    made = AutoModelForImageTextToText.from_pretrained(tmp_path / "made")
    for name, weight in made.named_parameters():
        assert torch.equal(weight, after[name].bfloat16()), name


def test_bfloat16_computes_in_bfloat16(tiny: Path) -> None:
    network, inputs = load_for_sft(str(tiny), SftSettings(dtype="bfloat16"))
    seen: list[torch.dtype] = []
    layer = network.get_decoder().layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    with torch.no_grad():
        exact, rounded = (sft_loss(network, inputs, [example(1)], 5.0, dtype) for dtype in ("float32", "bfloat16"))
    assert seen == [torch.float32, torch.bfloat16]
    assert float(rounded[0]) == pytest.approx(float(exact[0]), rel=0.02)


def played(number: int, action: str) -> SftExample:
    return replace(example(number), response=format_response(action, "so", {"current": number, "target": 50}))


class Stops(Numbers):
    """The same examples, some of them of the stop action."""

    def batch(self, step: int, size: int) -> Sequence[SftExample]:
        return [*super().batch(step, size)[1:], played(step, "[DONE]")]


def test_of_embeddings_that_are_not_to_be_trained_the_stop_actions_rows_alone_move_after_a_resume_too(
    tiny: Path, tmp_path: Path
) -> None:
    settings = SftSettings(steps=4, batch_size=4, warmup_steps=1, weight_decay=0.1, train_embeddings=False)
    network, inputs = load_for_sft(str(tiny), settings)
    before = weights(network)
    trainer = SftTrainer(network, inputs, settings)
    trainer.train(Stops(), tmp_path / "checkpoint", lambda progress: None, lambda: trainer.step == 2)
    resumed = SftTrainer.resume(tmp_path / "checkpoint", settings)
    resumed.train(Stops(), tmp_path / "checkpoint", lambda progress: None, lambda: False)
    size = sum(weight.numel() for weight in before.values())
    for layer in (network.get_input_embeddings(), network.get_output_embeddings()):
        name = next(name for name, parameter in network.named_parameters() if parameter is layer.weight)
        after = resumed.network.get_parameter(name).detach()
        moved = (after != before[name]).any(dim=1).nonzero().flatten().tolist()
        assert moved == [inputs.done_id], name
        size -= after.numel() - after.shape[1]
    assert resumed.trained == size
    name = "model.text_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(resumed.network.get_parameter(name), before[name])


LORA = {"batch_size": 4, "warmup_steps": 1, "lora_rank": 4, "train_embeddings": False, "learning_rate": 1e-2}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_trained_beside_frozen_weights_and_merged_at_the_end(
    tiny: Path, tmp_path: Path, dtype: str
) -> None:
    settings = SftSettings(steps=8, dtype=dtype, **LORA)
    network, inputs = load_for_sft(str(tiny), settings)
    before = weights(AutoModelForImageTextToText.from_pretrained(tiny, dtype=getattr(torch, dtype)))
    trainer = SftTrainer(network, inputs, settings)
    assert {p.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}
    trainer.train(Stops(), tmp_path / "checkpoint", lambda progress: None, lambda: False)
    with torch.no_grad():
        found = sft_loss(trainer.network, inputs, [example(1)], 5.0, settings.dtype)
    trainer.save_model(tmp_path / "made")
    made = AutoModelForImageTextToText.from_pretrained(tmp_path / "made")
    after = weights(made)
    assert after.keys() == before.keys()
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    layers = {name for name in before if ".text_model.layers." in name and name.endswith("proj.weight")}
    rows = {name for name in before if name.endswith(("embed_tokens.weight", "lm_head.weight"))}
    assert moved == layers | rows
    for name in rows:
        assert (after[name] != before[name]).any(dim=1).nonzero().flatten().tolist() == [inputs.done_id]
    with torch.no_grad():
        merged = sft_loss(made, PolicyInputs.load(str(tmp_path / "made")), [example(1)], 5.0, settings.dtype)
    assert float(merged[0]) == pytest.approx(float(found[0]), rel=1e-4 if dtype == "float32" else 0.05)


def test_an_adapters_training_goes_on_from_a_checkpoint_that_holds_no_model(tiny: Path, tmp_path: Path) -> None:
    bare = without_done(tiny, tmp_path / "bare")
    settings = SftSettings(steps=6, checkpoint_every=100, **LORA)
    whole = SftTrainer(*load_for_sft(str(bare), settings, done_token=True), settings)
    whole.train(Stops(), tmp_path / "whole", lambda progress: None, lambda: False)
    begun = SftTrainer(*load_for_sft(str(bare), settings, done_token=True), settings)
    begun.train(Stops(), tmp_path / "checkpoint", lambda progress: None, lambda: begun.step == 3)
    assert not (tmp_path / "checkpoint" / "model.safetensors").exists()
    resumed = SftTrainer.resume(tmp_path / "checkpoint", settings)
    resumed.train(Stops(), tmp_path / "checkpoint", lambda progress: None, lambda: False)
    for ours, theirs in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    (tmp_path / "checkpoint").mkdir(exist_ok=True)
    resumed.save_checkpoint(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "trained.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="no readable checkpoint"):
        SftTrainer.resume(tmp_path / "checkpoint", settings)


def test_demonstrations_that_do_not_come_back_from_their_tokens_are_told_before_training(tiny: Path) -> None:
    _, inputs = load_for_sft(str(tiny), SftSettings())
    check_demonstrations(Numbers(), inputs, SftSettings(batch_size=2))
    inputs.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("below", "above")
    with pytest.raises(UserError, match=r"no tokens that give .* is below 50.* back"):
        check_demonstrations(Numbers(), inputs, SftSettings(batch_size=2))


def test_demonstrations_in_another_answer_format_are_told_before_training(tiny: Path) -> None:
    _, inputs = load_for_sft(str(tiny), SftSettings(), "tags")
    with pytest.raises(UserError, match=r"no action is read .*task\.answer_format"):
        check_demonstrations(Numbers(), inputs, SftSettings(batch_size=2))
