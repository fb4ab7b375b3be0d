"""Throughput and latency of servers with the OpenAI protocol, side by side under load.

    python benchmarks/serving.py --model FILE.gguf --generation_strategy adaptive --draft_weights int4 \\
        --max_steps 64
    python benchmarks/serving.py --servers http://127.0.0.1:8000 http://127.0.0.1:9000 --clients 1 4 16
    python benchmarks/serving.py --model FILE.gguf --servers here --clients 8 --long_prompt 4000
    python benchmarks/serving.py --model FILE.gguf --generation_strategy adaptive --servers here \\
        --clients 1 8 --pairs 5

Each client sends one request after the other and gets a greedy stream. Its pauses are exponentially
distributed, so requests arrive as a Poisson process. Prompts alternate between chat questions, which need a
chat template, and code of HumanEval.

Servers alternate: each one starts, warms up, gets the load of every number of clients, and ends. `here` is
serve.py with the flags above. `transformers` is `transformers serve` on the same weights, in float16 and in
bfloat16, without and with --continuous-batching; each is another server, since the fastest
depends on the number of clients. They need fastapi, which requirements-dev.txt has. `llama-server` is that of
llama.cpp in PATH, on the same .gguf file. A URL names a running server; --model has the server's tokenizer.

*tokens/s* is all text by the time in which at least one request was open; the tokenizer of --model counts the
tokens of all servers. *first* is the time to the first text in ms at p50 and p95, *between* the time between
pieces of text, also the longest. With --long_prompt, each number of clients is measured twice: alone, and
beside one more client that sends this prompt. The answer to it does not count.

With --pairs, a server answers the same questions with drafts and without ("drafts": false), in turn, that
many times; every turn finds the same prefixes kept. Its table has the quotient x of a pair's tokens/s, at the
median, lowest and highest, and how many answers differ.

The second table compares the
first server with the fastest other one for each number of clients: the median over rounds, and their range.
The last line is one JSON object.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import openai
import pandas
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import GenerationConfig, ModelArguments, at_least, check, parse, refuse
from benchmarks.servers import SERVE, started
from benchmarks.workloads import NAMES, texts
from runs.description import Record, describe, describe_model
from runs.program import run
from runs.startup import load_generator

_PEER = "transformers"
_LLAMA = "llama-server"
_SLOT = 2048  # positions that llama-server has for a client, beside a long prompt
_BARE = {"add_special_tokens": False}
_ANSWERS = 600  # timeout of a request in seconds


@dataclass(frozen=True)
class ServingArguments:
    """The servers and their load."""

    servers: list[str] = field(default_factory=lambda: ["here", _PEER])
    """here, transformers, llama-server, or URLs of running servers; the first is compared with the rest."""
    clients: list[int] = field(default_factory=lambda: [1, 8])
    """Numbers of clients, measured one after the other."""
    questions: int = 4
    """Requests of each client."""
    wait: float = 0.5
    """Mean pause of a client before a request, in seconds."""
    workloads: list[str] = field(default_factory=lambda: ["chat", "code"])
    """Kinds of prompts: chat, code, repeat, translate, summarise, question, maths, retrieve."""
    long_prompt: int = 0
    """Tokens of a prompt that one more client sends in a second measurement; 0: no second measurement."""
    pairs: int = 0
    """Measurements with drafts and without, in turn, of each number of clients; 0: none."""
    rounds: int = 2
    """Starts and measurements of each server."""

    def __post_init__(self) -> None:
        at_least(self, 1, "clients", "questions", "rounds")
        at_least(self, 0, "long_prompt", "pairs")
        check(self, "wait", self.wait > 0, "must be above 0")
        known = all(name in ("here", _PEER, _LLAMA) or name.startswith("http") for name in self.servers)
        check(self, "servers", known, f"must be here, {_PEER}, {_LLAMA} or URLs")
        found = _LLAMA not in self.servers or shutil.which(_LLAMA) is not None
        check(self, "servers", found, f"{_LLAMA} is not in PATH")
        check(self, "workloads", {*self.workloads} <= {*NAMES}, f"must be among {', '.join(NAMES)}")

    def loads(self) -> list[tuple[int, int]]:
        """(number of clients, tokens of the prompt beside them) of each measurement."""
        return [(n, beside) for n in self.clients for beside in sorted({0, self.long_prompt})]


def open_seconds(answers: pandas.DataFrame) -> float:
    """The time in which at least one request was open."""
    in_order = answers.sort_values("began")
    until = in_order["ended"].cummax().shift(fill_value=0.0)  # of the requests before
    return float((in_order["ended"] - in_order["began"].clip(lower=until)).clip(lower=0.0).sum())


async def measure(
    url: str, model: str | None, max_tokens: int, args: ServingArguments, long_prompt: str
) -> dict[tuple[int, ...], list[Record]]:
    """Load -> answers of a server, after a warm-up. The load of a turn of a pair: number of clients, of the
    pair, and whether there are drafts.

    Args:
        model: the model's name; None: the first one that the server lists.
    """
    of_each = [[(name, text) for text in texts()[name]] for name in args.workloads]
    questions = itertools.cycle(itertools.chain.from_iterable(zip(*of_each, strict=True)))
    how: Any = {"api_key": "none", "max_retries": 0, "timeout": _ANSWERS}
    async with openai.AsyncOpenAI(base_url=url, **how) as connection:
        model = model or (await connection.models.list()).data[0].id
        settings: Any = {"model": model, "max_tokens": max_tokens, "temperature": 0, "stream": True}

        async def ask(workload: str, text: str, drafts: bool) -> Record:
            """An answer, with the times of arrival of pieces."""
            came = list[float]()
            pieces = list[str]()
            began = time.perf_counter()
            how = settings if drafts else settings | {"extra_body": {"drafts": False}}
            if workload == "code":
                stream = await connection.completions.create(prompt=text, **how)
            else:
                messages: Any = [{"role": "user", "content": text}]
                stream = await connection.chat.completions.create(messages=messages, **how)
            async for chunk in stream:
                for choice in chunk.choices:
                    if piece := choice.text if workload == "code" else choice.delta.content:
                        came.append(time.perf_counter())
                        pieces.append(piece)
            return {"began": began, "came": came, "ended": time.perf_counter(), "text": "".join(pieces)}

        async def talk(
            asked: Sequence[tuple[str, str]], wait: float, seed: int, drafts: bool = True
        ) -> list[Record]:
            """One client's requests, one after the other."""
            pause = random.Random(seed)
            answers = []
            for question in asked:
                await asyncio.sleep(pause.expovariate(1 / wait))
                answers.append(await ask(*question, drafts))
            return answers

        async def load(clients: int, each: int, wait: float, beside: str = "") -> list[Record]:
            """The answers to so many clients with `each` requests; one more sends the prompt `beside`."""
            talks = [talk([*itertools.islice(questions, each)], wait, seed) for seed in range(clients)]
            more = [talk([("code", beside)], 2 * wait, clients)] if beside else []
            answers = await asyncio.gather(*talks, *more)
            return [*itertools.chain.from_iterable(answers[:clients])]

        await load(max(args.clients), len(args.workloads), wait=0.01)
        if not args.pairs:
            return {
                (n, beside): await load(n, args.questions, args.wait, long_prompt if beside else "")
                for n, beside in args.loads()
            }
        turns: dict[tuple[int, ...], list[Record]] = {}
        for clients in args.clients:
            asked = [[*itertools.islice(questions, args.questions)] for _ in range(clients)]
            for number in range(args.pairs + 1):  # the first pair is a warm-up
                for drafts in (True, False) if number % 2 else (False, True):
                    talks = [talk(turns, 0.01, seed, drafts) for seed, turns in enumerate(asked)]
                    answers = itertools.chain.from_iterable(await asyncio.gather(*talks))
                    turns[clients, number, drafts] = [*answers]
            del turns[clients, 0, False], turns[clients, 0, True]
        return turns


