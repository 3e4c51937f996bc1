"""The encoder benchmark: what README and docs claim of the int8 bundle of all-MiniLM-L6-v2, measured here.

    python benchmarks/encoder.py [--quick] [--only claims|peers|shapes|memory] [--json FILE] [--check]

Everything runs through the real command and the real loader, each measured process on its own; what is compared is
interleaved. STS-B, SST-2 and a classifier are looked for in ../shared (or $HASTEN_SHARED), the peers where
`benchmarks/peers/install.py` puts them (or in $HASTEN_PEERS).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from claims import judge_claims, measure_claims
from compare import (
    judge_comparison,
    judge_memory,
    measure_comparison,
    measure_memory,
    measure_shapes,
    peers_found,
    show_comparison,
    show_shapes,
)
from measure import Goal, arguments, finish, machine_line

Figures = dict[str, Any]

Part = tuple[Callable[[bool], Figures], Callable[[Figures], None], Callable[[Figures], list[Goal]]]


def silent(figures: Figures) -> None:
    """What was printed on the way is all there is."""


PARTS: dict[str, Part] = {
    "claims": (measure_claims, silent, judge_claims),
    "peers": (measure_comparison, show_comparison, judge_comparison),
    "shapes": (measure_shapes, show_shapes, lambda figures: []),
    "memory": (measure_memory, silent, judge_memory),
}
"""What `--only` knows: how it is measured, shown and judged."""


def main() -> int:
    parser = arguments(__doc__, "fewer rounds, and only peers that are ready at once")
    parser.add_argument("--only", choices=PARTS, action="append", help="some of the parts; repeatable")
    options = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine_line(), "peers": peers_found(), "quick": options.quick}
    print(f"{figures['machine']}\npeers found: {', '.join(figures['peers']) or 'none'}\n", flush=True)
    goals = []
    for name, (measure, show, judge) in PARTS.items():
        if not options.only or name in options.only:
            figures |= measure(options.quick)
            show(figures)
            goals += judge(figures)
    return finish(figures, goals, options)


if __name__ == "__main__":
    sys.exit(main())
