"""Labels of the baseline figures show prompts as they are."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from moe_routing.figures.baseline import _by_prompt


def test_a_prompt_with_dollars_is_no_formula():
    prompts = pd.DataFrame({"prompt": [r"$\foo{ costs $5"], "n_tokens": [3]})
    ((_, label, _),) = _by_prompt(prompts)
    figure, axis = plt.subplots()
    axis.set_title(label)
    figure.canvas.draw()  # a formula that is none would raise
    plt.close(figure)
    assert r"\$\foo{ costs \$5" in label
