"""What may be wrong with a machine or a cluster, and what to do about it.

Each check is two functions: one looks and returns facts, one judges facts and returns verdicts. Judging is
pure, so that every case can be tried. Nothing here prints, and nothing but the flush test writes.
"""
