import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merit.errors import MixtureError
from merit.hf.rows import EncodedRow
from merit.mixture.chat import Chat
from merit.mixture.dataset import EncodedDataset
from merit.mixture.encode import ChatEncoder, encode_chat

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
text = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=30).filter(str.strip)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def chat(*contents, system=None):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def with_template(tokenizer, template):
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def target_text(row, tokenizer):
    return tokenizer.decode(row.input_ids[row.targets], skip_special_tokens=False)


@quick
@given(contents=st.lists(text, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0))
@pytest.mark.parametrize("template", ["default", "chatml"])
def test_targets_are_the_assistant_turns_and_their_ends(byte_level, template, contents):
    tokenizer = byte_level if template == "default" else with_template(byte_level, CHATML)
    row = encode_chat(chat(*contents), tokenizer, 10_000)
    end = "<|im_end|>" if template == "default" else "<|im_end|>\n"
    assert target_text(row, tokenizer) == "".join(answer + end for answer in contents[1::2])
    assert not row.targets[0]
    assert row.input_ids.dtype == np.int32
    assert row.targets.dtype == bool


@quick
@given(contents=st.lists(text, min_size=2, max_size=4).filter(lambda c: len(c) % 2 == 0))
def test_the_prompt_is_what_generation_starts_from(byte_level, dropping, contents):
    for tokenizer in (byte_level, dropping):
        row = encode_chat(chat(*contents), tokenizer, 10_000)
        if isinstance(row, str):
            assert row == "answer_lost"
            continue
        prompt = tokenizer.apply_chat_template(chat(*contents)[:-1], add_generation_prompt=True, tokenize=False)
        expected = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert row.input_ids[: row.prompt_length].tolist() == expected
        assert row.answer == contents[-1]


def test_marked_and_turn_by_turn_templates_agree(byte_level):
    marked = CHATML.replace("{{ m.content }}<|im_end|>\n", "{{ m.content }}<|im_end|>\n").replace(
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}",
    )
    conversation = chat("one", "two", "three", "four", system="be brief")
    first, second = (encode_chat(conversation, with_template(byte_level, t), 1000) for t in (marked, CHATML))
    assert first.input_ids.tolist() == second.input_ids.tolist()
    assert first.targets.tolist() == second.targets.tolist()


def test_markers_that_do_not_match_the_turns_are_refused(byte_level):
    one_block = (
        "{% for m in messages %}{% if loop.first %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if messages|length > 1 %}{% generation %}{% for m in messages[1:] %}{{ m.content }}{% endfor %}<|im_end|>"
        "{% endgeneration %}{% endif %}"
    )
    with pytest.raises(MixtureError, match=r"1 stretches .* 2 assistant turns"):
        encode_chat(chat("a", "b", "c", "d"), with_template(byte_level, one_block), 1000)


def test_a_template_that_leaves_the_answer_out_is_refused(byte_level):
    silent = "{% for m in messages %}{% generation %}<|im_end|>{% endgeneration %}{% endfor %}"
    with pytest.raises(MixtureError, match=r"cannot render|stretches"):
        encode_chat(chat("a", "b"), with_template(byte_level, silent), 1000)


def test_an_end_of_turn_that_is_read_as_letters_is_refused(byte_level):
    from tokenizers import AddedToken, Tokenizer, normalizers

    inner = Tokenizer.from_str(byte_level.backend_tokenizer.to_str())
    inner.normalizer = normalizers.Prepend("_")
    inner.add_special_tokens([AddedToken("<|over|>", normalized=True)])
    broken = type(byte_level)(tokenizer_object=inner, eos_token=AddedToken("<|over|>", normalized=True))
    broken.chat_template = byte_level.chat_template
    with pytest.raises(MixtureError, match="over"):
        encode_chat(chat("a", "b"), broken, 100)


def test_no_template_and_no_end_token_are_errors(byte_level):
    with pytest.raises(MixtureError, match="no chat template"):
        encode_chat(chat("a", "b"), with_template(byte_level, None), 100)


