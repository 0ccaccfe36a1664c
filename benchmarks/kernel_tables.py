"""The table of what the CUDA kernels cost, from the records that tests/kernel_costs.py writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
HEAD = ("kernel", "types", "registers", "blocks", "KB under way", "instructions", "issue slots")


def kernel_table() -> str:
    """Returns a Markdown table, each figure beside the one that it replaced."""
    now = _load(RESULTS / "kernels_sm_90.json")
    then = _load(RESULTS / "kernels_sm_90_before.json")
    lines = [HEAD, ("---", "---", *["--:"] * (len(HEAD) - 2))]
    for (kernel, types), cost in now.items():
        # The reduce pass had no loop without the clamp, and there were no kernels for mixed types.
        old = then.get((kernel, types)) or then.get((f"{kernel}, limited", types), cost)
        figures = (
            _change(old, cost, "registers", "{:.0f}"),
            _change(old, cost, "blocks", "{:.0f}"),
            _change(old, cost, "kilobytes", "{:.0f}"),
            _change(old, cost, "instructions", "{:.1f}"),
            _change(old, cost, "issue_share", "{:.0%}"),
        )
        lines.append((kernel, types, *figures))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _load(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    kernels = json.loads(path.read_text())["kernels"]
    return {(cost["kernel"], cost["types"]): cost for cost in kernels}


def _change(old: dict[str, Any], new: dict[str, Any], name: str, form: str) -> str:
    before, after = form.format(old[name]), form.format(new[name])
    return after if before == after else f"{before} -> {after}"
