"""`python -m fuzz [SEED] [KIND ...]` in tests/: a longer run than CI's; counts and every defect."""

import sys
import tempfile
from pathlib import Path

from fuzz.campaign import DEFECTS, run
from fuzz.targets import KINDS
from uhd_export import build_bundle


def main(seed=1, *kinds):
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "nano"
        build_bundle("nano", bundle, verify=False)
        failed = 0
        for kind in kinds or KINDS:
            result = run(kind, int(seed), KINDS[kind][2], bundle)
            print(result, flush=True)
            for number, detail in result.defects.items():
                print(f"  {kind} {seed} {number}: {detail}", flush=True)
            failed += sum(result.counts[outcome] for outcome in DEFECTS)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
