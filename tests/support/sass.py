"""Machine code of the kernels: PTX assembled as the driver does, and the instructions of its loops."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

_LABEL = re.compile(r"(\.L\w+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<text>\S.*?)\s*;")
_BRANCH = re.compile(r"BRA\b.*`\((\.L\w+)\)")
TENSOR = ("HMMA", "HGMMA")


@dataclass(frozen=True)
class Loop:
    """A loop's instructions by opcode, those of the loops inside it included once."""

    first: int
    last: int
    opcodes: Counter

    def __len__(self) -> int:
        return self.last - self.first + 1

    @property
    def products(self) -> int:
        """Tensor-core instructions."""
        return sum(self.opcodes[name] for name in TENSOR)


def assemble(ptx: str, folder: Path, ptxas: str | None = None) -> tuple[Path, str]:
    """The cubin of `ptx`, and what ptxas (default: the one in Triton) said of registers and spills."""
    target = re.search(r"\.target (sm_\w+)", ptx)[1]
    tool = knobs.nvidia.ptxas_blackwell if int(re.search(r"\d+", target)[0]) >= 100 else knobs.nvidia.ptxas
    source, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx)
    command = [ptxas or tool.path, "-v", f"--gpu-name={target}", source, "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cubin, done.stderr


def loops(cubin: Path) -> list[Loop]:
    """Every loop of the kernel that does something, in order of its end."""
    command = [knobs.nvidia.nvdisasm.path, "-c", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction["text"])
    found = []
    for last, instruction in enumerate(instructions):
        branch = _BRANCH.match(instruction)
        first = labels.get(branch[1], last) if branch else last
        if first < last:
            opcodes = Counter(re.split(r"[.\s]", text)[0] for text in instructions[first : last + 1])
            found.append(Loop(first, last, opcodes))
    return found


def innermost(loops: list[Loop], wanted: tuple[str, ...]) -> Loop:
    """The shortest of the loops that execute the most of `wanted`."""
    inner = [a for a in loops if not any(a.first <= b.first and b.last <= a.last and a != b for b in loops)]
    of = inner if any(loop.opcodes[name] for loop in inner for name in wanted) else loops
    return max(of, key=lambda loop: (sum(loop.opcodes[name] for name in wanted), -len(loop)))
