"""The one exception a user meets, and the line that each failure is told in."""

import errno


class UhdError(Exception):
    """A failure the user can act on. The command line prints it as one line and exits with 2."""


_DISK = {
    errno.ENOSPC: "disk full; free some space or write to another disk",
    errno.EDQUOT: "disk quota exceeded; free some space or write to another disk",
    errno.EROFS: "read-only file system; write somewhere else",
    errno.EACCES: "permission denied; check the owner and mode of the file",
    errno.EPERM: "operation not permitted; check the owner and mode of the file",
}
# What libraries say that raise an exception of their own for a failed allocation or write.
_NO_MEMORY = ("can't allocate memory", "out of memory", "bad allocation", "bad_alloc")
_NO_SPACE = "No space left on device"
# Packages that not every installation has, with the extra of ours that brings them.
_EXTRAS = {
    **dict.fromkeys(("huggingface_hub", "onnx", "onnx_ir"), "export"),
    **dict.fromkeys(("safetensors", "sentencepiece", "torch"), "export"),
    "triton": "tensorrt",
}


def explain(error: BaseException) -> str | None:
    """The line a user is told for `error`, with the remedy; None where it is a defect of the program."""
    if isinstance(error, UhdError):
        return " ".join(str(error).split())
    text = str(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        extra = _EXTRAS.get(package)
        return extra and f"this needs {package}, which is not installed: pip install 'uhd-export[{extra}]'"
    if isinstance(error, OSError) and error.errno in _DISK:
        return f"{error.filename}: {_DISK[error.errno]}" if error.filename else _DISK[error.errno]
    if _NO_SPACE in text:
        return _DISK[errno.ENOSPC]
    if isinstance(error, MemoryError) or any(words in text.lower() for words in _NO_MEMORY):
        return "not enough memory; close other programs, or use a smaller model, context or precision"
    return None
