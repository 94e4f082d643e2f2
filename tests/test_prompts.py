"""Prompts written for training images: the filter, resuming, and the language model against
transformers' own generation."""

import json
from collections import Counter

import pytest
import torch
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.text import TextEncoder
from comfyui_l2p.l2p_core.train import language_model
from comfyui_l2p.l2p_core.train import prompts as writing
from comfyui_l2p.l2p_core.train.prompts import (
    Prompts,
    by_templates,
    fault_of,
    read_taxonomy,
    similar,
    tidy,
    write_prompts,
)

GOOD = (
    "A baker in a white apron lifts a tray of dark loaves out of a brick oven while flour drifts"
    " through the morning light. Behind him stand copper pans and sacks on wooden shelves, and the"
    " warm browns of the room glow softly."
)


def lines(file):
    return file.read_text(encoding="utf-8").splitlines()


def test_the_taxonomy_has_the_papers_size():
    categories = read_taxonomy()
    assert len({each.main_class for each in categories}) == 4
    assert len({(each.main_class, each.subclass) for each in categories}) == 17
    assert len({each.name for each in categories}) == len(categories) > 1000


def test_templates_make_distinct_prompts_about_every_category(tmp_path):
    names = [each.name for each in read_taxonomy()]
    file = tmp_path / "prompts.txt"
    write_prompts(file, len(names) + 100, batch=400, progress=False)
    prompts = lines(file)
    assert len(set(prompts)) == len(prompts) == len(names) + 100
    assert all(200 <= len(prompt) <= 350 for prompt in prompts)
    turn = prompts[: len(names)]
    assert all(any(f" of {name}, " in prompt for prompt in turn) for name in names[::90])

    write_prompts(tmp_path / "other.txt", 20, seed=1, progress=False)
    assert lines(tmp_path / "other.txt") != prompts[:20]


@pytest.mark.parametrize(
    "text, fault",
    [
        (GOOD, None),
        (GOOD[:150] + ".", "151 characters"),
        (GOOD + GOOD, f"{2 * len(GOOD)} characters"),
        (GOOD[:-1], "does not end"),
        (GOOD.replace("A baker", "Here is a prompt: a baker"), "Here is a"),
        (GOOD.replace("baker", "面包师"), "Latin"),
        ("a red round thing " * 14 + ".", "repeats itself"),
    ],
)
def test_what_is_no_description_is_rejected(text, fault):
    found = fault_of(text)
    assert found is None if fault is None else fault in found


def test_quotes_and_line_breaks_around_an_answer_are_removed():
    assert tidy(f' "{GOOD[:100]}\n{GOOD[100:]}"\n').replace(" ", "") == GOOD.replace(" ", "")


def test_similar_prompts_of_a_category_are_told_apart_from_new_ones():
    assert similar(GOOD, GOOD.replace("softly", "gently").replace("dark", "brown"))
    assert not similar(GOOD, "A baker waits. " + GOOD[160:])


def test_the_same_prompts_come_out_whatever_is_made_at_once(tmp_path):
    """Also beyond the end of a turn of the categories, where one would meet itself."""
    taxonomy = tmp_path / "few.txt"
    taxonomy.write_text("# a\n## b\na star; a moon\na sun\n## c\na cloud\n")
    found = []
    for count in (1, 3, 16):
        prompts = Prompts(read_taxonomy(taxonomy), 5)
        while len(prompts.texts) < 16:
            prompts.next(count, by_templates)
        found.append(prompts.texts[:16])
    assert found[0] == found[1] == found[2]
    names = [text.partition(" of ")[2].partition(",")[0] for text in found[0]]
    assert set(Counter(names).values()) == {4}


