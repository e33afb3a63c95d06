"""A round of federated learning by MONAI's own client, which knows nothing of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Bundle
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, WeightType
from monai.fl.utils.exchange_object import ExchangeObject


@pytest.mark.parametrize("bundle", ["brats_rfnet_passion"], indirect=True)
@pytest.mark.filterwarnings("ignore:executing the bundle config")
def test_a_round(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    phantom = bundle.small["phantom"] | {"num_cases": 7}
    settings = bundle.small | {"output_dir": str(tmp_path / "site"), "phantom": phantom}
    client = MonaiAlgo(
        bundle_root=str(bundle.folder),
        config_train_filename="configs/train.yaml",
        config_evaluate_filename="configs/train.yaml",
        train_kwargs=dict(settings),
        eval_kwargs=dict(settings),
    )
    client.initialize({ExtraItems.CLIENT_NAME: "hospital"})
    sent = client.trainer.network.state_dict()  # type: ignore[union-attr]
    weights = {name: tensor.clone() for name, tensor in sent.items()}  # the server's are not the client's memory

    client.train(ExchangeObject(weights=weights))
    changes: Any = client.get_weights()
    assert changes.weight_type == WeightType.WEIGHT_DIFF
    assert changes.weights.keys() == client.evaluator.network.state_dict().keys()  # type: ignore[union-attr]
    assert any(change.abs().max() > 0 for change in changes.weights.values())

    trained = {name: weights[name] + change for name, change in changes.weights.items()}
    metrics = client.evaluate(ExchangeObject(weights=trained)).metrics
    assert 0 <= metrics["mean_dice"] <= 1
    network = client.evaluator.network  # type: ignore[union-attr]
    assert all(torch.equal(tensor, trained[name]) for name, tensor in network.state_dict().items())
    client.finalize()