def text_of(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> str:
    """Code of so many tokens."""
    ids = tokenizer.encode("\n".join(texts()["code"]), **_BARE)
    return tokenizer.decode([*itertools.islice(itertools.cycle(ids), num_tokens)])


def commands(
    model_args: ModelArguments, config: GenerationConfig, args: ServingArguments, saved: Path
) -> dict[str, list[str] | None]:
    """Server -> the command that starts it, in the order of --servers; None: it runs already.

    Args:
        saved: the folder of the model for transformers.
    """
    given = [
        word
        for group in (model_args, config)
        for flag in fields(group)
        if (value := getattr(group, flag.name)) != getattr(type(group)(), flag.name)
        for word in (f"--{flag.name}", *map(str, value if isinstance(value, list) else [value]))
    ]
    slots = max(args.clients) + bool(args.long_prompt)
    here = [*SERVE, *given, "--batch_size", str(slots)]
    llama = [_LLAMA, "--model", str(model_args.model_name), "--parallel", str(slots)]
    llama += ["--ctx-size", str(slots * (_SLOT + args.long_prompt))]  # of all slots together
    llama += ["--threads", str(model_args.threads or len(os.sched_getaffinity(0)))]
    program = str(Path(sys.executable).with_name("transformers"))
    peers = {
        f"{_PEER} {dtype}{name}": [program, "serve", str(saved), "--dtype", dtype, *more]
        for name, more in (("", []), (" batching", ["--continuous-batching"]))
        for dtype in ("float16", "bfloat16")
    }
    kinds: dict[str, dict[str, list[str] | None]] = {"here": {"here": here}, _LLAMA: {_LLAMA: llama}}
    kinds[_PEER] = {**peers}
    ways: dict[str, list[str] | None] = {}
    for server in args.servers:
        ways |= kinds.get(server, {server: None})
    return ways


def figures(answers: pandas.DataFrame) -> pandas.Series:
    """Of all answers of one server and load."""
    by_round = answers.groupby("round")
    tokens = by_round["tokens"].sum()
    seconds = by_round[["began", "ended"]].apply(open_seconds)
    gaps = [numpy.diff([answer.began, *answer.came]) for answer in answers.itertuples() if answer.came]
    first = [times[0] for times in gaps]
    between = numpy.concatenate([times[1:] for times in gaps])
    found = {"answers": len(answers), "tokens/s": tokens.sum() / seconds.sum()}
    for name, times in (("first", first), ("between", between)):
        found |= {f"{name} p{percent}": 1000 * numpy.percentile(times, percent) for percent in (50, 95)}
    found["between max"] = 1000 * between.max()
    return pandas.Series({**found, "speeds": (tokens / seconds).tolist()})


def ahead(rows: pandas.DataFrame) -> pandas.Series:
    """Compare the first server with the fastest other one, by rows of one load."""
    first = rows.iloc[0]
    remaining = rows.iloc[1:]
    other = remaining.loc[remaining["tokens/s"].astype(float).idxmax()]
    x = numpy.divide(first["speeds"], other["speeds"])
    return pandas.Series({"other": other["server"], "x": numpy.median(x), "low": x.min(), "high": x.max()})


def gains(turns: Sequence[Record]) -> pandas.DataFrame:
    """The speed with drafts over that without, of each number of clients."""
    sides = pandas.DataFrame(turns).pivot(index=["clients", "pair"], columns="drafts")
    plain, drafted = (sides.xs(drafts, axis=1, level="drafts") for drafts in (False, True))
    pairs = pandas.DataFrame({"plain tokens/s": plain["speed"], "x": drafted["speed"] / plain["speed"]})
    texts_of = zip(plain["texts"], drafted["texts"], strict=True)
    pairs["differ"] = [sum(a != b for a, b in zip(*both, strict=True)) for both in texts_of]
    columns = {
        "pairs": ("x", "size"), "plain tokens/s": ("plain tokens/s", "median"), "x": ("x", "median"),
        "low": ("x", "min"), "high": ("x", "max"), "differ": ("differ", "sum"),
    }  # fmt: skip
    return pairs.groupby("clients").agg(**columns).reset_index()


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, ServingArguments)
    model_args, config, args = parse(__doc__ or "", *groups, args=argv)
    if config.max_steps < 2:
        refuse(f"--max_steps {config.max_steps}: must be at least 2, nothing lies between pieces of one")
    if _LLAMA in args.servers and not str(model_args.model_name).endswith(".gguf"):
        refuse(f"--model {model_args.model_name}: must be a .gguf file, which {_LLAMA} can read")
    generator = load_generator(model_args, config)
    tokenizer = generator.tokenizer
    long_prompt = text_of(tokenizer, args.long_prompt)
    about = describe_model(Path(model_args.model_name).name, generator.model)
    about |= describe("serving", (model_args, config, args))
    with TemporaryDirectory() as name:
        folder = Path(name)
        if _PEER in args.servers:
            generator.model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        del generator  # the servers need the memory
        ways = commands(model_args, config, args, folder)
        found: list[pandas.DataFrame] = []
        order = [*ways] * 2  # servers take turns in going first
        starts = [(number, number % len(ways)) for number in range(args.rounds)]
        for number, server in ((n, name) for n, at in starts for name in order[at : at + len(ways)]):
            way = ways[server]
            start = contextlib.nullcontext(server) if way is None else started(server, way)
            with start as address:
                try:
                    called = str(folder) if server.startswith(_PEER) else None
                    given = asyncio.run(measure(f"{address}/v1", called, config.max_steps, args, long_prompt))
                except openai.OpenAIError as error:
                    refuse(f"--servers {server}: {error}", status=1)
            if args.pairs:
                turns = [
                    {"clients": clients, "pair": pair, "drafts": bool(drafts), "texts": texts_of}
                    | {
                        "speed": sum(len(tokenizer.encode(text, **_BARE)) for text in texts_of)
                        / open_seconds(pandas.DataFrame(answers))
                    }
                    for (clients, pair, drafts), answers in given.items()
                    for texts_of in [[answer["text"] for answer in answers]]
                ]
                paired = gains(turns)
                print(f"round {number + 1}, {server}: with drafts over without")
                print(paired.to_string(index=False, float_format="{:.2f}".format), flush=True)
                about.setdefault("pairs", []).append({"server": server, "rows": paired.to_dict("records")})
                continue
            for (clients, beside), answers in given.items():
                place = {"clients": clients, "long prompt": beside, "server": server, "round": number}
                turn = pandas.DataFrame(answers).assign(**place)
                turn["tokens"] = [len(tokenizer.encode(text, **_BARE)) for text in turn.pop("text")]
                found.append(turn)
                load = f"clients {clients}" + (f" and a prompt of {beside} tokens" if beside else "")
                speed = f"{turn['tokens'].sum() / open_seconds(turn):.1f} tokens/s"
                print(f"round {number + 1}, {server}, {load}: {speed}", flush=True)
    if args.pairs:
        print(json.dumps(about))
        return 0
    by_load = ["clients", "long prompt"]
    every = pandas.concat(found).sort_values(by_load, kind="stable")
    rows = every.groupby([*by_load, "server"], sort=False)[every.columns].apply(figures).reset_index()
    print("\n" + rows.drop(columns="speeds").to_string(index=False, float_format="{:.1f}".format))
    compared = pandas.DataFrame()
    if len(ways) > 1:
        compared = rows.groupby(by_load, sort=False)[rows.columns].apply(ahead).reset_index()
        print(f"\nspeed-up of {rows['server'][0]} over the fastest other server")
        print(compared.to_string(index=False, float_format="{:.2f}".format))
    about |= {"rows": rows.to_dict("records"), "ahead": compared.to_dict("records")}
    print(json.dumps(about))
    return 0


if __name__ == "__main__":
    run(main)