def test_what_a_model_does_not_write_is_a_template_until_there_is_none(monkeypatch):
    categories = read_taxonomy()[:1]
    prompts = Prompts(categories, 5)
    assert prompts.next(4, lambda tasks: [GOOD for _ in tasks]) == ([GOOD], 0)
    assert prompts.next(4, lambda tasks: [GOOD for _ in tasks])[1] == 1
    for name in ("MEDIA", "VIEWS", "LIGHTS", "COLOURS", "PLACES", "DETAILS"):
        monkeypatch.setattr(writing, name, getattr(writing, name)[:1])
    with pytest.raises(ValueError, match="make no further prompt about a baker: "):
        for _ in range(9):
            prompts.next(4, by_templates)


def test_a_stopped_run_resumes_and_other_settings_are_named(tmp_path, capsys):
    command = ["synthesize", "--templates", "-o", str(tmp_path)]
    assert main([*command, "--write-prompts", "40"]) == 0
    file = tmp_path / "prompts.txt"
    wanted = lines(file)
    file.write_text("".join(f"{line}\n" for line in wanted[:13]) + wanted[13][:50])
    assert main([*command, "--write-prompts", "40", "--prompt-batch", "7"]) == 0
    assert lines(file) == wanted
    capsys.readouterr()
    for more, words in (
        (["--prompt-seed", "3"], "another seed"),
        (["--prompt-batch", "0"], "--prompt-batch is 0"),
        (["--taxonomy", str(file)], "under no sub-class"),
    ):
        assert main([*command, "--write-prompts", "41", *more]) == 1
        assert words in capsys.readouterr().err
    (tmp_path / "prompts.txt.json").write_text("{")
    assert main([*command, "--write-prompts", "41"]) == 1
    assert "does not say how it was written" in capsys.readouterr().err
    assert lines(file) == wanted
    for rest, words in (([], "give PROMPTS"), (["--write-prompts", "2"], "needs a language model")):
        assert main(["synthesize", "-o", str(tmp_path / "other"), *rest]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_answers_are_those_of_transformers(monkeypatch):
    """Each alone, by `generate` of the model with its output layer; here padded and together."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    monkeypatch.setattr(language_model, "TOP_K", 1)
    monkeypatch.setattr(language_model, "MAX_NEW_TOKENS", 12)
    small = TextEncoder.load(BUNDLED_MODEL / "text_encoder", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in small.model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    settings = Qwen3Config.from_pretrained(BUNDLED_MODEL / "text_encoder")
    whole = Qwen3ForCausalLM(settings).eval()
    whole.model.load_state_dict(small.model.state_dict())
    whole.lm_head.weight = whole.model.embed_tokens.weight
    end = small.tokenizer.token_to_id("<|im_end|>")
    asked = ["a red circle", "a large blue star on a green background, left", "a"]
    answers = language_model.answer(small, asked, [0, 1, 2])
    for instruction, answer in zip(asked, answers):
        text = language_model.CHAT.format(instruction)
        ids = torch.tensor([small.tokenizer.encode(text, add_special_tokens=False).ids])
        wanted = whole.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=end)
        assert answer == small.tokenizer.decode(wanted[0, ids.shape[1] :].tolist())
    assert len(set(answers)) > 1


def test_sampling_follows_the_seed_and_the_probabilities():
    logits = torch.tensor([[0.6, 0.3, 0.07, 0.03]]).log() * language_model.TEMPERATURE
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(language_model.sample(logits, [generator]).item() for _ in range(600))
    assert set(drawn) == {0, 1}, "0.6 and 0.3 make up 0.8"
    assert drawn[0] / 600 == pytest.approx(2 / 3, abs=0.06)


@pytest.mark.slow
def test_a_model_that_writes_nonsense_leaves_templates(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(language_model, "MAX_NEW_TOKENS", 2)
    command = ["synthesize", "--write-prompts", "2", "--device", "cpu"]
    command += ["--text-encoder", str(BUNDLED_MODEL), "-o", str(tmp_path)]
    assert main(command) == 0
    assert "2 prompts are templates" in capsys.readouterr().out
    assert json.loads((tmp_path / "prompts.txt.json").read_text())["language model"]
