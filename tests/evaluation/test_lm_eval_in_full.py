"""Free answers, chat templates, system prompts and lm-eval's own JSON: equal to lm-eval's own run of the same task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from spp.errors import SppError, UsageError
from spp.evaluation.evaluate import evaluate
from spp.evaluation.lm_eval_model import ScoredModel
from spp.evaluation.options import EvalOptions
from spp.evaluation.tasks import TasksReport
from spp.models.loading import load_model
from spp.pipeline.bundled import bundled_model

lm_eval = pytest.importorskip("lm_eval", reason='needs lm-eval: pip install "spp-llm[eval]"')
index = pytest.importorskip("lm_eval.tasks")

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SUMS = [{"question": f"Ann has {n} owls and buys {n + 1}. How many?", "answer": f"{n} + {n + 1}\n#### {2 * n + 1}"}
        for n in range(6)]  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")  # lm-eval asks, and pip takes long
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """The bundled model with a chat template."""
    folder = tmp_path / "chat"
    load_model(bundled_model(), EvalOptions(model="-", device="cpu")).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def definition(tmp_path: Path, kind: str) -> Path:
    """A task like GSM8K, whose answer is found in what is generated, or like IFEval, which counts words of it."""
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    of_gsm8k = {
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {"name": "flexible", "filter": [
                {"function": "regex", "regex_pattern": r"([a-z]+)", "group_select": -1}, {"function": "take_first"},
            ]},
            {"name": "strict", "filter": [
                {"function": "regex", "regex_pattern": "#### ([0-9]+)"}, {"function": "take_first"},
            ]},
        ],
        "doc_to_target": "{{answer}}",
    }  # fmt: skip
    of_ifeval = {"metric_list": [{"metric": "bleu"}], "doc_to_target": "return self"}
    content = {
        "task": kind,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "generation_kwargs": {"until": ["Question:", "\n\n"], "max_gen_toks": 12, "do_sample": False},
        **(of_gsm8k if kind == "gsm8k_like" else of_ifeval),
    }
    path = tmp_path / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def report_of(model: Path, tasks: Path, **changes: Any) -> TasksReport:
    values = {"model": str(model), "tasks": str(tasks), "device": "cpu", "trust_remote_code": True}
    report = evaluate(EvalOptions.build(values | changes))
    assert isinstance(report, TasksReport)
    return report


def by_itself(model: Path, task: Path, **changes: Any) -> dict[str, Any]:
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        device="cpu",
        batch_size=8,
        tasks=[yaml.safe_load(task.read_text())],
        log_samples=True,
        task_manager=index.TaskManager(include_defaults=False),
        **changes,
    )
    assert results is not None
    return results


CHAT = {"apply_chat_template": True, "system_instruction": "Answer in one line."}


@pytest.mark.parametrize("kind", ["gsm8k_like", "ifeval_like"])
@pytest.mark.parametrize(
    "changes", [{}, {"num_fewshot": 2}, CHAT, {**CHAT, "num_fewshot": 2, "limit": 3}], ids=["plain", "2", "chat", "all"]
)
def test_free_answers_score_as_lm_eval_scores_them(
    kind: str, changes: dict[str, Any], chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = definition(tmp_path, kind)
    theirs = by_itself(chat_model, task, **changes)
    # lm-eval lists a sample once for each filter.
    prompts = list({sample["doc_id"]: sample["arguments"][0][0] for sample in theirs["samples"][kind]}.values())
    asked: list[str] = []
    real = ScoredModel.generate_until

    def recorded(self: Any, requests: Any, disable_tqdm: bool = False) -> list[str]:
        asked.extend(request.args[0] for request in requests)
        return real(self, requests, disable_tqdm)

    monkeypatch.setattr(ScoredModel, "generate_until", recorded)
    out = tmp_path / "results.json"
    report = report_of(chat_model, task, output_path=out, **changes)
    assert asked == prompts
    ours = json.loads(out.read_text())
    assert ours["results"] == json.loads(json.dumps(theirs["results"]))
    assert ours["n-shot"] == theirs["n-shot"] and ours["n-samples"] == theirs["n-samples"]
    assert (ours["config"]["model"], ours["config"]["limit"]) == ("hf", changes.get("limit"))
    metrics = {name: metric.value for name, metric in report.tasks[kind].metrics.items()}
    assert sorted(metrics.values()) == sorted(
        value for name, value in theirs["results"][kind].items() if "," in name and "_stderr" not in name
    )
    assert report.chat_template is bool(changes.get("apply_chat_template"))
    if report.chat_template:
        assert prompts[0].startswith("<system>Answer in one line.") and prompts[0].endswith("<assistant>")
        assert prompts[0].count("<user>") == 1 + changes.get("num_fewshot", 0)


def test_a_choice_in_a_chat_template_scores_as_lm_eval_scores_it(chat_model: Path, tmp_path: Path) -> None:
    task = definition(tmp_path, "gsm8k_like")
    content = yaml.safe_load(task.read_text()) | {
        "output_type": "multiple_choice",
        "doc_to_choice": ["an owl", "owls", "#"],
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    for name in ("filter_list", "generation_kwargs"):
        content.pop(name)
    task.write_text(yaml.safe_dump(content))
    theirs = by_itself(chat_model, task, **CHAT)["results"]["gsm8k_like"]
    metrics = report_of(chat_model, task, **CHAT).tasks["gsm8k_like"].metrics
    assert {f"{name},none": one.value for name, one in metrics.items()} == {
        name: theirs[name] for name in ("acc,none", "acc_norm,none")
    }


def test_a_definition_is_read_if_it_is_trusted_and_cannot_name_functions(tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = tmp_path / "task.yaml"
    with pytest.raises(UsageError, match="may run code; pass --trust-remote-code if you trust it"):
        report_of(tiny_checkpoint, path, trust_remote_code=False)
    path.write_text("task: t\ndoc_to_text: !function utils.text\n")
    with pytest.raises(SppError, match="without !function"):
        report_of(tiny_checkpoint, path)
    path.write_text("just words")
    with pytest.raises(UsageError, match="expected lm-eval's definition"):
        report_of(tiny_checkpoint, path)
    path.write_text("task: t\noutput_type: riddle\n")
    with pytest.raises(UsageError, match="lm-eval cannot make a task of it"):
        report_of(tiny_checkpoint, path)


def test_a_model_without_a_template_is_refused_in_one_line(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        report_of(tiny_checkpoint, definition(tmp_path, "gsm8k_like"), apply_chat_template=True)


def test_the_file_of_lm_evals_results_is_not_overwritten(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (out := tmp_path / "results.json").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        report_of(tiny_checkpoint, definition(tmp_path, "gsm8k_like"), output_path=out)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("name", ["num_fewshot", "apply_chat_template", "system_instruction", "output_path"])
def test_options_of_tasks_need_tasks(name: str) -> None:
    values = {"num_fewshot": 1, "apply_chat_template": True, "system_instruction": "x", "output_path": "x.json"}
    with pytest.raises(UsageError, match=f"{name.replace('_', '-')}: for tasks only"):
        EvalOptions.build({"model": "m", name: values[name]})


def test_the_papers_harness_has_no_bos_and_few_items_of_large_models(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 items where the name has 65b or 70b, as protocol and code of the published harness have it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    row = {"question": "What melts?", "choices": ["ice", "fire"], "label": 0}
    (folder / "arc_easy.jsonl").write_text((json.dumps(row) + "\n") * 2003)
    large = tmp_path / "Llama-2-70B-tiny"
    tiny_checkpoint.rename(large)
    small = tmp_path / "small"
    small.symlink_to(large)
    first: set[int] = set()

    def recorded(self: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        first.update(context[0] for _, context, _ in requests)
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr(ScoredModel, "_loglikelihood_tokens", recorded)
    for tasks, model, limit, bos in (
        ("paper-harness", large, 2000, False),
        ("paper-harness", small, None, False),
        ("paper", large, None, True),
    ):
        first.clear()
        report = report_of(model, Path(tasks), task_folder=folder)
        assert (report.limit, report.tasks["arc_easy"].items) == (limit, limit or 2003)
        assert first == {1} if bos else 1 not in first  # the id of <bos>
        assert report.form is not None and report.form.startswith(f"{tasks}: ")
    with pytest.raises(UsageError, match="score it by itself"):
        report_of(small, Path("paper-harness,paper"), task_folder=folder)
