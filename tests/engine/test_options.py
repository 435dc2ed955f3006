"""What a request may ask of the engine beside its decoding, and what its output says then."""

import math
from dataclasses import replace

import pytest
import torch

from llada2_fast.config import DecodeParams
from llada2_fast.decoding.inputs import row_seed
from llada2_fast.engine import Engine
from tests.engine.common import (
    EOS,
    PARAMS,
    alone,
    assert_as_alone,
    assert_empty,
    chat,
    demo_model,
    prompt_of,
    random_model,
    small_engine,
    tokenizer,
    tokens_alone,
)

EDITING = DecodeParams(gen_length=20, threshold=0.3, editing_threshold=0.3, max_post_steps=3, eos_ids=())
PLAIN = DecodeParams(gen_length=24, threshold=0.4, steps=4, eos_ids=())
BY_ENTROPY = {"policy": "entropy", "entropy_bound": 2.0}
CHECKED = {"policy": "self_speculative", "entropy_bound": 0.2}
ADD, END = "Add 847 and 96.", "<|endoftext|>"


def run(engine, request):
    """(output, commit events) of a request, which add up."""
    events = list(engine.stream(request, drafts=False))
    output, commits = request.output, events[:-1]
    assert [event.kind for event in events] == ["commit"] * len(commits) + ["finish"]
    for name in ("token_ids", "confidences", "steps"):
        assert [one for event in commits for one in getattr(event, name)] == getattr(output, name)
    assert output.text is None or "".join(event.text for event in events) == output.text
    return output, commits


def spoken(**options):
    """The output of the embedded model to a sum, without early stop, so that special tokens are among its tokens."""
    engine = Engine(demo_model(), tokenizer=tokenizer())
    params = DecodeParams(gen_length=64, threshold=0.9, eos_ids=())
    return run(engine, engine.add_request(chat(ADD), params, **options))[0]


def test_which_stop_has_matched_is_told():
    whole = spoken()
    assert (whole.finish_reason, whole.stop_reason) == ("length", None)
    stop = tokenizer().convert_tokens_to_ids(END)
    cut = whole.token_ids[: whole.token_ids.index(stop) + 1]
    answer = tokenizer().decode(cut, skip_special_tokens=True)
    for options, reason, text in (
        (dict(stop_token_ids=[stop]), stop, answer),
        (dict(stop=END), END, answer),
        (dict(stop=["never", END], include_stop=True), END, answer + END),
        (dict(stop=["never", END], skip_special_tokens=False), END, answer),
    ):
        output = spoken(**options)
        assert (output.finish_reason, output.stop_reason, output.token_ids, output.text) == ("stop", reason, cut, text)
    word = answer.split()[-1]
    for include in (False, True):
        output = spoken(stop=[word, "never"], include_stop=include)
        assert (output.finish_reason, output.stop_reason) == ("stop", word)
        assert output.text == answer[: answer.index(word)] + word * include


def test_special_tokens_are_text_where_asked_for():
    output = spoken(skip_special_tokens=False)
    assert output.text == tokenizer().decode(output.token_ids) and END in output.text
    assert spoken().text == tokenizer().decode(output.token_ids, skip_special_tokens=True) != output.text


@pytest.mark.parametrize("how", [{}, {"editing_threshold": 0.9}, BY_ENTROPY, CHECKED])
def test_neither_an_eos_nor_a_stop_ends_an_answer_before_it_has_min_tokens(how):
    stops = replace(PLAIN, **how)
    plain = tokens_alone(random_model(), prompt_of(5), stops)
    token = next(token for token in plain if plain.count(token) > 2)
    places = [at for at, one in enumerate(plain) if one == token]
    early = replace(stops, eos_early_stop=True, eos_ids=(token,))
    for least in (1, places[0], places[0] + 1, places[1] + 1, len(plain), 1000):
        end = next((at + 1 for at in places if at >= least), len(plain))
        for params, options, reason in ((early, {}, "eos"), (stops, {"stop_token_ids": [token]}, "stop")):
            engine = small_engine()
            request = engine.add_request(prompt_of(5), params, min_tokens=least, **options)
            output, _ = run(engine, request)
            assert output.token_ids == plain[:end], (least, reason)
            at_end = end < len(plain) or plain[-1] == token and len(plain) > least
            assert output.finish_reason == (reason if at_end else "length")
            assert output.stop_reason == (token if at_end and reason == "stop" else None)
            assert_empty(engine)


