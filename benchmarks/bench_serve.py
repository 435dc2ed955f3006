"""Many requests to a server of OpenAI's API: tokens per second, and how long a request waits for what.

    llada2-fast bench serve [--base-url URL] [--num-prompts N] [--max-concurrency N] [--request-rate R]
                            [--prompts FILE] [--extra-body JSON] [--quick] [--json] [--save [FOLDER]] [--plot FILE]
    llada2-fast bench serve --against-engine [--quick] [--json] [--save [FOLDER]]

Any server will do; without --base-url `llada2-fast serve` is started with the embedded model, and stopped at the end.
Requests are streamed, and sent as others end, or as they arrive at --request-rate and there is room. Key names and
meanings are those of `vllm bench serve` (latencies.py): times count from the sending of a request, text arrives in
chunks, e2el is until the stream's end; with a rate, client_queue is from a request's arrival to its sending. Tokens are
those of the server's usage; where it tells none, chunks with text are counted instead, and the output says so.
tokens_per_forward and denoise_forwards are there if the server's usage has denoise_forwards. What failed is counted by
kind and is in no other figure; exit code 1 if everything has. The card is that of the client's machine.

With --against-engine, what HTTP costs: see http_cost.py.
"""

import argparse
import asyncio
import json
import math
import os
import sys
import time
from collections import Counter
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from . import harness, http_client, http_cost, latencies
from .harness import positive
from .own_server import serving
from .workload import questions

PATIENCE_S = 10.0  # for /v1/models and /version


def chats(args, count):
    """The prompts: conversations, or texts where the endpoint is of completions. ValueError if the file has others."""
    if args.prompts is None:
        found = questions(count, args.seed)
    else:
        try:
            lines = args.prompts.read_text("utf-8").split("\n")
        except OSError as error:
            raise ValueError(f"--prompts {args.prompts}: {error.strerror}") from None
        found = [_prompt(line, f"{args.prompts}:{at}", args) for at, line in enumerate(lines, 1) if line.strip()]
        if not found:
            raise ValueError(f"--prompts {args.prompts}: expected a prompt a line, got none")
    found = [found[i % len(found)] for i in range(count)]
    if args.endpoint == "completions":
        return found
    return [[{"role": "user", "content": one}] if isinstance(one, str) else one for one in found]


def _prompt(line, where, args):
    if args.prompts.suffix != ".jsonl":
        return line
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    entry = entry if isinstance(entry, dict) else {}
    if isinstance(entry.get("prompt"), str):
        return entry["prompt"]
    if isinstance(entry.get("messages"), list) and args.endpoint == "chat":
        return entry["messages"]
    known = '"prompt" or "messages"' if args.endpoint == "chat" else '"prompt"'
    raise ValueError(f"{where}: expected an object with {known}, got {line[:80]!r}")


async def get(session, url):
    """(status, text) of a GET. SystemExit if nobody answers."""
    import aiohttp

    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as response:
            return response.status, await response.text(errors="replace")
    except (aiohttp.ClientError, OSError, TimeoutError, asyncio.TimeoutError) as error:
        raise SystemExit(f"{url}: {error or type(error).__name__}") from None


async def first_model(session, base_url):
    """The name of the first of /v1/models. SystemExit if there is none."""
    status, text = await get(session, f"{base_url}/v1/models")
    try:
        return json.loads(text)["data"][0]["id"]
    except (ValueError, LookupError, TypeError):
        raise SystemExit(f"{base_url}/v1/models: expected a list of models, got {status}: {text[:200]}") from None


async def version(session, base_url):
    """What /version says, or None: few servers have it."""
    status, text = await get(session, f"{base_url}/version")
    if status != 200:
        return None
    try:
        return json.loads(text)
    except ValueError:  # a page of a proxy's
        return None


async def measure(args, base_url, prompts):
    """(answers, seconds, facts) of the whole run."""
    url = base_url + http_client.PATHS[args.endpoint]
    async with http_client.open_session(args.api_key or os.environ.get("OPENAI_API_KEY"), args.timeout) as session:
        model = args.model or await first_model(session, base_url)
        facts = {"model": model, "server": await version(session, base_url)}
        asked = {"model": model, "max_tokens": args.max_tokens} | args.extra_body
        first, *rest = http_client.bodies(args.endpoint, prompts, **asked)
        (warm_up,) = await http_client.run(session, url, [first], 1)
        if warm_up.error:
            print(f"the request before the clock failed: {warm_up.error}: {warm_up.message}")
        rated = args.request_rate < math.inf
        due = http_client.arrivals(len(rest), args.request_rate, args.seed) if rated else None
        with tqdm(total=len(rest), unit="request", disable=not args.progress) as bar:
            cpu, begun = time.process_time(), time.perf_counter()
            answers = await http_client.run(session, url, rest, args.max_concurrency, due, lambda _: bar.update())
            seconds = time.perf_counter() - begun
        return answers, seconds, facts | {"client_cpu_s": time.process_time() - cpu}


def summary(answers, seconds, rated=False):
    """What a run of so many seconds says, as it stands in the JSON line. rated: whether requests arrived at a rate."""
    done = [answer for answer in answers if answer.error is None]
    tokens, forwards = sum(answer.num_tokens for answer in done), http_client.total(done, "denoise_forwards")
    by_usage = http_client.total(done, "completion_tokens") is not None
    queue = [1e3 * (answer.sent - answer.due) for answer in done]
    return {
        "duration": seconds,
        "completed": len(done),
        "failed": len(answers) - len(done),
        "errors": dict(Counter(answer.error for answer in answers if answer.error)),
        "total_input_tokens": http_client.total(done, "prompt_tokens"),
        "total_output_tokens": tokens,
        "tokens_counted_by": ("usage" if by_usage else "chunks") if done else None,
        "request_throughput": len(done) / seconds,
        "output_throughput": tokens / seconds,
        "denoise_forwards": forwards,
        "tokens_per_forward": tokens / max(1, forwards) if forwards is not None and by_usage else None,
        **latencies.figures(done),
        **(harness.spread("client_queue_ms", queue) if rated else {}),
    }


