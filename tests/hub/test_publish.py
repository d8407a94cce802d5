"""Publishing with the real client: uploaded files, atomic commits, and refusals."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import save_file

from tests.hub.conftest import TOKEN, Runner
from tests.hub.test_model_cards import run_info
from tests.hub_server.server import Fault, HubServer


def data_folder(folder: Path, seed: object = 0, files: int = 2, **report) -> Path:
    """Writes a folder like `hf-mel data build`, with `files` files of mentions."""
    for path, rows in {
        **{f"mentions/train-{k:05d}-of-{files:05d}": [f"{seed} {k}"] for k in range(files)},
        "entities/kb-00000-of-00001": ["Q1", str(seed).split()[0]],  # equal for the seeds "toy 1" and "toy 2"
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"entity_id": rows}), folder / f"{path}.parquet")
    (folder / "report.json").write_text(json.dumps({"dataset": "toy", "seed": seed, "redistribution": None, **report}))
    (folder / "README.md").write_text(f'---\nlicense: cc0-1.0\n---\n\n# Toy {seed}\n\nload_dataset("path/to/toy")\n')
    return folder


def published_data(folder: Path, repo: str) -> dict[str, bytes]:
    """The expected files of the repository, computed without the publisher."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return files | {"README.md": files["README.md"].replace(b"path/to/toy", repo.encode())}


def model_folder(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "toy_retriever", "auto_map": {"AutoModel": "toy.ToyRetriever"}})
    )
    (folder / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "toy.ToyProcessor"}}))
    (folder / "toy.py").write_text("# the code\n")
    save_file({"weight": np.zeros((2, 3), dtype=np.float32)}, folder / "model.safetensors")
    info = run_info(**changes)
    info["validation"]["model"] = {"weights": "w1"}
    (folder / "results.json").write_text(json.dumps(info))
    return folder


def content(hub: HubServer, kind: str, repo: str) -> dict[str, bytes]:
    files = hub.files(kind, repo)
    files.pop(".gitattributes")
    return files


# -- atomic commits ----------------------------------------------------------------------------------------------------


def test_the_default_is_a_dry_run_that_lists_every_file_and_uploads_nothing(hub, runner, tmp_path):
    folder = data_folder(tmp_path / "toy")
    (folder / "weights.bin").write_bytes(b"x")
    done = runner.run("publish", "dataset", folder, "org/toy")
    assert done.returncode == 0
    for path, size in ((p, p.stat().st_size) for p in folder.rglob("*.parquet")):
        assert re.search(rf"new .*{path.relative_to(folder)}.* {size} bytes", done.output)
    total = sum(len(file) for name, file in published_data(folder, "org/toy").items() if name != "weights.bin")
    for words in (
        f"{hub.url}/datasets/org/toy",
        f"5 files, {total / 1000:.1f} kB, to upload",
        "a new repository, public",
        "Licence: cc0-1.0",
        "Left out: weights.bin (may hold a pickle",
        "Account: alice",
        "nothing was uploaded",
    ):
        assert words in done.output
    assert {line.split()[0] for line in hub.lines()} == {"GET"}
    assert hub.head("dataset", "org/toy") is None


def test_publishing_makes_one_commit_and_publishing_again_none(hub, runner, tmp_path):
    folder = data_folder(tmp_path / "toy")
    assert runner.run("publish", "dataset", folder, "org/toy", "--yes").returncode == 0
    head = hub.head("dataset", "org/toy")
    assert content(hub, "dataset", "org/toy") == published_data(folder, "org/toy")
    assert hub.store.history("dataset", "org/toy") == ["Publish the data set with hf_mel", "initial commit"]
    again = runner.run("publish", "dataset", folder, "org/toy", "--yes")
    assert again.returncode == 0
    assert "Nothing to change" in again.output
    assert hub.head("dataset", "org/toy") == head


def test_a_new_version_uploads_changed_files_and_deletes_its_old_ones(hub, runner, tmp_path):
    runner.run("publish", "dataset", data_folder(tmp_path / "one", "toy 1", files=3), "org/toy", "--yes")
    added = {"notes.md": hub.store.put(b"by hand")}
    hub.store.commit("dataset", "org/toy", "main", "a note", added, [])
    hub.log.clear()
    second = data_folder(tmp_path / "two", "toy 2")
    dry = runner.run("publish", "dataset", second, "org/toy")
    assert re.search(r"deleted .*mentions/train-00002-of-00003.parquet", dry.output)
    assert re.search(r"unchanged .* 1 file ", dry.output)  # the entities
    runner.run("publish", "dataset", second, "org/toy", "--yes", "--message", "Second")
    assert content(hub, "dataset", "org/toy") == published_data(second, "org/toy") | {"notes.md": b"by hand"}
    assert hub.store.history("dataset", "org/toy")[0] == "Second"
    assert sum("/storage/" in line for line in hub.lines()) == 2  # the entities were uploaded before


