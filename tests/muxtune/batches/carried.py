"""What carry groups leave to later micro-batches, counted one by one."""

from collections.abc import Sequence

from muxtune.batches import MicrobatchLayout
from muxtune.batches.layout import batched_carried_calls, sequence_rows


def carried_out_tokens(layout: MicrobatchLayout) -> int:
    """Tokens of a micro-batch whose keys and values later ones of the carry group attend to."""
    return sum(row.tokens for row in sequence_rows(layout.segments) if row.after)


def carried_attention_calls(
    layout: MicrobatchLayout, fronts: Sequence[int] = ()
) -> list[tuple[int, int, int]]:
    """Batched calls of sequences that have keys from elsewhere, as (sequences, queries, keys).

    These began in earlier micro-batches, or have keys in front (``fronts`` as of :func:`sequence_rows`). Both
    are slots of a row; the queries are the last tokens of the keys.
    """
    rows = [row for row in sequence_rows(layout.segments, fronts) if row.carried]
    return batched_carried_calls([(row.tokens, row.carried + row.tokens) for row in rows])
