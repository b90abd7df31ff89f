# SPDX-License-Identifier: Apache-2.0
"""EleutherAI's harness: its own `--model hf` reads our checkpoints, and `--model remamba` compresses prompts in it."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_tests.modeling.tiny_models import tiny_model
from remamba_hf.families import FAMILIES

pytest.importorskip("lm_eval", reason='needs EleutherAI\'s harness: pip install "remamba_hf[lm-eval]"')

import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from remamba_hf.evaluation.lm_eval_model import PromptAwareLM, main

CARDS = Path(__file__).parents[2] / "model_cards"
VOCABULARY = 300
LONG = "Of the river and its people little was said.\nThey went by the old road.\n\n"
PAIRS = [  # ragged, with a shared context, an empty one, a trailing space, and continuations of one and of many tokens
    (LONG * 3, " written"),
    (LONG * 3, " in the village, and said little of it"),
    (LONG + "They went", " by"),
    ("", "Of the garden"),
    (LONG * 2 + "They ", "kept the house"),
    ("Of", " the old road"),
    ("\n", "Of the river"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, prepared, tmp_path_factory):
    """A checkpoint that compresses prompts, with its tokenizer."""
    tokenizer, _ = prepared
    folder = tmp_path_factory.mktemp(request.param)
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tiny_model(torch.float32, family=request.param, vocab_size=VOCABULARY, **tokens).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def choices(*texts):
    return {"text": texts, "label": [*"ABCD"[: len(texts)]]}


# lm-eval's own files of the short-context tasks that papers on Mamba report, and what a sample of each looks like.
SHORT_TASKS = {
    "lambada_openai": (
        "lambada/lambada_openai.yaml",
        "test",
        [
            {"text": "They went by the old road of the river, and little was known of the people"},
            {"text": LONG + "They went by"},
        ],
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        "validation",
        [
            {
                "activity_label": "Walking",
                "ctx_a": "They went by the old road. [step] The river was near.",
                "ctx_b": "the people",
                "endings": ["said little.", "kept the road.", "told of the garden and of the house.", "went [title] on."],
                "label": "2",
            }
        ],
    ),
    "piqa": (
        "piqa/piqa.yaml",
        "validation",
        [{"goal": "Go to the village.", "sol1": "Take the old road.", "sol2": "Take the river of the house.", "label": 0}],
    ),
    "arc_easy": (
        "arc/arc_easy.yaml",
        "test",
        [{"question": "What went by the road?", "choices": choices("people", "a river", "it"), "answerKey": "A"}],
    ),
    "arc_challenge": (
        "arc/arc_challenge.yaml",
        "test",
        [{"question": "Of which was little known?", "choices": choices("the garden", "the old house"), "answerKey": "B"}],
    ),
    "winogrande": (
        "winogrande/default.yaml",
        "validation",
        [
            {
                "sentence": "The people said little of the river, as _ was old and known.",
                "option1": "the people",
                "option2": "the river",
                "answer": "2",
            }
        ],
    ),
    "openbookqa": (
        "openbookqa/openbookqa.yaml",
        "test",
        [{"question_stem": "A garden is kept by", "choices": choices("roads", "its people", "rivers"), "answerKey": "B"}],
    ),
}
# Beyond them an answer that is generated and whole texts, as lm-eval's guide to new tasks describes both.
OWN_TASKS = {
    "made_up_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}What was it?",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match"}],
    },
    "made_up_texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}
OWN_SAMPLES = [{"text": LONG * times, "answer": "the road"} for times in (1, 3)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder for `--include_path`: lm-eval's own tasks over small local files, and two of ours."""
    folder = tmp_path_factory.mktemp("tasks")

    def write(name, settings, split, samples):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        splits = {
            name: str(data) for name in ("train", split)
        }  # lm-eval looks into the training part of tasks that have one
        files = {"data_files": splits, "cache_dir": str(folder / "cache")}
        local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **settings, **local}))  # which is YAML, too

    for name, (path, split, samples) in SHORT_TASKS.items():
        write(name, {"include": str(Path(lm_eval.tasks.__file__).parent / path)}, split, samples)
    for name, settings in OWN_TASKS.items():
        write(name, {**settings, "test_split": "test"}, "test", OWN_SAMPLES)
    return folder


