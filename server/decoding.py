"""From a request's bytes to a checked value of a type, or a `Problem` that names the field."""

from __future__ import annotations

import re
from functools import cache
from typing import TypeVar

import msgspec

from diffusionz.server.problems import invalid

Value = TypeVar("Value")

_AT = re.compile(r" - at `\$\.?([^`]*)`$")
_FIELD = re.compile(r"(?:missing required|contains unknown) field `([^`]+)`")


@cache
def _decoder(kind: type[Value]) -> msgspec.json.Decoder[Value]:
    return msgspec.json.Decoder(kind)


def decode(body: bytes, kind: type[Value]) -> Value:
    """The JSON of `body` as a `kind`. Raises Problem."""
    try:
        return _decoder(kind).decode(body)
    except msgspec.ValidationError as error:
        text = str(error)
        at, field = _AT.search(text), _FIELD.search(text)
        path = [part for part in (at[1] if at else "", field[1] if field else "") if part]
        raise invalid(_sentence(text, kind), param=".".join(path) or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {error}") from None


def _sentence(text: str, kind: type) -> str:
    """msgspec's message, with what there is when a field is unknown."""
    if "unknown field" in text and not _AT.search(text):
        known = ", ".join(field.encode_name for field in msgspec.structs.fields(kind))
        text += f"; the fields are: {known}"
    return text
