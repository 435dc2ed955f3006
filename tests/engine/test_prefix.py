"""Shared prefixes: found by content, held as long as somebody reads them, evicted when the room is needed."""

import pytest

from llada2_fast.cache import PagedKVCache, block_hashes
from llada2_fast.config import DecodeParams
from tests.engine.common import (
    LENGTH,
    PARAMS,
    assert_as_alone,
    assert_empty,
    prompt_of,
    random_model,
    small_engine,
    tokens_alone,
)

PARAM = DecodeParams(gen_length=12, threshold=0.4, eos_ids=())


def cache_of(pages):
    return PagedKVCache(random_model().config, pages, LENGTH, random_model().dtype, "cpu")


def test_a_key_names_a_block_and_all_before_it():
    keys = block_hashes(list(range(11)), 4)
    assert len(keys) == 2 and block_hashes(list(range(16)), 4)[:2] == keys
    assert block_hashes(list(range(16)), 4, keys[:1]) == block_hashes(list(range(16)), 4)[1:]
    salted = [block_hashes(list(range(11)), 4, salt=salt) for salt in (b"", b"a", b"b")]
    assert salted[0] == keys and len({key for one in salted for key in one}) == 6
    other = block_hashes([9, *range(1, 11)], 4)
    assert other[0] != keys[0] and other[1] != keys[1]  # the second block's tokens are equal
    assert block_hashes(list(range(8)), 8)[0] not in keys and block_hashes([1, 2], 4) == []
    assert block_hashes([-1, 2**62], 2) != block_hashes([2**62, -1], 2)


def test_published_pages_are_found_held_and_evicted_least_recently_used_first():
    cache, keys = cache_of(4), [bytes([i]) for i in range(6)]
    a = cache.allocate(2)
    for page, key in zip(a, keys, strict=False):
        cache.insert(page, key)
    assert (
        cache.match_prefix(keys) == a and cache.match_prefix(keys[1:]) == a[1:] and cache.match_prefix(keys[2:]) == ()
    )
    cache.free(a)
    cache.check_integrity([])
    assert cache.num_free == 4 and cache.match_prefix(keys[:2]) == a  # nobody holds them, their content stays
    b = cache.allocate(2)
    assert set(b).isdisjoint(a) and cache.num_evicted == 0  # blank pages go first
    cache.incref(a[:1])
    assert cache.num_free == 1
    c = cache.allocate(1)
    assert c == a[1:] and cache.match_prefix(keys) == a[:1] and cache.num_evicted == 1
    with pytest.raises(ValueError, match="1 pages needed, 0 of 4 are free"):
        cache.allocate(1)
    cache.check_integrity([a[:1], b, c])
    cache.free(a[:1])
    cache.insert(b[0], keys[2])
    cache.free(b)
    cache.incref(cache.match_prefix(keys[:1]))  # used again: younger than b[0]
    cache.free(a[:1])
    cache.allocate(2)  # a blank one and the older of the published
    assert cache.match_prefix(keys[2:]) == () and cache.match_prefix(keys) == a[:1] and cache.num_evicted == 2
    cache.clear()
    assert cache.match_prefix(keys) == () and cache.num_evicted == 2  # forgotten, not given to somebody else


def test_a_row_s_last_blocks_are_evicted_before_the_ones_they_need():
    cache, keys = cache_of(3), [bytes([i]) for i in range(3)]
    pages = cache.allocate(3)
    for page, key in zip(pages, keys, strict=True):
        cache.insert(page, key)
    cache.free(pages)
    for left in (2, 1, 0):
        cache.allocate(1)
        assert cache.match_prefix(keys) == pages[:left]


def test_the_first_page_of_a_key_stays_and_a_page_keeps_its_key():
    cache = cache_of(3)
    first, second = cache.allocate(1), cache.allocate(1)
    cache.insert(first[0], b"x")
    cache.insert(second[0], b"x")
    cache.insert(first[0], b"y")
    assert cache.match_prefix([b"x"]) == first and cache.match_prefix([b"y"]) == ()
    cache.check_integrity([first, second])
    cache.clear()
    assert cache.match_prefix([b"x"]) == () and cache.num_free == 1
    cache.check_integrity([first, second])


def test_faults_of_published_pages_are_caught():
    cache = cache_of(3)
    pages = cache.allocate(2)
    with pytest.raises(AssertionError, match="nobody's"):
        cache.insert(2, b"x")
    cache.insert(pages[0], b"x")
    cache.free(pages)
    for spoil in (cache._hash, cache._page, cache._idle):
        kept = dict(spoil)
        spoil.clear()
        with pytest.raises(AssertionError, match="cache"):
            cache.check_integrity([])
        spoil.update(kept)
    cache.check_integrity([])


@pytest.mark.parametrize("params", PARAMS)
def test_a_second_turn_finds_the_first_one_s_prompt_and_answer(params):
    """The same tokens and traces with shared pages as without; generated blocks are shared like prompts."""
    model, engine = random_model(), small_engine()
    prompt = prompt_of(14)
    first = engine.generate([prompt], params)[0]
    turn = prompt + first.token_ids + [3, 1, 4]
    second = engine.generate([turn], params)[0]
    assert_as_alone(second, model, turn, params)
    blocks = (14 + len(first.token_ids)) // LENGTH  # the last of them may not have been settled
    assert second.shared_tokens // LENGTH in (blocks - 1, blocks)
    assert_empty(engine)
    assert small_engine(enable_prefix_caching=False).generate([turn], params)[0].shared_tokens == 0


