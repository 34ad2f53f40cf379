"""Expert ablation on held-out text: what discoveries are worth, and what is left out.

One set of toggled experts (:class:`moe_routing.routing.toggles.Toggles`) of documents that nothing
was fitted on serves every null and level: what BH selects on the same router logits and states says
which of the toggles are discoveries. So all nulls are compared on the same model, tokens and
interventions. No model runs here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_routing.analysis.arms import ablation_arms
from moe_routing.analysis.discoveries import (
    Criterion,
    Found,
    false_discoveries,
    false_kept,
    left_out,
    own_choice,
    selected,
)
from moe_routing.analysis.needs import class_contrasts, needed_experts, presence
from moe_routing.analysis.pairs import Pairs
from moe_routing.analysis.tables import write_csv
from moe_routing.analysis.together import headroom, joint_removals
from moe_routing.config.study import StudyConfig
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls.needed import Needed, default_epsilon
from moe_routing.routing.strategies.testing import MultipleTesting
from moe_routing.routing.toggles import Toggles
