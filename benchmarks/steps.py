"""Decoding steps of two bundles, eight of either in turns, beside what memory gives meanwhile.

Both stay open, each in a process of its own, so that a step of one and of the other are a second apart: on a
virtual machine what two cores read of memory may change by half from one minute to the next, with where its
host runs them (a third of a step's time, here). That is measured before each turn and stands beside it.
--checkout takes the second bundle's code from another version of this project. The cache holds a prompt of
1066 positions, an image of 1008x672 and a question.

    python benchmarks/steps.py BUNDLE OTHER [--checkout CHECKOUT] [--turns 40] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from uhd_export.runtime.profiling.machine import machine

PROMPT, STEPS = 1066, 8
_READ = 256 << 20  # bytes a core, far more than its caches hold


class Side:
    """A bundle's decoder in a process of its own."""

    def __init__(self, bundle: Path, checkout: Path | None) -> None:
        command = [sys.executable, "-P", __file__, "--work", str(bundle.resolve())]
        command += ["--checkout", str(checkout.resolve())] if checkout else []
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, steps: int) -> list[float]:
        """Seconds of so many steps. The first answer comes after the prompt has run."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        return json.loads(answer) if answer else sys.exit("a side ended; it says above why")

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def work(bundle: Path, checkout: Path | None) -> None:
    """What a side's process does: as many steps as each line of its input says."""
    if checkout is not None and (checkout / "runtime" / "decoder.py").is_file():  # before the house was moved
        sys.path.insert(0, str(checkout))
        Decoder = import_module("runtime.decoder").Decoder
        open_engine = import_module("runtime.engine").open_engine
    else:
        if checkout is not None:
            sys.exit(f"{checkout}: its runtime is not known here; give a checkout of d487f5b")
        from uhd_export.runtime.engines.backends import open_engine
        from uhd_export.runtime.language.decoder import Decoder
    table = np.load(bundle / "embeddings.npy", mmap_mode="r")
    embeds = np.asarray(table[[3 + (7919 * i) % (len(table) - 3) for i in range(PROMPT)]], np.float32)
    decoder = Decoder(open_engine(bundle / "language.onnx"), PROMPT + 64)
    # The way that leaves the choice of the token to the engine, where there is one.
    step = getattr(decoder, "greedy", None) or (lambda one: int(decoder.step(one[0]).argmax()))
    decoder.prefill(embeds)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            decoder.length = PROMPT
            start = time.perf_counter()
            step(embeds[-1:])
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


def bandwidth(cores: int) -> float:
    """Bytes a second that so many cores read of memory together."""
    arrays = [np.zeros(_READ // 4, np.float32) for _ in range(cores)]
    for array in arrays:
        array[:] = 1  # else all is one page of zeros
    seconds = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(3):
            start = time.perf_counter()
            list(pool.map(lambda array: np.dot(array, array), arrays))
            seconds.append(time.perf_counter() - start)
    return cores * _READ / min(seconds)


def compare(first: Path, second: Path, checkout: Path | None, turns: int) -> list[dict[str, float]]:
    """Of each turn: a step's seconds at the median of either, and bytes a second before it."""
    cores = int(machine("cpu", None)["threads"])
    sides = [Side(first, None), Side(second, checkout)]
    found = []
    try:
        for side in sides:
            side.ask(1)  # waits for the prompt
        for turn in range(turns):
            one = {"bytes_per_second": bandwidth(cores)}
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                # The first after another process ran finds the caches cold.
                one["first" if which == 0 else "second"] = statistics.median(sides[which].ask(STEPS + 1)[1:])
            found.append(one)
    finally:
        for side in sides:
            side.close()
    return found


def summary(turns: list[dict[str, float]]) -> dict[str, Any]:
    """The ratio of the second's step to the first's, and both, where memory gives less and where more.

    Either side of the middle between the least and the most that it gave, nine turns of ten counted.
    """
    parts = {}
    middle = statistics.mean(np.percentile([turn["bytes_per_second"] for turn in turns], [5, 95]))
    states = {
        "all": turns,
        "less memory bandwidth": [turn for turn in turns if turn["bytes_per_second"] <= middle],
        "more memory bandwidth": [turn for turn in turns if turn["bytes_per_second"] > middle],
    }
    for name, some in states.items():
        if not some:  # of a single turn
            continue
        ratios = [turn["second"] / turn["first"] for turn in some]
        parts[name] = {
            "ratio": statistics.median(ratios),
            "quartiles": list(np.percentile(ratios, [25, 75])),
            "turns": len(some),
        } | {field: statistics.median(turn[field] for turn in some) for field in some[0]}
    return parts


def show(parts: dict[str, Any]) -> None:
    """A line of each part of a summary."""
    for name, part in parts.items():
        low, high = part["quartiles"]
        print(
            f"{name}: {1e3 * part['second']:.1f} ms / {1e3 * part['first']:.1f} ms = {part['ratio']:.2f}x "
            f"(half of {part['turns']} turns {low:.2f} to {high:.2f}), "
            f"{part['bytes_per_second'] / 1e9:.0f} GB/s"
        )


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, nargs="*")
    parser.add_argument("--checkout", type=Path, help="of the version that the second bundle is of")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.checkout)
        return
    if len(options.bundle) != 2:
        parser.error("two bundles are compared")
    turns = compare(*options.bundle, options.checkout, options.turns)
    parts = summary(turns)
    show(parts)
    if options.json:
        facts = {"machine": machine("cpu", None), "parts": parts, "turns": turns}
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
