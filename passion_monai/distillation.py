"""Multi-uni self-distillation around any backbone (PASSION, ACM MM 2024, Sec. 3.2): which passes a training step runs.

In the words of the paper and the authors' code: the fused prediction of all available modalities is the teacher; the
same decoder given one modality alone is that modality's student; a modality's own prediction by the shared decoder
("sep") regularises the Baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from passion_monai.devices import read_back
from passion_monai.losses.prototype import PrototypeDistillationLoss
from passion_monai.networks.base import Backbone, DecoderOutput, Features, select_rows
from passion_monai.passes import DistillationOutput
from passion_monai.precision import autocast
from passion_monai.preference import relative_preference, task_mask

__all__ = ["DistillationOutput", "SelfDistillation"]

STUDENTS = ("none", "measured", "trained")
OWN_PREDICTIONS = ("none", "all", "neglected")


class SelfDistillation(nn.Module):
    """Runs a backbone's passes for a training step, from one encoding of the image.

    Args:
        backbone: the network that is trained; it is all that is needed afterwards.
        students: whether to run one pass per present modality alone: "none" (Baseline), "trained" (PASSION), or
            "measured", without gradient, for the relative preference that a method leaves behind.
        own_predictions: which present modalities the shared decoder is run on: "none", "all" (Baseline), or those that
            are "neglected", delta of Eq. (11), because an objective uses no others; these need students and a label.
        precision: that of the passes, one of :data:`passion_monai.precision.PRECISIONS`; what they put out is float32
            in any case, for the losses.
        activation_checkpointing: whether to compute what the passes have computed once more for the gradients, instead
            of keeping it: less memory for more time, the same numbers.

    Shape:
        - Input: image [B, M, H, W(, D)], presence bool [B, M], label int [B, 1, H, W(, D)] if needed.
        - Output: :class:`DistillationOutput`.

    Raises:
        ValueError: when `students` or `own_predictions` is none of these.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        students: str = "trained",
        own_predictions: str = "none",
        precision: str = "float32",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if students not in STUDENTS:
            raise ValueError(f"students must be one of {STUDENTS}, got {students!r}.")
        if own_predictions not in OWN_PREDICTIONS:
            raise ValueError(f"own_predictions must be one of {OWN_PREDICTIONS}, got {own_predictions!r}.")
        self.backbone = backbone
        self.students = students
        self.own_predictions = own_predictions
        self.precision = precision
        self.activation_checkpointing = activation_checkpointing

    def forward(self, image: Tensor, presence: Tensor, label: Tensor | None = None) -> DistillationOutput:
        presence = presence.cpu()
        with autocast(image.device, self.precision):
            features = self._run(self.backbone.encode, image, presence)
            fused = self._run(self.backbone.decode, features, presence)
            none: tuple[None, ...] = (None,) * self.backbone.num_modalities
            output = DistillationOutput(presence, fused, none, none, torch.zeros_like(presence))
            if self.students != "none":
                with torch.set_grad_enabled(torch.is_grad_enabled() and self.students == "trained"):
                    output = output._replace(students=self._run_students(features, output.student_rows))
            if self.own_predictions != "none":
                rows = presence if self.own_predictions == "all" else self._neglected(output, label)
                output = output._replace(own_predictions=self._run_own_predictions(features, rows), own_rows=rows)
        return output if self.precision == "float32" else _to_float32(output)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """That of the backbone: the weights go by the same names in training, in validation and afterwards."""
        return self.backbone.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the backbone."""
        return self.backbone.load_state_dict(*args, **kwargs)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of the backbone gives, maybe with checkpointing."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _run_students(self, features: Features, rows: Tensor) -> tuple[DecoderOutput | None, ...]:
        students: list[DecoderOutput | None] = []
        for modality, maps in enumerate(features):
            if maps is None or not rows[:, modality].any():
                students.append(None)
                continue
            alone: list[tuple[Tensor, ...] | None] = [None] * len(features)
            alone[modality] = select_rows(maps, rows[:, modality])
            only = torch.arange(len(features))[None] == modality
            students.append(self._run(self.backbone.decode, tuple(alone), only))
        return tuple(students)

    @torch.no_grad()
    def _neglected(self, output: DistillationOutput, label: Tensor | None) -> Tensor:
        """Where delta of Eq. (11) is 1, bool [B, M]; as the loss finds it too, from the same features."""
        if label is None:
            raise ValueError('own_predictions="neglected" needs the label.')
        with autocast(label.device, "float32"):  # as the loss; sums over a crop are too large for float16
            _, gap = PrototypeDistillationLoss(self.backbone.num_classes).of_students(output, label)
        return task_mask(relative_preference(read_back(gap), output.presence)).bool()

    def _run_own_predictions(self, features: Features, rows: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(
            None
            if maps is None or not rows[:, modality].any()
            else self._run(self.backbone.decode_modality, select_rows(maps, rows[:, modality]))
            for modality, maps in enumerate(features)
        )


def _to_float32(output: DistillationOutput) -> DistillationOutput:
    def convert(decoded: DecoderOutput) -> DecoderOutput:
        return DecoderOutput(
            decoded.logits.float(), tuple(logits.float() for logits in decoded.auxiliary), decoded.features.float()
        )

    return output._replace(
        fused=convert(output.fused),
        students=tuple(None if student is None else convert(student) for student in output.students),
        own_predictions=tuple(None if logits is None else logits.float() for logits in output.own_predictions),
    )
