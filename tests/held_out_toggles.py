"""Files of held-out toggles, made from those of a calibration."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import torch

from moe_routing.evaluation.held_out_files import HeldOutFiles


def write_held_out_toggles(root, toggles, texts, dead=2):
    """Write the toggles that the validity analysis reads: of each text, and with dead experts.

    The first ``dead`` experts of every layer are dead: toggling them changes nothing.
    """
    files = HeldOutFiles(root)
    for text in texts:
        toggles.save(files.toggles(text))
    for part in ("calibration", "held_out"):
        with_dead(toggles, dead).save(files.dead(part))
    experts = [(layer, expert) for layer in range(toggles.num_layers) for expert in range(dead)]
    pd.DataFrame(experts, columns=["layer", "expert"]).to_csv(files.dead_experts, index=False)


def with_dead(toggles, dead):
    """Return toggles in which those of the first experts change nothing."""
    living_P = toggles.expert_P >= dead
    changed = {
        name: torch.where(living_P, getattr(toggles, name), 0.0)
        for name in ("kl_P", "compensated_kl_P", "loss_change_P", "compensated_loss_change_P")
    }
    return replace(toggles, **changed, fingerprint="with dead experts")
