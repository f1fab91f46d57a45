"""Figure 4: how much should the chain of thought count?"""

from gflowvlm.studies.experiments.description import Column, Experiment, Line, Variant

WEIGHTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)

COT_WEIGHT = Experiment(
    name="cot-weight",
    title="NumberLine: the weight of log P_CoT in log P_F",
    source="Figure 4",
    variants=tuple(
        Variant(
            f"cot_weight {weight:g}",
            "numberline",
            ("objective.loss=subtb", f"policy.cot_weight={weight:g}"),
            value=weight,
        )
        for weight in WEIGHTS
    ),
    columns=(
        Column("success", "success"),
        Column("ood", "out-of-distribution success", split="ood"),
        Column("distinct", "Div@N", "div_at_n", percent=False),
    ),
    picture=Line(("success", "ood"), "weight of log P_CoT"),
    notes=("The paper uses 0.4; the figure's values are not in our notes on it.",),
)
