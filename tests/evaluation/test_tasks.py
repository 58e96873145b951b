"""Task scores: equal to lm-eval's own and to sums by hand, from files of either form; and what cannot be scored."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spp.cli.entry_point import main
from spp.errors import SppError, UsageError
from spp.evaluation import task_loading
from spp.evaluation.evaluate import evaluate
from spp.evaluation.options import EvalOptions
from spp.evaluation.task_files import read_task_files
from spp.pipeline.bundled import bundled_model

lm_eval = pytest.importorskip("lm_eval", reason='needs lm-eval: pip install "spp-llm[eval]"')
index = pytest.importorskip("lm_eval.tasks")

QUESTIONS = [
    {"question": "What makes a function without a name", "choices": ["def", "lambda x", "for", "in"], "label": 1},
    {"question": "What does len return for an empty list", "choices": ["one", "0", "nothing at all"], "label": 1},
    {"question": "Which of them is a list", "choices": ["[1, 2]", "{1: 2}"], "label": 0},
    {"question": "What ends a block", "choices": ["a dedent", "a brace", "end", "fi"], "label": 0},
    {"question": "Which exception says that a key is missing", "choices": ["ValueError", "KeyError"], "label": 1},
    {"question": "Is None false", "choices": ["no", "yes"], "label": 1},
]
# The same two items in our form and as the hub has them.
TWINS = {
    "boolq": (
        {"passage": "A set has no order.", "question": "is a set ordered", "choices": ["no", "yes"], "label": 0},
        {"passage": "A set has no order.", "question": "is a set ordered", "label": 0, "idx": 7},
    ),
    "rte": (
        {"premise": "It rains.", "hypothesis": "It is wet.", "choices": ["True", "False"], "label": 0},
        {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0, "idx": 7},
    ),
    "hellaswag": (
        {"question": "Baking: She opens the oven. She", "choices": ["sings.", "bakes a cake."], "label": 1},
        {
            "activity_label": "Baking", "ctx_a": "She opens the oven.", "ctx_b": "she",
            "endings": ["sings.", "bakes a cake."], "label": "1", "ind": 7,
        },
    ),
    "winogrande": (
        {"question": "Ann thanked Eve because _ had helped her.", "choices": ["Ann", "Eve"], "label": 1},
        {"sentence": "Ann thanked Eve because _ had helped her.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    ),
    "arc_easy": (
        {"question": "What melts?", "choices": ["ice", "fire", "air"], "label": 0},
        {
            "question": "What melts?", "choices": {"text": ["ice", "fire", "air"], "label": ["A", "B", "C"]},
            "answerKey": "A",
        },
    ),
    "openbookqa": (
        {"question": "Ice melts", "choices": ["when cold", "when warm"], "label": 1},
        {
            "question_stem": "Ice melts", "choices": {"text": ["when cold", "when warm"], "label": ["A", "B"]},
            "answerKey": "B",
        },
    ),
}  # fmt: skip
FOLDERS = ("super_glue/boolq", "glue/rte", "hellaswag", "winogrande", "arc", "openbookqa")


@pytest.fixture(scope="module")
def manager():
    """lm-eval's index of a few tasks; that of all of them takes half a minute."""
    root = Path(lm_eval.__file__).parent / "tasks"
    return index.TaskManager(include_defaults=False, include_path=[root / name for name in FOLDERS])


@pytest.fixture(autouse=True)
def _quick(monkeypatch, manager):
    monkeypatch.setattr(task_loading, "_manager", lambda: manager)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")  # lm-eval asks, and pip takes long


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def quiz(tmp_path) -> Path:
    return write(tmp_path / "quiz.jsonl", QUESTIONS)


def load(tasks):
    return task_loading.load_tasks(EvalOptions.build({"model": "none", "tasks": str(tasks)})).loaded


def score(model, tasks, **changes):
    return evaluate(EvalOptions.build({"model": str(model), "tasks": str(tasks), **changes}))