def test_a_stop_string_counts_from_min_tokens_on():
    whole = spoken()
    word = whole.text.split()[0]
    assert spoken(stop=word).text == whole.text[: whole.text.index(word)]
    late = spoken(stop=word, min_tokens=40)
    assert len(late.token_ids) >= 40 and whole.token_ids[: len(late.token_ids)] == late.token_ids


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("waiting", [False, True])
def test_a_request_ends_at_its_deadline_as_it_stands(waiting):
    clock = Clock()
    engine = small_engine(clock=clock, max_num_seqs=1)
    first = engine.add_request(prompt_of(6), PLAIN, deadline_s=None if waiting else 5.0)
    second = engine.add_request(prompt_of(7), PLAIN, deadline_s=5.0 if waiting else 50.0)
    late, other = (second, first) if waiting else (first, second)
    while not first.sequence.num_delivered:
        engine.step()
    clock.now = 4.9
    engine.step()
    assert late.output is None
    clock.now = 5.0
    (event,) = [event for event in engine.step() if event.kind == "finish"]
    assert event.output is late.output and late.output.finish_reason == "deadline" and late.output.error is None
    given = late.output.token_ids
    assert given == tokens_alone(random_model(), late.prompt, PLAIN)[: len(given)] and bool(given) != waiting
    while engine.has_work:
        engine.step()
    assert_as_alone(other.output, random_model(), other.prompt, PLAIN)
    assert_empty(engine)


def test_deadlines_of_requests_that_have_ended_are_forgotten():
    engine = small_engine()
    for _ in range(40):
        engine.generate([[1]] * 10, replace(PLAIN, gen_length=2), deadline_s=1e9)
    assert len(engine._deadlines) < 100


def test_prefixes_are_shared_by_the_same_salt_alone():
    engine, prompt = small_engine(), prompt_of(21)
    for salt, shared in ((None, 0), ("a", 0), ("b", 0), ("a", 20), (None, 20), ("b", 20), ("ab", 0)):
        output = engine.generate([prompt], PARAMS[0], cache_salt=salt)[0]
        assert output.shared_tokens == shared, salt
        assert_as_alone(output, random_model(), prompt, PARAMS[0])


