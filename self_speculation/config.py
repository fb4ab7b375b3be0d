"""Settings of generation and of loading. Imports nothing heavy: scripts check flags without torch."""

import ast
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from functools import cache, wraps
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

GenerationStrategyName = Literal["autoregressive", "self_speculative", "adaptive"]
DraftWeights = Literal["exact", "int4"]
DtypeName = Literal["auto", "half", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8", "int4"]
CacheDtypeName = Literal["auto", "float32", "float16", "bfloat16"]

# The longest draft of adaptive decoding.
LONGEST_DRAFT = 16


# Probabilities [n, m] in descending order, values [n, 1] of the rule, and sums [n, 1] of all probabilities
# that earlier rules kept, also beyond m -> probabilities [n, m], 0 for tokens that the rule leaves out.
# Values and sums are in float64 where a device has it. A rule calls methods of tensors, so nothing imports
# torch here.
Keep = Callable[[Any, Any, Any], Any]


class SamplingRule(NamedTuple):
    """A rule of sampling: the metadata of a field of `GenerationConfig`.

    Args:
        neutral: the value that changes nothing.
        least, most: bounds of values.
        keep: which tokens are kept; None: all, as by the temperature.
        is_count: the value is a number of tokens, and no more are sorted where that is enough.
    """

    neutral: float
    least: float
    most: float | None
    keep: Keep | None = None
    is_count: bool = False


# Least and most values of other fields of `GenerationConfig`.
_BOUNDS: dict[str, tuple[float, float | None]] = {
    "max_steps": (1, 2**31 - 1),
    "num_speculations": (-1, 256),  # the chance that a draft is accepted to the end falls with each token
    "no_repeat_ngram_size": (1, None),
    "prompt_lookup": (0, 32),  # longer n-grams are followed by the same token nearly always
    "repetition_penalty": (0.01, 100),  # logits do not overflow
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
}

# Below this, as at 0, decoding is greedy: logits divided by it might overflow fp32.
LEAST_TEMPERATURE = 1e-5


def check(options: object, field: str, ok: bool, allowed: str) -> None:
    """Raise ValueError unless `ok`; the message has the field's name and value, and what is allowed."""
    if not ok:
        raise ValueError(f"{field} {getattr(options, field)!r}: {allowed}")


# Types of fields, by their names in messages.
_KINDS: dict[Any, str] = {
    bool: "True or False", int: "an integer", float: "a number", str: "a text",
    list[str]: "a list of texts", list[int]: "a list of integers", Mapping[str, Any]: "a dictionary",
}  # fmt: skip


def check_types(of: type, values: Mapping[str, object]) -> None:
    """Raise ValueError unless each value of a dataclass's field is of the field's annotation."""
    for name, kind in field_types(of).items():
        kinds = get_args(kind) if get_origin(kind) is UnionType else (kind,)
        if name in values and not any(_is_a(values[name], each) for each in kinds):
            value = values[name]
            given = (each for each in kinds if each is not NoneType)
            allowed = (_KINDS.get(each) or one_of(value, get_args(each)) for each in given)
            raise ValueError(f"{name} {value!r}: must be {' or '.join(allowed)}")


def one_of(value: object, allowed: Collection[str]) -> str:
    """For a message: the allowed names, and the one that is meant by another one."""
    near = get_close_matches(str(value), allowed, 1, cutoff=0.5)  # fp16 and float16 have .55
    return f"one of {', '.join(allowed)}{f'; did you mean {near[0]}?' if near else ''}"


@cache
def field_types(kind: Any) -> dict[str, Any]:
    """The annotation of each field of a dataclass."""
    hints = get_type_hints(kind)
    return {each.name: hints[each.name] for each in fields(kind)}


def _is_a(value: object, kind: Any) -> bool:
    origin = get_origin(kind)
    args = get_args(kind)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is list:
        return isinstance(value, list | tuple) and all(_is_a(each, args[0]) for each in value)
    if kind in (int, float):  # numpy's, too
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def check_kind(name: str, value: object, kind: type, how: str = "") -> None:
    """Raise ValueError unless an argument is of this class; the message names it, and `how` to make one."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}: must be a {kind.__name__}{how}, not {type(value).__name__}")


def default_model() -> str:
    """The folder of the bundled LayerSkip model, in a checkout or else in the installed package."""
    in_checkout = Path(__file__).parents[1] / "checkpoints" / "python-10m"
    return str(in_checkout if in_checkout.is_dir() else Path(__file__).parent / "bundled")


def why_no_model(model: str) -> str | None:
    """Why no model can be read from a path; None: it can, or is a hub id."""
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        return None if path.is_file() else "no such file"
    if path.is_dir():
        has_config = (path / "config.json").is_file()
        return None if has_config else "the folder has no config.json: it is no Hugging Face model"
    if path.is_file():
        return "is a file; must be a hub id, a folder or a .gguf file"
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    return "no such folder" if is_path else None


# Arguments of transformers' `apply_chat_template` that are no variables of templates, or that we set.
_NO_TEMPLATE_KWARGS = {
    "self", "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip


def check_template_kwargs(given: Mapping[str, object]) -> Mapping[str, object]:
    """Check variables for a chat template, and return them. Raises ValueError for another name."""
    if wrong := sorted(_NO_TEMPLATE_KWARGS & given.keys()):
        raise ValueError(f"{wrong[0]} is no variable of chat templates")
    return given


# Metadata of fields about drafts: the strategies that use them, the one to suggest first. A field with
# `is_source` names a source of drafts when it is set.
_FIXED: Mapping[str, object] = {"used_by": ("self_speculative",)}
_DRAFTS: Mapping[str, object] = {"used_by": ("adaptive", "self_speculative")}


@cache
def field_texts(kind: type) -> dict[str, str]:
    """The text below each field of a dataclass and of base classes. Raises OSError if there is no source."""
    found = {}
    for each in reversed(kind.__mro__[:-1]):
        (definition,) = ast.parse(inspect.getsource(each)).body
        for line, text in pairwise(getattr(definition, "body", ())):
            if isinstance(line, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(line.target)] = " ".join(ast.literal_eval(text.value).split())
    return found


def _refuse_unknown_fields(kind: type) -> type:
    """Have `__init__` of a dataclass name an unknown field, and the one that is meant."""
    make: Any = kind.__init__  # type: ignore[misc]

    @wraps(make)
    def checked(self: object, *args: object, **given: object) -> None:
        known = [each.name for each in fields(type(self))]  # type: ignore[arg-type]
        for name in given.keys() - known:
            near = get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]}?" if near else f": it has {', '.join(known)}"
            raise TypeError(f"{name}: {type(self).__name__} has no such field{meant}")
        make(self, *args, **given)

    kind.__init__ = checked  # type: ignore[misc]
    return kind


def _explain_fields(kind: type) -> type:
    """Append the texts below the fields of a class to the docstring, for `help`."""
    with suppress(OSError):  # there is no source
        texts = (f"        {name}: {text}" for name, text in field_texts(kind).items())
        kind.__doc__ = "\n".join([kind.__doc__ or "", "    Fields:", *texts])
    return kind


@_explain_fields
@_refuse_unknown_fields
@dataclass(frozen=True)
class GenerationConfig:
    """How to generate.

    Raises:
        ValueError: a value is of another type or out of range; the message starts with the field's name.
    """

    max_steps: int = 512
    """The most new tokens; at least 1."""
    exit_layer: int = field(
        default=-1, metadata={"used_by": ("autoregressive", "self_speculative"), "is_source": True}
    )
    """Layers of the draft (self_speculative) or of the whole generation (autoregressive); -1: full depth, no
    draft by layers."""
    num_speculations: int = field(default=-1, metadata=_FIXED)
    """Tokens drafted per round; self_speculative needs at least 1."""
    generation_strategy: GenerationStrategyName = "autoregressive"
    """How to decode; adaptive: self-speculative, picks exit layer, draft length and n-grams in each round."""
    sample: bool = True
    """Sample tokens; False: greedy, always the most likely token."""
    temperature: float = field(default=0.6, metadata={"rule": SamplingRule(1.0, 0, 1000)})
    """Divides the logits before sampling; 0 (below 1e-5): greedy."""
    top_k: int = field(
        default=0,
        metadata={
            "rule": SamplingRule(
                neutral=0,
                least=0,
                most=None,
                # All that are equal to the last one are kept, as in transformers.
                keep=lambda likely, k, _: likely.where(
                    likely >= likely.gather(-1, k.clamp(1, likely.shape[-1]).long() - 1), 0.0
                ),
                is_count=True,
            )
        },
    )
    """Sample among the k most likely tokens; 0: off."""
    top_p: float = field(
        default=0.9,
        metadata={
            "rule": SamplingRule(
                neutral=1.0,
                least=0,
                most=1,
                keep=lambda likely, p, total: likely.where(
                    likely.cumsum(-1, dtype=p.dtype) - likely < p.clamp(min=2.0**-126) * total, 0.0
                ),
            )
        },
    )
    """Sample among the fewest most likely tokens whose probabilities reach p; 1: off."""
    no_repeat_ngram_size: int | None = None
    """No n-gram of this size occurs twice in prompt and output."""
    stop_words: list[str] | None = None
    """Texts; the output ends before the first of them. Several follow one another, as in: return if."""
    stop_token_ids: list[int] | None = None
    """Token ids that end the output, besides the EOS ids of tokenizer and model."""
    draft_weights: DraftWeights = field(default="exact", metadata=_DRAFTS)
    """int4: draft with a copy of layers and head in four bits, which takes 0.63 bytes for each of their
    weights; exit_layer may be all layers. exact: the model's."""
    prompt_lookup: int = field(default=0, metadata={**_DRAFTS, "is_source": True})
    """Find the last tokens, up to this many, earlier in prompt and output; draft what followed; 0: off."""
    reuse_cache: bool = False
    """Keep the keys and values of finished requests: only the part of a prompt after the longest common
    prefix is computed."""
    cache_dtype: CacheDtypeName = "auto"
    """Number format of keys and values, rounded once as they are written; auto: as activations. On a GPU they
    have no other."""
    min_p: float = field(
        default=0.0,
        metadata={
            "rule": SamplingRule(
                neutral=0.0,
                least=0,
                most=1,
                keep=lambda likely, p, _: likely.where(likely >= p.float() * likely[:, :1], 0.0),
            )
        },
    )
    """Sample among tokens of at least p times the probability of the most likely one; 0: off."""
    repetition_penalty: float = 1.0
    """Divides positive logits of ids in prompt and output, multiplies negative ones; 1: off."""
    frequency_penalty: float = 0.0
    """Lowers the logit of an id by so much for each time that the output has it; 0: off."""
    presence_penalty: float = 0.0
    """Lowers the logits of ids that the output has by so much; 0: off."""

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        for name in ("exit_layer", "num_speculations"):
            value = getattr(self, name)
            check(self, name, value == -1 or value >= 1, "must be -1 or at least 1")
        rules = {name: (rule.least, rule.most) for name, rule in SAMPLING_RULES.items()}
        for name, (least, most) in (rules | _BOUNDS).items():
            allowed = f"must be at least {least}" if most is None else f"must be between {least} and {most}"
            value = getattr(self, name)
            upto = math.inf if most is None else most
            check(self, name, value is None or least <= value <= upto, allowed)
        check(self, "stop_words", all(self.stop_words or []), "must not be empty texts")
        check(self, "stop_token_ids", all(i >= 0 for i in self.stop_token_ids or []), "must be 0 or more")

    def check_drafts(self) -> None:
        """Check what does not depend on the model.

        Raises:
            ValueError: self_speculative without a source of drafts or num_speculations; a copy without the
                number of layers to copy; settings that adaptive picks itself.
        """
        if self.is_adaptive and (idle := next(self.idle_fields(), None)):
            raise ValueError(f"{idle.name} {getattr(self, idle.name)}: adaptive chooses it, leave it out")
        if self.generation_strategy == "self_speculative":
            sources = [each for each in fields(self) if each.metadata.get("is_source")]
            if self.draft_weights != "exact" and self.exit_layer == -1:
                raise ValueError("exit_layer: a copy in four bits needs one between 1 and the last layer")
            if all(getattr(self, each.name) == each.default for each in sources):
                others = " or ".join(each.name for each in sources if each.name != "exit_layer")
                of_layers = "self_speculative needs one between 1 and the last but one layer"
                raise ValueError(f"exit_layer: {of_layers}, or {others} in the place of layers")
            if self.num_speculations < 1:
                raise ValueError("num_speculations: self_speculative needs at least 1, such as 4")

    def check_depth(self, num_layers: int) -> None:
        """Check the settings against the number of layers.

        Raises:
            ValueError: an exit layer that the model does not have, or what `check_drafts` raises.
        """
        speculative = self.generation_strategy == "self_speculative"
        most = num_layers if speculative and self.draft_weights != "exact" else num_layers - 1
        between = f"between 1 and {most}, the model has {num_layers} layers"
        self.check_drafts()
        if speculative and self.draft_weights == "exact" and self.exit_layer == num_layers:
            between += f"; with draft_weights int4 it may be {num_layers}"
        if self.exit_layer > most:
            full = "" if speculative else "; -1 is full depth"
            raise ValueError(f"exit_layer {self.exit_layer}: must be {between}{full}")

    def idle_fields(self) -> Iterator[Field[object]]:
        """Fields about drafts that are given, but not used by the strategy."""
        for each in fields(self):
            used_by = each.metadata.get("used_by", (self.generation_strategy,))
            if self.generation_strategy not in used_by and getattr(self, each.name) != each.default:
                yield each

    @property
    def longest_draft(self) -> int:
        """The most tokens of a draft."""
        return LONGEST_DRAFT if self.is_adaptive else self.num_speculations

    @property
    def is_adaptive(self) -> bool:
        return self.generation_strategy == "adaptive"

    @property
    def looks_up(self) -> bool:
        """Whether prompts, outputs and predicted outputs are drafted from."""
        return self.prompt_lookup > 0 or self.is_adaptive

    @property
    def greedy(self) -> bool:
        return not self.sample or self.temperature < LEAST_TEMPERATURE


# By name, in the order in which they apply. Scripts, server, harness and sampler know rules from here alone.
SAMPLING_RULES: dict[str, SamplingRule] = {
    each.name: each.metadata["rule"] for each in fields(GenerationConfig) if "rule" in each.metadata
}


class LoadingWarning(UserWarning):
    """A model was loaded, but not quite as asked."""


@_explain_fields
@_refuse_unknown_fields
@dataclass(frozen=True)
class LoadingOptions:
    """How to load a model, and onto which device.

    Raises:
        ValueError: a value is not of the field's type; the message starts with the field's name.
    """

    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Passed to `from_pretrained`."""
    trust_remote_code: bool = False
    """Execute Python code from the model's repository; trust it as you trust the author."""
    seed: int = 42
    """Seed of all random generators."""
    dtype: DtypeName = "auto"
    """Number format of weights; auto: the checkpoint's, those of a .gguf file in the file's few bits, on a
    GPU in half; half: bfloat16 if the device computes in it, else float16. A CPU multiplies 16-bit weights by
    float32 activations."""
    device: str = "auto"
    """cpu, cuda, cuda:N or mps; auto: a GPU if there is one; split: some layers on each GPU, and the rest in
    memory."""
    quantization: Quantization = "none"
    """Hold the layers' weights in this many bits: on a CPU rounded for the operators, on a GPU by torchao
    (int8) or bitsandbytes (int4, as NF4)."""
    fuse: bool = True
    """Decode by fewer and faster kernels over the same weights; False: by transformers' layers."""
    compile: bool | None = None
    """On a GPU, capture the decoding passes as CUDA graphs: each takes tenths of a second when it first runs,
    and then less time per token. A model decodes one batch at a time then. Without it, scripts do so where it
    is possible."""

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        is_name = re.fullmatch(r"auto|split|(cpu|cuda|mps)(:\d+)?", self.device)
        check(self, "device", bool(is_name), "must be auto, cpu, cuda, cuda:N, mps or split")
