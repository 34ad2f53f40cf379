# Trains the embedded model: tokenizer, tokens, weights.
import os
import re
import sys

from moe_routing.errors import InputError
from moe_pretraining.settings import PretrainConfig
from moe_routing.workflow import (
    checkout_of,
    job_image,
    job_prefix,
    model_environment,
    refuse_templates,
    sections,
    validate_config,
    write_config,
)

try:
    # The folder of the root Snakefile, also where workflow/Snakefile is the main file or a module.
    CHECKOUT = checkout_of(workflow.current_basedir.get_path_or_uri(secret_free=True))
    refuse_templates(workflow.configfiles)
    given, files = workflow.config_settings.config, workflow.configfiles
    pretraining = validate_config(PretrainConfig, config, given, files)
    IMAGE = job_image(CHECKOUT, workflow.deployment_settings.deployment_method)
except InputError as error:
    sys.exit(f"error: {error}")

RUN = f"results/{pretraining.name}"
CONFIG = f"{RUN}/pretrain.yaml"
TOKENIZER = f"{RUN}/tokenizer"
TOKENS = f"{RUN}/tokens"
TEXT = {source.name: source for source in pretraining.sources}
NEEDS_NETWORK = any(source.kind == "hub" for source in pretraining.sources)
MODEL_ENVIRONMENT = model_environment(pretraining.device.startswith("cuda"))
OWN_PYTHON = not workflow.deployment_settings.deployment_method
shell.prefix(job_prefix(CHECKOUT, own_python=OWN_PYTHON, MPLBACKEND="agg"))


container: IMAGE


wildcard_constraints:
    source="|".join(map(re.escape, TEXT)),


# The complete config, as one file for the jobs. Were it the output of a rule, a job behind that rule
# would not be asked whether its own settings have changed.
onstart:
    write_config(pretraining, CONFIG)


rule pretrain_tokenizer:
    input:
        text=pretraining.local_files(),
    output:
        directory(TOKENIZER),
    log:
        f"{RUN}/logs/tokenizer.log",
    localrule: NEEDS_NETWORK
    conda:
        MODEL_ENVIRONMENT
    resources:
        mem_mb=lambda wildcards, attempt: 6000 * 2 ** (attempt - 1),
        runtime=30,
    params:
        config=CONFIG,
        settings=sections(pretraining, "sources", "tokenizer_bytes", "model"),
    message:
        "Training the tokenizer"
    shell:
        'HF_HUB_OFFLINE=$USER_OFFLINE python "$SCRIPTS/pretrain.py" tokenizer '
        "--config {params.config:q} --out {output:q} 2> {log:q}"


rule pretrain_tokens:
    input:
        tokenizer=TOKENIZER,
        text=lambda wildcards: pretraining.local_files(wildcards.source),
    output:
        train=f"{TOKENS}/{{source}}.train.npy",
        validation=f"{TOKENS}/{{source}}.validation.npy",
        counts=f"{TOKENS}/{{source}}.json",
    log:
        f"{RUN}/logs/tokens/{{source}}.log",
    benchmark:
        f"{RUN}/benchmarks/tokens/{{source}}.tsv"
    localrule: NEEDS_NETWORK
    conda:
        MODEL_ENVIRONMENT
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * 2 ** (attempt - 1),
        runtime=60,
    params:
        config=CONFIG,
        settings=lambda wildcards: TEXT[wildcards.source].model_dump(mode="json"),
        split=sections(pretraining, "validation_share", "seed"),
        folder=subpath(output.train, parent=True),
    message:
        "Tokenizing {wildcards.source}"
    shell:
        'HF_HUB_OFFLINE=$USER_OFFLINE python "$SCRIPTS/pretrain.py" tokens '
        "--config {params.config:q} --tokenizer {input.tokenizer:q} --source {wildcards.source:q} "
        "--out {params.folder:q} 2> {log:q}"


# The run's folder holds the checkpoint. It is no output, since Snakemake removes the outputs of a
# job that was stopped, and a stopped training goes on from there.
rule pretrain_train:
    input:
        tokenizer=TOKENIZER,
        tokens=expand(
            f"{TOKENS}/{{source}}.{{split}}.npy",
            source=TEXT,
            split=("train", "validation"),
        ),
        before=[pretraining.continue_from.weights] if pretraining.continue_from else [],
    output:
        weights=f"{RUN}/weights.safetensors",
        log=f"{RUN}/training.csv",
    log:
        f"{RUN}/logs/train.log",
    benchmark:
        f"{RUN}/benchmarks/train.tsv"
    conda:
        MODEL_ENVIRONMENT
    threads: pretraining.threads or workflow.cores
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * 2 ** (attempt - 1),
        runtime=7 * 24 * 60,
        gpu=int(pretraining.device.startswith("cuda")),
    params:
        config=CONFIG,
        settings=sections(
            pretraining,
            *sorted(set(type(pretraining).model_fields) - {"name", "card_tokens"}),
        ),
        tokens=lambda wildcards, input: os.path.dirname(input.tokens[0]),
        run=f"{RUN}/run",
    message:
        f"Training {pretraining.steps} steps; progress: tail -f {{log}}"
    # glibc gives freed memory back to the system at once unless told otherwise, and every step
    # asks for it again.
    shell:
        "MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=8589934592 "
        "MALLOC_TOP_PAD_=268435456 "
        'python "$SCRIPTS/pretrain.py" train --config {params.config:q} '
        "--tokenizer {input.tokenizer:q} --tokens {params.tokens:q} "
        "--run {params.run:q} --weights {output.weights:q} --log {output.log:q} 2> {log:q}"