def test_a_repository_becomes_private_and_gated_before_the_first_upload(hub, runner, tmp_path):
    folder = data_folder(tmp_path / "toy")
    done = runner.run("publish", "dataset", folder, "org/toy", "--yes", "--private", "--gated", "manual")
    assert done.returncode == 0
    meta = hub.store.meta("dataset", "org/toy")
    assert (meta["private"], meta["gated"]) == (True, "manual")
    lines = [line for line in hub.lines() if not line.startswith("GET")]
    assert lines[0] == "POST /api/repos/create"
    assert lines.index("PUT /api/datasets/org/toy/settings") < min(
        k for k, line in enumerate(lines) if "storage" in line or "commit" in line
    )
    # It stays private without the options.
    runner.run("publish", "dataset", folder, "org/toy", "--yes")
    assert hub.store.meta("dataset", "org/toy")["private"] is True


def test_a_public_repository_can_become_private_without_a_commit(hub, runner, tmp_path):
    folder = data_folder(tmp_path / "toy")
    runner.run("publish", "dataset", folder, "org/toy", "--yes")
    head = hub.head("dataset", "org/toy")
    assert "to become private" in runner.run("publish", "dataset", folder, "org/toy", "--private").output
    runner.run("publish", "dataset", folder, "org/toy", "--yes", "--private")
    assert hub.store.meta("dataset", "org/toy")["private"] is True
    assert hub.head("dataset", "org/toy") == head


def test_a_commit_by_someone_else_during_publishing_is_an_error(hub, runner, tmp_path):
    folder = data_folder(tmp_path / "toy")
    hub.store.create("dataset", "org/toy")
    hub.faults.append(Fault("slow", pattern="POST .*preupload", seconds=1))
    output = runner.start("publish", "dataset", folder, "org/toy", "--yes")
    while not any("preupload" in line for line in hub.lines()):
        pass
    hub.store.commit("dataset", "org/toy", "main", "theirs", {"theirs.md": hub.store.put(b"!")}, [])
    done = runner.result(output)
    assert done.returncode == 1
    assert "changed by someone else" in done.output
    assert content(hub, "dataset", "org/toy") == {"theirs.md": b"!"}


# -- the connection fails at every request in turn -----------------------------------------------------------------------


def _versions(tmp_path: Path, case: str) -> tuple[Path, Path]:
    """Two versions whose contents are unique to the case, so that every case uploads them."""
    one = data_folder(tmp_path / case / "one", f"{case} 1", files=3)
    return one, data_folder(tmp_path / case / "two", f"{case} 2")


def _upload(hub: HubServer, repo: str, folder: Path) -> str | None:
    hub.store.create("dataset", repo)
    files = published_data(folder, repo)
    added = {path: hub.store.put(data) | {"lfs": path.endswith(".parquet")} for path, data in files.items()}
    return hub.store.commit("dataset", repo, "main", "first", added, [])


