"""The dev shop: from a faucet to a balance on one machine, with nothing to set up."""

from __future__ import annotations

import asyncio
import pathlib
import time
from decimal import Decimal

import pytest
from solders.keypair import Keypair

from diffusionz.payments import shop
from diffusionz.payments.devshop import dev_shop
from diffusionz.payments.errors import AddressError, AmountError, ChainError
from diffusionz.payments.identity import Identity
from diffusionz.payments.keeper import Keeper


def test_from_the_faucet_to_a_balance() -> None:
    async def go() -> pathlib.Path:
        async with dev_shop(domain="127.0.0.1:8123") as (settings, faucet):
            keeper = Keeper(settings, scan_interval_s=0.3)
            keeper.start()
            with shop.opened(settings) as parts:
                identity = Identity.from_settings(settings, parts.ledger)
                assert (identity.domain, identity.uri) == ("127.0.0.1:8123", "http://127.0.0.1:8123")
                parts.ledger.open_account("user:a", "user")
                address = parts.addresses.issue("user:a")
                sent = await faucet(address, tokens=Decimal("250.5"), sol=1)
                assert (sent["tokens"], sent["lamports"]) == (250_500_000, 10**9)
                assert sent["token_signature"] != sent["sol_signature"]
                began = time.monotonic()
                expected = 250_500_000 + 15_000_000_000  # a SOL of 150 USD, a token of a cent
                while parts.ledger.balance("user:a").posted != expected:
                    assert time.monotonic() - began < 120  # final after 2.5 s on an idle machine
                    await asyncio.sleep(0.1)

                wallet = str(Keypair().pubkey())  # as of a browser
                assert "sol_signature" not in await faucet(wallet, tokens=5)
                for mistake in (
                    {},
                    {"tokens": 0},
                    {"tokens": Decimal("0.0000001")},
                    {"sol": -1},
                    {"sol": Decimal("NaN")},
                ):
                    with pytest.raises(AmountError):
                        await faucet(wallet, **mistake)
                with pytest.raises(AddressError):
                    await faucet("xyz", tokens=1)
                with pytest.raises(ChainError, match="requestAirdrop"):
                    await faucet(wallet, sol=10**9)  # more than there is
            assert keeper.stop(15)
        return pathlib.Path(settings.database).parent

    assert not asyncio.run(go()).exists()


def test_a_folder_of_ones_own_is_kept_and_never_used_again(tmp_path: pathlib.Path) -> None:
    async def go() -> None:
        async with dev_shop(tmp_path / "shop") as (settings, _):
            assert settings.domain == "localhost" and settings.network == "localnet"

    asyncio.run(go())
    assert (tmp_path / "shop" / shop.CONFIG).exists()
    with pytest.raises(FileExistsError):
        asyncio.run(go())
