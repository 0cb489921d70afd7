"""Many callers on one device: tokens a second and latencies, against the same requests one after another.

`wide` is 4 layers of Vicuna-7B's width with int4 weights, where a step reads more memory than it computes: 8
callers with a prompt each, answered by 8 slots and by one slot. `nano` is the embedded model behind HTTP on
loopback: 1, 4 and 16 callers with images, against one after another, and against two processes that share
the machine. Every request is answered with the same number of tokens. The last line is one JSON object.

    python benchmarks/serve.py [--part wide] [--part nano] [--rounds 3] [--json FILE]
"""

import argparse
import base64
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS = ("wide", "nano")
LAYERS, GROUP, CONTEXT = 4, 128, 256
CALLERS, PROMPT = 8, 64
# Prompts are computed one after another either way: the longer the answer, the more of a request is decoding.
ANSWERS = (48, 128)
BATCHES, STEPS = (1, 2, 4, 8), 10
WANTED = 2.5
HTTP_CALLERS, HTTP_ANSWER = (1, 4, 16), 48


def emit_wide(folder: Path) -> None:
    """The language graph as `build` writes it of a GPTQ checkpoint, and its embeddings, in `folder`."""
    import numpy as np
    from random_checkpoint import write_checkpoint

    from uhd_export.checkpoint.config import read_config
    from uhd_export.checkpoint.int4.gptq import open_checkpoint
    from uhd_export.graph.int4.choose import linear_format, resolve
    from uhd_export.graph.int4.options import WeightOptions
    from uhd_export.graph.language import emit_language

    write_checkpoint(folder, language_layers=LAYERS, group=GROUP, vision=False)
    config, checkpoint = read_config(folder).language, open_checkpoint(folder)
    form = linear_format(checkpoint, config, resolve(checkpoint, config, WeightOptions()), "onnxruntime")
    emit_language(config, checkpoint, folder / "language.onnx", linear=form, context=CONTEXT)
    table = np.random.default_rng(0).standard_normal((config.vocab, config.hidden)).astype(np.float16)
    np.save(folder / "embeddings.npy", table)


def run_wide(folder: Path, engine: Any, slots: int, answer: int, turn: int) -> dict:
    """`CALLERS` requests of `answer` tokens on `slots` slots: seconds, and what each answer took."""
    from uhd_export.checkpoint.source import EMBEDDED
    from uhd_export.runtime.language.embeddings import EmbeddingTable
    from uhd_export.runtime.language.prompt import load_tokenizer
    from uhd_export.runtime.language.sequence import PromptSequence
    from uhd_export.runtime.serving.cache.rows import Rows
    from uhd_export.runtime.serving.images.encoded import EncodedImages
    from uhd_export.runtime.serving.images.worker import VisionWorker
    from uhd_export.runtime.serving.scheduling.request import Request
    from uhd_export.runtime.serving.scheduling.scheduler import Limits, Scheduler

    scheduler = Scheduler(
        Rows(engine, slots, CONTEXT),
        engine,
        lambda on_done: VisionWorker(None, on_done),  # no images here
        EmbeddingTable(folder / "embeddings.npy"),
        load_tokenizer(EMBEDDED / "tokenizer.json"),
        (),
        encoded=EncodedImages(0),
        limits=Limits(),
    )
    ids = [
        [3 + (7919 * (turn * CALLERS + c) + 31 * i) % 30000 for i in range(PROMPT)] for c in range(CALLERS)
    ]
    start = time.perf_counter()
    streams = [scheduler.submit(Request(PromptSequence(one, []), max_tokens=answer)) for one in ids]
    for stream in streams:
        stream.text()
    seconds = time.perf_counter() - start
    scheduler.close()
    return describe(seconds, [answer] * CALLERS, [stream.summary.total for stream in streams])


def measure_step(folder: Path, threads: int, count: int) -> dict:
    """One step of `count` rows, apart from the scheduler: seconds (median), and by operator (mean)."""
    import numpy as np

    from uhd_export.runtime.engines.backends import open_engine
    from uhd_export.runtime.serving.cache.rows import Rows

    random, seconds, warm = np.random.default_rng(0), [], 3
    with open_engine(folder / "language.onnx", threads=threads, profile=folder / f"step{count}") as engine:
        rows = Rows(engine, count, CONTEXT)
        for row in range(count):
            rows.append(row, random.standard_normal((PROMPT, rows.hidden), np.float32))
        for _ in range(warm + STEPS):
            start = time.perf_counter()
            rows.step(range(count), random.standard_normal((count, rows.hidden), np.float32))
            seconds.append(time.perf_counter() - start)
        events = json.loads(engine.end_profile().read_text(encoding="utf-8"))
    by_operator: dict[str, float] = {}
    first = sorted(event["ts"] for event in events if event["name"] == "model_run")[-STEPS]
    for event in events:
        if event.get("cat") == "Node" and event["ts"] >= first:
            operator = event["args"]["op_name"]
            by_operator[operator] = by_operator.get(operator, 0.0) + event["dur"] / 1e6 / STEPS
    return {"seconds": statistics.median(seconds[warm:]), "by_operator": by_operator}


def describe(seconds: float, tokens: list[int], latencies: list[float]) -> dict:
    """One round."""
    return {
        "seconds": seconds,
        "tokens_per_second": sum(tokens) / seconds,
        "latency_median": statistics.median(latencies),
        "latency_max": max(latencies),
    }


