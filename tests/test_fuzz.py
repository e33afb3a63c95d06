"""Whatever stands in a file that comes from outside, its reader gives a result or an error that it documents.

Nothing else is allowed: no other error, no waiting, no memory out of proportion to the file. The examples are valid
files with random damage, because pure noise is refused at the first byte. For many more of them, run
`pytest tests/test_fuzz.py --hypothesis-profile=long`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import os
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from passion_monai.datasets import brats, myops
from passion_monai.datasets.datalist import read_datalist
from passion_monai.networks import BACKBONES, Backbone
from passion_monai.networks.checkpoints import load_reference_checkpoint, read_state_dict
from passion_monai.networks.pretrained import bundle_channels, transfer_weights
from passion_monai.presence import parse_combination, read_presence
from passion_monai.transforms import LoadCased

MODALITIES = ("a", "b", "c")
DEEP = b"[" * 100_000

Draw = st.DrawFn


def attempt(read: Callable[[], Any], names: str, *others: type[Exception]) -> Any:
    """What a reader gives; None where it raises an error that is documented, ValueError or one of the others.

    The message must hold the names.
    """
    try:
        return read()
    except (ValueError, *others) as error:
        message = str(error)
    assert names in message
    return None


@pytest.fixture(autouse=True, scope="module")
def silence() -> Iterator[None]:
    """Log nothing: names of files that are no text cannot be sent from one process of the tests to another."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder of its own for one example."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@st.composite
def damaged_bytes(draw: Draw, valid: bytes) -> bytes:
    """Some bytes changed, and maybe the end lost or something inserted."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(0, 4))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        at = draw(st.integers(0, len(content)))
        content[at:at] = draw(st.binary(max_size=8))
    return bytes(content[: draw(st.just(len(content)) | st.integers(0, len(content)))])


TEXT = st.text('ab+ "[],\\\n\0é\ud800', max_size=8)
WORDS = st.sampled_from(
    ["a", "b", "c", "d", "label", "case", "patient", "presence", "state_dict", "~nobody-of-this-name", "x" * 5000, "\0"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | WORDS
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | TEXT, inner, max_size=4),
    max_leaves=8,
)


def damaged(draw: Draw, node: Any) -> Any:
    """The value with one place in it replaced, removed or added to."""
    if isinstance(node, dict | list) and node and draw(st.integers(0, 5)):
        changed: Any = node.copy()
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if draw(st.integers(0, 5)):
            changed[key] = damaged(draw, node[key])
        else:
            del changed[key]
        return changed
    if isinstance(node, dict) and draw(st.booleans()):
        return {**node, draw(WORDS): draw(JSON)}
    if isinstance(node, list) and draw(st.booleans()):
        return [*node, draw(JSON)]
    return draw(JSON)


@st.composite
def damaged_json(draw: Draw, valid: Any) -> bytes:
    """JSON with up to three places changed; sometimes the text itself is damaged instead."""
    if not draw(st.integers(0, 9)):
        return draw(damaged_bytes(json.dumps(valid).encode()))
    for _ in range(draw(st.integers(0, 3))):
        valid = damaged(draw, valid)
    return json.dumps(valid).encode()


DATALIST = {
    "dataset": "x",
    "modalities": list(MODALITIES),
    "root": "data",
    "training": [
        {"case": "1", "patient": "p", "a": "a", "b": "b", "label": "label", "label_values": [0, 4]},
        {"case": "2", "patient": "q", "a": "a", "b": "b", "c": "c", "label": "label", "presence": [True, False, 1]},
    ],
    "inference": [{"case": "3", "patient": "r", "c": "c"}],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the datalist speaks of."""
    folder = tmp_path_factory.mktemp("data")
    for name in (*MODALITIES, "label"):
        (folder / name).touch()
    return folder


