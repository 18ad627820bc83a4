"""``python -m bench small``: what a call costs beyond its arithmetic: the layer of `cloud` on 10 nodes, 40 edges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tqdm import tqdm

from implicit_steer.cases import LARGE

from .report import table
from .steps import Candidate, operator_step, step
from .timing import interleaved, summary

CASE = replace(LARGE["cloud"], name="small", nodes=10, degree=4)
TARGETS = {  # what is called → microseconds that `cpu` should stay within
    "operator, forward, no gradients": 30,
    "operator, forward + backward": 150,
    "module, forward, no gradients": 60,
    "module, forward + backward": 400,
}
CALLS = 30  # per value


def measure(names: list[str], rounds: int, budget: float) -> list[dict[str, Any]]:
    """A record per call and backend at exact sampling: median microseconds; evaluation mode, the graph given."""
    records = []
    for what, target in tqdm(TARGETS.items(), desc="small", unit="call"):
        make = operator_step if what.startswith("operator") else step
        kind = "forward" if what.endswith("no gradients") else "train"
        runs = {name: make(CASE, Candidate(name, "auto"), kind) for name in names}
        for name, times in interleaved(runs, rounds, budget, number=CALLS).items():
            values = {"us": 1e3 * summary(times)["median_ms"], "target_us": target if name == "cpu" else None}
            records.append({"call": what, "backend": name} | values)
    return records


def text(records: list[dict[str, Any]]) -> str:
    """The table, and what misses its target."""
    names = list(dict.fromkeys(r["backend"] for r in records))
    found = {(r["call"], r["backend"]): r["us"] for r in records}
    rows = [[what, *(f"{found[what, name]:,.0f}" for name in names), f"{target}"] for what, target in TARGETS.items()]
    missed = [f"- {r['call']}: {r['us']:,.0f} µs" for r in records if r["target_us"] and r["us"] > r["target_us"]]
    return "\n".join(
        [
            f"### Overhead: {CASE.nodes} nodes, {CASE.edges} edges, the layer of `cloud`, graph given, float32\n",
            "Microseconds, medians. The module runs without batch statistics (forward: evaluation mode, norms folded "
            "in; backward: norm=None).\n",
            table(["", *names, "target for cpu"], rows),
            "\n`cpu` above its target:",
            *(missed or ["- nowhere"]),
        ]
    )
