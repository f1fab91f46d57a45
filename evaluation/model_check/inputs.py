"""Findings about a model's processor and tokenizer: no weights are read."""

from collections.abc import Sequence
from dataclasses import dataclass

from gflowvlm.evaluation.model_check.states import ProbedState
from gflowvlm.learner.memory import PromptSize
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError, one_line
from gflowvlm.shared.findings import Check, Status
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.response import DONE_TOKEN

SHOWN_CHARS = 60
"""The most characters of a text that a finding quotes."""


@dataclass(frozen=True)
class RoundTrip:
    """Which demonstrated answers come back from their tokens as what they are.

    Attributes:
        answers: How many there are.
        failed: Those that do not, and why.
        stop_tokens: Tokens of the stop action, the most at any state; 0 where it can be scored at none.
        unscored: Answers behind whose chain of thought stopping cannot be scored.
        uneven: States at which the actions do not begin behind the same tokens.
    """

    answers: int
    failed: list[str]
    stop_tokens: int
    unscored: int
    uneven: int

    @property
    def share(self) -> float:
        """Share of the answers that come back."""
        return 1.0 - len(self.failed) / self.answers if self.answers else 0.0


@dataclass(frozen=True)
class Prompts:
    """The probed prompts, as the model sees them.

    Attributes:
        tokens: Tokens of the longest.
        response: Tokens of the longest demonstrated answer.
        patches: Pieces that the vision tower cuts the largest picture into; 0 where the processor does not show it.
    """

    tokens: int
    response: int
    patches: int

    @property
    def size(self) -> PromptSize:
        """The longest, for a memory plan."""
        return PromptSize(self.tokens, self.patches)


def check_template(inputs: PolicyInputs, state: ProbedState) -> Check:
    """Looks whether a prompt can be rendered, with its picture, and its text comes back from its tokens."""
    name = "chat template"
    try:
        rendered = inputs.render(state.prompt)
        encoded = inputs.encode([state.prompt], [state.image])
    except (ValueError, TypeError, KeyError, ImportError, UserError, RuntimeError, OSError) as error:
        advice = "give the processor a chat template that takes a picture and a text (chat_template.jinja)"
        return Check(name, Status.BROKEN, f"no prompt can be made: {one_line(error)}", advice)
    if state.prompt not in rendered:
        advice = "use a chat template that writes the user's text as it is"
        return Check(name, Status.BROKEN, "the prompt's text is not in what the template makes of it", advice)
    pictures = [key for key, tensor in encoded.items() if tensor.is_floating_point()]
    if not pictures:
        return Check(name, Status.BROKEN, "the processor makes no picture of the prompt's", "use a processor that does")
    if inputs.plain_chat_template is not None:
        return Check(name, Status.OK, "has none: picture first, then the text, nothing else")
    if not rendered.rstrip().endswith(state.prompt.rstrip().splitlines()[-1]):
        return Check(name, Status.OK, f"asks for an answer with {_quoted(rendered.partition(state.prompt)[2])}")
    advice = "without a generation prompt the model has to write the turn's beginning itself"
    return Check(name, Status.NOTE, "adds nothing behind the prompt that asks for an answer", advice)


def check_start_token(inputs: PolicyInputs, state: ProbedState) -> Check:
    """Looks whether a prompt begins with the BOS token exactly where the tokenizer would put one."""
    name, tokenizer = "BOS", inputs.tokenizer
    ids = inputs.encode([state.prompt], [state.image])["input_ids"][0].tolist()
    start = tokenizer.bos_token_id
    if start is None:
        return Check(name, Status.OK, "the tokenizer has none")
    first = next((n for n, token in enumerate(ids) if token != start), len(ids))
    usual = tokenizer("a")["input_ids"][:1] == [start]
    if first > 1:
        advice = "the chat template and the tokenizer both write it: take it out of the template"
        return Check(name, Status.BROKEN, f"stands {first} times at the start of a prompt", advice)
    if usual and first == 0:
        advice = "it was trained with one: write {{ bos_token }} first in its chat template"
        return Check(name, Status.BROKEN, "missing, and the tokenizer puts one before a text", advice)
    where = "stands once at the start" if first == 1 else "not used, as by the tokenizer itself"
    if first == 0 and start in ids:
        where = "stands where its processor puts it, not at the start"
    return Check(name, Status.OK, f"{tokenizer.bos_token} {where}")


def check_end_tokens(inputs: PolicyInputs) -> Check:
    """Looks which tokens end a response."""
    name = "end of turn"
    if not inputs.end_ids:
        advice = "give its generation_config.json an eos_token_id, or its tokenizer an eos_token"
        return Check(name, Status.BROKEN, "no token ends a response", advice)
    shown = ", ".join(str(inputs.tokenizer.convert_ids_to_tokens(end)) for end in sorted(inputs.end_ids))
    written = inputs.tokenizer.convert_ids_to_tokens(inputs.end_id)
    others = "" if len(inputs.end_ids) == 1 else f"; demonstrations end with {written}"
    return Check(name, Status.OK, f"a response ends with {shown}{others}")


