"""The fields of requests, without a server."""

import json
from contextlib import nullcontext

import pytest
from conftest import ROOT
from pydantic import ValidationError
from servers import HELLO

from self_speculation import GenerationConfig
from self_speculation.text.grammar import Grammar, GrammarError
from serving.errors import APIError
from serving.fields import check_number_of_values
from serving.protocol import ChatRequest, CompletionRequest
from serving.responses import ResponsesRequest
from serving.streaming import Delta


def chat(**fields):
    return ChatRequest(messages=HELLO, **fields)


def refused(kind, **request):
    """The field at fault, and the message."""
    with pytest.raises((ValidationError, APIError)) as invalid:
        kind.model_validate_json(json.dumps(request))
    # The longest list of faults is that of a prompt's union.
    assert isinstance(invalid.value, APIError) or invalid.value.error_count() <= 8
    error = APIError.of(invalid.value)
    return error.param, str(error)


# Values that clients send by default, and that ask for nothing.
NEUTRAL = {
    "best_of": [1], "chat_template_kwargs": [{}, {"enable_thinking": False}], "do_sample": [True],
    "continue_final_message": [False], "include_reasoning": [False, True], "length_penalty": [1.0],
    "logit_bias": [{}], "modalities": [["text"]], "parallel_tool_calls": [True, False], "repeat_penalty": [1],
    "reasoning_effort": ["none", "low", "high", "max"], "repetition_penalty": [1], "stop_token_ids": [[]],
    "response_format": [{}, {"type": "text"}], "skip_special_tokens": [True], "structured_outputs": [{}],
    "stream_options": [{}, {"include_usage": True, "continuous_usage_stats": True}], "suffix": [""],
    "tool_choice": ["none", "auto"], "tools": [[]], "top_k": [-1, 0], "truncate_prompt_tokens": [-1],
    "function_call": ["none", "auto"], "reasoning_format": ["auto"], "samplers": [[]], "min_keep": [0, 1],
    "spaces_between_special_tokens": [True], "thinking_budget_tokens": [-1], "top_n_sigma": [-1.0, 0],
    "add_special_tokens": [False], "t_max_predict_ms": [-1], "tfs_z": [1.0], "truncate": [True],
    "verbosity": ["medium"], "watermark": [False],
}  # fmt: skip


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_are_accepted(name):
    """Guards against clients that send every field's default and get an error or another text."""
    for value in NEUTRAL[name]:
        named = set()
        request = ChatRequest.model_validate({"messages": HELLO, name: value}, context=named)
        assert request.generation_config(GenerationConfig()) == GenerationConfig()
        assert request.grammar(None) is None
        assert not any((request.logit_bias, request.tools_for_template))
        assert named <= {"continuous_usage_stats"}


