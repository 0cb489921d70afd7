"""A whole model of Vicuna-7B's size on this machine's CPU, as it was and as a preset makes it.

Random weights in the official format and names, the language model's as a GPTQ checkpoint in groups of 128
(5 GB). `before` is int4 weights with head, vision and cache in float32; `small` is `--preset small` with an
8-bit cache, calibrated on one small image, since there is nothing to learn of random weights. Each is built,
opened cold and profiled by the command line as a user would, one after the other and each command in a
process of its own. A profile file of each is what `uhd-export profile FILE --html PAGE` draws. Ratios are of
`uhd-export profile --compare`, which asks two bundles in turns: memory that is shared with others may become
a fifth slower within minutes. Takes 20 GB of disk (TMPDIR says where), and about 25 minutes on two cores.
--check adds the parity of the last variant, which takes minutes and reads everything.
--earlier CHECKOUT sets another version of this project beside the last variant: its own `build` makes a
bundle with int4 weights of the same checkpoint, and both versions' `profile` take turns, since neither opens
the other's bundles. The ratios are medians over turns, with the least and the greatest; decoding's is that of
`steps.py`, whose turns are a second long, with both bundles open (12 GB).

    python benchmarks/full_size.py [--layers 32] [--variant before --variant small] [--turns 3]
                                   [--earlier CHECKOUT] [--profiles FOLDER] [--check] [--json FILE]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import steps

GROUP = 128
STEP_TURNS = 60
PAIRS = "pairs.jsonl"
VARIANTS = {
    "before": ("--weights", "int4", "--lm-head", "dense", "--vision-weights", "dense"),
    "balanced": ("--preset", "balanced", "--data", PAIRS),
    "small": ("--preset", "small", "--cache", "int8", "--data", PAIRS),
}
# What `small` is to reach with 32 layers, at 1008x672: limits in bytes, and ratios of before to small.
MOST = {"peak_bytes": 5.5e9, "bundle_bytes": 4.5e9}
LEAST = {"vision": 2.0, "first_token": 1.25, "decode": 1.4}


def make_checkpoint(folder: Path, layers: int, group: int | None = GROUP) -> Path:
    """The checkpoint, with the embedded model's tokenizer, filled up to the vocabulary with unused words."""
    from random_checkpoint import VICUNA_7B, write_checkpoint

    from uhd_export.checkpoint.source import EMBEDDED

    write_checkpoint(folder, language_layers=layers, group=group)
    tokenizer = json.loads((EMBEDDED / "tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    words |= {f"unused{number}": number for number in range(len(words), VICUNA_7B["vocab_size"])}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def write_pairs(folder: Path) -> None:
    """One image of 336x336 and a question, to calibrate on."""
    from uhd_export.runtime.image.pattern import pattern

    pattern(336, 336).save(folder / "image.png")
    pair = {"image": "image.png", "question": "What is shown in this image?"}
    (folder / PAIRS).write_text(json.dumps(pair) + "\n", encoding="utf-8")


def command(*arguments: object, checkout: Path | None = None) -> dict[str, Any]:
    """Run `uhd-export`, or that of a `checkout`: seconds, its peak of memory, and what it printed."""
    print(f"uhd-export {' '.join(str(part) for part in arguments)}", file=sys.stderr)
    start = time.perf_counter()
    code = ["-P", "-m", "uhd_export"] if checkout is None else [checkout / "cli.py"]
    run = [str(part) for part in (sys.executable, *code, *arguments)]
    own = {} if checkout is None else {"PYTHONPATH": str(checkout)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(run, stdout=out, stderr=errors, env=os.environ | own, cwd=checkout)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        for stream in (out, errors):
            stream.seek(0)
        if process.returncode:
            sys.exit(f"uhd-export {arguments[0]}: {errors.read().strip()}")
        return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024, "printed": out.read()}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each variant built and profiled, with the same checkpoint and images."""
    start = time.perf_counter()
    checkpoint = make_checkpoint(folder / "checkpoint", options.layers)
    written, variants = time.perf_counter() - start, {}
    write_pairs(folder)
    bundles = {name: folder / name for name in options.variant}
    for name, bundle in bundles.items():
        chosen = [folder / part if part == PAIRS else part for part in VARIANTS[name]]
        build = command("build", checkpoint, "-o", bundle, "--no-verify", *chosen)
        files = {path.name: path.stat().st_size for path in sorted(bundle.iterdir())}
        variants[name] = {
            "arguments": " ".join(VARIANTS[name]),
            "build_seconds": build["seconds"],
            "build_peak_bytes": build["peak_bytes"],
            "files": files,
            "bundle_bytes": sum(files.values()),
        }
    earlier = folder / "earlier"
    if options.earlier:
        asked = ("--weights", "int4", "--no-verify")
        command("build", checkpoint, "-o", earlier, *asked, checkout=options.earlier)
    shutil.rmtree(checkpoint)  # room for files in the system's cache
    for name, bundle in bundles.items():
        facts = profile(bundle, options) | {"bundle": name}  # its folder is gone afterwards
        variants[name] |= {**figures(facts), "profile": facts}
    check = command("check", bundle) if options.check else None
    pairs = {name: in_turns(bundles["before"], bundles[name], options) for name in others(bundles)}
    return {
        "layers": options.layers,
        "group": GROUP,
        "size": options.size,
        "machine": facts["machine"],
        "checkpoint_seconds": written,
        "variants": variants,
        "ratios": pairs,
        "earlier": beside(options, earlier, bundle) if options.earlier else None,
        "check": check and {"seconds": check["seconds"], "lines": check["printed"].splitlines()},
    }


def profile(bundle: Path, options: argparse.Namespace, checkout: Path | None = None) -> dict[str, Any]:
    """What `uhd-export profile` says of one grid mode."""
    asked = ("--size", options.size, "--grid", "selective", "--repeats", options.repeats)
    run = command("profile", bundle, *asked, "--tokens", options.tokens, "--json", checkout=checkout)
    return json.loads(run["printed"])


def beside(options: argparse.Namespace, earlier: Path, bundle: Path) -> dict[str, Any]:
    """The bundles of an earlier version and of this one, profiled in turns: figures and ratios."""
    git = ["git", "-C", str(options.earlier), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    turns = [
        {
            "earlier": figures(profile(earlier, options, options.earlier)),
            "now": figures(profile(bundle, options)),
        }
        for _ in range(options.turns)
    ]
    ratios = {}
    for stage in ("vision", "prefill", "decode", "first_token"):
        found = [turn["earlier"]["seconds"][stage] / turn["now"]["seconds"][stage] for turn in turns]
        ratios[stage] = {"times": statistics.median(found), "interval": [min(found), max(found)]}
    size = sum(path.stat().st_size for path in earlier.iterdir())
    decoding = steps.summary(steps.compare(bundle, earlier, options.earlier, STEP_TURNS))
    return {"commit": commit, "bundle_bytes": size, "turns": turns, "ratios": ratios, "steps": decoding}


def figures(facts: dict[str, Any]) -> dict[str, Any]:
    """What is compared, of a profile with one grid mode; seconds at the median, the peak of a cold answer."""
    (mode,) = facts["modes"]
    seconds = {name: stage["seconds"]["median"] for name, stage in mode["stages"].items()}
    cold = mode.get("cold")  # which earlier versions did not take
    return {
        "seconds": seconds | {"first_token": mode["first_token"]["median"]},
        "tokens_per_second": mode["tokens_per_second"],
        "peak_bytes": mode["peak_bytes"],
        "open_seconds": cold and cold["open_seconds"],
        "cold_first_token_seconds": cold and cold["first_token_seconds"],
        "busy_with_others": facts.get("others"),
    }


def others(bundles: dict[str, Path]) -> list[str]:
    """The variants that `before` is compared with."""
    return [name for name in bundles if name != "before"] if "before" in bundles else []


def in_turns(before: Path, other: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By stage, how many times as fast as `before` the other is, and the interval of that; asked in turns."""
    asked = ("--size", options.size, "--grid", "selective", "--repeats", options.turns)
    run = command("profile", "--compare", before, other, *asked, "--tokens", options.tokens, "--json")
    return {
        one["stage"]: {
            "times": 1 / one["ratio"],
            "interval": one["interval"] and [1 / end for end in reversed(one["interval"])],
        }
        for one in json.loads(run["printed"])["ratios"]
        if one["stage"] != "pixels"
    }


COLUMNS = (
    ("build s", lambda one: f"{one['build_seconds']:.0f}"),
    ("bundle GB", lambda one: f"{one['bundle_bytes'] / 1e9:.2f}"),
    ("peak GB", lambda one: "-" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 1e9:.2f}"),
    ("open s", lambda one: "-" if one["open_seconds"] is None else f"{one['open_seconds']:.1f}"),
    ("vision s", lambda one: f"{one['seconds']['vision']:.2f}"),
    ("prefill s", lambda one: f"{one['seconds']['prefill']:.1f}"),
    ("first token s", lambda one: f"{one['seconds']['first_token']:.1f}"),
    ("step ms", lambda one: f"{1e3 * one['seconds']['decode']:.0f}"),
    ("tokens/s", lambda one: f"{one['tokens_per_second']:.2f}"),
)


def show(result: dict[str, Any]) -> None:
    """Rows of Markdown, and what was to be reached."""
    machine = result["machine"]
    print(f"\n{result['layers']} layers of Vicuna-7B's width, an image of {result['size']}, ", end="")
    print(f"{machine['processor']}, {machine['threads']} threads")
    print(f"(the checkpoint was written in {result['checkpoint_seconds']:.0f} s)\n")
    print("| variant | " + " | ".join(title for title, _ in COLUMNS) + " |")
    print("|---|" + "---:|" * len(COLUMNS))
    for name, one in result["variants"].items():
        print(f"| {name} | " + " | ".join(cell(one) for _, cell in COLUMNS) + " |")
    for name, found in result["ratios"].items():
        text = ", ".join(f"{stage} {ratio['times']:.2f}x" for stage, ratio in found.items())
        print(f"\n{name}, times as fast as before, in turns: {text}")
    if result["earlier"]:
        show_earlier(result["earlier"])
    for target, reached in targets(result).items():
        print(f"- {target}: {reached}")
    for name, one in result["variants"].items():
        for warning in one["profile"]["warnings"]:
            print(f"{name}: {warning}")
    if result["check"]:
        print("\n".join(result["check"]["lines"]))


def show_earlier(earlier: dict[str, Any]) -> None:
    """The two versions' medians over turns, and the ratios of each turn."""
    print(
        f"\nBeside commit {earlier['commit'][:7]}, whose bundle has {earlier['bundle_bytes'] / 1e9:.2f} GB:"
    )
    for side in ("earlier", "now"):
        taken = [turn[side] for turn in earlier["turns"]]
        stages = ", ".join(
            f"{stage} {statistics.median(one['seconds'][stage] for one in taken):.3g} s"
            for stage in earlier["ratios"]
        )
        print(f"- {side}: {stages}; peak {max(one['peak_bytes'] or 0 for one in taken) / 1e9:.2f} GB")
    for stage, ratio in earlier["ratios"].items():
        least, most = ratio["interval"]
        print(f"- {stage}: {ratio['times']:.2f}x ({least:.2f} to {most:.2f})")
    print("A step of decoding, eight of either in turns:")
    steps.show(earlier["steps"])


def targets(result: dict[str, Any]) -> dict[str, str]:
    """What `small` is to reach, and whether it does; empty for a cut or without both variants."""
    small = result["variants"].get("small")
    whole = (result["layers"], result["size"]) == (32, "1008x672")
    ratios = result["earlier"]["ratios"] if result["earlier"] else result["ratios"].get("small")
    if not whole or small is None or ratios is None:
        return {}
    found = {}
    for field, most in MOST.items():
        value = small[field]
        reached = "not taken" if value is None else f"{value / 1e9:.2f} ({'yes' if value <= most else 'NO'})"
        found[f"{field} at most {most / 1e9:.1f} GB"] = reached
    for stage, least in LEAST.items():
        in_steps = stage == "decode" and result["earlier"]
        ratio = result["earlier"]["steps"]["all"]["ratio"] if in_steps else ratios[stage]["times"]
        found[f"{stage} at least {least:g}x"] = f"{ratio:.2f}x ({'yes' if ratio >= least else 'NO'})"
    return found


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32, help="of the language model; 32 is Vicuna-7B")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="default: before and small")
    parser.add_argument("--size", default="1008x672", help="of the image")
    parser.add_argument("--repeats", type=int, default=2, help="of an answer, after warming up")
    parser.add_argument("--turns", type=int, default=3, help="of the comparison")
    parser.add_argument("--tokens", type=int, default=16, help="decoded in each answer")
    parser.add_argument("--earlier", type=Path, metavar="CHECKOUT", help="of an earlier version, beside it")
    parser.add_argument("--profiles", type=Path, help="folder for a profile file of each variant")
    parser.add_argument("--check", action="store_true", help="parity of the last variant too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.variant = options.variant or ["before", "small"]
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    show(result)
    if options.profiles:
        options.profiles.mkdir(parents=True, exist_ok=True)
        for name, one in result["variants"].items():
            path = options.profiles / f"full-size-{name}.json"
            path.write_text(json.dumps(one["profile"], indent=1) + "\n", encoding="utf-8")
    if options.json:
        for one in result["variants"].values():
            one["warnings"] = one.pop("profile")["warnings"]  # all of it is what --profiles writes
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