def measure_wide(threads: int, rounds: int) -> dict:
    """One slot and 8 on one engine, taking turns, and what a step of either takes."""
    from uhd_export.runtime.engines.backends import open_engine

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        emit_wide(folder)
        with open_engine(folder / "language.onnx", threads=threads) as engine:
            answers = {answer: compare(folder, engine, answer, rounds) for answer in ANSWERS}
        steps = {count: measure_step(folder, threads, count) for count in BATCHES}
    sizes = {"layers": LAYERS, "group": GROUP, "callers": CALLERS, "prompt": PROMPT}
    return {**sizes, "answers": answers, "steps": steps}


def compare(folder: Path, engine: Any, answer: int, rounds: int) -> dict:
    """One slot and 8, in turns."""
    alone, together = [], []
    for turn in range(rounds + 1):  # the first warms up
        alone.append(run_wide(folder, engine, 1, answer, turn))
        together.append(run_wide(folder, engine, CALLERS, answer, turn))
    alone, together = alone[1:], together[1:]
    ratios = [b["tokens_per_second"] / a["tokens_per_second"] for a, b in zip(alone, together, strict=True)]
    found = {"one_after_another": alone, "together": together}
    return {**found, "speedup": statistics.median(ratios), "speedups": ratios}


@contextlib.contextmanager
def server(bundle: Path, slots: int, threads: int) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-P", "-m", "uhd_export", "serve", bundle, "--port", 0, "--slots", slots]
    command += ["--threads", threads, "--context", 2048]
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().partition(": ")[0]
        finally:
            process.terminate()


def bodies(count: int) -> list[dict]:
    """`count` questions about the sample images, in turn."""
    questions = json.loads((ROOT / "examples" / "questions.json").read_text())
    asked = [(name, question) for name, ones in questions.items() for question in ones]
    found = []
    for number in range(count):
        name, question = asked[number % len(asked)]
        data = base64.b64encode((ROOT / "examples" / name).read_bytes()).decode()
        parts = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
            {"type": "text", "text": question},
        ]
        found.append(
            {
                "messages": [{"role": "user", "content": parts}],
                "max_tokens": HTTP_ANSWER,
                "logit_bias": {"2": -100},  # no end of text: each answer has as many tokens
            }
        )
    return found


def load(addresses: list[str], callers: int, count: int) -> dict:
    """`count` requests by `callers`, spread over the servers."""
    import httpx

    requests = list(enumerate(bodies(count)))

    def ask(request: tuple[int, dict]) -> tuple[int, float]:
        number, body = request
        start = time.perf_counter()
        url = f"{addresses[number % len(addresses)]}/v1/chat/completions"
        answer = httpx.post(url, json=body, timeout=600)
        answer.raise_for_status()
        return answer.json()["usage"]["completion_tokens"], time.perf_counter() - start

    ask(requests[0])  # warms up
    start = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        done = list(pool.map(ask, requests))
    return describe(time.perf_counter() - start, [t for t, _ in done], [s for _, s in done])


def measure_nano(threads: int, count: int) -> dict:
    """Each way on servers that have seen nothing before."""
    from uhd_export import build_bundle

    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "nano"
        build_bundle("nano", bundle, verify=False)
        found = {}
        with server(bundle, 1, threads) as one:
            found["one after another"] = load([one], 1, count)
        for callers in HTTP_CALLERS:
            with server(bundle, 8, threads) as one:
                found[f"{callers} callers"] = load([one], callers, count)
        with server(bundle, 1, 1) as one, server(bundle, 1, 1) as two:
            found["two processes"] = load([one, two], 2, count)
    return {"requests": count, "answer": HTTP_ANSWER, "slots": 8, "ways": found}


def show(part: str, result: dict) -> None:
    """What a reader wants to know first."""
    if part == "wide":
        print(
            "| tokens an answer | one after another | 8 callers | times the tokens/s |\n|---:|---:|---:|---:|"
        )
        for answer, found in result["answers"].items():
            alone, together = (
                statistics.median(one["tokens_per_second"] for one in found[name])
                for name in ("one_after_another", "together")
            )
            print(f"| {answer} | {alone:.1f} | {together:.1f} | {found['speedup']:.2f} (wanted: {WANTED}) |")
        one = result["steps"][1]["seconds"]
        print("\n| rows of a step | ms | times the tokens/s | where |\n|---:|---:|---:|---|")
        for count, step in result["steps"].items():
            most = sorted(step["by_operator"].items(), key=lambda item: -item[1])[:3]
            where = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in most)
            print(
                f"| {count} | {1e3 * step['seconds']:.1f} | {count * one / step['seconds']:.2f} | {where} |"
            )
        return
    print("\n| nano over HTTP | tokens/s | times | answer s, median | longest |\n|---|---:|---:|---:|---:|")
    alone = result["ways"]["one after another"]["tokens_per_second"]
    for name, one in result["ways"].items():
        rate, median, longest = one["tokens_per_second"], one["latency_median"], one["latency_max"]
        print(f"| {name} | {rate:.0f} | {rate / alone:.2f} | {median:.2f} | {longest:.2f} |")


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3, help="of the part wide")
    parser.add_argument("--requests", type=int, default=32, help="of each way of the part nano")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from uhd_export.runtime.profiling.machine import machine

    results: dict = {"machine": machine("cpu", options.threads)}
    for part in options.part or PARTS:
        before = os.getloadavg()[0]
        if part == "wide":
            measured = measure_wide(options.threads, options.rounds)
        else:
            measured = measure_nano(options.threads, options.requests)
        results[part] = {**measured, "load_average_before": before}
        show(part, results[part])
    text = json.dumps(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
