"""Make the virtual environments of the benchmark's peers.

    python benchmarks/peers/install.py [PEER …]

All of them without arguments. They lie in HASTEN_PEERS, by default ~/.cache/hasten-benchmarks/peers; one that is there
is brought up to its requirements file. pip reads its own settings: where torch must come from elsewhere, set
PIP_EXTRA_INDEX_URL.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv

from catalogue import EVERY, home


def main() -> int:
    names = [peer.name for peer in EVERY]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=", ".join(names))
    wanted = parser.parse_args().peers or names
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"no peer {unknown[0]!r}; there are {', '.join(names)}")
    chosen = {peer.environment: peer for peer in EVERY if peer.name in wanted}
    failed = []
    for environment, peer in chosen.items():
        folder = home() / environment
        print(f"{environment}: {folder}", flush=True)
        if not peer.python.is_file():
            venv.create(folder, with_pip=True)
        install = [str(peer.python), "-m", "pip", "install", "--quiet", "--requirement", str(peer.requirements)]
        if subprocess.run(install, check=False).returncode:
            failed.append(environment)
    if failed:
        print(f"not installed: {', '.join(failed)}; the benchmark goes on without them", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
