"""What a line of a dataset holds, and what people are told who bring something else."""

from __future__ import annotations

import json
from typing import NamedTuple

from muxtune.support.errors import SpecError, UserError

_EXPECTED = 'an object with the strings "prompt" and "completion", or "text"'


class Text(NamedTuple):
    """What a line asks a model to learn."""

    prompt: str
    """Empty for plain text, all of which is learned."""
    completion: str


def parse_line(line: bytes, where: str) -> Text:
    """Read one line.

    Args:
        line: The line without its end.
        where: File and line number, for messages.

    Raises:
        UserError: It is no example; the message says why and does not quote texts.
    """
    try:
        record = json.loads(line.decode())
        if isinstance(record, dict):
            return _text_of(record, where)
    except RecursionError as error:
        raise UserError(f"{where}: not JSON: nested too deeply") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: not JSON: {error}") from error
    raise SpecError(where, record, _EXPECTED)


def _text_of(record: dict[str, object], where: str) -> Text:
    match record:
        case {"prompt": str(prompt), "completion": str(completion)}:
            text = Text(prompt, completion)
        case {"text": str(completion)} if completion:
            text = Text("", completion)
        case _:
            raise UserError(f"{where}: {_describe(record)}: expected {_EXPECTED}{_way(record)}")
    for part in text:
        part.encode()  # ValueError for half a surrogate pair, which JSON lets pass
    return text


def _describe(record: dict[str, object]) -> str:
    """The keys of a record, or what is wrong with the values of the right ones."""
    for key in ("prompt", "completion", "text"):
        if key in record and not isinstance(record[key], str):
            return f'"{key}" is {_KINDS[type(record[key])]}'
    if record.get("text") == "":
        return '"text" is empty'
    keys = [json.dumps(key[:_SHOWN_KEY]) for key in list(record)[:_SHOWN_KEYS]]
    return f"the keys are {', '.join(keys)}" if keys else "there are no keys"


_SHOWN_KEYS, _SHOWN_KEY = 4, 30
_KINDS: dict[type, str] = {
    bool: "a truth value",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}

_ALPACA = '{prompt: (.instruction + "\\n" + (.input // "")), completion: .output}'


def _way(record: dict[str, object]) -> str:
    """The shortest way from a known kind of record to one of ours."""
    if "messages" in record or "conversations" in record:
        return ' (render chats with tokenizer.apply_chat_template(messages, tokenize=False) into "text")'
    if "instruction" in record and "output" in record:
        return f" (jq -c '{_ALPACA}' FILE)"
    return ""


_MAGIC = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
}
_UNPACK = {"gzip": "gunzip", "zstd": "unzstd", "bzip2": "bunzip2", "zip": "unzip", "xz": "unxz"}


def other_format(head: bytes, suffix: str) -> str | None:
    """What a file is, if not JSONL, as the end of "expected a JSONL file, ..." with the way to one.

    Args:
        head: First bytes of the file.
        suffix: Suffix of the file's name, in lower case.
    """
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (0 in head[:2] and head[:2].strip(b"\0")):
        return "not UTF-16 (iconv -f UTF-16 -t UTF-8 FILE writes one)"
    kind = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    if kind in _UNPACK:
        return f"not {kind} ({_UNPACK[kind]} FILE unpacks it)"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if kind is None and start not in {b"{", b"["}:
        kind = {".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet"}.get(suffix)
    if kind is not None:
        read = "csv" if kind in {"CSV", "TSV"} else kind.lower().replace("arrow", "feather")
        separator = ', sep="\\t"' if kind == "TSV" else ""
        return (
            f'not {kind} (pandas.read_{read}(FILE{separator}).to_json(OUT, orient="records", lines=True) '
            'writes one; its columns: "prompt" and "completion", or "text")'
        )
    if start == b"[":
        item = f".[] | {_ALPACA}" if b'"instruction"' in head and b'"output"' in head else ".[]"
        return f"an object a line, not an array of them (jq -c '{item}' FILE writes one)"
    if head.split(b"\n", 1)[0].strip() == b"{":
        return "each object on one line (jq -c . FILE writes one)"
    return None
