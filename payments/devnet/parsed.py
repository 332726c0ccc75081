"""How a node writes bytes for people: base58, token amounts, memos, and the instructions of "jsonParsed"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from solders.pubkey import Pubkey
from spl.memo.constants import MEMO_PROGRAM_ID
from spl.token.constants import ASSOCIATED_TOKEN_PROGRAM_ID, TOKEN_2022_PROGRAM_ID, TOKEN_PROGRAM_ID

from diffusionz.payments.devnet.cluster import Record

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_SYSTEM_PROGRAM_ID = Pubkey.default()
_AUTHORITIES = ("mintTokens", "freezeAccount", "accountOwner", "closeAccount")


def base58(data: bytes) -> str:
    number, text = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _ALPHABET[digit] + text
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + text


def from_base58(text: str) -> bytes:
    """Raises ValueError."""
    number = 0
    for letter in text:
        number = number * 58 + _ALPHABET.index(letter)
    return b"\0" * (len(text) - len(text.lstrip("1"))) + number.to_bytes((number.bit_length() + 7) // 8, "big")


def amount(base_units: int, decimals: int) -> dict[str, Any]:
    """A UiTokenAmount."""
    whole, part = divmod(base_units, 10**decimals)
    text = f"{whole}.{part:0{decimals}d}".rstrip("0").rstrip(".") if decimals else str(whole)
    return {
        "amount": str(base_units),
        "decimals": decimals,
        "uiAmount": base_units / 10**decimals,
        "uiAmountString": text,
    }


def memo(record: Record) -> str | None:
    """As in a listing: every memo with its length in bytes before it."""
    memos = [
        bytes(instruction.data)
        for instruction in record.transaction.message.instructions
        if record.keys[instruction.program_id_index] == MEMO_PROGRAM_ID
    ]
    return "; ".join(f"[{len(text)}] {text.decode(errors='replace')}" for text in memos) or None


@dataclass(frozen=True, slots=True)
class Instruction:
    """A compiled instruction: program and accounts are positions in the transaction's keys."""

    program: int
    accounts: list[int]
    data: bytes
    stack_height: int | None

    def compiled(self) -> dict[str, Any]:
        return {
            "programIdIndex": self.program,
            "accounts": self.accounts,
            "data": base58(self.data),
            "stackHeight": self.stack_height,
        }


def render(instruction: Instruction, keys: list[Pubkey]) -> dict[str, Any]:
    """The instruction as "jsonParsed" shows it: by name where it is one of the common ones, else half decoded."""
    program = keys[instruction.program]
    names = [str(keys[i]) for i in instruction.accounts]
    known = _known(program, instruction.data, names)
    if known is None:
        return {
            "programId": str(program),
            "accounts": names,
            "data": base58(instruction.data),
            "stackHeight": instruction.stack_height,
        }
    name, what = known
    return {"program": name, "programId": str(program), "parsed": what, "stackHeight": instruction.stack_height}


def _known(program: Pubkey, data: bytes, accounts: list[str]) -> tuple[str, Any] | None:
    if program == MEMO_PROGRAM_ID:
        return "spl-memo", data.decode(errors="replace")
    if program == ASSOCIATED_TOKEN_PROGRAM_ID and data[:1] in (b"", b"\0", b"\1") and len(accounts) >= 6:
        fields = ("source", "account", "wallet", "mint", "systemProgram", "tokenProgram")
        kind = "createIdempotent" if data[:1] == b"\1" else "create"
        return "spl-associated-token-account", {"type": kind, "info": dict(zip(fields, accounts, strict=False))}
    if program == _SYSTEM_PROGRAM_ID and data[:4] == b"\2\0\0\0" and len(data) == 12:
        lamports = int.from_bytes(data[4:], "little")
        info = {"source": accounts[0], "destination": accounts[1], "lamports": lamports}
        return "system", {"type": "transfer", "info": info}
    if program in (TOKEN_PROGRAM_ID, TOKEN_2022_PROGRAM_ID) and data:
        what = _token_instruction(data, accounts)
        return ("spl-token" if program == TOKEN_PROGRAM_ID else "spl-token-2022", what) if what else None
    return None


def _token_instruction(data: bytes, accounts: list[str]) -> dict[str, Any] | None:
    units = int.from_bytes(data[1:9], "little")
    info: dict[str, Any]
    match data[0]:
        case 3 if len(accounts) >= 3:
            info = {"source": accounts[0], "destination": accounts[1], "authority": accounts[2], "amount": str(units)}
            return {"type": "transfer", "info": info}
        case 6 if len(accounts) >= 2 and len(data) >= 3 and data[1] < len(_AUTHORITIES):
            new = str(Pubkey.from_bytes(data[3:35])) if data[2] else None
            info = {"account": accounts[0], "authority": accounts[1]}
            info |= {"authorityType": _AUTHORITIES[data[1]], "newAuthority": new}
            return {"type": "setAuthority", "info": info}
        case 7 if len(accounts) >= 3:
            info = {"mint": accounts[0], "account": accounts[1], "mintAuthority": accounts[2], "amount": str(units)}
            return {"type": "mintTo", "info": info}
        case 9 if len(accounts) >= 3:
            info = {"account": accounts[0], "destination": accounts[1], "owner": accounts[2]}
            return {"type": "closeAccount", "info": info}
        case 12 if len(accounts) >= 4 and len(data) >= 10:
            info = {"source": accounts[0], "mint": accounts[1], "destination": accounts[2], "authority": accounts[3]}
            info["tokenAmount"] = amount(units, data[9])
            return {"type": "transferChecked", "info": info}
    return None
