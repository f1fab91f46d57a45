"""Table 3: NumberLine and Blackjack, with and without off-policy data and SFT initialisation, for each loss."""

from collections.abc import Iterator, Mapping

from gflowvlm.studies.experiments.description import PPO, Bars, Column, Experiment, Scale, Task, Variant, WarmStart

HUB_MODEL = "llava-hf/llava-v1.6-mistral-7b-hf"

LOSSES = {"Var-TB": "var_tb", "SubTB": "subtb", "DB": "db"}

DATA = {
    # Nothing is replayed, and generation runs ahead by a batch at most.
    "on-policy": ("rollout.expert_on_failure=false", "buffer.newest_share=1.0", "buffer.max_staleness=1"),
    "off-policy": ("rollout.expert_on_failure=true", "buffer.newest_share=0.5"),
}

PAPER_OOD = {
    "NumberLine, PPO, SFT start": 4.4,
    "NumberLine, DB, on-policy, SFT start": 9.1,
    "NumberLine, DB, off-policy, SFT start": 18.6,
}


def _starts(task: Task) -> dict[str, Mapping[Scale, WarmStart]]:
    """Returns where a policy starts from, by scale; where it is not said, from its preset's model.

    The tiny preset's model has learned to read and to answer, but acts mostly at random; taught is the same after
    demonstrations of the expert, in distribution. The 7B preset's model is taught; untaught is the bare one
    with `[DONE]` in its tokenizer, which takes a step of training, here one too small to change anything.
    """
    taught = ("--model", f"{task}-tiny", "--noise", "0", "--no-ood", "--steps", "400", "--lr", "1e-3")
    bare = ("--model", HUB_MODEL, "--dtype", "bfloat16", "--image-size", "336", "--steps", "1", "--lr", "1e-9")
    memory = ("--lora-rank", "64", "--gradient-checkpointing", "--micro-batch", "4")
    common = ("--task", task, "--episodes", "0")
    return {
        "SFT start": {"tiny": WarmStart(f"{task}-taught", (*common, *taught))},
        "no SFT start": {"paper": WarmStart(f"{task}-untaught", (*common, *bare, *memory))},
    }


def _variants(task: Task, title: str) -> Iterator[Variant]:
    def variant(parts: tuple[str, ...], overrides: tuple[str, ...], start: Mapping[Scale, WarmStart]) -> Variant:
        name = ", ".join((title, *parts))
        paper = {"ood": PAPER_OOD[name]} if name in PAPER_OOD else {}
        return Variant(name, task, overrides, start, paper)

    for start, models in _starts(task).items():
        if start == "no SFT start":
            yield variant(("SFT",), ("objective.loss=sft",), models)
        yield variant(("PPO", start), PPO, models)
        for loss, setting in LOSSES.items():
            for data, overrides in DATA.items():
                yield variant((loss, data, start), (f"objective.loss={setting}", *overrides), models)


NUMBERLINE_BLACKJACK = Experiment(
    name="numberline-blackjack",
    title="NumberLine and Blackjack: each loss, on-policy and with the expert's data, from SFT and without",
    source="Table 3",
    variants=(*_variants("numberline", "NumberLine"), *_variants("blackjack", "Blackjack")),
    columns=(
        Column("start", "success before training", before=True),
        Column("success", "success"),
        Column("ood_start", "out-of-distribution success before training", split="ood", before=True),
        Column("ood", "out-of-distribution success", split="ood"),
        Column("distinct", "Div@N", "div_at_n", percent=False),
    ),
    picture=Bars(("success", "ood")),
    notes=(
        "Off-policy: where all of a group fail, the expert's trajectory for the same instance joins them, and older "
        "groups are replayed. On-policy: neither.",
        "Blackjack has one distribution of decks; out of distribution are only other decks. NumberLine's tiny model "
        "has read and answered out-of-distribution numbers before any of these runs (`gflowvlm sft --ood`).",
        "Our notes on the paper do not say which start its three figures have; they stand at the SFT start.",
    ),
)
