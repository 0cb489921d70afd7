"""OpenVINO and llama.cpp in benchmarks/decode.py: the same int4 model in each one's own form, and its loop.

Both are optional: see benchmarks/decode.py. The weights are those of one GPTQ checkpoint: NNCF rounds them
anew in groups of 128, Q4_0 in groups of 32.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from decode_loop import Run, loop

GGUF, OPENVINO = "model.gguf", "openvino.xml"
_BASE, _EPS = 10000.0, 1e-6
Reader = Callable[[str], np.ndarray]
_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


class LlamaCpp:
    """llama.cpp on the CPU, by its C interface: a vocabulary of numbers alone has no text to go through."""

    def __init__(self, folder: Path, weights: str, threads: int, context: int) -> None:
        import llama_cpp

        self._lib = llama_cpp
        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(silent, ctypes.c_void_p())
        self._silent = silent  # which must outlive the model
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(folder / GGUF).encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch = context, context
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._model or not self._context:
            raise RuntimeError(f"llama.cpp does not load {folder / GGUF}")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def run(self, ids: list[int], steps: int) -> Run:
        """One answer."""
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)

        def decode(tokens: list[int]) -> int:
            array = (lib.llama_token * len(tokens))(*tokens)
            if lib.llama_decode(self._context, lib.llama_batch_get_one(array, len(tokens))):
                raise RuntimeError("llama_decode failed")
            logits = lib.llama_get_logits_ith(self._context, -1)
            return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())

        return loop(lambda: decode(ids), lambda token: decode([token]), steps)


class OpenVino:
    """OpenVINO on the CPU as it is by default: its own choice of types for activations and cache."""

    def __init__(self, folder: Path, weights: str, threads: int, context: int) -> None:
        import openvino

        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._request = (
            openvino.Core().compile_model(folder / OPENVINO, "CPU", settings).create_infer_request()
        )
        self._table = np.load(folder / f"embeddings-{weights}.npy", mmap_mode="r")

    def run(self, ids: list[int], steps: int) -> Run:
        """One answer."""
        self._request.reset_state()
        done = 0

        def forward(tokens: list[int]) -> int:
            nonlocal done
            positions = np.arange(done, done + len(tokens), dtype=np.int64)[None]
            done += len(tokens)
            embeds = self._table[tokens][None].astype(np.float32)
            feeds = {"embeds": embeds, "positions": positions, "beam_idx": np.zeros(1, np.int32)}
            return int(self._request.infer(feeds)["logits"][0, -1].argmax())

        return loop(lambda: forward(ids), lambda token: forward([token]), steps)


def write_gguf(read: Reader, folder: Path, size: dict[str, int]) -> None:
    """Q4_0 with the head in Q8_0 and the embeddings in float16."""
    import gguf

    heads = size["num_attention_heads"]
    head = size["hidden_size"] // heads
    writer = gguf.GGUFWriter(folder / GGUF, "llama")
    writer.add_context_length(size["max_position_embeddings"])
    writer.add_embedding_length(size["hidden_size"])
    writer.add_feed_forward_length(size["intermediate_size"])
    writer.add_block_count(size["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(_EPS)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(_BASE)
    writer.add_vocab_size(size["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, array: np.ndarray, form: Any = None) -> None:
        if form is None:
            writer.add_tensor(f"{name}.weight", array)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(array, form), raw_dtype=form)

    add("token_embd", read("model.embed_tokens.weight").astype(np.float16))
    add("output_norm", read("model.norm.weight"))
    add("output", read("lm_head.weight"), gguf.GGMLQuantizationType.Q8_0)
    for index in range(size["num_hidden_layers"]):
        for name, theirs in _NORMS.items():
            add(f"blk.{index}.{name}", read(f"model.layers.{index}.{theirs}.weight"))
        for name, theirs in _PARTS.items():
            array = read(f"model.layers.{index}.{theirs}.weight")
            if name in ("attn_q", "attn_k"):  # its rotation pairs neighbours, not halves
                halves = array.reshape(heads, 2, head // 2, -1)
                array = halves.swapaxes(1, 2).reshape(array.shape)
            add(f"blk.{index}.{name}", array, gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_openvino(read: Reader, folder: Path, size: dict[str, int]) -> None:
    """The model in OpenVINO's operators, as its own exporters write LLaMA, in int4 through NNCF."""
    import nncf
    import openvino

    model = _openvino_model(read, size)
    mode = nncf.CompressWeightsMode.INT4_SYM
    openvino.save_model(nncf.compress_weights(model, mode=mode, group_size=128, ratio=1.0), folder / OPENVINO)


