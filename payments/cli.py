"""`diffusionz wallet`: the operator's side of prepaid credit. What a command needs is imported when it runs.

Exit status and errors are those of `diffusionz`: 0 done, 1 it failed, 2 wrong use; one line on stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from diffusionz._errors import ArgumentError, DiffusionzError

if TYPE_CHECKING:
    from solders.keypair import Keypair

    from diffusionz.payments.addresses import Addresses, Seed
    from diffusionz.payments.keys import Key
    from diffusionz.payments.settings import Settings
    from diffusionz.payments.shop import Shop

EXTRA = "pip install 'diffusionz[payments]'"
# The packages of the extra, as they are imported.
PACKAGES = {"aiosmtplib", "cryptography", "httpx2", "pysqlite3", "solana", "solders", "spl", "sqlite_utils", "uvicorn"}

CONFIG = "payments.toml"
DEVNET_URL = "http://127.0.0.1:8899"
LAMPORTS = 10**9  # in a SOL
POLL_S = 1.0

_DESCRIPTION = "Keep prepaid credit: accounts in tokens of Solana, their deposits, and what was charged."

_EPILOG = """\
try it, without a network, in two terminals:
  diffusionz wallet devnet                                 a Solana of one's own; leave it running
  diffusionz wallet create shop                            keys, settings and an empty ledger in shop/
  cd shop                                                  where the others find payments.toml
  diffusionz wallet deposit alice --new                    an address that is alice's alone
  diffusionz wallet faucet ADDRESS --tokens 250 --sol 0.5  send something there
  diffusionz wallet deposit alice --wait 60                until it is final, and credited
  diffusionz wallet sweep                                  move it to the treasury
  diffusionz wallet audit                                  every invariant, and the chain's word for it
  diffusionz wallet backup ../shop.db

All but devnet and create read the settings from --config FILE, the file that DIFFUSIONZ_PAYMENTS_CONFIG names, or
payments.toml here; DIFFUSIONZ_PAYMENTS_<KEY> in the environment wins over the file.
"""

_CREATE_EPILOG = """\
examples:
  diffusionz wallet create shop                            for the dev chain that runs here, with a token of its own
  DIFFUSIONZ_PAYMENTS_RPC_URLS=https://... diffusionz wallet create shop --mint TOKEN --treasury ADDRESS

FOLDER gets payments.toml; payments.db, the ledger; master.seed, from which the deposit addresses are derived; gas.json,
the wallet that pays the fees of sweeps (send it 0.05 SOL); and pepper, for API keys. Only you can read them. Copy
master.seed to a safe place now: who has it can spend what is not swept yet, and without it nobody can.

The treasury is where sweeps go. Its key must not be on this machine. On a dev chain it is an address that nobody has
the key of. A URL with a provider's key belongs in the environment, where `ps` does not show it.
"""

_DEVNET_EPILOG = """\
examples:
  diffusionz wallet devnet
  diffusionz wallet devnet --port 9000 --slot-ms 20        final after 0.6 s instead of 13 s

The real token programs, run by LiteSVM, behind a node's JSON-RPC, on this machine alone. The chain is in this process's
memory: Ctrl-C ends it for good. A wallet folder that was made for it is of no use then; another chain has another
genesis hash, and is refused.
"""

_FAUCET_EPILOG = """\
examples:
  diffusionz wallet faucet ADDRESS --sol 1
  diffusionz wallet faucet ADDRESS --tokens 250.5 --sol 0.1

On a dev chain only. Tokens are newly minted, SOL comes from the chain's own purse.
"""

_DEPOSIT_EPILOG = """\
examples:
  diffusionz wallet deposit alice --new                    opens the account user:alice, and prints its address
  diffusionz wallet deposit alice --wait 120               looks until something is credited
  diffusionz wallet deposit --refill 5000                  derives more addresses, from the seed

The address takes the token and SOL, and is the account's for ever: what comes late is credited too. While nothing was
deposited to it, it is given again. Credit is given when a deposit is final, some 13 seconds after it landed.
"""

_SWEEP_EPILOG = """\
examples:
  diffusionz wallet sweep
  */5 * * * *  cd /srv/shop && diffusionz wallet sweep     the line of a crontab