# What real programs send besides, and no answer depends on.
IGNORED = ["cache_salt", "dry_base", "extra_body", "keep_alive", "mirostat_eta", "num_ctx", "top_n", "user"]
SCHEMA = {"name": "answer", "strict": True, "description": "x", "schema": {}}
PART = {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize(
    ("fields", "same", "named"),
    [
        ({**dict.fromkeys(IGNORED, "x"), "min_tokens": 0, "lora": []}, {}, IGNORED),
        ({"messages": [{**HELLO[0], "id": "7", "timestamp": 1, "prefix": False}]}, {}, ["id", "timestamp"]),
        ({"messages": [{"role": "user", "name": "Eve", "content": [PART]}]}, {}, ["name"]),
        ({"response_format": {"type": "json_schema", "json_schema": SCHEMA}}, None, []),
        # Programs that measure servers send both.
        ({"min_tokens": 9, "max_tokens": 9, "ignore_eos": True}, {"max_tokens": 9, "ignore_eos": True}, []),
        ({"min_new_tokens": 9, "ignore_eos": True}, {"ignore_eos": True}, []),
    ],
)
def test_fields_without_an_effect_are_named(fields, same, named):
    """Guards against programs that get an error for a field that is meant for another server, a field that
    nobody hears of, and a line about fields that OpenAI requires.
    """
    ignored = set()
    request = ChatRequest.model_validate({"messages": HELLO, **fields}, context=ignored)
    assert same is None or request == chat(**same)
    assert ignored == {*named}


# The fields that other servers' requests for chats and completions have, besides OpenAI's.
FOREIGN = {
    "vLLM": """
        add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template
        chat_template_kwargs continue_final_message documents early_stopping echo ec_transfer_params
        guided_choice guided_decoding_backend guided_grammar guided_json guided_regex
        guided_whitespace_pattern ignore_eos include_reasoning include_stop_str_in_output
        kv_transfer_params length_penalty logits_processors logprob_token_ids media_io_kwargs min_p
        min_tokens mm_processor_kwargs priority prompt_embeds prompt_logprobs reasoning_effort
        repetition_detection repetition_penalty request_id return_mm_kwargs return_prompt_text
        return_token_ids return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start
        session_id skip_special_tokens spaces_between_special_tokens stop_token_ids stream_interval
        structural_tag structured_outputs thinking_token_budget top_k truncate_prompt_tokens
        truncation_side use_beam_search vllm_xargs watermarking
    """,
    "llama.cpp": """
        adaptive_decay adaptive_target backend_sampling cache_prompt dry_allowed_length dry_base
        dry_multiplier dry_penalty_last_n dry_sequence_breakers dynatemp_exponent dynatemp_range grammar
        grammar_lazy grammar_triggers id_slot image_data json_schema lora min_keep min_p mirostat
        mirostat_eta mirostat_tau n_cache_reuse n_cmpl n_discard n_indent n_keep n_predict n_probs
        parse_tool_calls penalize_nl post_sampling_probs preserved_tokens reasoning_budget_tokens
        reasoning_format repeat_last_n repeat_penalty response_fields return_progress return_tokens
        samplers system_prompt t_max_predict_ms tfs_z thinking_budget_tokens timings_per_token top_k
        top_n_sigma typical_p xtc_probability xtc_threshold
    """,
    "SGLang": """
        bootstrap_host bootstrap_port bootstrap_room cache_salt custom_labels custom_logit_processor
        custom_params data_parallel_rank ebnf extra_key ignore_eos images_config input_ids json_schema
        lora_path max_dynamic_patch min_dynamic_patch min_p min_tokens no_stop_trim priority regex
        repetition_penalty return_cached_tokens_details return_hidden_states return_input_ids_in_sglext
        return_meta_info return_output_ids_in_sglext return_prompt_token_ids return_routed_experts
        return_sampling_mask return_spec_tokens_details return_token_ids rid routed_dp_rank
        routed_experts_start_len sampling_logprobs_mode separate_reasoning session_id session_params
        skip_special_tokens stop_regex stop_token_ids stream_reasoning top_k use_audio_in_video
        video_config
    """,
    "TGI": """
        adapter_id best_of decoder_input_details do_sample grammar guideline max_new_tokens
        repetition_penalty return_full_text stop_sequences tool_prompt top_k top_n_tokens truncate
        typical_p watermark
    """,
}  # fmt: skip
# Fields of other servers that change no text: names and order of requests, places of keys and values,
# figures; or that only add to a field that is refused, to pictures or to a text beyond the context.
WITHOUT_EFFECT = """
    adaptive_decay backend_sampling bootstrap_host bootstrap_port bootstrap_room cache_prompt cache_salt
    custom_labels data_parallel_rank dry_allowed_length dry_base dry_penalty_last_n dry_sequence_breakers
    dynatemp_exponent early_stopping ec_transfer_params extra_key grammar_lazy grammar_triggers
    guided_decoding_backend guided_whitespace_pattern id_slot images_config kv_transfer_params
    max_dynamic_patch media_io_kwargs min_dynamic_patch mirostat_eta mirostat_tau mm_processor_kwargs
    n_cache_reuse n_discard n_keep preserved_tokens priority request_id return_cached_tokens_details
    return_mm_kwargs return_progress return_spec_tokens_details return_token_offsets rid routed_dp_rank
    routed_experts_prompt_start routed_experts_start_len session_id stream_interval timings_per_token
    truncation_side use_audio_in_video video_config xtc_threshold
"""


@pytest.mark.parametrize("server", FOREIGN)
def test_a_field_of_another_server_works_or_is_refused_or_changes_no_answer(server):
    """Guards against `top_n_sigma`, `samplers` and the like, which were ignored with status 200."""
    for name in FOREIGN[server].split():
        if name in ChatRequest.model_fields:
            continue
        named = set()
        request = {"messages": HELLO, name: "unusual"}
        if name in WITHOUT_EFFECT.split():
            ChatRequest.model_validate(request, context=named)
            assert named == {name}
        else:
            assert refused(ChatRequest, **request)[0] == name


def test_unknown_fields_are_few():
    """Each is compared with the known ones. Guards against a request that takes seconds of that."""
    messages = [{**HELLO[0], **{f"field {i} {j}": 0 for j in range(50)}} for i in range(3)]
    with pytest.raises(ValidationError, match="at most 100 unknown fields together"):
        ChatRequest.model_validate({"messages": messages}, context=set())
    ChatRequest.model_validate({"messages": messages[:1] * 4}, context=set())


@pytest.mark.parametrize(
    ("values", "is_allowed"),
    [
        (["x"] * 90_000, True),
        (['\\"\\\\', "a,b[{"] * 45_000, True),
        ([1] * 499_000, True),
        (["x" * 500_000 + "{,[" * 500_000], True),
        (["x"] * 100_001, False),
        ([[]] * 100_001, False),
        ([{}] * 100_001, False),
        ([{"a": {"b": 1}}] * 30_000, False),
        ([1] * 500_002, False),
    ],
)
def test_values_of_a_body_are_counted_before_they_are_made(values, is_allowed):
    """Guards against a body of 4 MB of empty lists, which kept the interpreter for seconds."""
    with nullcontext() if is_allowed else pytest.raises(APIError, match="the body: must have at most"):
        check_number_of_values(json.dumps(values).encode())


def calling(arguments):
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "x", "type": "function", "function": function}]}


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
EMPTY_ANSWER = {"role": "assistant", "content": ""}
# What clients return of an answer.
ANSWER = {
    "role": "assistant", "tool_calls": [], "annotations": [{"type": "url_citation"}], "refusal": "No.",
    "audio": None, "reasoning": "", "reasoning_details": [{"text": "Hm."}], "function_call": None,
    "thinking_blocks": [{"thinking": "Hm."}], "provider_specific_fields": {"refusal": None}, "images": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("message", "templated"),
    [
        (ANSWER, EMPTY_ANSWER),
        ({**ANSWER, "content": None}, EMPTY_ANSWER),
        ({"role": "developer", "content": PARTS}, {"role": "system", "content": "a\nb"}),
        (calling('{"city": "Rome"}'), {**calling({"city": "Rome"}), "content": ""}),
        (calling(""), {**calling({}), "content": ""}),  # of a function without parameters
        ({**EMPTY_ANSWER, "reasoning": "a"}, {**EMPTY_ANSWER, "reasoning_content": "a"}),
        (
            {**EMPTY_ANSWER, "reasoning": "a", "reasoning_content": "a"},
            {**EMPTY_ANSWER, "reasoning_content": "a"},
        ),
    ],
)
def test_what_a_template_gets_of_a_message(message, templated):
    """Guards against the second turn of a chat that fails, since clients return the answer of a model.
    Guards against arguments in quotes, roles that templates do not know, and thinking that is lost.
    """
    assert ChatRequest(messages=[message]).messages[0].for_template == templated


