"""``fedspan model``: a finished model answers, scores and merges as the federation computed it."""

import hashlib
import io
import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import peft
import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file

from common.config.federation import FederationConfig, resolved
from common.config.load import load
from common.model.finished import digests
from deploy import cli
from deploy.sandbox.tiny import make_federation, make_model
from server.loop.server_model import ServerModel
from server.run.outcome import Outcome
from tests.harness.tiny_images import COLORS, make_image_federation

LORA = {"name": "fedit", "modules": "linear", "rank": 2, "merge": True}
EVALUATION = {"generate": 6, "max_examples": 6, "max_new_tokens": 6, "samples": 6}
SYSTEM = {"path": "server.jsonl", "prompt": "Term: {term}", "answer": "title", "system": "Give the title."}


class Made(NamedTuple):
    """A finished federation: its folder, and how its server has evaluated the state that was exported."""

    folder: Path
    server: ServerModel
    scores: dict[str, float]
    answers: list[dict[str, str]]

    @property
    def model(self) -> Path:
        return self.folder / "run" / "model"

    @property
    def loaded(self) -> list[Path | str]:
        """The arguments that name the model."""
        complete = (self.model / "config.json").exists() and not (self.model / "adapter_config.json").exists()
        return [self.model] if complete else [self.model, "--base", self.folder / "model"]


def finish(file: Path, size: float = 0.3) -> Made:
    """As a federation that has moved every trained tensor by noise."""
    server = ServerModel(resolved(load(file, FederationConfig), file), file)
    g = torch.Generator().manual_seed(0)
    state = {name: t + size * torch.randn(t.shape, generator=g) for name, t in server.initial_state().items()}
    scores, answers = server.evaluate(state), server.answers(state)
    server._tuned.set(state)
    server.export(state, file.parent / "run" / "model", server.card(state, Outcome(2, sites=1)))
    return Made(file.parent, server, scores, answers)


def text(folder: Path, **changes: Any) -> Made:
    changes = {"evaluation": {**EVALUATION, "server": SYSTEM}, "strategy": LORA, **changes}
    return finish(make_federation(folder, {"site-a": 4}, **changes))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return text(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Made:
    strategy = {"name": "fedftg", "blocks": "all", "rank": 4}
    return text(tmp_path_factory.mktemp("whole"), strategy=strategy, model={"path": "model", "dtype": "bfloat16"})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Made:
    strategy = {"name": "rolora", "modules": "linear", "rank": 2, "head": "train", "merge": True}
    model = {"path": "model", "dtype": "bfloat16"}
    folder = tmp_path_factory.mktemp("images")
    return finish(make_image_federation(folder, {"site-a": 2}, model=model, strategy=strategy))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object, **__: object) -> None:
        pytest.fail("it looked for the network")

    monkeypatch.setattr(socket, "getaddrinfo", ask)


