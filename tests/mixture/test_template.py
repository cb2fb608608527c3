"""Which characters are the assistant's: by markers, turn by turn, and against TRL's training variants where TRL is there."""

import copy
import importlib.util
import re
from importlib import resources
from pathlib import Path

import pytest
from tokenizers import AddedToken

from merit.errors import MixtureError
from merit.mixture.chat import IMAGE, Chat
from merit.mixture.encode import ChatEncoder, encode_chat
from merit.mixture.template import ChatTemplate

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(*contents, system=None):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def with_template(tokenizer, template):
    """The tokenizer with a template, whose markers in angle brackets it reads as tokens."""
    made = copy.deepcopy(tokenizer)
    markers = sorted(set(re.findall(r"<[^<>\s'\"{}%]{1,40}>", template)))
    made.add_special_tokens({"additional_special_tokens": [AddedToken(marker, normalized=False) for marker in markers]})
    made.add_special_tokens({"bos_token": "<|im_start|>"})
    made.chat_template = template
    return made


def target_text(row, tokenizer):
    return tokenizer.decode(row.input_ids[row.targets], skip_special_tokens=False)


# ---- TRL's training variants ---------------------------------------------------------------------------------------

_TRL = importlib.util.find_spec("trl")
TEMPLATES = Path(str(_TRL.origin)).parent / "chat_templates" if _TRL else Path("none")
FAMILIES = sorted(path.name[: -len("_training.jinja")] for path in TEMPLATES.glob("*_training.jinja"))
FAMILIES = [family for family in FAMILIES if (TEMPLATES / f"{family}.jinja").is_file()]
# Their generation prompts open a thought that the answers in their training text do not continue.
THOUGHTFUL = {family for family in FAMILIES if family.startswith(("deepseek", "nemotron"))}
REWRITTEN = {"glm4moe"}  # TRL's variant is another text
SPACED = {"llava_next"}  # TRL leaves the space after the end of turn out of the targets


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in THOUGHTFUL | REWRITTEN | SPACED])
@pytest.mark.parametrize("turns", [2, 4, 6])
def test_targets_are_those_of_trls_training_variant(byte_level, family, turns):
    words = ["the question", "one answer", "another", "two answers", "a third", "three answers"][:turns]
    original, variant = (
        with_template(byte_level, (TEMPLATES / f"{family}{ending}.jinja").read_text()) for ending in ("", "_training")
    )
    original.add_special_tokens({"additional_special_tokens": variant.all_special_tokens})  # the same ids
    marked = copy.deepcopy(original)
    marked.chat_template = variant.chat_template
    ours, theirs = (encode_chat(chat(*words), tokenizer, 10_000) for tokenizer in (original, marked))
    assert ours.input_ids.tolist() == theirs.input_ids.tolist()
    assert ours.targets.tolist() == theirs.targets.tolist()
    assert ours.prompt_length == theirs.prompt_length


@pytest.mark.parametrize("family", sorted(THOUGHTFUL))
def test_a_generation_prompt_that_no_answer_continues_is_refused(byte_level, family):
    tokenizer = with_template(byte_level, (TEMPLATES / f"{family}.jinja").read_text())
    with pytest.raises(MixtureError, match=r"generation prompt(.|\n)*model\.chat_template"):
        ChatTemplate(tokenizer)


# ---- turn by turn --------------------------------------------------------------------------------------------------


def test_turns_are_trained_as_they_are_generated(byte_level):
    """A template that drops the thinking of earlier turns: every turn is what the model says when its turn is the last."""
    forgetful = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' and loop.last %}(thinking) {% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = encode_chat(chat("a", "b", "c", "d"), with_template(byte_level, forgetful), 1000)
    assert target_text(row, byte_level) == "(thinking) b<|im_end|>(thinking) d<|im_end|>"
    whole = byte_level.decode(row.input_ids, skip_special_tokens=False)
    assert (
        whole == "user: a<|im_end|>assistant: (thinking) b<|im_end|>user: c<|im_end|>assistant: (thinking) d<|im_end|>"
    )


