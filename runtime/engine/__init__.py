"""One rank at work: it plays its stage's schedule and meters what it does."""
