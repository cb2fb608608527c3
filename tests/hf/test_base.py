"""What is known of a base comes from its files and settings, whatever was done with it before."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.builders import make_base, make_vision_base
from tokenizers import Tokenizer

import merit
from merit.demo import base_folder
from merit.errors import CheckpointError, RecipeError
from merit.hf.base import open_base
from merit.hf.side_files import edit_json
from merit.recipe.load import locate
from merit.recipe.schema import ModelSettings

HISTORIES = {
    "none": "",
    "tokenizer used, left padding, truncation": """
base.tokenizer.padding_side = "left"
base.tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=3)
base.tokenizer.backend_tokenizer.enable_padding(direction="left", length=7)
""",
    "batches and template probed": """
import numpy as np
from merit.hf.rows import EncodedRow
from merit.mixture.template import ChatTemplate
base.batcher([EncodedRow(np.arange(5, dtype=np.int32), np.ones(5, bool))], left=True)
ChatTemplate(base.tokenizer, base.images and base.images.token).render([
    {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}])
""",
    "handed to another process": """
import pickle, tempfile, subprocess, sys
base.tokenizer(["a", "bb"], padding=True)
handed = pickle.dumps(base)
base = pickle.loads(handed)
assert "tokenizer" not in vars(base)
""",
}
SCRIPT = """
import json, sys
from merit.hf.base import open_base
found = {}
for name, history in json.loads(sys.argv[1]).items():
    found[name] = {}
    for folder in sys.argv[2:]:
        base = open_base(folder)
        exec(history)
        found[name][folder] = [base.input_fingerprint, base.fingerprint]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Both demo bases, and a tiny Llama whose tokenizer.json says that padding stands on the left."""
    left = make_base(tmp_path_factory.mktemp("base") / "left")
    inner = Tokenizer.from_file(str(left / "tokenizer.json"))
    inner.enable_padding(direction="left")
    inner.save(str(left / "tokenizer.json"))
    assert '"Left"' in (left / "tokenizer.json").read_text()
    return [base_folder(), base_folder(vision=True), left]


def test_fingerprints_do_not_depend_on_what_was_done_before(folders: list[Path], tmp_path: Path) -> None:
    """Fails on commit f5727a1, whose fingerprint covered the live tokenizer's padding and truncation (finding A1)."""
    odd = {"HF_HOME": "cache", "HOME": "home", "XDG_CACHE_HOME": "x"}
    environment = os.environ | {name: str(tmp_path / place) for name, place in odd.items()}
    environment |= {"LC_ALL": "C", "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "true", "TZ": "Asia/Tokyo"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(HISTORIES), *map(str, folders)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    bases = {str(folder): open_base(folder) for folder in folders}
    here = {folder: [base.input_fingerprint, base.fingerprint] for folder, base in bases.items()}
    assert len({value for pair in here.values() for value in pair}) == 6
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == HISTORIES.keys()
    for name, values in found.items():
        assert values == here, name


def change_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b" ")


def change_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


def change_processor(folder: Path) -> None:
    edit_json(folder / "preprocessor_config.json", {"do_rescale": False})


def change_config(folder: Path) -> None:
    edit_json(folder / "config.json", {"_name_or_path": "elsewhere"})


@pytest.mark.parametrize("change", [change_tokenizer, change_template, change_processor, change_config])
def test_a_changed_file_changes_both_fingerprints(tmp_path: Path, change: Callable[[Path], None]) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base_folder(vision=True), folder)
    before = open_base(folder)
    old = (before.input_fingerprint, before.fingerprint)
    change(folder)
    after = open_base(folder)
    assert after.input_fingerprint != old[0]
    assert after.fingerprint != old[1]


def test_settings_that_change_inputs_change_the_input_fingerprint_alone(tmp_path: Path) -> None:
    folder = str(base_folder(vision=True))
    plain = open_base(folder)
    (tmp_path / "other.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    for settings in (
        ModelSettings(base=folder, max_pixels=1000),
        ModelSettings(base=folder, chat_template=str(tmp_path / "other.jinja")),
    ):
        other = open_base(settings)
        assert other.input_fingerprint != plain.input_fingerprint
        assert other.fingerprint == plain.fingerprint
    text = str(base_folder())
    limited = open_base(ModelSettings(base=text, max_pixels=1000))
    assert limited.input_fingerprint == open_base(text).input_fingerprint, "a text base has no pixels"


def test_templates_of_the_package_are_known_by_name() -> None:
    base = open_base(ModelSettings(base=str(base_folder()), chat_template="builtin:deepseek-r1"))
    assert base.template.origin == "recipe"
    assert "<think>" in base.template.text
    with pytest.raises(
        RecipeError, match=r"builtin:other is unknown; there are builtin:deepseek-r1, builtin:llava-1\.5"
    ):
        open_base(ModelSettings(base=str(base_folder()), chat_template="builtin:other")).template.text  # noqa: B018
    assert locate("builtin:llava-1.5", Path("/anywhere")) == "builtin:llava-1.5"


def test_the_public_name_takes_a_folder() -> None:
    base = merit.open_base(str(base_folder()))
    assert isinstance(base, merit.Base)
    assert base.images is None
    assert base.tokenizer.padding_side == "right"
    assert base.tokenizer.chat_template == base.template.text


DEEP = "[" * 200_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        pytest.param(DEEP, "nested too deeply", id="deep"),
        ('{"model_type": ["llama"]}', "model_type"),
        ('{"model_type": "llama", "architectures": "LlamaForCausalLM"}', "architectures"),
        ('{"model_type": "llama", "architectures": [3]}', "architectures"),
        ('{"model_type": "llama", "text_config": "none"}', "text_config"),
        ('{"model_type": "llama", "auto_map": 3}', "auto_map"),
        ('{"model_type": "llama", "max_position_embeddings": "many"}', "max_position_embeddings"),
        (
            '{"model_type": "llama", "text_config": {"max_position_embeddings": []}}',
            "text_config.max_position_embeddings",
        ),
    ],
)
def test_a_config_of_the_wrong_form_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    """Fails on commit f5727a1 with a traceback for most of these (finding B3)."""
    folder = make_base(tmp_path / "base")
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        open_base(folder)
    assert str(folder / "config.json") in str(caught.value)
    assert words in str(caught.value)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_base(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_base(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_std", [0.1, {}, 0.1]), ("merge_size", {"a": 1}), ("patch_size", [14]), ("image_mean", [1] * 4)],
)
def test_a_processor_that_cannot_make_a_picture_is_refused_when_it_is_opened(
    tmp_path: Path, key: str, value: object
) -> None:
    """On commit f5727a1 a traceback of the image library, at the first picture."""
    folder = make_vision_base("qwen2_5_vl", tmp_path / "base")
    file = folder / "preprocessor_config.json"
    edit_json(file, {key: value})
    with pytest.raises(CheckpointError, match=str(file)):
        _ = open_base(folder).images


def test_a_length_that_is_no_number_is_refused(tmp_path: Path) -> None:
    """On commit f5727a1 a traceback when rows are encoded."""
    folder = make_base(tmp_path / "base")
    edit_json(folder / "tokenizer_config.json", {"model_max_length": "long"})
    with pytest.raises(CheckpointError, match="model_max_length must be a number; found 'long'"):
        _ = open_base(folder).tokenizer