Looks for deposits first. A sweep is written down before it is sent, so one that was interrupted is found again by the
next. It pays the address that the settings call treasury, and no other. Exit status 1: something did not land in time.
"""

_AUDIT_EPILOG = """\
examples:
  diffusionz wallet audit
  diffusionz wallet audit --thorough                       also reads every history and every transaction
  diffusionz wallet audit --offline --json                 the database alone

Replays the journal, reckons every price again, and holds every balance against the chain's. Exit status 1: something
is not as it must be; it begins with FAIL.
"""

_ALARMS_EPILOG = """\
examples:
  diffusionz wallet alarms
  diffusionz wallet alarms --clear "stray tokens" ACCOUNT  when you have looked after it

What watchers and sweepers told the operator and could not put right. Those about balances, frozen accounts and the gas
wallet that are over are cleared by themselves; one that was cleared is raised again while its cause lasts.
"""

_RATES_EPILOG = """\
examples:
  diffusionz wallet rates
  diffusionz wallet rates --approve sample:17              lets it count, and what follows be judged against it
  diffusionz wallet rates --approve high:4                 raises the all-time high to it

The rates of this moment, or why there is none, and what is in quarantine: samples that jumped, and highs that grew too
fast. Look at the markets before you approve: one trade on a thin pool can make a price. Your name is kept with it.
"""

_KEY_EPILOG = """\
examples:
  diffusionz wallet key alice                              a new key, printed this once
  diffusionz wallet key alice --name tests --services zimage,chronos2 --daily-limit 500
  diffusionz wallet key alice --list
  diffusionz wallet key alice --revoke 7kQ2mXb9

For the operator's own tests: users make their keys on the server's page. The limit is in tokens a day (UTC).
"""

_BACKUP_EPILOG = """\
examples:
  diffusionz wallet backup /backups/shop-2026-11-22.db

The copy is of one moment, and checked: a damaged ledger gives no backup. Servers may go on meanwhile. The seed, the gas
wallet and the pepper are not in it.
"""

_RESTORE_EPILOG = """\
examples:
  diffusionz wallet restore /backups/shop-2026-11-22.db

