"""Table 1: does the policy find more than one right continuation of a sequence?"""

from gflowvlm.studies.experiments.description import PPO, Bars, Column, Experiment, Variant

HOTTER = 1.2

MOTIVATING = Experiment(
    name="motivating",
    title="NumberSequence: success and distinct solutions of SFT, PPO and GFlowNet at two temperatures",
    source="Table 1",
    variants=(
        Variant("SFT", "numbersequence", ("objective.loss=sft",), paper={"success": 21.7, "distinct": 1.03}),
        Variant("PPO", "numbersequence", PPO, paper={"success": 50.2, "distinct": 1.13}),
        Variant(
            "GFlowNet (Var-TB)",
            "numbersequence",
            ("objective.loss=var_tb",),
            paper={"success": 76.4, "distinct": 1.60},
        ),
    ),
    columns=(
        Column("start", "success before training", before=True),
        Column("success", "success"),
        Column("distinct", "distinct solutions", "div_at_n", percent=False),
        Column("success_hotter", f"success, temperature {HOTTER:g}", temperature=HOTTER),
        Column(
            "distinct_hotter",
            f"distinct solutions, temperature {HOTTER:g}",
            "div_at_n",
            temperature=HOTTER,
            percent=False,
        ),
    ),
    picture=Bars(("success", "success_hotter", "distinct", "distinct_hotter")),
    notes=(
        "Distinct solutions are Div@N: different right answers to an instance that was solved at all. Half of the "
        "instances have two, so a perfect sampler reaches about 1.5.",
        "The paper's figures are those at temperature 1.",
    ),
)
