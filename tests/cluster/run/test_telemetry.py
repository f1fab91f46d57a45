from pathlib import Path

from shared.metrics import ALL_METRICS

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_every_metric_is_documented_and_named_once():
    text = DOCS.read_text()
    assert [spec.name for spec in ALL_METRICS if f"| `{spec.name}` | {spec.unit} |" not in text] == []
    assert len({spec.name for spec in ALL_METRICS}) == len(ALL_METRICS)
