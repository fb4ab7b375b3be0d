"""What the number format of keys and values changes: milliseconds a token over the length of the context, and
answers; and what rows cost that share the beginning of their prompts.

    python benchmarks/long_contexts.py --depths 64 2000 4000 --save depths
    python benchmarks/long_contexts.py --prompt_tokens 300 2000 --num_prompts 20
    python benchmarks/long_contexts.py --rows 8 --shared 1500

Formats alternate in one process over the same weights. *ms* is a pass over one token and the logits, without
sampling.

The second table compares greedy answers with those of keys and values in float32. *equal* is the share of
whole answers; an answer is equal if the format has the next token at each position. *tokens* is the share of
positions. *KL* is the mean divergence of the next token, in nats; *gap* the largest distance of two logits in
float32 of which the format prefers the lower one. transformers in bfloat16 stands beside transformers in
float32, along the same answers. Prompts are pieces of Python's library and of the pages here, in turn until
the pages end.

The third table has tokens/s of rows side by side, and MiB of their keys and values. Each row is behind 64
tokens, behind --shared tokens that it alone has, or behind as many that are kept once for all rows.
"""

import json
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any, cast, get_args

import pandas
import torch
from torch import Tensor
from torch.nn.functional import kl_div

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import GenerationConfig, ModelArguments, at_least, check, parse
from benchmarks.peers import plain_copy
from measures.plots import pyplot, save
from runs.description import Record, describe, describe_model, heading
from runs.program import run
from runs.startup import load_generator
from self_speculation.backends.buffers import PREFIX_BLOCK, SharedPrefix
from self_speculation.backends.kv_cache import KVCache
from self_speculation.backends.runner import ModelRunner
from self_speculation.backends.runners import eager_runner
from self_speculation.config import CacheDtypeName

DTYPES = [name for name in get_args(CacheDtypeName) if name != "auto"]
PEER = "transformers, bfloat16"
PIECE = 1024  # tokens of a prompt in a pass


@dataclass(frozen=True)
class ContextArguments:
    """How much to measure."""

    depths: list[int] = field(default_factory=list)
    """Positions before a token, for milliseconds."""
    formats: list[str] = field(default_factory=lambda: [*DTYPES])
    """Formats of keys and values, float32 among them: float32, float16, bfloat16."""
    rounds: int = 5
    """Turns of each depth and format, of 8 tokens each."""
    prompt_tokens: list[int] = field(default_factory=list)
    """Lengths of prompts, for answers."""
    num_prompts: int = 10
    """Prompts of each length."""
    answer_tokens: int = 64
    """Tokens of an answer."""
    num_peer_prompts: int = 0
    """Prompts of each length that transformers reads, too."""
    save: str | None = None
    """Path without suffix: all figures as JSON and, of depths, a picture."""
    rows: int = 8
    """Rows of --shared."""
    shared: int = 0
    """Tokens that the prompts of --rows share."""
    points: list[float] = field(default_factory=list)
    """Milliseconds at each depth by another program, for the picture."""
    points_of: str = "another program"
    """The program, and when it was measured."""

    def __post_init__(self) -> None:
        at_least(self, 0, "shared")
        at_least(self, 1, "rows", "depths", "rounds", "prompt_tokens", "num_prompts", "answer_tokens")
        at_least(self, 0, "num_peer_prompts")
        are_known = "float32" in self.formats and {*self.formats} <= {*DTYPES}
        allowed = f"must be one for each of the {len(self.depths)} depths, or none"
        check(self, "points", len(self.points) in (0, len(self.depths)), allowed)
        check(self, "formats", are_known, f"must be among {', '.join(DTYPES)}, float32 among them")


def show(rows: list[Record]) -> None:
    table = pandas.DataFrame(rows).to_string(index=False, float_format="{:.4g}".format)
    print(f"\n{table}", flush=True)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, ContextArguments)
    model_args, config, args = parse(__doc__ or "", *groups, args=argv)
    generator = load_generator(model_args, config)
    about = describe("long_contexts", (model_args, config)) | describe_model(
        model_args.model_name, generator.model
    )
    about["arguments"]["dataset"] = "pieces of files"
    print(heading(about))
    runner = eager_runner(generator.model)
    num_tokens = (
        max([args.shared, *args.depths, *(args.num_prompts * length for length in args.prompt_tokens)]) + 1
    )
    ids = generator.tokenizer.encode(_text(num_tokens), add_special_tokens=False)
    depths = pandas.DataFrame(times(runner, ids, args))
    if len(depths):
        print(f"\n{depths.pivot(index='dtype', columns='depth', values='ms').round(2)}", flush=True)
    answers = list[Record]()
    for length in args.prompt_tokens:
        prompts = [ids[n * length : (n + 1) * length] for n in range(args.num_prompts)]
        answers += differences(runner, prompts, args)
        show(answers)
    if args.shared:
        show(sharing(runner, ids, args))
    if args.save is not None:
        path = Path(args.save)
        found = {**about, "depths": depths.to_dict("records"), "answers": answers}
        path.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
        if len(depths):
            draw(depths, args, heading(about), path)
    return 0