JSON = {"type": "object"}


@pytest.mark.parametrize(
    ("given", "grammar"),
    [
        ({"json": JSON}, Grammar.json_schema(JSON)),
        ({"json_object": True}, Grammar.json_schema(JSON)),
        ({"regex": "[0-9]+"}, Grammar.regex("[0-9]+")),
        ({"choice": ["a", "b"]}, Grammar.lark('start: "a" | "b"')),
    ],
)
def test_languages_of_answers(given, grammar):
    """Guards against a field that is accepted and does something else, and one that undoes another."""
    assert chat(structured_outputs=given).grammar(None) == grammar
    for more in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": given | {"regex": "x", "choice": ["y"]}},
    ):
        with pytest.raises(GrammarError, match="must be one of them"):
            chat(**{"structured_outputs": given, **more}).grammar(None)


def test_a_call_at_the_limit():
    """Guards against a call that looks complete."""
    call = '{"name": "f", "arguments": {}}'
    tools = [{"function": {"name": "f"}}]
    for stop_reason, finish_reason in (("eos", "tool_calls"), ("max_steps", "length")):
        request = chat(tools=tools)
        text, calls = request.call_reader().read(call, is_last=True)
        choice = request.choice(0, Delta(text, calls=calls, has_calls=True), None, stop_reason)
        assert (len(choice["message"]["tool_calls"]), choice["finish_reason"]) == (1, finish_reason)