@given(content=damaged_json(DATALIST), section=st.sampled_from(["training", "inference"]), moved=st.booleans())
@example(content=DEEP, section="training", moved=False)
@example(
    content=json.dumps(DATALIST).replace('"data"', '"~nobody-of-this-name"').encode(), section="training", moved=False
)
def test_datalist(data: Path, content: bytes, section: str, moved: bool):
    with scratch() as folder:
        path = folder / "datalist.json"
        path.write_bytes(content)
        root = data if moved else None
        read = partial(read_datalist, path, section, modalities=MODALITIES, root=root)
        cases = attempt(read, str(path), FileNotFoundError)
    for case in cases or []:
        assert set(case) <= {"case", "patient", "label", "label_values", "presence", *MODALITIES}
        assert isinstance(case["case"], str)
        assert all(Path(case[key]).is_absolute() for key in (*MODALITIES, "label") if key in case)
        assert any(key in case for key in MODALITIES)
        assert all(type(value) is int for value in case.get("label_values", []))


PRESENCE = {"modalities": ["b", "c", "a"], "cases": {"1": [1, 0, 1], "2": [True, True, True]}}


def check_presence_file(name: str, content: bytes) -> None:
    with scratch() as folder:
        path = folder / name
        path.write_bytes(content)
        presence = attempt(partial(read_presence, path, MODALITIES, csv_prefixes=("p_",)), str(path))
    for case, row in (presence or {}).items():
        assert isinstance(case, str)
        assert row.dtype == bool
        assert row.shape == (3,)
        assert row.any()


@given(damaged_json(PRESENCE))
@example(DEEP)
@example(json.dumps(PRESENCE | {"modalities": "abc"}).encode())
def test_presence_as_json(content: bytes):
    check_presence_file("presence.json", content)


@st.composite
def csv_text(draw: Draw) -> bytes:
    """A split file of which some cells are anything."""
    header = ["data_name", "mask_id", "mask", "pos_mask_ids"]
    rows = [header, *([f"p_{n}", str(n), "[True, False, True]", "[1, 2]"] for n in range(draw(st.integers(0, 3))))]
    for row in rows:
        for _ in range(draw(st.integers(0, 2))):
            at = draw(st.integers(0, len(row) - 1)) if row else 0
            row[at : at + draw(st.integers(0, 2))] = draw(
                st.lists(TEXT | st.sampled_from(header) | st.sampled_from(["[True]", "[False]"]), max_size=2)
            )
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return draw(damaged_bytes(file.getvalue().encode("utf-8", "replace") or b"\n"))


@given(csv_text())
@example(b"")
@example(b"mask,data_name\n[True]\n")
@example(b"data_name,mask\n" + b"x" * 200_000)
@example(b"data_name,mask\n\xff,[True]\n")
def test_presence_as_csv(content: bytes):
    check_presence_file("presence.csv", content)


@given(st.lists(st.sampled_from([*MODALITIES, "+", " ", "A", "é"]) | TEXT).map("".join))
def test_combination(name: str):
    row = attempt(partial(parse_combination, name, MODALITIES), repr(name))
    if row is not None:
        assert sorted(name.split("+")) == [modality for modality, there in zip(MODALITIES, row, strict=True) if there]


METADATA = {"network_data_format": {"inputs": {"image": {"channel_def": {"0": "a", "1": "b"}}}}}


@given(damaged_json(METADATA))
@example(DEEP)
@example(json.dumps({"network_data_format": {"inputs": {"image": {"channel_def": {"1": "a"}}}}}).encode())
def test_metadata_of_a_bundle(content: bytes):
    with scratch() as folder:
        (folder / "configs").mkdir()
        path = folder / "configs" / "metadata.json"
        path.write_bytes(content)
        names = attempt(partial(bundle_channels, folder, "inputs", "image"), str(path))
    assert all(isinstance(name, str) for name in names or [])


# ---- Trees of files ----

