"""LoRA adapters of random numbers, as PEFT saves them."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def with_lora(model: Any, targets: Any = ALL, *, rank: int = 4, seed: int = 1, **options: Any) -> Any:
    """A PeftModel around a copy of ``model``, A and B random and large enough to change what it says."""
    import peft
    import torch

    torch.manual_seed(seed)
    targets = list(targets) if isinstance(targets, tuple) else targets
    config = peft.LoraConfig(
        **{"r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "task_type": "CAUSAL_LM", **options}
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft's own use of it
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # it says that it corrects that
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.2)
    return wrapped.eval()


def write_lora(folder: Path, model: Any, targets: Any = ALL, *, base: str = "", **options: Any) -> Path:
    """Save `with_lora`; ``base`` is what the adapter says that it was trained on."""
    with_lora(model, targets, **options).save_pretrained(folder)
    change_config(folder, base_model_name_or_path=base)
    return folder


def change_config(folder: Path, **values: Any) -> Path:
    """Let adapter_config.json say something else."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder
