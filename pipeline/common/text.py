"""Show text from files on a terminal: names of images, members, classes."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with control characters, bytes that are not UTF-8 and bidirectional marks written as escapes.

    Line breaks stay. Printed as it is, such text could move the cursor, change colours or end the program with a
    UnicodeEncodeError.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