def test_a_template_that_hides_earlier_turns_is_refused_with_the_way_out(byte_level):
    hiding = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.role }}: {{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(MixtureError, match=r"turn 1 of 4(.|\n)*model\.chat_template"):
        encode_chat(chat("a", "b", "c", "d"), with_template(byte_level, hiding), 1000)


@pytest.mark.parametrize("system", [None, "be brief"])
def test_a_conversation_that_begins_with_the_assistant_trains_no_header(byte_level, system):
    """Fails on commit f5727a1: where a conversation began with the assistant, its role header was a target."""
    messages = [{"role": "assistant", "content": "hello"}, *chat("a", "b")]
    messages = ([{"role": "system", "content": system}] if system else []) + messages
    tokenizer = with_template(byte_level, CHATML)
    row = encode_chat(messages, tokenizer, 1000)
    assert target_text(row, tokenizer) == "hello<|im_end|>\nb<|im_end|>\n"
    [alone] = ChatEncoder(tokenizer, 1000).encode([Chat(messages[: 1 + bool(system)])])
    assert target_text(alone, tokenizer) == "hello<|im_end|>\n"


def test_a_last_token_that_reaches_into_the_next_turn_is_no_target(dropping):
    """The line end after an answer is one token with the next turn's first word: that token is the next turn's."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}The {{ m.content }}:{% else %}{{ m.content }}</s>.\n{% endif %}"
        "{% endfor %}"
    )
    tokenizer = copy.deepcopy(dropping)
    tokenizer.chat_template = template
    row = encode_chat(chat("a", "b", "c", "d"), tokenizer, 1000)
    read = [dropping.convert_ids_to_tokens(int(i)) for i in row.input_ids[row.targets]]
    assert "\nThe" not in read
    assert read.count("</s>") == 2


# ---- what the probe catches ----------------------------------------------------------------------------------------

LLAVA = (  # as llava-hf/llava-1.5 publishes it, but for the end of turn
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% if message['role'] != 'assistant' %}{{ message['content'] + ' ' }}"
    "{% else %}{% generation %}{{ message['content'] + 'END' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_text_between_generation_prompt_and_marked_text_is_target(byte_level):
    """Fails on commit f5727a1: LLaVA's space after ``ASSISTANT:`` was neither prompt nor target."""
    tokenizer = with_template(byte_level, LLAVA.replace("END", "<|im_end|>"))
    messages = chat("what", "cat", "and", "dog")
    row = encode_chat(messages, tokenizer, 1000)
    assert target_text(row, tokenizer) == " cat<|im_end|> dog<|im_end|>"
    prompt = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, tokenize=False)
    assert row.input_ids[: row.prompt_length].tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_an_end_of_turn_that_is_never_a_target_is_refused(byte_level):
    """Fails on commit f5727a1: LLaVA's template ends an answer with a space, so nothing taught the model to stop."""
    with pytest.raises(MixtureError, match=r"no token to stop at(.|\n)*model\.chat_template"):
        ChatTemplate(with_template(byte_level, LLAVA.replace("END", " ")))
    outside = LLAVA.replace(" + 'END' }}{% endgeneration %}", " }}{% endgeneration %}<|im_end|>")
    with pytest.raises(MixtureError, match="no token to stop at"):
        ChatTemplate(with_template(byte_level, outside))


def test_a_training_context_that_is_not_the_generation_prompt_is_refused(byte_level):
    """Fails on commit f5727a1: the text before a marked answer could be any, whatever generation starts from."""
    other = LLAVA.replace("END", "<|im_end|>").replace("'ASSISTANT:'", "'Answer: '")
    with pytest.raises(MixtureError, match=r"'.*ASSISTANT: ', but its generation prompt ends in '.*Answer: '"):
        ChatTemplate(with_template(byte_level, other))


# ---- templates that come with the package ----------------------------------------------------------------------------

PUBLISHED_LLAVA = (  # llava-hf/llava-1.5-7b-hf, chat_template.json
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def builtin(name):
    return (resources.files("merit.hf") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def test_llava_is_trained_with_an_end_of_turn_and_asked_as_published(byte_level):
    published = with_template(byte_level, PUBLISHED_LLAVA + "{# <image> #}")
    with pytest.raises(MixtureError, match=r"no token to stop at(.|\n)*builtin:llava-1\.5"):
        ChatTemplate(published, "<image>")
    ours = copy.deepcopy(published)
    ours.chat_template = builtin("llava-1.5")
    template = ChatTemplate(ours, "<image>")
    messages = chat(f"{IMAGE}what is it", "cat", "and now", "dog")
    text, spans = template.render(messages, images=1)
    end = ours.eos_token
    assert text == f"USER: <image>\nwhat is it ASSISTANT: cat{end}USER: and now ASSISTANT: dog{end}"
    assert [text[a:b] for a, b in spans] == [f" cat{end}", f" dog{end}"]
    parts = [{"type": "image"}, {"type": "text", "text": "what is it"}]
    asked = published.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    assert asked == text[: spans[0][0]]


@pytest.mark.parametrize("reasoning", ["because", None])
def test_deepseek_answers_close_the_thought_that_its_prompt_opens(byte_level, reasoning):
    tokenizer = with_template(byte_level, "<｜User｜><｜Assistant｜><think></think>")
    tokenizer.chat_template = builtin("deepseek-r1")
    answer = {"role": "assistant", "content": "four"} | ({"reasoning_content": reasoning} if reasoning else {})
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2"}, answer]
    template = ChatTemplate(tokenizer)
    text, [(start, end)] = template.render(messages)
    assert text[:start] == f"{tokenizer.bos_token}Be brief.<｜User｜>2 + 2<｜Assistant｜><think>\n"
    assert text[start:end] == f"{reasoning or ''}\n</think>\n\nfour{tokenizer.eos_token}"
    assert text[:start] == template.apply(messages[:2], prompt=True)[0]
    assert template.writes("reasoning_content")
    assert not template.writes("tools")
