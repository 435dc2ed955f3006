"""Who runs when: order, admission by pages, chunked prefill beside decoding, preemption, the bounded queue."""

import pytest

from llada2_fast.config import DecodeParams
from llada2_fast.engine import QueueFull
from llada2_fast.engine.scheduler import MAX_PASSES
from tests.engine.common import (
    LENGTH,
    PARAMS,
    alone,
    assert_as_alone,
    assert_empty,
    prompt_of,
    random_model,
    small_engine,
)
from tests.thinned import thinned

SLOW = DecodeParams(gen_length=16, threshold=2.0, steps=4, eos_ids=())  # four steps a block, four blocks


class Clock:
    """A clock that stands still until it is moved."""

    now = 0.0

    def __call__(self):
        return self.now


def names(requests):
    return [request.request_id for request in requests]


def run_out(engine):
    while engine.has_work:
        engine.step()
        engine.check_integrity()


def test_equal_priorities_run_in_order_of_arrival():
    engine = small_engine(max_num_seqs=1)
    for name in "abc":
        engine.add_request(prompt_of(5), SLOW, request_id=name)
    ended = []
    while engine.has_work:
        ended += [event.request_id for event in engine.step() if event.kind == "finish"]
    assert ended == ["a", "b", "c"]


def test_a_higher_priority_goes_first_until_the_other_has_waited_long_enough():
    clock = Clock()
    engine = small_engine(clock=clock, priority_s=10.0)
    engine.add_request(prompt_of(5), SLOW, request_id="old")
    clock.now = 5.0
    engine.add_request(prompt_of(5), SLOW, request_id="urgent", priority=1)
    engine.add_request(prompt_of(5), SLOW, request_id="most urgent", priority=2)
    clock.now = 11.0
    engine.add_request(prompt_of(5), SLOW, request_id="late", priority=1)
    assert names(engine.scheduler.waiting) == ["most urgent", "urgent", "old", "late"]
    run_out(engine)


def test_small_requests_pass_a_big_one_that_waits_for_pages_but_only_so_often():
    """64 pages: 40 are taken for long, the next needs 30, each of the others 1, one after another."""
    engine = small_engine(enable_prefix_caching=False, max_num_seqs=2)
    first = engine.add_request(prompt_of(100), DecodeParams(gen_length=60, threshold=2.0, steps=4, eos_ids=()))
    second = engine.add_request(prompt_of(100), DecodeParams(gen_length=20, threshold=0.0, eos_ids=()))
    small = [engine.add_request([1], DecodeParams(gen_length=2, threshold=0.0)) for _ in range(MAX_PASSES + 3)]
    while first.output is None:
        assert second.status == "waiting"
        engine.step()
        engine.check_integrity()
    assert [request.output is not None for request in small] == [True] * MAX_PASSES + [False] * 3
    engine.step()
    assert second.status == "running"
    run_out(engine)
    assert_empty(engine)


def test_a_row_that_ends_makes_room_at_the_next_step_and_nobody_waits_for_the_slowest_block():
    engine = small_engine(max_num_seqs=2)
    slow = engine.add_request(prompt_of(4), SLOW)
    quick = [engine.add_request(prompt_of(4, n), DecodeParams(gen_length=4, threshold=0.0)) for n in range(6)]
    for done in range(6):
        engine.step()
        assert [request.output is not None for request in quick] == [n <= done for n in range(6)]
    assert slow.status == "running" and slow.sequence.counters.denoise_forwards == 6
    run_out(engine)
    assert_as_alone(slow.output, random_model(), prompt_of(4), SLOW)


