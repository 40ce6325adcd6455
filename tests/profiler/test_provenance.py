"""What a profile says of its origin."""

from importlib.metadata import version

import pytest

from muxtune.costs.profile import ClockReading
from muxtune.model import PRESETS
from profiler.devices import Description
from profiler.jobs import Job
from profiler.provenance import build_provenance

DESCRIPTION = Description(
    processor="a GPU", versions={"driver": "550", "nccl": "2.21.5"}, settings={"power_limit_w": "400"}
)


def job(*, device="cuda", ranks=2, link_ranks=2):
    return Job(
        model=PRESETS["llama-tiny"],
        device=device,
        suite="torch",
        ranks=ranks,
        operators=(("norm", (8,)),),
        link_ranks=link_ranks,
        links=(("all_reduce", (4096, 2)),) if link_ranks else (),
        limit_s=0.1,
    )


def clock(rank, moment, mhz, throttled_by=()):
    return ClockReading(rank=rank, moment=moment, mhz={"sm": mhz}, throttled_by=throttled_by)


def test_versions_settings_and_clocks_of_the_device_are_in_it():
    clocks = [
        clock(1, "after", 1400),
        clock(0, "after", 1410),
        clock(1, "before", 1410),
        clock(0, "before", 1410),
    ]
    provenance = build_provenance(job(), DESCRIPTION, clocks, devices=2)
    assert provenance.processor == "a GPU"
    assert provenance.versions["torch"] == version("torch")
    assert provenance.versions["driver"] == "550"
    assert provenance.settings == {"power_limit_w": "400"}
    assert provenance.backend == "nccl"
    assert [(c.rank, c.moment) for c in provenance.clocks] == [
        *((0, "before"), (0, "after"), (1, "before"), (1, "after"))
    ]
    assert provenance.notes == ()


def test_one_gpu_has_no_links_and_says_so():
    provenance = build_provenance(job(ranks=1, link_ranks=0), DESCRIPTION, [], devices=1)
    assert provenance.backend is None
    assert provenance.notes == (
        "no messages, no collectives: they need two devices of kind cuda, of which there is 1",
    )


def test_ranks_that_shared_a_device_are_told():
    assert build_provenance(job(ranks=4), DESCRIPTION, [], devices=2).notes == (
        "4 ranks shared 2 of the kind cuda",
    )


@pytest.mark.parametrize(("after_mhz", "told"), [(1400, False), (1200, True), (1500, True)])
def test_a_clock_that_moved_is_told(after_mhz, told):
    clocks = [clock(0, "before", 1410), clock(0, "after", after_mhz)]
    notes = build_provenance(job(), DESCRIPTION, clocks, devices=2).notes
    assert notes == ((f"rank 0: the sm clock went from 1410 to {after_mhz} MHz",) if told else ())


def test_throttling_is_told():
    clocks = [clock(1, "before", 1410), clock(1, "after", 1400, ("power cap", "sync boost"))]
    assert build_provenance(job(), DESCRIPTION, clocks, devices=2).notes == (
        "rank 1, after the measurement: clocks held down by power cap, sync boost",
    )