@quick
@given(data=st.data())
def test_dropped_characters_do_not_shift_targets(dropping, data):
    known = "abc The is.\n"
    mixed = st.text(st.sampled_from(known + "=+日üб"), min_size=1, max_size=25)
    question, answer = data.draw(mixed.filter(str.strip)), data.draw(mixed.filter(str.strip))
    row = encode_chat(chat(question, answer), dropping, 1000)
    kept = "".join(c for c in answer if c in known)
    if not kept.strip():
        assert row == "answer_lost"
        return
    assert target_text(row, dropping) == kept + "</s>"


def test_dropping_characters_beforehand_leaves_the_ids_as_they_are(dropping):
    conversation = chat("a = b? 日本", "it is ü so. a=b")
    row = encode_chat(conversation, dropping, 1000)
    raw = dropping.apply_chat_template(conversation, tokenize=False)
    assert row.input_ids.tolist() == dropping(raw, add_special_tokens=False)["input_ids"]


def test_a_token_never_joins_prompt_and_answer(dropping):
    joint = dropping("Assistant:\nThe", add_special_tokens=False)["input_ids"]
    assert dropping.convert_ids_to_tokens(joint)[-1] == "\nThe"  # the trap is there
    row = encode_chat(chat("q", "The cat"), dropping, 1000)
    tokens = dropping.convert_ids_to_tokens(row.input_ids.tolist())
    assert tokens[row.prompt_length - 1 : row.prompt_length + 1] == ["\n", "The"]
    assert target_text(row, dropping) == "The cat</s>"


def test_no_second_beginning_of_sequence(dropping):
    row = encode_chat(chat("a", "b"), dropping, 1000)
    assert (row.input_ids == dropping.bos_token_id).sum() == 1


def test_truncation_keeps_the_beginning_and_says_so(byte_level):
    whole = encode_chat(chat("question", "a long answer. " * 10), byte_level, 1000)
    cut = encode_chat(chat("question", "a long answer. " * 10), byte_level, whole.prompt_length + 3)
    assert cut.truncated
    assert not whole.truncated
    assert cut.input_ids.tolist() == whole.input_ids[: whole.prompt_length + 3].tolist()
    assert cut.targets.sum() == 3
    assert encode_chat(chat("question", "answer"), byte_level, whole.prompt_length) == "no_target_after_truncation"


def test_a_cut_conversation_generates_its_last_surviving_answer(byte_level):
    conversation = chat("q1", "first answer", "q2 " * 50, "second answer")
    first = encode_chat(conversation[:2], byte_level, 1000)
    row = encode_chat(conversation, byte_level, len(first.input_ids) + 5)
    assert (row.answer, row.prompt_length) == ("first answer", first.prompt_length)


def test_context_turns_are_no_targets(byte_level):
    [row] = ChatEncoder(byte_level, 1000).encode([Chat(chat("a", "shown", "b", "wanted"), first_target=2)])
    assert target_text(row, byte_level) == "wanted<|im_end|>"


def test_batches_do_not_depend_on_their_neighbours(dropping):
    chats = [Chat(chat(f"question {c}", f"The {c} is {c}")) for c in "ab日ücd"]
    together = ChatEncoder(dropping, 100).encode(chats)
    apart = [ChatEncoder(dropping, 100).encode([one])[0] for one in chats]
    assert [row.input_ids.tolist() for row in together] == [row.input_ids.tolist() for row in apart]


