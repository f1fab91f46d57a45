"""The log-probabilities that are computed in chunks, against those of all logits."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gflowvlm.learner import liger, output_head
from gflowvlm.learner.output_head import LogitMap, OutputHead
from gflowvlm.studies.benchmarks.memory import peak_memory

FEATURES, VOCABULARY, TOKENS = 32, 301, 23


class Model(nn.Module):
    """A model that is an output layer and what a forward pass puts behind it."""

    def __init__(self, behind=lambda values: values, bias=False, **config):
        super().__init__()
        self.lm_head = nn.Linear(FEATURES, VOCABULARY, bias=bias)
        self.behind = behind
        text = SimpleNamespace(**config)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, states):
        return self.behind(self.lm_head(states))


MAPS = {
    "plain": (LogitMap(), {}),
    "capped": (LogitMap(cap=5.0), {"final_logit_softcapping": 5.0}),
    "multiplied": (LogitMap(multiplier=0.25), {"logit_scale": 0.25}),
    "divided": (LogitMap(divisor=8.0), {"logits_scaling": 8.0}),
    "capped but its class does not": (LogitMap(), {"final_logit_softcapping": 5.0}),
    "divided and capped": (LogitMap(divisor=2.0, cap=3.0), {"logits_scaling": 2.0, "final_logit_softcapping": 3.0}),
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of five tokens, so that the last one is not full."""
    monkeypatch.setattr(output_head, "CHUNK_LOGITS", {"cpu": 5 * VOCABULARY})


def make_model(name="plain", *, frozen=True, bias=False, dtype=torch.float32):
    behind, config = MAPS[name]
    torch.manual_seed(0)
    model = Model(behind, bias=bias, **config).to(dtype).requires_grad_(not frozen)
    with torch.no_grad():
        model.lm_head.weight.mul_(12.0)
    return model


def observed(model):
    head = OutputHead(model)
    head.observe(lambda: model(torch.zeros(1, 1, FEATURES, dtype=model.lm_head.weight.dtype)))
    return head