def report(results, answers):
    print(
        f"{results['completed']} requests, {results['failed']} failed: {results['output_throughput']:.1f} tokens/s, "
        f"{results['request_throughput']:.2f} requests/s"
        + (f", TPF {results['tokens_per_forward']:.2f}" if results["tokens_per_forward"] is not None else "")
    )
    if results["tokens_counted_by"] == "chunks":
        print("not every answer told its usage: tokens are chunks with text where it is missing")
    if results["completed"]:
        queue = {"client_queue_ms": "until it was sent, ms"} if "mean_client_queue_ms" in results else {}
        latencies.print_latencies(results, queue)
    for kind, count in results["errors"].items():
        example = next(answer.message for answer in answers if answer.error == kind)
        print(f"failed, {kind}: {count}, e.g. {example}")


def _options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    harness.add_options(parser)
    add = parser.add_argument
    add("--base-url", type=_base_url, metavar="URL", help="of the server; else one is started, the embedded model's")
    add("--api-key", metavar="KEY", help="sent as a bearer token; else the environment's OPENAI_API_KEY")
    add("--model", metavar="NAME", help="as the server calls it; else the first of its /v1/models")
    add("--endpoint", choices=http_client.PATHS, default="chat", help="of /v1 (chat)")
    add("--num-prompts", type=positive, metavar="N", help="requests (64, with --quick 16)")
    add("--max-concurrency", type=positive, default=16, metavar="N", help="requests in flight at most (16)")
    add("--request-rate", type=float, default=math.inf, metavar="R", help="arrivals per second (inf: all at once)")
    add("--max-tokens", type=positive, default=128, metavar="N", help="of an answer (128)")
    add("--seed", type=int, default=0, metavar="N", help="of the prompts and of the arrivals (0)")
    add("--extra-body", type=_object, default={}, metavar="JSON", help="more fields of a request; null takes one away")
    add("--prompts", type=Path, metavar="FILE", help='a prompt a line; .jsonl: {"prompt": ...} or {"messages": ...}')
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds for a request (600)")
    add("--against-engine", action="store_true", help="what HTTP costs, beside an engine in a process of its own")
    add("--num-rounds", type=positive, metavar="N", help="of --against-engine (5, with --quick 2)")
    add("--direct-engine", action="store_true", help=argparse.SUPPRESS)  # to be that process
    add("--no-progress", dest="progress", action="store_false", help="no progress bar")
    harness.add_plot_option(parser, "the distribution of the latencies")
    return parser


def _base_url(text):
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise argparse.ArgumentTypeError(f"{text}: expected http://HOST:PORT")
    return text.rstrip("/").removesuffix("/v1")


def _object(text):
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text}: expected a JSON object")
    return value


def against_engine(parser, args):
    """--against-engine, to its JSON line."""
    for name in ("base_url", "prompts", "model", "plot"):
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')}: not with --against-engine, which has the embedded model's own")
    if args.endpoint != "chat" or args.request_rate < math.inf:
        parser.error("--against-engine: expected --endpoint chat and no --request-rate")
    rounds, size = 1 + (args.num_rounds or (2 if args.quick else 5)), args.num_prompts
    prompts = chats(args, rounds * size)
    results = http_cost.against_engine(args, [prompts[at : at + size] for at in range(0, len(prompts), size)])
    http_cost.report(results)
    head = {
        "model": "embedded", "num_prompts": size, "num_rounds": rounds - 1, "max_tokens": args.max_tokens,
        "max_concurrency": args.max_concurrency, "extra_body": args.extra_body,
    }  # fmt: skip
    harness.finish("http", args, head | results)


def main(argv=None):
    parser = _options()
    args = parser.parse_args(argv)
    if args.direct_engine:
        return http_cost.answer_lines(sys.stdin, args.max_concurrency)
    harness.check_save(parser, args, "http" if args.against_engine else "serve")
    if find_spec("aiohttp") is None:
        parser.error('needs aiohttp: pip install "llada2-fast[bench]"')
    for name in ("request_rate", "timeout"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a number above 0")
    args.num_prompts = args.num_prompts or (16 if args.quick else 64)
    if args.against_engine:
        return against_engine(parser, args)
    prompts = chats(args, 1 + args.num_prompts)  # the first is for the request before the clock
    with serving() if args.base_url is None else nullcontext() as own:
        answers, seconds, facts = asyncio.run(measure(args, args.base_url or own.url, prompts))
    rated = args.request_rate < math.inf
    results = summary(answers, seconds, rated)
    report(results, answers)
    done = [answer for answer in answers if answer.error is None]
    if args.plot and done:
        latencies.plot(done, args.plot)
    head = {
        "base_url": args.base_url or "started", **facts, "endpoint": args.endpoint, "num_prompts": args.num_prompts,
        "prompts": "questions" if args.prompts is None else str(args.prompts), "max_tokens": args.max_tokens,
        "max_concurrency": args.max_concurrency, "request_rate": args.request_rate if rated else "inf",
        "extra_body": args.extra_body, "seed": args.seed,
    }  # fmt: skip
    harness.finish("serve", args, head | results)
    return 0 if done else 1


if __name__ == "__main__":
    raise SystemExit(main())