Stop the server first. The history of every address is read again, which takes a while: what was deposited since the
backup is credited, and nothing twice. Addresses that may have been given out since are retired. What users spent since,
they have again: how much that can be is printed. The old database is kept. Until all has succeeded, nothing changes.
"""


def add_commands(parser: argparse.ArgumentParser, new_command: Callable[..., argparse.ArgumentParser]) -> None:
    """Fills in the parser of `diffusionz wallet`. `new_command(commands, name, help, epilog, run)` is how the program
    around it makes the parser of a command."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=type(parser))

    def command(
        name: str, help: str, epilog: str, run: Callable[[argparse.Namespace], int], *, config: bool = True
    ) -> Callable[..., argparse.Action]:
        added = new_command(commands, name, help, epilog, lambda args: _run(run, args))
        if config:
            added.add_argument("--config", metavar="FILE", help=f"the settings (default: {CONFIG} here)")
        added.add_argument("--json", action="store_true", help="print the result as JSON")
        return added.add_argument

    add = command("create", "make the keys, the settings and an empty ledger", _CREATE_EPILOG, _create, config=False)
    add("folder", metavar="FOLDER", help="a new folder")
    add("--rpc-url", metavar="URL", help=f"a node of the cluster (default: the environment's, else {DEVNET_URL})")
    add("--mint", metavar="ADDRESS", help="the token (default, on a dev chain: a new one)")
    add("--treasury", metavar="ADDRESS", help="where sweeps go (default, on a dev chain: a new address)")
    add("--addresses", type=_count, default=1000, metavar="N", help="deposit addresses to derive (default: 1000)")

    add = command("devnet", "run a Solana cluster of one node, for trying things out", _DEVNET_EPILOG, _devnet,
                  config=False)  # fmt: skip
    add("--port", type=_port, default=8899, metavar="N", help="on 127.0.0.1; 0 takes a free one (default: 8899)")
    add("--slot-ms", type=_count, default=400, metavar="N", help="length of a slot in milliseconds (default: 400)")
    add("--seed", type=_seed, metavar="N", help="the same seed gives the same genesis (default: a random one)")

    add = command("faucet", "send tokens and SOL out of nothing, on a dev chain", _FAUCET_EPILOG, _faucet)
    add("address", metavar="ADDRESS", help="a wallet, or a deposit address")
    add("--tokens", type=_amount, metavar="X", help="how many, such as 250.5")
    add("--sol", type=_amount, metavar="X", help="how many, such as 0.1")

    add = command("deposit", "print an account's address for deposits, or wait for one", _DEPOSIT_EPILOG, _deposit)
    add("account", metavar="ACCOUNT", nargs="?", help="alice is short for user:alice")
    add("--new", action="store_true", help="open the account; without it a misspelt name is an error")
    add("--wait", type=_count, metavar="SECONDS", help="look until something is credited")
    add("--refill", type=_count, metavar="N", help="derive N more addresses for the pool; needs the seed")

    add = command("sweep", "move what was deposited to the treasury", _SWEEP_EPILOG, _sweep)
    add("--timeout", type=_count, default=120, metavar="SECONDS", help="for sweeps to become final (default: 120)")

    add = command("audit", "replay the ledger, ask the chain, print every invariant", _AUDIT_EPILOG, _audit)
    add("--offline", action="store_true", help="without the chain")
    add("--thorough", action="store_true", help="read every history and recorded transaction")

    add = command("alarms", "list what needs the operator, or clear it", _ALARMS_EPILOG, _alarms)
    add("--clear", nargs=2, metavar=("KIND", "SUBJECT"), help="as they are listed")

    add = command("rates", "show the rates and their quarantine, or approve one", _RATES_EPILOG, _rates)
    add("--approve", metavar="ID", help="as it is listed, such as sample:17")
    add("--operator", metavar="NAME", help="who approves (default: the user who runs this)")

    add = command("key", "make an API key, list an account's, or revoke one", _KEY_EPILOG, _key)
    add("account", metavar="ACCOUNT", help="alice is short for user:alice")
    add("--name", default="", metavar="TEXT", help="what lists call it")
    add("--services", type=_names, metavar="A,B", help="what it is good for (default: all)")
    add("--daily-limit", type=_amount, metavar="X", help="tokens a day (default: the balance is the limit)")
    add("--list", action="store_true", help="print the account's keys")
    add("--revoke", metavar="ID", help="the key's letters after the prefix, as they are listed")

    add = command("backup", "copy the ledger while it is in use", _BACKUP_EPILOG, _backup)
    add("file", metavar="FILE", help="a new file")

    add = command(
        "restore", "put a backup in the ledger's place, and catch up with the chain", _RESTORE_EPILOG, _restore
    )
    add("file", metavar="FILE", help="what `backup` wrote")
    add("--addresses", type=_count, default=1000, metavar="N",
        help="to derive for the pool, if the seed is here (default: 1000)")  # fmt: skip


def _run(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Runs a command; turns errors into those that the program's main function knows."""
    if sys.version_info < (3, 11):
        raise ImportError(f"the wallet needs Python 3.11 or later; this is {sys.version.split()[0]}")
    try:
        from diffusionz.payments.errors import ConfigurationError, IdentifierError, PaymentsError

        return command(args)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES:
            raise
        raise ImportError(f"the wallet needs more packages ({package} is missing): {EXTRA}") from error
    except (ConfigurationError, IdentifierError) as error:
        raise ArgumentError(str(error)) from error
    except PaymentsError as error:
        raise DiffusionzError(str(error)) from error


# --- Commands ---


def _create(args: argparse.Namespace) -> int:
    import pathlib

    from diffusionz.payments import settings, shop

    given = settings.load(environ={k: v for k, v in os.environ.items() if k == settings.PREFIX + "RPC_URLS"})
    about = asyncio.run(
        shop.create(
            args.folder,
            rpc_url=args.rpc_url or (given.rpc_urls or (DEVNET_URL,))[0],
            mint=args.mint and _address(args.mint),
            treasury=args.treasury and _address(args.treasury),
            addresses=args.addresses,
        )
    )
    if args.json:
        _print_json(about)
    else:
        folder = pathlib.Path(about["folder"])
        print(f"{folder}: a ledger for the token {about['mint']} on {about['network']}")
        print(f"  treasury    {about['treasury']}")
        print(f"  gas wallet  {about['gas']}" + ("" if about["network"] == "localnet" else "  (send it 0.05 SOL)"))
        print(f"  addresses   {about['addresses']}, of {folder / 'master.seed'}: copy that file to a safe place")
        print(f"next: cd {args.folder}, then: diffusionz wallet deposit alice --new")
    return 0


def _devnet(args: argparse.Namespace) -> int:
    import secrets
    import time

    from diffusionz.payments.devnet import Devnet

    seed = secrets.randbits(64) if args.seed is None else args.seed

    async def serve() -> None:
        devnet = Devnet(seed, slot_seconds=args.slot_ms / 1000, genesis_time=int(time.time()), strict_cursors=True)
        async with devnet.serving("127.0.0.1", args.port, ticking=True) as url:
            if args.json:
                _print_json({"url": url, "genesis_hash": str(devnet.genesis_hash), "seed": seed})
            else:
                print(f"dev chain at {url}, genesis hash {devnet.genesis_hash}; Ctrl-C ends it")
                at = "" if url == DEVNET_URL else f" --rpc-url {url}"
                print(f"next, in another terminal: diffusionz wallet create shop{at}")
            sys.stdout.flush()
            await asyncio.Event().wait()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())
    return 0


