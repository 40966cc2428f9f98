"""Heads that a checkpoint stores quantised: read where the format is plain, else refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flashtune.kernels.head import FlashHead
from flashtune.kernels.model_folder.folder import ModelFolder
from flashtune.tuning_db.errors import FlashtuneError

VOCAB, WIDTH, CLUSTERS = 60, 8, 12
HIDDEN = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(9))
Write = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def plain_torch(without_kernels: None) -> None:
    """A CPU without kernels, so that nothing is compiled."""


def numbers() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-127, 128, (VOCAB, WIDTH), generator=generator).to(torch.int8)


def fp8() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(VOCAB, WIDTH, generator=generator).to(torch.float8_e4m3fn)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) + 0.1


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A FlashHead model whose head is these tensors: `write(tensors, key=…)`, each a file."""

    def make(tensors: Tensors, shards: bool = False, **config: Any) -> Path:
        (tmp_path / "flash_head_assets").mkdir()
        usual = {"dtype": "float32", "n_probes": CLUSTERS, "tie_word_embeddings": False}
        (tmp_path / "config.json").write_text(json.dumps({**usual, **config}))
        save_file(
            {
                "centroids": torch.randn(WIDTH, CLUSTERS),
                "cluster_assignments": torch.arange(VOCAB) % CLUSTERS,
            },
            tmp_path / "flash_head_assets" / "clustering_cache.safetensors",
        )
        if not shards:
            save_file(tensors, tmp_path / "model.safetensors")
            return tmp_path
        files = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            files[name] = f"model-{number}.safetensors"
            save_file({name: tensor}, tmp_path / files[name])
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        return tmp_path

    return make


def blocks(each: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A scale for each number from one for each block."""
    wide = each.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)
    return wide[:VOCAB, :WIDTH]


PLAIN: dict[str, tuple[Tensors, torch.Tensor]] = {
    "int8, a scale a row": (
        {"weight": numbers(), "weight_scale": scales(VOCAB, 1)},
        numbers().float() * scales(VOCAB, 1),
    ),
    "int8, a flat scale a row in 16 bits": (
        {"weight": numbers(), "scales": scales(VOCAB).half()},
        numbers().float() * scales(VOCAB).half().float()[:, None],
    ),
    "int8, largest magnitudes": (
        {"weight": numbers(), "SCB": scales(VOCAB)},
        numbers().float() * scales(VOCAB)[:, None] / 127,
    ),
    "fp8, one scale": (
        {"weight": fp8(), "weight_scale": torch.tensor(0.5), "input_scale": torch.tensor(9.0)},
        fp8().float() * 0.5,
    ),
    "fp8, a scale a row": (
        {"weight": fp8(), "weight_scale_inv": scales(VOCAB, 1)},
        fp8().float() * scales(VOCAB, 1),
    ),
    "fp8, a scale a block": (
        {"weight": fp8(), "weight_scale_inv": scales(4, 2)},
        fp8().float() * blocks(scales(4, 2), 16, 5),
    ),
}
BLOCKS = {"quantization_config": {"weight_block_size": [16, 5]}}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("kind", PLAIN)
def test_plain_formats_are_read(write: Write, kind: str, shards: bool) -> None:
    tensors, weight = PLAIN[kind]
    named = {f"lm_head.{name}": tensor for name, tensor in tensors.items()}
    folder = write(named, shards, **BLOCKS)
    place = ModelFolder.open(folder).head_weight()
    assert (place.dtype, place.shape) == ("fp32", (VOCAB, WIDTH))
    torch.testing.assert_close(place.read(), weight)
    head = FlashHead.from_pretrained(folder)
    assert torch.equal(head(HIDDEN), (HIDDEN @ place.read().T).argmax(dim=1))


@pytest.mark.parametrize(
    ("config", "dtype"), [({}, "fp32"), ({"dtype": "float16"}, "fp16"), ({"dtype": None}, "bf16")]
)
def test_the_dtype_is_the_models(write: Write, config: dict[str, Any], dtype: str) -> None:
    folder = write({"lm_head.weight": numbers(), "lm_head.scales": scales(VOCAB) / 99}, **config)
    opened = ModelFolder.open(folder)
    assert opened.dtype == opened.head_weight().dtype == opened.problem().weight_dtype == dtype
    head = FlashHead.from_pretrained(folder, screen="int8")
    assert head.problem.model_dtype == dtype


def test_a_tied_embedding_may_be_quantised(write: Write) -> None:
    name = "model.embed_tokens"
    tensors = {f"{name}.weight": numbers(), f"{name}.weight_scale": scales(VOCAB)}
    folder = write(tensors, tie_word_embeddings=True)
    weight = numbers().float() * scales(VOCAB)[:, None]
    head = FlashHead.from_pretrained(folder)
    assert torch.equal(head(HIDDEN), (HIDDEN @ weight.T).argmax(dim=1))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"weight": numbers()}, "lm_head.weight is int8 with no scales beside it"),
        ({"weight": fp8()}, "lm_head.weight is fp8 with no scales beside it"),
        (
            {"weight": numbers(), "scales": scales(VOCAB), "weight_scale": scales(VOCAB)},
            "int8 with lm_head.weight_scale and lm_head.scales beside it",
        ),
        (
            {"weight": numbers(), "weight_scale": scales(7)},
            "int8 of shape [60, 8] with lm_head.weight_scale of shape [7]",
        ),
        (
            {"weight": numbers(), "weight_scale": scales(4, 2)},
            "nor one for each block that the config names",
        ),
        (
            {"weight": numbers(), "scales": scales(VOCAB), "weight_zero_point": scales(VOCAB)},
            "int8 with lm_head.weight_zero_point, which is not supported",
        ),
        (
            {"weight": numbers(), "scales": numbers()[:, 0].contiguous()},
            "lm_head.scales is I8, not one of BF16, F16, F32",
        ),
        (
            {"weight": torch.zeros(VOCAB * WIDTH // 2, 1, dtype=torch.uint8)},
            "weight is U8, not one of BF16, F16, F32, I8, F8_E4M3, F8_E5M2: load the model",
        ),
        ({"weight": numbers().int()}, "lm_head.weight is I32, not one of"),
        (
            {"qweight": torch.zeros(1, VOCAB, dtype=torch.int32), "scales": scales(1, VOCAB)},
            "the head is quantised, with its numbers packed in lm_head.qweight",
        ),
        (
            {"weight_packed": torch.zeros(VOCAB, 1, dtype=torch.int32)},
            "its numbers packed in lm_head.weight_packed: load the model in 16",
        ),
        (
            {"weight": numbers(), "scales": torch.full((VOCAB,), float("nan"))},
            "lm_head.weight contains NaN or infinity",
        ),
    ],
)
def test_what_is_not_plain_is_refused_in_a_line(write: Write, tensors: Tensors, said: str) -> None:
    folder = write({f"lm_head.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(FlashtuneError) as caught:
        FlashHead.from_pretrained(folder)
    message = str(caught.value)
    assert said in message and "\n" not in message
    assert message.startswith(str(folder / "model.safetensors"))