NAMES = st.builds(
    lambda case, suffix, extension: case + suffix + extension,
    st.sampled_from(["x", "y-001-000", "y-001-001", ".hidden", "", "_", "\udcff"]),
    st.sampled_from(["", "_flair", "_t1", "_seg", "-t1c", "-seg", "_C0", "_DE", "_LGE", "_gd"]),
    st.sampled_from(["", ".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".dcm", ".txt"]),
)
KINDS = ("file", "folder", "link to nothing", "link to itself", "link to the root", "link to a file", "pipe")


def plant(root: Path, parts: list[str], kind: str) -> None:
    """Put something at a place below the root, if the place is free and possible."""
    path = root.joinpath(*(part for part in parts if part))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "file":
            path.touch()
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            targets = {"link to nothing": root / "nothing", "link to itself": path, "link to the root": root}
            path.symlink_to(targets.get(kind, __file__))
    except OSError:  # something else stands in the way
        pass


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows, and it has no pipes among files")
@given(
    tree=st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=3), st.sampled_from(KINDS)), max_size=8),
    discover=st.sampled_from([brats.discover, myops.discover]),
)
@example(tree=[(["x_flair.nii"], "pipe")], discover=brats.discover)
def test_discovery(tree: list[tuple[list[str], str]], discover: Callable[[Path], list[dict[str, Any]]]):
    with scratch() as root:
        for parts, kind in tree:
            plant(root, parts, kind)
        cases = attempt(partial(discover, root), str(root), FileNotFoundError) or []
        ids = [case["case"] for case in cases]
        assert ids == sorted(set(ids))
        for case in cases:
            files = {key: Path(case[key]) for key in case.keys() - {"case", "patient", "label_values"}}
            assert files.keys() - {"label"}
            assert all(path.is_file() or path.is_dir() for path in files.values())


# ---- Images ----


def nifti(shape: tuple[int, ...] = (6, 5, 4)) -> bytes:
    image = nib.Nifti1Image(np.random.default_rng(0).integers(1, 99, shape).astype(np.int16), np.diag([1, 2, 3, 1]))
    image.set_qform(image.affine, code=1)
    return bytes(image.to_bytes())


@st.composite
def damaged_nifti(draw: Draw) -> tuple[str, bytes]:
    """Fields of the header written over, then maybe the bytes of the file damaged."""
    content = bytearray(nifti())
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.sampled_from([0, *range(40, 56, 2), 70, 72, *range(76, 120, 4), *range(252, 328, 4), 344, 348]))
        value = draw(
            st.binary(min_size=2, max_size=4) | st.sampled_from([b"\x00" * 4, b"\xff\x7f", b"\x00\x00\xc0\x7f"])
        )
        content[at : at + len(value)] = value
    raw = bytes(content)
    if draw(st.booleans()):
        return "a.nii", draw(damaged_bytes(raw))
    return "a.nii.gz", draw(damaged_bytes(gzip.compress(raw, mtime=0)) | damaged_bytes(raw).map(gzip.compress))


def claiming(shape: tuple[int, int, int]) -> bytes:
    content = bytearray(nifti())
    content[42:48] = np.array(shape, "<i2").tobytes()
    return bytes(content)


@given(damaged_nifti())
@example(("a.nii", claiming((30_000,) * 3)))
@example(("a.nii", claiming((500, 500, 500))))
@example(("a.nii.gz", gzip.compress(claiming((500, 500, 500)))))
@example(("a.nii", nifti()[:280] + bytes(48) + nifti()[328:]))
def test_image(file: tuple[str, bytes]):
    name, content = file
    with scratch() as folder:
        path = folder / name
        path.write_bytes(content)
        tracemalloc.start()
        case = attempt(partial(LoadCased(["a"]), {"case": "x", "a": str(path)}), f"Case x: a file {path}")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20e6
    if case is not None:
        assert case["a"].ndim == 4
        assert bool(torch.isfinite(case["a"]).all())
        assert np.linalg.matrix_rank(case["a"].affine[:3, :3].numpy()) == 3


# ---- Weights ----

SMALL: dict[str, dict[str, int]] = {
    "mmformer": {"width": 2, "token_channels": 16, "num_heads": 2, "mlp_channels": 32},
    "rfnet": {"width": 4},
    "m2ftrans": {"width": 2, "num_heads": 2, "mlp_channels": 32},
}
NETWORKS = {name: BACKBONES[name](2, 2, 3, img_size=32, **arguments) for name, arguments in SMALL.items()}


def saved(content: Any, **arguments: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **arguments)
    return file.getvalue()


STATE = {"module.first.weight": torch.ones(2, 3), "second": torch.zeros(4, dtype=torch.int64)}
CHECKPOINTS = [saved({"state_dict": STATE, "epoch": 3}), saved(STATE, _use_new_zipfile_serialization=False)]


