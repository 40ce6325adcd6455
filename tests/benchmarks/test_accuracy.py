"""The classes' errors stand beside the mean that they cancel in."""

import pytest

from benchmarks.accuracy import class_errors, class_line
from benchmarks.helpers.operator_classes import CLASSES

NOTHING = dict.fromkeys(CLASSES, (0.0, 0.0))


def test_errors_that_cancel_show_by_their_amount():
    case = NOTHING | {"linear": (1.2, 1.0), "attention": (0.8, 1.0)}
    line = class_line([case, case])
    assert line == (
        "classes of operators, predicted / measured: linear 1.20, attention 0.80; their errors are 20.0% of "
        "the time in amount, of which +0.0% is left in the sum"
    )


def test_every_case_counts_the_same():
    long, short = NOTHING | {"linear": (110.0, 100.0)}, NOTHING | {"linear": (0.9, 1.0)}
    linear = class_errors([long, short])[0]
    assert (linear.name, linear.share) == ("linear", 1.0)
    assert linear.part == pytest.approx(0.0, abs=1e-12)
    assert linear.ratio == pytest.approx(1.0)
    assert class_errors([long])[1].ratio is None
