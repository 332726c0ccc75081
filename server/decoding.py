"""From a request's bytes to a checked value of a type, or a `Problem` that names the field."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeVar, cast

import msgspec

from diffusionz.server.problems import Problem, invalid

Value = TypeVar("Value")

_AT = re.compile(r" - at `\$\.?([^`]*)`$")
_FIELD = re.compile(r"(?:missing required|contains unknown) field `([^`]+)`")


@cache
def _decoder(kind: Any) -> Any:  # a type is Hashable, which mypy says of no type[Value]
    return msgspec.json.Decoder(kind)


def decode(body: bytes, kind: type[Value]) -> Value:
    """The JSON of `body` as a `kind`. Raises Problem."""
    try:
        value: Value = _decoder(cast(Any, kind)).decode(body)
        return value
    except msgspec.ValidationError as error:
        raise _refusal(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {error}") from None


def convert(values: Mapping[str, Any], kind: type[Value]) -> Value:
    """`values`, as forms and careless clients give them ("8" for 8), as a `kind`. Raises Problem."""
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), kind) from None


@contextlib.contextmanager
def called(names: Mapping[str, str]) -> Iterator[None]:
    """For requests in another's words: a Problem that is raised in the block names the field as the request does."""
    try:
        yield
    except Problem as problem:
        problem.param = names.get(problem.param or "", problem.param)
        raise


def _refusal(text: str, kind: type) -> Problem:
    """The problem that msgspec's message says."""
    at, field = _AT.search(text), _FIELD.search(text)
    path = ".".join(part for part in (at[1] if at else "", field[1] if field else "") if part)
    return invalid(_sentence(text, path, kind), path or None)


def _sentence(text: str, path: str, kind: type) -> str:
    """msgspec's message, after the field that it is about, and with what there is when that is unknown."""
    if "unknown field" in text:
        known = "" if _AT.search(text) else ", ".join(field.encode_name for field in msgspec.structs.fields(kind))
        return f"{path} is no field" + (f"; the fields are: {known}" if known else " here")
    if "missing required field" in text:
        return f"{path} is missing"
    said = _AT.sub("", text).replace("`", "")
    if "enum value" in text and (choices := _choices(kind, path)):
        said += f"; it must be one of {choices}"
    return f"{path or 'the body'}: {said[0].lower()}{said[1:]}"


@cache
def _choices(kind: type, field: str) -> str:
    """What a field may be, when that is a list of words."""
    properties = msgspec.json.schema(kind).get("$defs", {}).get(kind.__name__, {}).get("properties", {})
    return ", ".join(map(str, properties.get(field, {}).get("enum", ())))
