"""The work of equality.py: ask a server for the same answers in several ways, and compare them. No torch."""

import csv
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import NormalDist, median
from typing import NamedTuple, NoReturn

from tqdm import tqdm

import self_speculation
from arguments import JSONObject, at_least, check, key_values, refuse
from data import DataArguments, Example
from measures.openai_client import Server, ServerError
from runs.status import print_status

_TOP = 5  # log-probabilities at each token, as many as a completion may have
_CONFIDENCE = 0.9
_SHOWN = 40  # characters of an answer at the first difference
_COLUMNS = (
    "prompt", "picking", "way", "seconds", "num_tokens", "drafted", "accepted", "finish_reason", "error",
    "text",
)  # fmt: skip


class Way(NamedTuple):
    """A way to ask."""

    together: bool = False  # several clients at once
    stream: bool = False
    drafts: bool = True


WAYS = {
    "alone": Way(),
    "again": Way(),
    "stream": Way(stream=True),
    "together": Way(together=True),
    "no_drafts": Way(drafts=False),
    "no_drafts_together": Way(together=True, drafts=False),
}


@dataclass(frozen=True)
class EqualityArguments:
    """The server, and how it is asked."""

    model: str | None = None
    """Name of the model; without it, the first one that the server lists."""
    url: str = "http://127.0.0.1:8000"
    """Address of the server, with /v1 or without."""
    api_key: str | None = None
    """Key for the server. Prefer the environment variable OPENAI_API_KEY: other users of this machine can see
    a command line."""
    ways: list[str] = field(default_factory=lambda: [*WAYS])
    """Ways to ask, two or more: alone, again, stream, together (--clients at once), no_drafts,
    no_drafts_together."""
    clients: int = 8
    """Requests at once in the ways that are together."""
    picking: list[str] = field(default_factory=lambda: ["greedy", "sampled"])
    """Greedy answers, sampled ones, or both."""
    max_steps: int = 64
    """Most tokens of an answer."""
    temperature: float = 0.8
    """Temperature of sampled answers."""
    seed: int = 42
    """Seed of the prompts, and of the first prompt's sampled answer; the next prompt has the seed plus 1."""
    no_drafts: str = '{"drafts": false}'
    """Fields of a request that switch drafts off, as JSON or k=v,k=v."""
    extra_body: str | None = None
    """More fields of every request, as JSON or k=v,k=v."""
    near_tie: float = 0.25
    """Largest difference of two log-probabilities in a near-tie."""
    timeout: float = 600.0
    """Seconds after which an answer counts as missing."""
    output_dir: str = "./logs"
    """Folder for records."""

    def __post_init__(self) -> None:
        is_address = self.url.startswith(("http://", "https://"))
        check(self, "url", is_address, "must begin with http:// or https://")
        is_known = {*self.ways} <= {*WAYS} and len({*self.ways}) == len(self.ways) > 1
        check(self, "ways", is_known, f"must be two or more of {', '.join(WAYS)}, each once")
        is_known = {*self.picking} <= {"greedy", "sampled"} and len({*self.picking}) == len(self.picking)
        check(self, "picking", is_known, "must be greedy, sampled or both")
        at_least(self, 1, "clients", "max_steps")
        at_least(self, 0, "near_tie")
        check(self, "temperature", 0 < self.temperature <= 2, "must be above 0 and at most 2")
        check(self, "seed", 0 <= self.seed < 2**32, f"must be between 0 and {2**32 - 1}")
        check(self, "timeout", self.timeout > 0, "must be above 0")
        check(self, "no_drafts", bool(key_values(self, "no_drafts")), "must have a field")
        key_values(self, "extra_body")


