"""Uploads: what goes up and under which card; what does not; refusals of the hub in words. The hub is played."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from merging import adapter_for, sparse_model

from spp.adapters.merge import merge
from spp.adapters.options import MergeOptions
from spp.checkpoints.checkpoint import VERIFICATION
from spp.checkpoints.json_files import read_json, write_json
from spp.checkpoints.model_card import CARD
from spp.checkpoints.options import PushOptions
from spp.checkpoints.push import push_to_hub
from spp.cli.entry_point import main
from spp.errors import SppError, UsageError


@pytest.fixture
def merged(tmp_path, tiny_model) -> Path:
    base = sparse_model(tmp_path / "base", tiny_model, dtype=torch.float32)
    adapter = adapter_for(tmp_path / "adapter", base, ["model.layers.0.mlp.up_proj"])
    merge(MergeOptions(model=str(base), adapter=adapter, out=tmp_path / "merged"))
    return tmp_path / "merged"


@pytest.fixture
def hub(monkeypatch) -> dict[str, str]:
    """What the played hub has: path -> text of what is text."""
    there: dict[str, str] = {}

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        there["private"] = str(private)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, commit_message):
        from huggingface_hub.utils import filter_repo_objects

        names = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            data = (Path(folder_path) / name).read_bytes()
            there[name] = "weights" if name.endswith(".safetensors") else data.decode(errors="replace")
        return SimpleNamespace(commit_url=f"https://hub.example/{repo_id}/commit/1")

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, commit_message):
        there[path_in_repo] = path_or_fileobj.decode()
        return SimpleNamespace(commit_url=f"https://hub.example/{repo_id}/commit/2")

    for function in (create_repo, upload_folder, upload_file):
        monkeypatch.setattr(HfApi, function.__name__, function)
    return there


def test_the_whole_model_goes_up_with_a_card_of_its_new_name(merged, hub, capsys):
    (merged / ".partial").touch()
    (merged / "more").mkdir()
    (merged / "more" / ".hidden").touch()
    assert main(["push", str(merged), "someone/sparse", "--private"]) == 0
    assert "someone/sparse is on the hub, with its card" in capsys.readouterr().out
    assert hub.pop("private") == "True"
    assert set(hub) == {path.name for path in merged.iterdir()} - {".partial", "more"}
    assert "# `someone/sparse`" in hub[CARD] and 'from_pretrained("someone/sparse")' in hub[CARD]
    assert "# `merged`" in (merged / CARD).read_text()


def test_a_card_that_somebody_changed_goes_up_as_it_is(merged, hub):
    (merged / CARD).write_text("mine")
    assert not push_to_hub(PushOptions(model=merged, repo="someone/sparse")).card
    assert hub[CARD] == "mine"
    (merged / CARD).write_bytes(b"no UTF-8: \xff")
    assert not push_to_hub(PushOptions(model=merged, repo="someone/sparse")).card


def test_what_should_not_be_found_there_is_not_uploaded(merged, hub, tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        push_to_hub(PushOptions(model=tmp_path / "nowhere", repo="someone/sparse"))
    for name in ("a/b/c", "bad name/x", "--x/y"):
        with pytest.raises(UsageError, match="no name that the hub allows"):
            push_to_hub(PushOptions(model=merged, repo=name))
    write_json(merged / VERIFICATION, read_json(merged / VERIFICATION) | {"verified": False})
    with pytest.raises(SppError, match="zeros were lost"):
        push_to_hub(PushOptions(model=merged, repo="someone/sparse"))
    weights = merged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(SppError, match="truncated"):
        push_to_hub(PushOptions(model=merged, repo="someone/sparse"))
    assert not hub


@pytest.mark.parametrize(
    ("status", "kind", "words"), [(401, UsageError, "log in"), (403, UsageError, "log in"), (500, SppError, "refused")]
)
def test_refusals_of_the_hub_are_said_in_words(merged, hub, monkeypatch, status, kind, words):
    def refuse(self, *args, **kwargs):
        response = httpx.Response(status, request=httpx.Request("POST", "https://hub.example"))
        raise HfHubHTTPError("no", response=response)

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(kind, match=words):
        push_to_hub(PushOptions(model=merged, repo="someone/sparse"))


def test_without_a_network_there_is_one_message(merged, hub, monkeypatch):
    def unreachable(self, *args, **kwargs):
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(HfApi, "create_repo", unreachable)
    with pytest.raises(SppError, match="cannot be reached"):
        push_to_hub(PushOptions(model=merged, repo="someone/sparse"))
