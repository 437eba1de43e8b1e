"""The sizes of a transfer's messages: they grow, within what the app takes and half of the credit."""

import pytest

from droppexd.client.together import chunks_together


@pytest.mark.parametrize(
    ("most", "credit", "sizes"),
    [
        (4, 8, [1, 1, 2, 4, 4, 4]),
        (4, 6, [1, 1, 2, 3, 3]),
        (4, 4, [1, 1, 2, 2]),
        (4, 3, [1, 1, 1]),
        (2, 8, [1, 1, 2, 2]),
        (1, 8, [1, 1, 1]),
        (4, 0, [1, 1]),
    ],
)
def test_messages_grow_with_what_went_before(most, credit, sizes):
    sent = []
    while len(sent) < len(sizes):
        sent.append(chunks_together(sum(sent), most, credit))
    assert sent == sizes
