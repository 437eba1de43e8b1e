"""How many chunks of a transfer go in one message. Pure.

A message costs the same whatever it holds, so a long transfer uses large ones: at most what the app takes,
and half of the credit, so that one message is worked on while the next is made. But a message is dealt with
only when it is there whole; so the first ones are small, and up to four chunks none is larger than all that
went before.
"""


def chunks_together(before: int, most: int, credit: int) -> int:
    """Return how many chunks the message has that follows `before` chunks."""
    return max(1, min(before, most, credit // 2))