def by_itself(folder, config, **changes):
    """lm-eval's own scores: it loads the model, and a task that is written down here."""
    return lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        device="cpu",
        batch_size=8,
        tasks=[config],
        log_samples=False,
        task_manager=index.TaskManager(include_defaults=False),
        **changes,
    )


def written_down(path: Path, **changes) -> dict:
    return {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        **changes,
    }


def assert_equal(report, results) -> None:
    assert report.tasks and set(report.tasks) == set(results["results"])
    for name, found in results["results"].items():
        for metric, ours in report.tasks[name].metrics.items():
            assert ours.value == found[f"{metric},none"]
            assert ours.stderr == found[f"{metric}_stderr,none"]
        assert report.tasks[name].items == found["sample_len"]


@pytest.mark.parametrize("examples", [0, 2])
def test_scores_are_lm_evals_own(quiz, tmp_path, monkeypatch, examples):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    report = score(bundled_model(), quiz, num_fewshot=examples)
    assert_equal(report, by_itself(bundled_model(), written_down(quiz), num_fewshot=examples))
    assert report.tasks["quiz"].num_fewshot == examples
    assert report.versions["lm_eval"] == lm_eval.__version__
    assert (report.dtype, report.device, report.mean) == ("float32", "cpu", None)


@torch.no_grad()
def test_scores_are_those_of_log_likelihoods_by_hand(quiz):
    folder = bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    def log_likelihood(prompt: str, answer: str) -> float:
        ids, start = tokenizer(prompt + " " + answer).input_ids, len(tokenizer(prompt).input_ids)
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return float(sum(log_p[place - 1, ids[place]] for place in range(start, len(ids))))

    right = {"acc": 0, "acc_norm": 0}
    for row in QUESTIONS:
        prompt = f"Question: {row['question']}\nAnswer:"
        found = [log_likelihood(prompt, answer) for answer in row["choices"]]
        by_length = [value / len(answer) for value, answer in zip(found, row["choices"], strict=True)]
        right["acc"] += found.index(max(found)) == row["label"]
        right["acc_norm"] += by_length.index(max(by_length)) == row["label"]
    assert right["acc"] != right["acc_norm"]  # so that one for the other would show
    metrics = score(folder, quiz).tasks["quiz"].metrics
    for name, count in right.items():
        share = count / len(QUESTIONS)
        assert metrics[name].value == pytest.approx(share)
        assert metrics[name].stderr == pytest.approx(math.sqrt(share * (1 - share) / (len(QUESTIONS) - 1)))


@pytest.mark.parametrize("name", TWINS)
def test_both_forms_of_a_file_ask_what_lm_eval_asks(tmp_path, name):
    """Every prompt and every answer, of our form and of the hub's, which lm-eval's own definition reads."""
    requests = []
    for form, row in zip(("ours", "hub"), TWINS[name], strict=True):
        path = write(tmp_path / form / f"{name}.jsonl", [row, row])
        [task] = load(path)
        task.set_config("num_fewshot", 0)
        task.build_all_requests()
        requests.append([instance.args for instance in task.instances])
        answers = len(task.doc_to_choice(task.eval_docs[0]))
        for likeliest in range(answers):  # the right answer is the same
            found = [(-1.0, False)] * answers
            found[likeliest] = (-0.5, False)
            requests[-1].append(task.process_results(task.eval_docs[0], found)["acc"])
    assert requests[0] == requests[1]
    assert requests[0].count(1.0) == 1


