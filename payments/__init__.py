"""diffusionz.payments: prepaid credit for a server of models, funded by deposits on Solana.

A ledger in SQLite keeps what each account holds, in whole base units of one SPL token; a watcher credits deposits, and
a server holds, posts and voids what its calls cost. It imports neither the server nor the engine.
"""