def _text(num_tokens: int) -> str:
    """Python's library and the pages of this repository, 3,000 characters of each in turn until the pages
    end; enough for so many tokens.
    """
    library = Path(sysconfig.get_path("stdlib"))
    pages = Path(__file__).parent.parent / "docs"
    pieces = list[list[str]]()
    for files in (library.glob("[a-h]*.py"), pages.glob("*.md")):
        text = "".join(each.read_text("utf-8") for each in sorted(files))
        pieces.append([text[at : at + 3000] for at in range(0, len(text), 3000)])
    pairs = zip_longest(*pieces, fillvalue="")
    return "".join(part for pair in pairs for part in pair)[: 8 * num_tokens]


def times(runner: ModelRunner, ids: Sequence[int], args: ContextArguments) -> list[Record]:
    """Median milliseconds of a token at each depth, by format."""
    if not args.depths:
        return []
    longest = max(args.depths)
    caches = {name: _cache_after(runner, [*ids[:longest]], longest + 8, name)[0] for name in args.formats}
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.rounds + 1):
        for depth in args.depths:
            for name, cache in caches.items():
                cache.set_rows([depth])
                token = torch.tensor([[ids[depth]]])
                began = time.perf_counter()
                for _ in range(8):
                    token = runner.run(cache, token).logits.argmax(-1)
                found.setdefault((name, depth), []).append((time.perf_counter() - began) / 8 * 1e3)
    return [
        {"dtype": name, "depth": depth, "ms": median(turns[1:]), "least": min(turns), "most": max(turns[1:])}
        for (name, depth), turns in found.items()
    ]


def _cache_after(
    runner: ModelRunner, prompt: list[int], num_positions: int, name: str
) -> tuple[KVCache, Tensor]:
    """A cache with a prompt, and the logits [V] after it."""
    cache = runner.new_cache(len(prompt), num_positions, dtype=cast(CacheDtypeName, name))
    view = cache.prompt_view(0)
    for start in range(0, len(prompt), PIECE):
        logits = runner.run(view, torch.tensor([prompt[start : start + PIECE]])).logits
    cache.set_rows([len(prompt)])
    return cache, logits[0, -1]


def _answer(runner: ModelRunner, prompt: list[int], number: int) -> tuple[list[int], Tensor]:
    """The greedy tokens after a prompt with keys and values in float32, and their logits [number, V]."""
    cache, last = _cache_after(runner, prompt, len(prompt) + number, "float32")
    logits = [last]
    for _ in range(number - 1):
        logits.append(runner.run(cache, logits[-1].argmax()[None, None]).logits[0, -1])
    return [int(each.argmax()) for each in logits], torch.stack(logits)


def _logits_along(runner: ModelRunner, prompt: list[int], answer: Sequence[int], name: str) -> Tensor:
    """[N, V] logits of the answer's positions: the bits of plain decoding, since a pass changes none."""
    cache, last = _cache_after(runner, prompt, len(prompt) + len(answer), name)
    rest = runner.run(cache, torch.tensor([[*answer[:-1]]]), num_logits=len(answer) - 1).logits[0]
    return torch.cat((last[None], rest))


def differences(runner: ModelRunner, prompts: Sequence[list[int]], args: ContextArguments) -> list[Record]:
    """Rows of the second table, for prompts of one length."""
    number = args.answer_tokens
    found: dict[str, list[Record]] = {name: [] for name in args.formats if name != "float32"}
    answers = list[tuple[list[int], list[int]]]()
    for prompt in prompts:
        answer, expected = _answer(runner, prompt, number)
        answers.append((prompt, answer))
        for name, compared in found.items():
            compared.append(_compared(expected, _logits_along(runner, prompt, answer, name)))
    if args.num_peer_prompts:
        found[PEER] = _peer(runner, answers[: args.num_peer_prompts])
    length = len(prompts[0])
    return [{"format": name, "prompt": length, **_summary(compared)} for name, compared in found.items()]


