"""Pretrain the vision demo's base checkpoint and write it as package data, with the record of how it was made.

The base is a LLaVA: a small CLIP vision encoder, a two-layer projector and a small Qwen2 language model, 1.5M parameters
in bfloat16. It is made in three stages, on pictures that no test ever uses. First the vision encoder alone learns, as an
image classifier with heads that are thrown away, what is where in a picture. Then projector and language model learn
thirteen skills (`demo_data.pictures.BASE_STYLE`), answered by a full friendly sentence unless the question begins
with "Briefly:". The third stage asks in other words as well and answers every second of these barely, in any of several
conventions. Same arguments, thread count and versions give the same bytes. No row of the mixture is in it.

Example:
    python scripts/build_vision_demo_base.py --output src/merit/demo/vision/base
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    Qwen2Tokenizer,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from build_demo_base import IGNORED, Stage, learned_tokenizer, make_optimizers, schedule
from demo_data.pictures import BASE_STYLE, Example, base_stream, draw_examples, settled_stream
from demo_data.scenes import COLOURS, SCENES, SHAPES, SIZE, TRENDS, Case, draw_case, paint

DEFAULT_OUTPUT = Path(__file__).parents[1] / "src/merit/demo/vision/base"
PAD, USER, ASSISTANT, END, IMAGE = SPECIALS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>")
CHAT_TEMPLATE = (
    "{% macro parts(content) %}"
    "{% if content is string %}{{ content }}"
    "{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endmacro %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ parts(message['content']) }}<|end|>"
    "{% elif message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ parts(message['content']) }}<|end|>{% endgeneration %}"
    "{% else %}{{ raise_exception('The demo base knows the roles user and assistant only.') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PATCH = 8
IMAGE_TOKENS = (SIZE // PATCH) ** 2
MERGES = 384
MEAN = STD = (0.5, 0.5, 0.5)


# ---- tokenizer, processor, model ------------------------------------------------------------------------------------


@cache
def make_tokenizer() -> Qwen2Tokenizer:
    """Make a byte-level tokenizer whose merges are learned on the base's own sentences.

    It is Qwen2's own class, pre-tokenizer and normalizer included, so that AutoTokenizer gives back the same ids.
    """
    texts = (text for example in islice(base_stream(0), 20_000) for turn in example.turns for text in turn)
    return learned_tokenizer(texts, SPECIALS, MERGES, CHAT_TEMPLATE, model_max_length=512)


def make_processor(tokenizer: Any) -> LlavaProcessor:
    """Make the processor; what it does to pictures of another size is CLIP's: shortest edge to SIZE, centre crop."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: Any, hidden: int, layers: int) -> LlavaForConditionalGeneration:
    """Make the untrained model, in float32."""
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4}
    vision = CLIPVisionConfig(
        **shape, intermediate_size=2 * hidden, image_size=SIZE, patch_size=PATCH, projection_dim=hidden
    )
    text = Qwen2Config(
        **shape,
        vocab_size=len(tokenizer),
        intermediate_size=3 * hidden,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        dtype="float32",
    )
    return LlavaForConditionalGeneration(config)


# ---- batches --------------------------------------------------------------------------------------------------------


def pixels(pictures: Sequence[Any]) -> torch.Tensor:
    """Normalise pictures that have the model's size already: (B, 3, SIZE, SIZE) float32, as the processor does."""
    array = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures]).transpose(0, 3, 1, 2)
    return torch.from_numpy((array / 255 - 0.5) / 0.5)


def text_of(tokenizer: Any, example: Example, newline: bool = False, prompt: bool = False) -> str:
    """Render an example with as many image tokens as the model expects."""
    messages: list[dict[str, Any]] = []
    for index, (question, answer) in enumerate(example.turns):
        parts = [{"type": "image"} for _ in example.pictures if index == 0]
        words = {"type": "text", "text": ("\n" if newline and parts else "") + question}
        messages.append({"role": "user", "content": [*parts, words]})
        messages.append({"role": "assistant", "content": answer})
    messages = messages[: -1 if prompt else None]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return text.replace(IMAGE, IMAGE * IMAGE_TOKENS)


def encode(tokenizer: Any, examples: list[Example], rng: random.Random) -> dict[str, torch.Tensor]:
    """Turn examples into right-padded ids, mask and labels (B, L), targets being the answers, and their pixels.

    In half of the examples a line end stands between picture and question, as in LLaVA's own data.
    """
    texts = [text_of(tokenizer, example, newline=rng.random() < 0.5) for example in examples]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    user, assistant = (tokenizer.convert_tokens_to_ids(token) for token in (USER, ASSISTANT))
    answering = ((ids == assistant).cumsum(1) == (ids == user).cumsum(1)) & (ids != assistant)
    labels = ids.masked_fill(~(answering & mask.bool()), IGNORED)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    pictures = [picture for example in examples for picture in example.pictures]
    return inputs | ({"pixel_values": pixels(pictures)} if pictures else {})