@pytest.mark.parametrize(
    ("kind", "has_old_version"),
    [("cut", True), ("lost", True), ("half", True), (403, True), ("cut", False), ("lost", False)],
)
def test_after_a_failure_at_any_request_the_old_revision_stays_and_a_second_run_completes(
    hub, runner, tmp_path, kind, has_old_version
):
    """A different request fails in every case. With 403, all later requests fail too.

    Every case has a separate user, so that all can run at the same time.
    """

    def case(at: int) -> tuple[str, str, str, str | None, Path, Path]:
        user, token = f"user{at}", f"hf_{at:030d}"
        hub.add_user(user, token)
        one, two = _versions(tmp_path, user)
        return user, token, f"{user}/toy", _upload(hub, f"{user}/toy", one) if has_old_version else None, one, two

    def publish(token: str, repo: str, folder: Path) -> Path:
        return runner.start("publish", "dataset", folder, repo, "--yes", token=token)

    user, token, repo, _, _, two = case(0)
    assert runner.result(publish(token, repo, two)).returncode == 0
    count = sum(request.user == user or "storage" in request.path for request in hub.log)
    assert count >= 8
    cases = [case(at) for at in range(1, count + 1)]
    hub.faults[:] = [
        Fault(kind, at=at, pattern=rf"user={user}\b", stays=kind == 403)
        for at, (user, *_) in enumerate(cases, start=1)
    ]
    started = [publish(token, repo, two) for _, token, repo, _, _, two in cases]
    first = [runner.result(output) for output in started]
    for at, fault in enumerate(hub.faults, start=1):
        assert fault.seen >= at, "the fault did not happen"
    hub.faults.clear()
    failed = 0
    for (_, _, repo, before, one, two), done in zip(cases, first, strict=True):
        assert done.returncode in (0, 1), done.output
        failed += done.returncode
        assert done.returncode == 0 or "HubError" in done.output
        after = hub.head("dataset", repo)
        if after is not None and after == before:  # nothing was committed
            assert done.returncode == 1
            assert content(hub, "dataset", repo) == published_data(one, repo)
        elif after is not None:  # everything was committed, or the new repository is empty
            files = content(hub, "dataset", repo)
            assert files == published_data(two, repo) or (files == {} and before is None)
            assert files or done.returncode == 1
    assert failed >= 3
    started = [publish(token, repo, two) for _, token, repo, _, _, two in cases]
    for (_, _, repo, _, _, two), output in zip(cases, started, strict=True):
        done = runner.result(output)
        assert done.returncode == 0, done.output
        assert content(hub, "dataset", repo) == published_data(two, repo)
        assert hub.store.history("dataset", repo) == [
            "Publish the data set with hf_mel",
            *(["first"] if has_old_version else []),
            "initial commit",
        ]


def test_files_uploaded_before_a_failure_are_not_uploaded_again(hub, runner, tmp_path):
    folder = data_folder(tmp_path / "toy", files=4)
    hub.faults.append(Fault("cut", pattern="POST .*commit"))
    assert runner.run("publish", "dataset", folder, "org/toy", "--yes").returncode == 1
    first = sum(line.startswith("PUT /storage") for line in hub.lines())
    assert first == 5
    assert runner.run("publish", "dataset", folder, "org/toy", "--yes").returncode == 0
    assert sum(line.startswith("PUT /storage") for line in hub.lines()) == first


@pytest.mark.parametrize("status", [401, 403, 429, 500])
def test_error_statuses_of_the_hub_give_a_remedy(hub, runner, tmp_path, status):
    folder = data_folder(tmp_path / "toy")
    hub.faults.append(Fault(status, pattern="POST .*commit", stays=True))
    done = runner.run("publish", "dataset", folder, "org/toy", "--yes")
    assert done.returncode == 1
    words = {401: "hf auth login", 403: "write access", 429: "too many requests", 500: "The Hub answered 500"}
    assert words[status] in done.output
    assert hub.store.history("dataset", "org/toy") == ["initial commit"]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_terms_that_forbid_redistribution_are_shown_and_can_be_overridden(hub, runner, tmp_path):
    folder = data_folder(tmp_path / "toy", redistribution="The release is for research on the owner's site only.")
    done = runner.run("publish", "dataset", folder, "org/toy", "--yes")
    assert done.returncode == 1
    assert "for research on the owner's site only" in done.output
    assert "--i-hold-the-rights" in done.output
    assert not hub.log
    done = runner.run("publish", "dataset", folder, "org/toy", "--yes", "--i-hold-the-rights")
    assert done.returncode == 0
    assert "for research on the owner's site only" in done.output
    assert hub.head("dataset", "org/toy")


def test_a_report_without_terms_does_not_permit_publishing(hub, runner, tmp_path):
    folder = data_folder(tmp_path / "toy")
    (folder / "report.json").write_text(json.dumps({"dataset": "toy"}))
    done = runner.run("publish", "dataset", folder, "org/toy", "--yes")
    assert done.returncode == 1
    assert "does not say" in done.output
    assert not hub.log


