"""A pytest plugin that runs PEFT's test-suite on the cases of SPP alone, and says what does not apply and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path
from textwrap import fill, indent
from typing import Any

import pytest
import torch
from cases import FROM_LORA, OF_ALL_METHODS, OWN, mentions, spp_cases, translate, unsupported
from datasets import Dataset, DatasetDict
from huggingface_hub import try_to_load_from_cache
from peft import HiraConfig, LoraConfig

RUN = {
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_low_level_api.py",
    "test_other.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
    "test_torch_compile.py",
    "test_trainable_tokens.py",
}

# Why -> files without a case for SPP.
FILES_NOT_RUN = {
    "the features of another method": (
        "adamss_asa adaption_prompt arrow bdlora boft cartridge cpt deft frod lora_ga lora_intruders lora_megatron "
        "lora_variants lorafa loraplus multitask_prompt_tuning osf poly pvera randlora riemannian_lora shadow shira "
        "supertuning unilora vblora velora vera xlora"
    ),
    "conversion to LoRA: SPP's Delta has full rank": "lora_conversion",
    "a fixed list of methods that PEFT mixes in one model": "mixed",
    "parameters that are not modules (3-D experts), with LoRA's config written out": "target_parameters",
    "GPTQ's weights, which SPP refuses": "gptqmodel",
    "PEFT's own back-ends for quantized weights, which it looks for in every layer and merges into; SPP dequantizes "
    "bitsandbytes' weights itself, merges into the model as it was before, and has tests/models/test_quantized.py": (
        "quantization"
    ),
    "a GPU, with fixed methods, and mostly quantized weights": "common_gpu gpu_examples",
    "files that only the hub has": "auto hub_features",
    "diffusers, pipelines from the hub, and convolutions": "stablediffusion",
    "convolutions of ResNet, images from the hub": "vision_models",
    "features of one method at a time, mostly LoRA's (initialization, swapping)": "initialization",
    "PEFT's own helpers, with fixed methods, mostly LoRA, or without any": (
        "bufferdict helpers incremental_pca integrations mapping tuners_utils"
    ),
}

_ONE_BATCH = "several adapters in one batch, by LoRA only; SPP refuses adapter_names"
# Tests that are parametrized by methods, without a case for SPP (patterns) -> why.
TESTS_NOT_RUN = {
    "test_default_target_modules_*": "SPP without target_modules adapts all linear layers, so that there is no table",
    "test_mixed_adapter_batches_*": _ONE_BATCH,
    "test_multiple_adapters_mixed_forward": _ONE_BATCH,
    "test_add_weighted_adapter_*": "makes LoRA's configuration whatever its parameter says",
    "test_save_pretrained_targeting_lora_to_embedding_layer*": "adapters on embeddings",
    "test_prompt_learning_*": "prompt learning",
    "test_inject_adapter_in_model_rejects_shared_state_tuners": "methods that share state between layers; SPP does not",
}

# Cases of SPP that cannot run here -> why.
CASES_NOT_RUN = {
    "test_from_pretrained_cache_dir": "downloads from the hub into an empty cache",
    "test_from_peft_type": "makes a configuration of each method, of which AdaMSS needs scikit-learn",
}

_FIXED = "fixed to one method or to none, and so nothing to add SPP to"
_LINEAR = "SPP is for linear layers (nn.Linear, Conv1D): no embeddings, no convolutions"


class Suite:
    """The hooks, and what they count."""

    def __init__(self) -> None:
        self.methods: set[str] = set()  # ids of tests with methods in their parameters
        self.spp: set[str] = set()  # and with SPP
        self.not_run: dict[str, Counter[str]] = {}  # why -> test or case -> how many
        self.unexplained: set[str] = set()
        self.outcomes: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Leave out the files that are not run, unread."""
        name = collection_path.name
        return True if name.startswith("test_") and name not in RUN else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Replace cases of methods by those of SPP."""
        parametrize: Callable[..., None] = metafunc.parametrize
        test = metafunc.definition.nodeid

        def with_spp(names: Any, values: Any, *arguments: Any, **options: Any) -> None:
            values = list(values)
            if any(map(mentions, values)):
                self.methods.add(test)
                cases = self.cases_of(metafunc.definition.name, values)
                if cases:
                    self.spp.add(test)
                    values = cases
                    options.pop("ids", None)  # which are of the cases that were replaced
            parametrize(names, values, *arguments, **options)

        metafunc.parametrize = with_spp  # pyright: ignore[reportAttributeAccessIssue]

    def cases_of(self, name: str, values: list[Any]) -> list[Any]:
        """SPP's cases among these of a test, without those that SPP does not support."""
        cases = OWN.get(name, [])
        if any(mentions(value, HiraConfig) for value in values):
            cases = spp_cases(values)
        elif name in FROM_LORA:
            cases = [translate(value) for value in values if mentions(value, LoraConfig)]
        for case in filter(unsupported, cases):
            self.count(_LINEAR, case[0] if isinstance(case[0], str) else name)
        return [case for case in cases if not unsupported(case)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep the cases of SPP, and account for each of the others."""
        kept, dropped = [], []
        for item in items:
            reason = self.reason_not_to_run(item)
            (kept if reason is None else dropped).append(item)
            if reason:
                self.count(reason, item.name.partition("[")[0])
        items[:] = kept
        config.hook.pytest_deselected(items=dropped)
        reasons = dict(explained_files())
        here = {path.name for path in (config.rootpath / "tests").glob("test_*.py")}
        self.unexplained |= here ^ (RUN | set(reasons))

    def reason_not_to_run(self, item: pytest.Item) -> str | None:
        """None for the cases of SPP."""
        test = item.nodeid.partition("[")[0]
        name = getattr(item, "originalname", item.name)
        if test in self.spp or name in OF_ALL_METHODS:
            return CASES_NOT_RUN.get(name)
        if test not in self.methods:
            return _FIXED
        for pattern, reason in TESTS_NOT_RUN.items():
            if fnmatch(name, pattern):
                return reason
        self.unexplained.add(test)
        return ""

    def count(self, reason: str, what: str) -> None:
        """Note a case that is not run."""
        self.not_run.setdefault(reason, Counter())[what] += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """One seed for each test, whatever ran before it."""
        torch.manual_seed(0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
        if report.skipped and isinstance(report.longrepr, tuple):
            self.skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Fail where something is not accounted for."""
        if self.unexplained and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The summary."""
        say = terminalreporter.write_line
        terminalreporter.section("PEFT's test-suite on SPP")
        say("cases of SPP: " + ", ".join(f"{self.outcomes[name]} {name}" for name in ("passed", "failed", "skipped")))
        say("\nskipped by PEFT's own tests, which say:")
        for reason, cases in self.skipped.most_common():
            say(f"  {cases:5}  {reason}")
        say("\nnot applicable, of the files that are run:")
        for reason, cases in sorted(self.not_run.items(), key=lambda item: -item[1].total()):
            say(f"  {cases.total():5}  {reason}")
            if reason != _FIXED:
                say(indent(fill(", ".join(sorted(cases)), 110), " " * 9))
        say("\nfiles not run:")
        for reason, files in FILES_NOT_RUN.items():
            say(f"  {reason}: {', '.join(files.split())}")
        if self.unexplained:
            say("\nNEITHER RUN NOR EXPLAINED, which is an error (mend scripts/peft_suite/plugin.py):")
            for name in sorted(self.unexplained):
                say(f"  {name}")


def explained_files() -> Iterator[tuple[str, str]]:
    """Files that are not run, with the reason."""
    for reason, files in FILES_NOT_RUN.items():
        for name in files.split():
            yield f"test_{name}.py", reason


def english_quotes() -> DatasetDict:
    """A data set of the form of the one that PEFT's tests train on."""
    quotes = [f"this is a test . word{number} word{number + 1} word{number + 2}" for number in range(40)]
    columns = {"quote": quotes, "author": [""] * len(quotes), "tags": [[""]] * len(quotes)}
    return DatasetDict(train=Dataset.from_dict(columns))


def pytest_configure(config: pytest.Config) -> None:
    """Register the hooks, and have the cache taken for the hub.

    PEFT's tests go online for a model that they have not seen yet, and PEFT asks the hub alone what files it has.
    """
    from peft.utils import save_and_load

    from tests import testing_utils

    testing_utils.hub_online_once = lambda model_id: nullcontext()
    testing_utils.load_dataset_english_quotes = english_quotes
    save_and_load.check_file_exists_on_hf_hub = lambda repository, name: isinstance(
        try_to_load_from_cache(repository, name), str
    )
    config.pluginmanager.register(Suite())