@given(st.sampled_from(CHECKPOINTS).flatmap(damaged_bytes) | JSON.map(saved))
@example(b"")
@example(saved([1, 2]))
@example(saved({"state_dict": None}))
@example(saved({1: torch.ones(1)}))
def test_bytes_of_a_checkpoint(content: bytes):
    with scratch() as folder:
        path = folder / "model.pt"
        path.write_bytes(content)
        state = attempt(partial(read_state_dict, path), str(path)) or {}
    assert all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())


AUTHORS_NAMES = """
flair t1 _encoder. e1_c1 e1_c9 _encode_conv. _transformer. multimodal_transformer. cross_ attention_list.0. conv4.
ffn_list.0. fn.norm. fn.fn.qkv. fn.fn.other. decoder_fuse. decoder_sep. d2_ c1. out. RFM3. seg_d9. prm_generator1.
prm_layer. modal_fusion.2. weight_layer. Bottleneck.trans_bottle. decoder_fusion. CT1.layers.0. cross_attn. _pos pos
query_map_t1. value_map_other. fusion conv. weight bias
"""
NAME_PARTS = st.sampled_from(AUTHORS_NAMES.split())
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 7, 8, 16]), max_size=5)


Spec = tuple[str, bool, dict[str, list[int]]]


@st.composite
def specs(draw: Draw) -> Spec:
    """Which network, whether the state has what belongs there, and shapes that come on top.

    They are under names of the network, of the authors' code, and in between.
    """
    name = draw(st.sampled_from(list(NETWORKS)))
    own = st.sampled_from(list(NETWORKS[name].state_dict()))
    parts = st.lists(NAME_PARTS, max_size=6).map("".join)
    return name, draw(st.booleans()), draw(st.dictionaries(own | parts, SHAPES, max_size=6))


def state_of(spec: Spec) -> tuple[Backbone, dict[str, torch.Tensor]]:
    name, complete, shapes = spec
    network = NETWORKS[name]
    state = {} if not complete else network.state_dict()
    return network, {"flair_encoder.e1_c1.x": torch.ones(1), **state, **{n: torch.ones(s) for n, s in shapes.items()}}


@given(specs())
@example(("rfnet", False, {"flair_encoder.e1_c9.conv.weight": [1]}))
@example(("rfnet", False, {"flair_pos": [1, 4, 16], "t1_encoder.e1_c1.x": [1], "t1_pos": [1, 4, 16]}))
@example(("mmformer", True, {"t1_encoder.x": [], "flair_pos": [], "t1_pos": []}))
@example(("mmformer", True, {"encoders.0.stages.0.entry.conv.weight": []}))
@example(("mmformer", True, {"position_embeddings": [3, 3, 16]}))
@example(("mmformer", True, {"fusion_decoder.heads.0.conv.bias": [1, 3]}))
@example(("mmformer", True, {"unknown_transformer.cross_attention_list.0.fn.norm.weight": [16]}))
def test_names_and_shapes_of_the_authors_weights(spec: Spec):
    network, state = state_of(spec)
    report = attempt(partial(load_reference_checkpoint, state, backbone=network), "Nothing in the checkpoint fits")
    if report is not None:
        assert {*report.loaded, *report.missing} == network.state_dict().keys()
        assert not {*report.loaded} & {*report.missing}


@given(specs(), st.sampled_from(["ab", "ba", "abc", "a", "cbad"]))
@example(("m2ftrans", True, {"bottleneck.fusion_tokens": [0, 4, 32]}), "abc")
@example(("rfnet", True, {name: [1, 1] for name in NETWORKS["rfnet"].state_dict() if "fuse_modalities" in name}), "abc")
def test_names_and_shapes_of_pretrained_weights(spec: Spec, pretrained_modalities: str):
    network, state = state_of(spec)
    names = {"modalities": "ab", "pretrained_modalities": pretrained_modalities}
    classes = {"classes": "012"[: network.num_classes], "pretrained_classes": "012"}
    transfer = partial(transfer_weights, network, state, **names, **classes)
    report = attempt(transfer, "no encoder that fits")
    if report is not None:
        assert {*report.transferred, *report.partial, *report.fresh} == network.state_dict().keys()