@pytest.mark.parametrize("chunk", [4, 16, 64])
def test_a_long_prompt_never_stalls_running_rows_for_more_than_a_chunk(chunk):
    """A step forwards at most a chunk of prompt tokens, whoever they belong to, and running rows go on meanwhile."""
    engine = small_engine(cache_tokens=2048, max_num_batched_tokens=chunk)
    running = engine.add_request(prompt_of(3), DecodeParams(gen_length=300, threshold=2.0, steps=4, eos_ids=()))
    engine.step()
    long = [engine.add_request(prompt_of(n, n), PARAMS[0]) for n in (170, 90)]
    while any(request.prefilled is None for request in long):
        settled = sum(request.sequence.num_final_blocks for request in long)
        forwards = running.sequence.counters.denoise_forwards
        engine.step()
        assert running.sequence.counters.denoise_forwards == forwards + 1
        rows = [request.sequence for request in long if request.sequence.pages]
        assert (
            sum(row.num_final_blocks for row in rows) - settled <= max(1, chunk // LENGTH) + 1
        )  # 1: a block it generated
    assert engine.num_steps >= 260 // chunk
    engine.cancel(running.request_id)
    run_out(engine)
    for request, n in zip(long, (170, 90), strict=True):
        assert_as_alone(request.output, random_model(), prompt_of(n, n), PARAMS[0])
    assert_empty(engine)


def test_a_prompt_of_one_chunk_goes_along_with_its_first_step():
    engine = small_engine(max_num_batched_tokens=8)
    request = engine.add_request(prompt_of(8), SLOW)
    engine.step()
    assert (request.sequence.counters.denoise_forwards, request.sequence.counters.prefill_forwards) == (1, 0)
    run_out(engine)


def test_the_queue_is_bounded():
    engine = small_engine(max_num_seqs=1, max_waiting=2)
    engine.add_request([1], SLOW)
    engine.step()
    engine.add_request([2], SLOW)
    engine.add_request([3], SLOW)
    with pytest.raises(QueueFull, match="2 requests are waiting and max_waiting=2"):
        engine.add_request([4], SLOW, request_id="d")
    run_out(engine)
    assert engine.finished == {"length": 3}
    engine.add_request([4], SLOW, request_id="d")
    run_out(engine)
    assert_empty(engine)


def preempting_engine(**config):
    return small_engine(max_num_seqs=4, cache_tokens=64, **config)  # 16 pages


@pytest.mark.parametrize("params, steps, share", thinned(3, PARAMS, [1, 2, 4, 5, 8, 11, 14], [True, False]))
def test_a_preempted_request_gets_the_tokens_it_would_have_got(params, steps, share):
    """Wherever it is interrupted: in prefill, inside a block, between two. Its forwards count as if it had not been."""
    engine = preempting_engine(enable_prefix_caching=share, max_num_batched_tokens=8)
    prompt = prompt_of(18, seed=2)
    request = engine.add_request(prompt, params)
    for _ in range(steps):
        engine.step()
    urgent = engine.add_request(prompt_of(20, seed=1), DecodeParams(gen_length=44, threshold=0.5), priority=1)
    finished = request.output is not None
    run_out(engine)
    assert request.output.preemptions == (0 if finished else 1)
    assert_as_alone(request.output, random_model(), prompt, params)
    assert_as_alone(urgent.output, random_model(), prompt_of(20, seed=1), urgent.params)
    assert_empty(engine)


def test_only_lower_priorities_are_preempted_as_few_as_do_the_latest_first():
    engine = preempting_engine(enable_prefix_caching=False)
    for name, priority in (("a", 0), ("b", 2), ("c", 1), ("d", 0)):
        engine.add_request(prompt_of(4), SLOW, request_id=name, priority=priority)  # 5 pages each
    engine.step()
    assert names(engine.scheduler.running) == ["b", "c", "a"] and names(engine.scheduler.waiting) == ["d"]
    engine.add_request(prompt_of(4), SLOW, request_id="e", priority=1)
    engine.step()
    assert names(engine.scheduler.running) == ["b", "c", "e"] and names(engine.scheduler.waiting) == ["a", "d"]
    engine.add_request(prompt_of(4), SLOW, request_id="f", priority=1)
    engine.step()
    assert names(engine.scheduler.running) == ["b", "c", "e"] and engine.scheduler.preemptions == 1
    engine.add_request(prompt_of(20), DecodeParams(gen_length=44), request_id="g", priority=2)  # all 16 pages
    engine.step()  # even without the two of priority 1 it would not fit
    assert names(engine.scheduler.running) == ["b", "c", "e"]
    run_out(engine)
    assert engine.finished == {"length": 7} or engine.finished.total() == 7


def test_of_equal_priorities_the_latest_is_preempted():
    engine = preempting_engine(enable_prefix_caching=False)
    for name in "abc":
        engine.add_request(prompt_of(4), SLOW, request_id=name)  # 5 of 16 pages each
    engine.step()
    engine.add_request(prompt_of(4), SLOW, request_id="d", priority=1)
    engine.step()
    assert names(engine.scheduler.running) == ["a", "b", "d"] and names(engine.scheduler.waiting) == ["c"]
    run_out(engine)


def test_nobody_is_preempted_for_pages_that_others_share():
    """Without the sharer 2 of 6 pages would be free and 3 are needed: its other 2 are the first one's, too."""
    engine, prompt = small_engine(cache_tokens=6 * LENGTH), prompt_of(2 * LENGTH)
    first = engine.add_request(prompt, DecodeParams(gen_length=8, threshold=2.0, steps=4, eos_ids=()), priority=1)
    while not any(event.kind == "commit" for event in engine.step()):
        pass  # its prompt is known once it has committed a block
    sharer = engine.add_request(prompt, DecodeParams(gen_length=4, threshold=2.0, steps=4, eos_ids=()))
    engine.step()
    assert sharer.status == "running" and engine.cache.num_free == 1
    newcomer = engine.add_request([1], DecodeParams(gen_length=11, threshold=0.4), priority=1)
    engine.step()
    assert (first.status, sharer.status, newcomer.status) == ("running", "running", "waiting")
    run_out(engine)
    for request in (first, sharer, newcomer):
        assert request.output.preemptions == 0
        assert_as_alone(request.output, random_model(), request.prompt, request.params)
    assert_empty(engine)


def test_a_request_that_has_waited_long_enough_is_not_preempted():
    clock = Clock()
    engine = preempting_engine(clock=clock, priority_s=10.0)
    old = engine.add_request(prompt_of(4), DecodeParams(gen_length=48, threshold=2.0, steps=4))
    engine.step()
    clock.now = 11.0
    engine.add_request(prompt_of(4), DecodeParams(gen_length=48, threshold=0.5), priority=1)
    engine.step()
    assert old.status == "running"
    run_out(engine)
    assert old.output.preemptions == 0


def test_a_preempted_request_finds_its_finished_blocks_in_the_cache():
    """It comes back while the urgent one still runs beside it: its finished blocks are held, not computed again."""
    engine = small_engine(max_num_seqs=1, cache_tokens=256)
    prompt = prompt_of(16)
    request = engine.add_request(prompt, SLOW)
    for _ in range(10):  # two blocks and a half
        engine.step()
    engine.add_request([1, 2, 3], DecodeParams(gen_length=4), priority=1)
    run_out(engine)
    assert request.output.preemptions == 1
    assert request.output.shared_tokens == 16 + 2 * LENGTH  # the third block has carried the second one
    assert_as_alone(request.output, random_model(), prompt, SLOW)


def test_a_preempted_request_has_waited_until_its_first_place():
    clock = Clock()
    engine = small_engine(clock=clock, max_num_seqs=1)
    request = engine.add_request(prompt_of(4), SLOW)
    engine.step()
    engine.add_request([1], DecodeParams(gen_length=4), priority=1)
    while engine.has_work:
        clock.now += 1.0
        engine.step()
    assert (request.output.preemptions, request.output.queue_s) == (1, 0.0)


def test_times_are_told_by_the_clock():
    clock = Clock()
    engine = small_engine(clock=clock, max_num_seqs=1, max_num_batched_tokens=8)
    first = engine.add_request(prompt_of(2), DecodeParams(gen_length=4, threshold=2.0, steps=4, eos_ids=()))
    second = engine.add_request(prompt_of(20), DecodeParams(gen_length=4, threshold=2.0, steps=4, eos_ids=()))
    while engine.has_work:
        clock.now += 1.0
        engine.step()
    steps = alone(random_model(), prompt_of(2), first.params).counters[0].denoise_forwards
    assert (first.output.queue_s, first.output.prefill_s, first.output.decode_s) == (1.0, 0.0, steps - 1)
    # admitted in the step after; two chunks of two blocks, the third rides with the first denoise forward
    assert (second.output.queue_s, second.output.prefill_s, second.output.decode_s) == (steps + 1, 2.0, 3.0)
    assert second.output.counters.prefill_forwards == 2


def test_a_request_is_let_in_as_soon_as_its_prefix_can_be_shared():
    """16 pages: 12 are taken, the next one needs 12, of which it will find 10."""
    engine = small_engine(cache_tokens=64)
    first = engine.add_request(prompt_of(40), DecodeParams(gen_length=8, threshold=2.0, steps=4, eos_ids=()))
    second = engine.add_request(prompt_of(40), DecodeParams(gen_length=8, threshold=2.0, steps=4, eos_ids=()))
    while second.status == "waiting":
        assert first.output is None
        engine.step()
    run_out(engine)
