import pytest

from merit.mixture.chat import BadRow
from merit.mixture.formats import recognise, to_chat


def pairs(chat):
    return [(turn["role"], turn["content"]) for turn in chat.messages]


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "messages",
            [("user", "q"), ("assistant", "a")],
        ),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", [("user", "q"), ("assistant", "a")]),
        ({"inputs": "q", "targets": "a", "task": "t"}, "flan", [("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "output": "a"}, "alpaca", [("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "input": "x", "output": "a"}, "alpaca", [("user", "q\n\nx"), ("assistant", "a")]),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", [("user", "q"), ("assistant", "a")]),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            "sharegpt",
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
    ],
)
def test_every_format_gives_the_same_chat_form(row, name, expected):
    assert recognise(row) == name
    assert pairs(to_chat(row, name)) == expected


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two", "image": None}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[1:]}]}
    assert pairs(to_chat(row, "messages")) == [("user", "one two"), ("assistant", "two")]


def test_a_list_valued_prompt_is_context():
    row = {
        "prompt": [
            {"role": "system", "content": " "},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "shown"},
            {"role": "user", "content": "q2"},
        ],
        "completion": [{"role": "assistant", "content": "a"}],
    }
    chat = to_chat(row, "prompt_completion")
    assert pairs(chat)[chat.first_target :] == [("assistant", "a")]
    assert len(chat.messages) == 4


def test_turns_after_the_last_answer_are_cut():
    turns = [("user", "q"), ("assistant", "a"), ("user", "thanks")]
    chat = to_chat({"messages": [{"role": r, "content": c} for r, c in turns]}, "messages")
    assert pairs(chat) == turns[:2]


@pytest.mark.parametrize(
    ("row", "name", "reason", "words"),
    [
        ({"messages": [{"role": "user", "content": "q"}]}, "messages", "no_assistant_turn", "user"),
        ({"messages": []}, "messages", "no_assistant_turn", "roles"),
        ({"messages": None}, "messages", "not_text", "messages"),
        ({"messages": [{"role": "assitant", "content": "a"}]}, "messages", "unknown_role", "Did you mean 'assistant'"),
        (
            {"messages": [{"role": "user", "content": ["q"]}]},
            "messages",
            "not_text",
            "part 0, must be a text or image part",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "video"}]}]},
            "messages",
            "not_text",
            "messages[0] (user), part 1, must be a text or image part (type 'text', 'image' or 'image_url'); found a part "
            "of type 'video'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "not_text", "null or missing"),
        (
            {"messages": [{"role": "user", "content": []}, {"role": "assistant", "content": "a"}]},
            "messages",
            "empty_prompt",
            "turn 0",
        ),
        ({"prompt": "q", "completion": "\ud83d"}, "prompt_completion", "not_text", "surrogate pair ('\\ud83d'"),
        ({"prompt": "q", "completion": 5}, "prompt_completion", "not_text", "int 5"),
        ({"prompt": "q", "completion": " "}, "prompt_completion", "empty_answer", "turn 1"),
        ({"instruction": "", "output": "a"}, "alpaca", "empty_prompt", "turn 0"),
        ({"instruction": "q"}, "alpaca", "not_text", "output"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "sharegpt", "unknown_role", "narrator"),
        (
            {"prompt": "q", "completion": [{"role": "user", "content": "q"}]},
            "prompt_completion",
            "no_assistant_turn",
            "",
        ),
    ],
)
def test_bad_rows_say_what_is_wrong(row, name, reason, words):
    with pytest.raises(BadRow) as caught:
        to_chat(row, name)
    assert caught.value.reason == reason
    assert words in caught.value.detail


def test_unknown_columns_are_no_format():
    assert recognise({"question": 1, "answer": 2}) is None