def test_tasks_of_the_paper_without_a_file_are_left_out_and_named(tmp_path, tiny_checkpoint, capsys):
    for name in ("boolq", "rte", "winogrande"):
        row = TWINS[name][0]
        write(tmp_path / "files" / f"{name}.jsonl", [row, {**row, "label": 1 - row["label"]}, row])
    words = ["eval", str(tiny_checkpoint), "--tasks", "paper", "--task-folder", str(tmp_path / "files")]
    assert main([*words, "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    missing = ["hellaswag", "arc_easy", "arc_challenge", "openbookqa"]
    assert "4 of the paper's 7 tasks have no file" in captured.err and ", ".join(missing) in captured.err
    assert list(report["tasks"]) == ["boolq", "rte", "winogrande"]
    assert report["mean"]["missing"] == missing and report["mean"]["tasks"] == list(report["tasks"])
    found = [task["metrics"]["acc"] for task in report["tasks"].values()]
    assert report["mean"]["value"] == pytest.approx(sum(metric["value"] for metric in found) / 3)
    assert report["mean"]["stderr"] == pytest.approx(math.sqrt(sum(metric["stderr"] ** 2 for metric in found)) / 3)
    assert main(words) == 0
    assert "this is not the mean of the paper's seven tasks" in capsys.readouterr().out


def test_folders_and_files_are_tasks(tmp_path, quiz, tiny_checkpoint):
    write(tmp_path / "files" / "one.jsonl", QUESTIONS)
    write(tmp_path / "files" / "two.jsonl", QUESTIONS)
    report = score(tiny_checkpoint, f"{tmp_path / 'files'},{quiz}", limit=3)
    assert {name: found.items for name, found in report.tasks.items()} == {"one": 3, "two": 3, "quiz": 3}
    assert report.tasks["one"].sha256 == report.tasks["quiz"].sha256 and report.limit == 3


def test_a_prompt_longer_than_the_context_is_counted(quiz, tiny_checkpoint, caplog):
    caplog.set_level("WARNING", "spp")
    assert score(tiny_checkpoint, quiz).shortened > 0  # a token per character, and a context of 64
    assert "lost their beginning" in caplog.text
    assert score(bundled_model(), quiz).shortened == 0


def test_a_model_without_bos_and_eos_is_scored(tmp_path, tiny_model, tiny_tokenizer, quiz):
    tiny_model("opt").save_pretrained(tmp_path / "opt")
    plain = AutoTokenizer.from_pretrained(_saved(tiny_tokenizer, tmp_path / "tokenizer"))
    plain.backend_tokenizer.post_processor = None
    plain.bos_token = plain.eos_token = plain.pad_token = None
    plain.save_pretrained(tmp_path / "opt")
    assert score(tmp_path / "opt", quiz).tasks["quiz"].items == len(QUESTIONS)


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_merged_packed_and_adapter_score_alike(tmp_path, tiny_checkpoint, stories, quiz, capsys):
    """One fine-tuned model in three forms."""
    pruned, adapter, merged, packed = (tmp_path / name for name in ("pruned", "adapter", "merged", "packed"))
    for words in (
        ["prune", tiny_checkpoint, pruned, "--criterion", "magnitude"],
        ["train", pruned, adapter, "--data", stories, "--max-steps", "4", "--window", "64"],
        ["merge", pruned, adapter, merged],
        ["pack", merged, packed],
    ):
        assert main([str(word) for word in words]) == 0
    capsys.readouterr()
    plot = tmp_path / "plot.svg"
    words = ["eval", pruned, merged, packed, adapter, "--tasks", quiz, "--compare", "--plot", plot, "--json"]
    assert main([str(word) for word in words]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    found = [models[str(path)]["tasks"]["quiz"]["metrics"] for path in (merged, packed, adapter)]
    assert found[0] == found[1] == found[2]
    assert models[str(adapter)]["model"] == str(pruned) and models[str(adapter)]["adapter"] == str(adapter)
    assert plot.is_file()


MALFORMED = [
    ("", "the file is empty"),
    ("\n\n", "the file is empty"),
    ("[1]\n", "line 1: expected an object"),
    ('{"question": "a", "choices": ["b", "c"]}\n', "line 1: expected question.*with choices and label.*found question"),
    ('{"question": "a", "choices": ["b", "c"], "label": 2}\n', "label to be the index.*0 to 1; found 2"),
    ('{"question": "a", "choices": ["b", "c"], "label": -1}\n', "0 to 1; found -1"),
    ('{"question": "a", "choices": ["b", "c"], "label": "1"}\n', "0 to 1; found '1'"),
    ('{"question": "a", "choices": ["b", "c"], "label": true}\n', "0 to 1; found True"),
    ('{"question": "a", "choices": ["b"], "label": 0}\n', "two strings or more"),
    ('{"question": "a", "choices": ["b", ""], "label": 0}\n', "none empty"),
    ('{"question": 3, "choices": ["b", "c"], "label": 0}\n', "question to be a string.*found 3"),
    (
        '{"question": "a", "choices": ["b", "c"], "label": 0}\n\n{"question": \n'
        '{"premise": "a", "hypothesis": "b", "choices": ["b", "c"], "label": 0}\n',
        r"2 problems:\n.*line 3: expected one JSON.*\n.*line 4: it has premise.*and the lines before have question",
    ),
]


@pytest.mark.parametrize(("text", "message"), MALFORMED)
def test_malformed_files_are_refused_with_the_reason(tmp_path, text, message):
    (tmp_path / "quiz.jsonl").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_task_files({"quiz": tmp_path / "quiz.jsonl"})
    assert "quiz.jsonl" in str(caught.value)


def test_problems_of_several_files_come_together(tmp_path, tiny_checkpoint, capsys):
    (tmp_path / "a.jsonl").write_text("x\n")
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / "c.jsonl").write_bytes(b'{"question": "\xff"}\n')
    names = ",".join(str(tmp_path / f"{name}.jsonl") for name in "abcd")
    assert main(["eval", str(tiny_checkpoint), "--tasks", names]) == 2
    message = capsys.readouterr().err
    for part in ("4 problems", "a.jsonl, line 1", "b.jsonl: the file is empty", "c.jsonl, line 1", "d.jsonl: no such"):
        assert part in message


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("arc_easy", {"answerKey": "Z"}, "line 2: lm-eval cannot read it as arc_easy"),
        ("boolq", {"label": 5}, "line 2: the right answer is 5, and there are 2"),
        ("winogrande", {"answer": "3"}, "line 2: lm-eval cannot read it as winogrande"),
        ("hellaswag", {"label": ""}, "lm-eval cannot read it as hellaswag"),
        ("rte", {"label": None}, "line 2: the right answer is None"),
    ],
)
def test_malformed_files_in_the_hubs_form_are_refused(tmp_path, name, changes, message):
    row = TWINS[name][1]
    with pytest.raises(UsageError, match=message):
        load(write(tmp_path / f"{name}.jsonl", [row, {**row, **changes}]))
    less = {key: value for key, value in row.items() if key not in changes}
    with pytest.raises(UsageError, match=f"line 2: expected the columns .*; {next(iter(changes))} is missing"):
        load(write(tmp_path / f"{name}.jsonl", [row, less]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "boolk,rtee"], "(?s)2 problems.*'boolk' is unknown to lm-eval .*is it boolq.*'rtee'"),
        (["--tasks", ","], "tasks is empty; name some"),
        (["--tasks", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--tasks", "EMPTY"], "no .jsonl file is in that folder"),
        (["--tasks", "paper", "--task-folder", "nowhere"], "task-folder nowhere: no such folder"),
        (["--tasks", "paper", "--task-folder", "EMPTY"], "task 'paper': .* has no file for it; it has no .jsonl file"),
        (["--tasks", "rte", "--task-folder", "FILES"], "task 'rte': .* has no file for it; it has quiz.jsonl"),
        (["--tasks", "FILES,FILES/more/quiz.jsonl"], "task 'quiz' is in two files"),
        (["--tasks", "rte,FILES/more/rte.jsonl"], "task 'rte' is named, and .*rte.jsonl is one too"),
        (["--tasks", "FILES", "--num-fewshot", "6"], "quiz.jsonl has 6 items, too few for 6 examples"),
        (["--tasks", "FILES", "--num-fewshot", "-1"], "num_fewshot.*'-1'"),
        (["--num-fewshot", "1"], "num-fewshot: for tasks only"),
        (
            ["--tasks", "FILES", "--text", "FILES/quiz.jsonl", "--per-document"],
            "text and per-document: tasks bring their own text",
        ),
        (["--tasks", "FILES", "--window", "65"], "window 65 is longer than the model's context of 64"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(tmp_path, tiny_checkpoint, quiz, capsys, words, message):
    write(tmp_path / "files" / "quiz.jsonl", QUESTIONS)
    for name in ("quiz", "rte"):
        write(tmp_path / "files" / "more" / f"{name}.jsonl", QUESTIONS)
    (tmp_path / "empty").mkdir()
    places = {"FILES": str(tmp_path / "files"), "EMPTY": str(tmp_path / "empty")}
    for word, place in places.items():
        words = [given.replace(word, place) for given in words]
    assert main(["eval", str(tiny_checkpoint), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    assert re.search(message, captured.err), captured.err


def test_without_lm_eval_the_error_names_the_extra(tiny_checkpoint, quiz, monkeypatch, capsys):
    monkeypatch.setattr(task_loading.importlib.util, "find_spec", lambda name: None)
    assert main(["eval", str(tiny_checkpoint), "--tasks", str(quiz)]) == 2
    assert capsys.readouterr().err == 'error: tasks need lm-eval: pip install "spp-llm[eval]"\n'


def test_without_a_hub_the_error_names_ways_out(tiny_checkpoint, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'aps/super_glue' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    assert main(["eval", str(tiny_checkpoint), "--tasks", "paper"]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    for part in ("task 'boolq'", "Couldn't reach", "boolq.jsonl", "--task-folder", "HF_HUB_OFFLINE=1"):
        assert part in message


def test_a_task_of_the_hub_is_scored_as_its_file_is(tmp_path, tiny_checkpoint, monkeypatch):
    """The hub stands for whatever `datasets` loads."""
    rows = [TWINS["rte"][1], {**TWINS["rte"][1], "label": 1}]
    data = datasets.DatasetDict(train=datasets.Dataset.from_list(rows), validation=datasets.Dataset.from_list(rows))
    monkeypatch.setattr("datasets.load_dataset", lambda path, name=None, **_: data)
    from_hub = score(tiny_checkpoint, "rte").tasks["rte"]
    from_file = score(tiny_checkpoint, write(tmp_path / "rte.jsonl", rows)).tasks["rte"]
    assert from_hub.metrics == from_file.metrics and from_hub.version == from_file.version == "1.0"
    assert (from_hub.source, from_hub.sha256) == ("nyu-mll/glue:rte", None)


def test_log_likelihoods_that_are_nan_are_an_error(tiny_checkpoint, quiz):
    weights = load_file(tiny_checkpoint / "model.safetensors")
    weights["model.norm.weight"].fill_(math.nan)
    save_file(weights, tiny_checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SppError, match="log-likelihoods that are not a number"):
        score(tiny_checkpoint, quiz)


def test_an_answer_longer_than_the_context_is_an_error(tmp_path, tiny_checkpoint):
    rows = [{"question": "a", "choices": ["b", "c" * 80], "label": 0}]
    with pytest.raises(SppError, match="an answer has 81 tokens, and the model's context has 64"):
        score(tiny_checkpoint, write(tmp_path / "long.jsonl", rows))


@pytest.mark.slow
@pytest.mark.parametrize("examples", [0, 1])
@pytest.mark.parametrize("name", ["boolq", "rte", "arc_easy"])
def test_scores_on_real_tasks_are_lm_evals_own(shared_data, tmp_path, monkeypatch, name, examples):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    prompts = {
        "boolq": "{{passage}}\nQuestion: {{question}}?\nAnswer:",
        "rte": "{{premise}}\nQuestion: {{hypothesis}} True or False?\nAnswer:",
        "arc_easy": "Question: {{question}}\nAnswer:",
    }
    folder, changes = shared_data / "models" / "story", {"limit": 60, "num_fewshot": examples}
    report = score(folder, name, task_folder=shared_data / "eval", **changes)
    config = written_down(shared_data / "eval" / f"{name}.jsonl", doc_to_text=prompts[name])
    assert_equal(report, by_itself(folder, config, **changes))
