"""Inputs that somebody got wrong: a valid recipe, row or checkpoint with one thing changed. Exit codes 0 and 2 are right.

python -m benchmarks.faults.fuzz --count 5000
"""

from __future__ import annotations

import argparse
import base64
import collections
import gzip
import io
import json
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults.calling import Outcome, limited, settle
from benchmarks.faults.mutate import deep, encode, mutate, spoil

TARGETS = ("recipes", "rows", "checkpoints")
_SHARES = {"recipes": 0.4, "rows": 0.35, "checkpoints": 0.25}
_MEMORY = 12 * 2**30


@dataclass(frozen=True)
class Finding:
    """One input.

    Attributes:
        target: One of ``TARGETS``.
        kind: Which valid input it was.
        change: What was changed.
        code: Exit code.
        said: The message or traceback.
    """

    target: str
    kind: str
    change: str
    code: int
    said: str


def main() -> None:
    """Parse, try, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--no-write", action="store_true", help="Print only.")
    given = parser.parse_args()
    settle()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))  # an absurd size must not take the machine down
    started, found = time.monotonic(), []
    for target in [given.target] if given.target else TARGETS:
        count = given.count if given.target else round(given.count * _SHARES[target])
        with tempfile.TemporaryDirectory(prefix="merit-fuzz-") as folder:
            begin = time.monotonic()
            found += fuzz(target, count, given.seed, Path(folder))
            print(f"{target}: {count} in {time.monotonic() - begin:.0f} s", flush=True)
    seconds = time.monotonic() - started
    text = summary(found)
    print(text)
    for item in found:
        if item.code not in (0, 2):
            print(f"\n{item.target}: {item.kind}, {item.change}: exit {item.code}\n{item.said[-1800:]}")
    if not given.no_write:
        from benchmarks.report import write

        facts = [{**asdict(item), "said": item.said[-300:]} for item in found if item.code not in (0, 2)]
        write(
            "faults-fuzz",
            "Valid recipes, rows and checkpoints with one thing changed",
            f"python -m benchmarks.faults.fuzz --count {given.count} --seed {given.seed}",
            f"{text}\n\n{len(found)} inputs in {seconds:.0f} s. Used: exit 0; refused: exit 2 with a message.",
            {"inputs": len(found), "seconds": round(seconds, 1), "neither": facts},
        )


def summary(found: list[Finding]) -> str:
    """One row per target and kind."""
    from benchmarks.report import table

    counts: dict[str, collections.Counter[str]] = {}
    for item in found:
        end = {0: "used", 2: "refused", -1: "hang"}.get(item.code, "traceback")
        counts.setdefault(f"{item.target}: {item.kind}", collections.Counter())[end] += 1
    total = sum(counts.values(), collections.Counter())
    ends = ("used", "refused", "traceback", "hang")
    rows = [[name, sum(row.values()), *(row[end] for end in ends)] for name, row in {**counts, "all": total}.items()]
    return table(["input", "tried", *ends], rows)


def fuzz(target: str, count: int, seed: int, folder: Path) -> list[Finding]:
    """Try ``count`` changed inputs of one target, working in ``folder``."""
    trial = {"recipes": Recipes, "rows": Rows, "checkpoints": Checkpoints}[target](folder)
    rng = random.Random(f"{target}/{seed}")
    found = []
    for number in range(count):
        kind = trial.kinds[number % len(trial.kinds)]
        change, call = trial.change(kind, rng)
        ended: Outcome = limited(call)
        found.append(Finding(target, kind, change, ended.code, ended.err))
    return found


Call = Callable[[], Any]

# ---- recipes --------------------------------------------------------------------------------------------------------

_PREPARE = {
    "assemble": {"vision_from": "v", "projector": "new"},
    "stages": [{"name": "align", "mixture": {"folder": "m"}, "trainable": "projector", "train": {"epochs": 1}}],
}


class Recipes:
    """Recipes in full, as text and as overrides: loaded, written, and planned where they load."""

    kinds = ("whole recipe", "datasets listed", "preparation", "YAML text", "override", "planned")

    def __init__(self, folder: Path) -> None:
        import yaml
        from tests import builders

        from merit.recipe.load import dump_recipe, parse_recipe

        self.folder = folder
        base = builders.make_base(folder / "base", hidden=8)
        case = builders.make_case(folder, base)
        listed = [
            {"name": "a", "path": "a.jsonl", "test": "b.jsonl", "samples": 3},
            {"name": "b", "path": "b.jsonl"},
        ]
        for name in "ab":
            builders.write_rows(folder / f"{name}.jsonl", builders.task_rows("upper", 4, 0))
        mixture = {"datasets": listed}
        whole = {**case.settings, "baselines": ["joint", "random"]}
        settings = {
            "whole recipe": whole,
            "datasets listed": {**whole, "mixture": mixture},
            "preparation": {**whole, "prepare": _PREPARE},
        }
        self._valid = {
            kind: yaml.safe_load(dump_recipe(parse_recipe(value, folder=folder))) for kind, value in settings.items()
        }
        self._texts = {kind: yaml.safe_dump(value, sort_keys=False).encode() for kind, value in self._valid.items()}
        self._keys = list(self._valid["whole recipe"])

    def change(self, kind: str, rng: random.Random) -> tuple[str, Call]:
        """A changed recipe in the file, and what reads it."""
        file = self.folder / "changed.yaml"
        if kind == "YAML text":
            text, what = self._text(rng)
            file.write_bytes(text)
            return what, lambda: self._load(file)
        if kind == "override":
            words = self._override(rng)
            file.write_bytes(self._texts["whole recipe"])
            return f"--set {words!r:.80}", lambda: self._load(file, [words])
        value, what = mutate(
            self._valid[rng.choice(("whole recipe", "datasets listed")) if kind == "planned" else kind], rng
        )
        file.write_bytes(encode(value))  # JSON is YAML
        return what, (lambda: self._plan(file)) if kind == "planned" else (lambda: self._load(file))

    def _text(self, rng: random.Random) -> tuple[bytes, str]:
        text = self._texts[rng.choice(list(self._texts))]
        if rng.random() < 0.5:
            return spoil(text, rng)
        odd = rng.choice(
            (
                b"&a [*a]", b"!!python/object:os.system {}", b"!!binary 'x'", b"!!timestamp 2020-99-99", b"2020-01-01",
                b"1:30", b"0o17", b"0x", b".inf", b"-.NaN", b"|\n  a\n  b", b"*missing", b"{a: 1, a: 2}", b"? [a]\n: b",
                b"!!set {a, b}", b"!!omap [a: 1]", b"<<: {a: 1}", b"'", b'"\\ud800"', b'"\\x00"', b"@", b"%", b"- a\n- b",
                b"9" * 5000, b"1e99999", b"[" * 50_000, b"{a: " * 20_000, b"1_000", b"!!int '0x1_f'", b"~", b"yes", b"=",
                b"!!float 'x'", b"!<tag> x", b"&x\n", b"[]: 1", b"null: 1", b"1: 2", b"&b [&c {d: *b}]",
            )
        )  # fmt: skip
        lines = text.splitlines()
        place = rng.randrange(len(lines))
        key, _, _ = lines[place].partition(b":")
        lines[place] = key + b": " + odd
        return b"\n".join(lines), f"{odd[:30]!r} for {key.strip().decode(errors='replace')}"

    def _override(self, rng: random.Random) -> str:
        from benchmarks.faults.mutate import places, pool

        paths = [path for path in places(self._valid["whole recipe"]) if all(isinstance(key, str) for key in path)]
        key = ".".join(rng.choice(paths))
        key = rng.choice((key, key, key, key + ".x", key + "x", "", ".", "a..b", key + ".0", "mixture.datasets.0.name"))
        value = rng.choice(
            (*map(str, pool()), "[", "{a", "*a", "&a [*a]", "!!binary x", "2020-13-01", "1e5", "'", "- a", "[1,")
        )
        return f"{key}={value}" if rng.random() < 0.95 else value

    def _load(self, file: Path, overrides: list[str] | None = None) -> Any:
        from merit.recipe.load import dump_recipe, load_recipe
        from merit.run.status import run_status

        recipe = load_recipe(file, overrides or [])
        dump_recipe(recipe)
        run_status(self.folder / "run", recipe)
        return recipe

    def _plan(self, file: Path) -> None:
        from merit.report.terminal import Terminal
        from merit.run.check import make_plan
        from merit.run.session import Session

        recipe = self._load(file)
        make_plan(Session(recipe, self.folder / "run", Terminal(True)), offline=True)


# ---- rows -----------------------------------------------------------------------------------------------------------


def _picture(size: tuple[int, int] = (20, 12), form: str = "PNG") -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", size, (200, 30, 90)).save(data, form)
    return data.getvalue()


def _said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


_URI = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}{% endfor %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT_ROWS: dict[str, Any] = {
    "messages": {
        "messages": _said(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    },
    "weights": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]},
    "tools": {
        "messages": [
            *_said(("user", "q")),
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "content": "1", "name": "f"},
            *_said(("assistant", "a")),
        ],
        "tools": [_TOOL],
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    "alpaca": {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q", "a"]]},
    "flan": {"inputs": "q", "targets": "a"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "prompt_completion of messages": {"prompt": _said(("user", "q")), "completion": _said(("assistant", "a"))},
}
IMAGE_ROWS: dict[str, Any] = {
    "llava": {
        "id": "1",
        "image": "p.png",
        "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}],
    },
    "image parts": {
        "messages": _said(
            ("user", [{"type": "image"}, {"type": "text", "text": "q"}]),
            ("assistant", [{"type": "text", "text": "a"}]),
        ),
        "images": ["p.png"],
    },
    "images of parts": {
        "messages": _said(
            ("user", [{"type": "image_url", "image_url": {"url": "p.png"}}, {"type": "text", "text": "q"}]),
            ("assistant", "a"),
        ),
    },
    "cauldron": {"images": ["p.png"], "texts": [{"user": "q", "assistant": "a", "source": "s"}]},
    "embedded": {"prompt": "<image>q", "completion": "a", "image": {"bytes": None, "path": "p.png"}},
}
_REFERENCES: tuple[Any, ...] = (
    "missing.png", "cut.png", "text.png", "huge.png", "http://x/y.png", "", "/", "..", "p.png\0", "folder", "x" * 5000,
    "data:image/png;base64,", _URI, "data:image/png;base64,!!!", "file:///", "file://p.png", {"path": "p.png"}, "zero.png",
    {"bytes": "x"}, {"bytes": [1, 2]}, ["p.png", "p.png"], {"url": None}, "p.gif", "strip.png", "p.tif", 3, None, [],
)  # fmt: skip


class Rows:
    """A dataset of a few rows, one of them changed: found, checked and encoded."""

    kinds = (*TEXT_ROWS, *IMAGE_ROWS, "image reference", "file's bytes", "Parquet", "other file")

    def __init__(self, folder: Path) -> None:
        from tests import builders

        from merit.hf.base import open_base

        text = builders.make_base(folder / "base", hidden=8)
        (text / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
        self._text = open_base(str(text))
        self._vision = open_base(str(builders.make_vision_base("llava", folder / "vision")))
        self._data, self._out, self._number = folder / "data", folder / "out", 0
        pictures = self._data / "a"
        pictures.mkdir(parents=True)
        (pictures / "folder").mkdir()
        whole = _picture()
        files = {"p.png": whole, "cut.png": whole[:40], "text.png": b"not a picture", "zero.png": b""}
        files |= {"p.gif": _picture(form="GIF"), "strip.png": _picture((3000, 1)), "p.tif": _picture(form="TIFF")}
        files["huge.png"] = whole[:16] + (2**30).to_bytes(4, "big") * 2 + whole[24:]
        for name, content in files.items():
            (pictures / name).write_bytes(content)
        for name, row in (TEXT_ROWS | IMAGE_ROWS).items():
            self._write(pictures / "train.jsonl", [row])
            base = self._vision if name in IMAGE_ROWS else self._text
            ended = limited(lambda base=base: self._encode(base, False))
            assert ended.code == 0, f"{name} is refused before it is changed: {ended.err}"

    def change(self, kind: str, rng: random.Random) -> tuple[str, Call]:
        """A folder with one dataset, and its encoding."""
        folder = self._data / "a"
        for old in folder.glob("train*"):
            old.unlink()
        valid = TEXT_ROWS | IMAGE_ROWS
        pictured = kind in IMAGE_ROWS or (kind in ("image reference", "Parquet", "other file") and rng.random() < 0.5)
        if kind == "image reference":
            form, pictured = rng.choice(list(IMAGE_ROWS)), True
            what = repr(reference := rng.choice(_REFERENCES))[:40]
            row = json.loads(json.dumps(IMAGE_ROWS[form]).replace('"p.png"', json.dumps(reference)))
            self._write(folder / "train.jsonl", [valid[form], row])
        elif kind in valid:
            row, what = mutate(valid[kind], rng)
            lines = [encode(valid[kind]), encode(row), encode(valid[kind])]
            if rng.random() < 0.05:
                lines[1], what = deep(lines[1], rng), "deep"
            (folder / "train.jsonl").write_bytes(b"\n".join(lines[rng.choice((0, 1)) :]))
        else:
            what = self._file(kind, folder, rng, pictured)
        base, drop = self._vision if pictured else self._text, rng.random() < 0.5
        return f"{what}{', bad rows dropped' if drop else ''}", lambda: self._encode(base, drop)

    def _write(self, file: Path, rows: list[Any]) -> None:
        file.write_bytes(b"".join(encode(row) + b"\n" for row in rows))

    def _file(self, kind: str, folder: Path, rng: random.Random, pictured: bool) -> str:
        form = rng.choice(list(IMAGE_ROWS if pictured else TEXT_ROWS))
        row = (TEXT_ROWS | IMAGE_ROWS)[form]
        lines = b"".join(encode(row) + b"\n" for _ in range(3))
        if kind == "file's bytes":
            data, what = spoil(lines, rng)
            (folder / "train.jsonl").write_bytes(data)
            return what
        if kind == "Parquet":
            return self._parquet(folder / "train.parquet", row, rng)
        suffix = rng.choice((".json", ".csv", ".jsonl.gz", ".tsv"))
        data = {
            ".json": encode([row] * 3),
            ".csv": b"prompt,completion\nq,a\nr,b\n",
            ".tsv": b"prompt\tcompletion\nq\ta\n",
            ".jsonl.gz": gzip.compress(lines),
        }[suffix]
        data, what = spoil(data, rng)
        (folder / f"train{suffix}").write_bytes(data)
        return f"{suffix}: {what}"

    def _parquet(self, file: Path, row: Any, rng: random.Random) -> str:
        import pyarrow as pa
        import pyarrow.parquet as pq

        changed, what = mutate(row, rng)
        rows = [row, changed] if rng.random() < 0.5 else [changed]
        try:
            table = pa.Table.from_pylist([item if isinstance(item, dict) else {"x": item} for item in rows])
            pq.write_table(table, file)
        except (pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError, RecursionError):
            pq.write_table(pa.Table.from_pylist([{"prompt": "q", "completion": "a"}]), file)
            data, what = spoil(file.read_bytes(), rng)
            file.write_bytes(data)
        return what

    def _encode(self, base: Any, drop: bool) -> None:
        from merit.mixture.found import find_datasets
        from merit.recipe.schema import MixtureSettings

        bad = {"bad_rows": "drop", "images": {"bad": "drop"}} if drop else {}
        from merit.mixture.stage import encode_mixture

        shutil.rmtree(self._out, ignore_errors=True)
        found = find_datasets(MixtureSettings.model_validate({"folder": str(self._data), **bad}))
        found.check(8)
        encode_mixture(found, base, self._out, max_length=512, seed=0)


# ---- checkpoints ----------------------------------------------------------------------------------------------------

_HEADER = "header of "


class Checkpoints:
    """A checkpoint's small files and headers: opened as a base, loaded, merged as a branch and as an adapter."""

    kinds = (
        "safetensors header", "shard index", "config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "vision config.json", "preprocessor_config.json", "chat template", "safetensors bytes",
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        from tests import builders

        self.folder = folder
        self._base = builders.make_base(folder / "base", hidden=8)
        self._sharded = builders.make_base(folder / "sharded", hidden=8)
        self._shard(self._sharded)
        self._vision = builders.make_vision_base("qwen2_5_vl", folder / "vision")
        self._adapter = self._make_adapter(folder / "adapter")
        self._copy = folder / "copy"

    def _shard(self, folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        index = {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            file = f"model-0000{number}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
            index |= dict.fromkeys(part, file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        (folder / "model.safetensors.index.json").write_bytes(
            encode({"metadata": {"total_size": size}, "weight_map": index})
        )

    def _make_adapter(self, folder: Path) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self._base)
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).save_pretrained(folder)
        return folder

    def change(self, kind: str, rng: random.Random) -> tuple[str, Call]:
        """A copy with one file changed, and what reads it."""
        shutil.rmtree(self._copy, ignore_errors=True)
        source = {"shard index": self._sharded, "adapter_config.json": self._adapter}.get(kind, self._base)
        source = self._vision if kind in ("vision config.json", "preprocessor_config.json") else source
        if kind.startswith("safetensors") and rng.random() < 0.4:
            source = rng.choice((self._adapter, self._sharded))
        shutil.copytree(source, self._copy)
        what = self._spoiled(kind, rng)
        if source == self._adapter:
            return what, self._as_adapter
        if source == self._vision:
            return what, self._as_vision_base
        return what, rng.choice((self._as_base, self._as_branch))

    def _spoiled(self, kind: str, rng: random.Random) -> str:
        if kind.startswith("safetensors"):
            file = rng.choice(sorted(self._copy.glob("*.safetensors")))
            return self._header(file, rng) if kind.endswith("header") else self._bytes(file, rng)
        if kind == "chat template":
            file = self._copy / "chat_template.jinja"
            template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
            data, what = spoil(template.encode(), rng)
            file.write_bytes(data)
            return what
        name = {"shard index": "model.safetensors.index.json", "vision config.json": "config.json"}.get(kind, kind)
        file = self._copy / name
        if rng.random() < 0.15:
            return self._bytes(file, rng)
        value, what = mutate(json.loads(file.read_bytes()), rng)
        data = encode(value)
        if rng.random() < 0.06:
            data, what = deep(encode(value), rng), "deep"
        file.write_bytes(data)
        return what

    def _bytes(self, file: Path, rng: random.Random) -> str:
        data, what = spoil(file.read_bytes(), rng)
        file.write_bytes(data)
        return f"{file.name}: {what}"

    def _header(self, file: Path, rng: random.Random) -> str:
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        value, what = mutate(json.loads(data[8 : 8 + length]), rng)
        header = encode(value)
        if rng.random() < 0.06:
            header, what = deep(header, rng), "deep"
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        return f"{file.name}: {what}"

    def _as_base(self) -> None:
        self._open(self._copy, {"messages": _said(("user", "ab"), ("assistant", "cd"))}, None)

    def _as_vision_base(self) -> None:
        self._open(self._copy, IMAGE_ROWS["llava"], _picture())

    def _open(self, folder: Path, row: Any, picture: bytes | None) -> None:
        import torch

        from merit.hf.base import open_base
        from merit.hf.models import load_model
        from merit.mixture.found import find_datasets
        from merit.mixture.stage import encode_mixture

        base = open_base(str(folder))
        _ = base.fingerprint, base.input_fingerprint
        data, out = self.folder / "data", self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        (data / "a").mkdir(parents=True, exist_ok=True)
        (data / "a" / "train.jsonl").write_bytes(encode(row) + b"\n" + encode(row))
        if picture is not None:
            (data / "a" / "p.png").write_bytes(picture)
        mixture = encode_mixture(find_datasets(str(data)), base, out, max_length=512, seed=0)
        load_model(base, torch.device("cpu"))
        rows = next(iter(mixture.train.values()))
        base.batcher([rows[0]])

    def _as_branch(self) -> None:
        from merit.merge.stage import merge_branches
        from merit.merge.weights import Branch

        whole = Branch(self._base, 1, "whole")
        shutil.rmtree(self.folder / "merged", ignore_errors=True)
        merge_branches(self._base, [whole, Branch(self._copy, 2, "changed")], self.folder / "merged")

    def _as_adapter(self) -> None:
        from merit.merge.stage import merge_branches
        from merit.merge.weights import Branch

        shutil.rmtree(self.folder / "merged", ignore_errors=True)
        branches = [Branch(self._adapter, 1, "whole"), Branch(self._copy, 2, "changed")]
        merge_branches(self._base, branches, self.folder / "merged")


if __name__ == "__main__":
    main()
