"""Uploading to the hub, with a hub that is not one: no test reaches the network."""

import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from sodfast.errors import RunFailed, UsageError
from sodfast.run.hub import push, require_hub

CONNECTION_ERROR = HfHubHTTPError.__bases__[0]


class Hub:
    """What `HfApi` is asked, and an error that it may raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.created: list[tuple[str, dict[str, Any]]] = []
        self.uploaded: dict[str, bytes] = {}
        self.error: Exception | None = None
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")

    def create_repo(self, repo_id: str, **settings: Any) -> str:
        self.created.append((repo_id, settings))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.error is not None:
            raise self.error
        assert repo_id == self.created[-1][0] and "sodfast" in commit_message
        self.uploaded = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


def test_a_folder_is_uploaded_whole_to_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# card")
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert push(tmp_path, "org/name") == "https://huggingface.co/org/name"
    assert hub.created == [("org/name", {"private": True, "exist_ok": True})]
    assert hub.uploaded == {"README.md": b"# card", "model.safetensors": b"123"}


@pytest.mark.parametrize("error", [OSError("disk"), CONNECTION_ERROR("no route")])
def test_what_cannot_be_uploaded_is_said_in_one_line(
    hub: Hub, tmp_path: Path, error: Exception
) -> None:
    hub.error = error
    with pytest.raises(RunFailed, match=rf"is written, but not uploaded to org/name: {error}"):
        push(tmp_path, "org/name")


@pytest.mark.parametrize("name", ["name", "a/b/c", "org/na me", "", "/x"])
def test_a_name_must_be_one_of_the_hub(hub: Hub, name: str) -> None:
    with pytest.raises(UsageError, match=f"--push={name}"):
        require_hub(name)


def test_a_missing_token_or_package_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    require_hub("org/name")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match="hf auth login"):
        require_hub("org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="pip install huggingface_hub"):
        require_hub("org/name")


@pytest.mark.slow
def test_export_uploads_what_it_has_written(
    hub: Hub, finished: Path, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = cli("export", str(finished), str(tmp_path / "model"), "--push", "org/name")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "uploaded to https://huggingface.co/org/name"
    assert hub.uploaded.keys() == {file.name for file in (tmp_path / "model").iterdir()}
    assert b"self on-policy distillation" in hub.uploaded["README.md"]

    hub.error = OSError("disk")
    failed = cli("export", str(finished), str(tmp_path / "again"), "--push", "org/name")
    assert failed.code == 1 and "is written, but not uploaded" in failed.err
    assert (tmp_path / "again" / "model.safetensors").is_file()

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused = cli("export", str(finished), str(tmp_path / "no"), "--push", "org/name")
    assert refused.code == 2 and not (tmp_path / "no").exists()