def check_round_trip(found: RoundTrip) -> Check:
    """Judges whether demonstrated answers come back from their tokens with their actions."""
    name = "answers"
    if found.failed:
        detail = f"{len(found.failed)} of {found.answers} do not come back from their tokens: {found.failed[0]}"
        return Check(name, Status.BROKEN, detail, "set another task.answer_format, or use another tokenizer")
    if found.uneven:
        detail = f"at {found.uneven} states the actions begin behind different tokens"
        return Check(name, Status.BROKEN, detail, "set another task.answer_format, or use another tokenizer")
    return Check(name, Status.OK, f"all {found.answers} demonstrated ones come back from their tokens")


def check_stop(inputs: PolicyInputs, found: RoundTrip, *, state_wise: bool) -> Check:
    """Judges how the stop action is written and scored.

    Args:
        inputs: The model's processor.
        found: What came of the demonstrated answers.
        state_wise: Whether the objective needs the stop action's probability at every state.
    """
    name = "stop action"
    if found.unscored:
        advice = "use var_tb, tb, ppo, grpo or sft, or add [DONE] as a token with `gflowvlm sft`"
        status = Status.BROKEN if state_wise else Status.NOTE
        return Check(name, status, f"P({DONE_TOKEN}) cannot be scored behind {found.unscored} answers", advice)
    if inputs.done_id is not None:
        return Check(name, Status.OK, f"{DONE_TOKEN} is token {inputs.done_id}, scored at no cost")
    return Check(name, Status.OK, f"{DONE_TOKEN} is up to {found.stop_tokens} tokens, scored as a short continuation")


def check_lengths(config: RunConfig, prompts: Prompts) -> Check:
    """Judges whether the longest prompt and response fit the model's length, and the answers their limit."""
    name, response = "lengths", config.policy.max_response_tokens
    needed, most = prompts.tokens + response, config.sampler.max_model_len
    if prompts.response > response:
        detail = f"demonstrated answers have up to {prompts.response} tokens, policy.max_response_tokens is {response}"
        advice = f"set policy.max_response_tokens={_rounded(prompts.response)}"
        return Check(name, Status.BROKEN, detail, advice)
    detail = f"the longest prompt has {prompts.tokens} tokens, with a response up to {needed}"
    if needed > most:
        advice = f"set sampler.max_model_len={_rounded(needed)}"
        return Check(name, Status.BROKEN, f"{detail}; sampler.max_model_len is {most}", advice)
    return Check(name, Status.OK, f"{detail} of sampler.max_model_len = {most}")


def with_room(config: RunConfig, prompts: Prompts) -> tuple[RunConfig, list[str]]:
    """Returns a configuration whose limits the probed prompts and answers do not exceed, and what it changes."""
    policy, sampler = config.policy, config.sampler
    changes = []
    if prompts.response > policy.max_response_tokens:
        policy = policy.model_copy(update={"max_response_tokens": _rounded(prompts.response)})
        changes.append(f"policy.max_response_tokens={policy.max_response_tokens}")
    needed = prompts.tokens + policy.max_response_tokens
    if needed > sampler.max_model_len:
        sampler = sampler.model_copy(update={"max_model_len": _rounded(needed)})
        changes.append(f"sampler.max_model_len={sampler.max_model_len}")
    return config.model_copy(update={"policy": policy, "sampler": sampler}), changes


def measured_prompts(inputs: PolicyInputs, states: Sequence[ProbedState]) -> Prompts:
    """Returns how large the probed prompts and answers are."""
    longest = max(states, key=lambda state: len(state.prompt))
    encoded = inputs.encode([longest.prompt], [longest.image])
    texts = {text for state in states for text in state.demonstrations.values()}
    longest_answers = sorted(texts, key=len)[-3:]
    encoded_answers = [inputs.encode_if_possible(text) for text in longest_answers]
    response = max((len(ids) for ids in encoded_answers if ids is not None), default=0)
    return Prompts(int(encoded["input_ids"].shape[1]), response, _patches(inputs, encoded))


def round_trip(inputs: PolicyInputs, states: Sequence[ProbedState]) -> RoundTrip:
    """Writes every demonstrated answer in tokens and reads it back."""
    answers, unscored, uneven, stop_tokens = 0, 0, 0, 0
    failed: list[str] = []
    for state in states:
        starts: set[tuple[int, ...]] = set()
        for action, text in state.demonstrations.items():
            answers += 1
            ids = inputs.encode_if_possible(text)
            if ids is None:
                failed.append(f"no tokens give {_quoted(text)} back")
                continue
            read = inputs.read(ids)
            if read.text != text or read.parsed.action != action:
                failed.append(f"{_quoted(text)} comes back as {_quoted(read.text)}")
                continue
            stop_tokens = max(stop_tokens, len(read.layout.stop_ids))
            unscored += not read.layout.stop_ids
            starts.add(tuple(ids[: read.layout.cot_end]))
        uneven += len(starts) > 1
    return RoundTrip(answers, failed, stop_tokens, unscored, uneven)


def _patches(inputs: PolicyInputs, encoded: dict[str, object]) -> int:
    """Returns how many patches the pictures of encoded inputs have: by their pixels, three colours each."""
    processor = getattr(inputs.processor, "image_processor", None)
    size = getattr(processor, "patch_size", None)
    side = size if isinstance(size, int) else 14
    pixels = [t.numel() for t in encoded.values() if hasattr(t, "numel") and t.is_floating_point()]  # type: ignore[attr-defined]
    return sum(pixels) // (3 * side * side)


def _rounded(tokens: int) -> int:
    return -(-tokens // 64) * 64


def _quoted(text: str) -> str:
    shown = text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 1]}…"
    return repr(shown)
