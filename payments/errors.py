"""The errors of the payments package. A message says what was wrong, the value, and what is allowed; never a secret.

PaymentsError
├── AmountError         (also a ValueError)   not a whole number of base units within the allowed range
├── IdentifierError     (also a ValueError)   an id, an account's name or a code is not spelled as allowed
├── ConfigurationError  (also a ValueError)   a setting or a price table; names the key
├── NotFoundError       (also a LookupError)  there is no such account, transfer, hold or service
├── ConflictError                             the id is taken by something else, or the hold is already resolved
├── BalanceError                              the account cannot pay; .available and .needed, in base units
├── ExpiredError                              the hold's time has passed
├── RateError                                 no rate can be trusted now, so nothing can be priced
├── ChainError                                the cluster did not answer, or not sensibly; .retryable
│   ├── CursorError                           the node does not know where a listing should start or end
│   └── TransactionError                      the node refuses a transaction; .reason
├── IdentityError                             a signature, nonce, API key or scope was not accepted
├── LimitError                                asked for too often; .retry_after_s
├── SeedError                                 the master seed's file is missing, damaged or readable by others
├── AddressError        (also a ValueError)   not an address for deposits, or none is to be had
└── StorageError        (also an OSError)     the database is locked, full, read-only or damaged; nothing was written
"""

from __future__ import annotations


class PaymentsError(Exception):
    """Base of every error that this package raises on its own account."""


class AmountError(PaymentsError, ValueError):
    """Not a whole number of base units within the allowed range."""


class IdentifierError(PaymentsError, ValueError):
    """An id, an account's name or a code is not spelled as allowed."""


class ConfigurationError(PaymentsError, ValueError):
    """A setting or a price table is wrong; the message names the key."""


class NotFoundError(PaymentsError, LookupError):
    """There is no such account, transfer, hold or service."""


class ConflictError(PaymentsError):
    """The id is taken by something else, or the hold is already resolved."""


class BalanceError(PaymentsError):
    """The account cannot pay. Amounts are in base units of the token."""

    def __init__(self, message: str, *, available: int, needed: int) -> None:
        super().__init__(message)
        self.available = available
        self.needed = needed


class ExpiredError(PaymentsError):
    """The hold's time has passed."""


class RateError(PaymentsError):
    """No rate can be trusted now, so nothing can be priced."""


class ChainError(PaymentsError):
    """The cluster did not answer, or not sensibly. Retryable: the same request may succeed later."""

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable


class CursorError(ChainError):
    """The node does not know the transaction at which a listing should start or end. Without it, it would list."""


class TransactionError(ChainError):
    """The node refuses a transaction. `reason` is Solana's name for why, such as "BlockhashNotFound"."""

    def __init__(self, message: str, *, reason: str, retryable: bool) -> None:
        super().__init__(message, retryable=retryable)
        self.reason = reason


class IdentityError(PaymentsError):
    """A signature, nonce, API key or scope was not accepted."""


class LimitError(PaymentsError):
    """Asked for too often."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SeedError(PaymentsError):
    """The master seed's file is missing, damaged or readable by others."""


class AddressError(PaymentsError, ValueError):
    """Not an address that deposits can go to, or none is to be had: the pool is empty, the account has enough."""


class StorageError(PaymentsError, OSError):
    """The database is locked, full, read-only or damaged. What was asked for has not been written."""