def fedspan(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command prints that ends well."""
    capsys.readouterr()
    code = cli.main(["model", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """The one line of a command that ends with an error."""
    capsys.readouterr()
    assert cli.main(["model", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert (out, line[:7]) == ("", "error: ")
    return line[7:]


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_answers_are_those_of_the_evaluation(
    kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    made = request.getfixturevalue(kind)
    wanted = made.answers
    assert len({one["answer"] for one in wanted}) > 1
    terms = [one["prompt"].removeprefix("Term: ") for one in wanted]
    lines = fedspan(capsys, "ask", *made.loaded, *terms, "--json").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"question": term, "answer": one["answer"]} for term, one in zip(terms, wanted, strict=True)
    ]
    assert fedspan(capsys, "ask", *made.loaded, terms[0]) == wanted[0]["answer"] + "\n"
    other = fedspan(capsys, "ask", *made.loaded, terms[0], "--system", "Say something else, at length.")
    assert other != wanted[0]["answer"] + "\n"


def test_question_may_come_from_standard_input(
    adapter: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = adapter.answers[0]
    for arguments in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(one["prompt"].removeprefix("Term: ") + "\n"))
        assert fedspan(capsys, "ask", *adapter.loaded, *arguments) == one["answer"] + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert refused(capsys, "ask", *adapter.loaded) == "a question is empty"


def test_question_of_several_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = text(tmp_path, evaluation={**EVALUATION, "server": {**SYSTEM, "prompt": "{term} in short: {title}"}})
    one = made.answers[0]
    term, title = one["prompt"].split(" in short: ")
    assert fedspan(capsys, "ask", *made.loaded, json.dumps({"term": term, "title": title})) == one["answer"] + "\n"
    for wrong in ("pain", '{"term": "x"}', '{"term": "x", "title": ["y"]}', "[1]"):
        assert '{"term": "...", "title": "..."}' in refused(capsys, "ask", *made.loaded, wrong)


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_scores_are_those_of_the_evaluation(
    kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    made = request.getfixturevalue(kind)
    wanted = made.scores
    found = json.loads(fedspan(capsys, "score", *made.loaded, "--data", made.folder / "server.jsonl", "--json"))
    assert found == {
        "rows": 6,
        "generated": 6,
        "scores": {name: wanted[name] for name in ("loss", "perplexity", "rouge_l", "bleu_4", "exact_match")},
    }
    shown = fedspan(capsys, "score", *made.loaded, "--data", made.folder / "server.jsonl", "--generate", 0)
    assert f"Loss         {wanted['loss']:.4f}" in shown
    assert "ROUGE-L" not in shown


def test_file_may_have_other_columns_and_another_form(
    adapter: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (adapter.folder / "server.jsonl").read_text().splitlines()]
    file = tmp_path / "rows.csv"
    file.write_text("was;soll\n" + "".join(f"{row['term']};{row['title']}\n" for row in rows) + ";leer\n")
    command = ["score", *adapter.loaded, "--data", file, "--generate", 0, "--json"]
    assert "no column 'term'" in refused(capsys, *command)
    assert "is empty" in refused(capsys, *command, "--columns", "prompt=Term: {was}", "answer=soll")
    columns = ["--columns", "prompt=Term: {was}", "answer=soll", "delimiter=;", "skip_empty=true"]
    found = json.loads(fedspan(capsys, *command, *columns))
    assert found["rows"] == 6
    assert found["scores"]["loss"] == adapter.scores["loss"]  # with its system message
    assert json.loads(fedspan(capsys, *command, *columns, "--rows", 2))["rows"] == 2
    assert "unknown key `promt`" in refused(capsys, *command, "--columns", "promt=x")
    assert "KEY=VALUE" in refused(capsys, *command, "--columns", "term")
    assert "--data" in refused(capsys, *command, "--columns", "path=x")
    assert str(tmp_path / "none.csv") in refused(capsys, "score", *adapter.loaded, "--data", tmp_path / "none.csv")


def test_images_are_told_apart_as_in_the_evaluation(images: Made, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = images.scores
    found = json.loads(fedspan(capsys, "score", *images.loaded, "--data", images.folder / "server", "--json"))
    assert found["scores"] == {name: wanted[name] for name in found["scores"]}
    assert found["scores"].keys() >= {"loss", "accuracy", "macro_f1"}
    files = sorted((images.folder / "server").rglob("*.png"))
    told = [
        json.loads(line)["labels"] for line in fedspan(capsys, "ask", *images.loaded, *files, "--json").splitlines()
    ]
    assert [sum(labels.values()) for labels in told] == pytest.approx([1.0] * len(files), abs=1e-5)
    chosen = [next(iter(labels)) for labels in told]
    right = [file.parent.name for file in files]
    assert found["confusion"] == {
        label: {other: sum(r == label and c == other for r, c in zip(right, chosen, strict=True)) for other in COLORS}
        for label in COLORS
    }
    loss = -sum(torch.tensor(labels[file.parent.name]).log() for labels, file in zip(told, files, strict=True))
    assert float(loss) / len(files) == pytest.approx(wanted["loss"], rel=1e-3)
    assert fedspan(capsys, "ask", *images.loaded, files[0]).splitlines()[0].split()[0] == chosen[0]
    assert "no such image" in refused(capsys, "ask", *images.loaded, images.folder / "none.png")
    assert "for models that write" in refused(capsys, "ask", *images.loaded, files[0], "--system", "x")


def test_texts_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["ache", "swelling"]
    made = text(
        tmp_path,
        task={"type": "sequence-classification", "labels": labels},
        strategy={"name": "fedit", "modules": "linear", "rank": 2, "head": "train"},
        evaluation={"server": None},
    )
    told = json.loads(fedspan(capsys, "ask", *made.loaded, "acute pain of the hand", "--json"))["labels"]
    model = made.server._tuned.model
    ids = made.server._base.tokenizer("acute pain of the hand", return_tensors="pt")["input_ids"]
    shares = model(input_ids=ids).logits.softmax(-1)[0].tolist()
    assert told == pytest.approx(dict(zip(labels, shares, strict=True)), abs=1e-6)
    assert list(told.values()) == sorted(told.values(), reverse=True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"what": "pain", "is": "ache"}\n{"what": "fat hand", "is": "swelling"}\n')
    assert "names no columns" in refused(capsys, "score", *made.loaded, "--data", rows)
    command = ["score", *made.loaded, "--data", rows, "--columns", "prompt=what"]
    assert "give `prompt` and `answer`" in refused(capsys, *command)
    assert json.loads(fedspan(capsys, *command, "answer=is", "--json"))["rows"] == 2
    assert "for models that write" in refused(capsys, *command, "answer=is", "--generate", 1)


@pytest.mark.parametrize("kind", ["adapter", "images"])
def test_merged_model_is_the_servers_and_pefts(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = request.getfixturevalue(kind)
    out = tmp_path / "merged"
    assert str(out) in fedspan(capsys, "merge", *made.loaded, "--out", out)
    assert digests(out) == digests(made.folder / "run" / "merged")
    auto = hf.AutoModelForCausalLM if kind == "adapter" else hf.AutoModelForImageClassification
    options = {"dtype": torch.bfloat16, "num_labels": 3} if kind == "images" else {}
    base = auto.from_pretrained(made.folder / "model", **options)
    pefts = peft.PeftModel.from_pretrained(base, str(made.model)).merge_and_unload().state_dict()
    ours = auto.from_pretrained(out, dtype=options.get("dtype", torch.float32)).state_dict()
    assert ours.keys() == pefts.keys()
    for name, tensor in ours.items():  # PEFT's product is rounded as the processor likes
        torch.testing.assert_close(tensor, pefts[name])
    stored = {tensor.dtype for name, tensor in load_file(out / "model.safetensors").items() if "classifier" not in name}
    assert stored == {options.get("dtype", torch.float32)}


def test_merge_leaves_the_disk_as_it_is_when_it_cannot(
    adapter: Made, whole: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert "nothing to merge" in refused(capsys, "merge", whole.model, "--out", out)
    assert f"{adapter.model} exists" in refused(capsys, "merge", *adapter.loaded, "--out", adapter.model)
    usage = shutil._ntuple_diskusage(10**12, 10**12 - 10**6, 10**6)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        assert "has 1.0 MB free" in refused(capsys, "merge", *adapter.loaded, "--out", out / "deep")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hf.LlamaForCausalLM, "save_pretrained", full)
        assert "No space left" in refused(capsys, "merge", *adapter.loaded, "--out", out, code=1)
    assert list(tmp_path.rglob("*")) == [] or [p.name for p in tmp_path.rglob("*")] == ["out"]


def test_base_model_is_found_or_named_and_must_be_the_same(
    adapter: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = adapter.answers[0]
    folder, question = tmp_path / "model", one["prompt"].removeprefix("Term: ")
    shutil.copytree(adapter.model, folder)
    config, named = folder / "adapter_config.json", folder.parent / "federation.yaml"
    settings = json.loads(config.read_text())
    for wrong in ("/none/model", "model", None, 5):
        config.write_text(json.dumps({**settings, "base_model_name_or_path": wrong}))
        line = refused(capsys, "ask", folder, question)
        assert line == f"{folder} is an adapter for model, which is not found here; give its folder with --base"
    base = str(adapter.folder / "model")
    assert fedspan(capsys, "ask", folder, question, "--base", base) == one["answer"] + "\n"
    named.write_text(yaml.safe_dump({"model": {"path": base}}))  # as in a run's folder
    assert fedspan(capsys, "ask", folder, question) == one["answer"] + "\n"
    named.write_text("model: {path: [")
    assert "is not found here" in refused(capsys, "ask", folder, question)
    config.write_text(json.dumps({**settings, "base_model_name_or_path": base}))
    assert fedspan(capsys, "ask", folder, question) == one["answer"] + "\n"
    config.write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    assert "has changed" in refused(capsys, "merge", folder, "--out", tmp_path / "out")
    other = make_model(tmp_path / "other", seed=1)
    line = refused(capsys, "ask", folder, question, "--base", other)
    assert "digest of its base model" in line
    assert adapter.server.base_digest in line
    (other / "config.json").write_text(
        json.dumps({**json.loads((other / "config.json").read_text()), "quantization_config": {"quant_method": "x"}})
    )
    assert "is stored quantised" in refused(capsys, "merge", adapter.model, "--base", other, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_base_of_a_hub_is_taken_from_the_cache(
    adapter: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    revision, folder = "0" * 40, tmp_path / "model"
    shutil.copytree(adapter.model, folder)
    (folder / "adapter_config.json").write_text("{}")
    facts = json.loads((folder / "fedspan.json").read_text())
    facts["card"]["base"] |= {"name": "some/tiny", "revision": revision}
    (folder / "fedspan.json").write_text(json.dumps(facts))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "an adapter for some/tiny, which is not found here" in refused(capsys, "ask", folder, "pain")
    shutil.copytree(adapter.folder / "model", tmp_path / "hub" / "models--some--tiny" / "snapshots" / revision)
    one = adapter.answers[0]
    assert fedspan(capsys, "ask", folder, one["prompt"].removeprefix("Term: ")) == one["answer"] + "\n"


def test_model_that_lacks_what_stays_at_the_sites_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy = {"name": "fedsa-lora", "modules": "linear", "rank": 2}
    made = text(tmp_path, strategy=strategy, evaluation={"server": None})
    assert "lacks the LoRA factor B" in refused(capsys, "ask", *made.loaded, "pain")
    facts = json.loads((made.model / "fedspan.json").read_text())
    facts["card"]["personal"] = True  # as a site writes it
    (made.model / "fedspan.json").write_text(json.dumps(facts))
    assert fedspan(capsys, "ask", *made.loaded, "pain", "--max-new-tokens", 3)


def test_card_is_shown_of_files_that_are_as_they_were(
    adapter: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(adapter.model, folder)
    readme = (folder / "README.md").read_text()
    assert fedspan(capsys, "card", folder) == readme
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("of an editor")
    (folder / "README.md").write_text("")
    fedspan(capsys, "card", folder, "--write")
    assert (folder / "README.md").read_text() == readme
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    line = refused(capsys, "card", folder)
    assert f"{weights} has changed" in line
    assert hashlib.sha256(content).hexdigest() in line
    weights.unlink()
    assert f"{weights} is missing" in refused(capsys, "card", folder)
    assert "lacks adapter_model.safetensors" in refused(capsys, "ask", folder, "pain")
    shutil.copy(adapter.model / weights.name, weights)
    (folder / "more.json").write_text("{}")
    assert f"{folder / 'more.json'} was not there" in refused(capsys, "card", folder)


@pytest.mark.parametrize("verb", [["ask"], ["score", "--data", "x"], ["merge", "--out", "x"], ["card"]])
def test_folder_without_a_finished_model_is_named(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_model(tmp_path / "plain")
    assert f"{made} holds no fedspan.json" in refused(capsys, verb[0], made, *verb[1:])
    assert f"{tmp_path / 'none'} does not exist" in refused(capsys, verb[0], tmp_path / "none", *verb[1:])


def test_tensors_of_another_shape_are_refused(
    adapter: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    shutil.copytree(adapter.model, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file({**tensors, name: tensors[name][1:].contiguous()}, file)
    command = ["ask", folder, "pain", "--base", adapter.folder / "model"]
    assert "tensors have other shapes" in refused(capsys, *command)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    assert name in refused(capsys, *command)
    file.write_bytes(b"x")
    assert "is damaged or cut off" in refused(capsys, *command)
    assert "needs no --base" in refused(capsys, "ask", adapter.folder / "run" / "merged", "x", "--base", folder)