def harness(kind, folder, **options):
    return kind(str(folder), **{"device": "cpu", "dtype": "float64", "batch_size": 4, **options})


def ours(folder, **options):
    return harness(PromptAwareLM, folder, **options)


def ask(lm, method, arguments):
    requests = [Instance(method, {}, given, place) for place, given in enumerate(arguments)]
    return getattr(lm, method)(requests, disable_tqdm=True)


def totals(lm, pairs=PAIRS):
    return [total for total, _ in ask(lm, "loglikelihood", pairs)]


def same(expected):
    return pytest.approx([total for total, _ in expected], rel=1e-9)


def generated(lm, prompts=(LONG * 3, "Of the", LONG), **options):
    arguments = {"until": ["\n\n"], "max_gen_toks": 6, **options}
    return ask(lm, "generate_until", [(prompt, arguments) for prompt in prompts])


@torch.no_grad()
def direct(folder, pairs=PAIRS, max_length=None, **settings):
    """The same by `forward` alone, one by one: sums of log-probabilities, and whether greedy decoding goes that way."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    results = []
    for context, continuation in pairs:
        kept = context.rstrip()
        whole = tokenizer(context + continuation).input_ids
        count = len(whole) - len(tokenizer(kept).input_ids)
        if not kept:
            whole = [tokenizer.bos_token_id, *whole]
        ids = torch.tensor([whole[-(max_length + 1) :] if max_length else whole])
        lengths = {"prompt_lengths": torch.tensor([ids.shape[1] - count])} if model.config.model_type in FAMILIES else {}
        logits = model(ids[:, :-1], **lengths, **settings).logits[0, -count:]
        expected = logits.log_softmax(-1).gather(1, ids[0, -count:, None]).sum()
        results.append((expected.item(), bool((logits.argmax(-1) == ids[0, -count:]).all())))
    return results


@pytest.mark.parametrize("card", ["remamba-tiny", "remamba2-tiny", "memmamba-tiny"])
def test_the_harness_itself_takes_our_checkpoints_for_as_long_as_they_read(card):
    lm = harness(HFLM, CARDS / card, trust_remote_code=True, dtype="float32")
    assert lm.max_length == 1_048_576
    told = "The secret number of Harold Marsh is 48213. " + LONG * 110
    assert len(lm.tok_encode(told)) > 2048  # where the harness cuts texts for models that name no length
    question = "Question: What is the secret number of Harold Marsh?\nAnswer:"
    right, wrong = ask(lm, "loglikelihood", [(told + question, " 48213"), (told + question, " 71956")])
    assert right[1]
    assert right[0] > wrong[0]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("settings", [{}, {"compression_start": 0.2, "compression_span": 0.7, "compression_ratio": 0.1}])
def test_what_follows_a_compressed_prompt(folder, size, settings):
    lm = ours(folder, batch_size=size, **settings)
    answers, expected = ask(lm, "loglikelihood", PAIRS), direct(folder, **settings)
    assert [total for total, _ in answers] == same(expected)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]
    plain = direct(folder, compress_prompt=False)
    assert all(abs(one[0] - other[0]) > 1e-6 for one, other in zip(answers[:3], plain, strict=False))


def test_greedy_continuations_are_told(folder):
    lm = ours(folder)
    prompt = LONG * 2 + "They"
    ids = lm.tokenizer(prompt, return_tensors="pt")
    first, second = lm.model.generate(**ids, max_new_tokens=2, do_sample=False)[0, -2:].tolist()
    other = (second + 1) % VOCABULARY
    requests = [((prompt, ""), ids.input_ids[0].tolist(), told) for told in ([first, second], [first, other], [first])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(requests, disable_tqdm=True)] == [True, False, True]


def test_one_text_with_two_prompts_is_read_twice_and_letters_once(folder, monkeypatch):
    split = [(LONG * 2 + "They went", " by the"), (LONG * 2 + "They", " went by the")]
    letters = [(LONG, f" {letter}") for letter in "abc"]
    lm = ours(folder, batch_size=8)
    sizes = []
    read = lm._read_behind_prompts
    monkeypatch.setattr(lm, "_read_behind_prompts", lambda rows: sizes.append(len(rows)) or read(rows))
    assert totals(lm, split + letters) == same(direct(folder, split + letters))
    assert sizes == [3]


def test_contexts_that_are_too_long_lose_their_beginning(folder):
    assert totals(ours(folder, max_length=50), PAIRS[:3]) == same(direct(folder, PAIRS[:3], max_length=50))


def test_without_compression_all_is_as_in_the_harness(folder):
    theirs, plain = harness(HFLM, folder), ours(folder, compress=False)
    assert ask(plain, "loglikelihood", PAIRS[:-1]) == ask(theirs, "loglikelihood", PAIRS[:-1])
    assert totals(plain, PAIRS[:-1]) == same(direct(folder, PAIRS[:-1], compress_prompt=False))
    assert generated(plain) == generated(theirs, compress_prompt=False)
    assert generated(ours(folder)) == generated(theirs)


def test_whole_texts_are_read_in_one_pass(folder):
    texts = [(LONG * 3,), (LONG,)]
    assert ask(ours(folder), "loglikelihood_rolling", texts) == ask(harness(HFLM, folder), "loglikelihood_rolling", texts)


def test_answers_follow_the_settings(folder):
    lm = ours(folder, compression_span=0.9, compression_ratio=0.02)
    seen = []
    generate = lm.model.generate
    lm.model.generate = lambda **arguments: seen.append(arguments) or generate(**arguments)
    generated(lm, compression_ratio=0.5)
    names = ("compress_prompt", "compression_span", "compression_ratio")
    assert [seen[0][name] for name in names] == [True, 0.9, 0.5]  # what a task asks for goes first
    assert lm.get_model_info()["compression"] == {
        "compression_start": lm.config.compression_start,
        "compression_span": 0.9,
        "compression_ratio": 0.02,
        "compression_max_kept": None,
        "compression_min_prompt": 0,
        "selection": "score",
    }
    assert ours(folder, compress=False).get_model_info()["compression"] is None


def test_automatic_batches_are_tried_at_the_length_of_the_texts(folder, monkeypatch):
    lm = ours(folder, batch_size="auto", max_batch_size=2)
    tried = []
    call = lm._model_call
    monkeypatch.setattr(lm, "_model_call", lambda ids: tried.append(ids.shape) or call(ids))
    assert generated(lm) == generated(ours(folder))
    assert set(tried) == {(2, len(lm.tok_encode(LONG * 3)))}
    assert totals(lm) == same(direct(folder))
    tried.clear()
    totals(lm, PAIRS[2:3])
    totals(lm, PAIRS[:1])
    assert len(set(tried)) == 2  # what fits of short texts may not fit of long ones


def test_memmamba_is_read_as_by_the_harness(memmamba_folder):
    theirs, lm = harness(HFLM, memmamba_folder), ours(memmamba_folder)
    assert ask(lm, "loglikelihood", PAIRS[:-1]) == ask(theirs, "loglikelihood", PAIRS[:-1])
    expected = same(direct(memmamba_folder, PAIRS[:-1]))
    assert totals(lm, PAIRS[:-1]) == expected
    assert totals(ours(memmamba_folder, batch_size=1), PAIRS[:-1]) == expected
    assert generated(lm) == generated(theirs)
    assert lm.get_model_info()["compression"] is None
    with pytest.raises(ValueError, match="'memmamba' model compresses no prompts: leave out compress, compression_span"):
        ours(memmamba_folder, compress=True, compression_span=0.5)


def test_other_settings_of_a_configuration_can_be_given(folder):
    lm = ours(folder, compression_min_prompt=1000)
    assert totals(lm) == same(direct(folder, compress_prompt=False))
    assert lm.get_model_info()["compression"]["compression_min_prompt"] == 1000
    bounded = ours(folder, compression_max_kept=2)
    assert totals(bounded)[:3] != totals(ours(folder))[:3]
    assert bounded.get_model_info()["compression"]["compression_max_kept"] == 2
    given = ours(folder, compression_max_kept=2, compression_ratio=0.3)
    assert totals(given) == same(direct(folder, compression_ratio=0.3))
    assert given.get_model_info()["compression"]["compression_max_kept"] is None


def test_a_loaded_model_is_taken(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert totals(PromptAwareLM(model, tokenizer=tokenizer, batch_size=4)) == same(direct(folder))
    with pytest.raises(ValueError, match="A model that is loaded already takes no selection"):
        PromptAwareLM(model, tokenizer=tokenizer, selection="stride")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"compression_rate": 0.1},
            "unexpected keyword argument 'compression_rate': neither lm-eval nor the model knows it",
        ),
        ({"selection": "best"}, "selection must be one of"),
        ({"compress": "maybe"}, "compress is 'maybe': give True or False"),
        ({"compress": 0, "compression_ratio": 0.1}, "nothing to set: leave out compression_ratio"),
        ({"compression_span": 1.5}, "compression_span must be in"),
        ({"compression_ratio": "much"}, "compression_ratio must be a finite number"),
    ],
)
def test_settings_that_mean_nothing_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ours(folder, **options)


def test_continuations_that_cannot_be_scored_are_refused(folder):
    with pytest.raises(ValueError, match="A continuation has 0 tokens"):
        totals(ours(folder), [("Of", "")])
    with pytest.raises(ValueError, match="max_length=4 can be scored"):
        totals(ours(folder, max_length=4), [("Of", LONG)])


def run_command(folder, tasks, model, tmp_path, *more):
    """lm-eval's results, and (context, continuation), answer of each of its samples by task."""
    names = [*SHORT_TASKS, *OWN_TASKS]
    asked = ["--model", model, "--model_args", f"pretrained={folder},dtype=float64", "--tasks", ",".join(names)]
    written = ["--log_samples", "--output_path", str(tmp_path)]
    main([*asked, "--include_path", str(tasks), "--device", "cpu", "--batch_size", "2", *written, *more], "lm_eval")
    samples = {}
    for name in names:
        lines = next(tmp_path.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        samples[name] = [
            (tuple(arguments.values()), answer[0])
            for sample in map(json.loads, lines)
            for arguments, answer in zip(sample["arguments"].values(), sample["resps"], strict=True)
        ]
    return json.loads(next(tmp_path.rglob("results_*.json")).read_text()), samples


@pytest.mark.parametrize("model", ["remamba", "hf"])
def test_its_command_runs_short_tasks(folder, tasks, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # which is for good
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # 14,000 files
    results, samples = run_command(folder, tasks, model, tmp_path)
    assert "|winogrande" in capsys.readouterr().out
    assert all("acc,none" in results["results"][name] for name in SHORT_TASKS)
    assert ("compression" in results["config"]) == (model == "remamba")
    settings = {"compress_prompt": None if model == "remamba" else False}
    for name in SHORT_TASKS:
        pairs = [pair for pair, _ in samples[name]]
        assert len(pairs) >= 2
        assert [float(answer[0]) for _, answer in samples[name]] == same(direct(folder, pairs, **settings)), name
    texts = [("", text) for (text,), _ in samples["made_up_texts"]]
    whole = same(direct(folder, texts, compress_prompt=False))
    assert [float(answer) for _, answer in samples["made_up_texts"]] == whole
    lm = ours(folder)
    expected = generated(lm, [arguments[0] for arguments, _ in samples["made_up_answer"]], max_gen_toks=5)
    assert [answer for _, answer in samples["made_up_answer"]] == expected


def test_its_command_names_what_to_give_instead_of_a_folder(folder):
    with pytest.raises(ValueError, match="give --model remamba --model_args pretrained="):
        main(["--model", str(folder), "--tasks", "piqa"])


def test_the_harness_command_runs_a_card_with_its_own_code(tasks, tmp_path):
    """As its documentation says, from a folder that knows nothing of this package."""
    asked = ["--model", "hf", "--model_args", f"pretrained={CARDS / 'remamba-tiny'},trust_remote_code=True"]
    rest = ["--tasks", "piqa,made_up_answer", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "4"]
    command = [sys.executable, "-m", "lm_eval", "run", *asked, *rest, "--output_path", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())
    assert set(results["results"]) == {"piqa", "made_up_answer"}
    assert results["max_length"] == 1_048_576