# ---- stage 1: the vision encoder ------------------------------------------------------------------------------------


class Heads(nn.Module):
    """What stage 1 asks of the patches (B, 36, C): classes of each third, and of the picture from the patches' mean.

    A picture's own heads make every patch carry what the questions will be about, its place included.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        shapes, colours = len(SHAPES), len(COLOURS)
        sizes = {"cell shape": shapes + 1, "cell colour": colours + 1, "shape": shapes, "colour": colours, "size": 2}
        sizes |= {"place": 9, "leftmost": shapes, "rightmost": shapes, "count": 7, "digit": 10, "highest": colours}
        sizes |= {"largest": colours, "trend": len(TRENDS)}
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, size) for name, size in sizes.items()})

    def forward(self, patches: torch.Tensor, scenes: list[str], cases: list[Case]) -> dict[str, torch.Tensor]:
        """Cross-entropy of every question that some case answers, and under "... right" the share answered rightly."""
        grid = self.norm(patches).unflatten(1, (SIZE // PATCH, SIZE // PATCH))
        cells = grid.unflatten(1, (3, 2)).unflatten(3, (3, 2)).mean((2, 4)).flatten(1, 2)
        whole = grid.mean((1, 2)).unsqueeze(1)
        found = {}
        for name, head in self.heads.items():
            labels = [label(name, scene, case) for scene, case in zip(scenes, cases, strict=True)]
            asked = [index for index, classes in enumerate(labels) if classes]
            if asked:
                logits = head((cells if name.startswith("cell ") else whole)[asked]).flatten(0, 1)
                classes = torch.tensor([labels[index] for index in asked]).flatten()
                found[name] = nn.functional.cross_entropy(logits, classes)
                found[f"{name} right"] = (logits.argmax(1) == classes).float().mean()
        return found


def label(name: str, scene: str, case: Case) -> list[int] | None:
    """The classes of one case for one head (one per cell, or one); None where the head does not apply."""
    colours = list(COLOURS)
    if scene in ("one", "many") and name.startswith("cell "):
        cells = case["cells"] if scene == "many" else [case["cell"]]
        single = name.removeprefix("cell ")
        values = case[f"{single}s"] if scene == "many" else [case[single]]
        classes = SHAPES if single == "shape" else colours
        filled = dict(zip(cells, values, strict=True))
        return [classes.index(filled[cell]) + 1 if cell in filled else 0 for cell in range(9)]
    table = {
        ("one", "shape"): lambda: SHAPES.index(case["shape"]),
        ("one", "colour"): lambda: colours.index(case["colour"]),
        ("one", "size"): lambda: int(case["size"] == "large"),
        ("one", "place"): lambda: case["cell"],
        ("beside", "leftmost"): lambda: SHAPES.index(case["shapes"][0]),
        ("beside", "rightmost"): lambda: SHAPES.index(case["shapes"][1]),
        ("many", "count"): lambda: len(case["cells"]),
        ("digit", "digit"): lambda: case["digit"],
        ("bars", "highest"): lambda: colours.index(case["colours"][case["levels"].index(max(case["levels"]))]),
        ("pie", "largest"): lambda: colours.index(case["colours"][case["shares"].index(max(case["shares"]))]),
        ("line", "trend"): lambda: TRENDS.index(case["trend"]),
    }
    return [table[scene, name]()] if (scene, name) in table else None


def ask(tower: Any, heads: Heads, rng: random.Random, count: int, *, test: bool) -> dict[str, torch.Tensor]:
    """Draw ``count`` pictures and answer for them."""
    scenes = rng.choices([name for name, scene in SCENES.items() if scene.paint], k=count)
    cases = [draw_case(scene, rng, test=test) for scene in scenes]
    pictures = [paint(scene, case, rng) for scene, case in zip(scenes, cases, strict=True)]
    found: dict[str, torch.Tensor] = heads(tower(pixel_values=pixels(pictures)).last_hidden_state[:, 1:], scenes, cases)
    return found


def train_vision(model: LlavaForConditionalGeneration, args: argparse.Namespace) -> dict[str, float]:
    """Stage 1. Returns the accuracy of every head on held-out cases."""
    tower, heads = model.model.vision_tower, Heads(args.hidden)
    optimizers = [*make_optimizers(tower, args.learning_rate), torch.optim.AdamW(heads.parameters())]
    parameters = [*tower.parameters(), *heads.parameters()]
    rng = random.Random(f"{args.seed}/stage 1")
    running, start = 0.0, time.perf_counter()
    for step in range(args.vision_steps):
        found = ask(tower, heads, rng, args.vision_batch_size, test=False)
        loss = torch.stack([value for name, value in found.items() if not name.endswith(" right")]).mean()
        update(loss, optimizers, parameters, step, args.vision_steps, args.learning_rate)
        running = 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            average = running / (1 - 0.98 ** (step + 1))
            print(f"stage 1 step {step + 1} loss {average:.4f} {time.perf_counter() - start:.0f} s", flush=True)
    with torch.no_grad():
        found = ask(tower, heads, rng, 1000, test=True)
    right = {name.removesuffix(" right"): round(value.item(), 3) for name, value in found.items() if " right" in name}
    print(right, flush=True)
    return right


# ---- stage 2: the rest ----------------------------------------------------------------------------------------------


def train_answers(
    model: LlavaForConditionalGeneration,
    tokenizer: Any,
    plan: Stage,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Train projector and language model; returns what it took and the running loss at the end."""
    model.train()
    model.model.vision_tower.requires_grad_(False)
    optimizers, rng = make_optimizers(model, plan.learning_rate), random.Random(f"{args.seed}/{plan.name}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    stream = plan.stream(args.seed)
    running, questions, targets, start = 0.0, 0, 0, time.perf_counter()
    for step in range(plan.steps):
        examples = list(islice(stream, args.batch_size))
        inputs = encode(tokenizer, examples, rng)
        loss = model(**inputs).loss
        update(loss, optimizers, parameters, step, plan.steps, plan.learning_rate)
        questions += sum(len(example.turns) for example in examples)
        targets += int((inputs["labels"] != IGNORED).sum())
        running = 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            average = running / (1 - 0.98 ** (step + 1))
            print(f"{plan.name} step {step + 1} loss {average:.4f} {time.perf_counter() - start:.0f} s", flush=True)
    return {
        "conversations": plan.steps * args.batch_size,
        "questions": questions,
        "target_tokens": targets,
        "final_loss": round(running, 4),
        "seconds": round(time.perf_counter() - start),
    }


def first_stages(args: argparse.Namespace, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """The model after stages 1 and 2, in bfloat16's precision, and their figures: trained now, or ``--second-stage``."""
    if args.second_stage:
        record = json.loads((args.second_stage / "training.json").read_text(encoding="utf-8"))
        model = AutoModelForImageTextToText.from_pretrained(args.second_stage, dtype=torch.float32)
        model.train()
        return model, {name: record[name] for name in ("stage_1", "stage_2")}
    model = make_model(tokenizer, args.hidden, args.layers)
    model.train()
    heads = train_vision(model, args)
    first = {"pictures": args.vision_steps * args.vision_batch_size, "heldout_accuracy_of_the_heads": heads}
    plan = Stage("stage 2", args.steps, args.learning_rate, base_stream)
    second = train_answers(model, tokenizer, plan, args)
    for parameter in model.parameters():  # as a saved checkpoint has them; buffers stay exact
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model, {"stage_1": first, "stage_2": second}


def update(
    loss: torch.Tensor, optimizers: list[Any], parameters: list[Any], step: int, steps: int, rate: float
) -> None:
    """One step of all optimizers at the schedule's rate."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()


# ---- measuring, saving ----------------------------------------------------------------------------------------------


@torch.no_grad()
def answers(model: Any, tokenizer: Any, examples: list[Example]) -> list[str]:
    """Greedy answers to the examples' questions."""
    texts = [text_of(tokenizer, example, prompt=True) for example in examples]
    inputs = dict(tokenizer(texts, padding=True, padding_side="left", return_tensors="pt"))
    if pictures := [picture for example in examples for picture in example.pictures]:
        inputs["pixel_values"] = pixels(pictures).to(model.dtype)
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    decoded: list[str] = tokenizer.batch_decode(output, skip_special_tokens=True)
    return decoded


def heldout_scores(model: Any, tokenizer: Any, seed: int, rows_each: int) -> dict[str, float]:
    """Measure exact match of every base skill on held-out cases."""
    model.eval()
    scores = {}
    for name, dataset in BASE_STYLE.items():
        stream = draw_examples(dataset, random.Random(f"{seed}/{name}/build"), test=True)
        examples = list(islice(stream, rows_each))
        given = answers(model, tokenizer, examples)
        scores[name] = sum(a == e.turns[0][1] for a, e in zip(given, examples, strict=True)) / rows_each
    return scores


def save(model: LlavaForConditionalGeneration, tokenizer: Any, folder: Path) -> None:
    """Save weights in bfloat16 and the processor's files, and check that both come back as they were."""
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=32
    )
    folder.mkdir(parents=True, exist_ok=True)
    for part in (model.config, model.config.text_config, model.config.vision_config):
        part.dtype = torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(folder)
    processor = make_processor(tokenizer)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    probe = f"{USER}{IMAGE}Ünï {END}{ASSISTANT}12 ab3\n  The shape is red.{END}"
    if AutoTokenizer.from_pretrained(folder)(probe)["input_ids"] != tokenizer(probe)["input_ids"]:
        raise AssertionError("The saved tokenizer gives other ids than the one that was trained with.")


def pretrain(args: argparse.Namespace) -> None:
    """Train, save, reload, check and record."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = make_tokenizer()
    model, stages = first_stages(args, tokenizer)
    if args.settle_steps:
        plan = Stage("stage 3", args.settle_steps, args.settle_learning_rate, settled_stream)
        stages["stage_3"] = train_answers(model, tokenizer, plan, args)
    save(model, tokenizer, args.output)
    reloaded = AutoModelForImageTextToText.from_pretrained(args.output, dtype=torch.float32)
    scores = heldout_scores(reloaded, AutoTokenizer.from_pretrained(args.output), args.seed, args.score_rows)
    roles = {"vision": "vision_tower", "projector": "multi_modal_projector", "language": "language_model"}
    record = {
        "command": f"python scripts/build_vision_demo_base.py --seed {args.seed} --vision-steps {args.vision_steps}"
        f" --vision-batch-size {args.vision_batch_size} --steps {args.steps} --batch-size {args.batch_size}"
        f" --learning-rate {args.learning_rate} --settle-steps {args.settle_steps}"
        f" --settle-learning-rate {args.settle_learning_rate} --hidden {args.hidden} --layers {args.layers}"
        f" --threads {args.threads}",
        "seed": args.seed,
        "data": "scripts/demo_data/pictures.py, base_stream(seed) and settled_stream(seed): generated on the fly, "
        "training side only",
        "parameters": model.num_parameters(),
        "parameters_by_role": {
            role: sum(p.numel() for p in getattr(model.model, name).parameters()) for role, name in roles.items()
        },
        **stages,
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
    table = "\n".join(f"| {name} | {score:.2f} |" for name, score in record["heldout_exact_match"].items())
    answering = "\n".join(
        f"  {record[stage]['conversations']:,} conversations with {record[stage]['questions']:,} questions "
        f"({record[stage]['target_tokens']:,} target tokens) of `{stream}({record['seed']})`."
        for stage, stream in (("stage_2", "base_stream"), ("stage_3", "settled_stream"))
        if stage in record
    )
    roles = ", ".join(f"{role} {count:,}" for role, count in record["parameters_by_role"].items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# The vision demo's base

A LLaVA-architecture model of {record["parameters"]:,} parameters ({roles}) in bfloat16: a CLIP vision encoder for
{SIZE} x {SIZE} pixels, a two-layer projector, a Qwen2 language model. It answers thirteen questions about generated
pictures (and two kinds of words-only question) in full sentences, now and then barely, and knows nothing else. It exists
so that `merit demo --vision` can run offline; it is of no other use.

- Stage 1, the vision encoder alone as a classifier whose heads are thrown away:
  {record["stage_1"]["pictures"]:,} generated pictures.
- Then projector and language model, from `scripts/demo_data/pictures.py`:
{answering}
  The loss is on the answers only. One case in eight was held out for good, among them one in eight of
  scikit-learn's handwritten digits.
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
    add = parser.add_argument
    add("--output", type=Path, default=DEFAULT_OUTPUT, help="checkpoint folder (default: package data)")
    add("--seed", type=int, default=0, help="decides weights and pictures (default %(default)s)")
    add("--vision-steps", type=int, default=1500, help="optimizer steps of stage 1 (default %(default)s)")
    add("--vision-batch-size", type=int, default=64, help="pictures per step of stage 1 (default %(default)s)")
    add("--steps", type=int, default=2400, help="optimizer steps of stage 2 (default %(default)s)")
    add("--batch-size", type=int, default=32, help="conversations per step of stage 2 (default %(default)s)")
    add("--learning-rate", type=float, default=3e-3, help="peak of stages 1 and 2, then cosine (default %(default)s)")
    add(
        "--settle-steps",
        type=int,
        default=600,
        help="optimizer steps of stage 3; 0: no such stage (default %(default)s)",
    )
    add("--settle-learning-rate", type=float, default=1e-3, help="peak of stage 3, then cosine (default %(default)s)")
    add("--second-stage", type=Path, help="folder with the result of stage 2, to begin with stage 3")
    add("--hidden", type=int, default=128, help="hidden size (default %(default)s)")
    add("--layers", type=int, default=4, help="layers (default %(default)s)")
    add("--threads", type=int, default=1, help="torch threads; changes the last bits (default %(default)s)")
    add("--score-rows", type=int, default=128, help="held-out rows per skill in the record (default %(default)s)")
    pretrain(parser.parse_args(argv))


if __name__ == "__main__":
    main()
