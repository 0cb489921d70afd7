"""The engines that benchmarks/decode.py compares, each with one prompt-and-decode loop, and their files.

Every loop is greedy over the same prompt ids: `prefill` ends with the first token, then each step runs the
model on the last token and picks the next.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

CHECKPOINT, GPTQ, EMBEDDINGS = "checkpoint", "gptq", "embeddings.npy"
# Groups of the GPTQ checkpoint, and of the head, which each engine rounds by itself.
GROUP, HEAD_GROUP = 128, 32


class Run(NamedTuple):
    """Seconds of the prefill and of each decoding step, and the tokens."""

    prefill: float
    steps: list[float]
    tokens: list[int]


def _loop(prefill: Callable[[], int], step: Callable[[int], int], steps: int) -> Run:
    start = time.perf_counter()
    tokens, times = [prefill()], []
    first = time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        tokens.append(step(tokens[-1]))
        times.append(time.perf_counter() - before)
    return Run(first - start, times, tokens)


class Ours:
    """The emitted graph in ONNX Runtime, embedding rows from a memory-mapped table."""

    def __init__(self, folder: Path, weights: str, threads: int, context: int) -> None:
        from uhd_export.runtime.engines.backends import open_engine
        from uhd_export.runtime.language.decoder import Decoder

        self.table = np.load(folder / EMBEDDINGS, mmap_mode="r")
        self.engine = open_engine(folder / f"{weights}.onnx", threads=threads)
        self.decoder = Decoder(self.engine, context)

    def run(self, ids: list[int], steps: int) -> Run:
        """One answer."""
        from uhd_export.runtime.language.sampling import greedy

        self.decoder.rewind(0)
        return _loop(
            lambda: greedy(self.decoder.prefill(self.table[ids])),
            lambda token: greedy(self.decoder.step(self.table[token])),
            steps,
        )


class Transformers:
    """LlamaForCausalLM, eager (not compiled), with its KV cache and its default attention."""

    def __init__(self, folder: Path, weights: str, threads: int, context: int) -> None:
        import torch
        from transformers import LlamaForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        torch.set_num_threads(threads)
        self.model = LlamaForCausalLM.from_pretrained(folder / CHECKPOINT, dtype=getattr(torch, weights))
        self.model.eval()

    def run(self, ids: list[int], steps: int) -> Run:
        """One answer."""
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)

        def forward(tokens: list[int]) -> int:
            out = self.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            return int(out.logits[0, -1].argmax())

        with torch.inference_mode():
            return _loop(lambda: forward(ids), lambda token: forward([token]), steps)


class Genai:
    """onnxruntime-genai on what its own model builder made of the checkpoint."""

    def __init__(self, folder: Path, weights: str, threads: int, context: int) -> None:
        import onnxruntime_genai as og

        source = folder / f"genai-{weights}"
        settings = json.loads((source / "genai_config.json").read_text())
        settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        # The other loops do not stop either; id 0 is not among the first choices of random weights.
        settings["model"]["eos_token_id"] = 0
        (source / "genai_config.json").write_text(json.dumps(settings))
        self.og, self.context, self.model = og, context, og.Model(str(source))

    def run(self, ids: list[int], steps: int) -> Run:
        """One answer; the cache is allocated before the clock starts."""
        options = self.og.GeneratorParams(self.model)
        options.set_search_options(max_length=self.context, do_sample=False)
        generator = self.og.Generator(self.model, options)

        def next_token() -> int:
            generator.generate_next_token()
            return int(generator.get_next_tokens()[0])

        def prefill() -> int:
            generator.append_tokens(ids)
            return next_token()

        return _loop(prefill, lambda _: next_token(), steps)


class Bandwidth:
    """Reads an array far larger than the caches; the floor of a step is the weights at this rate."""

    def __init__(self, folder: Path, weights: str, threads: int, context: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.array = torch.ones(2**27)

    def run(self, ids: list[int], steps: int) -> float:
        """Bytes a second, the best of five."""
        times = []
        for _ in range(5):
            start = time.perf_counter()
            self.array.sum()
            times.append(time.perf_counter() - start)
        return self.array.nbytes / min(times)


RUNNERS = {"uhd-export": Ours, "transformers": Transformers, "onnxruntime-genai": Genai}
GENAI_PRECISION = {"float32": "fp32", "float16": "fp16", "int4": "int4"}


def write_model(folder: Path, size: dict[str, int]) -> None:
    """A LLaMA checkpoint with random weights, a stand-in tokenizer, and its embedding table."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=False))
    model.save_pretrained(folder / CHECKPOINT)
    np.save(folder / EMBEDDINGS, model.model.embed_tokens.weight.detach().numpy())
    # genai's builder insists on one; ids are fed, so it is never used.
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size["vocab_size"])}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(folder / CHECKPOINT)


