"""The papers' experiments, with tiny models of the same families and files of the same columns."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import GemmaConfig, GemmaForCausalLM, RobertaConfig, RobertaForMaskedLM

import benchmarks
from benchmarks.experiments.papers.prepare import prepare
from client.session import Session
from common.config.load import load
from common.config.site import SiteConfig
from common.errors import DataError, LaunchError
from deploy.experiment.config import load_experiment
from deploy.experiment.plan import Plan
from deploy.sandbox.tiny import make_model, make_tokenizer
from strategies.flower.named import make_rule
from tests.deploy.data.test_recipe import HEADERS, dolly, medquad
from tests.harness.tiny_images import make_vision_model

PAPERS = Path(benchmarks.__file__).parent / "experiments" / "papers"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def glue(folder: Path) -> Path:
    """Sixty different rows of two tasks, labels in turns."""
    for task, name in (("SST-2", "sst2"), ("RTE", "rte")):
        header, *rows = HEADERS[name]
        (folder / "GLUE" / task).mkdir(parents=True)
        for split in ("train", "dev"):
            lines = [rows[n % 2].replace("dull", f"dull {n}").replace("fine", f"fine {n}") for n in range(120)]
            lines = [line.replace("\tOne\t", f"\tOne {split} {n}\t", 1) for n, line in enumerate(lines)]
            (folder / "GLUE" / task / f"{split}.tsv").write_text("\n".join([header, *lines]))
    return folder / "GLUE"


def commonsense(folder: Path) -> Path:
    file = folder / "commonsense_170k.json"
    rows = [{"instruction": f"Is {n} even?", "input": "", "output": "the correct answer is true"} for n in range(400)]
    file.write_text(json.dumps(rows))
    return file


def brains(folder: Path) -> Path:
    for split, each in (("Training", 24), ("Testing", 3)):
        for grey, kind in enumerate(("glioma", "meningioma", "notumor", "pituitary")):
            (folder / "mri" / split / kind).mkdir(parents=True)
            for n in range(each):
                Image.new("L", (20, 20), 40 * grey + n).save(folder / "mri" / split / kind / f"{n}.png")
    return folder / "mri"


def roberta(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    config = RobertaConfig(vocab_size=len(tokenizer), pad_token_id=2, max_position_embeddings=140, **SIZES)
    RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def gemma(folder: Path) -> None:
    tokenizer = make_tokenizer()
    config = GemmaConfig(vocab_size=len(tokenizer), head_dim=8, num_key_value_heads=1, pad_token_id=2, **SIZES)
    GemmaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


MODELS: dict[str, Callable[[Path], object]] = {
    "roberta-large": roberta,
    "gemma-2b": gemma,
    "tinyllama": lambda folder: make_model(folder, layers=3),
    "llama-2-7b": lambda folder: make_model(folder, layers=3),
    "siglip": lambda folder: make_vision_model(folder, "siglip"),
}
DATA = {"glue": glue, "medquad": medquad, "dolly": dolly, "commonsense": commonsense, "brain-tumour": brains}


@pytest.mark.parametrize(
    ("file", "scale", "model", "data"),
    [
        ("rolora_glue", "rte", "roberta-large", "glue"),
        ("rolora_llama", None, "llama-2-7b", "commonsense"),
        ("fedftg_text", "gemma-medquad", "gemma-2b", "medquad"),
        ("fedftg_text", "tinyllama-dolly", "tinyllama", "dolly"),
        ("fedftg_images", None, "siglip", "brain-tumour"),
    ],
)
def test_every_strategy_of_a_papers_experiment_trains(
    tmp_path: Path, file: str, scale: str | None, model: str, data: str
) -> None:
    """The whole grid is planned and all rows are read; then a site of each strategy makes one step."""
    cache, source = tmp_path / ".cache" / "papers", tmp_path / "benchmarks" / "experiments" / "papers" / f"{file}.yaml"
    source.parent.mkdir(parents=True)
    shutil.copy(PAPERS / source.name, source)
    prepare(data, DATA[data](tmp_path), cache)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MODELS[model](cache / model)
    if file == "fedftg_images":  # the tiny model is narrower than the paper's rank
        source.write_text(source.read_text().replace("rank: 16", "rank: 8"))
    plan = Plan(load_experiment(source, scale), source)
    first = {setting.strategy: setting for setting in reversed(plan.settings)}
    for setting in first.values():
        federation = plan.federation(plan.selection(setting)[0])
        training = federation.training.model_copy(update={"local_steps": 1})
        federation = federation.model_copy(update={"training": training})
        site = plan.sites[setting.clients, setting.alpha][0]
        own = Session(load(site, SiteConfig), site, federation)
        active = make_rule(federation.strategy, seed=0).active(1, own.exchanged)
        before = {name: tensor.clone() for name, tensor in own.exchanged.items()}
        sent, numbers = own.train(1, active)
        assert numbers["steps"] == 1
        assert any(name not in before or not torch.equal(tensor, before[name]) for name, tensor in sent.items())


def test_sites_validation_and_test_of_a_paper_share_no_row(tmp_path: Path) -> None:
    (folder,) = prepare("medquad", medquad(tmp_path), tmp_path / "cache")
    parts = {file: [json.loads(line) for line in file.read_text().splitlines()] for file in folder.rglob("*.jsonl")}
    focuses = [{row["focus"] for file, rows in parts.items() if split(file) == kind for row in rows} for kind in KINDS]
    assert all(focuses)
    assert sum(map(len, focuses)) == len(set.union(*focuses)) == 80
    assert {len(parts[folder / "3" / f"site-0{n}.jsonl"]) for n in (1, 2, 3)} <= {48, 49, 50, 51, 52}
    assert yaml.safe_load((folder / "3" / "site-01.yaml").read_text())["data"]["answer"] == "answer"
    with pytest.raises(LaunchError, match="exists already"):
        prepare("medquad", tmp_path / "MedQuAD", tmp_path / "cache")


KINDS = ("test", "validation", "site")


def split(file: Path) -> str:
    return file.stem.partition("-")[0]


def test_folder_without_a_task_of_glue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="SST-2"):
        prepare("glue", tmp_path, tmp_path / "cache")
