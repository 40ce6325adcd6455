"""Command line: the composition root, which opens the other rooms when a command needs them."""