def _peer(runner: ModelRunner, answers: Sequence[tuple[list[int], list[int]]]) -> list[Record]:
    """transformers in bfloat16 and in float32, one after the other: memory has one copy of the model."""
    logits = list[list[Tensor]]()
    for dtype in (torch.float32, torch.bfloat16):
        model: Any = plain_copy(runner.model, dtype)
        logits.append([])
        for prompt, answer in answers:
            ids = torch.tensor([[*prompt, *answer[:-1]]])
            logits[-1].append(model(ids, logits_to_keep=len(answer)).logits[0].float())
        del model
    return [_compared(*pair) for pair in zip(*logits, strict=True)]


def sharing(runner: ModelRunner, ids: Sequence[int], args: ContextArguments) -> list[Record]:
    """Rows of the third table."""
    whole = (args.shared - 1) // PREFIX_BLOCK * PREFIX_BLOCK
    found: dict[tuple[str, str], list[float]] = {}
    bytes_of: dict[tuple[str, str], int] = {}
    caches: dict[tuple[str, str], tuple[KVCache, int]] = {}
    for name in args.formats:
        for kind, length in (("64 each", 64), ("not shared", args.shared), ("shared", args.shared)):
            cache = runner.new_cache(length, length + 8, args.rows, cast(CacheDtypeName, name))
            cache.set_rows([])
            first = 0
            if kind == "shared":
                place = cache.buffers.num_slots
                runner.run(cache.prompt_view(place), torch.tensor([ids[:whole]]), num_logits=0)
                first = whole
            for row in range(args.rows):
                if first:
                    cache.set_prefix(row, SharedPrefix(place, first))
                view = cache.prompt_view(row, [first])
                runner.run(view, torch.tensor([ids[first:length]]), num_logits=0)
                cache.set_rows([*cache.lengths(), length])
            caches[name, kind] = cache, length
            positions = sum(cache.buffers.num_used) - sum(
                each.length for each in cache.buffers.shared_prefixes
            )
            position = sum(part[0, :, 0].nbytes for part in cache.buffers.all())
            bytes_of[name, kind] = positions * position
    for _ in range(args.rounds + 1):
        for key, (cache, length) in caches.items():
            cache.set_rows([length] * args.rows)
            tokens = torch.tensor([[ids[0]]] * args.rows)
            began = time.perf_counter()
            for _ in range(4):
                tokens = runner.run(cache, tokens).logits.argmax(-1)
            found.setdefault(key, []).append(4 * args.rows / (time.perf_counter() - began))
    return [
        {"format": name, "rows": kind, "tokens/s": median(turns[1:]), "MiB": bytes_of[name, kind] / 2**20}
        for (name, kind), turns in found.items()
    ]


def _compared(expected: Tensor, found: Tensor) -> Record:
    """What two logits [N, V] of an answer differ in."""
    best = expected.argmax(-1)
    chosen = found.argmax(-1)
    same = best == chosen
    logs = expected.log_softmax(-1)
    divergence = kl_div(found.log_softmax(-1), logs, reduction="none", log_target=True)
    both = [expected.gather(1, ids[:, None]) for ids in (best, chosen)]
    return {
        "equal": bool(same.all()), "tokens": float(same.float().mean()),
        "KL": float(divergence.sum(-1).mean()), "gap": float((both[0] - both[1]).max()),
    }  # fmt: skip


def _summary(compared: Sequence[Record]) -> Record:
    """Means over the answers, and the largest gap."""
    table = pandas.DataFrame(compared)
    means = table[["equal", "tokens", "KL"]].mean().to_dict()
    return {"answers": len(table), **means, "gap": table["gap"].max()}


def draw(table: pandas.DataFrame, args: ContextArguments, title: str, path: Path) -> None:
    """Draw milliseconds over the depth."""
    figure, axes = pyplot.subplots(figsize=(7.0, 4.0), constrained_layout=True)
    for name, rows in table.groupby("dtype", sort=False):
        axes.plot(rows["depth"], rows["ms"], marker="o", label=f"here, keys and values in {name}")
    if args.points:
        axes.plot(args.depths, args.points, "x", color="grey", label=args.points_of)
    axes.set(xlabel="tokens before it", ylabel="milliseconds of a token", ylim=(0, None))
    axes.legend()
    save(figure, title, path)


if __name__ == "__main__":
    run(main)
