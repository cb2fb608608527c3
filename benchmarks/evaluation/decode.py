"""Batched generation against a plain loop: the same greedy answers, and how much faster they come.

``python -m benchmarks.evaluation.decode RUN`` takes base and held-out prompts of a run (``merit demo --output RUN``),
answers them with :func:`merit.evaluation.decode.decode` and one by one with transformers' ``generate``, and writes
``benchmarks/results/decode.json`` and ``decode.md``; a minute or two on one core.
"""

from __future__ import annotations

import argparse
import platform
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from benchmarks.report import RESULTS

from merit.evaluation.decode import decode
from merit.evaluation.forward import Forward
from merit.evaluation.heldout import end_tokens
from merit.files import write_json, write_text
from merit.hf.base import open_base
from merit.hf.models import load_model
from merit.mixture import load_split
from merit.recipe.load import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=32)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    base = open_base(load_recipe(chosen.run / "recipe.yaml").model)
    datasets = load_split(chosen.run / "mixture", "test")
    rows = [part[i] for i in range(200) for part in datasets.values() if i < len(part)][: chosen.rows]
    prompts = [row.prompt() for row in rows]
    ends = end_tokens(datasets, base.tokenizer)
    model = load_model(base, torch.device("cpu"))
    limits = [chosen.tokens] * len(prompts)
    seconds, answers = {}, {}
    for batch_tokens in (8192, 1):  # the second: one prompt at a time through the same code
        started = time.process_time()
        forward = Forward(base.batcher, torch.device("cpu"), batch_tokens)
        answers[batch_tokens] = decode(model, prompts, limits, ends, forward)
        seconds["batched" if batch_tokens > 1 else "one by one"] = time.process_time() - started
    started = time.process_time()
    plain = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt.input_ids.astype(np.int64))[None]
        with torch.inference_mode():
            out = model.generate(
                ids, max_new_tokens=chosen.tokens, do_sample=False, eos_token_id=sorted(ends), pad_token_id=min(ends)
            )
        plain.append(out[0, ids.shape[1] :].numpy())
    seconds["transformers' generate"] = time.process_time() - started
    tokens = sum(len(answer) for answer in answers[8192])
    equal = sum(np.array_equal(a, b) for a, b in zip(answers[8192], plain, strict=True))
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, one thread",
        "command": f"python -m benchmarks.evaluation.decode RUN --rows {chosen.rows} --tokens {chosen.tokens}",
        "parameters": base.parameters,
        "prompts": len(prompts),
        "new_tokens": tokens,
        "cpu_seconds": seconds,
        "equal_to_generate": equal,
    }
    write_json(RESULTS / "decode.json", result)
    lines = [
        "# Batched generation against a plain loop",
        "",
        f"{len(prompts)} prompts, {tokens:,} new tokens, greedy, a base of {base.parameters:,} parameters; CPU seconds on "
        f"one thread of {platform.machine()}, {result['date']}. `{result['command']}`, RUN from `merit demo`.",
        "",
        "| way | CPU seconds | tokens per second |",
        "| --- | --- | --- |",
        *(f"| {name} | {value:.2f} | {tokens / value:,.0f} |" for name, value in seconds.items()),
        "",
        f"{equal} of {len(prompts)} answers are equal token for token to those of `generate`.",
        "",
    ]
    write_text(RESULTS / "decode.md", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