def _faucet(args: argparse.Namespace) -> int:
    from diffusionz.payments.shop import faucet

    settings = _settings(args)
    if args.tokens is None and args.sol is None:
        raise ArgumentError("nothing to send: give --tokens, --sol or both")
    address = _address(args.address)
    tokens = _units(args.tokens, settings.token_decimals, "--tokens") if args.tokens else 0
    lamports = _units(args.sol, 9, "--sol") if args.sol else 0
    sent = asyncio.run(faucet(settings, address, tokens=tokens, lamports=lamports))
    parts = [f"{args.sol} SOL" if args.sol else "", f"{args.tokens} tokens" if args.tokens else ""]
    return _done(args, sent, f"sent {' and '.join(filter(None, parts))} to {address}")


def _deposit(args: argparse.Namespace) -> int:
    if (args.account is None) == (args.refill is None):
        raise ArgumentError("give an ACCOUNT, or --refill N")
    from diffusionz.payments.shop import opened, refill, seed_of

    settings = _settings(args)
    with opened(settings) as shop:
        if args.refill is not None:
            added = refill(shop.addresses, seed_of(settings), args.refill)
            return _done(args, {"added": added, "free": shop.addresses.free()}, f"{added} more addresses")
        account = _account(args.account)
        if args.new:
            shop.ledger.open_account(account, "user")
        balance = shop.ledger.balance(account)
        unused = shop.addresses.unused(account)
        address = unused[0] if unused else shop.addresses.issue(account)
        about = {"account": account, "address": address, "balance": balance.posted}
        if args.wait is None:
            return _done(args, about, address)
        if not args.json:
            print(f"{address}  waiting for a deposit")
            sys.stdout.flush()
        credited = asyncio.run(_wait(shop, account, args.wait))
        posted = shop.ledger.balance(account).posted
        text = f"{_shown(credited, settings)} credited; the balance is {_shown(posted, settings)}"
        _done(args, about | {"credited": credited, "balance": posted}, text)
        if not credited:
            raise DiffusionzError(f"nothing was credited within {args.wait} s")
        return 0


async def _wait(shop: Shop, account: str, seconds: int) -> int:
    """Looks for deposits until one is credited, or the time is over; returns how much it was, in base units."""
    loop = asyncio.get_running_loop()
    deadline, refresh_at = loop.time() + seconds, loop.time()
    newest = shop.newest(account)
    async with shop.chain() as chain, shop.rates_client() as rates:
        watcher = shop.watcher(chain)
        await watcher.start()
        while True:
            if loop.time() >= refresh_at:
                await rates.refresh()
                refresh_at = loop.time() + shop.settings.rates_interval_s
            await watcher.scan()
            credited = sum(line.amount for line in shop.ledger.history(account) if line.seq > newest
                           and line.code == "deposit")  # fmt: skip
            if credited or loop.time() >= deadline:
                return credited
            await asyncio.sleep(POLL_S)