LONG = [{"type": "text", "text": ""}] * 9_000
LEAVE = ": this server does not have it, leave it out"
# Fields that would change the answer -> what to use instead.
INSTEAD = {
    "enable_thinking": (False, "chat_template_kwargs"), "do_sample": (False, "temperature"),
    "ebnf": ("x", "structured_outputs with json, regex or choice"), "functions": ([{"name": "f"}], "tools"),
    "max_output_tokens": (5, "max_tokens"), "min_new_tokens": (5, "ignore_eos and max_tokens"),
    "prompt_logprobs": (1, "logprobs"), "random_seed": (1, "seed"), "system": ("x", "messages"),
    "reasoning": ({"effort": "low"}, "reasoning_effort"), "typical_p": (0.5, "top_p or min_p"),
}  # fmt: skip
# Of a chat: fields, the place of the fault, and what the message says.
FAULTS = [
    *(
        ({name: value}, name, f": this server does not have it, use {use}")
        for name, (value, use) in INSTEAD.items()
    ),
    ({"num_beams": 2}, "num_beams", f" 2{LEAVE}"),
    ({"top_n_sigma": 1.5}, "top_n_sigma", "use top_p or min_p"),
    ({"repeat_last_n": 64}, "repeat_last_n", "use repetition_penalty"),
    ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens", LEAVE),
    ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "function_call", "use tools"),
    ({"modalities": ["audio"]}, "modalities", LEAVE),
    ({"skip_special_tokens": False}, "skip_special_tokens", LEAVE),
    ({"messages": [{**HELLO[0], "prefix": True}]}, "prefix", LEAVE),
    ({"response_format": {"type": "json_object", "schema": {"a": 1}}}, "schema", "use response_format"),
    ({"tool_choice": {"functions": {"name": "f"}}}, "functions", "use tools"),
    ({"temprature": 1}, "temprature", " 1: there is no such field, did you mean temperature?"),
    ({"stream_options": {"include_usages": True}}, "include_usages", "mean include_usage?"),
    (
        {"messages": [{**HELLO[0], "content": [{"type": "image_url"}]}]},
        "messages.0.content.0.type",
        "reads text only",
    ),
    ({"chat_template_kwargs": {f"x{i}": 0 for i in range(101)}}, "chat_template_kwargs", "at most 100 items"),
    ({"chat_template_kwargs": "enable_thinking=false"}, "chat_template_kwargs", "must be an object"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "no variable of chat"),
    ({"messages": [{"content": "x"}]}, "messages.0.role", "required"),
    ({"messages": [calling("{")]}, "messages.0.tool_calls.0.function.arguments", ""),
    ({"tool_choice": "any"}, "tool_choice", "must be 'none', 'auto' or 'required'"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "needs the field json_schema"),
    ({"temperature": float("nan")}, "temperature", "finite"),
    ({"temperature": "0.5"}, "temperature", "number"),
    ({"reasoning_effort": "banana"}, "reasoning_effort", "'none', "),
    ({"repetition_penalty": 1e-300}, "repetition_penalty", "0.01"),  # infinite logits
    ({"max_tokens": 5, "max_completion_tokens": 0}, "max_completion_tokens", "1"),
    ({"stop": [""]}, "stop.0", "must not be empty"),
    ({"messages": []}, "messages", "messages []: must not be empty"),
    (
        {"messages": [{**HELLO[0], "content": 5}]},
        "messages.0.content",
        "5: must be a text or a list of parts",
    ),
    ({"seed": 1.5}, "seed", "seed 1.5: must be a whole number"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "not with add_generation_prompt",
    ),
    ({"continue_final_message": True}, "continue_final_message", "the last message must be the assistant's"),
    (
        {"structured_outputs": {"regex": "x" * 100_001}},
        "structured_outputs.regex",
        "at most 100000 characters",
    ),
    (
        {"structured_outputs": {"choice": ["x" * 1_000] * 101}},
        "structured_outputs.choice",
        "at most 100000 characters together",
    ),
    ({"stop": ["x", "x" * 257]}, "stop.1", "at most 256 characters"),
    ({"messages": [{**HELLO[0], "content": "\ud800"}]}, None, ""),
    ({"logit_bias": {"5_0": 1}}, "logit_bias.5_0", ""),
    ({"messages": HELLO * 9_000}, "messages", "at most 2048 items"),
    ({"messages": [{**HELLO[0], "content": LONG}]}, "messages.0.content", "at most 2048 items"),
    ({"messages": [{}] * 2_000}, "messages.0.role", "required"),
    ({f"x{i}": 0 for i in range(9_000)}, None, "at most 100 unknown fields"),
]


