"""Tries cases of one kind in this process, and says after each how it went: `number outcome detail`.

An input is "taken", or "refused" in one short line; anything else is a defect.
"""

import json
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path


def main(kind, seed, start, stop, bundle):
    from fuzz.targets import KINDS
    from uhd_export.runtime.errors import explain, printable

    warnings.simplefilter("ignore")
    target = KINDS[kind][0](Path(bundle))
    for number in range(start, stop):
        print(f"{number} begun", flush=True)
        scratch = Path(tempfile.mkdtemp(prefix="uhd-fuzz-"))
        outcome, detail = "taken", ""
        try:
            target.try_one(random.Random(f"{kind} {seed} {number}"), scratch)
        except BaseException as error:
            detail = explain(error)
            outcome = "refused"
            if (
                isinstance(error, ImportError)
                or detail is None
                or "\n" in detail
                or len(detail) > 700
                or printable(detail) != detail
            ):
                outcome, detail = "traceback", "".join(traceback.format_exception(error))[-3000:]
        shutil.rmtree(scratch, ignore_errors=True)
        print(f"{number} {outcome} {json.dumps(detail)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
