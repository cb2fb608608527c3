"""Where a row's images are found and where they stand, in every format, against hand-written expectations."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from merit.hf.images import decode
from merit.mixture.chat import IMAGE, BadRow
from merit.mixture.formats import recognise, to_chat

A, B = "a.jpg", "b/c.png"
EMBEDDED = {"bytes": b"encoded", "path": "somewhere.jpg"}


def said(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def llava(*values, **columns):
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(values)], **columns}


def parts(*items):
    return [item if isinstance(item, dict) else {"type": "text", "text": item} for item in items]


SLOT = {"type": "image"}
CASES = {
    "parts bound in order to the column": (
        {"messages": said(("user", parts(SLOT, "left, ", SLOT, "right?")), ("assistant", "yes")), "images": [A, B]},
        "messages",
        [("user", f"{IMAGE}left, {IMAGE}right?"), ("assistant", "yes")],
        [A, B],
    ),
    "parts with nulls, as Parquet fills them in": (
        {
            "messages": said(
                (
                    "user",
                    [{"type": "image", "text": None, "image": None}, {"type": "text", "text": "q", "image": None}],
                ),
                ("assistant", [{"type": "text", "text": "a", "image": None}]),
            ),
            "image": EMBEDDED,
        },
        "messages",
        [("user", f"{IMAGE}q"), ("assistant", "a")],
        [b"encoded"],
    ),
    "parts with images of their own": (
        {
            "messages": said(
                (
                    "user",
                    parts(
                        {"type": "image", "image": A},
                        {"type": "image", "path": "p.png"},
                        {"type": "image", "url": "u.png"},
                        {"type": "image_url", "image_url": {"url": "file:///data/v.png"}},
                        {"type": "image_url", "image_url": "w.png"},
                        {"type": "image", "image": EMBEDDED},
                        "q",
                    ),
                ),
                ("assistant", "a"),
            )
        },
        "messages",
        [("user", f"{IMAGE * 6}q"), ("assistant", "a")],
        [A, "p.png", "u.png", "/data/v.png", "w.png", b"encoded"],
    ),
    "own images and the column's, mixed": (
        {
            "messages": said(("user", parts(SLOT, {"type": "image", "image": "mine"}, SLOT)), ("assistant", "a")),
            "images": [A, B],
        },
        "messages",
        [("user", IMAGE * 3), ("assistant", "a")],
        [A, "mine", B],
    ),
    "base64 in a data URL": (
        {
            "messages": said(
                (
                    "user",
                    parts(
                        {
                            "type": "image_url",
                            "image_url": {"url": f"data:image/png;base64,{base64.b64encode(b'xyz').decode()}"},
                        }
                    ),
                ),
                ("assistant", "a"),
            )
        },
        "messages",
        [("user", IMAGE), ("assistant", "a")],
        [b"xyz"],
    ),
    "placeholders in messages": (
        {
            "messages": said(("user", "<image>What?"), ("assistant", "a"), ("user", "and <image> here")),
            "images": [A, B],
        },
        "messages",
        [("user", f"{IMAGE}What?"), ("assistant", "a")],
        [A],  # the turn after the last answer goes, and its image with it
    ),
    "LLaVA: the line end beside the placeholder is the placeholder's": (
        llava("<image>\nWhat is it?", "A cat.", "Sure?", "Yes.", image=A),
        "sharegpt",
        [("user", f"{IMAGE}What is it?"), ("assistant", "A cat."), ("user", "Sure?"), ("assistant", "Yes.")],
        [A],
    ),
    "LLaVA: at the end": (
        llava("What is it?\n<image>", "A cat.", image=A),
        "sharegpt",
        [("user", f"What is it?{IMAGE}"), ("assistant", "A cat.")],
        [A],
    ),
    "LLaVA: in the middle, where the text stays": (
        llava("<image>\n<image>\n\nFirst\n<image>\nlast", "a", image=[A, B, "c"]),
        "sharegpt",
        [("user", f"{IMAGE}{IMAGE}\nFirst\n{IMAGE}\nlast"), ("assistant", "a")],
        [A, B, "c"],
    ),
    "LLaVA: images without places go first": (
        llava("What is it?", "A cat.", "Sure?", "Yes.", image=[A, B]),
        "sharegpt",
        [("user", f"{IMAGE}{IMAGE}What is it?"), ("assistant", "A cat."), ("user", "Sure?"), ("assistant", "Yes.")],
        [A, B],
    ),
    "LLaVA-OneVision: embedded, with more columns": (
        llava("<image>\nq", "a", id="1", image=EMBEDDED, data_source="s"),
        "sharegpt",
        [("user", f"{IMAGE}q"), ("assistant", "a")],
        [b"encoded"],
    ),
    "Vision-FLAN": (
        {"id": "x", "image": "t_1.jpg", "task_name": "t", **llava("Which?\n<image>", "(a)")},
        "sharegpt",
        [("user", f"Which?{IMAGE}"), ("assistant", "(a)")],
        ["t_1.jpg"],
    ),
    "The Cauldron": (
        {
            "images": [EMBEDDED, {"bytes": None, "path": A}],
            "texts": [{"user": "q", "assistant": "a", "source": "s"}, {"user": "r", "assistant": "b", "source": "s"}],
        },
        "cauldron",
        [("user", f"{IMAGE}{IMAGE}q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")],
        [b"encoded", A],
    ),
    "The Cauldron with placeholders": (
        {"images": [A], "texts": [{"user": "q", "assistant": "a"}, {"user": "r <image>?", "assistant": "b"}]},
        "cauldron",
        [("user", "q"), ("assistant", "a"), ("user", f"r {IMAGE}?"), ("assistant", "b")],
        [A],
    ),
    "prompt and completion": (
        {"prompt": "q", "completion": "a", "image": A},
        "prompt_completion",
        [("user", f"{IMAGE}q"), ("assistant", "a")],
        [A],
    ),
    "lists of messages as prompt": (
        {
            "prompt": said(("system", ""), ("user", parts(SLOT, "q"))),
            "completion": said(("assistant", "a")),
            "images": [A],
        },
        "prompt_completion",
        [("user", f"{IMAGE}q"), ("assistant", "a")],
        [A],
    ),
    "Alpaca": (
        {"instruction": "q", "input": "see <image>", "output": "a", "images": [A]},
        "alpaca",
        [("user", f"q\n\nsee {IMAGE}"), ("assistant", "a")],
        [A],
    ),
    "CSV: a list as JSON": (
        {"prompt": "<image><image>q", "completion": "a", "images": json.dumps([A, B])},
        "prompt_completion",
        [("user", f"{IMAGE}{IMAGE}q"), ("assistant", "a")],
        [A, B],
    ),
    "an object replacement character of the text": (
        llava(f"<image>\nq{IMAGE}?", f"a{IMAGE}", image=A),
        "sharegpt",
        [("user", f"{IMAGE}q?"), ("assistant", "a")],
        [A],
    ),
    "a placeholder beside parts is text": (
        {"messages": said(("user", parts(SLOT, "the tag <image>")), ("assistant", "a")), "images": [A]},
        "messages",
        [("user", f"{IMAGE}the tag <image>"), ("assistant", "a")],
        [A],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_images_stand_where_the_row_says(name):
    row, row_format, turns, images = CASES[name]
    assert recognise(row) == row_format
    chat = to_chat(row, row_format)
    assert [(turn["role"], turn["content"]) for turn in chat.messages] == turns
    assert list(chat.raw) == images
    assert sum(turn["content"].count(IMAGE) for turn in chat.messages) == len(images)


@pytest.mark.parametrize(
    "column", [{}, {"image": None}, {"images": []}, {"image": ""}, {"images": None, "image": None}]
)
def test_rows_without_images_are_as_before(column):
    row = {"prompt": f"an {IMAGE} sign", "completion": "a", **column}
    chat = to_chat(row, "prompt_completion")
    assert (chat.messages[0]["content"], chat.raw) == (f"an {IMAGE} sign", ())


def test_a_tag_in_the_text_of_a_row_without_an_image_column_is_text():
    chat = to_chat(llava("What does <image>\n do?", "Nothing."), "sharegpt")
    assert (chat.messages[0]["content"], chat.raw) == ("What does <image>\n do?", ())


def test_pil_images_become_files_with_the_same_pixels():
    image = Image.new("RGB", (3, 2), (9, 8, 7))
    chat = to_chat({"prompt": "q", "completion": "a", "image": image}, "prompt_completion")
    [data] = chat.raw
    again = decode(data, 100)
    assert (again.size, again.getpixel((2, 1))) == ((3, 2), (9, 8, 7))
    turned = Image.new("CMYK", (3, 2))
    turned.getexif()[274] = 6
    [data] = to_chat({"prompt": "q", "completion": "a", "image": turned}, "prompt_completion").raw
    assert decode(data, 100).size == (2, 3)


@pytest.mark.parametrize(
    ("row", "row_format", "reason", "words"),
    [
        (llava("<image><image>q", "a", image=A), "sharegpt", "image_count", "1 image and 2 places"),
        (llava("<image>q", "a", image=[A, B]), "sharegpt", "image_count", "2 images and 1 place"),
        (llava("<image>q", "a", image=None), "sharegpt", "image_count", "0 images and 1 place"),
        (
            {"messages": said(("user", parts(SLOT, "q")), ("assistant", "a"))},
            "messages",
            "image_count",
            "0 images and 1 place",
        ),
        (
            {
                "messages": said(("user", parts({"type": "image", "image": A})), ("assistant", "a")),
                "images": [B],
            },
            "messages",
            "image_count",
            "1 image and 0 places",
        ),
        (llava("q", "a", image=A, images=[B]), "sharegpt", "image_count", "both columns"),
        (
            {"messages": said(("user", "q"), ("assistant", parts(SLOT, "a"))), "images": [A]},
            "messages",
            "image_turn",
            "assistant's turn",
        ),
        (
            {"messages": said(("system", "<image>"), ("user", "q"), ("assistant", "a")), "images": [A]},
            "messages",
            "image_turn",
            "system's turn",
        ),
        (llava("q", "a", image="https://example.org/a.jpg"), "sharegpt", "image_url", "https://example.org/a.jpg"),
        (
            {
                "messages": said(
                    ("user", parts({"type": "image_url", "image_url": {"url": "http://example.org/x"}})),
                    ("assistant", "a"),
                )
            },
            "messages",
            "image_url",
            "part 0, is a URL (http://example.org/x): images are read only from files",
        ),
        (llava("q", "a", image={"bytes": None, "path": None}), "sharegpt", "image_missing", "neither bytes nor a path"),
        (llava("<image><image>q", "a", image=[A, None]), "sharegpt", "image_missing", "image[1] is null"),
        (llava("q", "a", image=5), "sharegpt", "image_format", "found 5"),
        (llava("q", "a", image="data:image/png;base64,%%%"), "sharegpt", "image_damaged", "base64"),
        ({"images": [A], "texts": [{"user": "q"}]}, "cauldron", "not_text", "texts[0].assistant"),
        ({"images": [A], "texts": "q"}, "cauldron", "not_text", "texts must be a list"),
        ({"images": [A], "texts": []}, "cauldron", "image_count", "1 image and 0 places"),
        ([1], "messages", "not_text", "object"),
    ],
)
def test_rows_whose_images_cannot_be_placed_say_why(row, row_format, reason, words):
    with pytest.raises(BadRow) as caught:
        to_chat(row, row_format)
    assert caught.value.reason == reason
    assert words in caught.value.detail
    assert caught.value.about_image == reason.startswith("image_")


TEXTS = st.sampled_from(["q", "<image>", "<image>\nq", "q\n<image>", f"x{IMAGE}", "", "a <image> b <image>"])
PICTURES = st.sampled_from([None, "", A, B, b"bytes", EMBEDDED, {"bytes": None, "path": None}, 3, "http://x/y.png", []])
PARTS = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, TEXTS),
    st.builds(lambda key, image: {"type": "image", key: image}, st.sampled_from(["image", "path", "url"]), PICTURES),
    st.just({"type": "image"}),
    st.just({"type": "video"}),
)
TURNS = st.lists(
    st.tuples(st.sampled_from(["system", "user", "user", "assistant"]), st.one_of(TEXTS, st.lists(PARTS, max_size=3))),
    max_size=4,
)


@given(
    TURNS, st.dictionaries(st.sampled_from(["image", "images"]), st.one_of(PICTURES, st.lists(PICTURES, max_size=3)))
)
def test_every_row_has_as_many_places_as_images_or_is_bad(turns, columns):
    row = {"messages": [{"role": role, "content": content} for role, content in turns], **columns}
    try:
        chat = to_chat(row, "messages")
    except BadRow:
        return
    assert all(isinstance(image, str | bytes) and image for image in chat.raw)
    assert chat.messages[-1]["role"] == "assistant"
    if chat.raw:
        assert sum(turn["content"].count(IMAGE) for turn in chat.messages) == len(chat.raw)
        assert all(IMAGE not in turn["content"] for turn in chat.messages if turn["role"] != "user")
