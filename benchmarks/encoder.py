"""The encoder benchmark: what README and docs claim of the int8 bundle of all-MiniLM-L6-v2, measured here.

    python benchmarks/encoder.py [--quick] [--only claims|peers] [--json FILE] [--check]

Everything runs through the real command and the real loader, each measured process on its own; what is compared is
interleaved. STS-B, SST-2 and a classifier are looked for in ../shared (or $HASTEN_SHARED), the peers where
`benchmarks/peers/install.py` puts them (or in $HASTEN_PEERS).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from claims import judge_claims, measure_claims
from compare import judge_comparison, measure_comparison, peers_found, show_comparison
from measure import machine_line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and only peers that are ready at once")
    parser.add_argument("--only", choices=("claims", "peers"), help="one of the two tables")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is missed")
    options = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine_line(), "peers": peers_found(), "quick": options.quick}
    print(f"{figures['machine']}\npeers found: {', '.join(figures['peers']) or 'none'}\n", flush=True)
    goals = []
    if options.only != "peers":
        figures |= measure_claims(options.quick)
        goals += judge_claims(figures)
    if options.only != "claims":
        figures |= measure_comparison(options.quick)
        show_comparison(figures)
        goals += judge_comparison(figures)
    print()
    for goal in goals:
        print(goal)
    if options.json:
        document = figures | {"goals": [dataclasses.asdict(goal) | {"met": goal.met} for goal in goals]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    missed = [goal for goal in goals if not goal.met and not (options.quick and goal.figure is None)]
    return int(options.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
