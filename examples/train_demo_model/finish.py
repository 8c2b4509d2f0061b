"""Put the trained weights, the tokenizer and a model card together in the folder that is bundled."""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from checkpoint import METADATA, RESULT, WEIGHTS
from safetensors.torch import load_file, save_file
from storage import read_manifest
from vocab import FILES

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILES: Final = ("config.json", "generation_config.json")
CARD: Final = "README.md"

TEMPLATE: Final = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The demo model of cythera

A language model small enough to travel with the package, and trained for real, so that text, quantization
and speculation can be tried and measured without downloading anything. It writes recognisable English and
Python, and answers simple questions about Python in chat form. It is a demonstration, not a source of facts.

## Shape

`LlamaForCausalLM`, {parameters} parameters: {layers} layers, hidden size {hidden}, {heads} heads of {head_dim}, {kv_heads} of them
for keys and values, intermediate size {intermediate}, tied embeddings, {vocab} tokens (byte-level BPE), {positions} positions,
bfloat16. `<|start|>` and `<|end|>` enclose the messages of a chat; `<|bos|>` begins and `<|eos|>` ends a text.

## Training

{steps} steps of {batch} sequences of {length} tokens: {seen} M tokens, or {epochs} passes over {tokens} M, in {minutes} minutes
on one {device}. AdamW, peak learning rate {lr}, weight decay {weight_decay}, cosine to zero.
`examples/train_demo_model` in the repository holds every step from download to this file.

## Held-out text

Whole files that were kept out of the training, one in a hundred:

| text | tokens | loss | perplexity of a token | bits of a byte |
|---|--:|--:|--:|--:|
{heldout}

## Limits

- It is tiny. It invents names, signatures and facts, and loses the thread after a few sentences.
- It knows English and Python only, and of Python what the documentation and the code of packages show.
- It was not aligned or filtered for anything: do not put it in front of people as an assistant.
- The held-out conversations share their forms, and partly their answers, with the training ones, so their
  perplexity says little.

## Data and licences

The weights are published under Apache-2.0. The training text, with the terms that its publishers state:

| licence | MB | distributions |
|---|--:|---|
{sources}
"""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--trained", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    return parser.parse_args()


def merge_weights(trained: Path, out: Path) -> None:
    """Write all weights into one file, from as many as there are."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(trained.glob("model*.safetensors")):
        tensors |= load_file(path)
    if not tensors:
        raise FileNotFoundError(f"{trained}: no model*.safetensors")
    save_file(tensors, out / WEIGHTS, metadata=METADATA)
    (out / WEIGHTS).chmod(0o644)


def make_card(config: dict[str, Any], result: dict[str, Any], manifest: dict[str, Any]) -> str:
    """Fill in the model card."""
    return TEMPLATE.format(
        parameters=f"{result['num_parameters']:,}",
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        kv_heads=config["num_key_value_heads"],
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        positions=config["max_position_embeddings"],
        steps=f"{result['num_steps']:,}",
        batch=result["batch"],
        length=result["length"],
        seen=f"{result['num_tokens_seen'] / 1e6:,.0f}",
        epochs=f"{result['num_tokens_seen'] / result['num_tokens_of_data']:.1f}",
        tokens=f"{result['num_tokens_of_data'] / 1e6:.1f}",
        minutes=f"{result['training_seconds'] / 60:.1f}",
        device=result["device"],
        lr=result["lr"],
        weight_decay=result["weight_decay"],
        heldout=describe_held_out(result["heldout"]),
        sources=describe_sources(manifest["sources"]),
    )


def describe_held_out(parts: dict[str, dict[str, float]]) -> str:
    """Return a line of the table for each kind of text."""
    return "\n".join(
        f"| {kind} | {part['num_tokens']:,.0f} | {part['loss']:.3f} | {part['perplexity']:.2f}"
        f" | {part['bits_per_byte']:.3f} |"
        for kind, part in parts.items()
    )


def describe_sources(sources: list[dict[str, Any]]) -> str:
    """Return a line of the table for each licence, with names and versions."""
    groups = defaultdict(list)
    for source in sources:
        groups[source["licence"]].append(source)
    return "\n".join(
        f"| {licence} | {sum(s['bytes'] for s in group) / 1e6:.1f} |"
        f" {', '.join(' '.join(filter(None, (s['name'], s['version']))) for s in group)} |"
        for licence, group in sorted(groups.items())
    )


def main() -> None:
    """Make the folder; what is in it already is replaced, file by file."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    merge_weights(args.trained, args.out)
    for name in CONFIG_FILES:
        shutil.copyfile(args.trained / name, args.out / name)
    for name in FILES:
        shutil.copyfile(args.data / name, args.out / name)
    config, result = (
        json.loads((args.trained / name).read_text(encoding="utf-8"))
        for name in ("config.json", RESULT)
    )
    card = make_card(config, result, read_manifest(args.data))
    (args.out / CARD).write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
