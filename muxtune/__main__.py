"""``python -m muxtune``: the command line."""

from muxtune.cli.app import main

main()