def test_empty_terms_permit_publishing(hub, runner, tmp_path):
    assert runner.run("publish", "dataset", data_folder(tmp_path / "toy", redistribution=""), "org/a").returncode == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "report.json").unlink(), "report.json"),
        (lambda f: (f / "report.json").write_text("[" * 100_000), "not JSON"),
        (lambda f: (f / "README.md").unlink(), "no README.md"),
        (lambda f: (f / "README.md").write_text("---\na: [\n---\n"), "not YAML"),
        (lambda f: (f / "entities/kb-00000-of-00001.parquet").write_bytes(b"PAR1nothing"), "not a Parquet file"),
        (lambda f: (f / "README.md").write_text(f"---\nlicense: mit\n---\n{TOKEN}"), "access token"),
    ],
)
def test_an_incomplete_or_damaged_data_folder_is_refused(hub, runner, tmp_path, damage, message):
    folder = data_folder(tmp_path / "toy")
    damage(folder)
    done = runner.run("publish", "dataset", folder, "org/toy", "--yes")
    assert done.returncode == 1
    assert message in done.output
    assert not hub.log


def test_links_and_hidden_files_are_not_uploaded(hub, runner, tmp_path):
    folder = data_folder(tmp_path / "toy")
    (tmp_path / "secret.md").write_text("secret")
    (folder / "link.md").symlink_to(tmp_path / "secret.md")
    (folder / ".env.md").write_text("secret")
    done = runner.run("publish", "dataset", folder, "org/toy", "--yes")
    assert "Left out: link.md (a link" in done.output
    assert "Left out: .env.md (hidden)" in done.output
    assert content(hub, "dataset", "org/toy").keys() == published_data(data_folder(tmp_path / "b"), "x").keys()


@pytest.mark.parametrize("repo", ["toy", "org/../toy", "a/b/c", "org/to y"])
def test_an_invalid_repository_name_is_refused_before_any_request(hub, runner, tmp_path, repo):
    done = runner.run("publish", "dataset", data_folder(tmp_path / "toy"), repo, "--yes")
    assert done.returncode == 1
    assert "OWNER/NAME" in done.output
    assert not hub.log


def test_without_an_account_or_write_access_nothing_is_uploaded(hub, new_client, tmp_path):
    folder = data_folder(tmp_path / "toy")
    hub.add_user("bob", "hf_" + "b" * 34)
    for name, token, words in (("nobody", None, "hf auth login"), ("bob", "hf_" + "b" * 34, "write access")):
        client = new_client(name, token)
        runner = client.runner()
        done = runner.run("publish", "dataset", folder, "org/toy", "--yes")
        assert done.returncode == 1
        assert words in done.output
        runner.close()
    assert hub.head("dataset", "org/toy") is None


# -- models ------------------------------------------------------------------------------------------------------------


def test_a_model_is_published_with_its_card_and_results_but_without_pickles(hub, runner, tmp_path):
    folder = model_folder(tmp_path / "run")
    (folder / "checkpoints").mkdir()
    (folder / "optimizer.pt").write_bytes(b"pickle")
    (folder / "recipe.yaml").write_text(
        "data: {dataset: /home/somebody/data/planets, extra_datasets: [/home/somebody/moons, org/stars]}\n"
    )
    test = {"model": {"weights": "w1"}, "metrics": {"hits@1": 0.25, "mrr": 0.5, "num_ranked": 9}}
    test |= {"data": {"split": "test"}, "strata": {}, "units": None, "ties": "realistic"}
    (folder / "results_test.json").write_text(json.dumps(test))
    (folder / "results_old.json").write_text(json.dumps(test | {"model": {"weights": "w0"}}))
    done = runner.run("publish", "model", folder, "org/toy", "--yes")
    assert done.returncode == 0, done.output
    for words in (
        "Left out: checkpoints/ (a folder)",
        "Left out: optimizer.pt (may hold a pickle",
        "results_old.json was measured on other weights",
        "Results, test: H@1 25.0, MRR 50.0.",
        "Licence: mit",
    ):
        assert words in done.output
    files = content(hub, "model", "org/toy")
    assert set(files) == {
        ".eval_results/hf_mel.yaml",
        "README.md",
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "recipe.yaml",
        "results.json",
        "results_old.json",
        "results_test.json",
        "toy.py",
    }
    card = files["README.md"].decode()
    assert 'from_pretrained("org/toy"' in card
    assert "| `test` | 9 | 25.0 |" in card
    assert yaml.safe_load(files["recipe.yaml"]) == {
        "data": {"dataset": "planets", "extra_datasets": ["moons", "org/stars"]}
    }
    entries = yaml.safe_load(files[".eval_results/hf_mel.yaml"])
    assert [entry["value"] for entry in entries] == [25.0, 50.0, 50.0, 61.23]


def test_a_card_without_the_marker_line_is_not_overwritten(hub, runner, tmp_path):
    folder = model_folder(tmp_path / "run")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# My own words\n")
    done = runner.run("publish", "model", folder, "org/toy", "--yes")
    assert "edited by hand" in done.output
    assert b"# My own words" in content(hub, "model", "org/toy")["README.md"]


