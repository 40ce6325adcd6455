"""Tests; whatever imports them computes with one thread.

On arrays this small, the threads of numpy and torch only wait for each other, which costs several times the
processor time of the work. So this comes before either is imported; processes that tests start inherit it.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
