"""Every key of every row form: used, counted as ignored, or refused."""

import json

import pytest

from merit.errors import MixtureError
from merit.mixture.chat import BadRow
from merit.mixture.encode import ChatEncoder
from merit.mixture.formats import to_chat
from mixture.mixture_cases import encode
from mixture.test_template import TEMPLATES, with_template

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}


def turns(chat):
    return [(turn["role"], turn["content"]) for turn in chat.messages]


def run(recipe, tokenizer, folder, rows, **mixture):
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return encode(recipe({"datasets": [{"name": "d", "path": str(path)}], **mixture}), tokenizer, folder / "out")


def target_text(row, tokenizer):
    return tokenizer.decode(row.input_ids[row.targets], skip_special_tokens=False)


@pytest.mark.parametrize("key", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_a_turn_of_weight_zero_is_no_target(recipe, byte_level, tmp_path, key):
    """Fails on commit f5727a1: ``"weight": 0`` on an assistant's turn was trained all the same."""
    rows = [{"messages": [USER, {**ANSWER, "content": "bad", **key}, USER, {**ANSWER, "weight": 1}]}]
    mix = run(recipe, byte_level, tmp_path, rows)
    assert target_text(mix.train["d"][0], byte_level) == "a<|im_end|>"
    assert mix.counts[0].keys_ignored == {}
    with pytest.raises(BadRow, match="no assistant turn"):
        to_chat({"messages": [USER, {**ANSWER, **key}]}, "messages")
    [last] = ChatEncoder(byte_level, 99).encode(
        [to_chat({"messages": [USER, ANSWER, USER, {**ANSWER, **key}]}, "messages")]
    )
    assert target_text(last, byte_level) == "a<|im_end|>"
    with pytest.raises(BadRow, match=r"weight 0\.5"):
        to_chat({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "messages")


def test_alpacas_system_and_history_are_used():
    """Fails on commit f5727a1: Alpaca's ``system`` and ``history`` were ignored without a word."""
    row = {"instruction": "now", "output": "c", "system": "be brief", "history": [["one", "a"], ["two", "b"]]}
    assert turns(to_chat(row, "alpaca")) == [
        ("system", "be brief"),
        *[
            ("user", "one"),
            ("assistant", "a"),
            ("user", "two"),
            ("assistant", "b"),
            ("user", "now"),
            ("assistant", "c"),
        ],
    ]
    assert turns(to_chat({**row, "system": "", "history": None}, "alpaca")) == [("user", "now"), ("assistant", "c")]


def test_the_system_column_of_other_forms_is_used():
    """Fails on commit f5727a1: the ``system`` column of ShareGPT and prompt/completion rows was ignored."""
    share = {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert turns(to_chat(share, "sharegpt")) == [("system", "s"), ("user", "q"), ("assistant", "a")]
    pair = {"system": "s", "prompt": [USER, ANSWER, USER], "completion": "b"}
    chat = to_chat(pair, "prompt_completion")
    assert turns(chat)[0] == ("system", "s")
    assert chat.targets == [False, True]
    with pytest.raises(BadRow, match="another text"):
        to_chat({"system": "s", "messages": [{"role": "system", "content": "t"}, USER, ANSWER]}, "messages")


@pytest.mark.skipif(not TEMPLATES.is_dir(), reason="needs the templates that TRL ships")
def test_tools_and_calls_go_through_the_chat_template(recipe, byte_level, tmp_path):
    """Fails on commit f5727a1: ``tools`` and ``tool_calls`` were ignored, and what was left of the turn was trained."""
    tokenizer = with_template(byte_level, (TEMPLATES / "qwen2_5.jinja").read_text())
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    messages = [USER, call, {"role": "tool", "content": "2", "tool_call_id": "c1"}, ANSWER]
    mix = run(recipe, tokenizer, tmp_path, [{"messages": messages, "tools": json.dumps([TOOL])}])
    row = mix.train["d"][0]
    whole = tokenizer.decode(row.input_ids, skip_special_tokens=False)
    assert whole == tokenizer.apply_chat_template(
        [
            USER,
            {**call, "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]},
            *messages[2:],
        ],
        tools=[TOOL],
        tokenize=False,
    )
    learned = target_text(row, tokenizer)
    assert '{"name": "add", "arguments": {"x": 1}}' in learned
    assert "adds" not in learned
    assert mix.counts[0].keys_ignored == {}


def test_what_the_template_does_not_write_is_counted_or_refused(recipe, byte_level, tmp_path):
    """Fails on commit f5727a1: a template without tools or reasoning lost both without a word."""
    rows = [{"messages": [USER, {**ANSWER, "reasoning_content": "hm"}], "tools": [TOOL]}, {"messages": [USER, ANSWER]}]
    mix = run(recipe, byte_level, tmp_path, rows)
    assert mix.counts[0].keys_ignored == {"reasoning_content": 1, "tools": 1}
    assert len([text for text in mix.warnings if "not used" in text]) == 2
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    with pytest.raises(MixtureError, match="does not write tool calls"):
        run(recipe, byte_level, tmp_path, [{"messages": [USER, call]}])


@pytest.mark.skipif(not TEMPLATES.is_dir(), reason="needs the templates that TRL ships")
def test_reasoning_is_trained_where_the_template_writes_it(byte_level):
    """Fails on commit f5727a1: ``reasoning_content`` was ignored."""
    tokenizer = with_template(byte_level, (TEMPLATES / "qwen3.jinja").read_text())
    chat = to_chat({"messages": [USER, {**ANSWER, "reasoning_content": "hm"}]}, "messages")
    [row] = ChatEncoder(tokenizer, 999).encode([chat])
    assert target_text(row, tokenizer) == "<think>\nhm\n</think>\n\na<|im_end|>\n"


def test_every_other_key_is_named_and_counted(recipe, byte_level, tmp_path):
    """Fails on commit f5727a1: unknown keys of rows and turns were dropped without a count."""
    rows = [
        {"messages": [USER, {**ANSWER, "mask": 1}], "id": 7, "rejected": "b", "source": None},
        {"messages": [{**USER, "weight": 0}, ANSWER], "id": 8},
    ]
    mix = run(recipe, byte_level, tmp_path, rows)
    assert mix.counts[0].keys_ignored == {"id": 2, "messages[].mask": 1, "messages[].weight": 1, "rejected": 1}
    said = [text for text in mix.warnings if "not used" in text]
    assert [text.split(" is not used")[0].split(": ")[-1] for text in said] == [
        "messages[].mask",
        "messages[].weight",
        "rejected",
    ]


def test_placeholders_without_their_media(recipe, byte_level, tmp_path):
    """Fails on commit f5727a1: ``<image>`` without an image column and ``<video>`` were trained as text, unsaid."""
    rows = [{"prompt": "<image>\nq", "completion": "a"}, {"prompt": "<video>q", "completion": "a"}]
    mix = run(recipe, byte_level, tmp_path, rows)
    assert mix.counts[0].keys_ignored == {"<image>": 1, "<video>": 1}
    assert sum("not used" in text for text in mix.warnings) == 2
    with pytest.raises(MixtureError, match="video and audio cannot be used"):
        run(recipe, byte_level, tmp_path, [{"prompt": "q", "completion": "a", "video": "a.mp4"}])
    assert to_chat({"prompt": "q", "completion": "a", "video": []}, "prompt_completion").ignored == {"video"}


def test_sharegpts_function_calls_are_calls():
    talk = [
        ("human", "q"),
        ("function_call", '{"name": "add", "arguments": {"x": 1}}'),
        ("observation", "2"),
        ("gpt", "3"),
    ]
    chat = to_chat({"conversations": [{"from": who, "value": text} for who, text in talk]}, "sharegpt")
    assert [turn["role"] for turn in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}]
    with pytest.raises(BadRow, match="must name a function"):
        to_chat({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "sharegpt")
