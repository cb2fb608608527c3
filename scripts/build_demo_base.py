"""Pretrain the demo's base checkpoint and write it as package data, with the record of how it was made.

The base is a Qwen2-architecture model of 0.9M parameters that reads single bytes. It learns sixteen procedural skills
(`demo_data.words.BASE_STYLE`) on cases that no test ever uses, in three stages: answered by a full friendly sentence unless
the question begins with "Briefly:"; then also asked in other words, with one bare answer in five; last mostly in full where
the question is in its own words, and barely every second time where it is not. The last two make it merge-ready: a bare
answer is nothing new to it. Same arguments, thread count and versions give the same bytes. It knows nothing of the mixture.

Example:
    python scripts/build_demo_base.py --output src/merit/demo/base
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from demo_data.words import BASE_STYLE, Row, base_stream, draw_rows, settled_stream, wide_stream

DEFAULT_OUTPUT = Path(__file__).parents[1] / "src/merit/demo/base"
PAD, USER, ASSISTANT, END = SPECIALS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}<|end|>"
    "{% elif message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ raise_exception('The demo base knows the roles user and assistant only.') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
IGNORED = -100


@dataclass(frozen=True)
class Stage:
    """One stage of pretraining: optimizer steps, the peak of their learning rate, and rows by seed."""

    name: str
    steps: int
    learning_rate: float
    stream: Callable[[int], Iterator[Any]]


def byte_symbols() -> list[str]:
    """Return the 256 printable stand-ins that byte-level tokenizers use for bytes, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def make_tokenizer() -> Qwen2Tokenizer:
    """Make a byte-level tokenizer: Qwen2's own class without merges, so that AutoTokenizer gives back the same ids."""
    vocabulary = {symbol: index for index, symbol in enumerate([*SPECIALS, *byte_symbols()])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        unk_token=PAD,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def learned_tokenizer(
    texts: Iterable[str], specials: Sequence[str], merges: int, chat_template: str, *, model_max_length: int
) -> Qwen2Tokenizer:
    """Make a byte-level tokenizer whose merges are learned on ``texts``; ``specials`` begin with PAD, USER, ASSISTANT, END.

    It is Qwen2's own class, pre-tokenizer and normalizer included, so that AutoTokenizer gives back the same ids.
    """
    vocabulary = {symbol: index for index, symbol in enumerate([*specials, *byte_symbols()])}
    blank = Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=PAD, eos_token=END, pad_token=PAD)
    learner = Tokenizer(models.BPE())
    learner.normalizer = blank.backend_tokenizer.normalizer
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=len(specials) + 256 + merges,
        special_tokens=list(specials),
        initial_alphabet=byte_symbols(),
        min_frequency=20,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    for left, right in learned:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=learned,
        unk_token=PAD,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[special for special in specials if special not in (PAD, END)],
        model_max_length=model_max_length,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer, hidden: int, layers: int) -> Qwen2ForCausalLM:
    """Make the untrained model, in float32."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def encode(tokenizer: Qwen2Tokenizer, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn rows into right-padded ids and labels (B, L) whose targets are the answers and their end tokens."""
    texts: Any = tokenizer.apply_chat_template([row["messages"] for row in rows], tokenize=False)
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    answer = (ids == assistant).cumsum(1).bool() & (ids != assistant) & (ids != tokenizer.pad_token_id)
    return ids, ids.masked_fill(~answer, IGNORED)


