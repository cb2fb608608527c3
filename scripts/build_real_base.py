"""Train a small base for a mixture of real tasks: one that reads the mixture's prompts and can do some tasks already.

A folder of tasks (``<task>/train.jsonl``, ``test.jsonl``, rows with ``messages``) is parted three ways. The base is trained
on whole conversations of the tasks in `KNOWN` and on the prompts alone of the tasks to be fine-tuned on (with ``--answers``
on some whole rows of theirs, for a base that has an idea of them); the tasks in `UNSEEN` are shown to nobody. It is a
Qwen2-architecture model with byte-level tokens whose merges are learned on the same text. Same arguments, data, thread
count and versions give the same bytes.

The output folder gets ``base/`` (checkpoint, README, training.json), ``mixture/``, ``kept/`` and ``unseen/`` (copies of the
rows), which benchmarks/study/real_mixture.yaml reads.

Example:
    python scripts/build_real_base.py --data MIXTURE --output FOLDER
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from build_demo_base import (
    ASSISTANT,
    CHAT_TEMPLATE,
    END,
    IGNORED,
    SPECIALS,
    USER,
    learned_tokenizer,
    make_optimizers,
    schedule,
)

KNOWN = (
    "ag_news_topic", "alpaca_english", "asset_simplification", "clinc_intent", "commonsense_qa", "e2e_data_to_text",
    "english_pos", "gpteacher_codegen", "gpteacher_roleplay", "medquad_answers", "nsmc_sentiment", "snips_slots",
    "topical_chat", "translate_en_de", "tweet_sentiment", "wikisql_text2sql",
)  # fmt: skip
"""Tasks that the base is trained on and fine-tuning is not; their test rows are the kept sets."""
UNSEEN = (
    "alpaca_chinese", "bbh_logical_deduction", "jfleg_correction", "korean_nli", "korean_pos", "mctaco_temporal",
    "medical_abstracts_topic", "msr_paraphrase", "nq_open_closed_book", "pubmedqa_decision", "torchhub_api",
    "translate_en_fr", "trec_question_type", "tweet_irony", "wnut17_ner",
)  # fmt: skip
"""Tasks that neither the base nor fine-tuning is trained on."""
Row = tuple[str, str]
"""Prompt and answer."""


def read(file: Path) -> list[Row]:
    """Rows of one file of single-turn conversations."""
    rows = (json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines())
    return [(question["content"], answer["content"]) for question, answer in rows]


def part(data: Path, output: Path) -> dict[str, list[str]]:
    """Copy the tasks into ``mixture/``, ``kept/`` and ``unseen/``; returns their names by folder."""
    tasks = sorted(folder.name for folder in data.iterdir() if (folder / "train.jsonl").is_file())
    missing = sorted({*KNOWN, *UNSEEN} - set(tasks))
    if missing:
        raise SystemExit(f"{data} lacks the tasks {', '.join(missing)}.")
    parts = {"kept": [*KNOWN], "unseen": [*UNSEEN], "mixture": [t for t in tasks if t not in (*KNOWN, *UNSEEN)]}
    for name, members in parts.items():
        for task in members:
            (output / name / task).mkdir(parents=True, exist_ok=True)
            for split in ("train", "test") if name == "mixture" else ("test",):
                shutil.copyfile(data / task / f"{split}.jsonl", output / name / task / f"{split}.jsonl")
    return parts


def examples(
    data: Path, parts: dict[str, list[str]], rng: random.Random, prompts: float, answers: float
) -> Iterator[tuple[str, str | None]]:
    """Yield prompt and answer for ever, tasks drawn by the square root of their rows.

    Prompts of the mixture come without an answer but for a share of ``answers``.
    """
    rows = {task: read(data / task / "train.jsonl") for name in ("kept", "mixture") for task in parts[name]}
    sizes = {name: [len(rows[task]) ** 0.5 for task in parts[name]] for name in ("kept", "mixture")}
    while True:
        name = "mixture" if rng.random() < prompts else "kept"
        [task] = rng.choices(parts[name], sizes[name])
        prompt, answer = rng.choice(rows[task])
        yield prompt, answer if name == "kept" or (answers and rng.random() < answers) else None


def like_lengths(
    stream: Iterator[tuple[str, str | None]], size: int, rng: random.Random
) -> Iterator[list[tuple[str, str | None]]]:
    """Batches of rows of like length, eight drawn at a time, in random order: little is padded."""
    while True:
        pool = sorted((next(stream) for _ in range(8 * size)), key=lambda pair: len(pair[0]) + len(pair[1] or ""))
        batches = [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(batches)
        yield from batches


def encode(
    tokenizer: Any, batch: list[tuple[str, str | None]], length: int, *, answers_only: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels (B, L): every token is a target, or the answer and its end alone."""
    texts = [f"{USER}{prompt}{END}" + ("" if a is None else f"{ASSISTANT}{a}{END}") for prompt, a in batch]
    ids = tokenizer(texts, padding=True, truncation=True, max_length=length, padding_side="right", return_tensors="pt")[
        "input_ids"
    ]
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, IGNORED)
    if answers_only:
        assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
        labels = labels.masked_fill(((ids == assistant).cumsum(1) == 0) | (ids == assistant), IGNORED)
    return ids, labels


