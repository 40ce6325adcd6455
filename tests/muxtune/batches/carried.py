"""What carry groups leave to later micro-batches, counted one by one."""

from muxtune.batches import MicrobatchLayout
from muxtune.batches.layout import sequence_rows


def carried_out_tokens(layout: MicrobatchLayout) -> int:
    """Tokens of a micro-batch whose keys and values later ones of the carry group attend to."""
    return sum(row.tokens for row in sequence_rows(layout.segments) if row.after)
