"""Pretrain a small OLMoE, step by step; `snakemake pretrain` runs all of it.

By hand, with a run's complete config (or config/pretrain.yaml) and folders of your choice:
  python scripts/pretrain.py tokenizer --config C --out tokenizer
  python scripts/pretrain.py tokens    --config C --tokenizer tokenizer --source NAME --out tokens
  python scripts/pretrain.py train     --config C --tokenizer tokenizer --tokens tokens --run run
                                       --weights weights.safetensors --log training.csv
  python scripts/pretrain.py export    --config C --tokenizer tokenizer
                                       --weights weights.safetensors --out model
  python scripts/pretrain.py measure   --config C --model model --tokens tokens --out card.json
  python scripts/pretrain.py card      --config C --measured card.json --tokens tokens
                                       --log training.csv --out model
                                       [--cells results/default/cells/stock]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from moe_pretraining.settings import PretrainConfig
from moe_routing.cli import run
from moe_routing.files import atomic_path
from moe_routing.schema import load_yaml
from moe_routing.usage import JobClock


def tokenizer(config: PretrainConfig, arguments: argparse.Namespace) -> None:
    """Train the tokenizer on the first documents of each source."""
    from moe_pretraining.tokenizer import train_on_sources

    train_on_sources(config).save_pretrained(arguments.out)


def tokens(config: PretrainConfig, arguments: argparse.Namespace) -> None:
    """Tokenize one source and split its documents into training and validation."""
    from moe_pretraining.corpus import tokenize_source
    from moe_pretraining.tokenizer import load_tokenizer

    tokenize_source(
        config.source(arguments.source),
        load_tokenizer(arguments.tokenizer),
        arguments.out,
        validation_share=config.validation_share,
        seed=config.seed,
    )


def train(config: PretrainConfig, arguments: argparse.Namespace) -> None:
    """Train, starting from the checkpoint in the run's folder if there is one."""
    from moe_pretraining.tokenizer import load_tokenizer
    from moe_pretraining.train import Trainer

    trainer = Trainer(config, load_tokenizer(arguments.tokenizer), arguments.tokens, arguments.run)
    trainer.run()
    trainer.save_weights(arguments.weights)
    with atomic_path(arguments.log) as temporary:
        shutil.copyfile(arguments.run / "training.csv", temporary)


def export(config: PretrainConfig, arguments: argparse.Namespace) -> None:
    """Write the trained weights and the tokenizer as a folder that transformers loads."""
    from moe_pretraining.model import export_model
    from moe_pretraining.tokenizer import load_tokenizer

    export_model(config, arguments.weights, load_tokenizer(arguments.tokenizer), arguments.out)


def measure(config: PretrainConfig, arguments: argparse.Namespace) -> None:
    """Measure the exported model for its card."""
    from moe_pretraining.measure import measure_model

    measured = measure_model(config, arguments.model, arguments.tokens)
    with atomic_path(arguments.out) as temporary:
        temporary.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def card(config: PretrainConfig, arguments: argparse.Namespace) -> None:
    """Write the model card and its figure."""
    import pandas as pd

    from moe_pretraining.card import write_card
    from moe_pretraining.plot import plot_training

    log = pd.read_csv(arguments.log)
    measured = json.loads(arguments.measured.read_text(encoding="utf-8"))
    corpus = {
        source.name: json.loads((arguments.tokens / f"{source.name}.json").read_text("utf-8"))
        for source in config.sources
    }
    cells = (
        [json.loads(path.read_text()) for path in sorted(arguments.cells.glob("*.json"))]
        if arguments.cells
        else []
    )
    plot_training(log, arguments.out / "training.png")
    write_card(config, measured, log, corpus, arguments.out / "README.md", cells)


STEPS = {
    tokenizer: ("out",),
    tokens: ("tokenizer", "source", "out"),
    train: ("tokenizer", "tokens", "run", "weights", "log"),
    export: ("tokenizer", "weights", "out"),
    measure: ("model", "tokens", "out"),
    card: ("measured", "tokens", "log", "out"),
}
"""The steps in order, each with the options it needs in addition to --config."""


def main(clock: JobClock) -> None:
    """Parse arguments and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(metavar="step", required=True)
    for step, options in STEPS.items():
        subparser = steps.add_parser(step.__name__, help=step.__doc__, description=step.__doc__)
        subparser.set_defaults(step=step)
        for option in ("config", *options):
            kind = str if option == "source" else Path
            subparser.add_argument(f"--{option}", type=kind, required=True)
        if step is card:
            subparser.add_argument(
                "--cells",
                type=Path,
                help="folder of a study's results for this model, for the benchmarks in its card",
            )
    arguments = parser.parse_args()
    clock.started()
    arguments.step(load_yaml(PretrainConfig, arguments.config), arguments)


if __name__ == "__main__":
    run(main)
