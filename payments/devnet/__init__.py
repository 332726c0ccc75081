"""A Solana cluster on a laptop: LiteSVM and the real token programs behind a node's JSON-RPC."""

from diffusionz.payments.devnet.cluster import Record
from diffusionz.payments.devnet.network import Devnet

__all__ = ["Devnet", "Record"]
