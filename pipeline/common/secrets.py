"""Passwords and signatures of URLs on the command line: taken out before anything else sees them.

``conceal_arguments`` puts a placeholder into ``sys.argv`` for whatever may be a secret, however the URL is mistyped;
every message, log, configuration and traceback is made of the placeholder. ``reveal`` gives the original back, for Url
alone. Libraries that got a whole URL may still print it in an error, so tracebacks are scrubbed as well.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterable
from types import TracebackType

_SCHEMES = "s3a?|gs|gcs|hf|https?|ftps?|sftp|ssh|abfss?|az|adl|wasbs?|webhdfs|oci|ossx?|dav|github|smb"
# Anything and a colon with slashes, or a known scheme and a colon alone: also in capitals, and chained by ::
_URL = re.compile(
    rf"(?:[A-Za-z][A-Za-z0-9+.-]*\s*:\s*/[/\s]*|\b(?:{_SCHEMES})\s*:\s*)(?P<rest>\S.*)", re.IGNORECASE | re.DOTALL
)
_PLACEHOLDER = re.compile(r"\*\*\*(?:\d+\*)?")
_concealed: dict[str, str] = {}  # placeholder -> what stood there
_words: set[str] = set()  # parts of it that must not be printed
# Of a disk: closing a file raises them without its name
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def conceal(word: str) -> str:
    """``word`` with the user and password, and the query, of a URL in it replaced by placeholders."""
    match = _URL.search(word)
    if match is None:
        return word
    start, rest = match.start("rest"), match["rest"]
    rest, question, query = rest.partition("?")
    netloc = re.split(r"[/\\]", rest, maxsplit=1)[0]
    # A password may hold a slash that should have been written %2F: then the first @ comes later. What is hidden too
    # much, as of a path with an @, is only not shown.
    at = netloc.rfind("@") if "@" in netloc else rest.rfind("@")
    if at >= 0:
        rest = _placeholder(rest[:at]) + conceal(rest[at:])
    else:
        rest = conceal(rest)
    return word[:start] + rest + question + (_placeholder(query) if query else "")


def _placeholder(secret: str) -> str:
    for known, text in _concealed.items():
        if text == secret:
            return known
    made = f"***{len(_concealed) + 1}*"
    _concealed[made] = secret
    parts = {secret, *re.split(r"[:/@&=?]", secret)}
    _words.update(part for part in parts if len(part) >= 4)  # shorter ones are parts of ordinary words
    return made


def reveal(text: str) -> str:
    """``text`` with its placeholders replaced by what they stand for."""
    return _PLACEHOLDER.sub(lambda match: _concealed.get(match[0], match[0]), text)


def scrub(text: str) -> str:
    """``text`` without any part of what was concealed."""
    for word in sorted(_words, key=len, reverse=True):
        text = text.replace(word, "***")
    return text


def conceal_variables(names: Iterable[str]) -> None:
    """Let ``scrub`` hide the values of environment variables: keys as a whole, of URLs what ``conceal`` takes out."""
    for name in names:
        value = os.environ.get(name, "")
        if _URL.search(value) is not None:
            conceal(value)
        elif len(value) >= 4:
            _words.add(value)


def conceal_arguments() -> None:
    """Take the secrets out of ``sys.argv``, and keep them out of tracebacks, also those of threads."""
    sys.argv[1:] = map(conceal, sys.argv[1:])
    sys.excepthook = _print_scrubbed
    threading.excepthook = _print_from_thread


def _print_from_thread(args: threading.ExceptHookArgs) -> None:
    """An error of a file in one line: TensorBoard's thread raises it, and its next call in the main thread again."""
    error = args.exc_value
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _FULL):
        print(f"error: {scrub(str(error))}", file=sys.stderr, flush=True)
    else:
        _print_scrubbed(args.exc_type, args.exc_value, args.exc_traceback)


def _print_scrubbed(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    print(scrub(text), end="", file=sys.stderr, flush=True)
