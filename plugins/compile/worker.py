"""Compiles kernels for GPUs that are not there: a JSON request a line on stdin, a result a line on stdout.

A process of its own, because Triton cannot compile in one that imported it with TRITON_INTERPRET=1,
and because PTX without line information is asked for through the environment.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# The oldest PTX that each generation's kernels can be written in, as ten times its version: a driver compiles
# PTX up to its own version. 8.0 came with CUDA 12.0, 8.7, the first to know Blackwell's RTX, with 12.8.
PTX_VERSION = {80: 80, 86: 80, 87: 80, 89: 80, 90: 80, 120: 87}
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


def compile_kernel(request: dict) -> dict:
    """Compile one `Request`; returns PTX and what launching and reporting needs."""
    function = getattr(importlib.import_module(request["module"]), request["kernel"])
    names, types, constants = function.arg_names, request["types"], dict(request["constants"])
    signature = dict(zip(names, [POINTERS[t] for t in types] + ["i32"] * request["integers"], strict=False))
    constexprs = names[len(signature) :]
    signature |= dict.fromkeys(constexprs, "constexpr")
    if "EMULATE" in constexprs:
        constants["EMULATE"] = False
    if missing := set(constexprs) - set(constants):  # the compiler would take None for them
        raise ValueError(f"no value for {', '.join(sorted(missing))}")
    # Tensors start at multiples of 16 bytes, so that loads can be vectors.
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    capability = request["capability"]
    options = {
        "num_warps": request["warps"],
        "num_stages": request["stages"],
        "ptx_version": PTX_VERSION[capability],
    }
    if request["registers"]:
        options["maxnreg"] = request["registers"]
    compiled = triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    meta, ptx = compiled.metadata, compiled.asm["ptx"]
    if meta.global_scratch_size or meta.profile_scratch_size:
        raise RuntimeError(
            f"kernel {request['kernel']} wants a scratch buffer, which launching does not provide"
        )
    return {
        "name": meta.name,
        "ptx": ptx,
        "shared": meta.shared,
        "warps": meta.num_warps,
        "nulls": ptx.count(".param .u64 .ptr .global", 0, ptx.index(".reqntid")) - len(types),
        **resources(compiled.asm["cubin"]),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of its stack: kernels have no arrays there, only spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", log)
    if usage is None:
        raise RuntimeError("cuobjdump tells neither registers nor stack")
    return {"registers": int(usage[1]), "spilled": int(usage[2])}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(compile_kernel(json.loads(line))), flush=True)
