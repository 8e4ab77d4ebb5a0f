"""Text that people wrote, in whatever encoding: UTF-8, UTF-16, cp1252, or refused by
name. Nothing is guessed that would be trained on.
"""

import codecs
import re
import unicodedata

MARKS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
AS_UTF8 = "save it as UTF-8"

_ACCENTED = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜŒ"
_SMALL = "ßàáâãäåæçèéêëìíîïñòóôõöøùúûüÿœ"
_LETTERS = _ACCENTED + _SMALL
# Dashes, quotation marks, ellipsis
_MARKS = "\u2013\u2014\u2018\u2019\u201c\u201d\u2026\u00ab\u00bb\u00a1\u00bf"
_SIGNS = "\u00a0€£¥¢©®™°§·•ºª²³½¼¾±×"
# Polish, Turkish, Russian, Chinese, Mac and DOS code pages give letters and signs at
# places where no Western text has them.
_IMPLAUSIBLE = re.compile(
    # Other characters; among them the Icelandic ones, which are Turkish far more often
    f"[^\x00-\x7f{_LETTERS}{_MARKS}{_SIGNS}]"
    f"|[{_LETTERS}]{{3}}"
    f"|[a-z{_SMALL}][{_ACCENTED}]"  # a capital inside a word
    f"|[{_ACCENTED}]{{2}}(?![A-Z])(?<![A-Z]..)"
    f"|(?<![A-Za-z])[{_SMALL}]{{2}}(?![A-Za-z])"
    f"|[{_SIGNS[1:]}][{_LETTERS}]|[{_LETTERS}][{_SIGNS[1:]}](?=[{_LETTERS}])"
    f"|[A-Za-z][{_SIGNS[1:]}][a-z{_SMALL}]"  # a sign inside a word
    "|[A-Za-z][\u201c\u201d\u00a1\u00bf][A-Za-z]"
)
_QUOTES = re.compile("(?<![0-9])[\u201c\u201d]")  # after a digit they may be inches


class UnreadableText(ValueError):
    """Text in an encoding that is not known for sure, or with characters that are no
    text; says what is wrong, without a remedy.
    """


def decode_text(data: bytes) -> tuple[str, str]:
    """(text without its byte order mark, name of its encoding).

    Without a mark it is UTF-8; else UTF-16 if every second byte is mostly NUL; else
    cp1252 if it then reads as Western text.

    Raises:
        UnreadableText: none of these.
    """
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return _strict(data[len(mark) :], encoding), encoding
    encoding = utf16_without_mark(data)
    if encoding is not None:
        return _strict(data, encoding), encoding
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError as error:
        text = as_cp1252(data)
        if text is None:
            raise UnreadableText(f"neither UTF-8 (byte {error.start}) nor surely cp1252") from None
        return text, "cp1252"


def as_cp1252(data: bytes) -> str | None:
    """Bytes that are not UTF-8, read as cp1252; None where that gives no plausible text
    of a Western language.
    """
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return None
    plain = sum(c.isascii() and c.isalpha() for c in text)
    enough = plain >= 2 * sum(c in _LETTERS for c in text) and plain >= sum(c > "\x7f" for c in text)
    paired = len(_QUOTES.findall(text)) % 2 == 0
    return text if enough and paired and not _IMPLAUSIBLE.search(text) else None


def _strict(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UnreadableText(
            f"not {encoding.upper()} throughout: {error.reason} at byte {error.start}"
        ) from None


def utf16_without_mark(data: bytes) -> str | None:
    """UTF-16 that has no mark, told by its NULs: of Western text every second byte is one."""
    pairs = len(data) // 2
    even, odd = data[0 : 2 * pairs : 2].count(0), data[1 : 2 * pairs : 2].count(0)
    if len(data) % 2 or max(even, odd) < 0.5 * pairs or min(even, odd) > 0.05 * pairs or not pairs:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def clean(text: str) -> str:
    """On one line, without byte order marks; "" if nothing of it can be seen.

    Raises:
        UnreadableText: control characters, halves of surrogate pairs, U+FFFD, or code
            points that are no characters.
    """
    text = " ".join(text.replace("\ufeff", "").split())
    for character in text if not text.isprintable() or "\ufffd" in text else ():
        if (reason := _no_text(character)) is not None:
            raise UnreadableText(reason)
    return text if any(unicodedata.category(c)[0] in "LNPS" for c in text) else ""


def _no_text(character: str) -> str | None:
    code = ord(character)
    if character == "\ufffd":
        return "holds U+FFFD, the sign that characters were lost before"
    kinds = {"Cc": "a control character", "Cs": "half of a surrogate pair"}
    kind = kinds.get(unicodedata.category(character))
    if code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF:
        kind = "no character"
    return None if kind is None else f"holds U+{code:04X}, {kind}"
