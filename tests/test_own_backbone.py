"""The networks in examples/own_backbone/ keep the contract of a backbone, and the commands of its page run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from passion_monai.distillation import SelfDistillation
from passion_monai.networks import Backbone
from passion_monai.objectives import make_objective
from passion_monai.presence import combinations

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "own_backbone"
# Module, class, the smallest that they can be.
EXAMPLES: list[tuple[str, str, dict[str, Any]]] = [
    ("segresnet", "MultiSegResNet", {"img_size": 32, "init_filters": 8}),
    ("swin_unetr", "MultiSwinUNETR", {"img_size": 64, "feature_size": 12}),
]


@pytest.fixture(params=EXAMPLES, ids=lambda example: example[0])
def network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backbone]:
    module, name, settings = request.param
    monkeypatch.syspath_prepend(FOLDER)
    torch.manual_seed(0)
    yield getattr(__import__(module), name)(2, num_modalities=3, num_classes=4, **settings).eval()
    sys.modules.pop(module)


@torch.no_grad()
def test_absent_sequences_have_no_influence_and_all_combinations_come_from_one_encoding(network: Backbone):
    image = torch.randn(1, 3, *network.img_size)
    features = network.encode(image, torch.ones(1, 3, dtype=torch.bool))
    for row in torch.from_numpy(combinations(3))[:, None]:
        garbage = image.masked_fill(~row[..., None, None], torch.nan)
        expected = network(garbage, row)
        assert expected.isfinite().all()
        torch.testing.assert_close(network.decode(features, row).logits, expected)


@torch.no_grad()
def test_samples_of_a_batch_may_have_different_sequences(network: Backbone):
    image = torch.randn(2, 3, *network.img_size)
    presence = torch.tensor([[True, True, False], [False, True, False]])
    single = [network(image[n : n + 1], presence[n : n + 1]) for n in range(2)]
    torch.testing.assert_close(network(image, presence), torch.cat(single), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["passion", "released", "baseline"])
def test_objectives_train_the_encoders_of_the_sequences_present(network: Backbone, name: str):
    objective = make_objective(name, modalities=("a", "b", "c"), num_classes=4, availability=torch.ones(3))
    distillation = SelfDistillation(network, students=objective.students, own_predictions=objective.own_predictions)
    image, label = torch.randn(1, 3, *network.img_size), torch.randint(4, (1, 1, *network.img_size))
    objective.loss(distillation(image, torch.tensor([[True, False, True]]), label), label).backward()
    trained = [any(parameter.grad is not None for parameter in encoder.parameters()) for encoder in network.encoders]
    assert trained == [True, False, True]


def test_an_example_is_as_short_as_the_page_says():
    page = (ROOT / "docs" / "own_backbone.md").read_text(encoding="utf-8")
    for module, _, _ in EXAMPLES:
        lines = len((FOLDER / f"{module}.py").read_text(encoding="utf-8").splitlines())
        assert lines <= 60
        assert re.search(rf"{module}\.py\) in {lines}", page)


@pytest.mark.parametrize("module", ["segresnet", pytest.param("swin_unetr", marks=pytest.mark.slow)])
def test_the_commands_of_the_page(module: str, tmp_path: Path):
    (script,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "own_backbone.md").read_text(encoding="utf-8"), re.S)
    if module == "swin_unetr":
        script = script.replace("segresnet", module).replace("[32,32,32]", "[64,64,64]").replace("6.0", "3.0")
    for folder in ("bundles", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-5000:]
    run = tmp_path / "runs" / module
    assert (run / "evaluation" / "scores.csv").is_file()
    assert list((run / "predictions").glob("*_seg.nii.gz"))
    exported = torch.jit.load(tmp_path / "runs" / f"{module}.ts")
    size = 64 if module == "swin_unetr" else 32
    image, alone = torch.randn(1, 4, *[size] * 3), torch.tensor([[False, True, False, False]])
    assert exported.eval()(image, alone).shape == (1, 4, *[size] * 3)
