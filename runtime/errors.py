"""The one exception a user meets, and the line that each failure is told in."""

import errno
import re

_LONGEST = 600
"""Characters of a line; of a longer one the middle is left out, since the remedy is at its end."""


class UhdError(Exception):
    """A failure the user can act on, in one line. The command line prints it and exits with 2.

    Names of files, fields and tensors are others' words: nothing in them reaches a terminal but text.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """`text` as one line of printable characters, shortened in the middle where it is very long."""
    if len(text) > 100 * _LONGEST:
        text = text[: 50 * _LONGEST] + text[-50 * _LONGEST :]
    text = printable(" ".join(text.split()))
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return text


def printable(text: str) -> str:
    """`text` with controls, what turns the direction of text, and halves of characters as escapes.

    Line ends and tabs stay. A terminal would obey the rest: `ESC ] 0 ;` sets the title of its window.
    """
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_FULL = "disk full; free some space or write to another disk"
_DISK = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "disk quota exceeded; free some space or write to another disk",
    errno.EFBIG: "file too large for this disk or for the limit (ulimit -f); write to another disk",
    errno.EROFS: "read-only file system; write somewhere else",
    errno.EACCES: "permission denied; check the owner and mode of the file",
    errno.EPERM: "operation not permitted; check the owner and mode of the file",
    errno.ENAMETOOLONG: "file name too long; use a shorter one",
}
_MEMORY = "not enough memory; close other programs, or use a smaller model, context or precision"
_THREADS = "no more threads or processes can be started; lower --threads, or raise the limit (ulimit -u, -v)"
_OPEN_FILES = "too many open files; close other programs, or raise the limit (ulimit -n)"
_TEMPORARY = "no folder for temporary files can be written; set TMPDIR to one that can"
# What libraries say that raise an exception of their own for a failed allocation, thread or write.
_NO_MEMORY = re.compile(
    "can(no|')t allocate memory|failed to allocate memory|out of memory|bad allocation|bad_alloc"
    "|failed to map segment|unable to allocate|mmap failed|os error 12"
    "|STATUS_ALLOC_FAILED|smaller than requested bytes",
    re.IGNORECASE,
)
_NO_THREADS = re.compile(
    "can't start new thread|pthread_create|resource temporarily unavailable|thread constructor failed",
    re.IGNORECASE,
)
# numpy's tofile tells, without a number, how much of an array could be written.
_NO_SPACE = re.compile(r"no space left|os error 28|\d+ requested and \d+ written", re.IGNORECASE)
_NO_TEMPORARY = re.compile("no usable temporary directory", re.IGNORECASE)
# Packages that not every installation has, with the extra of ours that brings them.
_EXTRAS = {
    **dict.fromkeys(("huggingface_hub", "onnx", "onnx_ir"), "export"),
    "onnxruntime": "cpu",
    "ray": "cluster",
    **dict.fromkeys(("fastapi", "httpcore", "prometheus_client", "sse_starlette", "uvicorn"), "serve"),
    **dict.fromkeys(("safetensors", "sentencepiece", "torch"), "export"),
    "triton": "tensorrt-rtx",
}


def explain(error: BaseException) -> str | None:
    """The line a user is told for `error`, with the remedy; None where it is a defect of the program."""
    if isinstance(error, UhdError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        extra = _EXTRAS.get(package)
        return extra and f"this needs {package}, which is not installed: pip install 'uhd-export[{extra}]'"
    return _out_of(error)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that the disk, a quota or a file's largest size is reached."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return bool(_NO_SPACE.search(str(error)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory, or room for another thread, is lacking."""
    return _out_of(error) in (_MEMORY, _THREADS)


def _out_of(error: BaseException) -> str | None:
    """What the machine lacked or forbade, with the remedy; None where it is something else."""
    text = str(error)
    if isinstance(error, OSError):
        if error.errno in _DISK:
            return f"{error.filename}: {_DISK[error.errno]}" if error.filename else _DISK[error.errno]
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return _OPEN_FILES
        if error.errno == errno.EAGAIN:
            return _THREADS
        if error.errno == errno.ENOMEM:
            return _MEMORY
        if _NO_TEMPORARY.search(text):
            return _TEMPORARY
    if is_disk_full(error):
        return _FULL
    if _NO_THREADS.search(text):
        return _THREADS
    return _MEMORY if isinstance(error, MemoryError) or _NO_MEMORY.search(text) else None