def _sweep(args: argparse.Namespace) -> int:
    from diffusionz.payments.shop import gas_of, opened, seed_of

    settings = _settings(args)
    seed = seed_of(settings)
    with opened(settings) as shop:
        (before,) = shop.connection.execute("SELECT coalesce(max(id), 0) FROM movements").fetchone()
        counts = asyncio.run(_sweep_until_final(shop, seed, gas_of(settings), args.timeout))
        swept = dict(
            shop.connection.execute(
                "SELECT CASE mint WHEN 'SOL' THEN 'lamports' ELSE 'tokens' END, -sum(delta) FROM movements"
                " WHERE kind = 'sweep' AND id > ? GROUP BY 1",
                (before,),
            ).fetchall()
        )
        about = {"tokens": swept.get("tokens", 0), "lamports": swept.get("lamports", 0), "sweeps": counts}
        summary = f"swept {_shown(about['tokens'], settings)} tokens and {about['lamports'] / LAMPORTS:.9f} SOL"
        _done(args, about, summary)
        low = [detail for kind, _, detail in shop.deposits.alarms() if kind == "gas is low"]
    if low:
        raise DiffusionzError(f"the gas wallet is low, nothing was sent: {low[0]}")
    if unlucky := [f"{count} {status}" for status, count in counts.items() if status != "landed"]:
        raise DiffusionzError(f"sweeps that did not land: {', '.join(unlucky)}; the next sweep looks after them")
    return 0


