"""Pictures of what was measured (needs matplotlib, the `plots` extra)."""

from __future__ import annotations

import matplotlib as mpl

from hotstart.api.comparing import Comparison

mpl.use("Agg")
from matplotlib import pyplot as plt  # the backend has to be chosen first

_COLD, _PLAIN, _OURS = "#9aa5b1", "#d98c3f", "#2a7f62"


def draw_comparison(m: Comparison, path: str) -> None:
    """Draw time to first answer, the stages of a restore, and memory of replicas."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.4), width_ratios=(1, 1.25, 1))
    bars = [
        ("cold start\n(caches warm)", m.cold_start_s, _COLD),
        ("plain criu\nrestore", m.plain_restore.first_answer_s, _PLAIN),
        ("hotstart\nrestore", m.hotstart_restore.first_answer_s, _OURS),
    ]
    drawn = left.bar([b[0] for b in bars], [b[1] for b in bars], color=[b[2] for b in bars])
    left.set_yscale("log")
    left.bar_label(drawn, [f"{b[1]:.2f} s" if b[1] >= 1 else f"{b[1] * 1000:.0f} ms" for b in bars])
    left.set_title(f"{m.engine}: first correct answer (log scale)")
    left.set_ylabel("seconds")
    at = 0.0
    stages = [(name, took) for name, took in m.hotstart_restore.stages.items() if took > 0]
    for row, (_, took) in enumerate(stages):
        middle.barh(row, took * 1000, left=at * 1000, color=_OURS)
        middle.text((at + took) * 1000, row, f" {took * 1000:.1f}", va="center", fontsize=8)
        at += took
    middle.set_yticks(range(len(stages)), [name for name, _ in stages])
    middle.invert_yaxis()
    middle.set_xlim(0, at * 1000 * 1.15)
    middle.set_title("stages of a hotstart restore")
    middle.set_xlabel("milliseconds since it was asked for")
    own = [r.own_bytes / 2**20 for r in m.replicas]
    shared = max(0.0, sum(r.pss_bytes for r in m.replicas) / 2**20 - sum(own))
    right.bar(["plain, each"], [m.plain_restore.pss_bytes / 2**20], color=_PLAIN)
    right.bar([f"hotstart, {len(own)} together"], [shared], color=_OURS, alpha=0.45, label="shared, once")
    right.bar([f"hotstart, {len(own)} together"], [sum(own)], bottom=[shared], color=_OURS, label="their own")
    right.set_title("memory")
    right.set_ylabel("MiB")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
