"""What an hTask puts on a rank, reckoned by hand."""

from __future__ import annotations

from dataclasses import replace

from muxtune.memory import Sharding, htask_load
from muxtune.model import PRESETS
from tests.muxtune.memory.examples import make_load, make_work

LLAMA = PRESETS["llama-tiny"]  # 256 wide, float32


def test_micro_batches_repeat_carry_group_by_carry_group():
    load = make_load(activation=10, logit=1, left=(5, 3, 0))
    assert load.carry == 3
    assert [load.microbatch(number).open_bytes for number in range(7)] == [16, 14, 11, 16, 14, 11, 16]


def test_adapters_and_messages_of_two_tasks():
    one = make_work(tokens=512, r=8, adapted=("q_proj",))
    both = replace(one, pefts=one.pefts * 2, task_tokens=(256, 256))
    load = htask_load(LLAMA, 3, first=False, last=False, works=[both])
    assert load.adapter_bytes == 2 * 3 * (256 * 8 + 8 * 256) * 4
    assert load.message_bytes == 512 * 256 * 4
    assert load.carry == 1
    assert (load.microbatch(0).left_bytes, load.left_gradient_bytes) == (0, 0)


def test_of_a_pair_at_queries_a_rank_has_one_factor_whole():
    work = make_work(r=8, adapted=("q_proj",))
    load = htask_load(LLAMA, 1, first=False, last=False, works=[work], sharding=Sharding(tp=2))
    assert load.adapter_bytes == (256 * 8 + 8 * 128) * 4


def test_a_group_has_the_bytes_of_each_of_its_micro_batches():
    full, rest = make_work(tokens=512), make_work(tokens=128)
    load = htask_load(LLAMA, 2, first=False, last=False, works=[full, rest])
    alone = [
        htask_load(LLAMA, 2, first=False, last=False, works=[each]).microbatch(0) for each in (full, rest)
    ]
    assert list(load.microbatches) == alone
    assert alone[0].open_bytes > alone[1].open_bytes
