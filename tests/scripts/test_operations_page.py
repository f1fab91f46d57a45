"""The guide to what can go wrong quotes what the code says, and knows every alert."""

import ast
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "operations.md"
ALERTS = ROOT / "k8s" / "components" / "monitoring" / "alerts.yaml"


def templates() -> set[str]:
    """Every string of the code, with … for each part that is filled in when it runs."""
    found = set()
    for room in (ROOT / "gflowvlm").iterdir():
        for file in room.rglob("*.py") if room.is_dir() else ():
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                    found.add("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def quoted() -> list[str]:
    """The messages that the guide quotes: the lines of its `text` blocks."""
    blocks = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def test_every_quoted_message_is_one_of_the_code() -> None:
    known = templates()
    assert len(quoted()) > 30
    assert [message for message in quoted() if message not in known] == []


def test_every_alert_is_in_the_guide_and_every_alert_in_the_guide_exists() -> None:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["spec"]["groups"] for rule in group["rules"]]
    alerts = {rule["alert"] for rule in rules}
    assert set(re.findall(r"`(Gflowvlm\w+)`", PAGE.read_text())) == alerts
