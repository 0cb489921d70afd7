"""Images that are their own address: data URIs."""

import base64
import binascii
import re

from uhd_export.runtime.errors import UhdError

_HEAD = re.compile(r"data:(image/[\w.+-]+)?(;[\w=.+-]+)*;base64,", re.IGNORECASE)


def data_uri(uri: str, max_bytes: int, name: str = "image") -> bytes:
    """The bytes in `data:image/png;base64,...`. Raises UhdError where it is none or too large."""
    head = _HEAD.match(uri[:256])
    if not head:
        raise UhdError(f"{name}: a data URI must read data:image/png;base64,... with an image's type")
    text = "".join(uri[head.end() :].split())  # `base64 FILE` breaks lines
    if len(text) * 3 // 4 > max_bytes:
        raise UhdError(f"{name}: more than {max_bytes / 2**20:g} MiB; send it smaller")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UhdError(f"{name}: the data URI is not base64") from None
