"""One-sequence batches and label trees against plain rows: same loss, same gradients, same training, same scores."""

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import modeling
import train
from prompts import TASKS, answer_ids, encode_rows, prompt_ids
from shared_prefix import PaddedCollator, SharedPrefixCollator, label_log_probs, shared_length

TASK = TASKS["sst2"]


def row(prompt, answer):
    return {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + list(answer)}


PREFIX = list(range(20, 50))
BATCHES = {
    "different lengths": [row([*PREFIX, 3, 4, 5], [7, 2]), row([*PREFIX, 6], [8, 9, 2]), row([*PREFIX, 3, 9], [7, 2])],
    "duplicate rows": [row([*PREFIX, 3, 4], [7, 2])] * 3,
    "one sentence, two labels": [row([*PREFIX, 3, 4], [7, 2]), row([*PREFIX, 3, 4], [8, 2])],
    "a label that begins another": [row([*PREFIX, 3], [7, 2]), row([*PREFIX, 3], [7, 8, 2])],
    "a prompt that begins another": [row(PREFIX, [7, 2]), row([*PREFIX, 7, 2, 5], [8, 2])],
    "no common prefix": [row([3, 4, 5], [7, 2]), row([6, 4, 5, 9], [8, 2])],
    "a single row": [row([*PREFIX, 3], [7, 2])],
}


def tiny(key_value_heads):
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        vocab_size=64,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return with_adapter(LlamaForCausalLM(config))


