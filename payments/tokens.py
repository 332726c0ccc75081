"""The accounts of SPL-Token and Token-2022, as their programs lay them out in bytes.

Source: the programs' own state modules (spl-token 8, spl-token-2022 10): a token account is 165 bytes, a mint 82; with
Token-2022 a mint is padded to 165, byte 165 says which of the two it is, and extensions follow as (type u16, length
u16, value), all little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass

from solders.pubkey import Pubkey
from spl.token.constants import TOKEN_2022_PROGRAM_ID, TOKEN_PROGRAM_ID

PROGRAMS = (TOKEN_PROGRAM_ID, TOKEN_2022_PROGRAM_ID)

# The wrapped SOL's mint of SPL-Token.
NATIVE_MINT = Pubkey.from_string("So11111111111111111111111111111111111111112")

ACCOUNT_SIZE = 165
MINT_SIZE = 82
_KIND_OFFSET = 165
_KIND_MINT, _KIND_ACCOUNT = 1, 2

# Token-2022's ExtensionType, in its order.
EXTENSIONS = (
    "uninitialized", "transfer_fee_config", "transfer_fee_amount", "mint_close_authority", "confidential_transfer_mint",
    "confidential_transfer_account", "default_account_state", "immutable_owner", "memo_transfer", "non_transferable",
    "interest_bearing_config", "cpi_guard", "permanent_delegate", "non_transferable_account", "transfer_hook",
    "transfer_hook_account", "confidential_transfer_fee_config", "confidential_transfer_fee_amount", "metadata_pointer",
    "token_metadata", "group_pointer", "token_group", "group_member_pointer", "token_group_member",
    "confidential_mint_burn", "scaled_ui_amount", "pausable", "pausable_account", "permissioned_burn",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TokenAccount:
    """What a token account says. `amount` is in base units; `owner` is the wallet, `program` the token program."""

    program: Pubkey
    mint: Pubkey
    owner: Pubkey
    amount: int
    frozen: bool
    extensions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Mint:
    """What a mint says. `supply` is in base units; `extensions` are Token-2022's, by name, as in EXTENSIONS."""

    program: Pubkey
    decimals: int
    supply: int
    mint_authority: Pubkey | None
    freeze_authority: Pubkey | None
    extensions: tuple[str, ...] = ()


def parse_account(program: Pubkey, data: bytes) -> TokenAccount | None:
    """The token account in `data`, which `program` owns; None if it holds something else, or nothing yet."""
    if not _is(program, data, ACCOUNT_SIZE, _KIND_ACCOUNT) or data[108] not in (1, 2):
        return None
    return TokenAccount(
        program=program,
        mint=Pubkey.from_bytes(data[:32]),
        owner=Pubkey.from_bytes(data[32:64]),
        amount=int.from_bytes(data[64:72], "little"),
        frozen=data[108] == 2,
        extensions=_extensions(data),
    )


def parse_mint(program: Pubkey, data: bytes) -> Mint | None:
    """The mint in `data`, which `program` owns; None if it holds something else, or nothing yet."""
    if not _is(program, data, MINT_SIZE, _KIND_MINT) or data[45] != 1:
        return None
    return Mint(
        program=program,
        decimals=data[44],
        supply=int.from_bytes(data[36:44], "little"),
        mint_authority=_optional(data[:36]),
        freeze_authority=_optional(data[46:82]),
        extensions=_extensions(data),
    )


def _is(program: Pubkey, data: bytes, size: int, kind: int) -> bool:
    if program not in PROGRAMS:
        return False
    return len(data) == size or (program == TOKEN_2022_PROGRAM_ID and len(data) > _KIND_OFFSET
                                 and data[_KIND_OFFSET] == kind)  # fmt: skip


def _optional(field: bytes) -> Pubkey | None:
    """Of a COption<Pubkey>: a u32 flag and 32 bytes."""
    return Pubkey.from_bytes(field[4:36]) if field[:4] == b"\1\0\0\0" else None


def _extensions(data: bytes) -> tuple[str, ...]:
    names, at = [], _KIND_OFFSET + 1
    while at + 4 <= len(data):
        number, length = int.from_bytes(data[at : at + 2], "little"), int.from_bytes(data[at + 2 : at + 4], "little")
        if number == 0:
            break
        names.append(EXTENSIONS[number] if number < len(EXTENSIONS) else f"extension_{number}")
        at += 4 + length
    return tuple(names)
