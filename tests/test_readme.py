"""The README's own examples, run as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from prunelab import Plan, cost

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_prune_train_save_load_and_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    lines = [
        line for block in blocks for line in block.splitlines() if "deploy.report" not in line
    ]  # times for minutes
    assert len(lines) == sum(block.count("\n") for block in blocks) - 1
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile("\n".join(lines), str(README), "exec"), names)

    picture = torch.zeros(1, 3, 224, 224)
    half = 0.5 * cost.macs(names["net"], picture)
    assert 0.95 * half < cost.macs(names["small"], picture) <= half
    share, dense, pruned = map(float, re.findall(r"([\d.]+)%", capsys.readouterr().out))
    assert share == pytest.approx(100 * cost.macs(names["small"], picture) / (2 * half), abs=0.05)
    assert 80 < pruned < dense
    digit = names["images"].example
    assert cost.macs(names["pruned"].net, digit, "conv") <= 0.25 * cost.macs(names["trained"], digit, "conv")
    assert Plan.load("plan.json") == names["plan"]
    assert {path.name for path in tmp_path.iterdir()} >= {"plan.json", "small.safetensors", "small.onnx"}


def test_links_to_files_lead_somewhere() -> None:
    root, found = README.parent, 0
    for page in (*root.glob("*.md"), *root.glob("*/*.md"), *root.glob("notebooks/*.ipynb")):
        text = page.read_text(encoding="utf-8")
        if page.suffix == ".ipynb":
            cells = json.loads(text)["cells"]
            text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
                found += 1
    assert found > 50
