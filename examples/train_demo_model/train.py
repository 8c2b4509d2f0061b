"""Train the demo model on prepared data and write it as a Hugging Face checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from checkpoint import save_checkpoint
from model import Llama, ModelConfig
from storage import HELD_OUT, TRAIN, read_manifest, read_tokens
from windows import draw_starts, make_windows

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import Tensor

WARM_UP: Final = 0.02
"""The share of the time in which the learning rate rises."""
Z_LOSS: Final = 1e-4
CLIP: Final = 1.0
PROGRESS_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Progress:
    """What the training loop came to."""

    num_steps: int
    num_tokens: int
    seconds: float


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=7.0, help="training time after compilation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64, help="sequences a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens a sequence")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--hidden", type=int, default=384, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-mb", type=float, default=math.inf, help="split the weights")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def make_config(hidden: int, num_layers: int, vocab_size: int) -> ModelConfig:
    """Scale the shape with the hidden size; the defaults of the options give the bundled model."""
    config = ModelConfig(vocab_size=vocab_size)
    if hidden % config.head_dim:
        raise ValueError(f"--hidden {hidden}: not a multiple of {config.head_dim}")
    num_heads = hidden // config.head_dim
    return replace(
        config,
        hidden_size=hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=max(k for k in (1, 2) if num_heads % k == 0),
        intermediate_size=(hidden * 8 // 3 + 63) // 64 * 64,
    )


def make_optimizer(model: Llama, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Return AdamW that decays matrices and leaves the norms alone."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def learning_rate_at(progress: float) -> float:
    """Return the factor of the peak at a share of the time: linear up, then half a cosine to nothing."""
    if progress < WARM_UP:
        return max(progress, 1e-3) / WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP)))


def make_autocast(device: str) -> AbstractContextManager[Any]:
    """Compute in bfloat16 on a GPU, in float32 elsewhere."""
    return (
        torch.autocast("cuda", torch.bfloat16)
        if device.startswith("cuda")
        else contextlib.nullcontext()
    )


def make_loss(
    model: Llama, args: argparse.Namespace
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a function from inputs and targets to the training loss and the plain mean loss."""

    def loss(ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(ids).flatten(0, 1).float()
        log_sums = logits.logsumexp(-1)
        mean = (log_sums - logits.gather(-1, targets.reshape(-1, 1)).squeeze(-1)).mean()
        return mean + Z_LOSS * log_sums.square().mean(), mean.detach()

    return loss if args.no_compile else torch.compile(loss, dynamic=False)


def train(model: Llama, tokens: Tensor, args: argparse.Namespace) -> Progress:
    """Train for the given time; the first step, which compiles, is not counted."""
    optimizer = make_optimizer(model, args)
    loss_of = make_loss(model, args)
    generator = torch.Generator().manual_seed(args.seed)
    seconds, begin, reported = 60 * args.minutes, time.monotonic(), -math.inf
    for step, starts in enumerate(draw_starts(len(tokens), args.length, args.batch, generator)):
        elapsed = time.monotonic() - begin if step else 0.0
        if elapsed >= seconds:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate_at(elapsed / seconds)
        with make_autocast(args.device):
            loss, mean = loss_of(*make_windows(tokens, starts.to(tokens.device), args.length))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not step:
            value = mean.item()  # waits for the device, so that the clock starts after compilation
            print(f"compiled in {time.monotonic() - begin:.0f} s, loss {value:.3f}", flush=True)
            begin = time.monotonic()
        elif elapsed - reported >= PROGRESS_SECONDS:
            reported = elapsed
            print_progress(step, elapsed, mean, optimizer, args)
    return Progress(step, step * args.batch * args.length, elapsed)


def print_progress(
    step: int, elapsed: float, loss: Tensor, optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> None:
    """Print a line about the step."""
    rate = step * args.batch * args.length / max(elapsed, 1e-9)
    lr = optimizer.param_groups[0]["lr"]
    print(
        f"{elapsed:6.0f} s  step {step:6d}  loss {loss.item():.4f}  lr {lr:.2e}  {rate / 1e3:8.0f} k tokens/s",
        flush=True,
    )


@torch.no_grad()
def evaluate(model: Llama, tokens: Tensor, args: argparse.Namespace) -> tuple[float, int]:
    """Sum the loss over a stream in windows that overlap by one token.

    :return: the sum in nats, and the number of tokens predicted.
    """
    total, count = 0.0, 0
    starts = torch.arange(0, max(len(tokens) - args.length, 1), args.length, device=tokens.device)
    length = min(args.length, len(tokens) - 1)
    for chunk in starts.split(args.batch):
        with make_autocast(args.device):
            losses = model.losses(*make_windows(tokens, chunk, length))
        total += losses.double().sum().item()
        count += losses.numel()
    return total, count


def evaluate_parts(
    model: Llama, tokens: Tensor, parts: list[dict[str, Any]], args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Measure each kind of held-out text, and all of them together.

    :param parts: `kind`, `num_tokens` and `num_bytes`, in the order of the stream.
    """
    results, sums, offset = {}, [0.0, 0.0, 0.0], 0
    for part in parts:
        stream = tokens[offset : offset + part["num_tokens"]]
        offset += part["num_tokens"]
        if len(stream) < 2:
            continue
        nats, count = evaluate(model, stream, args)
        num_bytes = part["num_bytes"] * count / part["num_tokens"]  # the last piece is left out
        results[part["kind"]] = summarize(nats, count, num_bytes)
        sums = [a + b for a, b in zip(sums, (nats, count, num_bytes), strict=True)]
    return results | {"all": summarize(*sums)}


def summarize(nats: float, num_tokens: float, num_bytes: float) -> dict[str, float]:
    """Return loss and perplexity of a token, and bits of a byte."""
    return {
        "loss": nats / num_tokens,
        "perplexity": math.exp(nats / num_tokens),
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "num_tokens": num_tokens,
    }


@torch.no_grad()
def round_weights(model: Llama) -> None:
    """Give the weights the values that the checkpoint will hold, so that what is measured is what is kept."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def main() -> None:
    """Train, measure, save."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    manifest = read_manifest(args.data)
    config = make_config(args.hidden, args.layers, manifest["vocab_size"])
    tokens = torch.from_numpy(read_tokens(args.data / TRAIN)).to(args.device)
    model = Llama(config).to(args.device)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters} parameters, {len(tokens)} tokens, {args.device}", flush=True)
    done = train(model, tokens, args)
    round_weights(model)
    held_out = torch.from_numpy(read_tokens(args.data / HELD_OUT)).to(args.device)
    result = {
        "num_parameters": num_parameters,
        "num_steps": done.num_steps,
        "num_tokens_seen": done.num_tokens,
        "num_tokens_of_data": len(tokens),
        "training_seconds": round(done.seconds, 1),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
        "torch": torch.__version__,
        "batch": args.batch,
        "length": args.length,
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        "heldout": evaluate_parts(model, held_out, manifest["heldout"], args),
    }
    save_checkpoint(model, config, result, args.out, args.max_shard_mb)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