def test_template_refusals_are_told_apart(byte_level):
    tokenizer = with_template(
        byte_level, "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    encoder = ChatEncoder(tokenizer, 100)
    rows = encoder.encode([Chat(chat("a", "b", system="s")), Chat(chat("a", "b"))])
    assert rows[0] == "refused_by_template"
    assert isinstance(rows[1], EncodedRow)
    assert "no system" in encoder.template.refusal(chat("a", "b", system="s"))


def test_unknown_characters_are_found(unknowing, byte_level):
    assert ChatEncoder(unknowing, 100).inventory.count_lost(["ab 12 é", "é"]) == {"1": 1, "2": 1, "é": 2}
    assert ChatEncoder(byte_level, 100).inventory.count_lost(["ab 12 é 日本 \u200d🙂\t"]) == {}


def test_whole_words_are_not_judged_by_their_letters(whole_words):
    inventory = ChatEncoder(whole_words, 100).inventory
    assert inventory.count_lost(["the cat that", "which is it"]) == {}
    assert inventory.count_lost(["the dog", "a\u00adx"]) == {"d": 1, "o": 1, "g": 1, "a": 1, "x": 1}
    assert inventory.kept("the dog is") == "the  is"
    assert [inventory.nothing_kept(text) for text in ("dogs bark", "the dog", "the cat")] == [True, False, False]
    row = encode_chat(chat("which cat", "that dog is the cat"), whole_words, 100)
    assert whole_words.convert_ids_to_tokens(row.input_ids[row.targets].tolist()) == [
        "that", "<unk>", "is", "the", "cat", "</s>",
    ]  # fmt: skip


def rows_of(seed=0, count=7):
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        n = int(generator.integers(2, 9))
        targets = generator.random(n) < 0.5
        targets[0] = False
        rows.append(EncodedRow(generator.integers(0, 9, n).astype(np.int32), targets, 1, bool(n % 2), f"answer {n}"))
    return rows


def test_a_saved_dataset_comes_back_whole(tmp_path):
    rows = rows_of()
    made = EncodedDataset("some-name", rows)
    made.save(tmp_path / "x.parquet")
    loaded = EncodedDataset.load(tmp_path / "x.parquet")
    assert (loaded.name, len(loaded), loaded.fingerprint) == ("some-name", len(rows), made.fingerprint)
    assert loaded.answers == made.answers
    for row, again in zip(rows, (loaded[i] for i in range(len(loaded))), strict=True):
        assert again.input_ids.tolist() == row.input_ids.tolist()
        assert again.targets.tolist() == row.targets.tolist()
        assert (again.prompt_length, again.truncated, again.answer) == (1, row.truncated, row.answer)
        assert again.input_ids.dtype == np.int32
    assert loaded.lengths.tolist() == [len(row.input_ids) for row in rows]
    assert loaded.target_counts.tolist() == [int(row.targets.sum()) for row in rows]
    assert loaded[-1].input_ids.tolist() == rows[-1].input_ids.tolist()
    with pytest.raises(IndexError):
        loaded[len(rows)]


def test_the_fingerprint_sees_ids_targets_and_row_borders():
    a, b = np.array([1, 2, 3, 4], np.int32), np.array([False, True, True, True])
    base = EncodedDataset("n", [EncodedRow(a, b)]).fingerprint
    ids, flipped = a.copy(), b.copy()
    ids[2], flipped[2] = 9, False
    others = [[EncodedRow(ids, b)], [EncodedRow(a, flipped)], [EncodedRow(a[:2], b[:2]), EncodedRow(a[2:], b[2:])]]
    assert len({base, *(EncodedDataset("n", rows).fingerprint for rows in others)}) == 4
    assert EncodedDataset("other name", [EncodedRow(a, b)]).fingerprint == base


def test_damaged_files_are_refused_by_name(tmp_path):
    path = tmp_path / "x.parquet"
    EncodedDataset("x", rows_of()).save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(MixtureError, match=r"x\.parquet"):
        EncodedDataset.load(path)
    with pytest.raises(MixtureError, match="missing"):
        EncodedDataset.load(tmp_path / "missing.parquet")


def test_a_swapped_row_body_is_noticed(tmp_path):
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    EncodedDataset("x", rows_of(0)).save(path)
    table = pq.read_table(path)
    swapped = table.set_column(1, "targets", table["targets"].take(list(range(len(table)))[::-1]))
    lengths_kept = swapped.replace_schema_metadata(table.schema.metadata)
    pq.write_table(lengths_kept, path)
    with pytest.raises(MixtureError, match="fingerprint"):
        _ = EncodedDataset.load(path)[0]