def make_optimizers(model: Qwen2ForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest: fewer steps than AdamW alone."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over 100 steps, then a cosine to zero."""
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, rows: list[Row]) -> float:
    """Return the share of rows that greedy decoding answers to the letter."""
    prompts = tokenizer.apply_chat_template(
        [row["messages"][:1] for row in rows], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(output, skip_special_tokens=True)
    return sum(a == row["messages"][1]["content"] for a, row in zip(answers, rows, strict=True)) / len(rows)


def heldout_scores(model: Any, tokenizer: Any, seed: int, rows_each: int) -> dict[str, float]:
    """Measure exact match of every base skill on held-out cases."""
    model.eval()
    return {
        name: exact_match(
            model,
            tokenizer,
            list(islice(draw_rows(dataset, random.Random(f"{seed}/{name}/build"), held_out=True), rows_each)),
        )
        for name, dataset in BASE_STYLE.items()
    }


def train_answers(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, plan: Stage, seed: int, batch_size: int
) -> dict[str, Any]:
    """Train one stage; returns its rows, tokens, running loss at its end, and seconds."""
    optimizers, stream = make_optimizers(model, plan.learning_rate), plan.stream(seed)
    tokens, running, start = 0, 0.0, time.perf_counter()
    model.train()
    for step in range(plan.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * schedule(step, plan.steps)
        ids, labels = encode(tokenizer, list(islice(stream, batch_size)))
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        tokens += int((ids != tokenizer.pad_token_id).sum())
        running = 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            average, seconds = running / (1 - 0.98 ** (step + 1)), time.perf_counter() - start
            print(f"{plan.name} step {step + 1}/{plan.steps} loss {average:.4f} {seconds:.0f} s", flush=True)
    seconds = time.perf_counter() - start
    rows = plan.steps * batch_size
    return {"rows": rows, "tokens": tokens, "final_loss": round(running, 4), "seconds": round(seconds)}


def plans(args: argparse.Namespace) -> list[Stage]:
    """The three stages."""
    return [
        Stage("stage_1", args.steps, args.learning_rate, base_stream),
        Stage("stage_2", args.wide_steps, args.settle_learning_rate, wide_stream),
        Stage("stage_3", args.settle_steps, args.settle_learning_rate, settled_stream),
    ]


def begun(args: argparse.Namespace, tokenizer: Qwen2Tokenizer) -> tuple[Any, dict[str, Any]]:
    """An untrained model; or ``--start``'s, with the figures of the stages that it has gone through."""
    if args.start is None:
        return make_model(tokenizer, args.hidden, args.layers), {}
    record = json.loads((args.start / "training.json").read_text(encoding="utf-8"))
    return AutoModelForCausalLM.from_pretrained(args.start, dtype=torch.float32), record["stages"]


def pretrain(args: argparse.Namespace) -> None:
    """Train all stages, save, reload, check and record."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = make_tokenizer()
    model, stages = begun(args, tokenizer)
    for plan in plans(args):
        if plan.steps and plan.name not in stages:
            stages[plan.name] = train_answers(model, tokenizer, plan, args.seed, args.batch_size)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=64
    )
    args.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(args.output)

    probe = f"{USER}Ünï {END}{ASSISTANT}12 ab3\n  x{END}"
    reloaded = AutoTokenizer.from_pretrained(args.output)
    if reloaded(probe)["input_ids"] != tokenizer(probe)["input_ids"]:
        raise AssertionError("The saved tokenizer gives other ids than the one that was trained with.")
    scores = heldout_scores(AutoModelForCausalLM.from_pretrained(args.output), reloaded, args.seed, args.score_rows)
    record = {
        "command": f"python scripts/build_demo_base.py --seed {args.seed} --steps {args.steps}"
        f" --batch-size {args.batch_size} --learning-rate {args.learning_rate} --wide-steps {args.wide_steps}"
        f" --settle-steps {args.settle_steps}"
        f" --settle-learning-rate {args.settle_learning_rate} --hidden {args.hidden}"
        f" --layers {args.layers} --threads {args.threads}",
        "seed": args.seed,
        "data": "scripts/demo_data/words.py, base_stream(seed), wide_stream(seed), settled_stream(seed): "
        "generated on the fly, training side only",
        "parameters": model.num_parameters(),
        "stages": stages,
        "heldout_exact_match": {name: round(score, 3) for name, score in scores.items()},
        "heldout_exact_match_mean": round(sum(scores.values()) / len(scores), 3),
        "heldout_rows_per_skill": args.score_rows,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (args.output / "README.md").write_text(card(record), encoding="utf-8")
    print(json.dumps(record, indent=1))


def card(record: dict[str, Any]) -> str:
    """Write the checkpoint's README."""
    streams = {"stage_1": "base_stream", "stage_2": "wide_stream", "stage_3": "settled_stream"}
    rows = "\n".join(
        f"  {stage['rows']:,} rows ({stage['tokens']:,} tokens) of `{streams[name]}({record['seed']})`;"
        for name, stage in record["stages"].items()
    )
    table = "\n".join(f"| {name} | {score:.2f} |" for name, score in record["heldout_exact_match"].items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The demo's base

A Qwen2-architecture language model of {record["parameters"]:,} parameters that reads single bytes. It answers sixteen
procedural skills (reverse a word, add two numbers, ...) in full sentences, now and then barely, and knows nothing
else. It exists so that `merit demo` can run offline; it is of no other use.

- Data, all of it generated by `scripts/demo_data/words.py`:
{rows}
  The loss is on the answers only. One case in eight of each skill was held out for good.
- Rebuild: `{record["command"]}`
- Figures and versions: `training.json`.

Exact match of greedy answers on {record["heldout_rows_per_skill"]} held-out cases per skill
(mean {record["heldout_exact_match_mean"]:.3f}):

| set | exact match |
|---|---|
{table}
"""


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="checkpoint folder (default: package data)")
    parser.add_argument("--seed", type=int, default=0, help="decides weights and rows (default %(default)s)")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps of stage 1 (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="rows per step (default %(default)s)")
    parser.add_argument(
        "--learning-rate", type=float, default=3e-3, help="peak of stage 1, then cosine (default %(default)s)"
    )
    parser.add_argument("--wide-steps", type=int, default=400, help="steps of stage 2 (default %(default)s)")
    parser.add_argument("--settle-steps", type=int, default=100, help="steps of stage 3 (default %(default)s)")
    parser.add_argument(
        "--settle-learning-rate", type=float, default=1e-3, help="peak of stages 2 and 3 (default %(default)s)"
    )
    parser.add_argument("--start", type=Path, help="a folder that this script wrote, to go on from its stages")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size (default %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="layers (default %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; changes the last bits (default %(default)s)"
    )
    parser.add_argument(
        "--score-rows", type=int, default=128, help="held-out rows per skill in the record (default 128)"
    )
    pretrain(parser.parse_args(argv))


if __name__ == "__main__":
    main()
