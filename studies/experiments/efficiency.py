"""Figure 3: how many environment steps does learning take?"""

from gflowvlm.studies.experiments.description import PPO, Bars, Column, Experiment, Variant

OFTEN = ("evaluation.every=5",)

EFFICIENCY = Experiment(
    name="efficiency",
    title="NumberLine: success against environment steps",
    source="Figure 3",
    variants=(
        Variant("PPO", "numberline", (*PPO, *OFTEN)),
        Variant("Var-TB", "numberline", ("objective.loss=var_tb", *OFTEN)),
        Variant("SubTB", "numberline", ("objective.loss=subtb", *OFTEN)),
        Variant("DB", "numberline", ("objective.loss=db", *OFTEN)),
    ),
    columns=(
        Column("start", "success before training", before=True),
        Column("success", "success"),
        Column("ood", "out-of-distribution success", split="ood"),
    ),
    picture=Bars(("success", "ood")),
    axis="env_steps",
    notes=("The figure is in curves.png; its values in the paper are not in our notes on it.",),
)