async def _sweep_until_final(shop: Shop, seed: Seed, gas: Keypair, timeout: int) -> dict[str, int]:
    """Sends what can be swept; returns how many transactions came to what."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    connection = shop.connection
    (last,) = connection.execute("SELECT coalesce(max(id), 0) FROM sweeps").fetchone()
    concerned = f"SELECT id FROM sweeps WHERE status = 'open' OR id > {last}"
    open_before = {id for (id,) in connection.execute(concerned)}
    async with shop.chain() as chain, shop.rates_client() as rates:
        watcher = shop.watcher(chain)
        await watcher.start()
        await rates.refresh()
        await watcher.scan()
        sweeper = shop.sweeper(chain, seed, gas)
        await sweeper.step()
        ids = open_before | {id for (id,) in connection.execute(concerned)}
        while connection.execute("SELECT 1 FROM sweeps WHERE status = 'open'").fetchone() and loop.time() < deadline:
            await asyncio.sleep(min(POLL_S, max(deadline - loop.time(), 0)))
            await sweeper.resolve()
    counts: dict[str, int] = {}
    for id, status in connection.execute("SELECT id, status FROM sweeps ORDER BY id"):
        if id in ids:
            counts[status] = counts.get(status, 0) + 1
    return counts


def _audit(args: argparse.Namespace) -> int:
    from diffusionz.payments.audit import Report, audit, audit_records
    from diffusionz.payments.shop import opened

    if args.offline and args.thorough:
        raise ArgumentError("--thorough asks the chain; it does not go with --offline")
    settings = _settings(args)

    async def with_chain(shop: Shop) -> Report:
        async with shop.chain() as chain:
            return await audit(shop.watcher(chain), thorough=args.thorough)

    with opened(settings) as shop:
        report = audit_records(shop.ledger) if args.offline else asyncio.run(with_chain(shop))
    if args.json:
        _print_json({
            "clean": report.clean,
            "invariants": [
                {"about": about, "name": line.name, "holds": line.holds, "detail": line.detail}
                for about, lines in report.invariants.items() for line in lines
            ],
            "figures": report.figures,
        })  # fmt: skip
        return 0 if report.clean else 1
    for about, lines in report.invariants.items():
        for line in lines:
            print(f"{'ok  ' if line.holds else 'FAIL'}  {about}: {line.name}; {line.detail}")
    print()
    for name, value in report.figures.items():
        digits = 9 if name.endswith("lamports") else settings.token_decimals
        label = name.replace("lamports", "SOL").replace("_", " ")
        print(f"      {label:22}{Decimal(value).scaleb(-digits):>24,.{digits}f}")
    print()
    print("all is well" if report.clean else f"{len(report.failed)} of the invariants do not hold")
    return 0 if report.clean else 1


def _alarms(args: argparse.Namespace) -> int:
    from diffusionz.payments.shop import opened

    with opened(_settings(args)) as shop:
        alarms = shop.deposits.alarms()
        if args.clear:
            kind, subject = args.clear
            if (kind, subject) not in {alarm[:2] for alarm in alarms}:
                raise DiffusionzError(f"there is no alarm {kind!r} about {subject!r}")
            shop.deposits.clear_alarm(kind, subject)
            return _done(args, {"cleared": {"kind": kind, "subject": subject}}, f"cleared: {kind}: {subject}")
    listed = [{"kind": kind, "subject": subject, "detail": detail} for kind, subject, detail in alarms]
    text = "\n".join(f"{kind}: {subject}: {detail}" for kind, subject, detail in alarms)
    return _done(args, {"alarms": listed}, text or "none")


def _rates(args: argparse.Namespace) -> int:
    import getpass
    import time

    from diffusionz.payments.errors import RateError
    from diffusionz.payments.rates import usd
    from diffusionz.payments.shop import opened

    with opened(_settings(args)) as shop:
        rates, now = shop.rates, time.time()
        if args.approve:
            operator = args.operator or getpass.getuser()
            rates.approve(args.approve, operator, now)
            about = {"approved": args.approve, "operator": operator}
            return _done(args, about, f"{args.approve} was approved by {operator}")
        current: dict[str, Any] = {}
        lines = []
        labels = {"ath": "token, all-time high", "market": "token, market", "sol": "SOL, market"}
        for name, label in labels.items():
            try:
                rate = rates.sol_rate(now) if name == "sol" else rates.token_rate(name, now)  # type: ignore[arg-type]
                current[name] = {"usd": usd(rate.pico_usd), "at": rate.at}
                lines.append(f"{label:22}{usd(rate.pico_usd)} USD, {_time(rate.at)}")
            except RateError as error:
                current[name] = {"usd": None, "why": str(error)}
                lines.append(f"{label:22}none: {error}")
        waiting = rates.quarantined()
    current["quarantine"] = [
        {"id": w.id, "asset": w.asset, "at": w.at, "usd": usd(w.rate), "reference": usd(w.reference)} for w in waiting
    ]
    for w in waiting:
        lines.append(f"{w.id:22}{usd(w.rate)} USD for a {w.asset}, {_time(w.at)}; it was {usd(w.reference)}")
    return _done(args, current, "\n".join(lines + ([] if waiting else ["nothing is in quarantine"])))


def _key(args: argparse.Namespace) -> int:
    from diffusionz.payments.keys import PREFIX, Keys
    from diffusionz.payments.shop import opened

    if args.list and args.revoke:
        raise ArgumentError("give --list or --revoke ID")
    settings = _settings(args)
    account = _account(args.account)
    with opened(settings) as shop:
        keys = Keys.from_settings(settings, shop.connection)
        if args.list:
            shop.ledger.balance(account)  # so that a misspelt name is an error
            found = keys.list(account)
            text = "\n".join(_key_line(key, settings) for key in found)
            return _done(args, {"account": account, "keys": [_key_about(key) for key in found]}, text or "none")
        if args.revoke:
            revoked = keys.revoke(account, args.revoke.removeprefix(PREFIX).removesuffix("…"))
            return _done(args, _key_about(revoked), f"revoked: {revoked.shown}")
        limit = args.daily_limit and _units(args.daily_limit, settings.token_decimals, "--daily-limit")
        made = keys.create(account, name=args.name, services=args.services, daily_limit=limit)
    return _done(args, _key_about(made.key) | {"secret": made.secret}, made.secret)


def _key_about(key: Key) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(key)


def _key_line(key: Key, settings: Settings) -> str:
    limit = "no limit" if key.daily_limit is None else f"{_shown(key.daily_limit, settings)} a day"
    services = "all services" if key.services is None else ", ".join(key.services)
    used = "never used" if key.used_at is None else f"used {_time(key.used_at)}"
    revoked = "" if key.revoked_at is None else f"; revoked {_time(key.revoked_at)}"
    return f"{key.shown}  {key.name or '(no name)'}; {services}; {limit}; {used}{revoked}"


def _backup(args: argparse.Namespace) -> int:
    import dataclasses

    from diffusionz.payments.backup import backup
    from diffusionz.payments.shop import opened

    with opened(_settings(args)) as shop:
        made = backup(shop.connection, args.file)
    about = f"{made.path}: {made.transfers} transfers, {made.size_bytes / 2**20:,.1f} MiB, checked"
    return _done(args, dataclasses.asdict(made), about)


def _restore(args: argparse.Namespace) -> int:
    import dataclasses

    from diffusionz.payments.backup import Restored, restore
    from diffusionz.payments.shop import assemble, connected, refill, seed_of

    settings = _settings(args)
    seed = seed_of(settings) if settings.seed_file else None
    free = 0

    def refill_pool(addresses: Addresses) -> None:
        nonlocal free
        free = refill(addresses, seed, args.addresses) if seed else 0

    async def with_chain() -> Restored:
        async with connected(settings) as chain:
            return await restore(
                args.file,
                settings.database,
                lambda connection: assemble(settings, connection).watcher(chain),
                network=settings.network,
                refill=refill_pool,
            )

    restored = asyncio.run(with_chain())
    if args.json:
        _print_json(dataclasses.asdict(restored) | {"free": free})
        return 0
    print(f"{settings.database}: restored, {restored.backup.transfers} transfers to {_time(restored.backup.last_at)}")
    if restored.replaced:
        print(f"  the old one is kept as {restored.replaced}")
    print(f"  {restored.found} movements on the chain since then were found, and recorded")
    print(f"  {restored.retired} addresses may have been given out since: retired; the pool has {free} new ones"
          + ("" if free else ", `diffusionz wallet deposit --refill N` where the seed is"))  # fmt: skip
    if restored.tail is None:
        print(
            f"  what users spent since is unknown and theirs again: at most {_shown(restored.at_risk, settings)} tokens"
        )
        print("  API keys that were revoked since are valid again")
    else:
        charged = _shown(restored.tail.charged, settings)
        print(f"  the old one has {restored.tail.transfers} transfers more: users spent {charged} tokens, theirs again")
        for id in restored.tail.adjustments:
            print(f"  an operator's transfer is lost, make it again: {id}")
        if restored.tail.revoked:
            print(f"  API keys were revoked again: {', '.join(restored.tail.revoked)}")
    for account in restored.unexplained:
        print(f"  does not add up: {account}; see `diffusionz wallet audit`")
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    from diffusionz.payments import settings

    path = args.config
    if path is None and settings.PATH_VARIABLE not in os.environ:
        if not os.path.exists(CONFIG):
            raise ArgumentError(
                f"no {CONFIG} here: give --config FILE, or set {settings.PATH_VARIABLE};"
                " `diffusionz wallet create` makes one"
            )
        path = CONFIG
    loaded = settings.load(path)
    loaded.require("rpc_urls", "mint", "treasury")
    return loaded


# --- Helpers ---


def _done(args: argparse.Namespace, about: dict[str, Any], text: str) -> int:
    if args.json:
        _print_json(about)
    else:
        print(text)
    return 0


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, ensure_ascii=False, indent=2))


def _shown(base_units: int, settings: Settings) -> str:
    return f"{Decimal(base_units).scaleb(-settings.token_decimals):,f}"


def _time(seconds: int | None) -> str:
    import datetime

    if seconds is None:
        return "its beginning"
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _account(text: str) -> str:
    return text if ":" in text else f"user:{text}"


def _address(text: str) -> str:
    """Raises ArgumentError for what is no wallet's address."""
    from diffusionz.payments.addresses import parse_address
    from diffusionz.payments.errors import AddressError

    try:
        return str(parse_address(text))
    except AddressError as error:
        raise ArgumentError(str(error)) from None


def _units(amount: Decimal, decimals: int, what: str) -> int:
    """A decimal number as base units, exact. Raises ArgumentError."""
    from diffusionz.payments.errors import AmountError
    from diffusionz.payments.shop import base_units

    try:
        return base_units(amount, decimals, what)
    except AmountError as error:
        raise ArgumentError(str(error)) from None


def _amount(text: str) -> Decimal:
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal(0)
    if not amount.is_finite() or amount <= 0 or abs(amount.adjusted()) > 20:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return amount


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _whole(text: str, least: int, most: int) -> int:
    if not text.isascii() or not text.isdigit() or not least <= int(text[:30]) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
    return int(text)


def _count(text: str) -> int:
    return _whole(text, 1, 10**6)


def _port(text: str) -> int:
    return _whole(text, 0, 65535)


def _seed(text: str) -> int:
    return _whole(text, 0, 2**64 - 1)