@pytest.mark.parametrize(("fields", "param", "says"), FAULTS)
def test_an_error_names_its_place_and_what_to_use_instead(fields, param, says):
    """Guards against a field that is accepted and changes nothing, numbers in quotes, type names of a union
    in the path, seconds of validation, a message that quotes the whole request, and a client that has other
    ids rendered.
    """
    name, message = refused(ChatRequest, **{"messages": HELLO, **fields})
    assert (name, says in message, len(message) < 250) == (param, True, True), message


@pytest.mark.parametrize("prompt", [{}, [["a"]], [1, "a"], [[]], ["a", 1], [True], 5, ["a", None]])
def test_a_prompt_is_text_or_ids(prompt):
    """Guards against an error for each type of the union."""
    message = "must be a text, or token ids, or a list of at most 2048 of either"
    assert refused(CompletionRequest, prompt=prompt) == ("prompt", f"prompt {prompt!r}: {message}")
    assert message in refused(CompletionRequest, prompt=[""] * 9_000)[1][:200]
    assert message in refused(CompletionRequest, prompt=[1] * 9_000 + [True] * 9_000)[1][:200]
    for one in ("a", "", [5, 6]):
        assert CompletionRequest(prompt=one).prompt == [one]
        assert CompletionRequest(prompt=[one, "b"]).prompt == [one, "b"]


def test_the_servers_config_has_the_defaults():
    """Guards against a temperature of the flags that overrides the request's, or the other way round."""
    default = GenerationConfig(max_steps=7, sample=False, top_p=0.5, stop_words=["x"], exit_layer=2)
    assert chat().generation_config(default) == default
    request = chat(temperature=0.5, max_completion_tokens=9, stop="y", drafts=False)
    config = request.generation_config(default)
    assert (config.sample, config.temperature, config.top_p) == (True, 0.5, 0.5)
    assert (config.max_steps, config.stop_words) == (9, ["y"])
    assert not request.drafts
    assert chat(temperature=0).generation_config(GenerationConfig()).greedy
    more = {"max_tokens": 9, "max_completion_tokens": 9}
    for limits in ({"max_tokens": 5}, more | {"max_tokens": 5}, more | {"max_completion_tokens": 5}):
        assert chat(**limits).max_new_tokens == 5


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, ResponsesRequest])
def test_the_page_has_all_limits(kind):
    """Guards against a limit that clients learn of by status 400."""
    page = (ROOT / "docs/serving.md").read_text()
    rows = page.partition("## Limits")[2].split("\n\n")[1].splitlines()
    schema = kind.model_json_schema()
    found = 0
    for each in (schema, *schema["$defs"].values()):
        for name, field in each.get("properties", {}).items():
            for part in (field, *field.get("anyOf", [])):
                if limit := part.get("maxItems") or part.get("maxProperties"):
                    found += 1
                    assert any(f"`{name}`" in row and f" {limit:,}" in row for row in rows), (name, limit)
    assert found >= 5
