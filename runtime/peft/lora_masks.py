"""LoRA of peft with the masks of dropout that the runtime computes."""

# B sequences of a padded batch, S its length, I features in

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from muxtune.peft.lora import LoraSpec
from muxtune.tasks import PeftTask
from runtime.ops.dropout import Dropout, linear_key, sequence_key, token_keys
from runtime.peft.peft_library import peft_state


class MaskedReference:
    """A peft model with the task's masks in the place of peft's dropout; torch's would draw others.

    They work in evaluation mode too: it is the frozen backbone's dropout that is off.

    Args:
        peft_model: Model that ``get_peft_model`` returned.
        task: Task whose adapter it has.
    """

    def __init__(self, peft_model: nn.Module, task: PeftTask) -> None:
        self._seed = task.seed
        self._modules: list[_MaskedInput] = []
        self.module = peft_model.eval()  # the frozen backbone's own dropouts are off, as in the runtime
        assert isinstance(task.peft, LoraSpec)
        if not task.peft.dropout:
            return
        for name, module in peft_model.named_modules():
            replaced = getattr(module, "lora_dropout", None)
            if replaced is None:
                continue
            path = name.removeprefix("base_model.model.")
            masked = _MaskedInput(Dropout(task.peft.dropout, linear_key(path)))
            for adapter in replaced:
                replaced[adapter] = masked
            module.training = True  # only then has DoRA of peft dropout; of its modules, itself alone
            self._modules.append(masked)

    def state(self) -> dict[str, Tensor]:
        """Copy of the adapter under peft's keys."""
        return {key: tensor.detach().clone() for key, tensor in peft_state(self.module).items()}

    def enter(self, step: int, first: int, lengths: Sequence[int]) -> None:
        """Take the masks of a micro-batch.

        Args:
            step: Number of the optimizer step.
            first: Place of its first sequence in the global batch.
            lengths: Tokens of its sequences, which are padded to the longest.
        """
        if not self._modules:
            return
        places = range(first, first + len(lengths))
        sequences = np.array([sequence_key(self._seed, step, place) for place in places], dtype=np.uint64)
        keys = token_keys(sequences[:, None], np.arange(max(lengths))).view(np.int64)
        for module in self._modules:
            module.keys_BS = torch.from_numpy(keys)


class _MaskedInput(nn.Module):
    """Dropout like :class:`torch.nn.Dropout`, but its mask depends on the tokens' places alone."""

    def __init__(self, dropout: Dropout) -> None:
        super().__init__()
        self._dropout = dropout
        self.keys_BS = torch.zeros(0, 0, dtype=torch.int64)

    def forward(self, x_BSI: Tensor) -> Tensor:
        """What A reads."""
        keep = self._dropout.keep(self.keys_BS.flatten(), x_BSI.shape[-1])
        return x_BSI * keep.view(x_BSI.shape) * self._dropout.scale
