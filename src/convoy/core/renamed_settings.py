"""Settings that were renamed: old names are refused in new settings and translated in old training records."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from convoy.core.errors import ConvoyError

# New names by old dotted key, in which * stands for any architecture.
RENAMED_SETTINGS = {
    "seed": "train.seed and split.seed",
    "fetch.max_bad_fraction": "max_invalid_fraction",
    "preprocess.near_duplicate": "near_duplicate_threshold",
    "train.max_minutes": "trainer.max_time",
    "trainer.nodes": "num_nodes",
    "model.*.recipe.accumulate": "accumulate_grad_batches",
    "model.*.recipe.body_lr": "backbone_lr_scale",
    "model.*.recipe.warmup": "warmup_fraction",
    "model.*.recipe.clip_norm": "grad_clip_norm",
    "model.*.recipe.ema": "ema_decay",
    "model.*.recipe.balance": "class_balance",
    "model.*.recipe.augment.shift": "max_shift",
    "model.*.recipe.augment.flip": "hflip",
    "model.*.recipe.augment.policy": "auto_augment",
    "model.*.recipe.augment.erase": "random_erasing",
    "register.gate.floor": "min_accuracy",
    "register.gate.class_drop": "max_recall_drop",
    "register.gate.min_class_images": "min_images_per_class",
    "register.gate.max_looks": "max_test_set_uses",
    "register.gate.acknowledge": "acknowledged_class_changes",
}


def refuse_old_names(keys: Iterable[str], origin: str) -> None:
    """Check that no setting has a name from before it was renamed.

    Args:
        keys: Dotted keys of settings.
        origin: Where the settings are from, such as "conf/", for the message.

    Raises:
        ConvoyError: If a setting has an old name. The message lists each with its new name.
    """
    lines = [f"{origin}: {key} is called {name} now" for key in keys if (name := _find_new_name(key))]
    if lines:
        raise ConvoyError("\n".join(lines))


def list_keys(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all settings and sections.

    Args:
        settings: Sections or settings by name.
        prefix: Text in front of each key, such as "model.".
    """
    for name, value in settings.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from list_keys(value, f"{prefix}{name}.")


def rename_model_settings(settings: Mapping[str, Any], prefix: str = "model.*.") -> dict[str, Any]:
    """Return the settings of an architecture from before the renaming, under their new names."""
    renamed: dict[str, Any] = {}
    for old, value in settings.items():
        name = _find_new_name(f"{prefix}{old}") or old
        renamed[name] = rename_model_settings(value, f"{prefix}{old}.") if isinstance(value, Mapping) else value
        if (name, value) == ("class_balance", "loss"):
            renamed[name] = "weighted_loss"
    return renamed


def _find_new_name(key: str) -> str | None:
    return RENAMED_SETTINGS.get(re.sub(r"^model\.[^.]+\.", "model.*.", key))
