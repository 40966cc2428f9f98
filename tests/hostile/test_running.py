"""Models that lead transformers elsewhere: nothing outside is read, and no code is run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashtune.kernels.model_folder.folder import ModelFolder
from flashtune.kernels.model_folder.own_class import ask_model
from flashtune.tuner.clustering.decode_state import RunningModel, read_prompts
from flashtune.tuning_db.errors import FlashtuneError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OUTSIDE = 0.25  # every number of the weights outside
Spoil = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(["[UNK]", *"abcdefgh"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    path = tmp_path_factory.mktemp("good") / "model"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]"
    ).save_pretrained(path)
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, eos_token_id=3, bos_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_code(folder: Path, outside: Path) -> None:
    (folder / "own.py").write_text(f"open({str(outside / 'run')!r}, 'w')")
    change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})


def with_tokenizer_code(folder: Path, outside: Path) -> None:
    (folder / "own.py").write_text(f"open({str(outside / 'run')!r}, 'w')")
    own = {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=own)


def indexed(name: Callable[[Path], str]) -> Spoil:
    def spoil(folder: Path, outside: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        weight_map = dict.fromkeys(tensors, name(outside / WEIGHTS))
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return spoil


def linked(name: str) -> Spoil:
    def spoil(folder: Path, outside: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(outside / name)

    return spoil


def pickled(folder: Path, outside: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def configured(**values: Any) -> Spoil:
    return lambda folder, outside: change(folder / "config.json", **values)


def adapted(folder: Path, outside: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(outside)}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))


@pytest.mark.parametrize(
    "spoil",
    [
        with_code,
        with_tokenizer_code,
        indexed(lambda path: f"../{path.parent.name}/{path.name}"),
        indexed(str),
        linked(WEIGHTS),
        linked("tokenizer.json"),
        pickled,
        adapted,
        configured(transformers_weights="../outside/model.safetensors"),
        configured(attn_implementation="somebody/kernels"),
        configured(text_config={"_attn_implementation": "somebody/kernels"}),
    ],
    ids=[
        "code", "tokenizer code", "index", "absolute index", "link", "tokenizer link", "pickle",
        "adapter", "other weights", "kernels", "nested kernels",
    ],
)  # fmt: skip
def test_what_leads_elsewhere_is_refused(good: Path, tmp_path: Path, spoil: Spoil) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside"
    shutil.copytree(good, folder)
    shutil.copytree(good, outside)
    tensors = load_file(outside / WEIGHTS)
    wrong = {name: torch.full_like(each, OUTSIDE) for name, each in tensors.items()}
    save_file(wrong, outside / WEIGHTS, {"format": "pt"})
    spoil(folder, outside)
    with pytest.raises(FlashtuneError) as caught:
        RunningModel.load(ModelFolder.open(folder), "cpu")
    assert str(caught.value).isprintable()
    assert not (outside / "run").exists()


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_a_class_is_asked_without_the_kernels_that_a_config_names(
    good: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    change(folder / "config.json", **{name: "somebody/kernels"})
    own = ask_model(folder)
    assert own is not None and own.names == ("lm_head.weight",)


def test_the_folder_itself_is_read(good: Path) -> None:
    model = RunningModel.load(ModelFolder.open(good), "cpu").model
    weight = load_file(good / WEIGHTS)["model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, weight)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "large", "loop", "bytes", "null"])
def test_prompts_that_are_no_text_are_one_line(kind: str, tmp_path: Path) -> None:
    path = Path("\0") if kind == "null" else tmp_path / "prompts"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "bytes":
        path.write_bytes(b"\xed\xa0\x80\n")
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(2**33)
    with pytest.raises(FlashtuneError) as caught:
        read_prompts(path)
    assert str(caught.value).isprintable()
