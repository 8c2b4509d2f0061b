from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from core.outputs import CompletionOutput, Logprob, OutputKind, RequestOutput


def _completion(num_tokens=3, text="abcdef", logprobs=True):
    table = [{i: Logprob(-float(i), 1, str(i))} for i in range(num_tokens)]
    return CompletionOutput(
        index=0,
        text=text,
        token_ids=list(range(num_tokens)),
        cumulative_logprob=-3.0 if logprobs else None,
        logprobs=table if logprobs else None,
    )


def test_a_new_request_says_that_nothing_has_happened_yet():
    output = RequestOutput(request_id="r", prompt=None, prompt_token_ids=[1, 2])
    assert (output.outputs, output.finished, output.error) == ([], False, "")
    assert output.prompt_logprobs is None
    assert output.num_cached_tokens is None
    assert output.metrics is None


def test_a_completion_is_finished_once_it_has_a_reason():
    completion = _completion()
    assert not completion.finished()
    completion.finish_reason = "stop"
    assert completion.finished()


def test_a_snapshot_does_not_change_with_what_comes_later():
    output = RequestOutput("r", "p", [1], [None], [_completion()])
    before = output.snapshot()
    output.outputs[0].text += "more"
    output.outputs[0].token_ids.append(9)
    output.outputs[0].logprobs.append({9: Logprob(-1.0)})
    output.outputs[0].finish_reason = "length"
    output.finished = True
    assert before == RequestOutput("r", "p", [1], [None], [_completion()])


def test_a_snapshot_may_hold_other_completions():
    output = RequestOutput("r", "p", [1], outputs=[_completion()], finished=True)
    assert output.snapshot([]).outputs == []
    assert output.snapshot([]).finished
    assert len(output.outputs) == 1


@given(st.integers(0, 4), st.integers(0, 7), st.booleans())
def test_what_came_since_continues_what_was_there(num_tokens, num_chars, logprobs):
    whole = _completion(logprobs=logprobs)
    new = whole.since(num_tokens, num_chars)
    assert whole.text[:num_chars] + new.text == whole.text
    assert whole.token_ids[:num_tokens] + new.token_ids == whole.token_ids
    assert new.cumulative_logprob == whole.cumulative_logprob
    if logprobs:
        assert whole.logprobs[:num_tokens] + new.logprobs == whole.logprobs
    else:
        assert new.logprobs is None


def test_kinds_of_streams():
    assert [kind.name for kind in OutputKind] == ["CUMULATIVE", "DELTA", "FINAL_ONLY"]
