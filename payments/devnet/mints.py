"""Token-2022's extensions of a mint: the instructions that set them up before the mint is initialized.

Source: spl-token-2022 10, instruction.rs and extension/*/instruction.rs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey
from spl.token.constants import TOKEN_2022_PROGRAM_ID

from diffusionz.payments import tokens

_NOBODY = bytes(32)


@dataclass(frozen=True, slots=True)
class Extension:
    """One extension: its name in tokens.EXTENSIONS, its value's length in bytes, and its set-up instruction."""

    name: str
    length: int
    data: bytes

    def instruction(self, mint: Pubkey) -> Instruction:
        return Instruction(TOKEN_2022_PROGRAM_ID, self.data, [AccountMeta(mint, False, True)])


def size(extensions: Sequence[Extension]) -> int:
    """How many bytes the mint's account has."""
    if not extensions:
        return tokens.MINT_SIZE
    return tokens.ACCOUNT_SIZE + 1 + sum(4 + extension.length for extension in extensions)


def transfer_fee(basis_points: int, maximum: int, authority: Pubkey | None = None) -> Extension:
    """Every transfer withholds basis_points / 10,000 of the amount, rounded up, at most `maximum` base units."""
    who = _option(authority)
    fee = basis_points.to_bytes(2, "little") + maximum.to_bytes(8, "little")
    return Extension("transfer_fee_config", 108, b"\x1a\0" + who + who + fee)


def close_authority(authority: Pubkey) -> Extension:
    return Extension("mint_close_authority", 32, b"\x19" + _option(authority))


def default_frozen() -> Extension:
    """New token accounts are frozen. The mint needs a freeze authority."""
    return Extension("default_account_state", 1, b"\x1c\0\2")


def non_transferable() -> Extension:
    return Extension("non_transferable", 0, b"\x20")


def interest_bearing(rate_basis_points: int, authority: Pubkey) -> Extension:
    data = b"\x21\0" + bytes(authority) + rate_basis_points.to_bytes(2, "little", signed=True)
    return Extension("interest_bearing_config", 52, data)


def permanent_delegate(delegate: Pubkey) -> Extension:
    """The delegate may move or burn anybody's tokens."""
    return Extension("permanent_delegate", 32, b"\x23" + bytes(delegate))


def transfer_hook(program: Pubkey, authority: Pubkey | None = None) -> Extension:
    """Every transfer calls the program."""
    return Extension("transfer_hook", 64, b"\x24\0" + (bytes(authority) if authority else _NOBODY) + bytes(program))


def metadata_pointer(address: Pubkey, authority: Pubkey | None = None) -> Extension:
    data = b"\x27\0" + (bytes(authority) if authority else _NOBODY) + bytes(address)
    return Extension("metadata_pointer", 64, data)


def pausable(authority: Pubkey) -> Extension:
    """The authority may stop all transfers."""
    return Extension("pausable", 33, b"\x2c\0" + bytes(authority))


def _option(authority: Pubkey | None) -> bytes:
    return b"\0" if authority is None else b"\1" + bytes(authority)