def make_model(tokenizer: Any, args: argparse.Namespace) -> Qwen2ForCausalLM:
    """Make the untrained model, in float32."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def train(
    model: Any, tokenizer: Any, stream: Iterator[tuple[str, str | None]], args: argparse.Namespace
) -> dict[str, Any]:
    """Train; returns what it took."""
    optimizers = make_optimizers(model, args.learning_rate)
    batches = like_lengths(stream, args.batch_size, random.Random(f"{args.seed}/order"))
    running, tokens, start, used = 0.0, 0, time.perf_counter(), time.process_time()
    model.train()
    for step in range(args.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * schedule(step, args.steps)
        ids, labels = encode(tokenizer, next(batches), args.length)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        tokens += int((labels != IGNORED).sum())
        running = 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            average, seconds = running / (1 - 0.98 ** (step + 1)), time.perf_counter() - start
            print(f"step {step + 1}/{args.steps} loss {average:.4f} {seconds:.0f} s", flush=True)
    return {
        "steps": args.steps,
        "rows": args.steps * args.batch_size,
        "tokens": tokens,
        "final_loss": round(running, 4),
        "seconds": round(time.perf_counter() - start),
        "cpu_seconds": round(time.process_time() - used),
    }


@torch.no_grad()
def heldout_losses(
    model: Any, tokenizer: Any, output: Path, rows_each: int, length: int
) -> dict[str, dict[str, float]]:
    """Nats per answer token of every task's first test rows, by part."""
    model.eval()
    found: dict[str, dict[str, float]] = {}
    for name in ("mixture", "kept", "unseen"):
        for folder in sorted((output / name).iterdir()):
            batch: list[tuple[str, str | None]] = [*read(folder / "test.jsonl")[:rows_each]]
            ids, labels = encode(tokenizer, batch, length, answers_only=True)
            if (labels[:, 1:] != IGNORED).any():
                loss = float(model(input_ids=ids, labels=labels).loss)
                found.setdefault(name, {})[folder.name] = round(loss, 3)
    return found


def build(args: argparse.Namespace) -> None:
    """Part the data, train, save, reload, check and record."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    parts = part(args.data, args.output)
    rng = random.Random(f"{args.seed}/real base")
    stream = examples(args.data, parts, rng, args.prompts, args.answers)
    sample = [text for pair in (next(stream) for _ in range(args.tokenizer_rows)) for text in pair if text]
    tokenizer = learned_tokenizer(sample, SPECIALS, args.merges, CHAT_TEMPLATE, model_max_length=1024)
    model = make_model(tokenizer, args)
    figures = train(model, tokenizer, stream, args)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=128
    )
    base = args.output / "base"
    base.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(base)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(base)
    reloaded = AutoTokenizer.from_pretrained(base)
    probe = [f"{USER}Ünï 한국어 {END}{ASSISTANT}12 ab3\n  x{END}", *sample[:50]]
    if any(reloaded(text)["input_ids"] != tokenizer(text)["input_ids"] for text in probe):
        raise AssertionError("The saved tokenizer gives other ids than the one that was trained with.")
    losses = heldout_losses(
        AutoModelForCausalLM.from_pretrained(base), reloaded, args.output, args.score_rows, args.length
    )
    means = {name: round(sum(found.values()) / len(found), 3) for name, found in losses.items()}
    given = {name: value for name, value in vars(args).items() if name not in ("data", "output")}
    record = {
        "command": "python scripts/build_real_base.py --data MIXTURE --output FOLDER "
        + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items()),
        "parameters": model.num_parameters(),
        "tasks": {name: len(members) for name, members in parts.items()},
        "training": figures,
        "heldout_loss_mean": means,
        "heldout_loss": losses,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (base / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (base / "README.md").write_text(
        f"# A small base for a mixture of real tasks\n\n{model.num_parameters():,} parameters, trained by\n"
        f"`{record['command']}`.\nFigures and versions: `training.json`.\n",
        encoding="utf-8",
    )
    print(json.dumps({"parameters": model.num_parameters(), **figures, "heldout_loss_mean": means}, indent=1))


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, found {text}")
    return value


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with one sub-folder per task")
    add("--output", type=Path, required=True, help="gets base/, mixture/, kept/ and unseen/")
    add("--seed", type=int, default=0, help="decides weights and rows (default %(default)s)")
    add("--steps", type=int, default=2000, help="optimizer steps (default %(default)s)")
    add("--batch-size", type=int, default=8, help="rows per step (default %(default)s)")
    add("--length", type=int, default=256, help="rows are cut at this many tokens (default %(default)s)")
    add("--learning-rate", type=float, default=3e-3, help="peak, warm-up then cosine (default %(default)s)")
    add("--prompts", type=share, default=0.4, help="share of prompts of the mixture (default %(default)s)")
    add("--answers", type=share, default=0.0, help="share of those with their answer (default %(default)s)")
    add("--merges", type=int, default=3836, help="merges of the tokenizer (default %(default)s)")
    add("--tokenizer-rows", type=int, default=20_000, help="rows that merges are learned on (default %(default)s)")
    add("--hidden", type=int, default=192, help="hidden size (default %(default)s)")
    add("--layers", type=int, default=4, help="layers (default %(default)s)")
    add("--threads", type=int, default=1, help="torch threads; changes the last bits (default %(default)s)")
    add("--score-rows", type=int, default=16, help="test rows per task in the record (default %(default)s)")
    build(parser.parse_args(argv))


if __name__ == "__main__":
    main()