def test_samples_of_one_prompt_share_it_and_differ():
    engine, params = small_engine(), DecodeParams(gen_length=12, temperature=1.5, seed=7, eos_ids=())
    prompts = [prompt_of(21), prompt_of(10, 1)]
    outputs = engine.generate(prompts, params, n=3)
    for number, output in enumerate(outputs):
        seed = row_seed(7, number)
        assert_as_alone(output, random_model(), prompts[number // 3], replace(params, seed=seed))
    assert len({tuple(output.token_ids) for output in outputs}) == 6
    assert [output.shared_tokens for output in outputs] == [0, 20, 20, 0, 8, 8]
    for n in (0, -1, 1.0, "3", True):
        with pytest.raises(ValueError, match="^n="):
            engine.generate(prompts, params, n=n)
    with pytest.raises(ValueError, match="^request_id='x': expected None for 3 requests"):
        engine.generate(prompts[:1], params, n=3, request_id="x")


def test_each_prompt_may_have_stops_of_its_own():
    prompts = [prompt_of(5), prompt_of(6, 1), prompt_of(7, 2)]
    whole = [tokens_alone(random_model(), prompt, PLAIN) for prompt in prompts]
    stops = [[whole[0][3]], (), [whole[2][5]]]
    outputs = small_engine().generate(prompts, PLAIN, stop_token_ids=stops)
    wanted = [own[: own.index(stop[0]) + 1] if stop else own for own, stop in zip(whole, stops, strict=True)]
    assert [output.token_ids for output in outputs] == wanted
    engine = Engine(demo_model(), tokenizer=tokenizer())
    answers = engine.generate([chat(ADD)] * 2, DecodeParams(gen_length=64, threshold=0.9), stop=[["e"], ["n", "w"]])
    assert [answer.stop_reason for answer in answers] == ["e", min("nw", key=spoken().text.index)]
    for bad in ([[1], [2]], [[1]] * 4):
        with pytest.raises(ValueError, match="^stop_token_ids=.*: expected those of 3 prompts"):
            small_engine().generate(prompts, PLAIN, stop_token_ids=bad)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("params", [
    PLAIN, EDITING, DecodeParams(gen_length=12, temperature=0.9, seed=5, eos_ids=()), replace(EDITING, **BY_ENTROPY),
    replace(PLAIN, **CHECKED),
])  # fmt: skip
def test_likeliest_tokens_are_those_of_the_write(params, graphs):
    """Under the default profile a token's own log-probability, where it is listed, is that of its write."""
    engine = small_engine(graphs=graphs, capture=False)
    others = [engine.add_request(prompt_of(n), PARAMS[0]) for n in (4, 9)]
    output, commits = run(engine, engine.add_request(prompt_of(6), params, top_logprobs=5))
    assert [one for event in commits for one in event.top_logprobs] == output.top_logprobs
    listed = 0
    for token, logprob, top in zip(output.token_ids, output.logprobs, output.top_logprobs, strict=True):
        assert len(top) == 5 and top == sorted(top, key=lambda entry: (-entry[1], entry[0]))
        if token in dict(top):
            listed += 1
            assert math.isclose(dict(top)[token], logprob, abs_tol=1e-4)
    assert listed > len(output.token_ids) / 2
    assert others[0].output is None or others[0].output.top_logprobs is None
    assert small_engine().generate([prompt_of(6)], params, top_logprobs=5)[0].top_logprobs == output.top_logprobs


def test_limits_of_the_likeliest_tokens():
    with pytest.raises(ValueError, match="^top_logprobs=21: expected an integer in 0..20"):
        small_engine().add_request([1], PLAIN, top_logprobs=21)


def test_first_commits_have_names_of_their_own():
    """Under editing what was committed first differs from what is there in the end."""
    engine = small_engine()
    output = engine.generate([prompt_of(5, 3)], EDITING)[0]
    trace = alone(random_model(), prompt_of(5, 3), EDITING).trace[0]
    firsts = [trace.first_commits()[5 + i] for i in range(len(output.token_ids))]
    assert output.first_token_ids == [event.token for event in firsts] != output.token_ids
    assert output.first_confidences == [event.confidence for event in firsts] != output.confidences
    assert output.first_steps == [event.step for event in firsts]
    assert output.first_logprobs == [math.log(event.confidence) for event in firsts]
    bare = engine.generate([prompt_of(5, 3)], EDITING, trace=False)[0]
    assert bare.first_token_ids is bare.first_confidences is bare.first_logprobs is bare.first_steps is None


@pytest.mark.parametrize("seed", range(12))
def test_streams_under_hf_20_say_what_the_output_has(seed):
    """An early return is cut at the first EOS of prompt and tail, too: nothing is told that the output lacks."""
    params = DecodeParams(gen_length=10, profile="hf-2.0", steps=4, threshold=0.4, eos_early_stop=True, eos_ids=(3, 7))
    engine, prompt = small_engine(), prompt_of(19 + seed % 4, seed)
    output, _ = run(engine, engine.add_request(prompt, params))
    assert output.token_ids == tokens_alone(random_model(), prompt, params)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(stop=["x"] * 17), "^stop=.*at most 16"),
        (dict(stop=["x" * 1025]), "^stop=.*1024 characters"),
        (dict(stop_token_ids=[24]), r"^stop_token_ids=24: expected ids in 0\.\.23"),
        (dict(stop_token_ids=[-1]), "^stop_token_ids=-1"),
        (dict(stop_token_ids=list(range(24)) * 100), "^stop_token_ids=.*at most 1024 ids"),
        (dict(request_id=5), "^request_id=5: expected a string"),
        (dict(request_id=[]), r"^request_id=\[\]: expected a string"),
        (dict(request_id=""), "^request_id=''"),
        (dict(cache_salt=b"x"), "^cache_salt=b'x'"),
        (dict(min_tokens=-1), "^min_tokens=-1"),
        (dict(deadline_s=0), "^deadline_s=0"),
        (dict(deadline_s=float("nan")), "^deadline_s=nan"),
        (dict(include_stop=1), "^include_stop=1"),
        (dict(skip_special_tokens=None), "^skip_special_tokens=None"),
        (dict(top_logprobs=True), "^top_logprobs=True"),
        (dict(trace="yes"), "^trace='yes'"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options, message):
    engine = small_engine(tokenizer=tokenizer())
    for call in (engine.add_request, engine.generate):
        with pytest.raises(ValueError, match=message):
            call([1], PLAIN, **options)
    with pytest.raises(TypeError, match="colour"):
        engine.add_request([1], PLAIN, colour="red")
    assert not engine.has_work


def test_a_batch_is_checked_before_any_of_it_is_begun():
    engine = small_engine(max_waiting=2)
    prompts = [prompt_of(8, i) for i in range(30)]
    for bad, message in (([0] * 600, "prompt 30 has 600 tokens"), ([99], "prompt 30 has"), ([0] * 250, "prompt 30")):
        with pytest.raises(ValueError, match=message):
            engine.generate([*prompts, bad], PLAIN)
    with pytest.raises(ValueError, match="eos_ids"):
        engine.generate(prompts, [*[PLAIN] * 29, replace(PLAIN, eos_ids=tuple(range(9)))])
    assert engine.num_steps == 0 and not engine.has_work


def test_a_bar_over_answers(capsys):
    engine = small_engine(max_num_seqs=2, max_waiting=2)
    engine.generate([prompt_of(5)] * 7, PLAIN, progress=True)
    assert "Answers" in (err := capsys.readouterr().err) and "7/7" in err
    engine.generate([prompt_of(5)] * 7, PLAIN)
    assert not capsys.readouterr().err


def test_eos_is_told_apart_from_stops():
    """An EOS that is a stop id, too, ends the request as an EOS where EOS ends requests, else as a stop."""
    params = DecodeParams(gen_length=40, temperature=1.0, seed=1, eos_ids=(EOS, 4, 9), eos_early_stop=True)
    torch.manual_seed(0)
    early = small_engine().generate([prompt_of(5)], params, stop_token_ids=[EOS, 4, 9])[0]
    assert (early.finish_reason, early.stop_reason) == ("eos", None)
    late = small_engine().generate([prompt_of(5)], replace(params, eos_early_stop=False), stop_token_ids=[EOS, 4, 9])[0]
    assert (late.finish_reason, late.stop_reason, late.token_ids) == ("stop", early.token_ids[-1], early.token_ids)


@pytest.mark.parametrize("seed", range(8))
def test_min_tokens_under_the_model_cards_profiles(seed):
    """Whatever a profile makes of an EOS: the first ones are tokens like others, and no mask is told."""
    for profile in ("hf-2.0", "hf-2.1"):
        params = DecodeParams(gen_length=10, profile=profile, threshold=0.3, eos_early_stop=True, eos_ids=(3, 7, 10))
        whole = tokens_alone(random_model(), prompt_of(6 + seed, seed), replace(params, eos_ids=()))
        output, _ = run(engine := small_engine(), engine.add_request(prompt_of(6 + seed, seed), params, min_tokens=4))
        ends = [at + 1 for at, token in enumerate(whole) if at >= 4 and token in (3, 7, 10)]
        assert output.token_ids == whole[: ends[0] if ends else None]


def test_each_stop_string_counts_from_min_tokens_on_whatever_the_others_are():
    whole = spoken()
    first = whole.text[0]
    assert spoken(stop=first, min_tokens=64).finish_reason == "length"
    for stops in ((first,), (first, "never that long a text"), ("never that long a text", first)):
        assert spoken(stop=stops, min_tokens=64).text == whole.text
        assert spoken(stop=stops, min_tokens=3).text == spoken(stop=first, min_tokens=3).text != ""


def test_samples_of_several_prompts_have_seeds_of_their_own():
    params = DecodeParams(gen_length=12, temperature=1.5, seed=7, eos_ids=())
    outputs = small_engine().generate([prompt_of(5)] * 3, params, n=2)
    assert len({tuple(output.token_ids) for output in outputs}) == 6
    own = small_engine().generate([prompt_of(5)] * 2, [params, replace(params, seed=8)], n=2)
    for output, seed in zip(own, (7, row_seed(7, 1), 8, row_seed(8, 1)), strict=True):
        assert_as_alone(output, random_model(), prompt_of(5), replace(params, seed=seed))


def test_first_commits_of_an_answer_with_masks():
    """Where hf-2.0 has too few steps masks stay in the answer."""
    params = DecodeParams(gen_length=8, profile="hf-2.0", steps=1, minimal_topk=8, threshold=2.0, eos_ids=())
    output = small_engine().generate([prompt_of(4)], params)[0]
    masked = [at for at, step in enumerate(output.steps) if step < 0]
    assert [output.first_steps[at] for at in masked] == [-1] * len(masked)
    assert output.first_token_ids == output.token_ids and output.first_confidences == output.confidences


def test_what_a_preempted_request_shares_is_counted_once():
    engine = small_engine(max_num_seqs=1)
    low = engine.add_request(prompt_of(40), PLAIN, priority=-1)
    for n in range(3):
        while low.sequence.num_delivered < 4 * (n + 1):
            engine.step()
        engine.generate([prompt_of(5, n + 1)], PARAMS[0], priority=n)
    while engine.has_work:
        engine.step()
    assert low.output.preemptions == 3 and low.output.shared_tokens == 40 + 8


def test_a_log_holds_a_text_once():
    engine = Engine(demo_model(), tokenizer=tokenizer())
    request = engine.add_request(chat(ADD), DecodeParams(gen_length=256, threshold=0.9, eos_ids=()))
    while request.output is None:
        engine.step()
    assert len(request.log) > 8 and sum(entry.detokenizer is not None for entry in request.log) == 2