def share_interval(count: int, number: int) -> tuple[float, float]:
    """Wilson's confidence interval of a share."""
    z = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)
    share = count / number
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * (share * (1 - share) / number + z * z / (4 * number**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def first_difference(first: JSONObject, second: JSONObject) -> JSONObject | None:
    """The first place where two answers differ; None if they are equal.

    `gap` is by how much one answer's token is more likely than the other's there, by the answer that has both
    log-probabilities; None: no answer has both, or one of them ends there.
    """
    texts = first["text"], second["text"]
    if texts[0] == texts[1]:
        return None
    pairs = enumerate(zip(*texts, strict=False))
    place = next((i for i, (one, other) in pairs if one != other), min(map(len, texts)))
    found = {"character": place, "texts": [text[place : place + _SHOWN] for text in texts]}
    tokens = first["tokens"], second["tokens"]
    both = enumerate(zip(*tokens, strict=False))
    position = next((i for i, (one, other) in both if one[0] != other[0]), None)
    if position is None:
        return found | {"token": None, "tokens": None, "logprobs": None, "gap": None}
    (one, logprob, top), (other, other_logprob, other_top) = (each[position] for each in tokens)
    logprobs = None
    if other in top:
        logprobs = (logprob, top[other])
    elif one in other_top:
        logprobs = (other_top[one], other_logprob)
    gap = None if logprobs is None else abs(logprobs[0] - logprobs[1])
    return found | {"token": position, "tokens": [one, other], "logprobs": logprobs, "gap": gap}


class Measurement:
    """Asks a server for answers to all examples in all ways, and reports how many are equal."""

    def __init__(self, data: DataArguments, args: EqualityArguments, examples: Sequence[Example]) -> None:
        self._data = data
        self._args = args
        self._examples = examples
        self._path = "chat/completions" if data.chat else "completions"
        key = args.api_key or os.environ.get("OPENAI_API_KEY")
        self._server = Server(args.url, key, args.timeout)
        self._fields: JSONObject = {"max_tokens": args.max_steps, **key_values(args, "extra_body")}
        if data.template_kwargs:
            self._fields["chat_template_kwargs"] = data.template_kwargs
        self._answers: dict[tuple[str, str], list[JSONObject]] = {}  # of (picking, way)
        self._spans: dict[tuple[str, str], float] = {}  # seconds of all answers
        self._remarks = list[str]()

    def run(self) -> int:
        """Ask, write, print; the exit status."""
        args = self._args
        ways = self._prepare()
        folder = Path(args.output_dir).expanduser() / f"equality_{datetime.now():%Y%m%d-%H%M%S-%f}"
        folder.mkdir(parents=True)
        if any(example.later_turns for example in self._examples):
            print_status("equality.py asks the first turn of each conversation only")
        path = folder / "answers.csv"
        with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            rows = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
            rows.writeheader()
            total = len(args.picking) * len(ways) * len(self._examples)
            with tqdm(total=total, desc="answers", disable=None) as bar:
                for picking, way in itertools.product(args.picking, ways):
                    began = time.perf_counter()
                    kept = self._answers[picking, way] = []
                    for answer in self._ask_all(picking, way):
                        kept.append(answer)
                        rows.writerow(answer)
                        file.flush()
                        bar.update()
                    self._spans[picking, way] = time.perf_counter() - began
        return self._report(folder)

    def _prepare(self) -> list[str]:
        """Try each kind of request once, which is a warm-up; the ways that the server knows.

        Ends the program in one line if the server gives no answers at all.
        """
        args = self._args
        lists_none = f"--model: the server at {args.url} lists no models, name one"
        try:
            model = args.model or next(iter(self._server.models()), None)
        except ServerError as error:
            self._give_up(error, lists_none)
        if model is None:
            refuse(lists_none)
        self._fields["model"] = model
        plain = {"max_tokens": 2, "temperature": 0}
        logprobs = {"logprobs": True, "top_logprobs": _TOP} if self._data.chat else {"logprobs": _TOP}
        without = "near-ties are not told from other differences"
        try:
            tokens = self._server.ask(self._path, self._body(0, {**logprobs, **plain}))["tokens"]
        except ServerError as error:
            try:
                self._server.ask(self._path, self._body(0, plain))
            except ServerError as second:
                self._give_up(second, f"--url {args.url}: the first prompt has no answer")
            self._remarks.append(f"the server refuses log-probabilities ({error}): {without}")
        else:
            self._fields |= logprobs
            if not tokens:
                self._remarks.append(f"the server gives no log-probabilities: {without}")
        ways = [*args.ways]
        try:
            self._server.ask(self._path, self._body(0, {**plain, **key_values(args, "no_drafts")}))
        except ServerError as error:
            left = [way for way in ways if WAYS[way].drafts]
            if left != ways:
                why = f"the server refuses --no_drafts {args.no_drafts} ({error})"
                self._remarks.append(f"no ways without drafts: {why}")
            if len(left) < 2:
                refuse(f"--no_drafts {args.no_drafts}: the server refuses it ({error})")
            ways = left
        return ways

    def _give_up(self, error: ServerError, why: str) -> NoReturn:
        """End the program in one line about a server that answers nothing; `why`: for an error that is not
        about the address or the key.
        """
        url = self._args.url
        if error.status in (401, 403):
            refuse(f"--api_key: the server at {url} refuses the key ({error})")
        refuse(f"--url {url}: no answer ({error})" if error.status is None else f"{why} ({error})")

    def _body(self, index: int, more: JSONObject) -> JSONObject:
        prompt = self._examples[index].prompt
        asked = {"messages": [{"role": "user", "content": prompt}]} if self._data.chat else {"prompt": prompt}
        return {**self._fields, **asked, **more}

    def _ask_all(self, picking: str, way: str) -> Iterator[JSONObject]:
        """The answers to all examples in order, as they come."""
        pool = ThreadPoolExecutor(self._args.clients if WAYS[way].together else 1)
        try:
            yield from pool.map(lambda index: self._ask(index, picking, way), range(len(self._examples)))
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, index: int, picking: str, way: str) -> JSONObject:
        """A row; one with an `error` if there is no answer."""
        args = self._args
        more: JSONObject = {"temperature": 0}
        if picking == "sampled":
            more = {"temperature": args.temperature, "seed": args.seed + index}
        if WAYS[way].stream:
            more |= {"stream": True, "stream_options": {"include_usage": True}}
        if not WAYS[way].drafts:
            more |= key_values(args, "no_drafts")
        row = {"prompt": index, "picking": picking, "way": way}
        began = time.perf_counter()
        try:
            answer = self._server.ask(self._path, self._body(index, more))
        except ServerError as error:
            return row | {"seconds": time.perf_counter() - began, "error": str(error)}
        counts = answer.get("metrics", {}).get("speculative_decoding") or {}
        timings = answer.get("timings", {})
        return row | {
            "seconds": time.perf_counter() - began,
            "text": answer["text"],
            "tokens": answer["tokens"],
            "finish_reason": answer["finish_reason"],
            "num_tokens": answer.get("usage", {}).get("completion_tokens"),
            "drafted": counts.get("drafted", timings.get("draft_n")),
            "accepted": counts.get("accepted", timings.get("draft_n_accepted")),
        }

    def _report(self, folder: Path) -> int:
        from measures.plots import shares  # takes a second

        args = self._args
        ways = [self._way(*key) for key in self._answers]
        pairs = [
            self._pair(one, other)
            for one, other in itertools.combinations(self._answers, 2)
            if one[0] == other[0]
        ]
        self._remarks += self._doubts(ways)
        settings = {**asdict(self._data), **asdict(args)}
        del settings["api_key"]
        size = f"{len(self._examples)} prompts, {args.clients} clients"
        title = f"{self._fields['model']} at {args.url}, {size}"
        summary = {
            "script": "equality", "version": self_speculation.__version__, "arguments": settings,
            "model": self._fields["model"], "remarks": self._remarks, "ways": ways, "pairs": pairs,
        }  # fmt: skip
        text = json.dumps(summary, indent=2)
        (folder / "equality.json").write_text(f"{text}\n", encoding="utf-8")
        if compared := [pair for pair in pairs if pair["compared"]]:
            label = f"share of equal answers, with the {_CONFIDENCE:.0%} confidence interval"
            shares(compared, label, title, folder / "equality")
        print(f"{title}\n")
        print(_way_line("way", "answers", "errors", "drafted", "accepted", "s/answer", "tokens/s"))
        for each in ways:
            name = f"{each['picking']}, {each['way']}"
            keys = ("answers", "errors", "drafted", "accepted", "seconds", "tokens_per_second")
            print(_way_line(name, *(each[key] for key in keys)))
        print(f"\n{'pair of ways':<44}{'equal':>14}{'share':>9}{'90 % interval':>18}{'near-ties':>11}")
        for pair in pairs:
            print(_pair_line(pair))
        for text in (*filter(None, map(_shown, pairs)), *(f"note: {each}" for each in self._remarks)):
            print(f"\n{text}")
        print(f"\n{folder}/: {', '.join(sorted(path.name for path in folder.iterdir()))}")
        num_missing = sum(each["errors"] for each in ways)
        num_different = sum(pair["compared"] - pair["equal"] for pair in pairs)
        if num_missing:
            error = next(row["error"] for rows in self._answers.values() for row in rows if "error" in row)
            print_status(f"answers are missing: {num_missing}, the first one by: {error}")
        return int(bool(num_missing or num_different))

    def _way(self, picking: str, way: str) -> JSONObject:
        """The figures of a way: of answers, and of time."""
        rows = self._answers[picking, way]
        answered = [row for row in rows if "error" not in row]
        tokens = [row["num_tokens"] for row in answered if row["num_tokens"] is not None]

        def total(name: str) -> int | None:
            counts = [row[name] for row in answered if row[name] is not None]
            return sum(counts) if counts else None

        return {
            "picking": picking, "way": way, "answers": len(answered), "errors": len(rows) - len(answered),
            "drafted": total("drafted"), "accepted": total("accepted"),
            "seconds": median(row["seconds"] for row in answered) if answered else None,
            "tokens_per_second": sum(tokens) / self._spans[picking, way] if tokens else None,
        }  # fmt: skip

    def _pair(self, one: tuple[str, str], other: tuple[str, str]) -> JSONObject:
        """How many answers are equal in two ways, and where the rest differ first."""
        rows = zip(self._answers[one], self._answers[other], strict=True)
        both = [pair for pair in rows if not any("error" in row for row in pair)]
        differences = []
        for first, second in both:
            if found := first_difference(first, second):
                is_near = found["gap"] is not None and found["gap"] <= self._args.near_tie
                near_tie = is_near if one[0] == "greedy" and found["gap"] is not None else None
                differences.append({"prompt": first["prompt"], **found, "near_tie": near_tie})
        equal = len(both) - len(differences)
        has_logprobs = any(row["tokens"] for pair in both for row in pair)
        near_ties = sum(bool(each["near_tie"]) for each in differences)
        return {
            "picking": one[0], "ways": [one[1], other[1]], "compared": len(both), "equal": equal,
            "share": equal / len(both) if both else None,
            "interval": share_interval(equal, len(both)) if both else None,
            "near_ties": near_ties if has_logprobs and one[0] == "greedy" else None,
            "differences": differences,
        }  # fmt: skip

    def _doubts(self, ways: Sequence[JSONObject]) -> list[str]:
        """Why a comparison with drafts may be none."""
        off = [each for each in ways if not WAYS[each["way"]].drafts]
        if not off:
            return []
        if any(each["drafted"] is None for each in off):
            return ["the answers do not say how many tokens were drafted, so drafts may have been on or off"]
        if any(each["drafted"] for each in off):
            return [f"drafts were on in spite of --no_drafts {self._args.no_drafts}"]
        return [] if any(each["drafted"] for each in ways) else ["nothing was drafted in any way"]


def _shown(pair: JSONObject) -> str:
    """The first difference of a pair, for people; empty without any."""
    if not pair["differences"]:
        return ""
    found = pair["differences"][0]
    kind = "near-tie" if found["near_tie"] else "difference"
    gap = "" if found["gap"] is None else f", log-probabilities {found['gap']:.2f} apart"
    lines = [f"{pair['picking']}, prompt {found['prompt']}, character {found['character']}: {kind}{gap}"]
    lines += [f"  {way}: {text!r}" for way, text in zip(pair["ways"], found["texts"], strict=True)]
    return "\n".join(lines)


def _way_line(name: str, *cells: object) -> str:
    shown = ("-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else cell for cell in cells)
    return f"{name:<32}" + "".join(f"{cell:>10}" for cell in shown)


def _pair_line(pair: JSONObject) -> str:
    name = f"{pair['picking']}, {' / '.join(pair['ways'])}"
    if not pair["compared"]:
        return f"{name:<44}{'no answers':>14}"
    low, high = pair["interval"]
    near = "-" if pair["near_ties"] is None else pair["near_ties"]
    equal = f"{pair['equal']} of {pair['compared']}"
    interval = f"{low:.1%} - {high:.1%}"
    return f"{name:<44}{equal:>14}{pair['share']:>9.1%}{interval:>18}{near:>11}"