def test_a_common_system_prompt_is_computed_once_even_if_all_come_at_once():
    engine = small_engine(max_num_seqs=4, cache_tokens=256, max_num_batched_tokens=8)
    system = prompt_of(40)
    prompts = [system + prompt_of(3, seed) for seed in range(4)]
    outputs = engine.generate(prompts, PARAM)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_as_alone(output, random_model(), prompt, PARAM)
    assert [output.shared_tokens > 0 for output in outputs] == [False, True, True, True]
    assert all(output.shared_tokens >= 32 for output in outputs[1:])
    assert_empty(engine)


def test_pages_that_come_free_by_sharing_let_the_next_one_in():
    """Of 26 pages two rows take 12 each; the third needs 4, which there are once the second has shared ten of them."""
    engine, prompt = small_engine(cache_tokens=26 * LENGTH, max_num_batched_tokens=40), prompt_of(40)
    params = DecodeParams(gen_length=8, threshold=2.0, steps=4, eos_ids=())
    pair = [engine.add_request(prompt, params) for _ in range(2)]
    third = engine.add_request([1], DecodeParams(gen_length=12, threshold=0.4))
    engine.step()
    assert third.status == "waiting"
    while third.status == "waiting":
        engine.step()
        engine.check_integrity()
    assert [request.status for request in pair] == ["running", "running"]


def test_known_pages_that_nobody_holds_are_free_only_once():
    """Three of four pages are held by nobody. A request that needs four finds two of them: the others are too few."""
    engine, prompt = small_engine(cache_tokens=4 * LENGTH), prompt_of(2 * LENGTH)
    engine.generate([prompt], DecodeParams(gen_length=4, threshold=0.0))
    other = engine.add_request([1], DecodeParams(gen_length=3, threshold=2.0, steps=4, eos_ids=()))
    engine.step()
    params = DecodeParams(gen_length=8, threshold=0.4)
    request = engine.add_request(prompt, params)
    engine.step()
    assert (other.status, request.status, engine.cache.num_free) == ("running", "waiting", 3)
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert request.output.shared_tokens == 2 * LENGTH
    assert_as_alone(request.output, random_model(), prompt, params)
    assert_empty(engine)


def test_readers_share_pages_while_they_run():
    engine = small_engine(cache_tokens=128)  # 32 pages; alone each of the four needs 13
    system = prompt_of(40)
    engine.generate([system], PARAM)
    requests = [engine.add_request(system + [seed], PARAM) for seed in range(4)]
    engine.step()
    assert all(request.status == "running" for request in requests)
    assert engine.cache.num_free == 32 - 10 - 4 * 4
    assert len({request.sequence.pages[:10] for request in requests}) == 1
    engine.check_integrity()
    engine.cancel(requests[0].request_id)  # its own pages only
    assert engine.cache.num_free == 32 - 10 - 3 * 4
    while engine.has_work:
        engine.step()
    assert_empty(engine)


def test_prefixes_are_evicted_under_pressure_and_computed_again():
    engine = small_engine(cache_tokens=64)  # 16 pages
    prompts = [prompt_of(30, seed) for seed in range(5)]  # 11 pages each
    for _ in range(2):
        for prompt in prompts:
            assert_as_alone(engine.generate([prompt], PARAM)[0], random_model(), prompt, PARAM)
    assert engine.cache.num_evicted > 50
    assert engine.generate([prompts[-1]], PARAM)[0].shared_tokens == 28  # the last one is still there
    assert_empty(engine)


def test_forgetting_all_prefixes():
    """What a training loop does after it has changed the weights."""
    engine = small_engine()
    prompt = prompt_of(30)
    engine.generate([prompt], PARAM)
    assert engine.generate([prompt], PARAM)[0].shared_tokens == 28
    engine.cache.clear()
    assert engine.generate([prompt], PARAM)[0].shared_tokens == 0


def test_a_prompt_that_is_all_cached_needs_no_prefill():
    engine = small_engine()
    prompt = prompt_of(32)
    engine.generate([prompt], PARAM)
    output = engine.generate([prompt], PARAM)[0]
    assert output.shared_tokens == 32 and output.counters.prefill_forwards == 0
    assert output.token_ids == tokens_alone(random_model(), prompt, PARAM)


def test_a_partly_absent_last_block_is_not_published():
    """attend_tail=False: its keys see no tail, so its content is not that of a whole block."""
    engine = small_engine()
    params = DecodeParams(
        gen_length=6, attend_tail=False, threshold=0.0, editing_threshold=2.0, max_post_steps=1, eos_ids=()
    )
    output = engine.generate([prompt_of(4)], params)[0]
    assert output.counters.forwards_per_block == [2, 2]  # the last step changed nothing: K/V of both blocks are final
    published = block_hashes(prompt_of(4) + output.token_ids + [0, 0], LENGTH)
    assert len(engine.cache.match_prefix(published)) == 2 and engine.cache.num_idle == 2
