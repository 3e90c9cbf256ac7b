"""Remove text and colour profiles from a PNG before it is decoded.

PIL refuses a PNG whose compressed text grows beyond 1 MB (``MAX_TEXT_CHUNK``), although the text has no influence on
the pixels; libpng, and with it DALI, skips such text. Sharding and the torchvision back end both decode what
``without_text`` returns.
"""

from __future__ import annotations

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_REMOVED = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})


def without_text(data: bytes) -> bytes:
    """``data`` without the text and profile chunks of a PNG; any other bytes unchanged, and not copied."""
    if not data.startswith(_SIGNATURE):
        return data
    kept, start, at = [], 0, len(_SIGNATURE)
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if end > len(data) or kind == b"IEND":
            break
        if kind in _REMOVED:
            kept.append(data[start:at])
            start = end
        at = end
    return b"".join([*kept, data[start:]]) if kept else data