def _openvino_model(read: Reader, size: dict[str, int]) -> Any:
    """A stateful model: embeddings and positions in, logits of the last position out."""
    import openvino
    from openvino import opset15 as op

    width, heads = size["hidden_size"], size["num_attention_heads"]
    head = width // heads
    cache_shape = openvino.PartialShape([-1, heads, -1, head])
    embeds = op.parameter([-1, -1, width], np.float32, name="embeds")
    positions = op.parameter([-1, -1], np.int64, name="positions")
    beams = op.parameter([-1], np.int32, name="beam_idx")
    sinks = []

    def ints(*values: int) -> Any:
        return op.constant(np.array(values, np.int64))

    def number(value: float) -> Any:
        return op.constant(np.array(value, np.float32))

    def linear(x: Any, name: str) -> Any:
        return op.matmul(x, op.constant(read(f"{name}.weight")), False, True, name=name)

    def norm(x: Any, name: str) -> Any:
        mean = op.reduce_mean(op.power(x, number(2)), ints(-1), True)
        scaled = op.multiply(x, op.divide(number(1), op.sqrt(op.add(mean, number(_EPS)))))
        return op.multiply(op.constant(read(f"{name}.weight")), scaled)

    def split_heads(x: Any) -> Any:
        return op.transpose(op.reshape(x, ints(0, 0, heads, head), True), ints(0, 2, 1, 3))

    frequencies = _BASE ** (-np.arange(0, head, 2, dtype=np.float32) / head)
    places = op.unsqueeze(op.convert(positions, np.float32), ints(2))
    angles = op.multiply(places, op.constant(frequencies[None, None]))
    angles = op.unsqueeze(op.concat([angles, angles], -1), ints(1))
    cos, sin = op.cos(angles), op.sin(angles)

    def rotate(x: Any) -> Any:
        # By slices: so it is found to be a rotation, and runs as one.
        first = op.slice(x, ints(0), ints(head // 2), ints(1), ints(3))
        second = op.slice(x, ints(head // 2), ints(2**63 - 1), ints(1), ints(3))
        turned = op.concat([op.multiply(second, number(-1)), first], -1)
        return op.add(op.multiply(x, cos), op.multiply(turned, sin))

    def cached(x: Any, name: str) -> Any:
        batch = op.gather(op.shape_of(embeds), ints(0), ints(0))
        empty = op.broadcast(number(0), op.concat([batch, ints(heads, 0, head)], 0))
        past = op.gather(op.read_value(empty, name, np.float32, cache_shape), beams, ints(0))
        both = op.concat([past, x], 2)
        sinks.append(op.assign(both, name))
        return both

    x, mask = embeds, None
    for index in range(size["num_hidden_layers"]):
        name = f"model.layers.{index}"
        y = norm(x, f"{name}.input_layernorm")
        q, k, v = (split_heads(linear(y, f"{name}.self_attn.{part}_proj")) for part in "qkv")
        k, v = cached(rotate(k), f"{name}.key"), cached(v, f"{name}.value")
        if mask is None:
            total = op.squeeze(op.gather(op.shape_of(k), ints(2), ints(0)), ints(0))
            keys = op.range(op.constant(np.int64(0)), total, op.constant(np.int64(1)), "i64")
            seen = op.less_equal(op.unsqueeze(keys, ints(0, 1, 2)), op.unsqueeze(positions, ints(1, 3)))
            mask = op.select(seen, number(0), number(np.finfo(np.float32).min))
        y = op.scaled_dot_product_attention(rotate(q), k, v, mask, causal=False)
        y = op.reshape(op.transpose(y, ints(0, 2, 1, 3)), ints(0, 0, width), True)
        x = op.add(x, linear(y, f"{name}.self_attn.o_proj"))
        y = norm(x, f"{name}.post_attention_layernorm")
        gate = op.swish(linear(y, f"{name}.mlp.gate_proj"))
        x = op.add(x, linear(op.multiply(gate, linear(y, f"{name}.mlp.up_proj")), f"{name}.mlp.down_proj"))
    last = op.slice(x, ints(-1), ints(2**31 - 1), ints(1), ints(1))
    logits = op.result(linear(norm(last, "model.norm"), "lm_head"))
    logits.output(0).set_names({"logits"})
    parameters = [embeds, positions, beams]
    for parameter in parameters:
        parameter.output(0).set_names({parameter.get_friendly_name()})
    return openvino.Model([logits], sinks, parameters, "llama")