def with_adapter(model, std=0.1):
    options = {"r": 8, "alpha": 16, "dropout": 0, "target_modules": ["q_proj", "v_proj"], "seed": 0}
    model = modeling.add_adapter(model, "tiny", **options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the gradients of lora_A
            torch.nn.init.normal_(parameter, std=std)
    return model


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = train.AnswerLossTrainer.compute_loss(None, model, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), gradients


def assert_equal(model, rows, pad_to_multiple_of=1):
    loss, gradients = loss_and_gradients(model, SharedPrefixCollator(0, pad_to_multiple_of)(rows))
    expected_loss, expected = loss_and_gradients(model, PaddedCollator(0)(rows))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("key_value_heads", [4, 2])
@pytest.mark.parametrize("name", BATCHES)
def test_loss_and_every_gradient_equal_the_padded_batchs(name, key_value_heads):
    assert_equal(tiny(key_value_heads), BATCHES[name])


@pytest.mark.parametrize("name", BATCHES)
def test_rounding_the_tokens_up_changes_nothing(name):
    batch = SharedPrefixCollator(0, 64)(BATCHES[name])
    assert (batch["input_ids"].shape[1] % 64, len(batch["logits_to_keep"]) % 64) == (0, 0)
    assert_equal(tiny(2), BATCHES[name], 64)


def test_padded_batches_equal_plain_rows():
    model, rows = tiny(2), BATCHES["different lengths"]
    losses = []
    for one in rows:
        ids, labels = (torch.tensor([one[key]]) for key in ("input_ids", "labels"))
        tokens = (labels != -100).sum()
        losses.append((model(input_ids=ids, labels=labels).loss * tokens, tokens))
    total, tokens = (sum(column) for column in zip(*losses, strict=True))
    assert loss_and_gradients(model, PaddedCollator(0)(rows))[0] == pytest.approx((total / tokens).item(), rel=1e-5)


def test_smollm2_in_nf4(smollm2_tokenizer):
    rows = [("a gem", "positive"), ("dull , flat and far too long for what it says", "negative"), ("fine", "positive")]
    rows = [{"sentence": sentence, "label_text": label} for sentence, label in rows]
    encoded, _ = encode_rows(smollm2_tokenizer, TASK, rows, 256)
    model = with_adapter(modeling.load_base_model("smollm2"))
    assert_equal(model, [row(one["prompt_ids"], one["answer_ids"]) for one in encoded])


def test_the_prefix_stands_once_and_each_row_keeps_a_prompt_token():
    rows = BATCHES["different lengths"]
    assert shared_length(rows) == len(PREFIX)
    assert SharedPrefixCollator()(rows)["input_ids"].shape == (1, len(PREFIX) + 5 + 4 + 4)
    assert shared_length(BATCHES["duplicate rows"]) == len(PREFIX) + 1
    assert shared_length(BATCHES["a prompt that begins another"]) == len(PREFIX) - 1
    assert shared_length(BATCHES["no common prefix"]) == 0


ANSWERS = {
    "one token": [[7, 2], [8, 2]],
    "shared first tokens": [[7, 8, 2], [7, 9, 2], [7, 9, 10, 2], [11, 2]],
    "one begins another": [[7, 2], [7, 8, 2], [7, 8, 9, 2]],
    "different lengths": [[7, 2], [8, 9, 10, 11, 12, 2]],
}
PROMPTS = {
    "a common prefix": [[*PREFIX, *own] for own in ([3], [3, 4, 5], [3, 4, 6], [9, 8], [7, 8, 9], [10] * 9)],
    "duplicates": [[*PREFIX, 3, 4]] * 2 + [[*PREFIX, 5]],
    "one begins another": [PREFIX, [*PREFIX, 7], [*PREFIX, 7, 8]],
    "nothing in common": [[3, 4], [5, 6, 7], [8]],
    "one row": [[*PREFIX, 3]],
}


def one_forward_each(model, prompts, answers):
    """The slow, simple way: one plain row per prompt and answer."""
    scores = torch.zeros(len(prompts), len(answers))
    for row, prompt in enumerate(prompts):
        for column, answer in enumerate(answers):
            with torch.no_grad():
                log_probs = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            scores[row, column] = sum(log_probs[len(prompt) - 1 + place, id_] for place, id_ in enumerate(answer))
    return scores


@pytest.mark.parametrize("key_value_heads", [4, 2])
@pytest.mark.parametrize("answers", ANSWERS)
@pytest.mark.parametrize("prompts", PROMPTS)
def test_label_log_probs_equal_one_forward_each(prompts, answers, key_value_heads):
    model, prompts, answers = tiny(key_value_heads).eval(), PROMPTS[prompts], ANSWERS[answers]
    expected = one_forward_each(model, prompts, answers)
    for batch_size in (1, 2, 100):
        scores = label_log_probs(model, prompts, answers, batch_size=batch_size)
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    backwards = label_log_probs(model, prompts[::-1], answers[::-1], batch_size=2)
    torch.testing.assert_close(backwards, expected.flip(0, 1), atol=1e-4, rtol=0)


def test_label_scores_of_smollm2_in_nf4_beyond_ascii(smollm2_tokenizer):
    labels = ("not sure", "not relevant", "not", "für", "naïve", "枪")
    sentences = ["a gem", "dull , flat and far too long", "Ein Satz über Waffen – naïve", "禁止枪支", "a gem"]
    prompts = [prompt_ids(smollm2_tokenizer, TASK, sentence) for sentence in sentences]
    answers = [answer_ids(smollm2_tokenizer, label) for label in labels]
    assert answers[0][0] == answers[1][0] == answers[2][0]
    model = with_adapter(modeling.load_base_model("smollm2"), std=0.01).eval()
    expected = one_forward_each(model, prompts, answers)
    for batch_size in (2, 5):
        scores = label_log_probs(model, prompts, answers, batch_size=batch_size)
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_a_whole_run_gives_the_same_history(tiny_base, comments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--base_model_name", tiny_base, "--task", "sst2", "--dataset_name", comments, "--lora_dropout", "0"]
    options += ["--epoch", "4", "--train_batch_size", "4", "--learning_rate", "1e-2"]
    histories = []
    for name, more in (("shared", []), ("padded", ["--no_shared_prefix"]), ("small", ["--eval_batch_size", "1"])):
        assert train.main([*map(str, options), "--adapters_name", name, *more]) == 0
        histories.append(pd.read_csv(f"models/{name}/history.csv"))
    shared, padded, small = histories
    pd.testing.assert_frame_equal(shared, padded, rtol=1e-3)
    pd.testing.assert_frame_equal(shared, small, rtol=1e-5)