def quantize_model(folder: Path, size: dict[str, int], tokens: int = 2048, length: int = 512) -> None:
    """A GPTQ checkpoint of the model, made by our quantizer from its own embeddings of random ids."""
    import torch

    from uhd_export.calibration.activations import Activations
    from uhd_export.calibration.gptq import Run
    from uhd_export.calibration.options import GptqOptions
    from uhd_export.calibration.sequences import Sequences
    from uhd_export.calibration.solver import library_version
    from uhd_export.calibration.work import Work
    from uhd_export.calibration.writer import quantization_config, write_checkpoint
    from uhd_export.checkpoint.reader import Checkpoint

    checkpoint, config, options = Checkpoint(folder / CHECKPOINT), llama_config(size), GptqOptions(GROUP)
    table = checkpoint.tensor("model.embed_tokens.weight", torch.float32)
    calibration, held = (
        Activations(table[torch.randint(3, size["vocab_size"], (count,))], (length,) * (count // length))
        for count in (tokens, length)
    )
    work = Work(folder / "work")
    work.prepare({}, print)
    states = Run.states_of(Sequences(calibration, held, (16,)))
    Run(checkpoint, config, options, work, states, (16,)).quantize_layers(lambda done, total: None)
    settings = json.loads((folder / CHECKPOINT / "config.json").read_text())
    settings["quantization_config"] = quantization_config(options, library_version())
    (folder / GPTQ).mkdir()
    write_checkpoint(checkpoint, settings, config, work, folder / GPTQ, lambda done, total: None)


def export_ours(folder: Path, weights: str, size: dict[str, int]) -> int:
    """Emit our graph from the checkpoint; bytes of the linear weights a step reads."""
    from uhd_export.checkpoint.int4.gptq import GptqCheckpoint
    from uhd_export.checkpoint.reader import Checkpoint
    from uhd_export.graph.int4.formats import ByName, GptqWeights, MatMulNBits, RoundedWeights
    from uhd_export.graph.language import emit_language

    checkpoint, linear, dtype = Checkpoint(folder / CHECKPOINT), None, weights
    if weights == "int4":
        checkpoint, dtype = GptqCheckpoint(folder / GPTQ), "float32"
        head = MatMulNBits(RoundedWeights(HEAD_GROUP))
        linear = ByName(MatMulNBits(GptqWeights(checkpoint)), {"lm_head": head})
    path = folder / f"{weights}.onnx"
    emit_language(llama_config(size), checkpoint, path, dtype=dtype, linear=linear)
    return path.with_name(f"{path.name}.data").stat().st_size


def export_genai(folder: Path, weights: str) -> None:
    """Run genai's model builder on the checkpoint, for int4 on the GPTQ one."""
    source = folder / (GPTQ if weights == "int4" else CHECKPOINT)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "local"]
    command += ["-i", source, "-o", folder / f"genai-{weights}", "-c", folder / "cache"]
    command += ["-p", GENAI_PRECISION[weights], "-e", "cpu"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"onnxruntime-genai's builder failed: {done.stderr.strip().splitlines()[-1]}")


def emit_wide(folder: Path) -> dict[str, float]:
    """Emit two layers of Vicuna-7B's width in float16 from tensors that exist only while they are read."""
    import torch

    from uhd_export.graph.language import emit_language
    from uhd_export.runtime.memory import peak_memory

    size = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2, "vocab_size": 32000}
    config = llama_config({**size, "num_attention_heads": 32, "max_position_embeddings": 4096})
    shapes = {"q": (4096, 4096), "gate": (11008, 4096), "down": (4096, 11008), "lm": (32000, 4096)}
    shapes |= {"k": shapes["q"], "v": shapes["q"], "o": shapes["q"], "up": shapes["gate"]}

    def read(name: str) -> torch.Tensor:
        shape = (4096,) if "norm" in name else shapes[name.split(".")[-2].split("_")[0]]
        return torch.full(shape, 0.01, dtype=torch.bfloat16)

    before, start = peak_memory(), time.perf_counter()
    path = emit_language(config, read, folder / "wide.onnx", dtype="float16")
    data = path.with_name(f"{path.name}.data")
    result = {"seconds": time.perf_counter() - start, "bytes": data.stat().st_size}
    data.unlink()
    return result | {"peak": peak_memory(), "imports": before, "largest_tensor": 32000 * 4096 * 2}


def llama_config(size: dict[str, int]):
    """A LanguageConfig of LLaMA with the given Hugging Face fields."""
    from uhd_export.runtime.config import LanguageConfig

    heads = size["num_attention_heads"]
    return LanguageConfig(
        kind="llama",
        hidden=size["hidden_size"],
        intermediate=size["intermediate_size"],
        layers=size["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_size=size["hidden_size"] // heads,
        vocab=size["vocab_size"],
        context=size["max_position_embeddings"],
        eps=1e-6,
        rope_theta=10000.0,
        tied=False,
        bos=1,
        eos=(2,),
    )