def test_the_data_set_is_named_only_if_its_fingerprint_matches(hub, runner, tmp_path):
    data = data_folder(tmp_path / "data")
    runner.run("publish", "dataset", data, "org/planets", "--yes")
    parquet = sorted(p.relative_to(data).as_posix() for p in data.rglob("*.parquet"))
    lines = "".join(f"{name} {hashlib.sha256((data / name).read_bytes()).hexdigest()}\n" for name in parquet)
    local = run_info()["data"] | {"dataset": "planets", "revision": None}
    folder = model_folder(tmp_path / "run", data=local | {"sha256": hashlib.sha256(lines.encode()).hexdigest()})
    assert "this run used a local folder" in runner.run("publish", "model", folder, "org/toy").output
    done = runner.run("publish", "model", folder, "org/toy", "--dataset", "org/planets", "--yes")
    assert done.returncode == 0, done.output
    files = content(hub, "model", "org/toy")
    dataset = yaml.safe_load(files[".eval_results/hf_mel.yaml"])[0]["dataset"]
    assert (dataset["id"], dataset["revision"]) == ("org/planets", hub.head("dataset", "org/planets"))
    assert "datasets:\n- org/planets" in files["README.md"].decode()
    other = model_folder(tmp_path / "other", data=local | {"sha256": "0" * 64})
    done = runner.run("publish", "model", other, "org/other", "--dataset", "org/planets", "--yes")
    assert done.returncode == 1
    assert "not the one the model was trained on" in done.output


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("[1]"), "not a JSON object"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "no safetensors weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "not a safetensors file"),
        (lambda f: (f / "toy.py").unlink(), "toy.py is missing"),
        (lambda f: (f / "results.json").write_text("{}"), "not a results.json of this version"),
        (lambda f: (f / "results.json").unlink(), "nor a README.md"),
        (lambda f: (f / "recipe.yaml").write_text("a: 1"), "not a recipe"),
        (lambda f: (f / "training_log.json").write_text(json.dumps({"hub_token": TOKEN})), "access token"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
            "names 'model-2.safetensors'",
        ),
    ],
)
def test_an_incomplete_or_damaged_model_folder_is_refused(hub, runner, tmp_path, damage, message):
    folder = model_folder(tmp_path / "run")
    damage(folder)
    done = runner.run("publish", "model", folder, "org/toy", "--yes")
    assert done.returncode == 1
    assert message in done.output
    assert not hub.log


# -- Spaces ------------------------------------------------------------------------------------------------------------


def test_a_metric_must_have_the_name_of_its_module(hub, runner):
    done = runner.run("publish", "metric", "mel_ranking", "org/ranking", "--yes")
    assert done.returncode == 1
    assert "Publish to OWNER/mel_ranking" in done.output
    assert not hub.log


def test_the_page_of_a_metric_uses_the_published_repository(hub, runner):
    assert runner.run("publish", "metric", "mel_ranking", "org/mel_ranking", "--yes").returncode == 0
    files = content(hub, "space", "org/mel_ranking")
    assert set(files) == {"README.md", "app.py", "mel_ranking.py", "requirements.txt"}
    assert b'evaluate.load("org/mel_ranking")' in files["app.py"]
    assert b"hf-mel/mel_ranking" not in files["README.md"] + files["app.py"]


def test_a_space_without_requirements_is_refused(hub, runner, tmp_path):
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "README.md").write_text("---\ntitle: Demo\nsdk: gradio\napp_file: app.py\n---\n")
    (folder / "app.py").write_text("print('hello')\n")
    done = runner.run("publish", "space", folder, "org/demo", "--yes")
    assert done.returncode == 1
    assert "no requirements.txt" in done.output
    (folder / "requirements.txt").write_text("gradio\n")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__/app.cpython-311.pyc").write_bytes(b"x")
    assert runner.run("publish", "space", folder, "org/demo", "--yes").returncode == 0
    assert set(content(hub, "space", "org/demo")) == {"README.md", "app.py", "requirements.txt"}
    assert hub.store.meta("space", "org/demo")["sdk"] == "gradio"


def test_help_names_the_five_kinds(runner: Runner):
    output = runner.run("publish", "--help").output
    for kind in ("model", "dataset", "kb", "metric", "space"):
        assert re.search(rf"\b{kind}\b", output)
