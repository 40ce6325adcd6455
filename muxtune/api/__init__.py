"""The front door in Python; the command line is made of it, too."""