def case(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(TOKENS, FEATURES, generator=generator).to(dtype).requires_grad_()
    ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return states, ids, torch.randn(TOKENS, generator=generator)


def by_all_logits(model, states, ids):
    return model(states).float().log_softmax(dim=1)[torch.arange(len(ids)), ids]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", MAPS)
def test_chunks_give_the_numbers_and_gradients_of_all_logits(name, frozen, bias, small_chunks):
    model = make_model(name, frozen=frozen, bias=bias)
    head = observed(model)
    assert head.in_chunks
    found = []
    for compute in (head.log_probs, lambda *case: by_all_logits(model, *case)):
        states, ids, weights = case()
        log_probs = compute(states, ids)
        model.zero_grad()
        (log_probs * weights).sum().backward()
        trained = [] if frozen else [p.grad.clone() for p in model.parameters()]
        found.append([log_probs.detach(), states.grad, *trained])
    for ours, expected in zip(*found, strict=True):
        assert float((ours - expected).abs().max()) <= 1e-6 * max(1.0, float(expected.abs().max()))


def test_confident_tokens_keep_their_small_gradients_in_bfloat16(small_chunks):
    """1 − p is far below bfloat16's resolution of p: the difference is taken before anything is rounded."""
    exact, rounded = make_model(), make_model(dtype=torch.bfloat16)
    with torch.no_grad():
        exact.lm_head.weight.copy_(rounded.lm_head.weight)
    grads = []
    for model in (exact, rounded):
        dtype = model.lm_head.weight.dtype
        states = case(torch.bfloat16)[0].detach().to(dtype)
        ids = exact(states.float()).argmax(dim=1)
        states = (states * 3).requires_grad_()
        observed(model).log_probs(states, ids).sum().backward()
        grads.append(states.grad.float())
    confident = exact(states.detach().float()).softmax(dim=1).amax(dim=1) > 0.999
    assert int(confident.sum()) > 3
    scale = grads[0][confident].abs().amax()
    assert float((grads[1] - grads[0])[confident].abs().amax()) < 0.25 * float(scale)


def test_a_tower_without_gradients_computes_no_directions(small_chunks):
    model = make_model()
    states, ids, _ = case()
    with torch.no_grad():
        log_probs = observed(model).log_probs(states, ids)
    assert not log_probs.requires_grad
    torch.testing.assert_close(log_probs, by_all_logits(model, states, ids).detach(), atol=1e-6, rtol=1e-6)


def test_no_tokens_are_no_log_probabilities():
    for frozen in (True, False):
        empty = observed(make_model(frozen=frozen)).log_probs(
            torch.zeros(0, FEATURES), torch.zeros(0, dtype=torch.long)
        )
        assert empty.shape == (0,)


def test_a_model_with_a_head_of_its_own_kind_keeps_all_its_logits_and_says_so(caplog):
    model = make_model()
    model.behind = lambda values: values - values.mean(dim=-1, keepdim=True).abs() * values
    with caplog.at_level(logging.WARNING, logger=output_head.__name__):
        head = observed(model)
    assert not head.in_chunks
    assert "Model does something of its own with the values of its output layer" in caplog.text
    states, ids, _ = case()
    logits, hidden = head.passed(lambda: model(states[None]))
    torch.testing.assert_close(head.log_probs(logits[0], ids), by_all_logits(model, states, ids))
    assert hidden.shape == (1, TOKENS, FEATURES)


def test_a_pass_in_chunks_makes_the_logits_of_one_token():
    model = make_model()
    head = observed(model)
    states, _, _ = case()
    made = []

    def logits_of_a_pass():
        made.append(model(states[None]))
        return made[-1]

    hidden, _ = head.passed(logits_of_a_pass)
    assert made[0].shape == (1, 1, VOCABULARY)
    assert torch.equal(hidden[0], states)
    assert model(states[None]).shape == (1, TOKENS, VOCABULARY)


def test_a_large_vocabulary_takes_a_quarter_of_the_memory_of_all_its_logits(monkeypatch):
    vocabulary, tokens = 20_000, 256
    monkeypatch.setattr(output_head, "CHUNK_LOGITS", {"cpu": 16 * vocabulary})
    model = make_model()
    model.lm_head = nn.Linear(FEATURES, vocabulary, bias=False).requires_grad_(False)
    head = observed(model)

    def peak(compute):
        states, ids, _ = case()
        states = states.detach().repeat(tokens // TOKENS + 1, 1)[:tokens].requires_grad_()
        ids = ids.repeat(tokens // TOKENS + 1)[:tokens]
        return peak_memory(lambda: compute(states, ids).sum().backward())

    full = peak(lambda states, ids: by_all_logits(model, states, ids))
    chunked = peak(head.log_probs)
    assert full > 2 * tokens * vocabulary * 4
    assert chunked < 0.25 * full


def by_chunks(states, ids, weight):
    return output_head.frozen_log_probs(states, ids, weight, None, LogitMap())


@pytest.mark.parametrize("kernel", [by_chunks, lambda *case: 0.5 * by_chunks(*case)])
def test_ligers_kernel_is_used_where_it_agrees(monkeypatch, caplog, kernel):
    """The kernel itself needs a GPU; what stands in for it here is right, or wrong."""
    monkeypatch.setattr(output_head, "liger_is_available", lambda device: True)
    monkeypatch.setattr(output_head, "liger_log_probs", kernel)
    agrees = kernel is by_chunks
    assert observed(make_model())._uses_liger == agrees
    assert ("liger-kernel gives other log-probabilities" in caplog.text) != agrees
    # A cap or a bias it would round otherwise, and for a trained layer it has no gradient.
    for model in (make_model("capped"), make_model(bias=True), make_model(frozen=False)):
        assert not observed(model)._uses_liger


@pytest.mark.skipif(not liger.is_available(torch.device("cuda")) or not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ligers_kernel_gives_the_numbers_and_gradients_of_chunks(dtype):
    weight = make_model(dtype=dtype).lm_head.weight.cuda()
    found = []
    for compute in (liger.liger_log_probs, by_chunks):
        states, ids, weights = (tensor.detach().cuda() for tensor in case(dtype))
        log_probs = compute(states.requires_grad_(), ids, weight)
        (log_probs * weights).sum().backward()
        found.append((log_probs.detach(), states.grad))
    bounds = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(found[0], found[1], **bounds)
