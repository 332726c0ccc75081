"""What can go wrong between a node and its client. A fault wraps one JSON-RPC call: fault(call, proceed) -> result.

`proceed()` runs the call and gives its true result. A fault may skip it, change what it gave, or raise one of this
module's exceptions. Install one with `Devnet.fault(lost_reply, "sendTransaction", times=1)`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from solders.hash import Hash
from solders.signature import Signature

if TYPE_CHECKING:
    from diffusionz.payments.devnet.rpc import Rpc


class RpcError(Exception):
    """A JSON-RPC error object in the reply's body, with HTTP status 200 as nodes do."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.body = {"code": code, "message": message} | ({} if data is None else {"data": data})


class HttpError(Exception):
    """Another HTTP status than 200, from the node or a proxy before it."""

    def __init__(self, status: int) -> None:
        super().__init__(str(status))
        self.status = status


class RawReply(Exception):
    """These bytes are the whole reply."""

    def __init__(self, body: bytes) -> None:
        super().__init__("raw reply")
        self.body = body


class ConnectionLost(Exception):
    """No reply arrives."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request as the node reads it."""

    rpc: Rpc
    method: str
    params: list[Any]


Proceed = Callable[[], Any]
Fault = Callable[[Call, Proceed], Any]


@dataclass(slots=True)
class Installed:
    """A fault in place: for these methods (none: all), for so many more calls (None: until removed)."""

    fault: Fault
    methods: frozenset[str]
    left: int | None
    hits: int = field(default=0)

    def concerns(self, method: str) -> bool:
        return (not self.methods or method in self.methods) and self.left != 0

    def take(self) -> None:
        self.hits += 1
        if self.left is not None:
            self.left -= 1


# Refusals ------------------------------------------------------------------------------------------------------------


def too_many_requests(call: Call, proceed: Proceed) -> Any:
    """HTTP 429."""
    raise HttpError(429)


def too_many_requests_in_body(call: Call, proceed: Proceed) -> Any:
    """HTTP 200 and {"error": {"code": 429}}, as some providers answer."""
    raise RpcError(429, "Too many requests")


def unavailable(call: Call, proceed: Proceed) -> Any:
    """HTTP 503, of a proxy without a node."""
    raise HttpError(503)


def unhealthy(call: Call, proceed: Proceed) -> Any:
    """-32005: the node is catching up."""
    raise RpcError(-32005, "Node is behind by 120 slots", {"numSlotsBehind": 120})


def unreadable_error(call: Call, proceed: Proceed) -> Any:
    """-32002 without `data`: solders panics over it."""
    raise RpcError(-32002, "Transaction simulation failed")


def timeout(call: Call, proceed: Proceed) -> Any:
    """The request never reached the node."""
    raise ConnectionLost


def lost_reply(call: Call, proceed: Proceed) -> Any:
    """The node did it, and its reply was lost."""
    proceed()
    raise ConnectionLost


# Lies ----------------------------------------------------------------------------------------------------------------


def null(call: Call, proceed: Proceed) -> Any:
    """The result is null: the node has pruned it, or never had it."""
    return None


def garbage(call: Call, proceed: Proceed) -> Any:
    """A result of no known shape."""
    return {"unexpected": True}


def html(call: Call, proceed: Proceed) -> Any:
    """A proxy's page in the place of JSON."""
    raise RawReply(b"<html><body>upstream error</body></html>")


def cut_off(call: Call, proceed: Proceed) -> Any:
    """JSON that ends in the middle."""
    raise RawReply(b'{"jsonrpc":"2.0","id":0,"result":{"context":{"slo')


def lagging(slots: int) -> Fault:
    """A node that answers from `slots` slots ago."""

    def fault(call: Call, proceed: Proceed) -> Any:
        call.rpc.behind += slots
        try:
            return proceed()
        finally:
            call.rpc.behind -= slots

    return fault


def other_genesis(call: Call, proceed: Proceed) -> Any:
    """getGenesisHash of another cluster."""
    return str(Hash.hash(b"another cluster"))


def missing(*signatures: Signature) -> Fault:
    """A listing that lacks these signatures."""
    hidden = {str(signature) for signature in signatures}

    def fault(call: Call, proceed: Proceed) -> Any:
        return [entry for entry in proceed() if entry["signature"] not in hidden]

    return fault


def repeating(call: Call, proceed: Proceed) -> Any:
    """A listing that names everything twice."""
    return [entry for entry in proceed() for _ in range(2)]


def swapped(signature: Signature) -> Fault:
    """getTransaction answers with this other transaction, whatever was asked."""

    def fault(call: Call, proceed: Proceed) -> Any:
        call.params[0] = str(signature)
        return proceed()

    return fault


def altered(change: Callable[[Any], None]) -> Fault:
    """The true result, after `change` has had its way with it."""

    def fault(call: Call, proceed: Proceed) -> Any:
        result = copy.deepcopy(proceed())
        change(result)
        return result

    return fault
