"""What a job costs: held before it runs, charged when it has delivered, given back otherwise.

The job's id is its call's id in the ledger, or a digest of its Idempotency-Key, so that a key is charged once even when
the server was started anew in between.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from diffusionz.payments.charges import Failure, Hold, call_id_of
from diffusionz.payments.prices import format_usd
from diffusionz.server.problems import Problem

if TYPE_CHECKING:
    from diffusionz.server.credits import Credits
    from diffusionz.server.jobs import Job

logger = logging.getLogger(__name__)


class Till:
    """The ledger, as jobs meet it."""

    def __init__(self, credits: Credits) -> None:
        self._credits = credits
        self._opened_at = time.time()

    async def hold(self, job: Job, ttl_s: int, kept_s: float) -> None:
        """Reserves the job's price for ttl_s; kept_s: how long results are kept. Raises Problem and PaymentsError: then
        nothing is held and nothing must run."""
        hold = await self._credits.hold(
            job.caller.key, job.caller.account, job.service, job.order.units, _call_id(job), job.request_hash, ttl_s
        )
        if not hold.created:
            raise await self._lost(hold, hold.expires_at - ttl_s, kept_s)
        job.cost = _cost(hold, charged=False)

    async def charge(self, job: Job) -> None:
        """Takes the price. Raises PaymentsError: then nothing is charged and nothing must be delivered."""
        job.cost = _cost(await self._credits.post(_call_id(job)), charged=True)

    async def void(self, job: Job, reason: str) -> None:
        """Gives the price back. When even that cannot be written, the hold expires by itself."""
        job.cost = None
        try:
            await self._credits.void(_call_id(job), reason)
        except Exception as error:
            logger.warning("job %s: its hold was not voided and will expire: %s", job.id, error)

    async def _lost(self, hold: Hold, held_at: float, kept_s: float) -> Problem:
        """What to say of a call that is in the ledger, and whose job is not here: it was cut off by a restart, or its
        result was kept for its time. Only the first is our fault: else asking again an hour later would give back the
        price of what was delivered. held_at: rounded up to a second."""
        state: str = hold.state
        if state == "posted" and (held_at - 1 > self._opened_at or held_at + kept_s < time.time()):
            state = "kept"
        elif state == "posted":
            await self._credits.refund(hold.call_id, Failure.result_lost)
            state = "refunded"
        said = {
            "kept": "its result was kept for its time, and is gone",
            "held": "it was cut off, and what is held for it will be given back",
            "refunded": "its result is no longer here, and its price was given back",
        }.get(state, "it ended without a charge")
        return Problem("conflict", f"this Idempotency-Key was used before: {said}; choose another key")


def _call_id(job: Job) -> str:
    return job.id if job.key is None else call_id_of(*job.key)


def _cost(hold: Hold, *, charged: bool) -> dict[str, object]:
    return {"usd": format_usd(hold.usd_micro), "tokens": hold.tokens, "charged": charged}
