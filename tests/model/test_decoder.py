"""The decoder against `transformers`: same checkpoint, same tokens, same logits."""

from __future__ import annotations

import pytest
import torch

from core.model.families import load_hf_config, read_model
from core.testing.checkpoints import (
    FAMILIES,
    ORIGINAL_MAX_POSITION,
    VOCAB_SIZE,
    make_checkpoint,
    reference_generate,
    reference_logits,
)

LENGTH_DEPENDENT = ("llama-dynamic", "phi3", "phi4")


def make_tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE - 3, (count,), generator=generator).tolist()


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("variant", sorted(set(FAMILIES) - set(LENGTH_DEPENDENT)))
def test_logits_equal_transformers(variant, checkpoint, load, run):
    path, tokens = checkpoint(variant), make_tokens(61)
    expected = reference_logits(path, tokens)
    assert relative_error(run(load(path), tokens), expected) < 1e-4


@pytest.mark.parametrize("count", [ORIGINAL_MAX_POSITION - 4, ORIGINAL_MAX_POSITION, 61])
@pytest.mark.parametrize("variant", LENGTH_DEPENDENT)
def test_logits_equal_transformers_for_a_sequence_of_the_maximal_length(
    variant, count, checkpoint, load, run
):
    path, tokens = checkpoint(variant), make_tokens(count)
    expected = reference_logits(path, tokens)
    assert relative_error(run(load(path, max_len=count), tokens), expected) < 1e-4


@pytest.mark.parametrize("variant", LENGTH_DEPENDENT)
def test_short_sequences_equal_transformers_that_is_told_the_maximal_length(
    variant, checkpoint, load, run
):
    path, tokens = checkpoint(variant), make_tokens(20)
    expected = reference_logits(path, tokens, max_model_len=100)
    assert relative_error(run(load(path, max_len=100), tokens), expected) < 1e-4
    # The regimes really differ, so that the assertion above means something.
    assert relative_error(reference_logits(path, tokens), expected) > 1e-2


@pytest.mark.parametrize("variant", sorted(FAMILIES))
def test_chunks_do_not_change_the_logits(variant, checkpoint, load, run):
    decoder, tokens = load(checkpoint(variant)), make_tokens(45)
    chunked = run(decoder, tokens, [1, 10, 1, 1, 20, 12])
    assert relative_error(chunked, run(decoder, tokens)) < 1e-4


@pytest.mark.parametrize("variant", ["llama3.1", "gemma3", "phi4"])
def test_greedy_tokens_equal_transformers(variant, checkpoint, load, run):
    path, prompt, num_tokens = checkpoint(variant), make_tokens(30, seed=1), 12
    decoder, tokens = load(path), list(prompt)
    for _ in range(num_tokens):
        tokens.append(run(decoder, tokens)[-1].argmax().item())
    expected = reference_generate(path, prompt, num_tokens, max_model_len=128)
    assert tokens[len(prompt) :] == expected


@pytest.mark.parametrize("variant", sorted(FAMILIES))
def test_float64_agrees_and_stays_float64(variant, checkpoint, load, run):
    path, tokens = checkpoint(variant), make_tokens(40)
    exact = run(load(path, dtype=torch.float64), tokens)
    assert exact.dtype == torch.float64
    assert relative_error(run(load(path), tokens), exact) < 1e-4


@pytest.mark.parametrize("variant", sorted(FAMILIES))
def test_bfloat16_rounds_where_transformers_rounds(variant, checkpoint, load, run):
    path, tokens = checkpoint(variant), make_tokens(24)
    expected = reference_logits(path, tokens, dtype=torch.bfloat16)
    actual = run(load(path, dtype=torch.bfloat16, max_len=24), tokens)
    # One rounding more or less would differ by about as much as bfloat16 differs from float32.
    rounding = relative_error(expected, reference_logits(path, tokens))
    assert relative_error(actual, expected) < rounding / 4


def test_other_sequences_and_seeds_differ(checkpoint, load, run, tmp_path):
    """Guards the comparisons above: the logits depend on the tokens and on the weights."""
    decoder = load(checkpoint("llama3"))
    first = run(decoder, make_tokens(20))
    assert relative_error(run(decoder, make_tokens(20, seed=1)), first) > 1e-1
    other = load(make_checkpoint("llama3", tmp_path, seed=1))
    assert relative_error(run(other, make_tokens(20)), first) > 1e-1


@pytest.mark.parametrize("variant", sorted(FAMILIES))
def test_attention_is_told_what_the_config_says(variant, checkpoint, build):
    spec = read_model(load_hf_config(checkpoint(variant)))
    decoder = build(spec, device=torch.device("meta"))
    for index, layer in enumerate(decoder.layers):
        told = layer.attention_spec
        assert told.layer == index
        assert told.window == spec.layers[index].window
        assert (told.num_heads, told.num_kv_heads) == (spec.num_heads, spec.num_kv_heads)


def test_a_layer_is_five_bound_callables(checkpoint, load, run):
    """Whatever fills a slot is called, once per layer and in order."""
    decoder = load(checkpoint("llama3"))
    calls = []

    def watched(index, name, slot):
        def call(*args):
            calls.append((index, name))
            return slot(*args)

        return call

    decoder.slots = [
        type(slots)(*(watched(index, name, s) for name, s in zip(slots._fields, slots, strict=True)))
        for index, slots in enumerate(decoder.slots)
    ]
    run(decoder, make_tokens(3))
    names = ("qkv", "attend", "out", "up", "down")
    assert calls == [(index, name) for index in range(2) for name in names]


@torch.inference_mode()
@pytest.mark.parametrize("wanted", [[], [0], [39], [3, 17, 18], [39, 0, 39], list(range(40))])
@pytest.mark.parametrize("variant", ["llama3.1", "gemma2"])
def test_what_is_wanted_of_the_last_layer_is_as_in_the_whole(variant, wanted, checkpoint, load):
    decoder, tokens = load(checkpoint(variant), dtype=torch.float64), torch.tensor(make_tokens(40))
    whole = decoder(tokens, torch.arange(40), 0)
    part = decoder(tokens, torch.arange(40), 0, torch.tensor(wanted, dtype=torch.int64))
    assert part.shape == (len(wanted), whole.shape[1])
    torch.testing.assert_close(part, whole[wanted], rtol=1e-12, atol=1e-12)


@torch.inference_mode()
def test_keys_and_values_are_stored_for_tokens_that_are_not_wanted(checkpoint, load):
    decoder, tokens = load(checkpoint("llama3.1"), dtype=torch.float64), torch.tensor(make_tokens(40))
    whole = decoder(tokens, torch.arange(40), 0)
    none = torch.empty(0, dtype=torch.int64)
    decoder(tokens[:30], torch.arange(30), 0, none)
    rest = decoder(tokens[30:], torch.arange(30, 40), 30)
    torch.testing.assert_close(rest, whole[30:], rtol=1e-12, atol=1e-12)
