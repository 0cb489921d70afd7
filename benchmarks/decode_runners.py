"""The engines that benchmarks/decode.py compares, and their files; see decode_peers.py for two of them."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from decode_loop import Run, loop
from decode_peers import LlamaCpp, OpenVino, write_gguf, write_openvino

CHECKPOINT, GPTQ = "checkpoint", "gptq"
GROUP = 128


class Ours:
    """The emitted graph in ONNX Runtime, embedding rows from a memory-mapped table."""

    def __init__(self, folder: Path, weights: str, threads: int, context: int) -> None:
        from uhd_export.runtime.engines.backends import open_engine
        from uhd_export.runtime.language.decoder import Decoder

        self.table = np.load(folder / f"embeddings-{weights}.npy", mmap_mode="r")
        self.engine = open_engine(folder / f"{weights}.onnx", threads=threads)
        self.decoder = Decoder(self.engine, context)

    def run(self, ids: list[int], steps: int) -> Run:
        """One answer."""
        from uhd_export.runtime.language.sampling import greedy

        self.decoder.rewind(0)
        return loop(
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
            return loop(lambda: forward(ids), lambda token: forward([token]), steps)


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

        return loop(prefill, lambda _: next_token(), steps)


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


RUNNERS = {
    "uhd-export": Ours,
    "transformers": Transformers,
    "onnxruntime-genai": Genai,
    "openvino": OpenVino,
    "llama.cpp": LlamaCpp,
}
_MODULES = {
    "transformers": ("transformers",),
    "onnxruntime-genai": ("onnxruntime_genai",),
    "openvino": ("openvino", "nncf"),
    "llama.cpp": ("llama_cpp", "gguf"),
}
GENAI_PRECISION = {"float32": "fp32", "float16": "fp16", "int4": "int4"}


def missing(name: str) -> str | None:
    """The module that runner `name` needs and that is not installed."""
    return next((m for m in _MODULES.get(name, ()) if importlib.util.find_spec(m) is None), None)


def write_model(folder: Path, weights: str, size: dict[str, int]) -> None:
    """A LLaMA checkpoint with random weights, a stand-in tokenizer, and its embedding table.

    int4: a GPTQ checkpoint, of which those who cannot read it take the dequantized weights.
    """
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(**size, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    checkpoint = folder / (GPTQ if weights == "int4" else CHECKPOINT)
    if weights == "int4":
        from random_checkpoint import write_checkpoint

        layers = size["num_hidden_layers"]
        write_checkpoint(checkpoint, language_layers=layers, group=GROUP, vision=False, sizes=size)
        stated = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
        settings = json.dumps(config.to_dict() | {"quantization_config": stated})
        (checkpoint / "config.json").write_text(settings)
        table = _reader(folder)("model.embed_tokens.weight")
    elif not checkpoint.exists():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        model.save_pretrained(checkpoint)
        table = model.model.embed_tokens.weight.detach().numpy()
    else:  # of the same model in another type
        table = np.load(next(folder.glob("embeddings-float*.npy")))
    np.save(folder / f"embeddings-{weights}.npy", table)
    # genai's builder insists on one; ids are fed, so it is never used.
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size["vocab_size"])}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(checkpoint)


def _reader(folder: Path):
    """Tensors of the GPTQ checkpoint by name, dequantized, in float32."""
    import torch

    from uhd_export.checkpoint.int4.gptq import GptqCheckpoint

    checkpoint = GptqCheckpoint(folder / GPTQ)
    return lambda name: checkpoint.tensor(name, torch.float32).numpy()


def export(name: str, folder: Path, weights: str, size: dict[str, int]) -> int | None:
    """Write what runner `name` loads; of ours, the bytes of the linear weights that a step reads."""
    if name == "uhd-export":
        return _export_ours(folder, weights, size)
    if name == "onnxruntime-genai":
        _export_genai(folder, weights)
    elif name == "openvino":
        write_openvino(_reader(folder), folder, size)
    elif name == "llama.cpp":
        write_gguf(_reader(folder), folder, size)
    return None


def _export_ours(folder: Path, weights: str, size: dict[str, int]) -> int:
    """Emit our graph from the checkpoint, int4 as `build` does."""
    from uhd_export.checkpoint.int4.gptq import GptqCheckpoint
    from uhd_export.checkpoint.reader import Checkpoint
    from uhd_export.graph.int4.choose import linear_format, resolve
    from uhd_export.graph.int4.options import WeightOptions
    from uhd_export.graph.language import emit_language

    config, int4 = llama_config(size), weights == "int4"
    checkpoint = GptqCheckpoint(folder / GPTQ) if int4 else Checkpoint(folder / CHECKPOINT)
    form = linear_format(checkpoint, config, resolve(checkpoint, config, WeightOptions()), "onnxruntime")
    path = folder / f"{weights}.onnx"
    emit_language(config, checkpoint, path, dtype="float32" if int4 else weights, linear=form)
    return path.with_name(f"{path.name}.data").stat().st_size


def _export_genai(folder: Path, weights: str) -> None:
    """Run genai's model builder on the checkpoint, for int4 on the GPTQ one."""
    source = folder / (GPTQ if weights == "int4" else CHECKPOINT)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "local"]
    command += ["-i", source, "-o", folder / f"genai-{weights}", "-c", folder / "cache"]
    command += ["-p", GENAI_PRECISION[weights], "-e", "cpu"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"onnxruntime-genai's builder failed: {done.stderr.strip().splitlines()[-1]}")


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
