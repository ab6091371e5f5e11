"""The coordinator's API refuses a directory without a model with 400, before it begins."""

from __future__ import annotations

import asyncio
import shutil
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from api.admin import AdminRoutes
from api.common import HANDLERS
from coordinator.files.artifacts import ArtifactStore
from coordinator.loading.models import Models
from coordinator.loading.operations import Operations
from coordinator.loading.turns import Turns
from coordinator.quality.store import QualityStore
from coordinator.roster.members import Roster
from coordinator.story import Story

LLAMA = Path(__file__).parents[1] / "fixtures" / "llama"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"
ROUTES = {"plan": {}, "load": {}, "quality": {"sequences": [[1, 2, 3]], "bits": [4]}}


def ask(directory: Path, path: str, body: dict[str, Any]) -> httpx.Response:
    """One request to the routes of a coordinator that nothing has joined."""
    roster, story = Roster("test"), Story()
    store = ArtifactStore(directory)
    store.prepare()
    models = Models(story)
    operations = Operations(roster, store, QualityStore(directory), models, Turns())
    app = Starlette(
        routes=AdminRoutes("test", roster, operations, models, story).routes(),
        exception_handlers=HANDLERS,
    )

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post(f"/shoal/v1/{path}", json=body)

    return asyncio.run(post())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("field", ["model", "adapter", "draft"])
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/a\0b", "has no NUL character"),
        ("/" + "x" * 256, "longer than any"),
        ("/x" * 3000, "longer than any"),
    ],
    ids=["nul", "name", "path"],
)
def test_what_can_be_no_path_is_refused(
    path: str, said: str, field: str, route: str, tmp_path: Path
) -> None:
    answer = ask(tmp_path, route, {"model": str(LLAMA), **ROUTES[route], field: path})
    error = answer.json()["error"]
    if field == "draft" and "unknown fields" in error["message"]:
        return  # This route has none.
    assert (answer.status_code, error["param"]) == (400, field)
    assert said in error["message"]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("unload", {"modle": "x"}),
        ("rebalance", {"dryrun": True}),
        ("revoke", {"device": "x", "y": 1}),
    ],
)
def test_a_misspelt_field_does_not_change_what_happens(
    route: str, body: dict[str, Any], tmp_path: Path
) -> None:
    """It would have unloaded all models, or moved one where only a look was wanted."""
    answer = ask(tmp_path, route, body)
    assert answer.status_code == 400, answer.text
    assert "unknown fields: " in answer.json()["error"]["message"]


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_no_model_is_the_users_mistake(route: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    state = tmp_path / "state"
    shutil.copytree(LLAMA, model)
    (model / "tokenizer.json").unlink()
    (model / "model.safetensors").write_text(POINTER)
    for given, said in (
        (model, "model.safetensors: not a safetensors file, but a git-lfs pointer"),
        (model / "config.json", "a file, not a model's folder"),
        (tmp_path / "nothing", "no such directory"),
    ):
        answer = ask(state, route, {"model": str(given), **ROUTES[route]})
        error = answer.json()["error"]
        assert answer.status_code == 400
        assert (error["type"], error["param"]) == ("invalid_request_error", "model")
        assert error["message"].startswith(str(given))
        assert said in error["message"]


@pytest.mark.parametrize("route", ROUTES)
def test_a_hubs_name_is_looked_for_in_the_coordinators_cache(
    route: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    body = {"model": "meta-llama/Llama-3.2-1B", **ROUTES[route]}
    answer = ask(tmp_path / "state", route, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        f"meta-llama/Llama-3.2-1B is not in {tmp_path / 'hub'} on {socket.gethostname()}: run"
        " `shoal pull meta-llama/Llama-3.2-1B` there"
    )
    folder = tmp_path / "hub" / "models--meta-llama--Llama-3.2-1B"
    shutil.copytree(LLAMA, folder / "snapshots" / ("0" * 40))
    for model in (body["model"], str(folder)):
        answer = ask(tmp_path / "state", route, body | {"model": model})
        assert answer.status_code == 200
        assert "no agent" in answer.text


@pytest.mark.parametrize("name", ["llama3.2:1b", "models/../llama", "../llama"])
def test_other_names_are_refused(name: str, tmp_path: Path) -> None:
    answer = ask(tmp_path, "load", {"model": name})
    assert answer.status_code == 400
    assert "the absolute path of a model, or a hub's name" in answer.json()["error"]["message"]


def test_a_model_is_planned_before_its_weights_are_here(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(LLAMA / "config.json", model)
    answer = ask(tmp_path / "state", "plan", {"model": str(model)})
    assert (answer.status_code, "no agent" in answer.text) == (200, True)
    answer = ask(tmp_path / "state", "load", {"model": str(model)})
    assert answer.status_code == 400
    assert "is the download complete?" in answer.json()["error"]["message"]


def test_a_good_model_waits_for_agents(tmp_path: Path) -> None:
    answer = ask(tmp_path, "plan", {"model": str(LLAMA)})
    assert answer.status_code == 200
    assert "no agent" in answer.text
